"""What the database says of a round, compared with what the clients were told."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa

from tests.soak.records import Report
from tests.soak.tables import ACCOUNTS, BALANCE, Account, Counter, Entry, Label, Transfer

_IDLE_IN_TRANSACTION = sa.text(
    "SELECT pid, state, query FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid() AND state <> 'idle'"
)


def wait_until_idle(engine: sa.Engine, patience: float = 10.0) -> list[str]:
    """Wait until no server process is in a transaction.

    A server process whose connection was cut notices it when it next reads or writes.

    :param engine: An engine of SQLAlchemy's own, on the database without the proxy.
    :param patience: How many seconds to wait.
    :returns: The processes that are still in one.
    """
    deadline = time.monotonic() + patience
    while True:
        with engine.connect() as connection:
            busy = [str(tuple(row)) for row in connection.execute(_IDLE_IN_TRANSACTION)]
        if not busy or time.monotonic() > deadline:
            return [f"a server process is not idle: {one}" for one in busy]
        time.sleep(0.02)


def judge(engine: sa.Engine, report: Report) -> Iterator[str]:
    """Compare the database with what the clients were told.

    :param engine: An engine of SQLAlchemy's own, on the database without the proxy.
    :param report: What all processes were told.
    :returns: What is wrong, a sentence each.
    """
    with engine.connect() as connection:
        yield from _judge_money(connection)
        yield from _judge_records(connection, report)
        yield from _judge_transactions(connection)
        yield from _judge_counters(connection, report)
        yield from _judge_labels(connection, report)


def _judge_money(connection: sa.Connection) -> Iterator[str]:
    expected = dict.fromkeys(range(1, ACCOUNTS + 1), BALANCE)
    for transfer in connection.execute(sa.select(Transfer.__table__)):
        expected[transfer.source] -= transfer.amount
        expected[transfer.target] += transfer.amount
    rows = connection.execute(sa.select(Account.id, Account.balance))
    balances = {row.id: row.balance for row in rows}
    if balances != expected:
        yield f"the balances are {balances}, and by the ledger {expected}"
    if sum(balances.values()) != ACCOUNTS * BALANCE:
        yield f"there is {sum(balances.values())} in all instead of {ACCOUNTS * BALANCE}"


def _judge_records(connection: sa.Connection, report: Report) -> Iterator[str]:
    transfers = set(connection.scalars(sa.select(Transfer.token)))
    entries: defaultdict[str, int] = defaultdict(int)
    for token in connection.scalars(sa.select(Entry.token)):
        entries[token] += 1
    for record in report.records:
        wanted = record.parts or 1
        found = entries[record.token] if record.parts else int(record.token in transfers)
        said = f"{record.kind} {record.token} was answered with {record.outcome!r} ({record.error})"
        right = {"stored": {wanted}, "not stored": {0}, "unknown": {0, wanted}}
        if found not in right[record.outcome]:
            yield f"{said}, and {found} of {wanted} rows are there"
    known = {record.token for record in report.records}
    for token in (transfers | {token for token, count in entries.items() if count}) - known:
        yield f"{token} is there, and nobody knows of it"


def _judge_transactions(connection: sa.Connection) -> Iterator[str]:
    """Each transaction wrote the rows of one token, and each token was written by one."""
    of_token: defaultdict[str, set[str]] = defaultdict(set)
    of_transaction: defaultdict[str, set[str]] = defaultdict(set)
    for table in (Transfer, Entry):
        for token, transaction in connection.execute(sa.select(table.token, table.transaction)):
            token = token.removesuffix("/inner")
            of_token[token].add(transaction)
            of_transaction[transaction].add(token)
    for token, transactions in of_token.items():
        if len(transactions) > 1:
            yield f"{token} was written by several transactions: {sorted(transactions)}"
    for transaction, tokens in of_transaction.items():
        if len(tokens) > 1:
            yield f"one transaction, {transaction}, has written all of {sorted(tokens)}"


def _judge_counters(connection: sa.Connection, report: Report) -> Iterator[str]:
    for number, count in connection.execute(sa.select(Counter.id, Counter.count)):
        at_least = report.increased[number]
        at_most = at_least + report.maybe_increased[number]
        if not at_least <= count <= at_most:
            yield f"counter {number} is {count}, and not from {at_least} to {at_most}"


def _judge_labels(connection: sa.Connection, report: Report) -> Iterator[str]:
    names = set(connection.scalars(sa.select(Label.name)))
    for name in report.found - names:
        yield f"{name!r} was found or created, and is not there"
    for name, count in report.created.items():
        if count > 1:
            yield f"{name!r} was created {count} times, if one believes the answers"
    for name in names - report.maybe_created:
        if not report.created[name]:
            yield f"{name!r} is there, and nobody was told that it was created"
