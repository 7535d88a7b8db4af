"""Accounts and the transfers between them.

The rules of the bank are constraints of the database, so no code can break them.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from sqlalchemy import CheckConstraint, DateTime, ForeignKey, Numeric, Text, func
from sqlalchemy.orm import Mapped, mapped_column, relationship

from .database import Model, db

# Two digits for cents, and room for the sum of any two amounts that the app accepts.
Money = Numeric(14, 2)


class Account(Model):
    """An account, which can't be overdrawn, and which can't hold more than its ceiling."""

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("balance >= 0", name="account_not_overdrawn"),
        CheckConstraint("balance <= ceiling", name="account_below_ceiling"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(Text, unique=True)
    balance: Mapped[Decimal] = mapped_column(Money)
    ceiling: Mapped[Decimal] = mapped_column(Money, server_default="1000000")

    @classmethod
    def open(cls, owner: str, balance: Decimal) -> tuple[Account, bool]:
        """Return the owner's account, and whether this call has opened it.

        If many requests open the same account at once, one account is opened, and each request
        gets this account.
        """
        account, opened = cls.filter_by_or_create.with_created(
            owner=owner, defaults={"balance": balance}
        )
        return account, opened

    @classmethod
    def lock(cls, *ids: int) -> dict[int, Account]:
        """Return those accounts with these ids that exist, locked until the transaction ends.

        The accounts are always locked in the same order. Otherwise two transfers in opposite
        directions would wait for each other. What was read before the lock may be out of date,
        hence ``populate_existing()``.
        """
        locked = cls.query.filter(cls.id.in_(ids)).order_by(cls.id)
        return {account.id: account for account in locked.with_for_update().populate_existing()}

    def to_dict(self) -> dict[str, object]:
        """Return the account as the JSON routes show it."""
        return {"id": self.id, "owner": self.owner, "balance": self.balance}


class Transfer(Model):
    """Money that went from one account to another."""

    __tablename__ = "transfer"
    __table_args__ = (CheckConstraint("amount > 0", name="transfer_of_something"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    target_id: Mapped[int] = mapped_column(ForeignKey(Account.id), index=True)
    amount: Mapped[Decimal] = mapped_column(Money)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())

    source: Mapped[Account] = relationship(foreign_keys=[source_id])
    target: Mapped[Account] = relationship(foreign_keys=[target_id])

    def to_dict(self) -> dict[str, object]:
        """Return the transfer as the JSON routes show it."""
        return {
            "id": self.id,
            "source_id": self.source_id,
            "target_id": self.target_id,
            "amount": self.amount,
            "at": self.at.isoformat(),
        }


def create_tables() -> None:
    """Create the tables that are missing, and three accounts if there is none."""
    db.create_all()
    with db.session.begin():
        if Account.query.first() is None:
            db.session.add(Account(owner="Ada", balance=Decimal(1000)))
            db.session.add(Account(owner="Grace", balance=Decimal(500)))
            db.session.add(Account(owner="Piggy bank", balance=Decimal(80), ceiling=Decimal(100)))
