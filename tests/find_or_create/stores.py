"""A ``Store`` is a database with tables of each kind, and the helpers that a test calls on it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import ForeignKey, event
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    composite,
    mapped_column,
    relationship,
    sessionmaker,
    synonym,
    validates,
)

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create, update_or_create

T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class UserColumns:
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    nick: Mapped[str | None] = mapped_column(unique=True)
    age: Mapped[int | None] = mapped_column(sa.CheckConstraint("age > 0"))


class User(UserColumns, Base):
    """One table, and nobody who listens."""

    __tablename__ = "users"

    @property
    def password(self) -> str:
        raise AttributeError("A password can only be set.")

    @password.setter
    def password(self, value: str) -> None:
        self.name = f"hash of {value}"


class Heard(UserColumns, Base):
    """The same with a listener."""

    __tablename__ = "heard"

    greeting: Mapped[str | None]


@event.listens_for(Heard, "before_insert")
def _greet(mapper: Any, connection: Any, target: Heard) -> None:
    target.greeting = f"Hello {target.email}"


class Person(Base):
    """The base of joined inheritance."""

    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    email: Mapped[str | None] = mapped_column(unique=True)
    name: Mapped[str | None]


class Employee(Person):
    __tablename__ = "employees"
    __mapper_args__ = {"polymorphic_identity": "employee"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    badge: Mapped[str] = mapped_column(unique=True)


class Vehicle(Base):
    """The base of single-table inheritance."""

    __tablename__ = "vehicles"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    plate: Mapped[str] = mapped_column(unique=True)


class Car(Vehicle):
    __mapper_args__ = {"polymorphic_identity": "car"}  # noqa: RUF012

    doors: Mapped[int | None]


class Defaults(Base):
    __tablename__ = "defaults"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    python: Mapped[str | None] = mapped_column(default="python")
    called: Mapped[str] = mapped_column(
        default=lambda context: f"for {context.get_current_parameters()['key']}"
    )
    expression: Mapped[int] = mapped_column(default=sa.select(sa.literal(40) + 2).scalar_subquery())
    server: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    computed: Mapped[str] = mapped_column(sa.Computed("key || '!'", persisted=True))
    document: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    large: Mapped[str] = mapped_column(server_default="large", deferred=True)
    loud: Mapped[str] = column_property(sa.func.upper(sa.column("key")))


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    mood: Mapped[str | None]
    books: Mapped[list[Book]] = relationship(
        back_populates="author", foreign_keys="Book.author_id", order_by="Book.title"
    )


class Book(Base):
    __tablename__ = "books"
    __table_args__ = (sa.UniqueConstraint("author_id", "title"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"))
    reviewer_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"))
    author: Mapped[Author | None] = relationship(back_populates="books", foreign_keys=author_id)
    reviewer: Mapped[Author | None] = relationship(foreign_keys=reviewer_id)
    any_author: Mapped[Author | None] = relationship(
        primaryjoin="or_(Author.id == Book.author_id, Author.id == Book.reviewer_id)", viewonly=True
    )
    tag_links: Mapped[list[Tagging]] = relationship(back_populates="book")
    tags: AssociationProxy[list[Tag]] = association_proxy(
        "tag_links", "tag", creator=lambda tag: Tagging(tag=tag)
    )


class Tag(Base):
    __tablename__ = "tags"

    name: Mapped[str] = mapped_column(primary_key=True)


class Tagging(Base):
    __tablename__ = "taggings"

    book_id: Mapped[int] = mapped_column(ForeignKey("books.id"), primary_key=True)
    tag_name: Mapped[str] = mapped_column(ForeignKey("tags.name"), primary_key=True)
    book: Mapped[Book] = relationship(back_populates="tag_links")
    tag: Mapped[Tag] = relationship()


class Chapter(Base):
    """A primary key of two columns, one of which refers to another row."""

    __tablename__ = "chapters"

    book_id: Mapped[int] = mapped_column(ForeignKey("books.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    book: Mapped[Book] = relationship()


@dataclass(frozen=True)
class Point:
    x: int
    y: int


class Place(Base):
    """Attributes that are more than a column."""

    __tablename__ = "places"
    __table_args__ = (sa.UniqueConstraint("x", "y"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    point: Mapped[Point] = composite(mapped_column("x"), mapped_column("y"))
    label: Mapped[str | None] = mapped_column("the_label")
    called = synonym("label")
    facts: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(sa.JSON))

    @hybrid_property
    def lower(self) -> str | None:
        return self.label and self.label.lower()

    @lower.inplace.setter
    def _set_lower(self, value: str | None) -> None:
        self.label = value

    @lower.inplace.expression
    @classmethod
    def _lower(cls) -> sa.ColumnElement[str]:
        return sa.func.lower(cls.label)


class Careful(Base):
    """A constructor and a validator of its own."""

    __tablename__ = "careful"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    secret: Mapped[str]
    author_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"))
    author_name: Mapped[str | None]
    author: Mapped[Author | None] = relationship()

    def __init__(self, email: str, word: str, author: Author | None = None) -> None:
        self.email = email
        self.secret = f"hash of {word}"
        self.author = author

    @validates("email")
    def _check(self, key: str, value: str) -> str:
        if "@" not in value:
            raise ValueError(f"{value} is no address")
        return value

    @validates("author")
    def _copy(self, key: str, value: Author | None) -> Author | None:
        self.author_name = f"{value.name}, {value.mood}" if value else None
        return value


class Cat(Base):
    __tablename__ = "cats"

    name: Mapped[str] = mapped_column(primary_key=True)
    voice: Mapped[str]

    def __init__(self, **values: Any) -> None:
        self.voice = values.pop("sound").lower()
        super().__init__(**values)


class Counted(Base):
    __tablename__ = "counted"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    note: Mapped[str | None]
    other: Mapped[str | None]
    number: Mapped[int | None]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012


class Parent(Base):
    """Its constructor makes another object."""

    __tablename__ = "parents"

    key: Mapped[str] = mapped_column(primary_key=True)
    children: Mapped[list[Child]] = relationship(back_populates="parent")

    def __init__(self, key: str) -> None:
        self.key = key
        self.children = [Child(name="first")]


class Child(Base):
    __tablename__ = "children"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    parent_key: Mapped[str] = mapped_column(ForeignKey("parents.key"))
    parent: Mapped[Parent] = relationship(back_populates="children")


class Patient(MappedAsDataclass, Base):
    """A dataclass whose foreign key only the relationship sets."""

    __tablename__ = "patients"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    doctor_id: Mapped[int | None] = mapped_column(ForeignKey("authors.id"), init=False)
    name: Mapped[str] = mapped_column(unique=True)
    doctor: Mapped[Author | None] = relationship(default=None)
    ward: Mapped[str] = mapped_column(default="general")


class CaseBlind(Base):
    """Its unique index is on an expression."""

    __tablename__ = "case_blind"
    __table_args__ = (sa.Index("case_blind_email", sa.text("lower(email)"), unique=True),)

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    name: Mapped[str | None]


class Late(Base):
    """Its unique constraint is checked at COMMIT only."""

    __tablename__ = "late"
    __table_args__ = (sa.UniqueConstraint("key", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]


class Store:
    """A database with the tables, a session, and what a test asks of them."""

    def __init__(
        self, engine: sa.Engine, session_class: type[Session] = OptInSession, url: str = ""
    ) -> None:
        self.engine = engine
        self.url = url
        self.maker = sessionmaker(engine, class_=session_class)
        self.session = self.maker()

    def ask(
        self,
        model: type[T],
        defaults: dict[str, Any] | None = None,
        session: Session | None = None,
        **filters: Any,
    ) -> tuple[T, bool]:
        return filter_by_or_create(session or self.session, model, filters, defaults or {})

    def put(
        self,
        model: type[T],
        defaults: dict[str, Any] | None = None,
        create_defaults: dict[str, Any] | None = None,
        session: Session | None = None,
        **filters: Any,
    ) -> tuple[T, bool]:
        return update_or_create(
            session or self.session, model, filters, defaults or {}, create_defaults
        )

    def stored(self, model: type[Any], *columns: str) -> list[Any]:
        """What the database has, by the eyes of another."""
        attributes = [getattr(model, name) for name in columns]
        engine = sa.create_engine(self.url)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(*attributes).order_by(attributes[0])).all()
        engine.dispose()
        return [row[0] if len(columns) == 1 else tuple(row) for row in rows]


def sqlstate(error: BaseException) -> str:
    orig = getattr(error, "orig", None)
    return str(getattr(orig, "sqlstate", None) or getattr(orig, "pgcode", None))


def chain(error: BaseException) -> list[BaseException]:
    """An error and all that its traceback would print before it."""
    errors = [error]
    while error.__cause__ or (error.__context__ and not error.__suppress_context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
        errors.append(error)
    return errors
