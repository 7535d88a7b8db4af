"""Connections in autocommit: statements that stand alone, and the way into a transaction."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import ref

from sqlalchemy import exc
from sqlalchemy.engine import (
    Connection,
    CursorResult,
    NestedTransaction,
    RootTransaction,
    TwoPhaseTransaction,
)
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.pool import (
    AssertionPool,
    PoolProxiedConnection,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from .autocommit import HELD_CURSORS, PSYCOPG, STARTED_WITH, USED_BY, switch_for
from .connection_transactions import (
    OptInNestedTransaction,
    OptInTransaction,
    OptInTwoPhaseTransaction,
)
from .errors import close_lost_cursor
from .options import TransactionOptions, split_options, without_autocommit
from .resting import RestingEngine
from .results import UnreadResults
from .transactions import open_transactions
from .watched import BEGINNING, OPEN, RESTING, Phase, WatchedConnection

# A statement that may begin a transaction: https://www.postgresql.org/docs/current/sql-begin.html
_BEGINS = re.compile(r"\b(?:BEGIN|START)\b", re.IGNORECASE)


class Owner(Protocol):
    """What a connection on loan needs of the session that has it."""

    begins_on_write: bool
    """Whether the first write outside begins a transaction that lasts."""

    def join(self, connection: OptInConnection) -> object:
        """Make a connection part of the session's transaction; begin one if none is open."""
        ...

    def transaction_around_call(
        self, connection: OptInConnection
    ) -> AbstractContextManager[object]:
        """Return what surrounds one call that may send several writing statements."""
        ...


