"""Connections that rest in autocommit, and the transactions that take them out of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from sqlalchemy import exc
from sqlalchemy.engine import (
    Connection,
    CursorResult,
    NestedTransaction,
    RootTransaction,
    Transaction,
    TwoPhaseTransaction,
)
from sqlalchemy.engine.cursor import (
    BufferedRowCursorFetchStrategy,
    FullyBufferedCursorFetchStrategy,
)
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.pool import (
    AssertionPool,
    PoolProxiedConnection,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from .autocommit import (
    HELD_CURSORS,
    PSYCOPG,
    STARTED_WITH,
    TAKEN_BY,
    TransactionOptions,
    split_options,
    switch_for,
    without_autocommit,
)
from .errors import close_lost_cursor
from .transactions import open_transactions

if TYPE_CHECKING:
    from .engine import OptInEngine


NOTHING_STORED = (
    "Nothing of this block was stored: a statement in it had failed, which aborted it, and the "
    "error was caught inside. Let the error leave the block, or put what may fail into "
    "`with session.begin_nested():`."
)


class CommitOutcomeUnknown(exc.OperationalError):
    """The connection was lost during COMMIT: whether it was stored is not known.

    Look it up before you do it again.
    """


class _OutOfAutocommit(Transaction):
    """What our transactions add to SQLAlchemy's: out of autocommit at the begin, back at the end.

    The end is commit(), rollback() or close(), whatever these raise. So the driver is back in
    autocommit before the connection can reach the pool or the next statement.
    """

    __slots__ = ()

    connection: OptInConnection  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, connection: OptInConnection, *args: Any) -> None:
        try:
            connection.leave_autocommit()
            super().__init__(connection, *args)
        except BaseException:
            connection.return_to_autocommit()
            raise
        open_transactions.add(connection, connection.taken_by or self)

    def commit(self) -> None:
        connection = self.connection
        connection.refuse_if_aborted()
        lost_before = connection.is_lost()
        taken_by: Any = connection.taken_by
        try:
            super().commit()
            if taken_by is not None:
                taken_by.has_stored = True
        except exc.DBAPIError as error:
            if error.connection_invalidated:
                raise _lost(error, before_commit=lost_before) from error
            raise
        finally:
            self._end()

    def rollback(self) -> None:
        try:
            # Or it is over, and an error came after that.
            if id(self.connection.get_transaction()) == id(self):
                with _rolled_back_if_lost():
                    super().rollback()
        finally:
            self._end()

    def close(self) -> None:
        try:
            with _rolled_back_if_lost():
                super().close()
        finally:
            self._end()

    def _end(self) -> None:
        if not self.is_active:
            self.connection.return_to_autocommit()


@contextmanager
def _rolled_back_if_lost() -> Generator[None]:
    """Where the connection is lost there is nothing to roll back any more: the server has."""
    try:
        yield
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise


def _lost(error: exc.DBAPIError, *, before_commit: bool) -> exc.OperationalError:
    cause = cast(BaseException, error.orig)
    arguments = (error.statement, error.params, cause)
    if before_commit:
        lost = exc.OperationalError(*arguments, connection_invalidated=True)
        lost.add_detail(
            "The server had closed the connection before COMMIT: nothing of the transaction is "
            "stored."
        )
        return lost
    lost = CommitOutcomeUnknown(*arguments, connection_invalidated=True)
    lost.add_detail(
        "The connection was lost during COMMIT: the transaction may be stored or not. Look it up "
        "before you do it again."
    )
    return lost


class OptInTransaction(_OutOfAutocommit, RootTransaction):  # pyright: ignore
    """A real transaction on a connection that rests in autocommit."""

    __slots__ = ()


class OptInTwoPhaseTransaction(_OutOfAutocommit, TwoPhaseTransaction):  # pyright: ignore
    """The same for two-phase commit."""

    __slots__ = ()

    def prepare(self) -> None:
        """Prepare the transaction to be committed."""
        self.connection.refuse_if_aborted()
        try:
            super().prepare()
        except BaseException:
            self.connection.invalidate()  # psycopg believes that it is prepared
            raise

    def commit(self) -> None:
        try:
            super().commit()
        except BaseException:
            self.connection.invalidate()  # the drivers believe that it goes on
            raise


class OptInNestedTransaction(NestedTransaction):
    """A savepoint in a transaction of ours."""

    __slots__ = ()

    connection: OptInConnection  # pyright: ignore[reportIncompatibleVariableOverride]

    def commit(self) -> None:
        self.connection.refuse_if_aborted()
        super().commit()

    def rollback(self) -> None:
        with _rolled_back_if_lost():
            super().rollback()

    def close(self) -> None:
        with _rolled_back_if_lost():
            super().close()


class OptInConnection(Connection):
    """A connection on which nothing is a transaction unless you ask.

    Each statement stands alone: it goes over the wire as it is, and what it writes is durable
    when the call returns. ``begin()`` is a real transaction.

    Get one from :meth:`.OptInEngine.connect`, or from a session.

    :param engine: The engine.
    """

    engine: OptInEngine

    transaction_options: TransactionOptions
    """What its transactions begin with."""

    on_loan: bool
    """Whether a session has it on loan, so that it goes back when the pool has no spare one."""

    taken_by: SessionTransaction | None
    """The session's open transaction, if it was begun for one."""

    has_streamed: bool
    """Whether it has had a cursor on the server that outlives its statement."""

    def __init__(self, engine: OptInEngine) -> None:
        # Before super().__init__(), whose events may use it already.
        self.transaction_options = engine.transaction_options
        self.on_loan = self.has_streamed = self._leaves_cursors = False
        self.taken_by = None
        self._left_with: TransactionOptions | None = None
        self._unread: list[CursorResult[Any]] = []
        self._under_way = 0
        self._has_sent = False
        self._begin_to_log: str | None = None
        super().__init__(engine)

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

    def note_options(self) -> None:
        """Note the execution options, for :meth:`put_options_back`."""
        # private: options can be changed in public, and not be taken away
        self._noted_options = self._execution_options, self._message_formatter

    def put_options_back(self) -> None:
        """Forget the execution options that a transaction of the session was given."""
        self._execution_options, self._message_formatter = self._noted_options  # private: as above

    def leave_autocommit(self) -> None:
        """Take the driver out of autocommit, for the transaction that begins. Sends nothing."""
        self.transaction_options.check(self.dialect)
        connection = self.alive()
        if isinstance(self.engine.pool, (StaticPool, SingletonThreadPool)):
            taken_by = connection.info.get(TAKEN_BY)
            if taken_by is not None and (other := taken_by()) and other.in_transaction():
                raise exc.InvalidRequestError(
                    "Another transaction is open on the one connection that this pool has for "
                    "all: end it before, or use a pool that has more."
                )
            connection.info[TAKEN_BY] = ref(self)
        self._left_with = self.transaction_options
        self._has_sent = False
        self.engine.switch.leave(connection.dbapi_connection, self.transaction_options)

    def return_to_autocommit(self) -> None:
        """Put the driver back, for the transaction that has ended. Sends nothing."""
        open_transactions.discard(self)
        used, self._left_with = self._left_with, None
        held = self._dbapi_connection  # private: none if the connection is lost
        if used is None or held is None:
            return
        try:
            self.engine.switch.rest(held.dbapi_connection, used, held.info[STARTED_WITH])
        except BaseException as failure:
            # Nobody knows its state: it must not reach the pool. The transaction has ended all
            # the same, and what it has to say comes first.
            self.invalidate()
            if not isinstance(failure, Exception):
                raise

    def is_lost(self) -> bool:
        """Tell whether the server has closed the connection, as far as is known. Sends nothing."""
        held = self._dbapi_connection  # private: none if the connection is lost
        return held is None or self.engine.switch.lost(held.dbapi_connection)

    def alive(self) -> PoolProxiedConnection:
        """Return the DBAPI connection: another one if the server has closed it while it was idle.

        Nothing was sent on it yet, so nothing can be sent twice.
        """
        connection = self.connection
        if self.engine.switch.lost(connection.dbapi_connection):
            # Those that are idle in the pool may have been closed with it.
            idle: Callable[[], int] = getattr(self.engine.pool, "checkedin", int)
            for _ in range(idle() + 1):
                self._read_unread()  # from the driver, which has them
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
        lost = self._dbapi_connection  # private: for leave_autocommit() to get another one
        assert lost is not None
        self._dbapi_connection = None  # private: as above
        lost.invalidate()
        lost.close()
        self._close_lost_streams()
        another = self.engine.raw_connection()
        try:
            self.engine.switch.leave(another.dbapi_connection, options)
        except BaseException:
            another.close()
            raise
        self._dbapi_connection = another  # private: as above

    def _close_lost_streams(self) -> None:
        """Close the cursors of streams whose connection is gone: their next row is an error."""
        for stream in filter(_is_stream, self._unread):
            close_lost_cursor(stream.cursor)

    def is_inside(self) -> bool:
        """Tell whether a transaction is open, or begins: an event may send something already."""
        return self._left_with is not None or self.get_transaction() is not None

    def refuse_if_aborted(self) -> None:
        """Refuse to commit after an error: PostgreSQL would roll back, and no driver says so.

        :raises sqlalchemy.exc.PendingRollbackError: if a statement of the transaction failed.
        """
        held = self._dbapi_connection  # private: none if the connection is lost
        if held is not None and self.engine.switch.aborted(held.dbapi_connection):
            raise exc.PendingRollbackError(NOTHING_STORED)

    def _autobegin(self) -> None:  # private: the one place where a statement begins unasked
        pass

    # private: the only place that is told of a stream's end
    def _safe_close_cursor(self, cursor: Any) -> None:
        super()._safe_close_cursor(cursor)  # private: as above
        close_lost_cursor(cursor)
        if self.has_streamed:
            held = self._dbapi_connection  # private: none if the connection is lost
            if held is not None and self.engine.switch.aborted(held.dbapi_connection):
                self._leaves_cursors = True  # the server takes no CLOSE now
            if self.on_loan:
                self.give_back_if_wanted()

    # private: SQLAlchemy logs BEGIN when it may be sent, and COMMIT where it may have been
    def _log_info(self, message: str, *arg: Any, **kw: Any) -> None:
        if self._left_with is None and message in ("BEGIN (implicit)", "COMMIT", "ROLLBACK"):
            return
        begin, self._begin_to_log = self._begin_to_log, None
        if message == "BEGIN (implicit)":  # the driver sends it with the next statement, if any
            self._begin_to_log = message
            return
        if begin is not None:
            if message in ("COMMIT", "ROLLBACK") and not self._has_begun():
                return
            super()._log_info(begin)  # private: as above
        super()._log_info(message, *arg, **kw)  # private: as above

    def _has_begun(self) -> bool:
        return self.engine.switch.has_begun(self.connection.dbapi_connection)

    def _rollback_impl(self) -> None:  # private: called, and logged, after an error outside too
        if self.get_transaction() is not None:
            super()._rollback_impl()  # private: as above

    def _run_ddl_visitor(self, *args: Any, **kwargs: Any) -> None:  # private: create_all(self)
        if self.get_transaction() is not None:
            super()._run_ddl_visitor(*args, **kwargs)  # private: as above
        else:
            with self.begin():
                super()._run_ddl_visitor(*args, **kwargs)  # private: as above

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
        if self._left_with is not None or self.get_transaction() is not None:
            return self._send_inside(call, statement, parameters, execution_options)
        if self.taken_by is not None:
            raise exc.InvalidRequestError(
                "The transaction of the session was ended by hand, on its connection: nothing "
                "more can belong to it. Leave the block, or commit() or rollback() the session."
            )
        held = self._dbapi_connection  # private: none if it was given back, or is lost
        if held is None or self.engine.switch.lost(held.dbapi_connection):
            self.alive()  # or SQLAlchemy would wrap what the pool says into the statement's error
        self._under_way += 1  # several: one may load what another needs for its parameters
        try:
            if isinstance(parameters, (list, tuple)) and _are_many(cast(Any, parameters)):
                with self.begin():
                    return call(statement, parameters, execution_options=execution_options)
            result = call(statement, parameters, execution_options=execution_options)
            if isinstance(result, CursorResult) and result.cursor is not None:
                self._note_unread(result)  # pyright: ignore[reportUnknownArgumentType]
            return result  # pyright: ignore[reportUnknownVariableType]
        finally:
            self._under_way -= 1
            if self.on_loan:
                self.give_back_if_wanted()

    def _send_inside(
        self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any
    ) -> Any:
        used = self._left_with
        if used is not None:
            if not self._has_sent:
                self._has_sent = True
                held = self._dbapi_connection  # private: none if the connection is lost
                # Or a cursor of the caller's own has sent something, which is part of it.
                if held is not None and not self.engine.switch.has_begun(held.dbapi_connection):
                    while self.is_lost():
                        self._begin_on_another(used)
            if used.read_only and getattr(statement, "is_dml", False):
                raise exc.InvalidRequestError(
                    "This transaction is read-only: begin() it without read_only=True to "
                    "write. Nothing was sent."
                )
        return call(statement, parameters, execution_options=execution_options)

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
        # private: `invalidated` tells of a Connection without a DBAPI connection, and the next
        # statement gives it one; but the only public way there, invalidate(), closes it
        lent = self._dbapi_connection
        if lent is None or self._under_way or self.is_inside():
            return
        if any(map(_is_stream, self._unread)):
            return
        self._read_unread()
        self._note_closed_cursors()
        self._dbapi_connection = None  # private: as above
        lent.close()

    def _note_closed_cursors(self) -> None:
        """Spare the pool the CLOSE ALL, if all cursors on the server are closed."""
        if self.has_streamed and not self._leaves_cursors:
            self.info.pop(HELD_CURSORS, None)
        self._leaves_cursors = False

    def _note_unread(self, result: CursorResult[Any]) -> None:
        unread = self._unread
        while unread and unread[-1].cursor is None:  # it was read meanwhile
            unread.pop()
        if len(unread) > 8:
            self._read_unread()  # nobody may want them any more
        self._unread.append(result)

    def _read_unread(self) -> None:
        """Read the results that are not read yet, but for streams: they are independent then."""
        for result in self._unread:
            if result.cursor is not None and not _is_stream(result):
                with suppress(Exception):  # for who reads it
                    _read_in_full(result)
        self._unread = list(filter(_is_stream, self._unread))

    def close(self) -> None:
        """Close the connection: end its streams, roll back, and give it back to the pool."""
        unread, self._unread = self._unread, []
        try:
            if self.has_streamed and not self.closed:
                for result in filter(_is_stream, unread):
                    if self.invalidated:
                        close_lost_cursor(result.cursor)
                    else:
                        result.close()
                if not self.invalidated:
                    self._note_closed_cursors()
        finally:
            super().close()


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


def _is_stream(result: CursorResult[Any]) -> bool:
    return result.cursor is not None and isinstance(
        result.cursor_strategy, BufferedRowCursorFetchStrategy
    )


def _read_in_full(result: CursorResult[Any]) -> None:
    """Read the rows while the connection is there; the caller gets them as before."""
    strategy = result.cursor_strategy
    if not isinstance(strategy, FullyBufferedCursorFetchStrategy):
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(
            result.cursor, alternate_description=strategy.alternate_cursor_description
        )
