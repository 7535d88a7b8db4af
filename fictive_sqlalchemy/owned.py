"""A transaction that its owner alone may commit: a unit of work, a request, a task.

Such an owner ends its transaction itself, as a whole. If somebody committed before, a part would
be stored although the rest fails. It works on the sessions of SQLAlchemy as well as on ours.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import event, exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction
from typing_extensions import Self

from ._core.blocks import Block
from ._core.connection import OptInConnection, is_aborted
from ._core.errors import NOTHING_STORED

_OWNERS = "fictive_sqlalchemy.owners"


class Owned:
    """While it is entered, ``commit()`` of its transaction is an error that the owner words::

        with session.begin() as transaction, Owned(session, transaction, "…") as owned:
            session.flush()
            owned.check_not_aborted()

    Leave it before the transaction is committed. Savepoints of others inside may be released.
    Where one owner's transaction is a savepoint in another's, each refuses for its own. Sends
    nothing.

    :param session: The session.
    :param transaction: Its transaction, or savepoint.
    :param refusal: What the error says to somebody else who commits it. May be changed.
    """

    def __init__(self, session: Session, transaction: SessionTransaction, refusal: str) -> None:
        self.session = session
        self.transaction = transaction
        self.refusal = refusal
        self._stock_connections: list[Connection] = []

    @property
    def refusal(self) -> str:
        """What the error says to somebody else who commits the transaction."""
        return self._refusal

    @refusal.setter
    def refusal(self, refusal: str) -> None:
        self._refusal = refusal
        if isinstance(self.transaction, Block):  # which refuses before SQLAlchemy's event comes
            self.transaction.refusal = refusal

    def __enter__(self) -> Self:
        listen_to_sessions()
        around = _owners(self.session)
        if around:  # a connection joins once, and the savepoint inside uses it as well
            self._stock_connections += around[-1]._stock_connections
        self.session.info[_OWNERS] = (*around, self)
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give the transaction up, which may be committed from here on. Harmless if it is left."""
        rest = tuple(owned for owned in _owners(self.session) if owned is not self)
        if rest:
            self.session.info[_OWNERS] = rest
        else:
            self.session.info.pop(_OWNERS, None)

    def go_on_in(self, transaction: SessionTransaction) -> None:
        """Own another transaction in place of the one that has ended.

        :param transaction: It, newly begun.
        """
        self.transaction = transaction
        self.refusal = self._refusal
        self._stock_connections.clear()

    def check_not_aborted(self) -> None:
        """Refuse to commit what PostgreSQL would roll back at COMMIT, without saying so.

        Our own connections find that out at COMMIT. SQLAlchemy's are asked here, which sends
        nothing: https://www.postgresql.org/docs/current/sql-commit.html

        :raises sqlalchemy.exc.PendingRollbackError: if a statement failed on a bind that is not
            ours, and the error was caught.
        """
        if any(map(is_aborted, self._stock_connections)):
            raise exc.PendingRollbackError(NOTHING_STORED)

    def _refuse_commit(self) -> None:
        savepoint = self.session.get_nested_transaction()
        if savepoint is None or savepoint is self.transaction:
            raise exc.InvalidRequestError(self.refusal)


def _owners(session: Session) -> tuple[Owned, ...]:
    owners: tuple[Owned, ...] = session.info.get(_OWNERS, ())
    return owners


def _before_commit(session: Session) -> None:
    for owned in reversed(_owners(session)):
        owned._refuse_commit()  # pyright: ignore[reportPrivateUsage]


def _after_begin(session: Session, _: SessionTransaction, connection: Connection) -> None:
    if not isinstance(connection, OptInConnection):
        for owned in _owners(session):
            owned._stock_connections.append(connection)  # pyright: ignore[reportPrivateUsage]


def listen_to_sessions() -> None:
    """Listen to all sessions, from when something is owned first."""
    listen_once("before_commit", _before_commit)
    listen_once("after_begin", _after_begin)


def listen_once(name: str, listener: Callable[..., None]) -> None:
    """Listen to an event of all sessions, unless this listener does so already.

    To listen on one session and to stop again takes longer than a transaction.

    :param name: The name of the event.
    :param listener: What is called.
    """
    if not event.contains(Session, name, listener):
        event.listen(Session, name, listener)
