"""What the tests of the core share: tables, an engine on them, and the checks at the end."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.pool import QueuePool

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
)
from tests.postgres import PostgresServer
from tests.wire import Recording

#: PQtransactionStatus of libpq: what the server last said of the connection's transaction.
IDLE = 0

ONE = sa.text("SELECT 1")
LEVEL = sa.text("SHOW transaction_isolation")
READ_ONLY = sa.text("SHOW transaction_read_only")

Sessions = sessionmaker[OptInSession]


class Undo(Exception):
    """Raised to leave a block with a rollback."""


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    age: Mapped[int | None] = mapped_column(sa.CheckConstraint("age >= 0"))
    documents: Mapped[list[Document]] = relationship(back_populates="author")


authors: sa.Table = Base.metadata.tables["author"]
"""The table of :class:`Author`, for statements that the ORM has no part in."""


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.Text)
    author_id: Mapped[int] = mapped_column(sa.ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="documents")


class Seat(Base):
    """Its constraint is checked at COMMIT."""

    __tablename__ = "seat"
    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


class Person(Base):
    __tablename__ = "person"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.Text)
    name: Mapped[str] = mapped_column(sa.Text)


class Editor(Person):
    """Stored in two tables: each object takes two INSERTs, the second of which can fail."""

    __tablename__ = "editor"
    __mapper_args__ = {"polymorphic_identity": "editor"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.ForeignKey(Person.id), primary_key=True)
    rank: Mapped[int] = mapped_column(sa.CheckConstraint("rank > 0"))


class NoteBase(DeclarativeBase):
    pass


class Note(NoteBase):
    """For a second bind."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text, unique=True)


_TABLES = Base.metadata.sorted_tables

#: A query whose result changes when something in a database is created, altered or dropped.
_CATALOGS = "SELECT " + ", ".join(
    f"(SELECT concat(count(*), ' ', sum(xmin::text::bigint)) FROM pg_{catalog})"
    for catalog in (
        *("attrdef", "attribute", "class", "constraint", "db_role_setting", "event_trigger"),
        *("extension", "namespace", "policy", "proc", "rewrite", "sequence", "trigger", "type"),
    )
)

_EMPTY = ";".join(
    [
        *(f"DELETE FROM {table.name}" for table in reversed(_TABLES)),
        "SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S'",
    ]
)


def add(session: Session, *names: str) -> None:
    """Add authors, each with a flush of its own."""
    for name in names:
        session.add(Author(name=name))
        session.flush()


@cache
def _script() -> str:
    """Return the SQL of :func:`fill`. It creates the tables only if they are not there."""
    tables = [sa.schema.CreateTable(table, if_not_exists=True) for table in _TABLES]
    dialect = sa.create_engine("postgresql://").dialect
    return ";".join(
        [
            *(str(table.compile(dialect=dialect)) for table in tables),
            "INSERT INTO author (name, age) VALUES ('Ada', 30), ('Bob', 30), ('Cid', 30)",
            "INSERT INTO document (title, author_id) SELECT 'Of ' || id, id FROM author",
        ]
    )


