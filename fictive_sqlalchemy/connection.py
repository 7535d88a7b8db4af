"""Connections that rest in autocommit, and the transactions that take them out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from sqlalchemy import exc
from sqlalchemy.engine import Connection, CursorResult, RootTransaction, TwoPhaseTransaction
from sqlalchemy.engine.cursor import BufferedRowCursorFetchStrategy, FullyBufferedCursorFetchStrategy
from sqlalchemy.pool import Pool, QueuePool

from .autocommit import HELD_CURSORS, TAKEN_BY, TransactionOptions, split_options
from .transactions import open_transactions

if TYPE_CHECKING:
    from sqlalchemy.engine import NestedTransaction

    from .engine import OptInEngine

    class _AnyTransaction(RootTransaction): ...
else:
    _AnyTransaction = object


class _OutOfAutocommit(_AnyTransaction):
    """What a transaction of ours does beside SQLAlchemy's own: out of autocommit at its begin, back at its end.

    It ends in commit(), rollback() or close(), whatever these raise. The driver is back in autocommit before the
    connection can reach the pool or the next statement.
    """

    __slots__ = ()
    connection: OptInConnection

    def __init__(self, connection: OptInConnection, *args: Any) -> None:
        connection.leave_autocommit()
        try:
            super().__init__(connection, *args)
        except BaseException:
            connection.return_to_autocommit()
            raise
        open_transactions.add(self, connection)

    def commit(self) -> None:
        if self.is_active and self.connection.is_aborted():
            # PostgreSQL answers COMMIT with ROLLBACK here, and drivers don't raise: the user would believe it stored.
            self.rollback()
            raise exc.PendingRollbackError(
                "Nothing was stored: a statement of this transaction failed, which aborted it, and the error was "
                "caught inside. Let the error leave the block, or put the statement that may fail into "
                "begin_nested()."
            )
        try:
            super().commit()
        finally:
            self._ended()

    def rollback(self) -> None:
        try:
            super().rollback()
        finally:
            self._ended()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._ended()

    def _ended(self) -> None:
        if not self.is_active:
            open_transactions.discard(self)
            self.connection.return_to_autocommit()


class OptInTransaction(_OutOfAutocommit, RootTransaction):
    """A real transaction on a connection that rests in autocommit."""

    __slots__ = ()


class OptInTwoPhaseTransaction(_OutOfAutocommit, TwoPhaseTransaction):
    """The same for two-phase commit."""

    __slots__ = ()


class OptInConnection(Connection):
    """A connection on which nothing is a transaction unless you ask.

    Without ``begin()`` each statement stands alone: it goes over the wire as it is, and what it writes is durable
    when the call returns. ``begin()`` is a real transaction.

    Get one from :meth:`.OptInEngine.connect`, or from the session.
    """

    engine: OptInEngine

    on_loan: bool = False
    """Whether a session has it on loan: it then gives the DBAPI connection back to a pool that has no spare one."""

    transaction_options: TransactionOptions
    """What its transactions begin with."""

    def __init__(self, engine: OptInEngine) -> None:
        self.transaction_options = engine.transaction_options
        self._left_with: TransactionOptions | None = None
        self._unread: list[CursorResult[Any]] = []
        super().__init__(engine)

    # -- transactions ------------------------------------------------------------------------------------------

    def begin(self) -> RootTransaction:
        """Begin a real transaction. The driver sends BEGIN with the first statement.

        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction already.
        """
        if self.get_transaction() is not None:
            return super().begin()  # raises SQLAlchemy's own error
        return OptInTransaction(self)

    def begin_nested(self) -> NestedTransaction:
        """Set a SAVEPOINT inside a transaction. Outside there is nothing to nest in: it is :meth:`begin` then."""
        if self.get_transaction() is None:
            return cast("NestedTransaction", self.begin())
        return super().begin_nested()

    def begin_twophase(self, xid: Any | None = None) -> TwoPhaseTransaction:
        """Begin a transaction that can be prepared.

        :param xid: The transaction's id; made up if left out.
        """
        if self.get_transaction() is not None:
            return super().begin_twophase(xid)  # raises SQLAlchemy's own error
        return OptInTwoPhaseTransaction(self, self.engine.dialect.create_xid() if xid is None else xid)

    def leave_autocommit(self) -> None:
        """Take the driver out of autocommit, for a transaction that begins now. Sends nothing."""
        self.transaction_options.check(self.dialect)
        connection = self.connection.dbapi_connection
        self._left_with = self.transaction_options
        self.info[TAKEN_BY] = ref(self)
        self.engine.switch.leave(connection, self.transaction_options)

    def return_to_autocommit(self) -> None:
        """Put the driver back into autocommit, after a transaction has ended. Sends nothing."""
        used, self._left_with = self._left_with, None
        if used is None or self.invalidated or self.closed:
            return
        try:
            self.engine.switch.rest(self.connection.dbapi_connection, used)
        except BaseException:
            self.invalidate()  # never back to the pool in a state nobody knows
            raise

    def is_aborted(self) -> bool:
        """Tell whether the server has aborted the transaction. Sends nothing."""
        return not self.invalidated and self.engine.switch.aborted(self.connection.dbapi_connection)

    def execution_options(self, **opt: Any) -> OptInConnection:  # type: ignore[override]
        """Set execution options as SQLAlchemy does, but ``isolation_level``, ``postgresql_readonly`` and
        ``postgresql_deferrable`` are those of the transactions that begin on this connection from now on.

        ``isolation_level="AUTOCOMMIT"`` is what the connection rests in anyway.

        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        :raises sqlalchemy.exc.InvalidRequestError: if a transaction is open and one of these is given.
        """
        options, rest = split_options(opt)
        if rest != opt:
            if self.in_transaction():
                raise exc.InvalidRequestError(
                    "This connection is in a transaction, whose isolation level and flags can't change: set them "
                    "before begin()."
                )
            if options.isolation_level == "AUTOCOMMIT":
                options = TransactionOptions(None, options.read_only, options.deferrable)
            options = options.over(self.transaction_options)
            options.check(self.dialect)
            self.transaction_options = options
        if rest:
            super().execution_options(**rest)
        return self

    def _autobegin(self) -> None:  # private: the one place where a statement becomes a transaction unasked
        pass

    def _rollback_impl(self) -> None:  # private: SQLAlchemy logs ROLLBACK here after an error outside too
        if self.get_transaction() is not None:
            super()._rollback_impl()  # private: as above

    def _run_ddl_visitor(self, *args: Any, **kwargs: Any) -> None:  # private: all of create_all(connection) or none
        if self.get_transaction() is not None:
            super()._run_ddl_visitor(*args, **kwargs)  # private: as above
        else:
            with self.begin():
                super()._run_ddl_visitor(*args, **kwargs)  # private: as above

    # -- statements outside ------------------------------------------------------------------------------------

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, parameters=None, *, execution_options=None):
            """Execute a statement; outside a transaction it stands alone.

            Many parameter sets outside are one transaction, all or nothing. ``stream_results`` and ``yield_per``
            outside use a cursor WITH HOLD, so that no transaction is open while the rows are read.

            :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside, and for a write in a
                read-only transaction; nothing is sent then.
            """
            return self._send(super().execute, statement, parameters, execution_options)

        def scalar(self, statement, parameters=None, *, execution_options=None):
            """Execute a statement and return the first column of the first row, see :meth:`execute`."""
            return self._send(super().scalar, statement, parameters, execution_options)

        def exec_driver_sql(self, statement, parameters=None, execution_options=None):
            """Execute a string as the driver takes it, see :meth:`execute`."""
            return self._send(super().exec_driver_sql, statement, parameters, execution_options)

    def _send(self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any) -> Any:
        if self.get_transaction() is not None:
            if self._left_with is not None and self._left_with.read_only and getattr(statement, "is_dml", False):
                raise exc.InvalidRequestError(
                    "This transaction is read-only and can't write: begin() it without read_only=True. Nothing was "
                    "sent."
                )
            return call(statement, parameters, execution_options=execution_options)
        # private: no public way to ask a Select for its FOR UPDATE
        if getattr(statement, "_for_update_arg", None) is not None:
            raise exc.InvalidRequestError(
                "with_for_update() outside a transaction protects nothing: the lock would be gone with the statement. "
                "Put the read and what depends on it into `with session.begin():`. Nothing was sent."
            )
        if _has_many(parameters):
            with self.begin():
                return call(statement, parameters, execution_options=execution_options)
        if self._streams(statement, execution_options):
            result = self._call_with_hold(call, statement, parameters, execution_options)
        else:
            result = call(statement, parameters, execution_options=execution_options)
        if isinstance(result, CursorResult) and result.cursor is not None:
            self._unread.append(result)
        self.give_back_if_wanted()
        if len(self._unread) > 8:
            self._unread = [result for result in self._unread if result.cursor is not None]
        return result

    def _streams(self, statement: Any, execution_options: Any) -> bool:
        if not self.dialect.supports_server_side_cursors:
            return False
        of_statement = {} if isinstance(statement, str) else statement.get_execution_options()
        for options in (execution_options, of_statement, self.get_execution_options()):
            if options and (options.get("stream_results") or options.get("yield_per")):
                return True
        return False

    def _call_with_hold(self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any) -> Any:
        # The rows of a cursor WITH HOLD stay readable when the statement is over, outside any transaction:
        # https://www.postgresql.org/docs/current/sql-declare.html
        with self.engine.switch.holding(self.connection.dbapi_connection):
            self.info[HELD_CURSORS] = True
            return call(statement, parameters, execution_options=execution_options)

    # -- the loan ----------------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """Give the DBAPI connection back to the pool; the next statement takes one again.

        Harmless if it is in the pool already. A connection in a transaction, or with a stream that is not read to
        its end, is kept. Sends nothing.
        """
        held = self._dbapi_connection  # private: `closed` and `invalidated` tell that it is gone, nothing lets it go
        if held is None or self.get_transaction() is not None:
            return
        self._unread = [result for result in self._unread if result.cursor is not None]
        if any(map(_is_stream, self._unread)):
            return
        for result in self._unread:
            _read_in_full(result)
        self._unread.clear()
        self.info.pop(HELD_CURSORS, None)
        # What SQLAlchemy calls invalidated: without a DBAPI connection, and taking a new one at next use.
        self._dbapi_connection = None  # private: as above
        held.close()

    def give_back_if_wanted(self) -> None:
        """Give the DBAPI connection back if it is on loan and the pool has no spare one."""
        if self.on_loan and not _has_spare(self.engine.pool):
            self.give_back()

    def close(self) -> None:
        """Close the connection: roll back what is open, close streams, and give the DBAPI connection back."""
        try:
            for result in self._unread:
                if _is_stream(result) and not self.invalidated:
                    result.close()
            if not self.closed and not self.invalidated:
                self.info.pop(HELD_CURSORS, None)
        finally:
            self._unread.clear()
            super().close()


def _has_many(parameters: Any) -> bool:
    return isinstance(parameters, Sequence) and len(parameters) > 1 and isinstance(parameters[0], (dict, tuple, list))


def _has_spare(pool: Pool) -> bool:
    """Tell whether nobody is kept waiting by a connection that is kept."""
    if isinstance(pool, QueuePool):
        size = pool.size()
        return size == 0 or pool.checkedout() < size  # of size 0 it has no limit
    return True  # the others never make anyone wait


def _is_stream(result: CursorResult[Any]) -> bool:
    return result.cursor is not None and isinstance(result.cursor_strategy, BufferedRowCursorFetchStrategy)


def _read_in_full(result: CursorResult[Any]) -> None:
    """Read the rows now that the connection is still there; the caller gets them from the result as before."""
    if result.cursor is not None and not isinstance(result.cursor_strategy, FullyBufferedCursorFetchStrategy):
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(
            result.cursor, alternate_description=result.cursor_strategy.alternate_cursor_description
        )
