"""The tables of the bank, and what it looks up in them afterwards."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ACCOUNTS = 6
BALANCE = 50
COUNTERS = 3
LABELS = 40

#: The id of the transaction that has written a row. Rows of one transaction have the same, and rows
#: of two transactions never do.
_TRANSACTION = sa.text("pg_current_xact_id()::text")


class Base(DeclarativeBase):
    pass


class Account(Base):
    """An account, which the database does not let become negative."""

    __tablename__ = "account"
    __table_args__ = (sa.CheckConstraint("balance >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    """The ledger: a row for each transfer, written in the transaction that moves the money."""

    __tablename__ = "transfer"

    token: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]
    transaction: Mapped[str] = mapped_column(server_default=_TRANSACTION)


class Entry(Base):
    """One of the rows of something that is stored as a whole or not at all."""

    __tablename__ = "entry"

    token: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    transaction: Mapped[str] = mapped_column(server_default=_TRANSACTION)


class Counter(Base):
    """A number that single statements increase."""

    __tablename__ = "counter"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int]


class Label(Base):
    """A row that is found or created by its name."""

    __tablename__ = "label"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


def fill(engine: sa.Engine) -> None:
    """Make the tables anew, with the accounts and the counters."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    accounts: list[dict[str, Any]] = [
        {"id": number, "balance": BALANCE} for number in range(1, ACCOUNTS + 1)
    ]
    counters: list[dict[str, Any]] = [
        {"id": number, "count": 0} for number in range(1, COUNTERS + 1)
    ]
    with engine.begin() as connection:
        connection.execute(sa.insert(Account), accounts)
        connection.execute(sa.insert(Counter), counters)
