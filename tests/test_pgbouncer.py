"""Through a real PgBouncer in transaction mode: many clients, a handful of server connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeAlias

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.pool import NullPool

from fictive_sqlalchemy import OptInSession, create_engine
from tests.library import Author, Onlooker, assert_at_rest, fill
from tests.pgbouncer import PROGRAM, PgBouncer, version
from tests.postgres import PostgresServer

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)

PID = sa.text("SELECT pg_backend_pid()")
TENANT = sa.text("SELECT current_setting('app.tenant_id', true)")

# Far longer than anything takes, so that a test that would hang fails instead.
PATIENCE = 30.0

Bounce: TypeAlias = Callable[..., PgBouncer]
MakeEngine: TypeAlias = Callable[..., Any]


@pytest.fixture
def bounce(server: PostgresServer, url: str) -> Iterator[Bounce]:
    """``bounce(**settings)``: a PgBouncer in front of the filled database."""
    fill(url)
    with ExitStack() as cleanup:
        yield lambda **settings: cleanup.enter_context(PgBouncer(server, **settings))


@pytest.fixture
def make_engine(bounce: Bounce, url: str, driver: str) -> Iterator[MakeEngine]:
    """``make_engine(bouncer, **options)``: an engine, by default one that prepares nothing."""
    with ExitStack() as cleanup:

        def make(bouncer: PgBouncer, **options: Any) -> Any:
            if driver == "psycopg":
                options.setdefault("connect_args", {"prepare_threshold": None})
            engine = create_engine(bouncer.url(url), **options)
            cleanup.callback(engine.dispose)
            engine.connect().close()
            return engine

        yield make


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What takes a server connection, and for how long


def test_a_read_takes_a_server_connection_for_one_statement(
    bounce: Bounce, make_engine: MakeEngine, database: str
) -> None:
    bouncer = bounce(default_pool_size=1)
    engine = make_engine(bouncer)
    with OptInSession(engine) as one, OptInSession(engine) as other:
        for _ in range(3):
            for session in (one, other):  # each keeps its own connection to PgBouncer
                assert session.get(Author, 1, populate_existing=True) is not None
        assert engine.pool.checkedout() == 2
        assert {one.scalar(PID), other.scalar(PID)} == bouncer.pids(database)
        pool = bouncer.pool(database)
        assert (pool["sv_active"], pool["cl_waiting"]) == (0, 0)
    assert_at_rest(engine)


def test_a_transaction_keeps_its_server_connection_from_begin_to_commit(
    bounce: Bounce, make_engine: MakeEngine, database: str
) -> None:
    bouncer = bounce(default_pool_size=1)
    engine = make_engine(bouncer)
    with (
        OptInSession(engine) as one,
        OptInSession(engine) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        other.scalar(PID)
        with one.begin():
            assert bouncer.pool(database)["sv_active"] == 0  # nothing is sent yet
            first = one.scalar(PID)
            assert bouncer.pool(database)["sv_active"] == 1
            read = thread.submit(other.scalar, PID)
            wait_for(lambda: bouncer.pool(database)["cl_waiting"] == 1)
            one.add(Author(name="Dora"))
            one.flush()
            assert one.scalar(PID) == first
            assert not read.done()
        assert read.result(PATIENCE) == first
        assert bouncer.pool(database)["sv_active"] == 0
        with pytest.raises(exc.DBAPIError), one.begin():
            one.execute(sa.text("SELECT 1 / 0"))
        assert bouncer.pool(database)["sv_active"] == 0
    assert_at_rest(engine)


@pytest.mark.parametrize("poolclass", [None, NullPool])
def test_hundreds_of_clients_share_a_handful_of_server_connections(
    bounce: Bounce,
    make_engine: MakeEngine,
    database: str,
    onlooker: Onlooker,
    poolclass: type[NullPool] | None,
) -> None:
    clients, threads, rounds = 300, 20, 2
    bouncer = bounce(default_pool_size=5)
    options: dict[str, Any] = (
        {"poolclass": poolclass} if poolclass else {"pool_size": clients, "max_overflow": 0}
    )
    engine = make_engine(bouncer, **options)
    onlooker.run("UPDATE author SET age = 0")
    sessions = [OptInSession(engine) for _ in range(clients)]
    all_connected = threading.Barrier(threads + 1)
    go_on = threading.Event()

    def work(own: list[OptInSession]) -> set[int]:
        pids = {session.scalar(PID) for session in own}
        all_connected.wait(PATIENCE)
        go_on.wait(PATIENCE)
        for number in range(rounds):
            for position, session in enumerate(own):
                assert session.scalar(sa.select(Author.name).filter_by(id=1)) == "Ada"
                pids.add(session.scalar(PID))
                with session.begin():
                    first = session.scalar(PID)
                    author = session.get(Author, 1 + (position + number) % 3)
                    session.refresh(author, with_for_update=True)
                    assert author is not None
                    author.age = (author.age or 0) + 1
                    session.flush()
                    assert session.scalar(PID) == first
        return pids

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, sessions[number::threads]) for number in range(threads)]
        all_connected.wait(PATIENCE)
        assert len(bouncer.show("CLIENTS", database)) == clients
        assert len(bouncer.pids(database)) <= 5
        assert {row["state"] for row in bouncer.show("SERVERS", database)} == {"idle"}
        go_on.set()
        pids = set[int]().union(*(future.result() for future in futures))
    assert len(pids) <= 5
    assert onlooker.scalar("SELECT sum(age) FROM author") == clients * rounds
    for session in sessions:
        session.close()
    if poolclass is None:
        assert_at_rest(engine)


# What one client leaves to the next on the same server connection: nothing


def test_what_a_transaction_began_with_ends_with_it(
    bounce: Bounce, make_engine: MakeEngine, database: str
) -> None:
    bouncer = bounce(default_pool_size=1)
    engine = make_engine(bouncer)
    settings = sa.text(
        "SELECT pg_backend_pid(), current_setting('transaction_isolation'),"
        " current_setting('transaction_read_only'), current_setting('transaction_deferrable'),"
        " current_setting('default_transaction_isolation'),"
        " current_setting('default_transaction_read_only'),"
        " current_setting('default_transaction_deferrable')"
    )
    with OptInSession(engine) as one, OptInSession(engine) as other:
        before = other.execute(settings).one()
        for end in ("commit", "rollback"):
            one.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True)
            assert one.execute(settings).one()[:4] == (before[0], "serializable", "on", "on")
            getattr(one, end)()
            assert other.execute(settings).one() == before
            assert one.execute(settings).one() == before
            with other.begin():
                assert other.execute(settings).one() == before
    assert_at_rest(engine)


def test_what_a_client_leaves_open_when_it_goes_is_rolled_back(
    bounce: Bounce, make_engine: MakeEngine, database: str, onlooker: Onlooker
) -> None:
    bouncer = bounce(default_pool_size=1)
    engine = make_engine(bouncer)
    session = OptInSession(engine)
    session.begin()
    session.add(Author(name="Dora"))
    session.flush()
    dbapi: Any = session.connection().connection.dbapi_connection
    dbapi.close()  # as when the process ends
    with OptInSession(engine) as other:
        assert not other.scalars(sa.select(Author).filter_by(name="Dora")).all()
        with other.begin():
            other.add(Author(name="Ed"))
    session.close()
    assert onlooker.names() == ["Ed"]
    assert_at_rest(engine)


def test_an_error_leaves_no_aborted_transaction_behind(
    bounce: Bounce, make_engine: MakeEngine, database: str
) -> None:
    engine = make_engine(bounce(default_pool_size=1))
    with OptInSession(engine) as one, OptInSession(engine) as other:
        for _ in range(2):
            with pytest.raises(exc.DBAPIError):
                one.execute(sa.text("SELECT 1 / 0"))
            assert other.scalar(sa.text("SELECT 1")) == 1
            with pytest.raises(exc.DBAPIError), one.begin():
                one.execute(sa.text("SELECT 1 / 0"))
            assert other.scalar(sa.text("SELECT 1")) == 1
    assert_at_rest(engine)


def test_writes_outside_can_be_forbidden_by_the_connect_query_of_pgbouncer(
    bounce: Bounce, make_engine: MakeEngine
) -> None:
    """What the client itself would SET goes to one server connection, and stays there for all."""
    bouncer = bounce(connect_query="SET default_transaction_read_only = on")
    engine = make_engine(bouncer, execution_options={"postgresql_readonly": False})
    with OptInSession(engine) as session:
        with pytest.raises(exc.DBAPIError, match="read-only"):
            session.execute(sa.update(Author).values(age=1))
        with session.begin():
            session.execute(sa.update(Author).values(age=1))
        assert set(session.scalars(sa.select(Author.age))) == {1}
        with session.begin(read_only=True), pytest.raises(exc.InvalidRequestError):
            session.execute(sa.update(Author).values(age=1))
    assert_at_rest(engine)


# Prepared statements


@pytest.mark.skipif(
    PROGRAM is not None and version() < (1, 22),
    reason="this pgbouncer is older than 1.22, and can't follow prepared statements",
)
def test_prepared_statements_find_their_server_connection(
    bounce: Bounce, make_engine: MakeEngine, database: str, driver: str, onlooker: Onlooker
) -> None:
    bouncer = bounce(default_pool_size=3, max_prepared_statements=50)
    connect_args = {"prepare_threshold": 1} if driver == "psycopg" else {}
    engine = make_engine(bouncer, connect_args=connect_args, pool_size=20)

    def work(number: int) -> None:
        with OptInSession(engine) as session:
            for turn in range(10):
                assert session.get(Author, 1 + turn % 3, populate_existing=True) is not None
                with session.begin():
                    session.get(Author, 1, populate_existing=True)
                    session.execute(sa.update(Author).values(age=number).filter_by(id=number))
                session.begin()
                session.get(Author, 1, populate_existing=True)
                session.rollback()  # psycopg forgets what it has prepared

    with ThreadPoolExecutor(20) as threads:
        for future in [threads.submit(work, number) for number in range(4, 24)]:
            future.result(PATIENCE)
    with OptInSession(engine) as session:
        for _ in range(3):
            session.get(Author, 1, populate_existing=True)
    prepared = sum(row["prepared_statements"] for row in bouncer.show("SERVERS", database))
    assert (prepared > 0) == (driver == "psycopg")
    assert_at_rest(engine)


def test_prepared_statements_without_support_fail_inside_and_can_be_left_out(
    bounce: Bounce, make_engine: MakeEngine, database: str, driver: str
) -> None:
    follows = {} if PROGRAM is None or version() < (1, 21) else {"max_prepared_statements": 0}
    bouncer = bounce(default_pool_size=1, **follows)
    prepared = sa.text("SELECT count(*) FROM pg_prepared_statements")
    with OptInSession(make_engine(bouncer)) as one, OptInSession(make_engine(bouncer)) as other:
        for _ in range(10):
            assert one.get(Author, 1, populate_existing=True) is not None
            assert other.get(Author, 1, populate_existing=True) is not None
        assert one.scalar(prepared) == 0
    if driver == "psycopg":
        wrong = {"connect_args": {"prepare_threshold": 1}}
        one = OptInSession(make_engine(bouncer, **wrong))
        other = OptInSession(make_engine(bouncer, **wrong))
        for session in (one, other):
            session.get(Author, 1)
        one.get(Author, 1, populate_existing=True)  # prepares it
        with (
            pytest.raises(exc.DBAPIError, match=r"prepared statement .* already exists"),
            other.begin(),
        ):
            other.get(Author, 1, populate_existing=True)
        # Outside nothing was done when it failed, so that it is sent again, and not prepared.
        assert other.get(Author, 1, populate_existing=True) is not None
        one.close()
        other.close()


# Streams


def test_a_stream_inside_a_transaction_keeps_its_server_connection(
    bounce: Bounce, make_engine: MakeEngine, database: str
) -> None:
    engine = make_engine(bounce(default_pool_size=2))
    numbers = sa.select(sa.func.generate_series(1, 1000)).execution_options(yield_per=10)
    with OptInSession(engine) as one, OptInSession(engine) as other:
        with one.begin(read_only=True), other.begin(read_only=True):
            pairs = zip(one.scalars(numbers), other.scalars(numbers), strict=True)
            assert list(pairs) == [(number, number) for number in range(1, 1001)]
        assert one.scalar(sa.text("SELECT count(*) FROM pg_cursors")) == 0
    assert_at_rest(engine)


def test_a_stream_outside_never_reads_what_another_streams(
    bounce: Bounce, make_engine: MakeEngine
) -> None:
    """Its cursor is on one server connection, and what follows may get any."""
    engine = make_engine(bounce(default_pool_size=2))
    numbers = sa.select(sa.func.generate_series(1, 1000)).execution_options(yield_per=10)
    with (
        OptInSession(engine) as one,
        OptInSession(engine) as other,
        OptInSession(engine) as transaction,
    ):
        result = one.scalars(numbers)
        assert next(result) == 1
        transaction.begin()
        transaction.scalar(PID)  # takes the server connection with the cursor
        assert other.scalars(numbers).all() == list(range(1, 1001))
        with pytest.raises(exc.DBAPIError, match=r"PgBouncer in transaction mode"):
            result.all()
        transaction.rollback()


# A server that goes away


def test_a_server_connection_that_died_is_replaced_unseen(
    bounce: Bounce, make_engine: MakeEngine, database: str, onlooker: Onlooker
) -> None:
    bouncer = bounce(default_pool_size=1)
    engine = make_engine(bouncer)
    with OptInSession(engine) as session:
        pid = session.scalar(PID)
        onlooker.kill(pid)
        wait_for(lambda: pid not in bouncer.pids(database))
        assert session.scalar(PID) != pid
        with session.begin():
            session.add(Author(name="Dora"))
        session.begin()
        session.add(Author(name="Ed"))
        session.flush()
        onlooker.kill(session.scalar(PID))
        with pytest.raises(exc.DBAPIError) as caught:
            session.scalar(PID)
        session.rollback()
        assert caught.value.connection_invalidated
        assert session.scalars(sa.select(Author.name).filter(Author.id > 3)).all() == ["Dora"]
    assert onlooker.names() == ["Dora"]
    assert_at_rest(engine)


def test_a_server_that_restarts_behind_pgbouncer_is_noticed_inside_alone(
    bounce: Bounce, make_engine: MakeEngine, server: PostgresServer, database: str
) -> None:
    if not server.can_restart:
        pytest.skip("the server of DATABASE_URL is not ours to restart")
    bouncer = bounce(default_pool_size=2)
    engine = make_engine(bouncer)
    with OptInSession(engine) as outside, OptInSession(engine) as inside:
        before = outside.scalar(PID)
        inside.begin()
        inside.add(Author(name="Dora"))
        inside.flush()
        server.restart()
        wait_for(lambda: before not in bouncer.pids(database))
        assert outside.scalar(sa.text("SELECT count(*) FROM author WHERE id > 3")) == 0
        with pytest.raises(exc.DBAPIError) as caught:
            inside.scalar(PID)
        assert caught.value.connection_invalidated
        inside.rollback()
        with inside.begin():
            inside.add(Author(name="Dora"))
        assert outside.scalar(sa.text("SELECT count(*) FROM author WHERE id > 3")) == 1
    assert_at_rest(engine)


def test_settings_travel_with_their_statements_and_reach_nobody_else(
    bounce: Bounce, make_engine: MakeEngine
) -> None:
    """Eight threads on two server connections, each with a tenant of its own, or none."""
    engine = make_engine(bounce(default_pool_size=2))
    wrong: list[Any] = []

    def work(number: int) -> None:
        with OptInSession(engine) as session:
            if number:
                session.set_local({"app.tenant_id": number, "statement_timeout": "9s"})
            expected = str(number) if number else ""
            for _ in range(30):
                seen = [session.scalar(TENANT)]
                with session.begin():
                    seen += [session.scalar(TENANT), session.scalar(TENANT)]
                    seen += session.scalars(TENANT, execution_options={"yield_per": 1}).all()
                if {one or "" for one in seen} != {expected}:
                    wrong.append((number, seen))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert wrong == []
