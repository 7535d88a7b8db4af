"""A recording says what went over the wire: the statements, and the round trips."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.recording import record
from tests.library import Author, Document, Onlooker, authors, sent
from tests.wire import WireProxy

Work = Callable[[OptInSession], object]

READ = select(Author.name).where(Author.id == 1)
STREAM = select(Author).order_by(Author.id).execution_options(yield_per=2)
AGES = [{"i": i, "n": i} for i in range(1, 4)]
WORKS: dict[str, Work] = {}


def work(function: Work) -> Work:
    WORKS[function.__name__] = function
    return function


@work
def nothing(session: OptInSession) -> None:
    with session.begin():
        pass


@work
def read(session: OptInSession) -> None:
    session.execute(READ).all()
    session.get(Author, 2)


@work
def block(session: OptInSession) -> None:
    with session.begin():
        session.get_one(Author, 1).name = "x"
        session.add(Author(name="y"))


@work
def block_with_options(session: OptInSession) -> None:
    with session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True):
        session.get_one(Author, 1)


@work
def one_statement(session: OptInSession) -> None:
    session.add(Author(name="z"))
    session.commit()


@work
def write_outside(session: OptInSession) -> None:
    session.execute(update(authors).values(age=3))


@work
def flush(session: OptInSession) -> None:
    session.add_all([Author(name="y"), Document(author_id=1, title="z")])
    session.flush()
    session.commit()


@work
def savepoints(session: OptInSession) -> None:
    with session.begin():
        session.get_one(Author, 1)
        with session.begin_nested():
            session.add(Author(name="y"))
        with suppress(KeyError), session.begin_nested():
            session.add(Author(name="z"))
            session.flush()
            raise KeyError


@work
def rollback(session: OptInSession) -> None:
    with suppress(KeyError), session.begin():
        session.add(Author(name="y"))
        session.flush()
        raise KeyError


@work
def errors(session: OptInSession) -> None:
    with suppress(exc.IntegrityError):
        session.execute(insert(Author).values(id=1, name="x"))
    session.rollback()
    with suppress(exc.IntegrityError), session.begin():
        session.execute(insert(Author).values(id=1, name="x"))
    with suppress(exc.IntegrityError):
        session.add(Author(id=1, name="x"))
        session.commit()
    session.rollback()


@work
def unsendable(session: OptInSession) -> None:
    """The error is Python's, so nothing is sent."""
    with suppress(exc.ProgrammingError), session.begin():
        session.execute(text("SELECT :a"), {"a": object()})
    with suppress(exc.ProgrammingError):
        session.execute(text("SELECT :a"), {"a": object()})
    session.rollback()


@work
def many_rows(session: OptInSession) -> None:
    session.execute(insert(authors), [{"name": f"n{i}"} for i in range(5)])
    session.execute(
        update(authors).where(authors.c.id == sa.bindparam("i")).values(age=sa.bindparam("n")),
        AGES,
    )
    session.add_all([Author(name=f"m{i}") for i in range(5)])
    session.commit()


@work
def many_pages(session: OptInSession) -> None:
    session.execute(insert(Author).returning(Author.id), [{"name": f"n{i}"} for i in range(2500)])


@work
def stream(session: OptInSession) -> None:
    assert len(list(session.scalars(STREAM))) == 3
    with session.begin():
        assert len(list(session.scalars(STREAM))) == 3


@work
def half_a_stream(session: OptInSession) -> None:
    result = session.scalars(STREAM)
    next(iter(result))
    result.close()


@work
def driver_sql(session: OptInSession) -> None:
    session.connection().exec_driver_sql("SELECT 1")
    session.connection().exec_driver_sql("SELECT 1; SELECT 2")


@work
def often(session: OptInSession) -> None:
    """psycopg 3 prepares these, and forgets them after ROLLBACK."""
    for number in range(24):
        with suppress(KeyError), session.begin():
            session.execute(READ).all()
            session.execute(update(authors).values(age=3))
            if number in (10, 20):
                raise KeyError
        session.execute(READ).all()


@work
def find_or_create(session: OptInSession) -> None:
    filter_by_or_create(session, Author, {"name": "f"}, {})
    filter_by_or_create(session, Author, {"name": "f"}, {})


@work
def connections(session: OptInSession) -> None:
    engine: Any = session.get_bind()
    with engine.connect() as connection:
        connection.execute(READ).all()
    with engine.begin() as connection:
        connection.execute(READ).all()
        connection.execute(update(authors).values(age=3))


@pytest.mark.parametrize("begins_on_write", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_round_trips_are_counted_as_on_the_wire(
    engine: OptInEngine, wire: WireProxy, name: str, begins_on_write: bool
) -> None:
    with OptInSession(engine, begin_on_write=begins_on_write) as session:
        session.execute(text("SELECT 1"))
        with record(engine) as seen, wire.record() as recording:
            WORKS[name](session)
            session.commit()
            session.give_back()
    assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"
    assert seen.round_trips == sum(statement.round_trips for statement in seen.sent)
    inside = sum(transaction.round_trips for transaction in seen.transactions)
    outside = sum(each.round_trips for each in seen.sent if each.transaction is None)
    assert inside + outside == seen.round_trips
    begins = [text for text in recording.statements if text.startswith("BEGIN")]
    assert [each.sql for each in seen.sent if each.verb == "BEGIN"] == begins
    verbs = [each.verb for each in seen.sent if each.round_trips]
    assert _once_each(verbs) == _once_each(_without_streams(recording))
    assert all(transaction.outcome != "open" for transaction in seen.transactions)


def _without_streams(recording: Any) -> list[str]:
    """The verbs, with the SELECT that was asked for in place of the DECLARE that is sent."""
    verbs = ["SELECT" if verb == "DECLARE" else verb for verb in sent(recording)]
    return [verb for verb in verbs if verb not in ("FETCH", "CLOSE", "DEALLOCATE")]


def _once_each(verbs: list[str]) -> list[str]:
    """One for several in a row: `executemany()` is one statement here."""
    names = [verb.partition(" ")[0] for verb in verbs]
    return [verb for verb, before in zip(names, ["", *names], strict=False) if verb != before]


def test_round_trips_of_a_two_phase_commit_are_counted_as_on_the_wire(
    engine: OptInEngine, wire: WireProxy, sessions: sessionmaker[OptInSession]
) -> None:
    with (
        sessions(twophase=True) as session,
        record(engine) as seen,
        wire.record() as recording,
        session.begin(),
    ):
        session.execute(update(authors).values(age=3))
    assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"
    assert [each.verb for each in seen.sent] == ["BEGIN", "UPDATE", "PREPARE", "COMMIT"]
    assert [transaction.outcome for transaction in seen.transactions] == ["committed"]


def test_nothing_is_sent_for_the_recording(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    with wire.record() as recording:
        block(session)
        one_statement(session)
    onlooker.run("UPDATE author SET name = 'Ada' WHERE id = 1; DELETE FROM author WHERE id > 3")
    session.close()
    with record(session), wire.record() as recorded:
        block(session)
        one_statement(session)
    assert sent(recorded) == sent(recording)
