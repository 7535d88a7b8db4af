"""Transactions that only their owner may commit: a unit of work, a request or a task.

The owner commits its transaction at its end, as a whole. If other code committed before, a part
of the work would be stored even if the rest failed. This module works with SQLAlchemy's sessions
and with ``OptInSession``.
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
    """Lets only the owner commit a transaction, while this context manager is entered::

        with session.begin() as transaction, Owned(session, transaction, "…") as owned:
            session.flush()
            owned.check_not_aborted()

    Other code that calls ``commit()`` of the transaction gets an error. The owner leaves the
    context manager before it commits the transaction. Savepoints in the transaction may be
    released. If the transaction of one owner is a savepoint in the transaction of another owner,
    each of the two refuses a commit of its own transaction. Sends nothing.

    :param session: The session.
    :param transaction: Its transaction, or savepoint.
    :param refusal: The message of the error that other code gets. It may be changed later.
    """

    def __init__(self, session: Session, transaction: SessionTransaction, refusal: str) -> None:
        self.session = session
        self.transaction = transaction
        self.refusal = refusal
        self._stock_connections: list[Connection] = []

    @property
    def refusal(self) -> str:
        """The message of the error that other code gets if it commits the transaction."""
        return self._refusal

    @refusal.setter
    def refusal(self, refusal: str) -> None:
        self._refusal = refusal
        if isinstance(self.transaction, Block):  # a block refuses before listeners are called
            self.transaction.refusal = refusal

    def __enter__(self) -> Self:
        listen_to_sessions()
        around = _owners(self.session)
        if around:  # a savepoint uses connections of the outer transaction, without after_begin
            self._stock_connections += around[-1]._stock_connections
        self.session.info[_OWNERS] = (*around, self)
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop owning the transaction, so that any code may commit it. May be repeated."""
        rest = tuple(owned for owned in _owners(self.session) if owned is not self)
        if rest:
            self.session.info[_OWNERS] = rest
        else:
            self.session.info.pop(_OWNERS, None)

    def go_on_in(self, transaction: SessionTransaction) -> None:
        """Own another transaction in place of the one that has ended.

        :param transaction: The other transaction, which has just begun.
        """
        self.transaction = transaction
        self.refusal = self._refusal
        self._stock_connections.clear()

    def check_not_aborted(self) -> None:
        """Refuse to commit a transaction that PostgreSQL would silently roll back at COMMIT.

        An ``OptInConnection`` notices such a transaction at COMMIT. This method asks the
        connections of stock binds, and sends nothing:
        https://www.postgresql.org/docs/current/sql-commit.html

        :raises sqlalchemy.exc.PendingRollbackError: if a statement failed on a stock bind, and the
            error was caught.
        """
        if any(map(is_aborted, self._stock_connections)):
            raise exc.PendingRollbackError(NOTHING_STORED)

    def refuse_commit(self) -> None:
        """Refuse a commit of the transaction, which only its owner may commit.

        :raises sqlalchemy.exc.InvalidRequestError: unless the commit is that of a
            savepoint inside the transaction.
        """
        savepoint = self.session.get_nested_transaction()
        if savepoint is None or savepoint is self.transaction:
            raise exc.InvalidRequestError(self.refusal)

    def add_stock_connection(self, connection: Connection) -> None:
        """Note a connection of an engine of SQLAlchemy that has joined the transaction."""
        self._stock_connections.append(connection)


def _owners(session: Session) -> tuple[Owned, ...]:
    owners: tuple[Owned, ...] = session.info.get(_OWNERS, ())
    return owners


def _before_commit(session: Session) -> None:
    for owned in reversed(_owners(session)):
        owned.refuse_commit()


def _after_begin(session: Session, _: SessionTransaction, connection: Connection) -> None:
    if not isinstance(connection, OptInConnection):
        for owned in _owners(session):
            owned.add_stock_connection(connection)


def listen_to_sessions() -> None:
    """Listen to the events of all sessions, from the first owner on."""
    listen_once("before_commit", _before_commit)
    listen_once("after_begin", _after_begin)


def listen_once(name: str, listener: Callable[..., None]) -> None:
    """Add a listener to an event of all sessions, unless it was added before.

    Adding a listener to each session, and removing it, would take longer than a transaction.

    :param name: The name of the event.
    :param listener: The function that is called.
    """
    if not event.contains(Session, name, listener):
        event.listen(Session, name, listener)
