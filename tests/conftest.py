"""The fixtures that all tests share: a server, a proxy before it, an empty database, its URLs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Onlooker, Shelf, opened
from tests.postgres import PostgresServer, ReplicaServer, server_from_environment
from tests.wire import WireProxy


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Have the garbage collector ignore the objects that exist before a module's tests.

    Tests collect garbage to see what stays alive. If the collector looked at all modules and all
    models of earlier tests, one collection would take a quarter of a second. Some tests need
    hundreds of collections.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """The server of ``DATABASE_URL``, or an embedded one of version ``POSTGRES_VERSION``."""
    with server_from_environment() as server:
        yield server


@pytest.fixture(scope="session")
def wire(server: PostgresServer) -> Iterator[WireProxy]:
    """The proxy before the server; ``wire_url`` resets its delay and hooks after each test."""
    with WireProxy(server.host, server.port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def replica_server(server: PostgresServer) -> Iterator[ReplicaServer]:
    """A streaming replica of the server."""
    try:
        replica = server.start_replica()
    except NotImplementedError as error:
        pytest.skip(str(error))
    with replica:
        yield replica


@pytest.fixture
def replica(replica_server: ReplicaServer, database: str) -> Iterator[ReplicaServer]:
    """The replica, on which the database is as empty as on the primary."""
    replica_server.catch_up()
    yield replica_server
    if not replica_server.is_running:
        replica_server.restart()
    replica_server.resume_replay()


@pytest.fixture(scope="session")
def proxy(wire: WireProxy) -> WireProxy:
    """The same proxy by its other name."""
    return wire


@pytest.fixture(scope="session")
def driver() -> str:
    """The driver under test, from ``TEST_DRIVER``: psycopg2 or psycopg."""
    return os.environ.get("TEST_DRIVER", "psycopg2")


@pytest.fixture(scope="session")
def _reused_database(server: PostgresServer) -> Iterator[str]:
    name = server.create_database()
    yield name
    server.drop_database(name)


@pytest.fixture(scope="session")
def _shelf(server: PostgresServer) -> Iterator[tuple[str, Shelf]]:
    name = server.create_database()
    yield name, Shelf(server, name)
    server.drop_database(name)


@pytest.fixture
def database(request: pytest.FixtureRequest, server: PostgresServer) -> str:
    """The name of an empty database, without connections that an earlier test left open.

    With the fixture :func:`library`, it has the tables of :mod:`tests.library`, without rows.
    """
    name: str
    if "library" in request.fixturenames:
        name, shelf = request.getfixturevalue("_shelf")
        shelf.empty()
    else:
        name = request.getfixturevalue("_reused_database")
        server.reset_database(name)
    return name


@pytest.fixture
def url(server: PostgresServer, driver: str, database: str) -> str:
    """The URL of the database, straight to the server."""
    return server.url(driver, database)


@pytest.fixture
def wire_url(wire: WireProxy, url: str) -> Iterator[str]:
    """The URL of the database, through the proxy."""
    yield wire.url(url)
    wire.delay = 0.0
    wire.before_forward = None
    wire.cut_where = None


# For the tests of the core: an engine on the tables of tests.library, with rows in them


@pytest.fixture
def library() -> None:
    """Have the tables of :mod:`tests.library` in the database, before anything else is done."""


@pytest.fixture
def engine(library: None, wire_url: str) -> Iterator[OptInEngine]:
    """An engine on filled tables, through the proxy.

    After the test it checks that the connections are idle and in autocommit.
    """
    with opened(wire_url) as engine:
        yield engine


@pytest.fixture
def sessions(engine: OptInEngine) -> sessionmaker[OptInSession]:
    """A factory of sessions of the engine."""
    return sessionmaker(engine, class_=OptInSession)


@pytest.fixture
def session(sessions: sessionmaker[OptInSession]) -> Iterator[OptInSession]:
    """A session of the engine."""
    with sessions() as session:
        yield session


@pytest.fixture
def onlooker(url: str) -> Iterator[Onlooker]:
    """Another connection to the database, which sees what is committed, and nothing else."""
    onlooker = Onlooker(url)
    yield onlooker
    onlooker.close()
