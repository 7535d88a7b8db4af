"""Models that store themselves, with each kind of attribute that a model can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    WriteOnlyMapped,
    column_property,
    composite,
    foreign,
    mapped_column,
    relationship,
    scoped_session,
    synonym,
    validates,
)

from fictive_sqlalchemy.active_record import ActiveRecordMixin

used: list[scoped_session[Any]] = []


def current() -> Session:
    """The session of the store under test."""
    return cast("Session", used[-1]())


class Base(ActiveRecordMixin, DeclarativeBase):
    __scoped_session__ = current


class Team(Base):
    __tablename__ = "team"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    city: Mapped[str | None] = mapped_column()
    players: Mapped[list[Player]] = relationship(
        back_populates="team",
        cascade="all",
        order_by="Player.id",
        foreign_keys="Player.team_id",
    )


@dataclass
class Point:
    x: int | None
    y: int | None


class Player(Base):
    """All that an attribute can be."""

    __tablename__ = "player"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    age: Mapped[int | None] = mapped_column(sa.CheckConstraint("age >= 0"))
    e_mail: Mapped[str | None] = mapped_column("email")
    _secret: Mapped[str | None] = mapped_column("secret")
    mood: Mapped[str | None]
    data: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSONB))
    tags: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    x: Mapped[int | None]
    y: Mapped[int | None]
    at: Mapped[Point] = composite("x", "y")
    team_id: Mapped[int | None] = mapped_column(ForeignKey(Team.id))
    home_id: Mapped[int | None] = mapped_column(ForeignKey(Team.id))
    ally_id: Mapped[int | None]
    number: Mapped[int] = mapped_column(sa.Identity())
    doubled: Mapped[int | None] = mapped_column(sa.Computed("age * 2", persisted=True))
    shout: Mapped[str] = column_property(sa.func.upper(name))
    login: Mapped[str] = synonym("name")
    key: Mapped[int] = synonym("id")
    club: Mapped[Team | None] = synonym("team")
    _z: Mapped[int | None] = mapped_column("z")
    above: Mapped[Point] = composite("x", "_z")
    home_at: Mapped[Point] = composite("home_id", "x")

    team: Mapped[Team | None] = relationship(back_populates="players", foreign_keys=team_id)
    ally: Mapped[Team | None] = relationship(primaryjoin=lambda: foreign(Player.ally_id) == Team.id)
    seen: Mapped[Team | None] = relationship(foreign_keys=team_id, viewonly=True)
    games: WriteOnlyMapped[Game] = relationship(passive_deletes="all")
    goals: Mapped[list[Goal]] = relationship(back_populates="player", order_by="Goal.id")
    minutes: AssociationProxy[list[int]] = association_proxy("goals", "minute")

    noted = "nothing"

    @validates("mood")
    def check_mood(self, key: str, mood: str | None) -> str | None:
        if mood in ("bad", "old"):
            raise ValueError(f"No {mood} mood here.")
        return mood

    @hybrid_property
    def secret(self) -> str | None:
        return self._secret

    @secret.inplace.setter
    def _set_secret(self, secret: str | None) -> None:
        self.noted = "a secret"
        self._secret = secret and secret[::-1]

    @hybrid_property
    def is_adult(self) -> bool:
        return (self.age or 0) >= 18

    @property
    def plain(self) -> str:
        return self.name

    @plain.setter
    def plain(self, value: str) -> None:
        self.name = value


class Game(Base):
    __tablename__ = "game"

    id: Mapped[int] = mapped_column(primary_key=True)
    player_id: Mapped[int] = mapped_column(ForeignKey(Player.id))


class Goal(Base):
    __tablename__ = "goal"

    id: Mapped[int] = mapped_column(primary_key=True)
    minute: Mapped[int]
    player_id: Mapped[int | None] = mapped_column(ForeignKey(Player.id))
    player: Mapped[Player | None] = relationship(back_populates="goals")


class Animal(Base):
    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]


class Dog(Animal):
    """Two tables."""

    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    legs: Mapped[int] = mapped_column(sa.CheckConstraint("legs > 0"))


class Cat(Animal):
    """One table with its base."""

    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012

    lives: Mapped[int | None]


class Shape(Base):
    """The discriminator is an expression of a column."""

    __tablename__ = "shape"

    id: Mapped[int] = mapped_column(primary_key=True)
    corners: Mapped[int] = mapped_column()
    name: Mapped[str | None]
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_on": sa.case((cast("Any", corners).column == 0, "round"), else_="shape"),
        "polymorphic_identity": "shape",
    }


class Round(Shape):
    __mapper_args__ = {"polymorphic_identity": "round"}  # noqa: RUF012


class Ball(Base):
    """The discriminator is an attribute that is an expression, and is given by its name."""

    __tablename__ = "ball"

    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column()
    colour: Mapped[str | None]
    kind: Mapped[str] = column_property(
        sa.case((cast("Any", size).column > 9, "big"), else_="ball")
    )
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "ball"}  # noqa: RUF012


class Big(Ball):
    __mapper_args__ = {"polymorphic_identity": "big"}  # noqa: RUF012


class Seat(Base):
    """Its constraint is checked at COMMIT."""

    __tablename__ = "seat"
    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


class Awkward(Base):
    """Columns that are called like what the mixin has."""

    __tablename__ = "awkward"

    id: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[str | None]
    only: Mapped[str | None]
    self: Mapped[str | None]
    query: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore
    save: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore
    delete: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore


class DataBase(ActiveRecordMixin, MappedAsDataclass, DeclarativeBase):
    __scoped_session__ = current


class Record(DataBase):
    __tablename__ = "record"

    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    title: Mapped[str]
    year: Mapped[int] = mapped_column(default=1999)
