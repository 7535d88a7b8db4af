"""Tests that leave nothing behind: what they do to the database is undone at their end.

While an engine is isolated, all of its connections are one connection to the server, in one
transaction that is rolled back at the end. The code under test gets stand-ins for DBAPI
connections instead. Each has an autocommit flag and a transaction of its own, as a connection
from the pool would have, but its transactions are savepoints, and a statement in autocommit is a
savepoint, too. All that is above the driver is as in production.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine, NullPool, exc
from sqlalchemy.pool import PoolProxiedConnection

from .autocommit import PSYCOPG
from .engine import OptInEngine
from .stand_in import IDLE, IN_ERROR, STAND_INS, StandIn

#: How long a thread waits, in seconds, for a transaction of another thread to end.
PATIENCE = 30.0

# COMMIT checks the constraints that are deferred until then; the next transaction defers them
# again. https://www.postgresql.org/docs/current/sql-set-constraints.html
_CHECK_DEFERRED = """
SET CONSTRAINTS ALL IMMEDIATE;
DO $$
DECLARE deferred text;
BEGIN
    FOR deferred IN
        SELECT DISTINCT format('%I.%I', nspname, conname) FROM pg_catalog.pg_constraint
        JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace WHERE condeferred
    LOOP
        EXECUTE 'SET CONSTRAINTS ' || deferred || ' DEFERRED';
    END LOOP;
