"""The transactions of a connection: the driver leaves autocommit only while one is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from sqlalchemy import exc
from sqlalchemy.engine import NestedTransaction, RootTransaction, Transaction, TwoPhaseTransaction

from .errors import TransactionTimeout, outcome_unknown, see
from .transactions import open_transactions


class TransactionOfSession(Protocol):
    """The part of a session's transaction that the transaction of a connection uses."""

    stored_on: int

    def note_outcome_unknown(self) -> None: ...


class InAutocommit(Protocol):
    """The part of a connection that its transactions use. The object is also a ``Connection``."""

    session_transaction: Any
    is_seen: bool
    recorded: Any

    def leave_autocommit(self) -> None: ...
    def note_begin(self) -> None: ...
    def return_to_autocommit(self) -> None: ...
    def refuse_if_aborted(self) -> None: ...
    def keep_what_is_left(self) -> None: ...
    def forget_failure(self) -> None: ...
    def waits_for_session(self) -> bool: ...
    def is_lost(self) -> bool: ...
    def is_open_on_server(self) -> bool: ...
    def invalidate(self) -> None: ...
    def get_transaction(self) -> Transaction | None: ...


class OutOfAutocommit(Transaction):
    """A mixin for SQLAlchemy's transactions that takes the driver out of autocommit and back.

    The invariant: once commit(), rollback() or close() has ended the transaction, the driver is in
    autocommit again, even if the call raises. The driver returns to autocommit before the
    connection can go back to the pool or send another statement. :meth:`rollback` has an exception.
    """

    __slots__ = ()

    connection: Any  # an InAutocommit

    def __init__(self, connection: Any, *args: Any) -> None:
        is_seen = connection.is_seen  # SQLAlchemy, not the user, reads `connection` below
        try:
            open_transactions.add(connection, connection.session_transaction or self)
            connection.leave_autocommit()
            super().__init__(connection, *args)
            connection.note_begin()
        except BaseException:
            if connection.get_transaction() is self:  # an exception has interrupted the begin
                cast(Any, self).is_active = True
                super().close()
            connection.return_to_autocommit()
            raise
        finally:
            connection.is_seen = is_seen

    def commit(self) -> None:
        connection = self.connection
        connection.refuse_if_aborted()
        if connection.leaves_something:
            connection.keep_what_is_left()
        self._end("COMMIT", self._commit)

    def rollback(self) -> None:
        # The transaction may have ended already, if an error came after COMMIT or ROLLBACK.
        is_open = id(self.connection.get_transaction()) == id(self)
        way = _unless_lost(super().rollback) if is_open else _nothing
        # The driver stays out of autocommit while the user has cursors that may send something.
        self._end("ROLLBACK", way, returns=not self.connection.waits_for_session())

    def close(self) -> None:
        self._end("ROLLBACK", _unless_lost(super().close))

    def _end(self, verb: str, way: Callable[[], object], *, returns: bool = True) -> None:
        is_seen, recorded = self.connection.is_seen, self.connection.recorded
        if recorded is not None:
            way = recorded.timed(verb, way, self.connection)
        try:
            way()
        finally:
            self.connection.is_seen = is_seen
            if returns and not self.is_active:
                self.connection.return_to_autocommit()

    def _commit(self) -> None:
        connection = self.connection
        of_session: TransactionOfSession | None = connection.session_transaction
        lost_before, held = connection.is_lost(), connection.held
        was_open = held is not None and connection.engine.switch.has_begun(held.dbapi_connection)
        try:
            super().commit()
            if of_session is not None:
                of_session.stored_on += 1
        except exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
            partly = of_session is not None and of_session.stored_on > 0
            if isinstance(error, TransactionTimeout) and lost_before and not partly:
                raise  # nothing is stored, and the error says so
            raise _lost(error, before_commit=lost_before, partly=partly) from error
        except BaseException:
            # An exception of a signal handler, or a timeout of gevent, may come while COMMIT is
            # under way.
            if of_session is not None and was_open and not connection.is_open_on_server():
                of_session.note_outcome_unknown()
            raise


class OptInTransaction(OutOfAutocommit, RootTransaction):  # pyright: ignore
    """A real transaction on a connection that is otherwise in autocommit."""

    __slots__ = ()


class OptInTwoPhaseTransaction(OutOfAutocommit, TwoPhaseTransaction):  # pyright: ignore
    """A transaction with a two-phase commit."""

    __slots__ = ()

    def prepare(self) -> None:
        """Prepare the transaction for its commit: send PREPARE TRANSACTION."""
        self.connection.refuse_if_aborted()
        self.connection.keep_what_is_left()
        recorded = self.connection.recorded
        prepare = super().prepare
        try:
            if recorded is None:
                prepare()
            else:
                recorded.timed("PREPARE", prepare, self.connection)()
        except BaseException:
            self.connection.invalidate()  # psycopg believes that the transaction is prepared
            raise

    def commit(self) -> None:
        try:
            super().commit()
        except BaseException:
            self.connection.invalidate()  # the drivers believe that the transaction is open
            raise


class OptInNestedTransaction(NestedTransaction):
    """A savepoint in one of the transactions above."""

    __slots__ = ()

    connection: Any  # an InAutocommit

    def commit(self) -> None:
        self.connection.refuse_if_aborted()
        super().commit()

    def rollback(self) -> None:
        # The savepoint may be released already: if the RELEASE on another bind has failed, the
        # session rolls back the savepoints of both binds.
        if self.is_active or self.connection.get_nested_transaction() is self:
            _unless_lost(super().rollback)()
        self.connection.forget_failure()

    def close(self) -> None:
        _unless_lost(super().close)()
        self.connection.forget_failure()


def _nothing() -> None:
    pass


def _unless_lost(way: Callable[[], object]) -> Callable[[], object]:
    """Wrap a call so that it ignores a lost connection, on which the server has rolled back."""

    def roll_back() -> None:
        try:
            way()
        except exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise

    return roll_back


def _lost(error: exc.DBAPIError, *, before_commit: bool, partly: bool) -> exc.OperationalError:
    """Return the error for a COMMIT whose connection was lost.

    :param error: The driver's error, as SQLAlchemy has wrapped it.
    :param before_commit: Whether the server had closed the connection before COMMIT was sent.
    :param partly: Whether another bind of the same transaction has been committed already.
    """
    lost: exc.OperationalError
    if not before_commit:
        lost = outcome_unknown(error, "COMMIT")
    else:
        orig = cast(BaseException, error.orig)
        lost = exc.OperationalError(
            error.statement, error.params, orig, connection_invalidated=True
        )
        if not partly:
            lost.add_detail(
                "The server had closed the connection before COMMIT: nothing of the transaction is "
                "stored, so you may run the transaction again." + see("lost-before-commit")
            )
    if partly:
        lost.add_detail(
            "Another bind of the same transaction was committed before, and stays committed: the "
            "transaction is stored in part. With twophase=True the part on this bind is still "
            "prepared on its server, and waits for COMMIT PREPARED or ROLLBACK PREPARED: see "
            "pg_prepared_xacts. Without twophase=True the part on this bind is not stored, or its "
            "outcome is unknown." + see("second-bind")
        )
    return lost
