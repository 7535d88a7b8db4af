"""Tenants: threads that share a small pool, and never see or write a row of another tenant.

Each thread runs a *program*: visits of one tenant each, or of none, and in each visit steps. Rows
say in their text who has written them, so a row that another tenant reads, or that is stored for
another one, is found. The server enforces row-level security on a role without BYPASSRLS, by the
setting ``app.tenant_id``, which only ``set_local()`` sets. Meanwhile server processes are killed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy import delete, exc, func, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.postgres import PostgresServer

TENANTS = range(1, 9)

STEPS = (
    *("read", "get", "stream", "abandon", "insert", "bulk", "many", "update", "delete", "block"),
    *(
        "savepoint",
        "switch",
        "raw outside",
        "raw inside",
        "fail",
        "time out",
        "leave by an error",
        "kill",
    ),
)

_PASSWORD = "soak"

_SETUP = """
CREATE TABLE note (
    id serial PRIMARY KEY,
    tenant int NOT NULL DEFAULT nullif(current_setting('app.tenant_id', true), '')::int,
    written_by int NOT NULL,
    body text NOT NULL DEFAULT ''
);
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
ALTER TABLE note FORCE ROW LEVEL SECURITY;
CREATE POLICY mine ON note
    USING (tenant = nullif(current_setting('app.tenant_id', true), '')::int);
