"""The transactions and savepoints of a session: how they end, and what is called after the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from .autocommit import DEFAULT, TransactionOptions, join_options
from .connection import NOTHING_STORED, CommitOutcomeUnknown, OptInConnection
from .engine import OptInEngine

if TYPE_CHECKING:
    from typing_extensions import Self

    from .session import OptInSession

#: What is called after the end of a transaction.
Callback = Callable[[], object]


class Block(SessionTransaction):
    """What our transactions and savepoints add to SQLAlchemy's: the end of their blocks."""

    on_commit: tuple[Callback, ...] = ()
    """What is called after the outermost transaction is committed, if it was with this one."""

    on_rollback: tuple[Callback, ...] = ()
    """What is called after the outermost transaction has ended, if this one was rolled back."""

    roll_back_only: str | None = None
    """Why it can't be committed, for the error at its end; empty if it was asked for."""

    task: object = None
    """The asyncio task that began it, if :class:`.Atomic` did in one."""

    _entered_on: OptInSession | None = None

    def commit(self, *args: Any, **kwargs: Any) -> None:
        if self.roll_back_only is not None:
            raise exc.PendingRollbackError(
                self.roll_back_only or "set_rollback() asked for a rollback: leave commit() out."
            )
        session = _ours(self.session)
        try:
            super().commit(*args, **kwargs)
        except CommitOutcomeUnknown:
            self.on_rollback = ()
            raise
        session.call_back()

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        session = _ours(self.session)
        super().rollback(*args, **kwargs)
        session.call_back()

    def __enter__(self) -> Self:
        self._entered_on = _ours(self.session)
        return super().__enter__()

    def __exit__(self, type_: object, value: object, traceback: object) -> None:
        session, self._entered_on = self._entered_on, None
        goes_on = type_ is None and self._is_open()
        failed = NOTHING_STORED if goes_on and not self.is_active else None
        if goes_on and self.is_active and self.roll_back_only is not None:
            failed = self.roll_back_only
            self.rollback()
        try:
            super().__exit__(type_, value, traceback)
        except BaseException:
            if session is not None:
                session.call_back(after_error=True)
            raise
        if session is not None:
            session.call_back(after_error=type_ is not None or bool(failed))
        if failed:
            raise exc.PendingRollbackError(failed)

    def _is_open(self) -> bool:
        # SQLAlchemy's transactions have no session any more when they are closed
        session = cast("Session | None", self.session)
        return session is not None and self in (
            session.get_nested_transaction(),
            session.get_transaction(),
        )

    def has_committed(self, session: OptInSession) -> None:
        """Hand what is to be called on to the transaction around, or to the session.

        :param session: Its session.
        """
        on_commit, self.on_commit = self.on_commit, ()
        on_rollback, self.on_rollback = self.on_rollback, ()
        around = self.parent
        while around is not None and not isinstance(around, Block):
            around = around.parent  # that of a flush
        if around is None:
            session.to_call += on_commit
        else:
            around.on_commit += on_commit
            around.on_rollback += on_rollback

    def has_ended(self, session: OptInSession) -> None:
        """Note what is to be called if it was rolled back: then it has not handed it on.

        :param session: Its session.
        """
        session.to_call += self.on_rollback
        self.on_commit = self.on_rollback = ()


class OptInSavepoint(Block):
    """A savepoint of a session."""


class OptInSessionTransaction(Block):
    """A session's transaction, which goes on with the connections the session has on loan."""

    options: TransactionOptions
    """What it begins with on each bind."""

    taken: tuple[OptInConnection, ...]
    """The connections it took out of autocommit."""

    has_begun: bool
    """Whether any bind has joined."""

    def __init__(self, session: OptInSession, origin: SessionTransactionOrigin) -> None:
        self.options = DEFAULT
        self.taken = ()
        self.has_begun = False
        super().__init__(session, origin)

    def close(self, invalidate: bool = False) -> None:
        try:
            super().close(invalidate)
        except BaseException:
            _ours(self.session).transaction_ended(self)  # SQLAlchemy's event does not come then
            raise

    # private: flush() and execute() both come here for a connection, and no event comes before
    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        if not isinstance(bind, OptInEngine):
            if self.options is not DEFAULT:
                execution_options = join_options(self.options) | dict(execution_options or {})
            return super()._connection_for_bind(bind, execution_options)  # private: as above
        connection = _ours(self.session).borrow(bind)
        if connection in self.taken and self.is_active and not execution_options:
            return connection
        if connection.get_transaction() is not None:
            return super()._connection_for_bind(connection, execution_options)  # private: as above
        options = connection.transaction_options
        connection.transaction_options = self.options.over(options)
        connection.taken_by = self
        try:
            super()._connection_for_bind(connection, execution_options)  # private: as above
        except BaseException:
            connection.taken_by = None
            raise
        finally:
            connection.transaction_options = options
        self.taken += (connection,)
        return connection


def _ours(session: Session) -> OptInSession:
    return cast("OptInSession", session)
