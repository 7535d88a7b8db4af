"""The transactions and savepoints of a session: how they end, and where their callbacks go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from sqlalchemy import exc
from sqlalchemy.engine import Connection, TwoPhaseTransaction

from . import observing
from .callbacks import Callback, SessionThatCalls, after_end
from .connection import OptInConnection, is_aborted
from .engine import OptInEngine
from .errors import NOTHING_STORED, CommitOutcomeUnknown, see
from .flow import Flow, here
from .one_statement import is_one_statement
from .options import DEFAULT, TransactionOptions, join_options
from .places import Place
from .sqlalchemy_private import TransactionHooks

if TYPE_CHECKING:
    from typing_extensions import Self

OF_ANOTHER_TASK = (
    "The transaction of this session belongs to another thread or asyncio task: give each thread "
    "or task a session of its own, or don't let the task wait inside the block."
    + see("other-thread")
)
COMMIT_IN_BLOCK = (
    "commit() inside a `with …begin():` block: a block is stored at its end, as a whole, or not at "
    "all: leave commit() out. Use flush() to send pending changes. Code that has to commit several "
    "times calls commit() outside of a block. Nothing was committed." + see("commit-in-block")
)
COMMIT_IN_ATOMIC = (
    "What is inside atomic() is committed at its end, as a whole: leave commit() out. Use flush() "
    "to send pending changes. Nothing was committed." + see("commit-in-atomic")
)
CLOSED_INSIDE = (
    "The session was closed inside its `with …begin():` block, by close() or remove(): nothing of "
    "the block is stored. Leave the call out, or put it after the block. To undo a block, raise an "
    "exception in it, or call rollback()." + see("closed-in-block")
)


class SessionOfBlocks(SessionThatCalls, Protocol):
    """The part of a session that its transactions use. The object is also a ``Session``."""

    entered: Any
    begins_on_write: bool

    @property
    def is_inside(self) -> bool: ...
    def is_on_ours(self) -> bool: ...
    def transaction_ended(self, transaction: Any) -> None: ...
    def borrow(self, engine: OptInEngine) -> OptInConnection: ...
    def begin_implicitly(self) -> object: ...


class Block(TransactionHooks):
    """The base class of a session's transactions and savepoints, which controls how they end.

    SQLAlchemy makes the object, and this package changes its class afterwards. So an ``__init__()``
    of this class would not run, and the initial values of the attributes are in the class.
    """

    session: Any  # a SessionOfBlocks, until it is closed

    is_open: bool = True
    """Whether the transaction is not closed yet. A failed flush does not close it."""

    on_commit: Sequence[Callback] = ()
    """The functions to call after the outermost COMMIT, unless this block is rolled back."""

    on_rollback: Sequence[Callback] = ()
    """The functions to call after the outermost transaction, if this block was rolled back."""

    roll_back_only: str | None = None
    """Why the block can't be committed, for the error; ``""`` after ``set_rollback()``."""

    failure: BaseException | None = None
    """The error that prevents a commit. The application has caught the error."""

    begun_on: frozenset[Connection] = frozenset()
    """The connections that have joined the transaction, one for each bind."""

    is_last_flush: bool = False
    """Whether the next flush, or the current one, is the last of the transaction or savepoint."""

    refusal: str = COMMIT_IN_BLOCK
    """The text of the error for a ``commit()`` inside the ``with`` block."""

    atomic: int = 0
    """How many open :class:`.Atomic` blocks use this one. Unless 0, ``commit()`` is refused."""

    entered_in: Flow | None = None
    """The thread, asyncio task and greenlet that the ``with`` block belongs to."""

    is_committed: bool = False
    """Whether the transaction was committed, or the savepoint was released."""

    is_closed_inside: bool = False
    """Whether the session was closed inside the ``with`` block, and so something was lost."""

    notes: Any = None
    """The notes of an observer about this block, see :mod:`.observing`."""

    _entered = False
    _is_ending = False
    _around: Any = None

    def call_after_commit(self, function: Callback) -> None:
        """Call a function after the outermost COMMIT, unless this block is rolled back."""
        if not self.on_commit:
            self.on_commit = []
        cast("list[Callback]", self.on_commit).append(function)

    def call_after_rollback(self, function: Callback) -> None:
        """Call a function after the outermost transaction, if this block was rolled back."""
        if not self.on_rollback:
            self.on_rollback = []
        cast("list[Callback]", self.on_rollback).append(function)

    # Commit, rollback and close

    def commit(self, *args: Any, **kwargs: Any) -> None:
        session = self.session
        if not session.callbacks.ending:
            with after_end(session):
                self.commit(*args, **kwargs)
            return
        self.refuse_to_commit()
        if len(self.begun_on) > 1:
            self.look_before_commit()
        self.is_last_flush = True
        try:
            super().commit(*args, **kwargs)
        except BaseException as error:
            self.is_last_flush = False  # the transaction may go on
            if isinstance(error, CommitOutcomeUnknown) or self.is_stored_in_part_or_unknown():
                self.on_commit = self.on_rollback = ()
            elif self.is_stored():
                self.hand_over_callbacks()  # a listener failed after COMMIT
            raise

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        with after_end(self.session):
            super().rollback(*args, **kwargs)

    def close(self, invalidate: bool = False) -> None:
        session = self.session
        if not session.callbacks.ending:
            with after_end(session):
                self.close(invalidate)
            return
        try:
            super().close(invalidate)
        except BaseException:
            session.transaction_ended(self)  # after an error, SQLAlchemy calls no listener
            raise

    def refuse_to_commit(self) -> None:
        """Refuse a commit inside the block, and a commit of a block that can't be committed.

        :raises sqlalchemy.exc.InvalidRequestError: if the commit is inside the block.
        :raises sqlalchemy.exc.PendingRollbackError: if the block can only be rolled back.
        """
        is_inside = self.is_ended_inside() and not self.session.begins_on_write
        if self.atomic or (is_inside and self.session.is_on_ours()):
            raise exc.InvalidRequestError(self._refusal_inside())
        if self.roll_back_only is not None:
            raise exc.PendingRollbackError(
                self.roll_back_only
                or "set_rollback() has asked for a rollback: call rollback(), and not commit()."
                + see("set-rollback-then-commit")
            ) from self.failure

    def _refusal_inside(self) -> str:
        """Return the text of the error for a commit inside the block.

        The text comes from the innermost block that is atomic or has its own :attr:`refusal`.
        """
        entered = self.session.entered
        block: Any = entered if isinstance(entered, Block) else self
        while block is not None:
            if isinstance(block, Block):
                if block.atomic:
                    return COMMIT_IN_ATOMIC
                if block.refusal is not COMMIT_IN_BLOCK:
                    return block.refusal
            block = block.parent
        return COMMIT_IN_BLOCK

    def __enter__(self) -> Self:
        self._around = self.session.entered
        self._entered = True
        self.entered_in = here()
        return super().__enter__()

    def __exit__(self, type_: object, value: object, traceback: object) -> None:
        try:
            self._leave_block(type_, value, traceback)
        finally:
            if self._entered:  # an exception of a signal handler has come before
                self.leave(self.session)

    def _leave_block(self, type_: object, value: object, traceback: object) -> None:
        session = self.session
        failed: str | None = None
        failure = self.failure
        with after_end(session, only_log=type_ is not None):
            self._is_ending = True
            try:
                if type_ is None and self.is_closed_inside:
                    failed = CLOSED_INSIDE
                elif type_ is None and self.is_open:
                    failed = self.roll_back_only if self.is_active else NOTHING_STORED
                    if failed is not None and self.is_active:
                        self.rollback()
            finally:
                if self.is_open and not self.is_active:
                    # As rollback() does, restore what was changed after the failed flush.
                    self.restore_objects()
                try:
                    super().__exit__(type_, value, traceback)
                finally:
                    if self.is_open:  # a listener failed after COMMIT, and SQLAlchemy did not close
                        self.close()
                    self.leave(session)
            if failed:
                raise exc.PendingRollbackError(failed) from failure

    def note_closed_inside(self) -> None:
        """Note that the session is being closed inside this block and the enclosing blocks."""
        block: Any = self
        while isinstance(block, Block) and block.is_open:
            block.is_closed_inside = True
            block = block._around

    def is_ended_inside(self) -> bool:
        """Tell whether the ``with`` block was entered, and does not end at this moment."""
        return self._entered and not self._is_ending

    def leave(self, session: SessionOfBlocks) -> None:
        """Note that the block is left: the innermost block that is still entered becomes current.

        :param session: The session of the block.
        """
        self._entered = False
        around = session.entered
        while isinstance(around, Block) and not around._entered:
            around = around._around
        session.entered = around

    def refuse_other_task(self) -> None:
        """Refuse to begin a savepoint in a block that another thread or asyncio task has entered.

        :raises sqlalchemy.exc.InvalidRequestError: if another thread or task has entered this
            block or an enclosing block.
        """
        now = here()
        block: Any = self
        while block is not None:
            entered_in = block.entered_in if isinstance(block, Block) else None
            if entered_in is not None and not entered_in.includes(now):
                raise exc.InvalidRequestError(OF_ANOTHER_TASK)
            block = block.parent

    # The state of the transaction

    def before_first_commit(self) -> None:
        # commit() has checked this already. Since then a bind may have joined in the flush, or a
        # listener may have caught an error.
        is_prepared = self.parent is None and self.session.twophase
        if len(self.begun_on) > 1 and not is_prepared:
            self.look_before_commit()

    def look_before_commit(self) -> None:
        """Check each connection before the first COMMIT, or the first RELEASE SAVEPOINT.

        SQLAlchemy commits one bind after the other, in no fixed order. Once one bind is committed,
        it is too late to find out that another bind can't be committed.

        :raises sqlalchemy.exc.PendingRollbackError: if a statement failed on a connection.
        """
        for connection in self.begun_on:
            if isinstance(connection, OptInConnection):
                connection.refuse_if_aborted()
            elif is_aborted(connection):
                raise exc.PendingRollbackError(NOTHING_STORED)

    def is_stored(self) -> bool:
        """Tell whether everything that was done in the block is committed."""
        return False

    def is_stored_in_part_or_unknown(self) -> bool:
        """Tell whether only some binds are committed, or whether the outcome is unknown."""
        return False

    # Passing on the callbacks

    def hand_over_callbacks(self) -> None:
        """Pass the callbacks to the enclosing transaction, or to the session if it is outermost."""
        self.is_committed = True
        on_commit, on_rollback = self.on_commit, self.on_rollback
        if not on_commit and not on_rollback:
            return
        self.on_commit = self.on_rollback = ()
        around = self.parent
        while around is not None and not isinstance(around, Block):
            around = around.parent  # the subtransaction of a flush
        if around is None:
            self.session.callbacks.extend(on_commit)
        else:
            around.on_commit = [*around.on_commit, *on_commit]
            around.on_rollback = [*around.on_rollback, *on_rollback]

    def note_end(self) -> None:
        """Note the end, and pass on callbacks that a listener added after COMMIT or ROLLBACK.

        A transaction that is one statement may be stored although SQLAlchemy rolls it back, because
        the flush may fail after the statement.
        """
        self.is_open = False
        if self.is_committed:
            if self.on_commit or self.on_rollback:
                self.hand_over_callbacks()
        elif self.is_stored():
            self.hand_over_callbacks()
        else:
            self.session.callbacks.extend(self.on_rollback)
            self.on_commit = self.on_rollback = ()


