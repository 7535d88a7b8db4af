"""How a write outside a transaction is stored: the one mechanism for all writes.

**A write outside begins a transaction, which ends with the call, or with commit(), rollback() or
close().** One of these three ends the transaction in sessions with ``begin_on_write=True``, and if
a stock bind has joined the transaction, because SQLAlchemy keeps the stock bind's transaction open
until then.

A :class:`WritingCall` surrounds each call of a session that may write. If the call flushes, or may
send several statements, it asks the session's transaction for a connection, which begins the
transaction. A statement that is certain to be the only one is sent on the connection at once, in
autocommit.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from enum import Enum
from types import TracebackType
from typing import Any

from sqlalchemy import exc
from sqlalchemy.orm.exc import FlushError

from .blocks import OptInSessionTransaction
from .callbacks import Callback, after_end
from .errors import see


class Kind(Enum):
    """The kind of a call, which decides how a transaction that the call begins will end."""

    COMMIT = "commit"
    """``commit()`` ends the transaction even with ``begin_on_write=True``. Objects expire."""

    FLUSH = "flush"
    """``flush()``: before COMMIT, changes that listeners have made meanwhile are flushed, too.
    Objects do not expire, because they are in use, and nobody has asked for a commit."""

    STATEMENT = "statement"
    """``execute()`` and similar calls, which write without objects. If changes are still pending,
    they are not flushed before COMMIT, and no listener of the session is called."""

    ALONE = "alone"
    """A bulk call, or ``store_alone()``: as STATEMENT, but a failure leaves all objects as they
    are, so that pending changes stay pending."""


class WritingCall(AbstractContextManager["WritingCall"]):
    """One call of a session, outside a transaction, that may write.

    Calls inside this call belong to it, such as the autoflush before an UPDATE.

    :param session: The session.
    :param kind: What kind of call it is.
    """

    __slots__ = (
        "_session",
        "deleted",
        "has_flushed",
        "kind",
        "on_commit",
        "on_rollback",
        "transaction",
    )

    def __init__(self, session: Any, kind: Kind) -> None:
        self._session = session
        self.kind = kind
        self.has_flushed = False
        """Whether a failure rolls back the objects of the session, as a failed flush does."""
        self.transaction: OptInSessionTransaction | None = None
        """The transaction that a write in this call has begun."""
        self.deleted: list[object] = []
        """The objects whose rows this call has deleted."""
        self.on_commit: list[Callback] = []
        """The functions to call after this call, unless it fails. If it begins a transaction, the
        transaction takes the functions over."""
        self.on_rollback: list[Callback] = []
        """The functions to call after this call, if it fails. If it begins a transaction, the
        transaction takes the functions over."""

    def __enter__(self) -> WritingCall:  # noqa: PYI034  # may return the enclosing one
        around: WritingCall | None = self._session.writing_call
        if around is not None:
            return around
        self._session.writing_call = self
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        session = self._session
        if session.writing_call is not self:
            return
        failed = type_ is not None
        is_over = session.current_transaction is None  # commit() has ended the transaction
        if is_over and not (session.callbacks or self.on_commit or self.on_rollback):
            session.writing_call = None
        else:
            with after_end(session, only_log=failed):
                try:
                    self._end(failed)
                finally:
                    session.writing_call = None
        if self.deleted and not failed and self.kind is not Kind.COMMIT and session.is_outside:
            # Already committed: a later rollback() must not revive these objects. SQLAlchemy's
            # commit() expunges deleted objects, too, but only with expire_on_commit.
            session.let_go(self.deleted)

    def note_begin(self, transaction: OptInSessionTransaction) -> None:
        """Note the transaction that a write in this call has begun."""
        self.transaction = transaction
        for function in self.on_commit:
            transaction.call_after_commit(function)
        for function in self.on_rollback:
            transaction.call_after_rollback(function)
        self.on_commit, self.on_rollback = [], []

    def _end(self, failed: bool) -> None:
        session = self._session
        session.callbacks.extend(self.on_rollback if failed else self.on_commit)
        transaction: OptInSessionTransaction | None = session.noted_transaction()
        if transaction is None:
            return  # commit() has ended the transaction
        if transaction is not self.transaction:
            if not failed and session.is_outside:
                transaction.close()  # it has only noted changes; all that was sent is committed
        elif not transaction.has_ours() and (transaction.has_stock() or transaction.is_active):
            session.leave_to_stock(transaction)
        elif self.kind is not Kind.COMMIT and (session.begins_on_write or transaction.has_stock()):
            if not failed and transaction.has_done_nothing():
                transaction.close()  # the flush found nothing to write
        elif failed:
            self._give_up(transaction)
        else:
            self._commit(transaction)

    def _commit(self, transaction: OptInSessionTransaction) -> None:
        session = self._session
        expire_on_commit = session.expire_on_commit
        session.expire_on_commit = False
        try:
            if self.kind is Kind.FLUSH or session.is_clean():
                transaction.commit()
            else:
                transaction.commit_connections()
        except BaseException:
            self._give_up(transaction)
            raise
        finally:
            session.expire_on_commit = expire_on_commit

    def _give_up(self, transaction: OptInSessionTransaction) -> None:
        if self.kind is not Kind.COMMIT and not self.has_flushed:
            transaction.close()  # sends ROLLBACK, and leaves the objects as they are
        else:
            _roll_back(transaction)


def flush_until_stored(session: Any, objects: Collection[object]) -> None:
    """Flush these objects alone, again and again while listeners change them, as ``commit()`` does.

    :param session: The session.
    :param objects: The objects. Listeners may add objects to the collection.
    :raises sqlalchemy.orm.exc.FlushError: if 100 flushes are not enough.
    """
    for _ in range(100):
        session.flush_only(objects)
        pending = session.new | session.dirty | session.deleted
        if not any(instance in pending for instance in objects):
            return
    raise FlushError(
        "store_alone() has flushed 100 times, and changes are still pending: does an after_flush() "
        "listener create new objects each time?" + see("flush-without-end")
    )


def _roll_back(transaction: OptInSessionTransaction) -> None:
    if not transaction.is_open:
        return
    try:
        transaction.rollback()
    except exc.InvalidRequestError:  # it is already committed: a listener failed after COMMIT
        transaction.close()
