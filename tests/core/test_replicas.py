"""Where a session's reads go, shown by a replica that is real and stands still when it has to."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, select, text
from sqlalchemy.orm import Session, selectinload

from fictive_sqlalchemy import (
    OptInEngine,
    OptInSession,
    create_engine,
    engine_from_config,
)
from fictive_sqlalchemy._core import health
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.testing import isolate
from tests.library import (
    Author,
    Document,
    Editor,
    Onlooker,
    assert_at_rest,
    authors,
    fill,
    opened,
    sent,
)
from tests.postgres import ReplicaServer
from tests.wire import Recording, WireProxy

IN_RECOVERY = select(func.pg_is_in_recovery())


@pytest.fixture
def replica_wires(replica: ReplicaServer) -> Iterator[list[WireProxy]]:
    """Two ways to the replica, which stand for two replicas."""
    with ExitStack() as stack:
        yield [stack.enter_context(WireProxy(replica.host, replica.port)) for _ in range(2)]


@pytest.fixture
def replica_urls(
    replica: ReplicaServer, replica_wires: list[WireProxy], driver: str, database: str
) -> list[str]:
    return [wire.url(replica.url(driver, database)) for wire in replica_wires]


@pytest.fixture
def engine(wire_url: str, replica_urls: list[str], replica: ReplicaServer) -> Iterator[OptInEngine]:
    """An engine with one replica, which has what the primary has."""
    with opened_with(wire_url, replica_urls[:1], replica) as engine:
        yield engine


@pytest.fixture
def two(wire_url: str, replica_urls: list[str], replica: ReplicaServer) -> Iterator[OptInEngine]:
    """An engine with two replicas."""
    with opened_with(wire_url, replica_urls, replica) as engine:
        yield engine


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


@contextmanager
def opened_with(
    url: str, urls: list[Any], replica: ReplicaServer, **options: Any
) -> Iterator[OptInEngine]:
    with opened(url, replicas=urls, **options) as engine:
        replica.catch_up()
        for one in engine.replicas:
            one.connect().close()
        yield engine
        for one in engine.replicas:
            if replica.is_running and one.health.is_up:
                assert_at_rest(one)


@contextmanager
def recorded(*wires: WireProxy) -> Iterator[list[Recording]]:
    with ExitStack() as stack:
        yield [stack.enter_context(wire.record()) for wire in wires]


def is_on_replica(session: Session) -> bool:
    return bool(session.scalar(IN_RECOVERY))


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


def test_a_transaction_is_on_the_primary_and_a_read_only_one_too(
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


def test_what_waits_has_been_nowhere(session: OptInSession) -> None:
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
    assert "Put it into `with session.begin():`" in str(caught.value)
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


# Replicas that are down


def test_reads_go_to_the_next_replica_and_at_last_to_the_primary(
    two: OptInEngine, replica_wires: list[WireProxy], wire: WireProxy
) -> None:
    for one in two.replicas:
        one.dispose(close=True)
    replica_wires[0].close()
    for _ in range(8):
        with OptInSession(two) as session:
            assert is_on_replica(session)
    assert [one.health.is_up for one in two.replicas] == [False, True]
    with OptInSession(two) as session:
        assert is_on_replica(session)
        replica_wires[1].close()
        assert not is_on_replica(session)  # the next one might be behind what it has seen
        with wire.record() as recording:
            assert not is_on_replica(session)
        assert sent(recording) == ["SELECT"]
    assert [one.health.is_up for one in two.replicas] == [False, False]


def test_a_replica_is_tried_again_after_a_while(
    engine: OptInEngine, replica: ReplicaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RETRY_AFTER", 3600.0)  # longer than a restart can take
    replica.shut_down("immediate")
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    replica.restart()
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    monkeypatch.setattr(health, "RETRY_AFTER", 0.01)
    engine.replicas[0].health.note(up=True)
    engine.replicas[0].health.note(up=False)
    deadline = time.monotonic() + 30
    found = False
    while not found and time.monotonic() < deadline:
        with OptInSession(engine) as session:
            found = is_on_replica(session)
    assert found
    assert engine.replicas[0].health.is_up


def test_only_one_at_a_time_finds_out_whether_a_replica_is_back() -> None:
    one = health.Health()
    one.note(up=False)
    assert not one.may_be_tried()
    one._down_until = time.monotonic()
    assert [one.may_be_tried() for _ in range(3)] == [True, False, False]
    one.note(up=True)
    assert [one.may_be_tried() for _ in range(3)] == [True, True, True]


def test_a_replica_that_dies_between_two_reads_is_no_error(
    session: OptInSession, engine: OptInEngine, replica: ReplicaServer
) -> None:
    assert is_on_replica(session)
    replica.shut_down("immediate")
    assert not is_on_replica(session)
    assert not engine.replicas[0].health.is_up


def test_a_connection_that_is_killed_while_idle_is_replaced(
    session: OptInSession, replica: ReplicaServer, driver: str, database: str
) -> None:
    pid = session.scalars(select(func.pg_backend_pid())).one()
    onlooker = Onlooker(replica.url(driver, database))
    onlooker.kill(pid)
    onlooker.close()
    assert is_on_replica(session)


def test_a_read_that_is_cut_off_raises_and_the_next_one_goes_elsewhere(
    session: OptInSession,
    engine: OptInEngine,
    wire: WireProxy,
    replica_wires: list[WireProxy],
) -> None:
    assert is_on_replica(session)
    replica_wires[0].before_forward = lambda message: (
        replica_wires[0].cut_all() if message.is_statement else None
    )
    with wire.record() as recording, pytest.raises(exc.DBAPIError) as caught:
        session.scalars(select(Author)).all()
    assert caught.value.connection_invalidated
    assert sent(recording) == []  # it is not sent twice
    assert not engine.replicas[0].health.is_up
    assert not is_on_replica(session)


def test_threads_go_on_while_a_replica_dies_and_comes_back(
    two: OptInEngine, replica: ReplicaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RETRY_AFTER", 0.05)
    stop = threading.Event()
    places: list[bool] = []
    errors: list[Exception] = []

    def work() -> None:
        while not stop.is_set():
            try:
                with OptInSession(two) as session:
                    places.append(is_on_replica(session))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: places[-50:].count(True) == 50)
        replica.shut_down("immediate")
        wait_until(lambda: places[-50:].count(False) == 50)
        replica.restart()
        wait_until(lambda: places[-50:].count(True) == 50)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # Those whose SELECT was under way when the server died, or about to be sent: its place to go is
    # known by then, and a new connection to there is refused.
    assert [one for one in errors if not isinstance(one, exc.OperationalError)] == []
    assert len(errors) <= len(threads) * len(two.replicas)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Engines


def test_replicas_have_the_options_and_the_execution_options_of_the_primary(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer
) -> None:
    own = {"url": replica_urls[1], "pool_size": 1, "connect_args": {"application_name": "own"}}
    with opened_with(
        wire_url,
        [replica_urls[0], own],
        replica,
        pool_size=3,
        connect_args={"application_name": "shop"},
        execution_options={"schema_translate_map": {"shop": "public"}},
    ) as engine:
        assert [one.pool.size() for one in engine.replicas] == [3, 1]  # type: ignore[attr-defined]
        named = select(func.current_setting("application_name"))
        for one, name in zip(engine.replicas, ["shop", "own"], strict=True):
            with one.connect() as connection:
                assert connection.scalar(named) == name
        table = sa.Table("author", sa.MetaData(schema="shop"), sa.Column("name", sa.Text))
        with OptInSession(engine) as session:
            assert len(session.scalars(select(table.c.name)).all()) == 3
            assert is_on_replica(session)


def test_copies_of_an_engine_have_copies_of_its_replicas(engine: OptInEngine) -> None:
    table = sa.Table("author", sa.MetaData(schema="shop"), sa.Column("name", sa.Text))
    copy = engine.execution_options(schema_translate_map={"shop": "public"})
    with OptInSession(copy) as session:
        assert len(session.scalars(select(table.c.name)).all()) == 3
        assert is_on_replica(session)
        session.scalar(text("SELECT 1"), bind_arguments={"bind": engine})
        assert not is_on_replica(session)
    engine.replicas[0].health.note(up=False)
    assert not copy.replicas[0].health.is_up
    engine.replicas[0].health.note(up=True)
    with OptInSession(engine) as session, pytest.raises(exc.ProgrammingError):
        session.scalars(select(table.c.name)).all()
    engine.update_execution_options(schema_translate_map={"shop": "public"})
    with OptInSession(engine) as session:
        assert len(session.scalars(select(table.c.name)).all()) == 3
        assert is_on_replica(session)


def test_dispose_takes_the_replicas_along(
    engine: OptInEngine, replica_wires: list[WireProxy]
) -> None:
    with OptInSession(engine) as session:
        is_on_replica(session)
    assert replica_wires[0].connections == 1
    engine.dispose()
    wait_until(lambda: replica_wires[0].connections == 0)


def test_isolation_sets_replicas_aside(engine: OptInEngine) -> None:
    with OptInSession(engine) as outer:
        assert is_on_replica(outer)
        with isolate(engine):
            assert not is_on_replica(outer)
            outer.close()
            with OptInSession(engine) as session, session.begin():
                session.add(Author(name="Dan"))
            with OptInSession(engine) as session:
                assert len(session.scalars(select(Author)).all()) == 4
        assert is_on_replica(outer)
        assert len(outer.scalars(select(Author)).all()) == 3


def test_configuration_may_be_strings(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer
) -> None:
    fill(wire_url)
    replica.catch_up()
    engine = engine_from_config(
        {
            "sqlalchemy.url": wire_url,
            "sqlalchemy.pool_size": "2",
            "sqlalchemy.replicas": "\n".join(replica_urls),
        }
    )
    with OptInSession(engine) as session:
        assert is_on_replica(session)
    assert [one.url.render_as_string(False) for one in engine.replicas] == replica_urls
    assert [one.pool.size() for one in engine.replicas] == [2, 2]  # type: ignore[attr-defined]
    engine.dispose()


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ([{"pool_size": 3}], {}, "needs a URL"),
        (["sqlite://"], {}, "another database system"),
        (["nonsense"], {}, "Could not parse the URL of replica 1"),
        (["postgresql://one", {}], {}, "replica 2 is empty"),
        (["postgresql://replica"], {"creator": print}, "give each one of its own"),
    ],
)
def test_what_can_not_be_a_replica_is_refused(
    url: str, given: list[Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(exc.ArgumentError, match=says):
        create_engine(url, replicas=given, **options)


SECRET = "postgresql://alice:secret@replica:5432/app"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"uri": SECRET}], "replica 1 has 'uri'"),
        ([{"ulr": SECRET, "connect_args": {"password": "secret"}}], "has 'ulr', 'connect_args'"),
        ([(SECRET, {"pool_size": 3})], "a tuple"),
        ([[SECRET]], "a list"),
        ([SECRET.encode()], "a bytes"),
        ([{"url": {"url": SECRET}}], "a dict"),
        (SECRET.replace("secret", "my secret"), "split at spaces"),
        ([SECRET.replace("://", ":/")], "Could not parse"),
        ([SECRET.replace("5432", "secret")], "Could not parse"),
        (["sqlite://"], "of sqlite can't be a replica of one of postgresql"),
    ],
    ids=str,
)
def test_no_error_about_a_replica_shows_a_password(url: str, given: Any, says: str) -> None:
    with pytest.raises(exc.ArgumentError, match=says) as raised:
        create_engine(url, replicas=given)
    assert "secret" not in "".join(traceback.format_exception_only(raised.value))
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


@pytest.mark.parametrize("write", ["outside", "in a block", "engine.begin()"])
def test_a_write_on_a_standby_is_not_advised_to_begin(
    replica: ReplicaServer, driver: str, database: str, url: str, write: str
) -> None:
    fill(url)
    replica.catch_up()
    standby = create_engine(replica.url(driver, database), read_only_outside=write == "outside")

    def delete() -> None:
        with OptInSession(standby) as session, ExitStack() as stack:
            target: Any = session
            if write == "in a block":
                stack.enter_context(session.begin())
            elif write == "engine.begin()":
                target = stack.enter_context(standby.begin())
            target.execute(sa.delete(Author))

    with pytest.raises(exc.InternalError) as raised:
        delete()
    assert "is a standby, which refuses every write" in str(raised.value)
    assert "begin(" not in str(raised.value)
    standby.dispose()


def test_a_write_in_a_transaction_on_a_replica_is_not_advised_to_begin_one(
    engine: OptInEngine,
) -> None:
    (replica,) = engine.replicas
    with (
        pytest.raises(exc.InternalError, match="is a standby") as raised,
        replica.begin() as connection,
    ):
        connection.execute(sa.delete(Author))
    assert "begin(" not in str(raised.value)


@pytest.mark.parametrize("read_only_outside", [False, True])
def test_a_write_on_a_replica_is_advised_what_works(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer, read_only_outside: bool
) -> None:
    """``default_transaction_read_only`` holds for the primary as well as for the replica."""
    options: dict[str, Any] = {"read_only_outside": True}
    if not read_only_outside:
        options = {"connect_args": {"options": "-c default_transaction_read_only=on"}}
    with opened_with(wire_url, replica_urls[:1], replica, **options) as engine:
        statement = select(func.nextval("author_id_seq"))
        says = "begin()" if read_only_outside else "begin(read_only=False)"
        with OptInSession(engine) as session:
            with pytest.raises(exc.InvalidRequestError) as raised:
                session.scalar(statement)
            assert str(raised.value).endswith(f"Put it into `with session.{says}:`.")
            with session.begin(read_only=None if read_only_outside else False):
                assert session.scalar(statement) == 4


def test_an_engine_without_replicas_has_none(url: str) -> None:
    engine = create_engine(url, replicas=[])
    assert engine.replicas == ()
    assert engine.primary is None
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    engine.dispose()


def test_a_transaction_on_a_replica_of_an_engine_that_only_reads_outside(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer, replica_wires: list[WireProxy]
) -> None:
    with opened_with(wire_url, replica_urls[:1], replica, read_only_outside=True) as engine:
        (report,) = engine.replicas
        with recorded(replica_wires[0]) as (recording,), report.begin() as connection:
            assert connection.scalar(IN_RECOVERY)
        assert recording.statements[-3] == "BEGIN"
        with OptInSession(engine) as session:
            assert is_on_replica(session)
            with session.begin():
                session.add(Author(name="one"))
            with pytest.raises(exc.InternalError, match="wrap it in"):
                session.execute(text("DELETE FROM document"))