END $$;
"""

_MARK = "fictive_sqlalchemy_isolation"


@contextmanager
def isolate(*engines: Engine) -> Generator[None]:
    """Undo at the end all that is done meanwhile through engines; until then it seems committed::

        with isolate(engine):
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE note (id int)"))

    Sessions, ``begin()`` blocks, commits and rollbacks, ``engine.connect()`` and
    ``engine.raw_connection()`` behave as in production: each error rolls back what it would roll
    back there. Sends BEGIN on one connection per engine, a savepoint for each transaction and for
    each statement outside one, and ROLLBACK at the end.

    It may be used within itself: what is done in the inner block is undone at the end of that.

    Two transactions of one thread have to end in the reverse order of their begin, and a thread
    waits for the transaction of another one. Isolation levels have no effect.

    :param engines: The engines, of psycopg2 or psycopg. Each has a transaction of its own, so
        two engines don't see each other's work, even in one database.
    :returns: A context manager.
    :raises sqlalchemy.exc.ArgumentError: if an engine has another driver.
    :raises sqlalchemy.exc.InvalidRequestError: if a connection of an engine is in use, or, at the
        end, if something has committed for real.
    """
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(_isolated(engine))
        yield


_isolations: WeakKeyDictionary[Engine, Isolation] = WeakKeyDictionary()


@contextmanager
def _isolated(engine: Engine) -> Generator[None]:
    if engine in _isolations:
        with _isolations[engine].level():
            yield
        return
    driver = engine.dialect.driver
    if driver not in PSYCOPG:
        raise exc.ArgumentError(
            f"Only what is done with psycopg2 or psycopg can be isolated, and {engine.url!r} is "
            f"used with {driver}: leave this engine out, and clean up after it yourself."
        )
    in_use: Callable[[], int] | None = getattr(engine.pool, "checkedout", None)
    if in_use is not None and in_use():
        raise exc.InvalidRequestError(
            f"{in_use()} connections to {engine.url!r} are in use, and what is done with them "
            "could not be undone: close() the sessions and connections that were used before, or "
            "remove() the scoped session."
        )
    held = engine.raw_connection()
    try:
        isolation = Isolation(engine, held)
    except BaseException:
        held.invalidate()
        held.close()
        raise
    pool = engine.pool
    engine.pool = NullPool(isolation.connect, reset_on_return=None, dialect=engine.dialect)
    _set_aside(engine, True)
    _isolations[engine] = isolation
    try:
        yield
    finally:
        del _isolations[engine]
        engine.pool = pool
        _set_aside(engine, False)
        isolation.end()


def _set_aside(engine: Engine, set_aside: bool) -> None:
    """Keep reads from the replicas, which will never see what is done meanwhile."""
    if isinstance(engine, OptInEngine):
        for replica in engine.replicas:
            replica.health.set_aside = set_aside


class Isolation:
    """The one connection, and who is in a transaction on it.

    Its driver is out of autocommit and knows of one transaction; savepoints are sent as SQL.

    :param engine: The engine.
    :param held: Its connection, from the pool.
    """

    def __init__(self, engine: Engine, held: PoolProxiedConnection) -> None:
        self.dialect: Any = engine.dialect
        self.held = held
        physical: Any = held.dbapi_connection
        self.physical = physical
        self.autocommit: bool = physical.autocommit
        self._lock = threading.Condition()
        self._open: list[StandIn] = []
        self._stand_ins: WeakSet[StandIn] = WeakSet()
        self._abandoned: list[StandIn] = []
        self._busy = False
        self._names = count(1)
        physical.autocommit = False
        self._cursor = physical.cursor()
        self.send(f"SAVEPOINT {_MARK}")

    def connect(self) -> Any:
        """Return what the pool takes for a new connection."""
        connection = STAND_INS[self.dialect.driver](self)
        self._stand_ins.add(connection)
        return connection

    def send(self, sql: str) -> None:
        """Send SQL of our own."""
        self._cursor.execute(sql)

    @property
    def status(self) -> Any:
        """The driver's transaction status."""
        return self.physical.info.transaction_status

    @contextmanager
    def turn(self, connection: StandIn) -> Generator[None]:
        """Wait until a connection may use the one connection, and keep others from it meanwhile."""
        with self._lock:
            if self._busy:  # by this thread, or we would wait: a callback of the driver
                raise exc.InvalidRequestError(
                    "A statement was sent in the middle of another one, and under isolation both "
                    "have the same connection. Read the first to its end before."
                )
            me = threading.get_ident()
            if not self._lock.wait_for(lambda: self._may_go_on(connection, me), PATIENCE):
                raise exc.InvalidRequestError(
                    f"Another thread has been in a transaction for {PATIENCE:.0f} seconds, and "
                    "under isolation a thread waits for its end. Don't wait for one thread in a "
                    "transaction of another, or create the schema anew for this test instead."
                )
            if connection in self._open and self._open[-1] is not connection:
                raise exc.InvalidRequestError(
                    "Under isolation the transaction that was begun last has to end first, and "
                    "here one is used that was begun before. Create the schema anew for this test "
                    "instead, so that each has a connection of its own."
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False
                while self._abandoned:
                    self.roll_back(self._abandoned.pop())
                self._lock.notify_all()

    def _may_go_on(self, connection: StandIn, thread: int) -> bool:
        return not self._open or self._open[-1] is connection or self._open[-1].thread == thread

    def begin(self, connection: StandIn) -> None:
        """Begin a transaction of a connection, in its turn."""
        connection.savepoint = self.new_savepoint()
        connection.thread = threading.get_ident()
        self._open.append(connection)

    def new_savepoint(self) -> str:
        """Set a savepoint, and return its name."""
        name = f"{_MARK}_{next(self._names)}"
        self.send(f"SAVEPOINT {name}")
        return name

    def release(self, savepoint: str) -> None:
        """Do what COMMIT would do; if that fails, what ROLLBACK would do."""
        if self.status == IN_ERROR:
            self.undo(savepoint)
            return
        try:
            self.send(f"{_CHECK_DEFERRED} RELEASE SAVEPOINT {savepoint}")
        except BaseException:
            self.undo(savepoint)
            raise

    def undo(self, savepoint: str) -> None:
        """Do what ROLLBACK would do."""
        self.send(f"ROLLBACK TO SAVEPOINT {savepoint}; RELEASE SAVEPOINT {savepoint}")

    def commit(self, connection: StandIn) -> None:
        """Commit the transaction of a connection, in its turn."""
        savepoint = connection.savepoint
        assert savepoint is not None
        self._open.remove(connection)
        connection.savepoint = None
        self.release(savepoint)

    def roll_back(self, connection: StandIn) -> None:
        """Roll the transaction of a connection back, whether or not it is its turn."""
        with self._lock:
            if connection not in self._open:
                return
            if self._busy:
                self._abandoned.append(connection)  # the garbage collector, in a statement
                return
            savepoint = connection.savepoint
            assert savepoint is not None
            while connection in self._open:
                one = self._open.pop()
                one.savepoint = None
                one.undone = one is not connection
            self.undo(savepoint)
            self._lock.notify_all()

    def refuse_committed(self) -> None:
        """Say so if a statement has ended the one transaction."""
        if self.status == IDLE:
            raise exc.InvalidRequestError(
                "A statement has ended the transaction that isolates this test, and what was "
                "done in it is stored or gone: leave COMMIT and ROLLBACK to the session or the "
                "connection."
            )

    @contextmanager
    def level(self) -> Generator[None]:
        """Isolation within isolation."""
        with self._lock:
            if self._open:
                raise exc.InvalidRequestError(
                    "A transaction is open on this engine, and isolation has to be around it: "
                    "commit it or roll it back before."
                )
            before = set(self._stand_ins)
            savepoint = self.new_savepoint()
        try:
            yield
        finally:
            with self._lock:
                self._close(self._stand_ins - before)
                self.undo(savepoint)

    def end(self) -> None:
        """Roll all of it back, and give the connection back to the pool."""
        with self._lock:
            try:
                self._close(set(self._stand_ins))
                self._undo_all()
            except BaseException:
                self.held.invalidate()
                raise
            finally:
                self.held.close()

    def _close(self, connections: WeakSet[StandIn] | set[StandIn]) -> None:
        for connection in list(connections):
            connection.close()

    def _undo_all(self) -> None:
        committed = self.status == IDLE
        if not committed:
            try:
                self.send(f"ROLLBACK TO SAVEPOINT {_MARK}")
            except self.dialect.loaded_dbapi.Error:
                committed = True
        self._cursor.close()
        self.physical.rollback()
        self.physical.autocommit = self.autocommit
        if committed:
            raise exc.InvalidRequestError(
                "The transaction that isolated this test was ended in it, and what was done before "
                "is stored: look for a COMMIT past the session and the connection."
            )
