"""Which transactions are open, and which connections they took out of autocommit."""

from __future__ import annotations

import threading
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import TypeAlias
from weakref import WeakKeyDictionary, ref

from sqlalchemy.engine import Connection, Transaction
from sqlalchemy.orm import SessionTransaction

OpenTransaction: TypeAlias = SessionTransaction | Transaction


class OpenTransactions:
    """Where sessions and connections note their transactions. Thread-safe, and all weak."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: WeakKeyDictionary[OpenTransaction, list[ref[Connection]]]
        self._connections = WeakKeyDictionary()

    def add(self, transaction: OpenTransaction, connection: Connection) -> None:
        """Note that a transaction took a connection out of autocommit."""
        with self._lock:
            self._connections.setdefault(transaction, []).append(ref(connection))

    def discard(self, transaction: OpenTransaction) -> None:
        """Note that a transaction has ended; harmless if it was never noted."""
        with self._lock:
            self._connections.pop(transaction, None)

    def snapshot(self) -> dict[OpenTransaction, frozenset[Connection]]:
        """Return what is open now."""
        with self._lock:
            return {
                transaction: frozenset(found for one in connections if (found := one()) is not None)
                for transaction, connections in self._connections.items()
            }


class TransactionConnections(Mapping[OpenTransaction, frozenset[Connection]]):
    """A live, read-only view: each open transaction and the connections it took out of autocommit.

    The keys are ``SessionTransaction`` objects, and ``Transaction`` objects for what was begun on
    an engine or a connection. It is empty when nothing is open, may be read from any thread, sends
    nothing, and keeps neither a session nor a connection alive.

    :param transactions: Where the transactions are noted.
    """

    def __init__(self, transactions: OpenTransactions) -> None:
        self._transactions = transactions

    def __getitem__(self, transaction: OpenTransaction) -> frozenset[Connection]:
        return self._transactions.snapshot()[transaction]

    def __iter__(self) -> Iterator[OpenTransaction]:
        return iter(self._transactions.snapshot())

    def __len__(self) -> int:
        return len(self._transactions.snapshot())

    # Mapping's own would look each key up again, and a transaction may have ended since.
    def items(self) -> ItemsView[OpenTransaction, frozenset[Connection]]:
        """Return the transactions open now, with their connections."""
        return self._transactions.snapshot().items()

    def values(self) -> ValuesView[frozenset[Connection]]:
        """Return the connections of each transaction open now."""
        return self._transactions.snapshot().values()

    def __repr__(self) -> str:
        return f"<TransactionConnections {self._transactions.snapshot()!r}>"


open_transactions = OpenTransactions()
TRANSACTION_CONNECTIONS = TransactionConnections(open_transactions)
