"""Models of each kind, and what the tests with them have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    composite,
    mapped_column,
    object_session,
    relationship,
    synonym,
)

from fictive_sqlalchemy import OptInSession

Ask = Callable[..., tuple[Any, bool]]
Rows = Callable[[str], list[Any]]


class Base(DeclarativeBase):
    pass


class Doc(Base):
    """Its table is in the schema of each tenant, too."""

    __tablename__ = "docs"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    note: Mapped[str | None]


class Audit(Base):
    __tablename__ = "audits"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]


class Assignee(Base):
    __tablename__ = "assignees"
    __table_args__ = (sa.UniqueConstraint("id", "tenant_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int]


class Ticket(Base):
    """Its relationship names a column that it does not set."""

    __tablename__ = "tickets"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "number"),
        sa.ForeignKeyConstraint(
            ["assignee_id", "tenant_id"], ["assignees.id", "assignees.tenant_id"]
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int]
    number: Mapped[int]
    assignee_id: Mapped[int | None]
    assignee: Mapped[Assignee | None] = relationship(
        primaryjoin="and_(Assignee.id == foreign(Ticket.assignee_id), "
        "Assignee.tenant_id == Ticket.tenant_id)"
    )


class Upper(sa.TypeDecorator[str]):
    """Stores None as a word, if it is asked."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str:
        return "NONE" if value is None else value.upper()


class Pair:
    def __init__(self, left: int | None, right: int | None) -> None:
        self.left, self.right = left, right

    def __composite_values__(self) -> tuple[int | None, int | None]:
        return self.left, self.right


class Slot(Base):
    """Columns that store None in other ways than NULL."""

    __tablename__ = "slots"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    nickname: Mapped[str | None]
    shown: Mapped[str | None] = mapped_column(
        default=lambda context: context.get_current_parameters()["nickname"]
    )
    python: Mapped[str | None] = mapped_column(default="default")
    server: Mapped[str | None] = mapped_column(server_default="default")
    unknown: Mapped[str | None]  # the table has a default for it
    json: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    jsonb: Mapped[Any] = mapped_column(JSONB, nullable=True)
    upper: Mapped[str | None] = mapped_column(Upper)
    left: Mapped[int | None] = mapped_column(default=7)
    right: Mapped[int | None] = mapped_column(default=7)
    pair: Mapped[Pair] = composite(left, right)
    other_python = synonym("python")


class Author(Base):
    """One whose relationships are of each kind."""

    __tablename__ = "writers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    mood: Mapped[str | None]
    count: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column()
    novels: Mapped[list[Novel]] = relationship(back_populates="author", cascade="all")
    essays: DynamicMapped[Essay] = relationship(back_populates="author", lazy="dynamic")
    poems: WriteOnlyMapped[Poem] = relationship(back_populates="author")
    portrait: Mapped[Portrait | None] = relationship(back_populates="author")
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Work:
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    author_id: Mapped[int | None] = mapped_column(ForeignKey("writers.id"))


class Novel(Work, Base):
    __tablename__ = "novels"

    author: Mapped[Author | None] = relationship(back_populates="novels")


class Essay(Work, Base):
    __tablename__ = "essays"

    author: Mapped[Author | None] = relationship(back_populates="essays")


class Poem(Work, Base):
    __tablename__ = "poems"

    author: Mapped[Author | None] = relationship(back_populates="poems")


class Portrait(Work, Base):
    __tablename__ = "portraits"

    size: Mapped[int | None] = mapped_column(sa.CheckConstraint("size > 0"))
    author: Mapped[Author | None] = relationship(back_populates="portrait")


label_notes = sa.Table(
    "label_notes",
    Base.metadata,
    sa.Column("label", ForeignKey("labels.name"), primary_key=True),
    sa.Column("note", ForeignKey("notes.key"), primary_key=True),
)


class Label(Base):
    __tablename__ = "labels"

    name: Mapped[str] = mapped_column(primary_key=True)
    color: Mapped[str | None]
    notes: Mapped[list[Note]] = relationship(back_populates="labels", secondary=label_notes)


class Note(Base):
    """Its constructor adds it to a session, and puts labels on it."""

    __tablename__ = "notes"

    key: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str | None] = mapped_column(unique=True)
    labels: Mapped[list[Label]] = relationship(back_populates="notes", secondary=label_notes)

    def __init__(self, key: str, label: Label | None = None, text: str | None = None) -> None:
        self.key, self.text = key, text
        if label is not None:
            self.labels = [label]
            session = object_session(label)
            assert session is not None
            session.add(self)


class Late(Base):
    """Its unique constraint is checked at COMMIT."""

    __tablename__ = "late_ones"
    __table_args__ = (sa.UniqueConstraint("code", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    code: Mapped[str | None]


DDL = """
CREATE SCHEMA acme;
CREATE TABLE acme.docs (LIKE public.docs INCLUDING ALL);
ALTER TABLE slots ALTER unknown SET DEFAULT 'default'
"""


@contextmanager
def listening(target: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    event.listen(target, name, function)
    try:
        yield
    finally:
        event.remove(target, name, function)


def anywhere(session: OptInSession, where: str) -> AbstractContextManager[Any]:
    return session.begin() if where == "inside" else nullcontext()


both = pytest.mark.parametrize("where", ["outside", "inside"])
