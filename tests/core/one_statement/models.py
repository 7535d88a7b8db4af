"""Models that a flush stores with one statement, and models for which it sends more."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    column_property,
    mapped_column,
    relationship,
)


class Base(DeclarativeBase):
    pass


membership = sa.Table(
    "membership",
    Base.metadata,
    sa.Column("person_id", sa.ForeignKey("member.id"), primary_key=True),
    sa.Column("club_id", sa.ForeignKey("club.id"), primary_key=True),
)


class Club(Base):
    __tablename__ = "club"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    size: Mapped[int] = mapped_column(sa.CheckConstraint("size >= 0"), default=0)
    rooms: Mapped[list[Room]] = relationship(back_populates="club")
    keys: Mapped[list[Key]] = relationship(back_populates="club", cascade="all, delete-orphan")
    notes: DynamicMapped[Note] = relationship()
    members: Mapped[set[Member]] = relationship(secondary=membership, back_populates="clubs")


class Member(Base):
    __tablename__ = "member"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    clubs: Mapped[set[Club]] = relationship(secondary=membership, back_populates="members")


class Room(Base):
    __tablename__ = "room"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    club_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Club.id))
    club: Mapped[Club | None] = relationship(back_populates="rooms")


class Key(Base):
    """Deleted with the club that it is taken from."""

    __tablename__ = "key"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    club_id: Mapped[int] = mapped_column(sa.ForeignKey(Club.id))
    club: Mapped[Club | None] = relationship(back_populates="keys")


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    club_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Club.id))


class Animal(Base):
    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.Text)
    name: Mapped[str] = mapped_column(sa.Text)


class Dog(Animal):
    """Of two tables."""

    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.ForeignKey(Animal.id), primary_key=True)
    rank: Mapped[int] = mapped_column(sa.CheckConstraint("rank > 0"), default=1)


class Cat(Animal):
    """Of the table of its base."""

    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012


class Node(Base):
    __tablename__ = "node"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id"))
    favourite_id: Mapped[int | None] = mapped_column(sa.ForeignKey("node.id"))
    parent: Mapped[Node | None] = relationship(
        back_populates="children", remote_side=id, foreign_keys=parent_id
    )
    children: Mapped[list[Node]] = relationship(
        back_populates="parent", foreign_keys=parent_id, passive_updates=False
    )
    favourite: Mapped[Node | None] = relationship(
        remote_side=id, foreign_keys=favourite_id, post_update=True
    )


class Versioned(Base):
    """Its version is made by SQLAlchemy."""

    __tablename__ = "versioned"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class VersionedByServer(Base):
    __tablename__ = "versioned_by_server"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    version: Mapped[int] = mapped_column(
        sa.BigInteger,
        server_default=sa.text("txid_current()"),
        server_onupdate=sa.FetchedValue(),
    )
    __mapper_args__ = {  # noqa: RUF012
        "version_id_col": version,
        "version_id_generator": False,
    }


class ReadsBack(Base):
    """Reads what the server has made after each flush."""

    __tablename__ = "reads_back"
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    upper: Mapped[str] = mapped_column(sa.Text, sa.Computed("upper(name)", persisted=True))


class AsksForItsKey(Base):
    """Its key is read from the sequence before the INSERT."""

    __tablename__ = "asks_for_its_key"
    __table_args__ = {"implicit_returning": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.Integer, sa.Sequence("asked_for"), primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)


def _count(context: Any) -> int:
    return int(context.connection.scalar(sa.select(sa.func.count()).select_from(Club)))


class Counted(Base):
    """A default of it sends SQL."""

    __tablename__ = "counted"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    clubs: Mapped[int] = mapped_column(default=_count, onupdate=_count)


class WritesFirst(Base):
    """A default of it writes before the row is written."""

    __tablename__ = "writes_first"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    log_id: Mapped[int] = mapped_column(
        default=lambda context: context.connection.scalar(
            sa.insert(Club).values(name="by a default").returning(Club.id)
        )
    )


class Plain(Base):
    """Stored by one statement, with all that a column can have."""

    __tablename__ = "plain"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    upper: Mapped[str] = mapped_column(sa.Text, sa.Computed("upper(name)", persisted=True))
    made_at: Mapped[Any] = mapped_column(sa.DateTime, server_default=sa.func.now())
    changed_at: Mapped[Any | None] = mapped_column(sa.DateTime, onupdate=sa.func.now())
    number: Mapped[int] = mapped_column(default=lambda: 7)
    length: Mapped[int] = column_property(sa.func.length(name))


class PartOfView(Base):
    """Mapped to a part of a table, by another key than that has."""

    __table__ = sa.Table(
        "part",
        Base.metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, unique=True),
    )
    __mapper_args__ = {"primary_key": [__table__.c.name]}  # noqa: RUF012
