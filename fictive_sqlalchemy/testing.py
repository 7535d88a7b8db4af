"""Tests that leave nothing behind: what they do to the database is undone at their end.

While an engine is isolated, all of its connections are one connection to the server, in one
transaction that is rolled back at the end. The code under test gets stand-ins for DBAPI
connections instead. Each has an autocommit flag and a transaction of its own, as a connection
from the pool would have, but its transactions are savepoints, and a statement in autocommit is a
savepoint, too. All that is above the driver is as in production.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import Any, cast
from weakref import WeakSet

from sqlalchemy import Connection, Engine, NullPool, event, exc
from sqlalchemy.pool import PoolProxiedConnection

from ._core.autocommit import PSYCOPG
from .stand_in import IDLE, IN_ERROR, STAND_INS, StandIn, State

#: How long a thread waits, in seconds, for a transaction of another thread to end, and a statement
#: for a lock that a connection has which is not isolated.
PATIENCE = 30.0

_MARK = "fictive_sqlalchemy_isolation"

# A test that waits for itself, on a connection that is not isolated, would wait for ever.
_LOCK_TIMEOUT = """
SELECT pg_catalog.set_config('lock_timeout', '{milliseconds}', true)
WHERE pg_catalog.current_setting('lock_timeout') = '0'
"""

# COMMIT checks the constraints that are deferred until then, and the next transaction begins with
# each as it was declared. By their names, because SET CONSTRAINTS ALL would also hold for those
# that are made later. https://www.postgresql.org/docs/current/sql-set-constraints.html
_DEFERRABLE = """
SELECT string_agg(name, ', '), string_agg(name, ', ') FILTER (WHERE deferred) FROM (
    SELECT format('%I.%I', nspname, conname) AS name, bool_and(condeferred) AS deferred
    FROM pg_catalog.pg_constraint
    JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
    WHERE has_schema_privilege(connamespace, 'USAGE') AND NOT pg_is_other_temp_schema(connamespace)
    GROUP BY 1 HAVING bool_or(condeferrable)
) AS named
"""

# A transaction, and a savepoint, gets an id and a lock on it with the first thing it writes.
# https://www.postgresql.org/docs/current/subxacts.html
_IDS = """
SELECT count(*) FROM pg_catalog.pg_locks
WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND pid = pg_backend_pid()
AND transactionid::text::bigint IS DISTINCT FROM txid_current_if_assigned() % 4294967296
"""

_ANEW = "create the schema anew for this test instead, so that each connection is a real one"


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

    While one transaction has changes, no other connection can be used: a thread waits for a
    transaction of another thread, and an error is raised where that would be its own. Isolation
    levels have no effect.

    :param engines: The engines, of psycopg2 or psycopg. Each has a transaction of its own, so
        two engines don't see each other's work, even in one database.
    :returns: A context manager.
    :raises sqlalchemy.exc.ArgumentError: if an engine has another driver.
    :raises sqlalchemy.exc.InvalidRequestError: if a connection of an engine is in use, or, at the
        end, if something has committed for real.
    """
    if not engines or not all(isinstance(one, Engine) for one in cast(tuple[object, ...], engines)):
        raise exc.ArgumentError(
            "isolate() takes engines, such as isolate(engine); of a Flask-SQLAlchemy extension "
            "db.test_isolation() isolates all."
        )
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(_isolated(engine))
        yield


@contextmanager
def _isolated(engine: Engine) -> Generator[None]:
    pool = engine.pool
    if isinstance(pool, IsolatedPool):
        with pool.isolation.level():
            yield
        return
    dialect = engine.dialect
    if dialect.driver not in PSYCOPG or dialect.is_async:
        with_asyncio = " and asyncio" if dialect.is_async else ""
        raise exc.ArgumentError(
            f"Only what is done with psycopg2 or psycopg can be isolated, and {engine.url!r} is "
            f"used with {dialect.driver}{with_asyncio}: leave this engine out, and clean up after "
            "it yourself."
        )
    in_use: Callable[[], int] | None = getattr(pool, "checkedout", None)
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
        raise
    isolated = IsolatedPool(isolation)
    dispatch: Any = pool.dispatch
    for name in ("checkout", "checkin"):  # a user's, such as one that says which tenant it is
        for listener in getattr(dispatch, name).listeners:
            event.listen(isolated, name, listener)
    try:
        event.listen(engine, "engine_connect", isolation.note)
        engine.pool = isolated
        yield
    finally:
        engine.pool = pool
        try:
            if event.contains(engine, "engine_connect", isolation.note):
                event.remove(engine, "engine_connect", isolation.note)
            isolation.end()
        finally:
            if isolated.disposed:
                engine.dispose()


