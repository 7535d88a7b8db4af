"""The connection: its standalone statements, its streams, and its loan to a session."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import ref

from sqlalchemy import exc
from sqlalchemy.engine import Connection, CursorResult
from sqlalchemy.pool import AssertionPool, QueuePool, SingletonThreadPool, StaticPool

from .autocommit import HELD_CURSORS, PSYCOPG, switch_for
from .carrying import Carried, carry, refuse_unless_it_carries
from .errors import NOTHING_STORED, close_lost_cursor, outcome_unknown, see, was_refused
from .forks import leave_connection_to_parent
from .local_settings import LocalSettings
from .phases import OPEN, RESTING, STANDALONE
from .resting import RestingEngine
from .sqlalchemy_private import overflow_of
from .transacting import TransactingConnection, has_one_snapshot

# A statement that may begin a transaction: https://www.postgresql.org/docs/current/sql-begin.html
_BEGINS = re.compile(r"\b(?:BEGIN|START)\b", re.IGNORECASE)


class Owner(Protocol):
    """The part of a session that the connections on loan to it use."""

    begins_on_write: bool
    """Whether the first write outside a transaction begins one that stays open."""

    local_settings: LocalSettings | None
    """The settings that the session's statements carry."""

    def join(self, connection: OptInConnection) -> object:
        """Make a connection join the session's transaction, which begins if none is open."""
        ...

    def transaction_around_call(
        self, connection: OptInConnection
    ) -> AbstractContextManager[object]:
        """Return a context manager around one call that may send several writing statements."""
        ...


class TransactionOfOneStatement(Protocol):
    """The part of a session's transaction that the connection of its one statement uses."""

    def note_stored_alone(self) -> None:
        """Note that the server has executed the statement, and so stored what it wrote."""
        ...

    def note_outcome_unknown(self) -> None:
        """Note that nobody knows whether the server has executed the statement."""
        ...