CREATE ROLE {role} LOGIN PASSWORD '{password}' NOSUPERUSER NOBYPASSRLS;
GRANT SELECT, INSERT, UPDATE, DELETE ON note TO {role};
GRANT USAGE ON SEQUENCE note_id_seq TO {role};
INSERT INTO note (tenant, written_by) SELECT t, t FROM generate_series(1, 8) t
"""


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant: Mapped[int] = mapped_column(server_default=sa.FetchedValue())
    written_by: Mapped[int]
    body: Mapped[str] = mapped_column(server_default="")


@dataclass
class Visit:
    """What one request does."""

    tenant: int | None
    """The tenant that it sets; ``None`` if it sets none."""
    begin_on_write: bool
    steps: Sequence[str]


@dataclass
class Seen:
    """What came of the programs."""

    steps: Counter[str] = field(default_factory=Counter[str])
    """How many steps of each kind were done."""
    lost: int = 0
    """How many steps ended with an error of a lost connection."""
    violations: list[str] = field(default_factory=list[str])
    """What must never be."""


class _Left(Exception):
    """Leaves a block by an error."""


@contextmanager
def tenants(server: PostgresServer, driver: str) -> Iterator[tuple[OptInEngine, sa.Engine]]:
    """Make a database with row-level security.

    :param server: The server.
    :param driver: The driver.
    :returns: A context manager that gives an engine of the role without rights, with a pool of
        three, and one of the superuser.
    """
    database = server.create_database()
    role = f"of_{database}"
    url = server.url(driver, database)
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1, max_overflow=20)
    with admin.connect() as connection:
        connection.exec_driver_sql(_SETUP.format(role=role, password=_PASSWORD))
    theirs = sa.make_url(url).set(username=role, password=_PASSWORD)
    engine = create_engine(theirs, pool_size=3, max_overflow=0, pool_timeout=20)
    try:
        engine.connect().close()  # SQLAlchemy asks the first connection for what it has to know
        yield engine, admin
    finally:
        engine.dispose()
        admin.dispose()
        server.drop_database(database)
        with server.alone_in("postgres") as connection:
            connection.exec_driver_sql(f"DROP ROLE {role}")


def programs(random: Random, threads: int, visits: int) -> list[list[Visit]]:
    """Return a random program for each thread; one visit in ten sets no tenant.

    :param random: The generator.
    :param threads: How many programs.
    :param visits: How many visits there are in each.
    """
    return [
        [
            Visit(
                None if random.random() < 0.1 else random.choice(TENANTS),
                random.random() < 0.5,
                random.choices(STEPS, k=random.randrange(1, 8)),
            )
            for _ in range(visits)
        ]
        for _ in range(threads)
    ]


def run(engine: OptInEngine, admin: sa.Engine, all_programs: Sequence[Sequence[Visit]]) -> Seen:
    """Run programs, each in a thread of its own, and judge what they have seen and stored.

    :param engine: The engine of the role without rights.
    :param admin: The engine of the superuser.
    :param all_programs: The programs.
    """
    seen = Seen()
    workers = [
        threading.Thread(target=_Worker(engine, admin, seen, program).run)
        for program in all_programs
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        if worker.is_alive():
            seen.violations.append("a thread hangs")
    with admin.connect() as connection:
        wrong = connection.scalar(
            select(func.count()).select_from(Note).where(Note.tenant != Note.written_by)
        )
        if wrong:
            seen.violations.append(f"{wrong} rows are stored for another tenant")
    return seen


class _Worker:
    def __init__(
        self, engine: OptInEngine, admin: sa.Engine, seen: Seen, program: Sequence[Visit]
    ) -> None:
        self.engine, self.admin, self.seen, self.program = engine, admin, seen, program
        self.tenant: int | None = None
        self.abandoned: list[Any] = []

    def run(self) -> None:
        try:
            for visit in self.program:
                self._visit(visit)
        except BaseException as error:
            self.seen.violations.append(f"{type(error).__name__}: {error}")
            raise

    def _visit(self, visit: Visit) -> None:
        session = OptInSession(self.engine, begin_on_write=visit.begin_on_write)
        self.tenant = visit.tenant
        try:
            if visit.tenant is not None:
                session.set_local({"app.tenant_id": visit.tenant})
            for step in visit.steps:
                self.seen.steps[step] += 1
                try:
                    getattr(self, "_" + step.replace(" ", "_"))(session)
                except (exc.DBAPIError, exc.InvalidRequestError) as error:
                    self._look_at(error)
                    session.rollback()
                except self.engine.dialect.loaded_dbapi.OperationalError:
                    self.seen.lost += 1  # on a cursor of the driver
                    session.invalidate()
                    self.tenant = None  # with which the settings are gone
        finally:
            self.abandoned.clear()
            session.close()

    def _look_at(self, error: Exception) -> None:
        """Note an error that is none of those that killed connections and no tenant lead to."""
        is_lost = isinstance(error, exc.DBAPIError) and (
            error.connection_invalidated
            or "pipeline mode" in str(error)  # psycopg's executemany()
            or error.statement is None  # killed while it was being connected
        )
        self.seen.lost += is_lost
        code = getattr(error, "orig", None)
        sqlstate = getattr(code, "sqlstate", None) or getattr(code, "pgcode", None)
        refused = self.tenant is None and sqlstate in ("23502", "42501")  # NOT NULL, the policy
        is_over = isinstance(error, exc.InvalidRequestError)  # after a lost connection in a block
        if not (is_lost or refused or is_over):
            self.seen.violations.append(f"{type(error).__name__}: {error}")

    def _check(self, writers: Sequence[Any], what: str) -> None:
        wrong = [one for one in writers if one != self.tenant]
        if wrong:
            self.seen.violations.append(f"{what} of tenant {self.tenant} saw rows of {wrong}")
        if not writers and self.tenant is not None and what == "read":
            self.seen.violations.append(f"tenant {self.tenant} did not see its own rows")

    # The steps

    def _read(self, session: OptInSession) -> None:
        self._check(session.scalars(select(Note.written_by)).all(), "read")

    def _get(self, session: OptInSession) -> None:
        session.expire_all()
        for key in range(1, 9):
            found = session.get(Note, key, populate_existing=True)
            self._check([] if found is None else [found.written_by], "get")

    def _stream(self, session: OptInSession) -> None:
        rows = select(Note.written_by).limit(20).execution_options(yield_per=2)
        self._check(list(session.scalars(rows)), "stream")

    def _abandon(self, session: OptInSession) -> None:
        rows = session.scalars(select(Note.written_by).execution_options(yield_per=1))
        with suppress(StopIteration):
            self._check([next(rows)], "stream")
        self.abandoned.append(rows)

    def _insert(self, session: OptInSession) -> None:
        session.add(Note(written_by=self.tenant or 0))
        session.commit()

    def _bulk(self, session: OptInSession) -> None:
        rows = [{"written_by": self.tenant or 0, "body": "b"} for _ in range(3)]
        session.execute(insert(Note), rows)
        session.commit()

    def _many(self, session: OptInSession) -> None:
        key: Any = sa.bindparam("key")
        every = update(Note.__table__).where(Note.__table__.c.id == key).values(body="m")  # type: ignore[arg-type]
        session.execute(every, [{"key": number} for number in range(1, 9)])
        session.commit()

    def _update(self, session: OptInSession) -> None:
        changed = update(Note).values(body="u").returning(Note.written_by)
        self._check(session.scalars(changed).all(), "update")
        session.commit()

    def _delete(self, session: OptInSession) -> None:
        gone = delete(Note).where(Note.id > 8).returning(Note.written_by)
        self._check(session.scalars(gone).all(), "delete")
        session.commit()

    def _block(self, session: OptInSession) -> None:
        with session.atomic():
            self._read(session)
            session.add(Note(written_by=self.tenant or 0))
            session.flush()
            self._read(session)

    def _savepoint(self, session: OptInSession) -> None:
        with session.atomic():
            with session.begin_nested() as savepoint:
                self._switch(session)
                self._read(session)
                savepoint.rollback()
            self._read(session)
            self._update_inside(session)

    def _update_inside(self, session: OptInSession) -> None:
        changed = update(Note).values(body="i").returning(Note.written_by)
        self._check(session.scalars(changed).all(), "update")

    def _switch(self, session: OptInSession) -> None:
        if self.tenant is not None:
            self.tenant = self.tenant % 8 + 1
            session.set_local({"app.tenant_id": self.tenant})

    def _raw_outside(self, session: OptInSession) -> None:
        session.rollback()
        connection = session.connection()  # with begin_on_write it begins a transaction
        cursor = connection.connection.cursor()
        cursor.execute("SELECT written_by FROM note")
        rows = [row[0] for row in cursor.fetchall()]
        self._check(rows, "cursor")
        if rows and not session.in_transaction():
            self.seen.violations.append("a cursor of the driver saw rows outside")
        session.rollback()

    def _raw_inside(self, session: OptInSession) -> None:
        with session.atomic():
            self._read(session)
            cursor = session.connection().connection.cursor()
            cursor.execute("SELECT written_by FROM note")
            self._check([row[0] for row in cursor.fetchall()], "cursor")

    def _fail(self, session: OptInSession) -> None:
        with suppress(exc.DataError):
            session.execute(text("SELECT 1 / 0"))
        session.rollback()

    def _time_out(self, session: OptInSession) -> None:
        session.set_local({"statement_timeout": "1ms"})
        try:
            session.execute(text("SELECT pg_sleep(1)"))
        except exc.OperationalError as error:
            if error.connection_invalidated:
                raise
        finally:
            session.set_local({"statement_timeout": None})
            session.rollback()

    def _leave_by_an_error(self, session: OptInSession) -> None:
        with suppress(_Left), session.atomic():
            self._read(session)
            session.add(Note(written_by=self.tenant or 0))
            raise _Left

    def _kill(self, _: OptInSession) -> None:
        with self.admin.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity "
                    "WHERE datname = current_database() AND usename <> current_user "
                    "ORDER BY random() LIMIT 1) AS one"
                )
            )
