"""The connection: statements that stand alone, streams, and its loan to a session."""

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
from .errors import NOTHING_STORED, close_lost_cursor, outcome_unknown, was_refused
from .forks import leave_connection_to_parent
from .local_settings import LocalSettings
from .phases import OPEN, RESTING, STANDALONE
from .resting import RestingEngine
from .sqlalchemy_private import overflow_of
from .transacting import TransactingConnection, has_one_snapshot

# A statement that may begin a transaction: https://www.postgresql.org/docs/current/sql-begin.html
_BEGINS = re.compile(r"\b(?:BEGIN|START)\b", re.IGNORECASE)


class Owner(Protocol):
    """What a connection on loan needs of the session that has borrowed it."""

    begins_on_write: bool
    """Whether the first write outside begins a transaction that lasts."""

    local_settings: LocalSettings | None
    """What its statements carry."""

    def join(self, connection: OptInConnection) -> object:
        """Make a connection part of the session's transaction; begin one if none is open."""
        ...

    def transaction_around_call(
        self, connection: OptInConnection
    ) -> AbstractContextManager[object]:
        """Return what surrounds one call that may send several writing statements."""
        ...


class TransactionOfOneStatement(Protocol):
    """What a connection needs of a session's transaction that is one statement."""

    def note_stored_alone(self) -> None:
        """Note that the server has executed the statement, and so stored what it wrote."""
        ...

    def note_outcome_unknown(self) -> None:
        """Note that nobody knows whether the server has executed the statement."""
        ...