class OptInConnection(WatchedConnection):
    """A connection on which nothing is a transaction unless you ask.

    Each statement stands alone: it goes over the wire as it is, and what it writes is durable
    when the call returns. ``begin()`` is a real transaction.

    Get one from :meth:`.OptInEngine.connect`, or from a session.

    :param engine: The engine.
    """

    engine: RestingEngine

    transaction_options: TransactionOptions
    """What its transactions begin with."""

    session_transaction: SessionTransaction | None
    """The session's open transaction, if the connection has joined one."""

    is_handed_out: bool
    """Whether a session has given it to its user, who may send something on it at any time."""

    begins_on_write: bool
    """Whether a statement that writes begins a transaction of the session that has it."""

    has_streamed: bool
    """Whether it has had a cursor on the server that outlives its statement."""

    def __init__(self, engine: RestingEngine, owner: Owner | None = None) -> None:
        # Before super().__init__(), whose events may use it already.
        self.transaction_options = engine.transaction_options
        self._owner: ref[Owner] | None = None if owner is None else ref(owner)
        self.begins_on_write = owner is not None and owner.begins_on_write
        self.is_handed_out = self.has_streamed = self._leaves_cursors = False
        self.session_transaction = None
        self._phase: Phase = RESTING
        self._leaves_something = False
        # What the open transaction has begun with.
        self._options_in_effect = engine.transaction_options
        self._unread = UnreadResults()
        self._under_way = 0
        self._has_sent = False
        self._failure: exc.DBAPIError | None = None
        self._begin_to_log: str | None = None
        super().__init__(engine)

    @property
    def owner(self) -> Owner | None:
        """The session that has it on loan, so that it goes back when the pool has no spare one."""
        return self._owner() if self._owner is not None else None

    # Transactions

    def begin(self) -> RootTransaction:
        """Begin a real transaction. The driver sends BEGIN with the first statement.

        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction.
        """
        if self.get_transaction() is not None:
            return super().begin()  # which raises SQLAlchemy's own error
        if self.transaction_options.isolation_level == "AUTOCOMMIT":
            return super().begin()  # somebody asked for one that is none
        return OptInTransaction(self)

    def begin_nested(self) -> NestedTransaction:
        """Set a SAVEPOINT; outside there is nothing to nest in, so it is :meth:`begin`."""
        if self.get_transaction() is None:
            return cast(NestedTransaction, self.begin())
        return OptInNestedTransaction(self)

    def begin_twophase(self, xid: Any | None = None) -> TwoPhaseTransaction:
        """Begin a transaction that can be prepared.

        :param xid: Its id; one is made up if it is left out.
        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction.
        """
        if self.get_transaction() is not None:
            return super().begin_twophase(xid)  # which raises SQLAlchemy's own error
        return OptInTwoPhaseTransaction(self, xid or self.dialect.create_xid())

    def execution_options(self, **opt: Any) -> OptInConnection:
        """Set execution options.

        :param opt: As SQLAlchemy takes them, but ``isolation_level``, ``postgresql_readonly``
            and ``postgresql_deferrable`` are those of the transactions that begin from now on.
            With the level ``"AUTOCOMMIT"`` these are none, as with SQLAlchemy: for statements
            that PostgreSQL refuses in a transaction, in code that calls ``begin()`` all the same.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        :raises sqlalchemy.exc.InvalidRequestError: if one of these is given in a transaction.
        """
        options, rest = split_options(opt)
        if len(rest) < len(opt):
            if self.in_transaction():
                raise exc.InvalidRequestError(
                    "The isolation level and the flags of a transaction that has begun can't "
                    "be changed: set them before begin()."
                )
            options = options.over(self.transaction_options)
            without_autocommit(options).check(self.dialect)
            self.transaction_options = options
        if rest:
            super().execution_options(**rest)
        return self

    def has_sent_nothing(self) -> bool:
        """Tell whether the open transaction has sent nothing yet, BEGIN neither."""
        held = self.held
        return not self._has_sent and (
            held is None or not self.engine.switch.has_begun(held.dbapi_connection)
        )

    def give_options(self, **opt: Any) -> None:
        """Set execution options in a transaction that has sent nothing yet, as before its begin.

        :param opt: As :meth:`execution_options` takes them.
        """
        options, rest = split_options(opt)
        if rest:
            super().execution_options(**rest)
        used, held = self._options_in_effect, self.held
        if len(rest) < len(opt) and self._phase is not RESTING and held is not None:
            options = options.over(used)
            options.check(self.dialect)
            switch, connection = self.engine.switch, held.dbapi_connection
            try:
                switch.enter_autocommit(connection, used, held.info[STARTED_WITH])
                self._options_in_effect = options
                switch.leave_autocommit(connection, options)
            except BaseException:
                self.invalidate()  # it may be in autocommit now, and the transaction is open
                raise

    def leave_autocommit(self) -> None:
        """Take the driver out of autocommit, for the transaction that begins. Sends nothing."""
        self.transaction_options.check(self.dialect)
        connection = self.live_connection()
        if isinstance(self.engine.pool, (StaticPool, SingletonThreadPool)):
            used_by = connection.info.get(USED_BY)
            if used_by is not None and (other := used_by()) and other.in_transaction():
                raise exc.InvalidRequestError(
                    "Another transaction is open on the one connection that this pool has for "
                    "all: end it before, or use a pool that has more."
                )
            connection.info[USED_BY] = ref(self)
        self._options_in_effect = self.transaction_options
        self._has_sent = self._leaves_something = False
        self._phase = BEGINNING
        self.engine.switch.leave_autocommit(connection.dbapi_connection, self.transaction_options)

    def note_begin(self) -> None:
        """Note that the transaction is open."""
        self._phase = OPEN

    def return_to_autocommit(self) -> None:
        """Put the driver back, for the transaction that has ended. Sends nothing."""
        try:
            self._failure = None
            held = self.held
            if self._phase is not RESTING and held is not None:
                self.engine.switch.enter_autocommit(
                    held.dbapi_connection, self._options_in_effect, held.info[STARTED_WITH]
                )
        except BaseException as failure:
            # Nobody knows its state: it must not reach the pool. The transaction has ended all
            # the same, and what it has to say comes before what the driver says.
            self.invalidate()
            if not isinstance(failure, self.dialect.loaded_dbapi.Error):
                raise
        finally:
            self._phase = RESTING
            open_transactions.discard(self)

    def _end_interrupted(self) -> None:
        """End a transaction that SQLAlchemy has ended, and whose way back was interrupted.

        :raises sqlalchemy.exc.InvalidRequestError: if it is open on the server.
        """
        held = self.held
        if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
            self.invalidate()
            self.return_to_autocommit()
            raise exc.InvalidRequestError(
                "An exception interrupted the end of the transaction before, which is rolled back "
                "now. This statement was not sent; the next one will be."
            )
        self.return_to_autocommit()

    def is_inside(self) -> bool:
        """Tell whether a transaction is open, or begins: an event may send something already."""
        return self._phase is not RESTING or self.get_transaction() is not None

    # A DBAPI connection that was lost

    def is_lost(self) -> bool:
        """Tell whether the server has closed the connection, as far as is known. Sends nothing."""
        held = self.held
        return held is None or self.engine.switch.lost(held.dbapi_connection)

    def live_connection(self) -> PoolProxiedConnection:
        """Return the DBAPI connection: another one if the server has closed it while it was idle.

        Nothing was sent on it yet, so nothing can be sent twice.
        """
        connection = self.connection
        if self.engine.switch.lost(connection.dbapi_connection):
            # Those that are idle in the pool may have been closed with it.
            idle: Callable[[], int] = getattr(self.engine.pool, "checkedin", int)
            for _ in range(idle() + 1):
                self._unread.read()  # from the driver, which has the rows
                self.invalidate()
                self._close_lost_streams()
                connection = self.connection
                if not self.engine.switch.lost(connection.dbapi_connection):
                    break
        return connection

    def _begin_on_another(self, options: TransactionOptions) -> None:
        """Go on with another DBAPI connection in a transaction that has sent nothing yet.

        The lost one goes first: the pool may have no place for both.
        """
        lost = self.held
        assert lost is not None
        self.replace_held(None)
        lost.invalidate()
        lost.close()
        self._close_lost_streams()
        another = self.connect_anew()
        try:
            self.engine.switch.leave_autocommit(another.dbapi_connection, options)
        except BaseException:
            another.close()
            raise
        self.replace_held(another)

    def _close_lost_streams(self) -> None:
        """Close the cursors of streams whose connection is gone: their next row is an error."""
        for stream in self._unread.streams():
            close_lost_cursor(stream.cursor)

    # What SQLAlchemy tells

    def on_cursor_closed(self, cursor: Any) -> None:
        close_lost_cursor(cursor)
        if self.has_streamed:
            held = self.held
            if held is not None and self.engine.switch.aborted(held.dbapi_connection):
                self._leaves_cursors = True  # the server takes no CLOSE now
            if self._owner is not None:
                self.give_back_if_wanted()

    def lines_to_log(self, message: str) -> list[str]:
        """Say what is really sent: BEGIN with the first statement, COMMIT only after a BEGIN."""
        if message not in ("BEGIN (implicit)", "COMMIT", "ROLLBACK"):
            begin, self._begin_to_log = self._begin_to_log, None
            return [message] if begin is None else [begin, message]
        if self._phase is RESTING:
            return []
        if message == "BEGIN (implicit)":  # the driver sends it with the next statement, if any
            self._begin_to_log = message
            return []
        begin, self._begin_to_log = self._begin_to_log, None
        if begin is None:
            return [message]
        if self.engine.switch.has_begun(self.connection.dbapi_connection):
            return [begin, message]  # a cursor of the caller's own has sent something
        return []

    def transaction_around_ddl(self) -> AbstractContextManager[Any]:
        return self._transaction_around_call()

    # Statements

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, parameters=None, *, execution_options=None):
            """Execute a statement; outside a transaction it stands alone.

            Many parameter sets outside are one transaction, all or nothing. ``yield_per`` and
            ``stream_results`` outside are a cursor WITH HOLD, so that no transaction is open
            while the rows are read.

            :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside, and for
                a write in a read-only transaction. Nothing is sent.
            """
            return self._send(super().execute, statement, parameters, execution_options)

        def scalar(self, statement, parameters=None, *, execution_options=None):
            """Execute a statement as :meth:`execute` does; return the first value."""
            return self._send(super().scalar, statement, parameters, execution_options)

        def exec_driver_sql(self, statement, parameters=None, execution_options=None):
            """Execute SQL in the driver's own form, as :meth:`execute` does."""
            return self._send(super().exec_driver_sql, statement, parameters, execution_options)

    def _send(
        self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any
    ) -> Any:
        if self._phase is not RESTING or self.get_transaction() is not None:
            if self._phase is not OPEN or self.get_transaction() is not None:
                return self._send_inside(call, statement, parameters, execution_options)
            self._end_interrupted()
        if self.session_transaction is not None:
            raise exc.InvalidRequestError(
                "The transaction of the session was ended by hand, on its connection: nothing "
                "more can belong to it. Leave the block, or commit() or rollback() the session."
            )
        held = self.held
        if held is None or self.engine.switch.lost(held.dbapi_connection):
            # Or SQLAlchemy would wrap what the pool says into the statement's error.
            self.live_connection()
        has_failed = True
        self._under_way += 1  # several: one may load what another needs for its parameters
        try:
            if isinstance(parameters, (list, tuple)) and _are_many(cast(Any, parameters)):
                with self._transaction_around_call():
                    return self._send_inside(call, statement, parameters, execution_options)
            result = call(statement, parameters, execution_options=execution_options)
            if isinstance(result, CursorResult) and result.cursor is not None:
                self._unread.note(result)  # pyright: ignore[reportUnknownArgumentType]
            has_failed = False
            return result  # pyright: ignore[reportUnknownVariableType]
        finally:
            self._under_way -= 1
            held = self.held
            if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
                self._end_begun_by_hand(statement, has_failed)
            if self._owner is not None:
                self.give_back_if_wanted()

    def _send_inside(
        self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any
    ) -> Any:
        had_sent = self._has_sent
        if self._phase is not RESTING:
            used = self._options_in_effect
            if used.read_only and getattr(statement, "is_dml", False):
                raise exc.InvalidRequestError(
                    "This transaction is read-only: begin() it without read_only=True to "
                    "write. Nothing was sent."
                )
            if not self._has_sent:
                self._has_sent = True
                held = self.held
                # Or a cursor of the caller's own has sent something, which is part of it.
                if held is not None and not self.engine.switch.has_begun(held.dbapi_connection):
                    while self.is_lost():
                        self._begin_on_another(used)
        try:
            return call(statement, parameters, execution_options=execution_options)
        except exc.DBAPIError as error:
            self.note_failure(error)
            raise
        except Exception:
            # A parameter that is missing, for example: perhaps nothing was sent.
            held = self.held
            if held is not None and self.dialect.driver in PSYCOPG:
                self._has_sent = had_sent or self.engine.switch.has_begun(held.dbapi_connection)
            raise

    def _end_begun_by_hand(self, statement: Any, has_failed: bool) -> None:
        """Roll back a transaction that a statement outside has begun by itself.

        The driver knows nothing of it, so nobody would commit it, and it would be lost.

        :param statement: The statement; a BEGIN on a raw cursor before it is the user's own.
        :param has_failed: Whether another error is being raised.
        :raises sqlalchemy.exc.InvalidRequestError: if there is no other error.
        """
        if self.is_inside() or not _BEGINS.search(str(statement)):
            return
        cursor = self.connection.cursor()
        try:
            cursor.execute("ROLLBACK")
        finally:
            cursor.close()
        if not has_failed:
            raise exc.InvalidRequestError(
                "BEGIN as a statement outside a transaction would begin one that nobody commits. "
                "It was rolled back. Use `with session.begin():`, or begin() of the connection."
            )

    def _transaction_around_call(self) -> AbstractContextManager[object]:
        """Return what surrounds a call that may send several writing statements."""
        owner = self.owner
        if self.is_inside():
            return nullcontext()
        return self.begin() if owner is None else owner.transaction_around_call(self)

    # The loan

    def give_back_if_wanted(self) -> None:
        """Give the DBAPI connection back to the pool, if the pool has no spare one."""
        pool = self.engine.pool
        if isinstance(pool, QueuePool):
            overflow = pool.overflow()  # negative while it may open one more that it would keep
            if overflow < 0 or overflow < pool.checkedin() or pool.size() == 0:  # or has no limit
                return
        elif not isinstance(pool, AssertionPool):
            return  # no other pool refuses one, or makes it wait
        self.give_back()

    def give_back(self) -> None:
        """Give the DBAPI connection back to the pool; the next statement takes one again.

        Results that are not read yet are read first. A connection in a transaction, or with a
        stream that is not read to its end, is kept. Sends nothing.
        """
        lent = self.held
        if lent is None or self._under_way or self.is_inside():
            return
        if any(self._unread.streams()):
            return
        self._unread.read()
        self._note_closed_cursors()
        self.replace_held(None)
        lent.close()

    def _note_closed_cursors(self) -> None:
        """Spare the pool the CLOSE ALL, if all cursors on the server are closed."""
        if self.has_streamed and not self._leaves_cursors:
            self.info.pop(HELD_CURSORS, None)
        self._leaves_cursors = False

    def close(self) -> None:
        """Close the connection: end its streams, roll back, and give it back to the pool."""
        streams = self._unread.forget()
        try:
            if self.has_streamed and not self.closed:
                for result in streams:
                    if self.invalidated:
                        close_lost_cursor(result.cursor)
                    else:
                        result.close()
                if not self.invalidated:
                    self._note_closed_cursors()
        finally:
            try:
                super().close()
            finally:
                if self._phase is not RESTING:
                    self.return_to_autocommit()


def is_aborted(connection: Connection) -> bool:
    """Tell whether COMMIT would roll back on a connection of SQLAlchemy's own. Sends nothing.

    :param connection: The connection; of psycopg2 and psycopg it is known.
    """
    if connection.dialect.driver not in PSYCOPG or connection.closed or connection.invalidated:
        return False
    return switch_for(connection.dialect).aborted(connection.connection.dbapi_connection)


def _are_many(parameters: Sequence[Any]) -> bool:
    if len(parameters) < 2 or isinstance(parameters[0], str):
        return False
    return isinstance(parameters[0], (Mapping, Sequence))
