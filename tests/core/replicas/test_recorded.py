"""A recording has what is sent to the replicas, too."""

from __future__ import annotations

from sqlalchemy import select

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.recording import record
from tests.library import Author
from tests.wire import WireProxy


def test_reads_of_a_replica_and_writes_of_the_primary_are_recorded(
    engine: OptInEngine, session: OptInSession, wire: WireProxy, replica_wires: list[WireProxy]
) -> None:
    session.get_one(Author, 1)
    session.close()
    with (
        record(engine) as seen,
        wire.record() as of_primary,
        replica_wires[0].record() as of_replica,
    ):
        session.execute(select(Author)).all()
        with session.begin():
            session.get_one(Author, 1).name = "new"
        session.execute(select(Author)).all()
        session.close()
        session.execute(select(Author)).all()
    assert of_replica.round_trips >= 1
    assert of_primary.round_trips >= 4
    assert seen.round_trips == of_primary.round_trips + of_replica.round_trips
    (transaction,) = seen.transactions
    assert transaction.outcome == "committed"
    assert [each.verb for each in transaction.sent] == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]


def test_reads_of_one_session_from_a_replica_are_recorded(
    engine: OptInEngine, session: OptInSession, replica_wires: list[WireProxy]
) -> None:
    session.get_one(Author, 1)
    session.close()
    with record(session) as seen, replica_wires[0].record() as of_replica:
        session.execute(select(Author)).all()
        with OptInSession(engine) as other:
            other.execute(select(Author)).all()
    assert len(seen.statements) == 1
    assert of_replica.round_trips == 2