class OptInConnection(TransactingConnection):
    """A connection on which nothing is a transaction unless you ask.

    Each statement stands alone: it goes over the wire as it is, and what it writes is durable
    when the call returns. ``begin()`` is a real transaction.

    Get one from :meth:`.OptInEngine.connect`, or from a session.

    :param engine: The engine.
    """

    is_handed_out: bool
    """Whether the session's user has it, and may send something on it at any time."""

    begins_on_write: bool
    """Whether its session has ``begin_on_write=True``, or its engine, if its user holds it."""

    def __init__(self, engine: RestingEngine) -> None:
        # Before super().__init__(), whose events may use it already.
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
            connection. If the connection kept them itself, that would be a cycle: once the session
            is gone, only the garbage collector would give the connection back to the pool.
        """
        self._owner = ref(owner)
        self.begins_on_write = owner.begins_on_write
        if owner.local_settings is not None:
            self.carry(owner.local_settings)
        unread, self._unread_of_its_own = self._unread_of_its_own, None
        return unread

    def carry(self, settings: LocalSettings) -> None:
        """Have the statements carry settings from now on. Sends nothing.

        :param settings: Those of the session that has the connection on loan.
        :raises sqlalchemy.exc.InvalidRequestError: if the driver can't do it.
        """
        if refuse_unless_it_carries(self.dialect):
            if isinstance(self.engine.pool, (StaticPool, SingletonThreadPool)):
                raise exc.InvalidRequestError(
                    "This pool has one connection for several sessions, and the settings of "
                    "set_local() would hold for all of them: use another pool."
                )
            carry(self.dialect)
            if self.carried is None:
                self.carried = Carried(settings)
            else:  # of the timeout of a transaction
                self.carried.settings = settings

    @property
    def owner(self) -> Owner | None:
        """The session that has the connection on loan; ``None`` if its user holds it."""
        return self._owner() if self._owner is not None else None

    def waits_for_session(self) -> bool:
        return self.is_handed_out and self.session_transaction is not None

    if not TYPE_CHECKING:  # the base class has it

        @property
        def connection(self):
            """The DBAPI connection, as SQLAlchemy's.

            From now on the session keeps it until ``close()`` or ``give_back()``: the caller may
            have a cursor of it, which would send in the transaction of the next borrower.

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
        """Commit the open transaction; outside there is nothing to commit, and nothing is sent.

        :raises sqlalchemy.exc.InvalidRequestError: in a transaction of a session. Only the end of
            its block, or ``commit()`` of the session, may end that. Nothing is sent.
        """
        if self.session_transaction is not None and not self.begins_on_write:
            raise exc.InvalidRequestError(
                "commit() of the connection inside a transaction of its session would store a part "
                "of that: leave commit() out, or call that of the session. Nothing was committed."
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
                "transaction, and the session would not know: use commit() or rollback() of the "
                "session, or let the block end. Nothing was sent."
            )

    # Statements

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, parameters=None, *, execution_options=None, _call=None):
            """Execute a statement; outside a transaction it is sent alone, and stored at once.

            Outside, many parameter sets are one transaction, all or nothing. With ``yield_per`` or
            ``stream_results`` outside, the rows are read from a cursor WITH HOLD, so that no
            transaction is open meanwhile.

            :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside, for a write
                in a read-only transaction, and if the transaction of the session was ended on this
                connection: nothing is sent. For BEGIN in ``text()`` outside, which is rolled back.
            :raises sqlalchemy.exc.PendingRollbackError: if a flush or a lost connection has ended
                the transaction of the session. Nothing is sent.
            :raises CommitOutcomeUnknown: if the connection is lost during the one statement of a
                transaction.
            """
            # scalar() and exec_driver_sql() pass `_call`, so that execute() needs no further
            # method, which would be one more Python call for each read.
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
            # Each statement comes here. So is_lost() is inlined, and functions that are attributes
            # are put into local variables first, because calling them there is faster.
            held, switch, has_input = self.held, self.engine.switch, self._has_input
            is_closed, has_begun = switch.is_closed, switch.has_begun
            if (
                held is None
                or held is not self._watched
                or has_input(0)
                or is_closed(held.dbapi_connection)
            ):
                # Not inside the call below: there, SQLAlchemy would report an error of the pool as
                # one of the statement.
                self.live_connection()
            has_failed = True
            self._under_way += 1  # a counter: loading a parameter's value may send a statement
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
                    elif unread is not None:  # the last one, if there is one, was read meanwhile
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
            """Execute a statement as :meth:`execute` does; return the first value."""
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

        :raises sqlalchemy.exc.PendingRollbackError: if a flush that failed has ended it.
        :raises sqlalchemy.exc.InvalidRequestError: if the user has ended it on this connection.
        """
        if self.session_transaction is None:
            return
        failure = getattr(self.session_transaction, "failure", None)
        if failure is not None:
            raise exc.PendingRollbackError(NOTHING_STORED) from failure
        raise exc.InvalidRequestError(
            "The transaction of the session was ended by hand, on its connection: nothing "
            "more can belong to it. Leave the block, or commit() or rollback() the session."
        )

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
        # Before session_transaction is set: if a signal handler raises in between, Loans.leave()
        # still finds the phase.
        self._phase = STANDALONE
        self.session_transaction = cast(Any, transaction)

    @property
    def is_standing_alone(self) -> bool:
        """Whether it is in a transaction that is one statement, sent already or not."""
        return self._phase is STANDALONE

    def join_instead(self) -> None:
        """Join the transaction with BEGIN after all: the statement is not the only one."""
        # Ask the transaction itself for the connection. The session would set the savepoint that it
        # may be about to begin.
        transaction: Any = self.session_transaction
        self.end_standing_alone()
        transaction.provide_connection(self.engine, None)

    def end_standing_alone(self) -> None:
        """Leave the session's transaction; the server has none, so nothing is sent."""
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
            # It is not the only one: a default of a column sends SQL before it, for example.
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
            if may_be_stored is None:  # not handled by SQLAlchemy: it may be a signal handler's
                may_be_stored = not isinstance(error, exc.SQLAlchemyError)
            if result is not None or may_be_stored:
                transaction.note_outcome_unknown()
            raise
        finally:
            self._under_way -= 1

    def _end_begun_by_hand(self, statement: Any, has_failed: bool) -> None:
        """Roll back a transaction that a BEGIN in the text of a statement has begun outside.

        SQLAlchemy knows nothing of the transaction, so nobody would commit it.

        :param statement: The statement. If it has no BEGIN, the user has begun the transaction on a
            cursor of the DBAPI connection, and has to end it there. It is left alone.
        :param has_failed: Whether another error is being raised.
        :raises sqlalchemy.exc.InvalidRequestError: if there is no other error.
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
            )

    def begin_implicitly(self) -> None:
        """Begin the transaction of the session, or of the user who holds the connection."""
        owner = self.owner
        if owner is not None:
            owner.join(self)
        elif self.transaction_options.isolation_level != "AUTOCOMMIT":
            self.begin()

    def reads_begin(self) -> bool:
        """Tell whether a read begins the transaction, too. Sessions ask before they get here."""
        return self.is_held_by_user() and has_one_snapshot(self)

    def _transaction_around_call(self) -> AbstractContextManager[object]:
        """Return a transaction for a call that may send several writing statements.

        Inside a transaction it is an empty context.
        """
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
        """Give the DBAPI connection back to the pool, if the pool has no spare one."""
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

    :param connection: The connection. Of a driver other than psycopg2 and psycopg it is not known.
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