class OptInConnection(TransactingConnection):
    """A connection that begins a transaction only when you ask for one.

    Each statement is standalone: it is sent without BEGIN, and what it writes is committed when the
    call returns. ``begin()`` begins a real transaction. :meth:`.OptInEngine.connect` returns such a
    connection, and so does a session.

    :param engine: The engine.
    """

    is_handed_out: bool
    """Whether the session's user has the connection, and may send something at any time."""

    begins_on_write: bool
    """The option ``begin_on_write`` of the session, or of the engine if no session borrows it."""

    def __init__(self, engine: RestingEngine) -> None:
        # Set before super().__init__(), whose events may use these attributes already.
        self._owner: ref[Owner] | None = None
        self.begins_on_write = engine.begins_on_write
        self.is_handed_out = self._leaves_cursors = False
        self._under_way = 0
        leave_connection_to_parent(self)
        super().__init__(engine)

    def lend_to(self, owner: Owner) -> object:
        """Note the session that has the connection on loan.

        :param owner: The session.
        :returns: The results that are not read yet, for the session to keep. They refer to this
            connection. If the connection kept them, there would be a reference cycle: once the
            session is gone, only the garbage collector would give the connection back.
        """
        self._owner = ref(owner)
        self.begins_on_write = owner.begins_on_write
        if owner.local_settings is not None:
            self.carry(owner.local_settings)
        unread, self._unread_of_its_own = self._unread_of_its_own, None
        return unread

    def carry(self, settings: LocalSettings) -> None:
        """Make the statements carry settings from now on. Sends nothing.

        :param settings: The settings of the session that has the connection on loan.
        :raises sqlalchemy.exc.InvalidRequestError: if the driver or the pool does not allow that.
        """
        if refuse_unless_it_carries(self.dialect):
            if isinstance(self.engine.pool, (StaticPool, SingletonThreadPool)):
                raise exc.InvalidRequestError(
                    "This pool has one connection for several sessions, and the settings of "
                    "set_local() would hold for all of them: use another pool."
                    + see("settings-not-sent")
                )
            carry(self.dialect)
            if self.carried is None:
                self.carried = Carried(settings)
            else:  # a transaction with a timeout has made it
                self.carried.settings = settings

    @property
    def owner(self) -> Owner | None:
        """The session that has the connection on loan; ``None`` if the user holds it."""
        return self._owner() if self._owner is not None else None

    def waits_for_session(self) -> bool:
        return self.is_handed_out and self.session_transaction is not None

    if not TYPE_CHECKING:  # the base class has the types

        @property
        def connection(self):
            """The DBAPI connection, as with SQLAlchemy.

            Once the caller has it, the session keeps it until ``close()`` or ``give_back()``.
            Otherwise a cursor of the caller could send in the transaction of the next borrower.

            :raises sqlalchemy.exc.InvalidRequestError: if the connection was lost, and the session
                is still in the transaction that was lost with it. On a new connection, what a
                cursor sends would be committed at once.
            """
            if self._phase is STANDALONE:
                self.join_instead()  # what a cursor sends belongs to the transaction
            self.is_seen = True
            if self.held is None and self.get_transaction() is None:
                self._refuse_if_ended()
            return self.taken

    def is_held_by_user(self) -> bool:
        return self._owner is None

    # What SQLAlchemy calls

    def on_cursor_closed(self, cursor: Any) -> None:
        close_lost_cursor(cursor)
        if self.has_streamed:
            held = self.held
            if held is not None and self.engine.switch.is_aborted(held.dbapi_connection):
                self._leaves_cursors = True  # the server refuses CLOSE in an aborted transaction
            if self._owner is not None:
                self.give_back_if_wanted()

    def transaction_around_ddl(self) -> AbstractContextManager[Any]:
        return self._transaction_around_call()

    # Calls that must not end a transaction of the session

    def commit(self) -> None:
        """Commit the open transaction. Outside a transaction, nothing is sent.

        :raises sqlalchemy.exc.InvalidRequestError: in a transaction of a session, which only the
            session may commit, unless it has ``begin_on_write=True``. Nothing is sent.
        """
        if self.session_transaction is not None and not self.begins_on_write:
            raise exc.InvalidRequestError(
                "commit() of the connection inside a transaction of its session would store a part "
                "of the session's transaction: let the block end, or if there is no `with` block, "
                "call commit() of the session. Nothing was committed." + see("commit-of-connection")
            )
        super().commit()

    def refuse_to_end_by_statement(self) -> None:
        """Refuse a COMMIT or ROLLBACK as a statement in a transaction of a session.

        SQLAlchemy and psycopg2 would treat the statements after it as part of the transaction, but
        the server would commit each of them by itself.

        :raises sqlalchemy.exc.InvalidRequestError: unless the session has ``begin_on_write=True``,
            with which existing applications may go on doing this.
        """
        if not self.begins_on_write:
            raise exc.InvalidRequestError(
                "COMMIT or ROLLBACK as a statement inside a transaction of a session would end the "
                "transaction, and the session would not know: let the block end, or if there is no "
                "`with` block, call commit() or rollback() of the session. Nothing was sent."
                + see("commit-of-connection")
            )

    # Statements

    if not TYPE_CHECKING:  # the overloads of the base class have the types

        def execute(self, statement, parameters=None, *, execution_options=None, _call=None):
            """Execute a statement. Outside a transaction, it is sent alone and committed at once.

            Outside, many parameter sets are stored in one transaction. With ``yield_per`` or
            ``stream_results`` outside, the rows are read from a cursor WITH HOLD, so that no
            transaction is open meanwhile.

            :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside, for a write
                in a read-only transaction, and if the transaction of the session was ended on this
                connection; nothing is sent. Also for a BEGIN in ``text()`` outside a transaction:
                that transaction is rolled back.
            :raises sqlalchemy.exc.PendingRollbackError: if a flush or a lost connection has ended
                the transaction of the session. Nothing is sent.
            :raises CommitOutcomeUnknown: if the connection is lost during the one statement of a
                transaction.
            """
            # scalar() and exec_driver_sql() pass `_call`, so that the three need no common helper.
            # A helper would be one more Python call for each read.
            call = Connection.execute if _call is None else _call
            if self._phase is not RESTING or self.root_transaction is not None:
                if self._phase is STANDALONE:
                    return self._send_standalone(call, statement, parameters, execution_options)
                if self._phase is not OPEN or self.root_transaction is not None:
                    return self._send_inside(call, statement, parameters, execution_options)
                # OPEN without a transaction of SQLAlchemy's: the transaction has ended on the
                # server, but the driver has not returned to autocommit, because the end was
                # interrupted, or because the block of the session goes on after a failed flush.
                if self.session_transaction is None:
                    self._end_interrupted()
            if self.session_transaction is not None:
                self._refuse_if_ended()
            # Each statement passes here. So is_lost() is inlined, and functions that are attributes
            # are put into local variables, because they can be called faster there.
            held, switch, has_input = self.held, self.engine.switch, self._has_input
            is_closed, has_begun = switch.is_closed, switch.has_begun
            if (
                held is None
                or held is not self._watched
                or has_input(0)
                or is_closed(held.dbapi_connection)
            ):
                # This is not done inside the call below, because SQLAlchemy would then report an
                # error of the pool as an error of the statement.
                self.live_connection()
            has_failed = True
            self._under_way += 1  # a counter, because loading a parameter may send a statement
            try:
                if isinstance(parameters, (list, tuple)) and _are_many(parameters):
                    with self._transaction_around_call():
                        return self._send_inside(call, statement, parameters, execution_options)
                result = call(self, statement, parameters, execution_options=execution_options)
                if isinstance(result, CursorResult) and result.cursor is not None:
                    results = self._unread
                    unread = results()
                    if unread and unread[-1].cursor is not None:
                        unread.note(result)
                    elif unread is not None:  # the last result, if any, was read meanwhile
                        unread[-1:] = (result,)
                has_failed = False
                return result
            finally:
                self._under_way -= 1
                held = self.held
                if held is not None and has_begun(held.dbapi_connection):
                    self._end_begun_by_hand(statement, has_failed)
                if self._owner is not None:
                    pool = self.engine.pool  # the first test of give_back_if_wanted(), inlined
                    if not isinstance(pool, QueuePool) or overflow_of(pool) >= 0:
                        self.give_back_if_wanted()

        def scalar(self, statement, parameters=None, *, execution_options=None):
            """Execute a statement as :meth:`execute` does, and return the first value."""
            call = Connection.scalar
            return self.execute(
                statement, parameters, execution_options=execution_options, _call=call
            )

        def exec_driver_sql(self, statement, parameters=None, execution_options=None):
            """Execute SQL in the driver's own form, as :meth:`execute` does."""
            call = Connection.exec_driver_sql
            return self.execute(
                statement, parameters, execution_options=execution_options, _call=call
            )

    def _refuse_if_ended(self) -> None:
        """Refuse a statement if the session's transaction has ended on this connection.

        :raises sqlalchemy.exc.PendingRollbackError: if a failed flush has ended the transaction.
        :raises sqlalchemy.exc.InvalidRequestError: if the user has ended the transaction here.
        """
        if self.session_transaction is None:
            return
        failure = getattr(self.session_transaction, "failure", None)
        if failure is not None:
            raise exc.PendingRollbackError(NOTHING_STORED) from failure
        raise exc.InvalidRequestError(
            "The transaction of the session was ended by hand, on its connection: no further "
            "statement can be part of it. Leave the block, or call commit() or rollback() of the "
            "session." + see("ended-by-hand")
        )

    def _send_inside(
        self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any
    ) -> Any:
        had_sent = self._has_sent
        if self._phase is not RESTING:
            used = self._options_in_effect
            if used.read_only and getattr(statement, "is_dml", False):
                raise exc.InvalidRequestError(
                    "This transaction is read-only: to write, begin it without "
                    "read_only=True. Nothing was sent." + see("read-only-transaction")
                )
            if not self._has_sent:
                self._has_sent = True
                held = self.held
                # If BEGIN was sent already, a cursor of the caller has sent something, which would
                # be lost on another connection.
                if held is not None and not self.engine.switch.has_begun(held.dbapi_connection):
                    while self.is_lost():
                        self._begin_on_another(used)
        try:
            return call(self, statement, parameters, execution_options=execution_options)
        except exc.PendingRollbackError as error:  # the connection was lost in this transaction
            raise error from self._failure
        except Exception:
            # Perhaps nothing was sent, for example because a parameter is missing.
            held = self.held
            if held is not None and self.dialect.driver in PSYCOPG:
                self._has_sent = had_sent or self.engine.switch.has_begun(held.dbapi_connection)
            raise

    def stand_alone(self, transaction: TransactionOfOneStatement) -> None:
        """Expect one statement, which is a whole transaction of the session.

        :param transaction: The transaction, see :func:`.is_one_statement`.
        """
        self._has_sent = False
        # The phase is set before session_transaction: if a signal handler raises in between,
        # Loans.leave() still finds the phase.
        self._phase = STANDALONE
        self.session_transaction = cast(Any, transaction)

    @property
    def is_standing_alone(self) -> bool:
        """Whether the connection is in a transaction of one statement, which may be sent."""
        return self._phase is STANDALONE

    def join_instead(self) -> None:
        """Join the transaction with BEGIN after all: the statement is not the only one."""
        # Ask the transaction itself for the connection. The session would already set a savepoint
        # that it is about to begin.
        transaction: Any = self.session_transaction
        self.end_standing_alone()
        transaction.provide_connection(self.engine, None)

    def end_standing_alone(self) -> None:
        """Leave the session's transaction. Sends nothing, because the server has none."""
        if (recorded := self.recorded) is not None:
            self.recorded = None
            recorded.end_alone(self.session_transaction)
        self.session_transaction = None
        self._phase = RESTING

    def _send_standalone(
        self, call: Callable[..., Any], statement: Any, parameters: Any, execution_options: Any
    ) -> Any:
        transaction: TransactionOfOneStatement = cast(Any, self.session_transaction)
        # A flush passes this option with each of its statements; other callers do not.
        is_of_flush = "compiled_cache" in (execution_options or ())
        if self._has_sent or self._under_way or not is_of_flush:
            # The statement is not the only one: for example, a column's default has to send SQL.
            self.join_instead()
            return self._send_inside(call, statement, parameters, execution_options)
        self.live_connection()
        self._under_way += 1
        self._may_be_stored = None
        result: Any = None
        try:
            result = call(self, statement, parameters, execution_options=execution_options)
            if self._phase is STANDALONE:
                self._has_sent = True
                if _has_changed_a_row(result):
                    transaction.note_stored_alone()
            return result
        except BaseException as error:
            if self._phase is not STANDALONE:
                raise  # a transaction has begun after all
            if isinstance(error, exc.DBAPIError):
                if not error.connection_invalidated or was_refused(error):
                    raise
                transaction.note_outcome_unknown()
                unknown = outcome_unknown(error, "the one statement of the transaction")
                raise unknown from error
            may_be_stored = self._may_be_stored
            if may_be_stored is None:  # not handled by SQLAlchemy; a signal handler may have raised
                may_be_stored = not isinstance(error, exc.SQLAlchemyError)
            if result is not None or may_be_stored:
                transaction.note_outcome_unknown()
            raise
        finally:
            self._under_way -= 1

    def _end_begun_by_hand(self, statement: Any, has_failed: bool) -> None:
        """Roll back a transaction that a BEGIN in the text of a statement has begun outside.

        SQLAlchemy knows nothing of the transaction, so nobody would commit it.

        :param statement: The statement. If it has no BEGIN, nothing is rolled back: the user has
            begun the transaction on a cursor of the DBAPI connection, and has to end it there.
        :param has_failed: Whether another error is being raised.
        :raises sqlalchemy.exc.InvalidRequestError: after the rollback, if there is no other error.
        """
        if self.is_inside() or not _BEGINS.search(str(statement)):
            return
        cursor = self.taken.cursor()
        try:
            cursor.execute("ROLLBACK")
        finally:
            cursor.close()
        if not has_failed:
            raise exc.InvalidRequestError(
                "BEGIN as a statement outside a transaction would begin one that nobody commits. "
                "It was rolled back. Use `with session.begin():`, or begin() of the connection."
                + see("begin-as-statement")
            )

    def begin_implicitly(self) -> None:
        """Begin the transaction of the session, or of the user who holds the connection."""
        owner = self.owner
        if owner is not None:
            owner.join(self)
        elif self.transaction_options.isolation_level != "AUTOCOMMIT":
            self.begin()

    def reads_begin(self) -> bool:
        """Tell whether a read begins the transaction, too. A session decides this on its own."""
        return self.is_held_by_user() and has_one_snapshot(self)

    def _transaction_around_call(self) -> AbstractContextManager[object]:
        """Return a transaction for a call that may send several writes; inside one, do nothing."""
        owner = self.owner
        if self.is_inside():
            return nullcontext()
        if owner is not None:
            return owner.transaction_around_call(self)
        if self.begins_on_write:
            self.begin_implicitly()
            return nullcontext()
        return self.begin()

    # The loan

    def give_back_if_wanted(self) -> None:
        """Give the DBAPI connection back to the pool, if the pool has no spare connection."""
        if self.is_seen and self.is_handed_out:
            return
        pool = self.engine.pool
        if isinstance(pool, QueuePool):
            overflow = overflow_of(pool)
            if overflow < 0 or overflow < pool.checkedin() or pool.size() == 0:  # 0: no limit
                return
        elif not isinstance(pool, AssertionPool):
            return  # no other pool has a limit at which a caller waits or is refused
        self.give_back()

    def give_back(self) -> None:
        """Give the DBAPI connection back to the pool; the next statement takes one again.

        Results that are not read yet are read first. A connection in a transaction, or with a
        stream that is not read to its end, is kept. Sends nothing.
        """
        lent = self.held
        if lent is None or self._under_way or self.is_inside():
            return
        unread = self._unread()
        if unread is None or any(unread.streams()):  # None: the session is gone, the user has it
            return
        unread.read()
        self._note_closed_cursors()
        self.replace_held(None)
        lent.close()

    def _note_closed_cursors(self) -> None:
        """Spare the pool sending CLOSE ALL, if all cursors on the server are closed."""
        if self.has_streamed and not self._leaves_cursors:
            self.taken.info.pop(HELD_CURSORS, None)
        self._leaves_cursors = False

    def close(self) -> None:
        """Close the connection: end its streams, roll back, and give it back to the pool."""
        try:
            if self.has_streamed and not self.closed:
                # Each stream that is closed would give the DBAPI connection back while the next
                # one still has to be closed on it.
                self._under_way += 1
                unread = self._unread()
                for result in () if unread is None else unread.forget():
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

    :param connection: The connection. The answer is no if the driver is not psycopg2 or psycopg.
    """
    if connection.dialect.driver not in PSYCOPG or connection.closed or connection.invalidated:
        return False
    return switch_for(connection.dialect).is_aborted(connection.connection.dbapi_connection)


def _are_many(parameters: Sequence[Any]) -> bool:
    if len(parameters) < 2 or isinstance(parameters[0], str):
        return False
    return isinstance(parameters[0], (Mapping, Sequence))


def _has_changed_a_row(result: CursorResult[Any]) -> bool:
    """Tell whether the INSERT or UPDATE of a flush has changed a row; if not, SQLAlchemy raises.

    :param result: The result of the statement.
    """
    if result.is_insert:  # the cursor is closed, and psycopg 3 has forgotten the rowcount then
        return bool(result.inserted_primary_key_rows)
    return result.rowcount != 0
