"""Which transactions are open, and which connections they have taken out of autocommit."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import TypeAlias
from weakref import ref

from sqlalchemy.engine import Connection, Transaction
from sqlalchemy.orm import SessionTransaction

OpenTransaction: TypeAlias = SessionTransaction | Transaction


class OpenTransactions:
    """The open transactions and their connections, all held by weak references.

    Thread-safe without a lock, because each change, and the copy, is one operation on one dict.
    """

    def __init__(self) -> None:
        self._joined: dict[ref[Connection], ref[OpenTransaction]] = {}

    def add(self, connection: Connection, transaction: OpenTransaction) -> None:
        """Note that a transaction has taken a connection out of autocommit."""
        self._joined[ref(connection, self._forget)] = ref(transaction)

    def discard(self, connection: Connection) -> None:
        """Note that a connection is back in autocommit. Nothing happens if it was not noted."""
        self._joined.pop(ref(connection), None)

    def _forget(self, gone: ref[Connection]) -> None:
        self._joined.pop(gone, None)

    def snapshot(self) -> dict[OpenTransaction, frozenset[Connection]]:
        """Return the transactions that are open now, with their connections."""
        found: dict[OpenTransaction, frozenset[Connection]] = {}
        for joined, session_transaction in self._joined.copy().items():
            connection, transaction = joined(), session_transaction()
            if connection is not None and transaction is not None:
                found[transaction] = found.get(transaction, frozenset()) | {connection}
        return found


class TransactionConnections(Mapping[OpenTransaction, frozenset[Connection]]):
    """A live, read-only view: each open transaction and the connections it took out of autocommit.

    The keys are ``SessionTransaction`` objects, and ``Transaction`` objects for transactions that
    were begun on an engine or a connection. The view is empty when no transaction is open. It may
    be read from any thread, sends nothing, and keeps neither a session nor a connection alive.

    :param transactions: The object that notes the transactions.
    """

    def __init__(self, transactions: OpenTransactions) -> None:
        self._transactions = transactions

    def __getitem__(self, transaction: OpenTransaction) -> frozenset[Connection]:
        return self._transactions.snapshot()[transaction]

    def __iter__(self) -> Iterator[OpenTransaction]:
        return iter(self._transactions.snapshot())

    def __len__(self) -> int:
        return len(self._transactions.snapshot())

    # The methods of Mapping would look up each key again, and a transaction may have ended since.
    def items(self) -> ItemsView[OpenTransaction, frozenset[Connection]]:
        """Return the transactions that are open now, with their connections."""
        return self._transactions.snapshot().items()

    def values(self) -> ValuesView[frozenset[Connection]]:
        """Return the connections of each transaction that is open now."""
        return self._transactions.snapshot().values()

    def __repr__(self) -> str:
        return f"<TransactionConnections {self._transactions.snapshot()!r}>"


open_transactions = OpenTransactions()
TRANSACTION_CONNECTIONS = TransactionConnections(open_transactions)
