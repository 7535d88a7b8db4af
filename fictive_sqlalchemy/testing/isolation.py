"""The rules by which all stand-ins of an engine share one connection."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, cast
from weakref import WeakSet

from sqlalchemy import Connection, Engine, exc
from sqlalchemy.pool import PoolProxiedConnection

from .._core.errors import see
from .savepoints import Savepoints
from .stand_in import IDLE, IN_ERROR, Settings, StandIn, State

_REAL_CONNECTIONS = (
    "create the schema anew for this test instead, so that each connection is a real one"
)


class Isolation:
    """The one connection of an engine, and which stand-in is in a transaction on it.

    The driver's connection is out of autocommit, in one transaction. The transactions of the
    stand-ins are savepoints in it. One stand-in at a time has a savepoint: the *current* one. Once
    its transaction has written something, no other stand-in can be used until that transaction
    ends. If it has written nothing, and another stand-in is used, the current one is *parked*: its
    savepoint is released, and it gets a new savepoint with its next statement.

    :param engine: The engine.
    :param held: A connection from the engine's pool, held as long as the isolation lasts.
    :param stand_in_class: The class of the stand-ins.
    :param patience: How many seconds a thread waits for another thread, and a statement for a lock.
    """

    def __init__(
        self,
        engine: Engine,
        held: PoolProxiedConnection,
        stand_in_class: type[StandIn],
        patience: float,
    ) -> None:
        self.dialect: Any = engine.dialect
        self.dbapi: Any = engine.dialect.loaded_dbapi
        self._used_by: WeakSet[Connection] = WeakSet()
        self._class = stand_in_class
        self._patience = patience
        self._held = held
        self.physical: Any = cast(Any, held.dbapi_connection)
        self._process = os.getpid()
        self._lock = threading.Condition()
        self._busy: int | None = None  # the thread that is in the middle of a statement
        self._cut_off = False  # whether that statement took too long at the end, and was cut off
        self._current: StandIn | None = None
        self._stand_ins: WeakSet[StandIn] = WeakSet()
        cursor = self._class.plain_cursor(self.dbapi, self.physical)
        self._savepoints = Savepoints(self.dbapi, self.physical, cursor)
        self.started_with = self._class.flags_of(self.physical)
        self.physical.rollback()  # a listener may have begun a transaction
        self.physical.autocommit = True
        self.is_read_only = self._savepoints.is_read_only_server()
        # A savepoint can be made read-only in a transaction that may write, but not vice versa.
        self._class.leave_autocommit(self.physical, False if self.is_read_only else None)
        self._savepoints.open(lock_timeout=patience)
        self.quiet = socket.socketpair()

    def connect(self) -> Any:
        """Return a new stand-in, which the pool takes for a new connection."""
        self._refuse_if_over()
        stand_in = self._class(self)
        self._stand_ins.add(stand_in)
        return stand_in

    def note_connection(self, connection: Connection) -> None:
        """Note a connection of SQLAlchemy, which is invalidated at the end."""
        self._used_by.add(connection)

    @property
    def status(self) -> Any:
        """The driver's transaction status of the one connection."""
        return self._savepoints.status

    # Statements

    @contextmanager
    def statement(self, stand_in: StandIn, joins: bool = False) -> Generator[None]:
        """Surround a statement of a stand-in with what isolates it.

        :param stand_in: The stand-in.
        :param joins: Whether the statement may be sent in the middle of the transaction of another
            stand-in. A FETCH may be, because the opening of the cursor has determined its rows.
        """
        with self._turn(stand_in, joins) as joined:
            if stand_in.autocommit or joined:
                with self._alone(stand_in, check=not joined):
                    yield
                if joined and self._current is not None:
                    # The joined statement may have taken back settings of this transaction, too.
                    self._current.settings.are_sent = False
                return
            if stand_in is not self._current:
                self._begin_for(stand_in)
            self._savepoints.set_local(stand_in.settings)
            stand_in.thread = threading.get_ident()
            yield
            self._refuse_if_over()

    @contextmanager
    def _turn(self, stand_in: StandIn, joins: bool = False) -> Generator[bool]:
        """Wait until a stand-in may use the one connection, and keep other stand-ins waiting.

        The context manager gives whether the statement is sent in the middle of another stand-in's
        transaction.
        """
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
                    self._savepoints.undo_noted()
                    self._lock.notify_all()

    def _wait(self, stand_in: StandIn | None, joins: bool = False) -> bool:
        me = threading.get_ident()
        deadline = time.monotonic() + self._patience
        while True:
            self._refuse_if_over()
            current = self._current
            if self._busy == me:
                raise exc.InvalidRequestError(
                    "A statement was sent in the middle of another one, and under isolation both "
                    "have the same connection. Let the first statement end before the second "
                    "begins." + see("one-isolated-connection")
                )
            if self._busy is None:
                self._savepoints.undo_noted()
                if current is None and self.status == IN_ERROR:
                    # Only an exception from a signal handler leads here. What is still to be undone
                    # is not known.
                    self.physical.close()
                    continue
                if current is None or current is stand_in or self._park(current):
                    return False
                if joins and self.status != IN_ERROR:
                    return True
                if current.thread == me:
                    raise exc.InvalidRequestError(
                        "Another connection of this thread is in a transaction with changes. In "
                        "production this connection would not see these changes, and its work "
                        "would not be rolled back with them: commit that transaction first, or "
                        f"{_REAL_CONNECTIONS}." + see("one-isolated-connection")
                    )
            left = deadline - time.monotonic()
            if left <= 0:
                raise exc.InvalidRequestError(
                    f"Another thread has been in a transaction or a statement for "
                    f"{self._patience:.0f} seconds, and under isolation a thread waits for its "
                    "end. Don't wait for another thread inside a transaction, or "
                    f"{_REAL_CONNECTIONS}." + see("one-isolated-connection")
                )
            self._lock.wait(left)

    @contextmanager
    def _alone(self, stand_in: StandIn, check: bool) -> Generator[None]:
        """Surround one statement with a savepoint, as the server does with a transaction."""
        savepoint = self._savepoints.set()
        self._savepoints.note_innermost(savepoint)
        if stand_in.is_read_only_outside():
            self._savepoints.make_read_only()
        settings, stand_in.settings = stand_in.settings, Settings()
        self._savepoints.set_local(settings)
        yield
        self._refuse_if_over()
        self._savepoints.release(savepoint, check)
        self._savepoints.take_back(settings)

    # Transactions

    def _begin_for(self, stand_in: StandIn) -> None:
        stand_in.ids_before = self._savepoints.count_ids()
        stand_in.savepoint = self._savepoints.set()
        stand_in.state = State.CURRENT
        self._current = stand_in
        if stand_in.is_read_only():
            self._savepoints.make_read_only()

    def _park(self, current: StandIn) -> bool:
        """Release the savepoint of the current transaction, if nothing is lost with it.

        :returns: Whether the savepoint is gone, so that another stand-in may have one.
        """
        if current.is_bound:
            return False
        if self.status == IN_ERROR:
            current.state, self._current = State.ABORTED, None
            self._savepoints.undo(current.savepoint)
        elif self._savepoints.count_ids() == current.ids_before:
            current.state, self._current = State.PARKED, None
            self._savepoints.drop(current.savepoint)
            self._savepoints.take_back(current.settings)
        else:
            return False
        return True

    def commit(self, stand_in: StandIn) -> None:
        """Commit the transaction of a stand-in."""
        with self._turn(stand_in):
            if stand_in is not self._current:  # another thread has parked it meanwhile
                stand_in.forget()
                return
            self._savepoints.note_innermost(stand_in.savepoint)
            self._current = None
            settings = stand_in.settings
            stand_in.forget()
            # In production, COMMIT of an aborted transaction would roll back without an error.
            if self.status != IN_ERROR:
                self._savepoints.release(stand_in.savepoint)
                self._savepoints.take_back(settings)

    def roll_back(self, stand_in: StandIn) -> None:
        """Roll back the transaction of a stand-in.

        The garbage collector may call this at any time.
        """
        with self._lock:
            if self._current is stand_in:
                self._current = None
                self._savepoints.note_outermost(stand_in.savepoint)
            stand_in.forget()
            if self._busy is None and not self._savepoints.is_sending:
                self._savepoints.undo_noted()
            self._lock.notify_all()

    def _refuse_if_over(self) -> None:
        if os.getpid() != self._process:
            raise exc.InvalidRequestError(
                "This process was forked from one that isolates the engine, and has no connection "
                "of its own: don't use the database in it, or create the schema anew for this "
                "test instead." + see("one-isolated-connection")
            )
        if self.physical.closed:
            raise exc.InvalidRequestError(
                "The connection that isolates this test is lost or at its end, and with it all "
                "that was done: what happens after that can't be tested under isolation."
                + see("isolation-broken")
            )
        if self.status == IDLE:
            raise exc.InvalidRequestError(
                "A statement has ended the transaction that isolates this test, and what was "
                "done in it is stored or gone: leave COMMIT and ROLLBACK to the session or the "
                "connection." + see("isolation-broken")
            )

    # The end

    @contextmanager
    def nested(self) -> Generator[None]:
        """Undo at the end of the block all that was done in it, and nothing from before."""
        with self._lock:
            try:
                self._wait(None)
            except exc.InvalidRequestError as error:
                raise exc.InvalidRequestError(
                    "A transaction is open on this engine, and isolation has to be around it: "
                    "commit the transaction, or roll it back, first."
                    + see("in-use-before-isolation")
                ) from error
            stand_ins, connections = set(self._stand_ins), set(self._used_by)
            savepoint = self._savepoints.set()
        try:
            yield
        finally:
            with self._lock:
                self._wait_for_statement()
                self._current, current = None, self._current
                if current is not None:
                    current.state = State.ABORTED
                self._savepoints.undo(savepoint)
                self._close(self._stand_ins - stand_ins, self._used_by - connections)

    def end(self) -> None:
        """Roll back everything, and return the connection to the pool."""
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
        if self._busy == threading.get_ident():  # interrupted at the end of the statement
            self._busy = None
        if not self._lock.wait_for(lambda: self._busy is None, self._patience):
            # close() while another thread waits in a call of the driver may crash the process.
            # After a shutdown of the socket, the driver tells that thread that the server is gone.
            self._cut_off = True
            with suppress(OSError), socket.socket(fileno=os.dup(self.physical.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)
            self._lock.wait_for(lambda: self._busy is None, self._patience)

    def _close(self, stand_ins: WeakSet[StandIn], connections: WeakSet[Connection]) -> None:
        for stand_in in list(stand_ins):
            stand_in.close()
        for connection in list(connections):
            # Code that still has the connection gets another DBAPI connection with the next
            # statement.
            if not connection.closed and not connection.invalidated:
                connection.invalidate()

    def _end(self) -> None:
        if self._cut_off:
            raise exc.InvalidRequestError(
                "Another thread was still in the middle of a statement. All was undone, but a test "
                "has to wait for the threads that it has started." + see("isolation-broken")
            )
        was_ended = self._savepoints.close()
        if self.physical.closed:
            self._held.invalidate()  # the connection is lost, and the server has rolled back
        else:
            self._class.return_to_autocommit(self.physical, self.started_with)
        if was_ended:
            raise exc.InvalidRequestError(
                "The transaction that isolated this test was ended in it, and what was done before "
                "is stored: look for a COMMIT that was not sent by commit() of the session or the "
                "connection." + see("isolation-broken")
            )
