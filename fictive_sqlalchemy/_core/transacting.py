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


# A snapshot that begins with the first write would miss what the reads before it have seen.
_SNAPSHOTS = ("REPEATABLE READ", "SERIALIZABLE")


class TransactingConnection(FailingConnection):
    """A connection whose driver is in autocommit except during a transaction.

    :param engine: The engine.
    """

    transaction_options: TransactionOptions
    """The isolation level and flags that its transactions begin with."""

    taken = Connection.connection
    """The DBAPI connection; one is taken from the pool if there is none.

    For this package alone: the public ``connection`` also notes that its user has seen it.
    """

    is_seen = False
    """Whether the user may have the DBAPI connection, or a cursor of it."""

    recorded: RecordedTransaction | None = None
    """What is recorded of the open transaction, while something records."""

    session_transaction: SessionTransaction | None
    """The session's open transaction, if the connection has joined one."""

    declared: DeclaredCursors | None = None
    """The cursors on the server that end with the open transaction, if psycopg has them."""

    def __init__(self, engine: RestingEngine) -> None:
        # Before super().__init__(), whose events may use it already.
        self.transaction_options = engine.transaction_options
        self.session_transaction = None
        self.has_streamed = False
        self._phase = RESTING
        # Whether the open transaction leaves something on the server's session if it is committed.
        self.leaves_something = False
        # The isolation level and flags that the open transaction has begun with.
        self._options_in_effect = engine.transaction_options
        self._unread_of_its_own: UnreadResults | None = UnreadResults()
        # A session that has the connection on loan keeps the unread results. So this is a weak
        # reference, which is None when the session is gone.
        self._unread = ref(self._unread_of_its_own)
        self._has_sent = False
        self._begin_to_log: str | None = None
        # The DBAPI connection that _has_input() watches, see Switch.watch().
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
            return super().begin()  # which raises SQLAlchemy's own error
        if self.transaction_options.isolation_level == "AUTOCOMMIT":
            return super().begin()  # the user has asked for one that sends no BEGIN
        return OptInTransaction(self)

    def begin_nested(self) -> NestedTransaction:
        """Set a SAVEPOINT; outside there is nothing to nest in, so it is :meth:`begin`."""
        if self._phase is STANDALONE:
            self.join_instead()
        if self.get_transaction() is None:
            return cast(NestedTransaction, self.begin())
        return OptInNestedTransaction(self)

    def begin_twophase(self, xid: Any | None = None) -> TwoPhaseTransaction:
        """Begin a transaction that can be prepared.

        :param xid: Its id; one is made up if it is left out.
        :raises sqlalchemy.exc.InvalidRequestError: if the connection is in a transaction.
        """
        if self._phase is STANDALONE:
            self.join_instead()
        if self.get_transaction() is not None:
            return super().begin_twophase(xid)  # which raises SQLAlchemy's own error
        return OptInTwoPhaseTransaction(self, xid or self.dialect.create_xid())

    def execution_options(self, **opt: Any) -> Self:
        """Set execution options.

        :param opt: As SQLAlchemy takes them, but ``isolation_level``, ``postgresql_readonly``
            and ``postgresql_deferrable`` are those of the transactions that begin from now on.
            With the level ``"AUTOCOMMIT"``, ``begin()`` sends no BEGIN, as with SQLAlchemy. That is
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
                    "be changed: set them before begin()."
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
        """Join the session's transaction, which is not one statement after all."""
        raise NotImplementedError

    def has_sent_nothing(self) -> bool:
        """Tell whether the open transaction has sent nothing yet, not even BEGIN."""
        held = self.held
        return not self._has_sent and (
            held is None or not self.engine.switch.has_begun(held.dbapi_connection)
        )

    def give_options(self, **opt: Any) -> None:
        """Set execution options, also for the open transaction, which has sent nothing yet.

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
                self.invalidate()  # the driver may be in autocommit in an open transaction
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
                    "Another transaction is open on the one connection that this pool has for "
                    "all: end that transaction first, or use a pool with more connections."
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
            self._begin_on_another(options)  # lost since live_connection(), and nothing was sent

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
            # Nobody knows the connection's state, so it must not reach the pool. An error of the
            # driver is not raised: the transaction has ended, and its own error is the one to see.
            self.invalidate()
            if not isinstance(failure, self.dialect.loaded_dbapi.Error):
                raise
        finally:
            open_transactions.discard(self)
            if (recorded := self.recorded) is not None:
                self.recorded = None
                recorded.end("rolled back")
            self._phase = RESTING  # last: if an exception comes before, close() does all this again

    def waits_for_session(self) -> bool:
        """Tell whether it returns to autocommit only when the session's transaction has ended.

        After a flush that failed, the transaction is rolled back on the server, but the session's
        block goes on. What the user sends meanwhile on a cursor of their own must not be stored.
        """
        return False

    def roll_back_rest(self) -> None:
        """Roll back what a cursor of the user's has sent after the session's rollback."""
        held = self.held
        try:
            if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
                held.rollback()
        except self.dialect.loaded_dbapi.Error:
            self.invalidate()
        finally:
            self.return_to_autocommit()

    def _end_interrupted(self) -> None:
        """Return to autocommit, after an exception has interrupted the end of a transaction.

        :raises sqlalchemy.exc.InvalidRequestError: if the transaction is still open on the server.
        """
        held = self.held
        if held is not None and self.engine.switch.has_begun(held.dbapi_connection):
            self.invalidate()
            self.return_to_autocommit()
            raise exc.InvalidRequestError(
                "An exception interrupted the end of the last transaction, which is rolled back "
                "now. This statement was not sent; the next one will be."
            )
        self.return_to_autocommit()

    def is_inside(self) -> bool:
        """Tell whether a transaction is open or begins, or one statement is a whole transaction."""
        return self._phase is not RESTING or self.root_transaction is not None

    def is_out_of_autocommit(self) -> bool:
        """Tell the same, but not of ``begin()`` with the level ``"AUTOCOMMIT"``, which is none."""
        return self._phase is not RESTING

    # What is left on the server's session

    def note_left_behind(self, left: Left) -> None:
        """Warn of what a statement leaves on the server's session; the pool closes the connection.

        :param left: What the statement leaves.
        """
        if not left.may_be_held or not self.is_held_by_user():
            warn(left)
        if left.rolls_back and self._phase not in (RESTING, STANDALONE):
            self.leaves_something = True
        else:
            self.taken.info[LEFT_BEHIND] = True

    def keep_what_is_left(self) -> None:
        """Note that what the transaction has set stays, because it is about to be committed."""
        if self.leaves_something and (held := self.held) is not None:
            held.info[LEFT_BEHIND] = True

    def is_held_by_user(self) -> bool:
        """Tell whether the user has opened it and will close it, so that it is no session's."""
        raise NotImplementedError

    # A DBAPI connection that was lost

    def is_lost(self) -> bool:
        """Tell whether there is no usable DBAPI connection. Sends nothing.

        None is held, or the server has closed it, as far as is known here.
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
        """Return the DBAPI connection; if the server has closed it while it was idle, another one.

        Call this only outside a transaction and while no answer is expected, so that no statement
        is sent twice. If all connections of the pool are lost, the last one is returned, and the
        statement raises the error.
        """
        connection = self.taken
        if self.is_lost():
            # The server may have closed those that are idle in the pool, too. int() returns 0, for
            # pools that can't tell how many these are.
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

        The lost one goes back to the pool first: the pool may have no room for both.
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
        if message == "BEGIN (implicit)":  # the driver sends it with the next statement, if any
            self._begin_to_log = message
            return []
        begin, self._begin_to_log = self._begin_to_log, None
        if begin is None:
            return [message]
        if self.engine.switch.has_begun(self.taken.dbapi_connection):
            return [begin, message]  # a cursor of the user's own has sent something
        return []


def has_one_snapshot(source: RestingEngine | TransactingConnection) -> bool:
    """Tell whether all statements of a transaction see one snapshot, so that a read begins it.

    :param source: The engine or connection that the transaction is on. An engine knows the server's
        default level once it has been used.
    """
    level: Any = source.transaction_options.isolation_level
    return (level or getattr(source.dialect, "default_isolation_level", None)) in _SNAPSHOTS