class OptInSavepoint(Block):
    """A savepoint of a session."""


class OptInSessionTransaction(Block):
    """A session's transaction, which uses the connections that the session has on loan."""

    options: TransactionOptions = DEFAULT
    """The isolation level and flags that the transaction begins with on each bind."""

    joined: tuple[OptInConnection, ...] = ()
    """The connections that the transaction has taken out of autocommit."""

    stored_on: int = 0
    """The number of binds on which the transaction is committed."""

    alone: OptInConnection | None = None
    """The connection on which the last flush sends one statement, without BEGIN and COMMIT."""

    has_stood_alone: bool = False
    """Whether the server has executed the one statement, and so has stored the transaction."""

    is_outcome_unknown: bool = False
    """Whether COMMIT, or the one statement, was interrupted, and so may have been executed."""

    opened_at: Place | None = None
    """The line of the application that has opened the transaction, while something records."""

    begun_at: Place | None = None
    """The line of the application whose write has begun the transaction (``begin_on_write``)."""

    def look_before_commit(self) -> None:
        super().look_before_commit()
        for connection in self.joined:
            transaction = connection.root_transaction
            if transaction is not None and connection.is_lost():
                transaction.commit()  # this raises, before anything is stored

    def is_stored(self) -> bool:
        return 0 < self.stored_on == len(self.begun_on) + self.has_stood_alone

    def is_stored_in_part_or_unknown(self) -> bool:
        binds = len(self.begun_on) + self.has_stood_alone
        return self.is_outcome_unknown or 0 < self.stored_on < binds

    def note_outcome_unknown(self) -> None:
        """Note that the COMMIT of a bind, or the one statement, was interrupted."""
        self.is_outcome_unknown = True
        self.on_commit = self.on_rollback = ()

    def note_stored_alone(self) -> None:
        """Note that the one statement has stored the transaction, without BEGIN and COMMIT."""
        self.has_stood_alone = True
        self.stored_on += 1

    def has_ours(self) -> bool:
        """Tell whether a bind that :func:`.create_engine` has made has joined."""
        return self.alone is not None or any(map(self._is_opt_in, self.begun_on))

    def has_stock(self) -> bool:
        """Tell whether a bind that :func:`.create_engine` has not made has joined."""
        return not all(map(self._is_opt_in, self.begun_on))

    def has_done_nothing(self) -> bool:
        """Tell whether the transaction has neither sent a statement nor taken a callback."""
        return (
            not self.on_commit
            and not self.on_rollback
            and not self.has_stood_alone
            and not self.has_stock()
            and all(connection.has_sent_nothing() for connection in self.joined)
        )

    def _is_opt_in(self, connection: Connection) -> bool:
        return isinstance(connection, OptInConnection) and connection.owner is self.session

    def commit_connections(self) -> None:
        """Commit what was sent, and leave the session's pending changes unflushed.

        ``commit()`` of the session would flush the changes, and call listeners such as
        ``after_commit``.

        :raises Exception: the error of the database.
        """
        if len(self.begun_on) > 1:
            self.look_before_commit()
        begun = [found for one in self.joined if (found := one.root_transaction) is not None]
        for transaction in begun:
            if isinstance(transaction, TwoPhaseTransaction):
                transaction.prepare()
        try:
            for transaction in begun:
                transaction.commit()
        except BaseException as error:
            if isinstance(error, CommitOutcomeUnknown) or self.is_stored_in_part_or_unknown():
                self.on_commit = self.on_rollback = ()
            for transaction in begun:
                transaction.close()
            raise
        self.hand_over_callbacks()
        self.close()

    def _join_with(self, alone: OptInConnection) -> None:
        """Begin a transaction on the connection after all, because another bind joins."""
        if alone.is_standing_alone and not self.has_stood_alone:
            alone.join_instead()

    def _is_alone(self, connection: OptInConnection) -> bool:
        """Tell whether a connection sends the last flush as one statement, and prepare it if so."""
        if not self.is_active:
            return False
        if connection.is_standing_alone or not self.is_last_flush:
            return connection.is_standing_alone
        self.is_last_flush = False
        session = self.session
        if self.options is not DEFAULT or self.begun_on:
            return False
        if not is_one_statement(session, connection, session.flushed_alone):
            return False
        self.alone = connection
        connection.stand_alone(self)
        return True

    def provide_connection(self, bind: Any, execution_options: Any) -> Connection:
        if self.alone is not None and bind is not self.alone.engine:
            self._join_with(self.alone)
        if not isinstance(bind, OptInEngine):
            if (settings := self.session.local_settings) is not None:
                self.session.refuse_stock(bind, settings.values)
            if (observer := observing.observer) is not None and isinstance(bind, Connection):
                observer.runs_on_connection()
            if self.options.timeout is not None:
                raise exc.ArgumentError(
                    "The timeout of begin() is for engines of fictive_sqlalchemy.create_engine(), "
                    "and this bind is not such an engine: leave the timeout out. Nothing was sent."
                    + see("timeout-argument")
                )
            if self.options is not DEFAULT:
                execution_options = join_options(self.options) | dict(execution_options or {})
            return super().provide_connection(bind, execution_options)
        session = self.session
        if not self.joined and not session.is_inside:
            session.begin_implicitly()  # a flush, or a call that may send many statements
        connection: OptInConnection = session.borrow(bind)
        if connection in self.joined:
            if self.is_active:
                if execution_options and connection.has_sent_nothing():
                    connection.give_options(**execution_options)
                    execution_options = None
                if not execution_options:
                    return connection
        elif self._is_alone(connection):
            return connection
        if connection.root_transaction is not None:
            return super().provide_connection(connection, execution_options)
        joined_before = connection.session_transaction
        options = connection.transaction_options
        if self.options is not DEFAULT:
            connection.transaction_options = self.options.over(options)
        if joined_before is None:
            connection.note_options()
        connection.session_transaction = self
        try:
            super().provide_connection(connection, execution_options)
        except BaseException:
            connection.session_transaction = joined_before
            if joined_before is None:
                connection.put_options_back()
            # A listener to after_begin, or a signal handler, has raised this. SQLAlchemy may have
            # begun the connection's transaction, and would not end it.
            if (begun := connection.root_transaction) is not None:
                begun.rollback()
            raise
        finally:
            connection.transaction_options = options
        self.joined += (connection,)
        return connection


class FlushThatLeavesObjects(TransactionHooks):
    """The subtransaction of a flush or bulk call whose failure does not change any object.

    SQLAlchemy's own ``rollback()`` would roll back all objects of the session, pending ones
    included. The :class:`.WritingCall` closes the enclosing transaction, which sends ROLLBACK.
    """

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        self.close()