class IsolatedPool(NullPool):
    """The pool of an engine while it is isolated: it gives out stand-ins.

    :param isolation: The isolation.
    """

    def __init__(self, isolation: Isolation) -> None:
        super().__init__(isolation.connect, reset_on_return=None, dialect=isolation.dialect)
        self.isolation = isolation
        self.disposed = False

    def dispose(self) -> None:
        """Note it: the connections of the pool behind are closed at the end."""
        self.disposed = True

    def recreate(self) -> IsolatedPool:
        """Return itself: ``engine.dispose()`` does not end the isolation."""
        return self


class Isolation:
    """The one connection, and who is in a transaction on it.

    Its driver is out of autocommit and knows of one transaction; savepoints are sent as SQL. One
    stand-in at a time has a savepoint, the *current* one: it is in a transaction, and as long as
    it has written something no other one can be used. If it has not, it is *parked* when another
    one is: its savepoint is released, and it gets a new one with its next statement.

    :param engine: The engine.
    :param held: Its connection, from the pool.
    """

    def __init__(self, engine: Engine, held: PoolProxiedConnection) -> None:
        self.dialect: Any = engine.dialect
        self.dbapi: Any = engine.dialect.loaded_dbapi
        self._used_by: WeakSet[Connection] = WeakSet()
        self._class = STAND_INS[engine.dialect.driver]
        self._held = held
        self.physical: Any = held.dbapi_connection
        self._process = os.getpid()
        self._lock = threading.Condition()
        self._busy: int | None = None  # the thread that is in the middle of a statement
        self._cut_off = False  # whether that took too long at the end
        self._current: StandIn | None = None
        self._stand_ins: WeakSet[StandIn] = WeakSet()
        self._to_undo: list[str] = []
        self._releasing = ""
        self._is_sending = False
        self._names = count(1)
        self._cursor = self._class.plain_cursor(self.dbapi, self.physical)
        self.started_with = self._class.flags_of(self.physical)
        physical: Any = self.physical
        physical.rollback()  # what a listener has begun
        physical.autocommit = True
        self._send("SHOW default_transaction_read_only")
        self.is_read_only: bool = self._cursor.fetchone()[0] == "on"
        # What the server would not let a savepoint do, if the transaction around it can't.
        self._class.leave_autocommit(self.physical, False if self.is_read_only else None)
        self._send(_LOCK_TIMEOUT.format(milliseconds=int(PATIENCE * 1000)))
        self._send(f"SAVEPOINT {_MARK}")
        self.quiet = socket.socketpair()

    def connect(self) -> Any:
        """Return what the pool takes for a new connection."""
        self._refuse_if_over()
        stand_in = self._class(self)
        self._stand_ins.add(stand_in)
        return stand_in

    def note(self, connection: Connection) -> None:
        """Note a connection of SQLAlchemy, for the end."""
        self._used_by.add(connection)

    @property
    def status(self) -> Any:
        """The driver's transaction status."""
        return self.physical.info.transaction_status

    # Statements

    @contextmanager
    def statement(self, stand_in: StandIn, joins: bool = False) -> Generator[None]:
        """What surrounds a statement of a stand-in.

        :param stand_in: The stand-in.
        :param joins: Whether it may be sent in the middle of the transaction of another one: a
            FETCH, because a cursor has its rows from when it was opened.
        """
        with self._turn(stand_in, joins) as joined:
            if stand_in.autocommit or joined:
                with self._alone(stand_in, check=not joined):
                    yield
                return
            if stand_in is not self._current:
                self._begin_for(stand_in)
            stand_in.thread = threading.get_ident()
            yield
            self._refuse_if_over()

    @contextmanager
    def _turn(self, stand_in: StandIn, joins: bool = False) -> Generator[bool]:
        """Wait until a stand-in may use the one connection, and keep others from it meanwhile."""
        is_mine = False
        try:
            with self._lock:
                joined = self._wait(stand_in, joins)
                is_mine = True
                self._busy = threading.get_ident()
            yield joined
        finally:
            if is_mine:
                with self._lock:
                    self._busy = None
                    self._undo_noted()
                    self._lock.notify_all()

    def _wait(self, stand_in: StandIn | None, joins: bool = False) -> bool:
        me = threading.get_ident()
        deadline = time.monotonic() + PATIENCE
        while True:
            self._refuse_if_over()
            current = self._current
            if self._busy == me:
                raise exc.InvalidRequestError(
                    "A statement was sent in the middle of another one, and under isolation both "
                    "have the same connection. Let the first one end before."
                )
            if self._busy is None:
                self._undo_noted()
                if current is None and self.status == IN_ERROR:
                    self.physical.close()  # an interruption; nobody knows what would be undone
                    continue
                if current is None or current is stand_in or self._park(current):
                    return False
                if joins and self.status != IN_ERROR:
                    return True
                if current.thread == me:
                    raise exc.InvalidRequestError(
                        "Another connection of this thread is in a transaction with changes. In "
                        "production this one would not see them, and its work would not be rolled "
                        f"back with them: commit that transaction before, or {_ANEW}."
                    )
            left = deadline - time.monotonic()
            if left <= 0:
                raise exc.InvalidRequestError(
                    f"Another thread has been in a transaction or a statement for {PATIENCE:.0f} "
                    "seconds, and under isolation a thread waits for its end. Don't wait for one "
                    f"thread in a transaction of another, or {_ANEW}."
                )
            self._lock.wait(left)

    @contextmanager
    def _alone(self, stand_in: StandIn, check: bool) -> Generator[None]:
        """A savepoint around one statement, as the server has a transaction around it."""
        savepoint = self._set_savepoint()
        self._to_undo.insert(0, savepoint)
        if stand_in.is_read_only_outside():
            self._send("SET TRANSACTION READ ONLY")
        yield
        self._refuse_if_over()
        self._release(savepoint, check)

    # Transactions

    def _begin_for(self, stand_in: StandIn) -> None:
        stand_in.ids_before = self._count_ids()
        stand_in.savepoint = self._set_savepoint()
        stand_in.state = State.CURRENT
        self._current = stand_in
        if stand_in.is_read_only():
            self._send("SET TRANSACTION READ ONLY")  # until the savepoint is released or undone

    def _park(self, current: StandIn) -> bool:
        """End the savepoint of a transaction that nothing would be lost with."""
        if current.is_bound:
            return False
        if self.status == IN_ERROR:
            current.state, self._current = State.ABORTED, None
            self._undo(current.savepoint)
        elif self._count_ids() == current.ids_before:
            current.state, self._current = State.PARKED, None
            self._send(f"RELEASE SAVEPOINT {current.savepoint}")
        else:
            return False
        return True

    def commit(self, stand_in: StandIn) -> None:
        """Commit the transaction of a stand-in."""
        with self._turn(stand_in):
            self._to_undo.insert(0, stand_in.savepoint)
            self._current = None
            stand_in.forget()
            if self.status != IN_ERROR:  # or COMMIT would roll back, and say nothing
                self._release(stand_in.savepoint)

    def roll_back(self, stand_in: StandIn) -> None:
        """Roll the transaction of a stand-in back. The garbage collector may call it, any time."""
        with self._lock:
            if self._current is stand_in:
                self._current = None
                self._to_undo.append(stand_in.savepoint)
            stand_in.forget()
            if self._busy is None and not self._is_sending:
                self._undo_noted()
            self._lock.notify_all()

    # What is sent

    def _send(self, sql: str) -> None:
        self._is_sending = True
        try:
            self._cursor.execute(sql)
        finally:
            self._is_sending = False

    def _set_savepoint(self) -> str:
        name = f"{_MARK}_{next(self._names)}"
        self._send(f"SAVEPOINT {name}")
        return name

    def _count_ids(self) -> int:
        self._send(_IDS)
        return int(self._cursor.fetchone()[0])

    def _release(self, savepoint: str, check: bool = True) -> None:
        """Do what COMMIT would do."""
        if check:
            self._send(_DEFERRABLE)
            deferrable, deferred = self._cursor.fetchone()
            if deferrable:
                self._send(f"SET CONSTRAINTS {deferrable} IMMEDIATE")
            if deferred:
                self._send(f"SET CONSTRAINTS {deferred} DEFERRED")
        self._releasing = savepoint
        self._send(f"RELEASE SAVEPOINT {savepoint}")
        self._to_undo.remove(savepoint)

    def _undo(self, savepoint: str) -> None:
        """Do what ROLLBACK would do."""
        self._to_undo.insert(0, savepoint)
        self._undo_noted()

    def _undo_noted(self) -> None:
        """Undo what did not come to its end, the innermost first."""
        while self._to_undo:
            savepoint = self._to_undo[0]
            # Or an interruption came just after the RELEASE.
            released = (savepoint, "RELEASE") == (self._releasing, self._cursor.statusmessage)
            try:
                if not released and not self._is_over():
                    self._send(f"ROLLBACK TO SAVEPOINT {savepoint}")
            except self.dbapi.Error:
                self.physical.close()  # who goes on is told
            self._to_undo.remove(savepoint)
            if not released and not self._is_over():
                self._send(f"RELEASE SAVEPOINT {savepoint}")

    def _is_over(self) -> bool:
        return bool(self.physical.closed) or self.status == IDLE

    def _refuse_if_over(self) -> None:
        if os.getpid() != self._process:
            raise exc.InvalidRequestError(
                "This process was forked from one that isolates the engine, and has no connection "
                "of its own: don't use the database in it, or create the schema anew for this "
                "test instead."
            )
        if self.physical.closed:
            raise exc.InvalidRequestError(
                "The connection that isolates this test is lost or at its end, and with it all "
                "that was done: what happens after that can't be tested under isolation."
            )
        if self.status == IDLE:
            raise exc.InvalidRequestError(
                "A statement has ended the transaction that isolates this test, and what was "
                "done in it is stored or gone: leave COMMIT and ROLLBACK to the session or the "
                "connection."
            )

    # The end

    @contextmanager
    def level(self) -> Generator[None]:
        """Isolation within isolation."""
        with self._lock:
            try:
                self._wait(None)
            except exc.InvalidRequestError as error:
                raise exc.InvalidRequestError(
                    "A transaction is open on this engine, and isolation has to be around it: "
                    "commit it or roll it back before."
                ) from error
            stand_ins, connections = set(self._stand_ins), set(self._used_by)
            savepoint = self._set_savepoint()
        try:
            yield
        finally:
            with self._lock:
                self._wait_for_statement()
                self._current, current = None, self._current
                if current is not None:
                    current.state = State.ABORTED
                self._undo(savepoint)
                self._close(self._stand_ins - stand_ins, self._used_by - connections)

    def end(self) -> None:
        """Roll all of it back, and give the connection back to the pool."""
        with self._lock:
            self._wait_for_statement()
            self._current = None
            self._close(self._stand_ins, self._used_by)
            for one in self.quiet:
                one.close()
            try:
                self._end()
            except BaseException:
                self._held.invalidate()
                raise
            self._held.close()

    def _wait_for_statement(self) -> None:
        if self._busy == threading.get_ident():  # it was interrupted just as it ended
            self._busy = None
        if not self._lock.wait_for(lambda: self._busy is None, PATIENCE):
            # close() would take the connection from under the thread that waits in it, which may
            # crash; so it is told by the driver that the server is gone.
            self._cut_off = True
            with suppress(OSError), socket.socket(fileno=os.dup(self.physical.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
            self._lock.wait_for(lambda: self._busy is None, PATIENCE)

    def _close(self, stand_ins: WeakSet[StandIn], connections: WeakSet[Connection]) -> None:
        for stand_in in list(stand_ins):
            stand_in.close()
        for connection in list(connections):
            # Who still has it gets another DBAPI connection with the next statement.
            if not connection.closed and not connection.invalidated:
                connection.invalidate()

    def _end(self) -> None:
        if self._cut_off:
            raise exc.InvalidRequestError(
                "Another thread was still in the middle of a statement. All was undone, but wait "
                "for the threads of a test in the test."
            )
        committed = self.status == IDLE
        try:
            if not committed:
                self._send(f"ROLLBACK TO SAVEPOINT {_MARK}")
        except self.dbapi.Error:
            committed = not self.physical.closed
        if self.physical.closed:
            self._held.invalidate()  # the server has rolled back
        else:
            self._cursor.close()
            self.physical.rollback()
            self._class.return_to_autocommit(self.physical, self.started_with)
        if committed:
            raise exc.InvalidRequestError(
                "The transaction that isolated this test was ended in it, and what was done before "
                "is stored: look for a COMMIT past the session and the connection."
            )