def fill(url: str) -> None:
    """Create the tables, and three authors with a document each.

    It does without SQLAlchemy, which would first ask the server for its version, and the like: each
    test waits for this. It does not use a connection under test, on which psycopg counts statements
    before it prepares them.
    """
    driver: Any = importlib.import_module(sa.make_url(url).get_driver_name())
    plain = sa.make_url(url).set(drivername="postgresql")
    dsn = plain.render_as_string(hide_password=False)
    with closing(driver.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(_script())


class Shelf:
    """A database that keeps its tables: to create them takes longer than most tests.

    :param server: The server.
    :param name: The database.
    """

    def __init__(self, server: PostgresServer, name: str) -> None:
        self._server = server
        self._name = name
        self._catalogs: object = None

    def empty(self) -> None:
        """Remove all rows; if a test has changed more than rows, create the tables anew."""
        with self._server.alone_in(self._name) as connection:
            if connection.exec_driver_sql(_CATALOGS).one() == self._catalogs:
                connection.exec_driver_sql(_EMPTY)
                return
        self._server.reset_database(self._name)
        with self._server.alone_in(self._name) as connection:
            connection.exec_driver_sql(f"{_script()};{_EMPTY}")
            self._catalogs = connection.exec_driver_sql(_CATALOGS).one()


@contextmanager
def opened(url: str, **options: Any) -> Iterator[OptInEngine]:
    """Open an engine on the filled tables; at the end, check that its connections are at rest."""
    fill(url)
    engine = create_engine(url, **options)
    try:
        engine.connect().close()  # SQLAlchemy asks the server for its version, and the like
        yield engine
        assert_at_rest(engine)
    finally:
        engine.dispose()


#: The kinds of :func:`session_of`.
SESSION_KINDS = ("session", "scoped", "ours scoped")


@contextmanager
def session_of(kind: str, sessions: Sessions) -> Iterator[Any]:
    """Open a session, or what stands for one.

    :param kind: ``"session"``, ``"scoped"`` (SQLAlchemy's ``scoped_session``) or ``"ours scoped"``.
    :param sessions: What makes the session.
    """
    if kind == "session":
        with sessions() as session:
            yield session
        return
    class_: Any = scoped_session if kind == "scoped" else OptInScopedSession
    scoped = class_(sessions)
    yield scoped
    scoped.remove()


def assert_at_rest(engine: OptInEngine, flags: tuple[Any, Any, Any] = (None, None, None)) -> None:
    """Check row 19 of the contract on every connection of a pool that is no longer in use.

    Row 19 says: idle, in autocommit, with the isolation level and flags of the start.

    :param engine: The engine of the pool.

    :param flags: The isolation level, read-only and deferrable flags that connections start with.
    """
    pool = engine.pool
    if len(TRANSACTION_CONNECTIONS) or (isinstance(pool, QueuePool) and pool.checkedout()):
        gc.collect()  # an exception may still keep some
    assert len(TRANSACTION_CONNECTIONS) == 0
    count = 1
    if isinstance(pool, QueuePool):
        assert pool.checkedout() == 0
        count = pool.checkedin()
    connections = [engine.raw_connection() for _ in range(count)]
    try:
        for connection in connections:
            assert_rests(connection.dbapi_connection, flags)
    finally:
        for connection in connections:
            connection.close()


def assert_rests(dbapi: Any, flags: tuple[Any, Any, Any] = (None, None, None)) -> None:
    """Check that a driver's connection is idle, in autocommit, and has these flags."""
    assert dbapi.info.transaction_status == IDLE
    assert dbapi.autocommit is True
    assert flags_of(dbapi) == flags


def flags_of(dbapi: Any) -> tuple[Any, Any, Any]:
    """Return the isolation level, read-only and deferrable flags of a driver's connection."""
    read_only = dbapi.readonly if hasattr(dbapi, "readonly") else dbapi.read_only
    return dbapi.isolation_level, read_only, dbapi.deferrable


def set_flags(
    dbapi: Any,
    isolation_level: str | None = None,
    read_only: bool | None = None,
    deferrable: bool | None = None,
) -> None:
    """Set those flags of a driver's connection that are given."""
    psycopg2 = hasattr(dbapi, "readonly")
    if isolation_level is not None:
        if psycopg2:
            dbapi.isolation_level = isolation_level
        else:
            levels = importlib.import_module("psycopg").IsolationLevel
            dbapi.isolation_level = levels[isolation_level.replace(" ", "_")]
    if read_only is not None:
        setattr(dbapi, "readonly" if psycopg2 else "read_only", read_only)
    if deferrable is not None:
        dbapi.deferrable = deferrable


def sent(recording: Recording) -> list[str]:
    """Return the first word of each statement that was sent, without psycopg's DEALLOCATE."""
    return [verb for verb in recording.verbs if verb != "DEALLOCATE"]


def backend_pid(connection: sa.Connection) -> int:
    """The server process of a connection. Sends nothing."""
    dbapi: Any = connection.connection.dbapi_connection
    return int(dbapi.info.backend_pid)


def checked_out(engine: sa.Engine) -> int:
    """Return how many connections of its pool are in use."""
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


class Onlooker:
    """Another connection to the database, which sees what is committed, and nothing else.

    :param url: The database.
    """

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(
            url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.StaticPool
        )

    def scalar(self, sql: str, **parameters: Any) -> Any:
        """Return the first column of the first row of a query."""
        with self._engine.connect() as connection:
            return connection.execute(sa.text(sql), parameters).scalar()

    def column(self, sql: str, **parameters: Any) -> list[Any]:
        """Return the first column of each row of a query."""
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.text(sql), parameters))

    def run(self, sql: str) -> None:
        """Run a statement."""
        with self._engine.connect() as connection:
            connection.execute(sa.text(sql))

    def names(self) -> list[str]:
        """Return the authors' names, those of :func:`fill` left out."""
        sql = "SELECT name FROM author WHERE name NOT IN ('Ada', 'Bob', 'Cid') ORDER BY name"
        return self.column(sql)

    def kill(self, pid: int) -> None:
        """End a server process, and wait until it has gone."""
        self.scalar("SELECT pg_terminate_backend(:pid, 60000)", pid=pid)
        assert self.state(pid) is None
        time.sleep(0.02)  # the proxy passes the end of the connection on a moment later

    def wait_until_gone(self, pid: int) -> None:
        """Wait for the end of a server process: it is a little later than that of a connection."""
        deadline = time.monotonic() + 30
        while self.state(pid) is not None:
            assert time.monotonic() < deadline, f"the server process {pid} is still there"
            time.sleep(0.01)

    def state(self, pid: int) -> str | None:
        """Return the state of a server process, such as ``"idle"``; ``None`` if it is gone."""
        state: str | None = self.scalar(
            "SELECT state FROM pg_stat_activity WHERE pid = :pid", pid=pid
        )
        return state

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()
