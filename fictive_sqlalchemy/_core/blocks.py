"""The transactions and savepoints of a session: how they end, and what is called after the end."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin

from .autocommit import DEFAULT, TransactionOptions, join_options
from .connection import NOTHING_STORED, CommitOutcomeUnknown, OptInConnection
from .engine import OptInEngine

if TYPE_CHECKING:
    from typing_extensions import Self

    from .session import OptInSession

OF_ANOTHER_TASK = (
    "The transaction of this session belongs to another thread or asyncio task: give each a "
    "session of its own, or don't let the task wait inside the block."
)

#: What is called after the end of a transaction.
Callback = Callable[[], object]


class Block(SessionTransaction):
    """What our transactions and savepoints add to SQLAlchemy's: how they end."""

    session: OptInSession  # pyright: ignore[reportIncompatibleVariableOverride]

    is_open: bool = True
    """Whether it is not closed yet, though its flush may have failed."""

    on_commit: tuple[Callback, ...] = ()
    """What is called after the outermost transaction is committed, if it was with this one."""

    on_rollback: tuple[Callback, ...] = ()
    """What is called after the outermost transaction has ended, if this one was rolled back."""

    roll_back_only: str | None = None
    """Why it can't be committed, for the error at its end; empty if its block asked for it."""

    atomic: int = 0
    """How many :class:`.Atomic` are on it, whose end alone commits it."""

    entered_in: tuple[int, object] | None = None
    """The thread, and the asyncio task if there was one, that its block belongs to."""

    _entered = False
    _around: Any = None
    _is_committed = False

    def commit(self, *args: Any, **kwargs: Any) -> None:
        if self.atomic:
            raise exc.InvalidRequestError(
                "What is inside atomic() is committed at its end, as a whole: leave commit() out. "
                "Use flush() to send what is waiting before. Nothing was committed."
            )
        if self.roll_back_only is not None:
            raise exc.PendingRollbackError(
                self.roll_back_only
                or "set_rollback() has asked for a rollback: call rollback(), and not commit()."
            )
        session = self.session
        if session.ending:  # the end of its block, which calls back
            self._commit(*args, **kwargs)
        else:
            with session.calling_back():
                self._commit(*args, **kwargs)

    def _commit(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().commit(*args, **kwargs)
        except CommitOutcomeUnknown:
            self.on_rollback = ()
            raise
        except BaseException:
            if self.is_stored():
                self.has_committed()  # somebody's listener failed after COMMIT
            raise

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        with self.session.calling_back():
            super().rollback(*args, **kwargs)

    def close(self, invalidate: bool = False) -> None:
        session = self.session
        if session.ending:
            self._close(invalidate)
        else:
            with session.calling_back():
                self._close(invalidate)

    def _close(self, invalidate: bool) -> None:
        try:
            super().close(invalidate)
        except BaseException:
            self.session.transaction_ended(self)  # SQLAlchemy's event does not come then
            raise

    def __enter__(self) -> Self:
        self._around = self.session.entered
        self._entered = True
        self.entered_in = _here()
        return super().__enter__()

    def __exit__(self, type_: object, value: object, traceback: object) -> None:
        session = self.session
        failed: str | None = None
        with session.calling_back(only_log=type_ is not None):
            try:
                if type_ is None and self.is_open:
                    failed = self.roll_back_only if self.is_active else NOTHING_STORED
                    if failed is not None and self.is_active:
                        self.rollback()
            finally:
                if self.is_open and not self.is_active:
                    # private: as rollback() does, for what was changed after the flush that failed
                    self._restore_snapshot(dirty_only=self.nested)
                try:
                    super().__exit__(type_, value, traceback)
                finally:
                    if self.is_open:  # a listener failed after COMMIT, which SQLAlchemy leaves so
                        self.close()
                    self.leave(session)
            if failed:
                raise exc.PendingRollbackError(failed)

    def leave(self, session: OptInSession) -> None:
        """Go back to the block around this one, or to the next if that was left before.

        :param session: Its session.
        """
        self._entered = False
        around = session.entered
        while isinstance(around, Block) and not around._entered:
            around = around._around
        session.entered = around

    def is_stored(self) -> bool:
        """Tell whether all that was done in it is committed."""
        return False

    def is_of_another_task(self) -> bool:
        """Tell whether the block, or one around it, was entered by another task or thread."""
        thread, task = _here()
        block: SessionTransaction | None = self
        while block is not None:
            if isinstance(block, Block) and block.entered_in is not None:
                in_thread, in_task = block.entered_in
                if thread != in_thread or in_task not in (None, task):
                    return True
            block = block.parent
        return False

    def has_committed(self) -> None:
        """Hand what is to be called on to the transaction around, or to the session."""
        self._is_committed = True
        on_commit, on_rollback = self.on_commit, self.on_rollback
        if not on_commit and not on_rollback:
            return
        self.on_commit = self.on_rollback = ()
        around = self.parent
        while around is not None and not isinstance(around, Block):
            around = around.parent  # that of a flush
        if around is None:
            self.session.to_call += on_commit
        else:
            around.on_commit += on_commit
            around.on_rollback += on_rollback

    def has_ended(self) -> None:
        """Note what is to be called: a listener may have registered it after COMMIT or ROLLBACK."""
        self.is_open = False
        if self._is_committed:
            self.has_committed()
        else:
            self.session.to_call += self.on_rollback
            self.on_commit = self.on_rollback = ()


class OptInSavepoint(Block):
    """A savepoint of a session."""


class OptInSessionTransaction(Block):
    """A session's transaction, which goes on with the connections the session has on loan."""

    options: TransactionOptions
    """What it begins with on each bind."""

    taken: tuple[OptInConnection, ...]
    """The connections it took out of autocommit."""

    begun_on: frozenset[Connection]
    """The connections of the binds that have joined."""

    has_stored: bool
    """Whether a bind has committed what was done in it."""

    def __init__(self, session: OptInSession, origin: SessionTransactionOrigin) -> None:
        self.options = DEFAULT
        self.has_stored = False
        self.taken = ()
        self.begun_on = frozenset()
        super().__init__(session, origin)

    def is_stored(self) -> bool:
        return self.has_stored and len(self.begun_on) == 1

    # private: flush() and execute() both come here for a connection, and no event comes before
    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        if not isinstance(bind, OptInEngine):
            if self.options is not DEFAULT:
                execution_options = join_options(self.options) | dict(execution_options or {})
            return super()._connection_for_bind(bind, execution_options)  # private: as above
        connection = self.session.borrow(bind)
        if connection in self.taken and self.is_active and not execution_options:
            return connection
        if connection.get_transaction() is not None:
            return super()._connection_for_bind(connection, execution_options)  # private: as above
        options = connection.transaction_options
        if self.options is not DEFAULT:
            connection.transaction_options = self.options.over(options)
        connection.note_options()
        connection.taken_by = self
        try:
            super()._connection_for_bind(connection, execution_options)  # private: as above
        except BaseException:
            connection.taken_by = None
            connection.put_options_back()
            raise
        finally:
            connection.transaction_options = options
        self.taken += (connection,)
        return connection


def check_callback(function: Any, taker: str) -> None:
    """Refuse what can't be called after the end of a transaction.

    :param function: The function.
    :param taker: What it was given to.
    :raises TypeError: if it can't be called, or what it does would come later.
    """
    if not callable(function):
        raise TypeError(
            f"{taker} takes a function without parameters, not {function!r}: write "
            f"{taker[:-1]}lambda: …), or functools.partial(…), for one that has some."
        )
    if runs_later(function):
        raise TypeError(
            f"{taker} takes a plain function, and {function!r} would not run when it is called: "
            "call one that hands it to what runs it, such as asyncio.run()."
        )


def runs_later(function: Any) -> bool:
    """Tell whether a call only makes what is to be awaited, or read, later."""
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )


def _here() -> tuple[int, object]:
    """Return what tells this thread and asyncio task from others; contexts are copied to them."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), task
