"""The mapped classes of the state machine, and the schemas of their tables."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Item(Base):
    """Rows that can break two rules: a name is unique, and an amount is not negative."""

    __tablename__ = "item"
    __table_args__ = (sa.CheckConstraint("amount >= 0"),)
    # A row that someone else has deleted before is no error, and no warning either.
    __mapper_args__ = {"confirm_deleted_rows": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    amount: Mapped[int]


class SecondBase(DeclarativeBase):
    pass


class Extra(SecondBase):
    """Rows on a second bind, which break no rule, and which no statement but a flush writes."""

    __tablename__ = "extra"
    __mapper_args__ = {"confirm_deleted_rows": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    amount: Mapped[int]


#: The schemas of two tenants, whose tables are the same.
SCHEMAS = ("public", "acme")

TABLE: Any = Item.__table__
COLUMNS = (TABLE.c.id, TABLE.c.name, TABLE.c.amount)
