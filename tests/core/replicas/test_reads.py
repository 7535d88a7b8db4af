"""A read outside a transaction goes to a replica until its session has been to the primary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, select, text
from sqlalchemy.orm import Session, selectinload

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.core.replicas.support import IN_RECOVERY, is_on_replica, recorded
from tests.library import Author, Document, Editor, Onlooker, authors, sent
from tests.postgres import ReplicaServer
from tests.wire import WireProxy


def change(url: str, name: str) -> None:
    """Change a name, as somebody else."""
    onlooker = Onlooker(url)
    onlooker.run(f"UPDATE author SET name = '{name}' WHERE id = 1")
    onlooker.close()


READS: dict[str, Callable[[OptInSession], object]] = {
    "select": lambda session: session.execute(select(Author)).all(),
    "core": lambda session: session.execute(select(authors.c.name)).all(),
    "scalar": lambda session: session.scalar(select(Author)),
    "scalars": lambda session: session.scalars(select(Author)).all(),
    "query": lambda session: session.query(Author).filter_by(id=1).one(),
    "count": lambda session: session.query(Author).count(),
    "get": lambda session: session.get(Author, 1),
    "union": lambda session: session.execute(
        sa.union_all(select(authors.c.id), select(authors.c.id))
    ).all(),
    "from_statement": lambda session: session.scalars(
        select(Author).from_statement(select(Author))
    ).all(),
    "cte": lambda session: session.execute(select(select(Author.id).cte())).all(),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_outside_is_one_statement_to_the_replica_and_nothing_to_the_primary(
    session: OptInSession, wire: WireProxy, replica_wires: list[WireProxy], read: str
) -> None:
    with recorded(wire, replica_wires[0]) as (primary, replica):
        READS[read](session)
    assert sent(primary) == []
    assert primary.round_trips == 0
    assert sent(replica) == ["WITH" if read == "cte" else "SELECT"]


def test_lazy_and_eager_loads_and_refresh_read_from_the_replica(
    session: OptInSession, wire: WireProxy, replica_wires: list[WireProxy]
) -> None:
    with recorded(wire, replica_wires[0]) as (primary, replica):
        author = session.get_one(Author, 1)
        assert [document.title for document in author.documents] == ["Of 1"]
        session.refresh(author)
        session.expire(author, ["name"])
        assert author.name == "Ada"
        session.scalars(select(Document).options(selectinload(Document.author))).all()
    assert sent(primary) == []
    assert sent(replica) == ["SELECT"] * 6


def test_a_stream_outside_comes_from_the_replica(
    session: OptInSession, wire: WireProxy, replica_wires: list[WireProxy]
) -> None:
    with recorded(wire, replica_wires[0]) as (primary, replica):
        names = [author.name for author in session.scalars(select(Author)).yield_per(2)]
        streamed = session.scalars(select(Author.id).execution_options(yield_per=1)).all()
    assert (sorted(names), streamed) == (["Ada", "Bob", "Cid"], [1, 2, 3])
    assert sent(primary) == []
    assert "DECLARE" in sent(replica)


def test_a_transaction_is_on_the_primary_even_a_read_only_one(
    session: OptInSession, url: str, replica: ReplicaServer
) -> None:
    replica.pause_replay()
    change(url, "Eve")
    assert session.get_one(Author, 1).name == "Ada"
    with session.begin(read_only=True):
        assert session.get_one(Author, 1, populate_existing=True).name == "Eve"
        assert not is_on_replica(session)


def insert_outside(session: OptInSession) -> None:
    session.execute(sa.insert(Author).values(name="Dan"))


def update_fetching_outside(session: OptInSession) -> None:
    session.execute(
        sa.update(Author).values(age=31), execution_options={"synchronize_session": "fetch"}
    )


def flush_outside(session: OptInSession) -> None:
    session.add(Author(name="Dan"))
    session.flush()


def commit_outside(session: OptInSession) -> None:
    session.add(Author(name="Dan"))
    session.commit()


def commit(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="Dan"))


def roll_back(session: OptInSession) -> None:
    with session.begin():
        session.execute(select(Author)).all()
        session.rollback()


def fail(session: OptInSession) -> None:
    with pytest.raises(exc.IntegrityError):
        session.execute(sa.insert(Author).values(name="Ada"))


def insert_returning(session: OptInSession) -> None:
    session.scalars(sa.insert(Author).values(name="Dan").returning(Author)).one()


WRITES: list[Callable[[OptInSession], object]] = [
    insert_outside,
    insert_returning,
    update_fetching_outside,
    flush_outside,
    commit_outside,
    commit,
    roll_back,
    fail,
    lambda session: session.execute(text("UPDATE author SET age = 1")),
    lambda session: session.execute(text("SELECT 1")),
    lambda session: session.scalar(func.pg_backend_pid()),
    lambda session: session.connection(),
    lambda session: session.bulk_save_objects([Author(name="Dan")]),
    lambda session: session.bulk_insert_mappings(Author.__mapper__, [{"name": "Dan"}]),
    lambda session: session.bulk_update_mappings(Author.__mapper__, [{"id": 1, "age": 1}]),
    lambda session: session.query(Author).update({"age": 1}),
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_session_that_has_been_to_the_primary_reads_from_it_until_it_is_closed(
    session: OptInSession,
    replica: ReplicaServer,
    wire: WireProxy,
    write: Callable[[OptInSession], object],
) -> None:
    assert is_on_replica(session)
    replica.pause_replay()
    write(session)
    assert not is_on_replica(session)
    assert not is_on_replica(session)
    with wire.record() as recording:
        session.scalars(select(Author)).all()
    assert sent(recording) == ["SELECT"]
    session.expire_all()
    session.give_back()
    assert not is_on_replica(session)
    session.close()
    assert is_on_replica(session)


def test_a_session_with_waiting_changes_has_not_been_to_the_primary(session: OptInSession) -> None:
    session.add(Author(name="Dan"))
    with session.begin_nested() as empty:
        empty.rollback()
    session.close()
    session.add(Author(name="Dan"))
    assert is_on_replica(session)
    session.rollback()
    with session.begin():
        pass
    assert is_on_replica(session)


def test_a_session_reads_what_it_has_written(session: OptInSession, replica: ReplicaServer) -> None:
    replica.pause_replay()
    with session.begin():
        session.add(Author(name="Dan"))
    assert session.scalars(select(Author.name).where(Author.name == "Dan")).all() == ["Dan"]
    with OptInSession(session.get_bind()) as other:
        assert other.scalars(select(Author.name).where(Author.name == "Dan")).all() == []
    replica.resume_replay()
    replica.catch_up()
    with OptInSession(session.get_bind()) as other:
        assert other.scalars(select(Author.name).where(Author.name == "Dan")).all() == ["Dan"]
        assert is_on_replica(other)


@pytest.mark.parametrize("way", ["close", "reset", "invalidate"])
def test_a_session_may_be_told_to_read_from_the_primary(
    session: OptInSession, replica: ReplicaServer, url: str, way: str
) -> None:
    replica.pause_replay()
    change(url, "Eve")
    author = session.get_one(Author, 1)
    assert author.name == "Ada"
    session.read_from_primary()
    session.expire(author)
    assert author.name == "Eve"
    assert session.query(Author.name).filter_by(id=1).scalar() == "Eve"
    assert session.scalar(select(Author.name).where(Author.id == 1)) == "Eve"
    getattr(session, way)()
    assert is_on_replica(session)


def test_a_select_with_a_cte_that_writes_goes_to_the_primary(session: OptInSession) -> None:
    inserted = sa.insert(Author).values(name="Dan").returning(Author.id).cte()
    assert session.scalar(select(inserted.c.id)) == 4
    assert session.scalars(select(Author.name).where(Author.id == 4)).all() == ["Dan"]


def test_a_function_that_writes_says_what_to_do(session: OptInSession, wire: WireProxy) -> None:
    statement = select(func.nextval("author_id_seq"))
    with wire.record() as recording, pytest.raises(exc.InvalidRequestError) as caught:
        session.scalar(statement)
    assert "nextval() in a read-only transaction" in str(caught.value)
    assert "Put the statement into `with session.begin():`" in str(caught.value)
    assert sent(recording) == []
    assert is_on_replica(session)
    session.read_from_primary()
    assert session.scalar(statement) == 4


def test_a_lock_outside_is_refused_as_ever(session: OptInSession) -> None:
    with pytest.raises(exc.InvalidRequestError, match="protects nothing"):
        session.scalars(select(Author).with_for_update())
    assert is_on_replica(session)


def test_text_goes_to_a_replica_that_is_named(session: OptInSession, engine: OptInEngine) -> None:
    recovery = text("SELECT pg_is_in_recovery()")
    assert session.scalar(recovery, bind_arguments={"bind": engine.replicas[0]}) is True
    assert is_on_replica(session)
    assert session.scalar(recovery) is False


def test_a_stock_session_and_the_engine_itself_know_only_the_primary(engine: OptInEngine) -> None:
    with Session(engine) as stock:
        assert not is_on_replica(stock)
    with engine.connect() as connection:
        assert connection.scalar(IN_RECOVERY) is False
    with engine.begin() as connection:
        assert connection.scalar(IN_RECOVERY) is False


@pytest.mark.parametrize(
    ("model", "defaults"),
    [(Author, {}), (Editor, {"rank": 1})],
    ids=["one INSERT", "an INSERT for each table"],
)
def test_filter_by_or_create_is_seen_by_the_session_that_called_it(
    session: OptInSession, replica: ReplicaServer, model: Any, defaults: dict[str, Any]
) -> None:
    replica.pause_replay()
    engine = session.get_bind()
    assert isinstance(engine, OptInEngine)

    def get(session: OptInSession) -> tuple[Any, bool]:
        return filter_by_or_create(session, model, {"name": "Dan"}, defaults)

    created, is_new = get(session)
    assert is_new
    assert session.scalars(select(model).filter_by(name="Dan")).all() == [created]
    if model is Author:  # for one that is not unique it is too late
        with OptInSession(engine) as other:
            found, is_new = get(other)
            assert (found.id, is_new) == (created.id, False)


# Several replicas


def test_a_session_keeps_to_one_replica_and_sessions_use_all(
    two: OptInEngine, replica_wires: list[WireProxy]
) -> None:
    used: set[tuple[int, int]] = set()
    deadline = time.monotonic() + 30
    while len(used) < 2 and time.monotonic() < deadline:
        with recorded(*replica_wires) as (first, second), OptInSession(two) as session:
            for _ in range(4):
                is_on_replica(session)
                session.give_back()
        used.add((len(sent(first)), len(sent(second))))
        assert used <= {(4, 0), (0, 4)}
    assert len(used) == 2


def test_threads_read_from_replicas_and_write_on_the_primary(two: OptInEngine) -> None:
    barrier = threading.Barrier(8)
    seen: list[tuple[bool, str | None, bool]] = []

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(10):
            with OptInSession(two) as session:
                before = is_on_replica(session)
                with session.begin():
                    session.add(Author(name=f"{number} {turn}"))
                name = session.scalar(select(Author.name).filter_by(name=f"{number} {turn}"))
                seen.append((before, name, is_on_replica(session)))
                assert name == f"{number} {turn}"

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    assert {(before, after) for before, _, after in seen} == {(True, False)}
