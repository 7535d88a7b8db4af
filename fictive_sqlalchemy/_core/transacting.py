"""How a connection enters and leaves a transaction, and recovers from lost servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

from sqlalchemy import exc
from sqlalchemy.engine import Connection, NestedTransaction, RootTransaction, TwoPhaseTransaction
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection, SingletonThreadPool, StaticPool

from . import observing
from .autocommit import LEFT_BEHIND, STARTED_WITH, USED_BY
from .carrying import carried_in
from .connection_transactions import (
    OptInNestedTransaction,
    OptInTransaction,
    OptInTwoPhaseTransaction,
)
from .errors import see
from .failing import FailingConnection
from .options import DEFAULT, TransactionOptions, split_options, without_autocommit
from .phases import BEGINNING, OPEN, RESTING, STANDALONE
from .records import RecordedTransaction
from .resting import RestingEngine
from .results import DeclaredCursors, UnreadResults
from .server_state import Left, warn
from .transactions import open_transactions

if TYPE_CHECKING:
    from typing_extensions import Self


# If the snapshot began with the first write, it could differ from what earlier reads have seen.
_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE")


class TransactingConnection(FailingConnection):
    """A connection whose driver is in autocommit except during a transaction.

    :param engine: The engine.
    """

    transaction_options: TransactionOptions
    """The isolation level and flags that its transactions begin with."""

    taken = Connection.connection
    """The DBAPI connection. If none is held, one is taken from the pool.

    This is for this package alone. The public ``connection`` also notes that the user has seen it.
    """

    is_seen = False
    """Whether the user may have the DBAPI connection or one of its cursors."""

    recorded: RecordedTransaction | None = None
    """The record of the open transaction, while something records."""

    session_transaction: SessionTransaction | None
    """The session's open transaction that the connection has joined, or ``None``."""

    declared: DeclaredCursors | None = None
    """The server-side cursors of psycopg 3 that end with the open transaction."""

    def __init__(self, engine: RestingEngine) -> None:
        # Before super().__init__(), because listeners that it calls may use the connection already.
        self.transaction_options = engine.transaction_options
        self.session_transaction = None
        self.has_streamed = False
        self._phase = RESTING
        # Whether the open transaction leaves something on the server's session if it is committed.
        self.leaves_something = False
        # The isolation level and flags that the open transaction has begun with.
        self._options_in_effect = engine.transaction_options
        self._unread_of_its_own: UnreadResults | None = UnreadResults()
        # If a session has the connection on loan, the session keeps the unread results. So this is
        # a weak reference, which returns None when the session is gone.
        self._unread = ref(self._unread_of_its_own)
        self._has_sent = False
        self._begin_to_log: str | None = None
        # The DBAPI connection that _has_input() watches: see Switch.watch().
        self._watched: PoolProxiedConnection | None = None
        self._has_input: Callable[[int], Any] = bool
        super().__init__(engine)

    # Transactions

    def replace_held(self, another: PoolProxiedConnection | None) -> None:
        self._watched = None
        super().replace_held(another)

    def begin(self) -> RootTransaction:
        """Begin a real transaction. The driver sends BEGIN with the first statement.

        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction.
        """
        if self._phase is STANDALONE:
            self.join_instead()
        if self.root_transaction is not None:
            return super().begin()  # raises SQLAlchemy's own error
        if self.transaction_options.isolation_level == "AUTOCOMMIT":
            return super().begin()  # the user has asked for a begin() that sends no BEGIN
        return OptInTransaction(self)

    def begin_nested(self) -> NestedTransaction:
        """Begin a savepoint; outside, where there is nothing to nest in, begin a transaction."""
        if self._phase is STANDALONE:
            self.join_instead()
        if self.get_transaction() is None:
            return cast(NestedTransaction, self.begin())
        return OptInNestedTransaction(self)

    def begin_twophase(self, xid: Any | None = None) -> TwoPhaseTransaction:
        """Begin a transaction that can be prepared.

        :param xid: The id of the transaction. If it is left out, the dialect makes one.
        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction.
        """
        if self._phase is STANDALONE:
            self.join_instead()
        if self.get_transaction() is not None:
            return super().begin_twophase(xid)  # raises SQLAlchemy's own error
        return OptInTwoPhaseTransaction(self, xid or self.dialect.create_xid())

    def execution_options(self, **opt: Any) -> Self:
        """Set execution options.

        :param opt: The options of SQLAlchemy. But ``isolation_level``, ``postgresql_readonly`` and
            ``postgresql_deferrable`` are for the transactions that begin from now on. With the
            level ``"AUTOCOMMIT"``, ``begin()`` sends no BEGIN, as with SQLAlchemy. This level is
            for code that calls ``begin()`` around statements that PostgreSQL refuses in a
            transaction.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        :raises sqlalchemy.exc.InvalidRequestError: if one of these three is given in a transaction.
        """
        options, rest = split_options(opt)
        if len(rest) < len(opt):
            if self.in_transaction():
                raise exc.InvalidRequestError(
                    "The isolation level and the flags of a transaction that has begun can't "
                    "be changed: set them before begin()." + see("options-after-begin")
                )
            options = options.over(self.transaction_options)
            without_autocommit(options).check(self.dialect)
            self.transaction_options = options
        if rest:
            super().execution_options(**rest)
        return self

    def options_in_effect(self) -> TransactionOptions:
        """Return the isolation level and flags that the open transaction has begun with."""
        return self._options_in_effect

    def join_instead(self) -> None:
        """Join the session's transaction with BEGIN, because it is not one statement after all."""
        raise NotImplementedError

    def has_sent_nothing(self) -> bool:
        """Tell whether the open transaction has sent nothing yet, not even BEGIN."""
        held = self.held
        return not self._has_sent and (
            held is None or not self.engine.switch.has_begun(held.dbapi_connection)
        )

    def give_options(self, **opt: Any) -> None:
        """Set execution options, also for the open transaction, if it has sent nothing yet.

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
                self.invalidate()  # the driver may be in autocommit inside the transaction
                raise

    def leave_autocommit(self) -> None:
        """Take the driver out of autocommit, for the transaction that begins. Sends nothing."""
        if self.transaction_options is not DEFAULT:
            self.transaction_options.check(self.dialect)
        connection = self.live_connection()
        if isinstance(self.engine.pool, (StaticPool, SingletonThreadPool)):
            used_by = connection.info.get(USED_BY)
            if used_by is not None and (other := used_by()) and other.in_transaction():
                raise exc.InvalidRequestError(
                    "Another transaction is open on the only connection of this pool: end that "
                    "transaction first, or use a pool with more connections."
                    + see("one-connection-pool")
                )
            connection.info[USED_BY] = ref(self)
        options = self._options_in_effect = self.transaction_options
        self._has_sent = self.leaves_something = False
        if self.carried is not None or options.timeout is not None:
            self.carried = carried_in(self, options.timeout)
        self._phase = BEGINNING
        try:
            self.engine.switch.leave_autocommit(connection.dbapi_connection, options)
        except self.dialect.loaded_dbapi.Error as error:
            if not self.engine.switch.is_lost(connection.dbapi_connection):
                self.raise_wrapped(error)
            self._begin_on_another(options)  # it was lost since live_connection(); nothing was sent

    def note_begin(self) -> None:
        """Note that the transaction is open."""
        self._phase = OPEN
        if (recorder := observing.recorder) is not None:
            recorder.note_begin(self)

    def return_to_autocommit(self) -> None:
        """Put the driver back into autocommit after a transaction has ended. Sends nothing."""
        try:
            self._failure = None
            if (declared := self.declared) is not None:
                self.declared = None
                declared.close(self.dialect.loaded_dbapi)
            held = self.held
            if self._phase is not RESTING and held is not None:
                self.engine.switch.enter_autocommit(
                    held.dbapi_connection, self._options_in_effect, held.info[STARTED_WITH]
                )
        except BaseException as failure:
            # The state of the connection is unknown, so it must not reach the pool. An error of
            # the driver is not raised, because it would hide the error of the transaction.
            self.invalidate()
            if not isinstance(failure, self.dialect.loaded_dbapi.Error):
                raise
        finally:
            open_transactions.discard(self)
            if (recorded := self.recorded) is not None:
                self.recorded = None
                recorded.end("rolled back")
            self._phase = RESTING  # last: after an exception above, close() does all this again

    def waits_for_session(self) -> bool:
        """Tell whether the connection stays out of autocommit until the session's transaction ends.

        After a flush that failed, the transaction is rolled back on the server, but the session's
        block goes on. What the user sends meanwhile on a cursor of their own must not be stored.
        """
        return False

    def roll_back_rest(self) -> None:
        """Roll back what a cursor of the user has sent after the session's rollback."""
        held = self.held
        try:
            if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
                held.rollback()
        except self.dialect.loaded_dbapi.Error:
            self.invalidate()
        finally:
            self.return_to_autocommit()

    def _end_interrupted(self) -> None:
        """Return to autocommit after an exception has interrupted the end of a transaction.

        :raises sqlalchemy.exc.InvalidRequestError: if the transaction is still open on the server.
        """
        held = self.held
        if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
            self.invalidate()
            self.return_to_autocommit()
            raise exc.InvalidRequestError(
                "An exception interrupted the end of the last transaction, which is rolled back "
                "now. This statement was not sent; the next one will be." + see("interrupted-end")
            )
        self.return_to_autocommit()

    def is_inside(self) -> bool:
        """Tell whether a transaction is open or beginning, or expected to be one statement."""
        return self._phase is not RESTING or self.root_transaction is not None

    def is_out_of_autocommit(self) -> bool:
        """Tell the same as :meth:`is_inside`, but ``False`` with the level ``"AUTOCOMMIT"``."""
        return self._phase is not RESTING

    # What is left on the server's session

    def note_left_behind(self, left: Left) -> None:
        """Warn of what a statement leaves on the server's session. The pool closes the connection.

        :param left: What the statement leaves.
        """
        if not left.may_be_held or not self.is_held_by_user():
            warn(left)
        if left.rolls_back and self._phase not in (RESTING, STANDALONE):
            self.leaves_something = True
        else:
            self.taken.info[LEFT_BEHIND] = True

    def keep_what_is_left(self) -> None:
        """Note before COMMIT that what the transaction has set stays on the server's session."""
        if self.leaves_something and (held := self.held) is not None:
            held.info[LEFT_BEHIND] = True

    def is_held_by_user(self) -> bool:
        """Tell whether the user has opened the connection, so that no session has it on loan."""
        raise NotImplementedError

    # A DBAPI connection that was lost

    def is_lost(self) -> bool:
        """Tell whether no usable DBAPI connection is held. Sends nothing.

        Either no DBAPI connection is held, or the server has closed it, as far as is known here.
        """
        held = self.held
        if held is None:
            return True
        switch, connection = self.engine.switch, held.dbapi_connection
        if held is not self._watched:
            if switch.is_closed(connection):
                return True
            self._has_input, self._watched = switch.watch(connection), held
        if not self._has_input(0) and not switch.is_closed(connection):
            return False
        return switch.is_lost(connection)

    def is_open_on_server(self) -> bool:
        """Tell whether BEGIN was sent, and neither COMMIT nor ROLLBACK yet. Sends nothing."""
        held = self.held
        return held is not None and self.engine.switch.has_begun(held.dbapi_connection)

    def live_connection(self) -> PoolProxiedConnection:
        """Return the DBAPI connection, or another one if the server has closed it while idle.

        Call this only outside a transaction and while no answer is expected, so that no statement
        is sent twice. If all connections of the pool are lost, the last one is returned, and the
        statement raises the error.
        """
        connection = self.taken
        if self.is_lost():
            # The server may have closed the idle connections of the pool, too. For pools that can't
            # tell how many connections are idle, int() returns 0.
            idle: Callable[[], int] = getattr(self.engine.pool, "checkedin", int)
            unread = self._unread()
            for _ in range(idle() + 1):
                if unread is not None:
                    unread.read()  # the driver has received the rows already
                self.invalidate()
                if unread is not None:
                    unread.close_lost_streams()
                connection = self.taken
                if not self.is_lost():
                    break
        return connection

    def _begin_on_another(self, options: TransactionOptions) -> None:
        """Go on with another DBAPI connection in a transaction that has sent nothing yet.

        The lost one is given back first, because the pool may have no room for both.
        """
        lost = self.held
        assert lost is not None
        self.replace_held(None)
        lost.invalidate()
        lost.close()
        if (unread := self._unread()) is not None:
            unread.close_lost_streams()
        another = self.connect_anew()
        try:
            self.engine.switch.leave_autocommit(another.dbapi_connection, options)
        except BaseException as error:
            another.close()
            self.raise_wrapped(error)
        self.replace_held(another)

    # The log

    def lines_to_log(self, message: str) -> list[str]:
        """Log what is sent: BEGIN with the first statement, and COMMIT only after a BEGIN."""
        if message not in ("BEGIN (implicit)", "COMMIT", "ROLLBACK"):
            begin, self._begin_to_log = self._begin_to_log, None
            return [message] if begin is None else [begin, message]
        if self._phase is RESTING:
            return []
        if message == "BEGIN (implicit)":  # the driver sends BEGIN with the next statement
            self._begin_to_log = message
            return []
        begin, self._begin_to_log = self._begin_to_log, None
        if begin is None:
            return [message]
        if self.engine.switch.has_begun(self.taken.dbapi_connection):
            return [begin, message]  # a cursor of the user has sent something
        return []


def has_one_snapshot(source: RestingEngine | TransactingConnection) -> bool:
    """Tell whether all statements of a transaction see one snapshot, so that a read begins it.

    :param source: The engine or the connection of the transaction. An engine knows the server's
        default level once it was used.
    """
    level: Any = source.transaction_options.isolation_level
    return (level or getattr(source.dialect, "default_isolation_level", None)) in _SNAPSHOTS
