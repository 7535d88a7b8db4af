"""One row for one key, however many ask for it, and what it costs on the wire."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined,misc,valid-type"

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model as FlaskModel
from sqlalchemy import ForeignKey, event, exc
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    Session,
    column_property,
    composite,
    declarative_base,
    mapped_column,
    relationship,
    sessionmaker,
    synonym,
    validates,
)
from sqlalchemy.orm.exc import UnmappedClassError
from typing_extensions import assert_type

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin
from fictive_sqlalchemy.ext.flask.filter_by_or_create import (
    FilterByOrCreate,
    FilterByOrCreateProperty,
)
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.wire import Message, WireProxy

T = TypeVar("T")


# -- the models --------------------------------------------------------------------------------


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


STORED = ("BEGIN", "INSERT", "COMMIT")


# -- the tools ---------------------------------------------------------------------------------


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

    def stored(self, model: type[Any], *columns: str) -> list[Any]:
        """What the database has, by the eyes of another."""
        attributes = [getattr(model, name) for name in columns]
        engine = sa.create_engine(self.url)
        with engine.connect() as connection:
            rows = connection.execute(sa.select(*attributes).order_by(attributes[0])).all()
        engine.dispose()
        return [row[0] if len(columns) == 1 else tuple(row) for row in rows]


@pytest.fixture(scope="module")
def ddl(driver: str) -> str:
    """What makes the tables, in one go: most tests need them, and each has an empty database."""
    statements: list[str] = []

    def note(statement: Any, *args: Any, **kwargs: Any) -> None:
        statements.append(str(statement.compile(dialect=engine.dialect)))

    engine = sa.create_mock_engine(f"postgresql+{driver}://", note)
    Base.metadata.create_all(engine, checkfirst=False)
    return ";".join(statements)


@pytest.fixture
def tables(url: str, ddl: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(ddl)
    engine.dispose()


@pytest.fixture
def make_store(url: str, wire_url: str, tables: None) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(
        via: str = wire_url,
        create: Callable[..., sa.Engine] = create_engine,
        session_class: type[Session] = OptInSession,
        **options: Any,
    ) -> Store:
        store = Store(create(via, **options), session_class, url)
        stores.append(store)
        store.engine.connect().close()  # SQLAlchemy asks for the version and more at first
        return store

    yield make
    for store in stores:
        store.session.close()
        store.engine.dispose()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


@pytest.fixture
def another(make_store: Callable[..., Store], url: str) -> Store:
    """Somebody else, who is not recorded."""
    return make_store(url)


@pytest.fixture
def just_before_insert(wire: WireProxy) -> Callable[[Callable[[], Any]], None]:
    """Lets somebody else be faster, once: just before the next INSERT reaches the server."""

    def arrange(act: Callable[[], Any]) -> None:
        def look(message: Message) -> None:
            if message.is_statement and message.verb == "INSERT":
                wire.before_forward = None
                act()

        wire.before_forward = look

    return arrange


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


# -- what goes over the wire -------------------------------------------------------------------


def test_found_is_one_round_trip(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    store.session.expunge_all()
    with wire.record() as outside:
        found, created = store.ask(User, {"name": "Bob"}, email="ada@x")
    assert (found.id, found.name, created) == (ada.id, "Ada", False)
    assert outside.verbs == ["SELECT"]
    assert outside.round_trips == 1
    with wire.record() as inside, store.session.begin():
        assert store.ask(User, email="ada@x") == (found, False)
    assert inside.verbs == ["BEGIN", "SELECT", "COMMIT"]


def test_created_outside_is_a_transaction_of_its_own_and_the_object_is_loaded(
    store: Store, wire: WireProxy
) -> None:
    with wire.record() as recording:
        ada, created = store.ask(User, {"name": "Ada"}, email="ada@x")
        assert (ada.email, ada.name, ada.nick, ada.age) == ("ada@x", "Ada", None, None)
        assert isinstance(ada.id, int)
    assert created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert recording.round_trips == 4
    assert ada in store.session
    assert sa.inspect(ada).persistent
    assert store.session.get(User, ada.id) is ada
    assert store.stored(User, "email", "name") == [("ada@x", "Ada")]


def test_created_outside_with_a_listener_is_the_same(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording:
        ada, created = store.ask(Heard, {"name": "Ada"}, email="ada@x")
        assert (ada.email, ada.name, ada.greeting) == ("ada@x", "Ada", "Hello ada@x")
    assert created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert recording.round_trips == 4
    assert ada in store.session
    assert sa.inspect(ada).persistent
    assert store.stored(Heard, "greeting") == ["Hello ada@x"]


@pytest.mark.parametrize("model", [User, Heard])
def test_created_inside_is_part_of_the_transaction(
    store: Store, wire: WireProxy, model: type[User]
) -> None:
    with wire.record() as recording, store.session.begin():
        ada, created = store.ask(model, {"name": "Ada"}, email="ada@x")
        assert created
        assert store.ask(model, email="ada@x") == (ada, False)
        assert store.stored(model, "email") == []
    verbs = ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE", "SELECT", "COMMIT"]
    assert recording.verbs == verbs
    assert recording.round_trips == len(verbs)
    assert store.stored(model, "email") == ["ada@x"]


@pytest.mark.parametrize("model", [User, Heard])
def test_created_inside_goes_with_the_transaction(store: Store, model: type[User]) -> None:
    with store.session.begin() as transaction:
        ada, _ = store.ask(model, {"name": "Ada"}, email="ada@x")
        transaction.rollback()
    assert sa.inspect(ada).transient
    assert store.stored(model, "email") == []
    with store.session.begin():
        assert store.ask(model, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(model, "email") == ["ada@x"]


def test_an_object_created_outside_stays_after_a_rollback(store: Store) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    heard, _ = store.ask(Heard, {"name": "Ada"}, email="ada@x")
    store.session.rollback()
    assert (ada.name, heard.name) == ("Ada", "Ada")


def test_a_created_object_is_changed_and_deleted_like_any_other(store: Store) -> None:
    models: list[type[User | Heard]] = [User, Heard]
    for model in models:
        ada, _ = store.ask(model, {"name": "Ada"}, email="ada@x")
        with store.session.begin():
            ada.name = "Ada L."
        assert store.stored(model, "name") == ["Ada L."]
        with store.session.begin():
            store.session.delete(ada)
        assert store.stored(model, "name") == []


@pytest.mark.parametrize("model", [User, Heard])
def test_everything_else_goes_on_waiting_outside(
    store: Store, wire: WireProxy, model: type[User]
) -> None:
    session = store.session
    old, _ = store.ask(User, {"name": "Old"}, email="old@x")
    gone, _ = store.ask(User, {"name": "Gone"}, email="gone@x")
    old.name = "New"
    session.delete(gone)
    waiting = User(email="waiting@x", name="W")
    session.add(waiting)
    with wire.record() as recording:
        ada, created = store.ask(model, {"name": "Ada"}, email="ada@x")
    assert created
    assert recording.verbs.count("INSERT") == 1
    assert not {"UPDATE", "DELETE"} & set(recording.verbs)
    assert (set(session.new), set(session.dirty), set(session.deleted)) == (
        {waiting},
        {old},
        {gone},
    )
    assert ("waiting@x", "W") not in store.stored(User, "email", "name")
    session.rollback()
    assert old.name == "Old"
    assert gone in session
    assert waiting not in session
    assert ada in session


def test_joined_inheritance_is_an_insert_for_each_table(store: Store, wire: WireProxy) -> None:
    with wire.record() as outside:
        eve, created = store.ask(Employee, {"badge": "7"}, email="eve@x")
        assert (eve.kind, eve.email, eve.badge, created) == ("employee", "eve@x", "7", True)
    assert outside.verbs == ["SELECT", "BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert store.ask(Employee, badge="7", email="eve@x") == (eve, False)
    assert store.ask(Person, email="eve@x") == (eve, False)
    with wire.record() as base:
        pat, created = store.ask(Person, {"name": "Pat"}, email="pat@x")
    assert (type(pat), pat.kind, created) == (Person, "person", True)
    assert base.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    with store.session.begin():
        assert store.ask(Employee, {"email": "kim@x"}, badge="8")[1]
    assert store.stored(Employee, "email", "badge") == [("eve@x", "7"), ("kim@x", "8")]


def test_single_table_inheritance_is_one_insert(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording:
        car, created = store.ask(Car, {"doors": 5}, plate="A 1")
        assert (type(car), car.kind, car.doors, created) == (Car, "car", 5, True)
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert store.ask(Vehicle, plate="A 1") == (car, False)
    assert store.ask(Car, plate="A 1") == (car, False)
    store.ask(Vehicle, plate="A 2")
    with pytest.raises(exc.IntegrityError):  # it is taken, but by no car
        store.ask(Car, plate="A 2")


def test_composite_keys(store: Store, wire: WireProxy) -> None:
    book, _ = store.ask(Book, title="On keys")
    with wire.record() as recording:
        one, created = store.ask(Chapter, {"title": "One"}, book_id=book.id, number=1)
    assert created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert store.session.get(Chapter, (book.id, 1)) is one
    two, created = store.ask(Chapter, book=book, number=2)
    assert (two.book_id, two.number, two.book, created) == (book.id, 2, book, True)
    with store.session.begin():
        three, created = store.ask(Chapter, book=book, number=3)
        assert created
        assert store.ask(Chapter, book_id=book.id, number=1) == (one, False)
    assert (three.book_id, three.number) == (book.id, 3)


# -- at the same time --------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [User, Heard, Employee, CaseBlind])
def test_32_threads_on_5_connections_create_one_row(
    make_store: Callable[..., Store], url: str, model: type[Any], where: str, level: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    threads, keys = 32, ["a@x", "b@x", "c@x"]
    together = threading.Barrier(threads)

    def ask(session: Session, key: str) -> tuple[int, bool]:
        defaults = {"badge": key} if model is Employee else {"name": "Ada"}
        instance, created = store.ask(model, defaults, session, email=key)
        return instance.id, created

    def ask_inside(session: Session, key: str, mark: str) -> tuple[int, bool]:
        while True:
            try:
                with session.begin():
                    session.add(Tag(name=mark))
                    return ask(session, key)
            except exc.DBAPIError as error:
                if level == "READ COMMITTED" or sqlstate(error) != "40001":
                    raise

    def work(number: int) -> list[tuple[int, bool]]:
        answers: list[tuple[int, bool]] = []
        with store.maker() as session:
            for key in keys:
                together.wait()
                if where == "outside":
                    answers.append(ask(session, key))
                else:
                    answers.append(ask_inside(session, key, f"{number} {key}"))
        return answers

    with ThreadPoolExecutor(threads) as executor:
        answers = list(executor.map(work, range(threads)))
    for of_one_key in zip(*answers, strict=True):
        assert len({identity for identity, _ in of_one_key}) == 1
        assert sum(created for _, created in of_one_key) == 1
    assert store.stored(model, "email") == keys
    # No transaction was lost on the way.
    assert len(store.stored(Tag, "name")) == (threads * len(keys) if where == "inside" else 0)


@pytest.mark.parametrize("model", [User, Heard])
def test_the_loser_of_a_race_outside_gets_what_the_winner_created(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[User],
) -> None:
    just_before_insert(lambda: another.ask(model, {"name": "Winner"}, email="ada@x"))
    with wire.record() as recording:
        ada, created = store.ask(model, {"name": "Loser"}, email="ada@x")
    assert (ada.name, created) == ("Winner", False)
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "ROLLBACK", "SELECT"]
    assert list(store.session) == [ada]


@pytest.mark.parametrize("model", [User, Heard])
def test_the_loser_of_a_race_inside_keeps_its_transaction(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[User],
) -> None:
    with wire.record() as recording, store.session.begin():
        before = User(email="before@x", name="B")
        store.session.add(before)
        store.session.flush()
        just_before_insert(lambda: another.ask(model, {"name": "Winner"}, email="ada@x"))
        ada, created = store.ask(model, {"name": "Loser"}, email="ada@x")
        assert (ada.name, created) == ("Winner", False)
        ada.nick = "a"
    assert recording.verbs == [
        *["BEGIN", "INSERT"],
        *["SELECT", "SAVEPOINT", "INSERT", "ROLLBACK TO", "SELECT"],
        *["UPDATE", "COMMIT"],
    ]
    assert ("before@x", None) in store.stored(User, "email", "nick")
    assert ("ada@x", "a") in store.stored(model, "email", "nick")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize(
    ("model", "filters", "defaults"),
    [
        (User, {"email": "ada@x"}, {"name": "Ada"}),
        (Heard, {"email": "ada@x"}, {"name": "Ada"}),
        (CaseBlind, {"email": "ada@x"}, {}),
        (Person, {"email": "ada@x"}, {}),
        (Employee, {"email": "ada@x"}, {"badge": "7"}),
        (Employee, {"badge": "7"}, {"email": "ada@x"}),
        (Employee, {"badge": "7"}, {}),
    ],
)
def test_a_row_that_the_snapshot_does_not_show_is_a_failure_to_retry(
    store: Store,
    another: Store,
    level: str,
    model: type[Any],
    filters: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    assert isinstance(store.session, OptInSession)
    with store.session.begin(isolation_level=level) as transaction:
        store.session.execute(sa.select(User))  # the snapshot
        another.ask(model, defaults, **filters)
        with pytest.raises(exc.DBAPIError) as raised:
            store.ask(model, defaults, **filters)
        transaction.rollback()
    assert sqlstate(raised.value) == "40001"
    assert chain(raised.value) == [raised.value, raised.value.orig]
    with store.session.begin(isolation_level=level):
        assert not store.ask(model, defaults, **filters)[1]


def test_a_row_that_vanished_again_is_no_failure_to_retry(
    store: Store, another: Store, just_before_insert: Callable[..., None]
) -> None:
    def create_and_delete_later() -> None:
        ada, _ = another.ask(Heard, {"name": "Ada"}, email="ada@x")

        def delete() -> None:
            with another.session.begin():
                another.session.delete(ada)

        just_before_rollback.append(delete)

    just_before_rollback: list[Callable[[], None]] = []

    @event.listens_for(store.engine, "rollback_savepoint")
    def _(connection: Any, name: str, context: Any) -> None:
        while just_before_rollback:
            just_before_rollback.pop()()

    just_before_insert(create_and_delete_later)
    with store.session.begin():
        with pytest.raises(exc.IntegrityError):
            store.ask(Heard, {"name": "Ada"}, email="ada@x")
        assert store.ask(Heard, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(Heard, "email") == ["ada@x"]


@pytest.mark.parametrize("model", [Late, User])
def test_a_constraint_that_is_checked_at_commit_decides_races_too(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[Any],
) -> None:
    filters: dict[str, Any] = {"key": "k"} if model is Late else {"email": "ada@x", "name": "Ada"}
    if model is User:  # of which the model knows nothing
        with another.engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE users DROP CONSTRAINT users_email_key"))
            connection.execute(
                sa.text("ALTER TABLE users ADD UNIQUE (email) DEFERRABLE INITIALLY DEFERRED")
            )
    just_before_insert(lambda: another.ask(model, **filters))
    one, created = store.ask(model, **filters)
    assert not created
    assert store.stored(model, "id") == [one.id]
    with wire.record() as recording:
        two, created = store.ask(model, **{**filters, next(iter(filters)): "other"})
    assert created
    if model is Late:
        assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert store.stored(model, "id") == [one.id, two.id]


# -- other errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defaults", "code"),
    [
        ({}, "23502"),
        ({"name": "Ada", "nick": "taken"}, "23505"),
        ({"name": "Ada", "age": -1}, "23514"),
        ({"name": "Ada", "age": 2**31}, "22003"),
    ],
    ids=["not null", "another unique column", "check", "out of range"],
)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [User, Heard])
def test_an_error_that_is_no_race_reaches_the_caller_once(
    make_store: Callable[..., Store],
    model: type[User],
    where: str,
    level: str,
    defaults: dict[str, Any],
    code: str,
) -> None:
    store = make_store(isolation_level=level)
    other, _ = store.ask(model, {"name": "Other", "nick": "taken"}, email="other@x")
    with store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(exc.DBAPIError) as raised:
            store.ask(model, defaults, email="ada@x")
        assert sqlstate(raised.value) == code
        assert chain(raised.value) == [raised.value, raised.value.orig]
        # The session goes on as if nothing had happened, inside with the same transaction.
        assert list(store.session) == [other]
        assert other.name == "Other"
        assert store.ask(model, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(model, "email") == ["ada@x", "other@x"]


def test_an_error_of_what_waited_in_the_session_is_not_taken_for_a_race(store: Store) -> None:
    store.ask(User, {"name": "Ada"}, email="ada@x")
    session = store.session
    with session.begin() as transaction, session.no_autoflush:
        session.add(User(email="ada@x", name="Twice"))
        with pytest.raises(exc.IntegrityError, match="ada@x"):
            store.ask(Heard, {"name": "Bob"}, email="bob@x")
        transaction.rollback()
    assert store.ask(Heard, {"name": "Bob"}, email="bob@x")[1]


def test_more_than_one_is_an_error(store: Store) -> None:
    for email in ("a@x", "b@x", "c@x"):
        store.ask(User, {"name": "Same"}, email=email)
    with pytest.raises(exc.MultipleResultsFound):
        store.ask(User, name="Same")
    with store.session.begin(), pytest.raises(exc.MultipleResultsFound):
        store.ask(User, name="Same")


@pytest.mark.parametrize(
    ("filters", "defaults", "error", "message"),
    [
        (
            {"mail": "a"},
            {},
            exc.InvalidRequestError,
            "User has no attribute 'mail'; it has 'name', 'id",
        ),
        ({"email": "a"}, {"mail": "a"}, exc.InvalidRequestError, "User has no attribute 'mail'"),
        ({"password": "a"}, {}, exc.InvalidRequestError, "User has no attribute 'password'"),
        ({"email": "a"}, {"email": "b"}, exc.ArgumentError, "leave it out of the defaults"),
        ({}, {"email": "b"}, exc.ArgumentError, "nothing to search for"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_sent(
    store: Store,
    wire: WireProxy,
    filters: dict[str, Any],
    defaults: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with wire.record() as recording:
        with pytest.raises(error, match=message):
            store.ask(User, defaults, **filters)
        with pytest.raises(error, match=message), store.session.begin():
            store.ask(User, defaults, **filters)
    assert recording.verbs == []


def test_defaults_without_names_are_refused(store: Store, wire: WireProxy) -> None:
    wrong: Any = "Ada"
    with wire.record() as recording, pytest.raises(exc.ArgumentError, match="not 'Ada'"):
        store.ask(User, wrong, email="ada@x")
    assert recording.verbs == []


def test_a_class_that_is_not_mapped_is_refused(store: Store) -> None:
    with pytest.raises(UnmappedClassError):
        store.ask(Point, x=1)


# -- the values --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_defaults_of_every_kind(store: Store, wire: WireProxy, where: str) -> None:
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        row, created = store.ask(Defaults, key="k")
        assert created
        assert (row.python, row.called, row.expression) == ("python", "for k", 42)
        assert isinstance(row.server, datetime)
        assert (row.computed, row.document) == ("k!", None)
    if where == "outside":
        assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert (row.large, row.loud) == ("large", "K")
    given, _ = store.ask(
        Defaults,
        {
            "python": "given",
            "called": sa.func.upper("given"),
            "expression": 1,
            "document": {"a": [1]},
            "large": sa.func.lower("GIVEN"),
        },
        key="l",
    )
    assert (given.python, given.called, given.expression) == ("given", "GIVEN", 1)
    assert (given.document, given.large, given.loud) == ({"a": [1]}, "given", "L")


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_none_to_search_for_is_stored_as_null_whatever_the_default(
    store: Store, where: str
) -> None:
    with store.session.begin() if where == "inside" else nullcontext():
        row, created = store.ask(Defaults, key="k", python=None)
        assert created
        assert row.python is None
        assert store.ask(Defaults, key="k", python=None) == (row, False)
        assert store.ask(Defaults, {"python": None}, key="l")[0].python == "python"
    assert store.stored(Defaults, "key", "python") == [("k", None), ("l", "python")]


def test_a_sql_expression_to_search_for(store: Store) -> None:
    ada, created = store.ask(User, {"name": "Ada"}, email=sa.func.lower("ADA@X"))
    assert (ada.email, created) == ("ada@x", True)
    assert store.ask(User, email=sa.func.lower("ADA@X")) == (ada, False)


def test_a_default_may_be_a_property_or_a_parameter_of_the_constructor(store: Store) -> None:
    ada, _ = store.ask(User, {"password": "p"}, email="ada@x")
    assert ada.name == "hash of p"
    bob, _ = store.ask(Careful, {"word": "p"}, email="bob@x")
    assert bob.secret == "hash of p"
    with store.session.begin():
        assert store.ask(Careful, {"word": "q"}, email="eve@x")[0].secret == "hash of q"


def test_a_constructor_may_take_anything(store: Store) -> None:
    cat, created = store.ask(Cat, {"sound": "MEOW"}, name="Tom")
    assert (cat.voice, created) == ("meow", True)


def test_constructors_and_validators_run(store: Store, wire: WireProxy) -> None:
    with pytest.raises(ValueError, match="no address"):
        store.ask(Careful, {"word": "p"}, email="bob")
    with pytest.raises(TypeError, match="word"):
        store.ask(Careful, email="bob@x")
    with store.session.begin():
        with pytest.raises(ValueError, match="no address"):
            store.ask(Careful, {"word": "p"}, email="bob")
        assert store.ask(Careful, {"word": "p"}, email="bob@x")[1]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_attributes_that_are_more_than_a_column(store: Store, where: str) -> None:
    with store.session.begin() if where == "inside" else nullcontext():
        place, created = store.ask(Place, {"label": "Top"}, point=Point(1, 2))
        assert (place.point, place.called, created) == (Point(1, 2), "Top", True)
        assert store.ask(Place, called="Top") == (place, False)
        assert store.ask(Place, lower="top") == (place, False)
        low, created = store.ask(Place, {"point": Point(3, 4), "facts": {"a": 1}}, lower="low")
        assert (low.label, low.point, low.facts, created) == ("low", Point(3, 4), {"a": 1}, True)
    with store.session.begin():
        assert low.facts is not None
        low.facts["b"] = 2  # noticed, as with an object that was loaded
    assert store.stored(Place, "label", "facts") == [("Top", None), ("low", {"a": 1, "b": 2})]


def test_a_version_counter_counts_from_the_start(store: Store) -> None:
    one, created = store.ask(Counted, key="k")
    assert (one.version, created) == (1, True)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_dataclasses(store: Store, wire: WireProxy, where: str) -> None:
    doctor, _ = store.ask(Author, name="Dr. No")
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        one, created = store.ask(Patient, {"doctor": doctor}, name="One")
        assert (one.doctor, one.doctor_id, one.ward, created) == (
            doctor,
            doctor.id,
            "general",
            True,
        )
        assert store.ask(Patient, doctor=doctor) == (one, False)
        two, _ = store.ask(Patient, {"ward": "W"}, name="Two")
        assert (two.doctor, two.doctor_id, two.ward) == (None, None, "W")
    if where == "outside":
        assert recording.verbs == ["SELECT", *STORED, "SELECT", "SELECT", *STORED]


# -- related objects ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_related_object_is_a_filter_and_a_default(
    store: Store, wire: WireProxy, where: str
) -> None:
    session = store.session
    ada, _ = store.ask(Author, name="Ada")
    bob, _ = store.ask(Author, name="Bob")
    assert ada.books == []
    with wire.record() as recording, session.begin() if where == "inside" else nullcontext():
        book, created = store.ask(Book, {"reviewer": bob}, author=ada, title="Notes")
        assert created
        assert (book.author, book.reviewer) == (ada, bob)
        assert (book.author_id, book.reviewer_id) == (ada.id, bob.id)
        assert store.ask(Book, author=ada, title="Notes") == (book, False)
        same, _ = store.ask(Book, {"reviewer": ada}, author=ada, title="Same")
        assert (same.author, same.reviewer) == (ada, ada)
    if where == "outside":
        assert recording.verbs == ["SELECT", *STORED, "SELECT", "SELECT", *STORED]
    assert ada.books == [book, same]
    assert not session.dirty
    assert not session.new
    assert store.stored(Book, "title", "author_id", "reviewer_id") == [
        ("Notes", ada.id, bob.id),
        ("Same", ada.id, ada.id),
    ]


def test_no_related_object_is_a_filter_too(store: Store) -> None:
    ada, _ = store.ask(Author, name="Ada")
    assert store.ask(Book, author=ada, title="Notes")[1]
    book, created = store.ask(Book, author=None, title="Notes")
    assert (book.author, book.author_id, created) == (None, None, True)
    with store.session.begin():
        assert store.ask(Book, author=None, title="Notes") == (book, False)


def test_outside_a_related_object_stays_as_it_was(store: Store, wire: WireProxy) -> None:
    session = store.session
    ada, _ = store.ask(Author, name="Ada")
    ada.mood = "bad"
    waiting = Book(title="Waiting")
    ada.books.append(waiting)
    with wire.record() as recording:
        book, created = store.ask(Book, author=ada, title="Notes")
    assert created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert (ada.mood, ada.books) == ("bad", [waiting, book])
    assert (set(session.new), set(session.dirty)) == ({waiting}, {ada})
    assert store.stored(Author, "name", "mood") == [("Ada", None)]
    session.commit()
    session.expire_all()
    assert ada.books == [book, waiting]


def test_outside_a_constructor_looks_at_the_related_object_as_it_is(
    store: Store, wire: WireProxy
) -> None:
    ada, _ = store.ask(Author, {"mood": "fine"}, name="Ada")
    ada.mood = "bad"
    with wire.record() as recording:
        one, created = store.ask(Careful, {"word": "p"}, email="one@x", author=ada)
    assert (one.author, one.author_id, created) == (ada, ada.id, True)
    assert one.author_name == "Ada, bad"
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert store.stored(Author, "mood") == ["fine"]


def test_outside_a_related_object_of_nobody_will_do(store: Store) -> None:
    ada, _ = store.ask(Author, name="Ada")
    store.session.expunge(ada)
    book, created = store.ask(Book, author=ada, title="Notes")
    assert (book.author_id, created) == (ada.id, True)
    assert book.author is ada
    assert ada in store.session


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [Book, Careful])
def test_the_loser_of_a_race_leaves_related_objects_alone(
    store: Store,
    another: Store,
    just_before_insert: Callable[..., None],
    where: str,
    model: type[Any],
) -> None:
    ada, _ = store.ask(Author, name="Ada")
    mine: dict[str, Any] = {"title": "Notes"} if model is Book else {"email": "e@x"}
    word = {} if model is Book else {"word": "p"}
    assert ada.books == []

    def win() -> None:
        another.ask(model, word, author=another.session.get(Author, ada.id), **mine)

    just_before_insert(win)
    with store.session.begin() if where == "inside" else nullcontext():
        book, created = store.ask(model, word, author=ada, **mine)
        assert not created
        assert not store.session.dirty
    assert store.stored(model, "id") == [book.id]
    store.session.expire_all()
    assert ada.books == ([book] if model is Book else [])


def test_related_objects_that_would_have_to_be_written_are_refused_outside(
    store: Store, wire: WireProxy
) -> None:
    new = Author(name="New")
    store.session.add(new)
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"title": "Notes"}, {"author": new}),
        ({"title": "Notes", "author": new}, {}),
        ({"title": "Notes"}, {"author": Author(name="Other")}),
    ]
    for filters, defaults in calls:
        with (
            wire.record() as recording,
            pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*session.begin"),
        ):
            store.ask(Book, defaults, **filters)
        assert recording.verbs == []
    with (
        wire.record() as recording,
        pytest.raises(exc.InvalidRequestError, match=r"change to other rows.*session.begin"),
    ):
        store.ask(Author, {"books": [Book(title="Notes")]}, name="Ada")
    assert recording.verbs == []
    assert list(store.session.new) == [new]


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(
    ("model", "value", "error", "message"),
    [
        (Book, {"author": "Ada"}, exc.ArgumentError, "Book.author is a Author or None, not 'Ada'"),
        (Book, {"author": User()}, exc.ArgumentError, "Book.author is a Author or None, not <"),
        (Book, {"any_author": Author()}, exc.InvalidRequestError, "viewonly.*columns"),
    ],
)
def test_what_is_no_related_object_is_refused(
    store: Store,
    wire: WireProxy,
    where: str,
    model: type[Any],
    value: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(error, match=message):
            store.ask(model, title="Notes", **value)
        with pytest.raises(error, match=message):
            store.ask(model, value, title="Notes")
    assert recording.verbs == []


def test_related_objects_are_written_inside(store: Store) -> None:
    new = Author(name="New")
    with store.session.begin():
        store.session.add(new)
        book, created = store.ask(Book, title="Notes", author=new)
        assert created
        assert store.ask(Book, title="Notes", author=new) == (book, False)
        assert store.ask(Book, {"author": Author(name="Other")}, title="More")[1]
        ada, created = store.ask(Author, {"books": [Book(title="Last")]}, name="Ada")
        assert created
    assert [book.title for book in ada.books] == ["Last"]
    assert store.stored(Author, "name") == ["Ada", "New", "Other"]


def test_a_filter_that_nothing_can_refer_to_is_refused_inside(
    store: Store, wire: WireProxy
) -> None:
    with store.session.begin():
        waiting = Author(name="New")
        with pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*flush"):
            store.ask(Book, title="Notes", author=waiting)
        store.session.add(waiting)
        with (
            store.session.no_autoflush,
            pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*flush"),
        ):
            store.ask(Book, title="Notes", author=waiting)


def test_what_a_constructor_makes_is_written_with_it(store: Store) -> None:
    parent, created = store.ask(Parent, key="p")
    assert created
    assert [child.name for child in parent.children] == ["first"]
    assert parent.children[0].parent is parent
    assert set(store.session) == {parent, parent.children[0]}
    with store.session.begin():
        _, created = store.ask(Parent, key="q")
        assert created
    assert store.stored(Child, "parent_key", "name") == [("p", "first"), ("q", "first")]


def test_what_waits_in_the_session_is_not_taken_along_outside(store: Store) -> None:
    tag = Tag(name="new")
    store.session.add(tag)
    with pytest.raises(exc.InvalidRequestError, match=r"takes along a Tag.*session.begin"):
        store.ask(Book, {"tags": [tag]}, title="Notes")
    assert list(store.session.new) == [tag]
    assert store.stored(Book, "title") == []
    with store.session.begin():
        book, created = store.ask(Book, {"tags": [tag]}, title="Notes")
        assert (list(book.tags), created) == ([tag], True)
    assert store.stored(Tagging, "book_id", "tag_name") == [(book.id, "new")]


def test_what_an_association_proxy_makes_is_stored_with_it(store: Store) -> None:
    tag, _ = store.ask(Tag, name="new")
    book, created = store.ask(Book, {"tags": [tag]}, title="Notes")
    assert (list(book.tags), created) == ([tag], True)
    assert store.stored(Tagging, "book_id", "tag_name") == [(book.id, "new")]


def test_an_object_whose_row_was_deleted_by_another_is_that_of_the_new_row(
    store: Store, another: Store
) -> None:
    models: list[tuple[type[Any], dict[str, Any]]] = [(Tag, {"name": "k"}), (Parent, {"key": "k"})]
    for model, filters in models:
        old, _ = store.ask(model, **filters)
        with another.engine.begin() as connection:
            connection.execute(sa.delete(Child))
            connection.execute(sa.delete(model))
        new, created = store.ask(model, **filters)
        assert created
        assert new is old
        assert filters.items() <= {name: getattr(new, name) for name in filters}.items()


# -- who listens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *["before_attach", "transient_to_pending", "pending_to_persistent"],
        *["before_flush", "after_flush", "after_flush_postexec"],
        *["after_begin", "before_commit", "after_commit"],
    ],
)
def test_listeners_of_the_session_hear_of_it(store: Store, wire: WireProxy, name: str) -> None:
    heard: list[str] = []
    event.listen(store.maker, name, lambda *args: heard.append(name))
    with wire.record() as recording:
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert heard


def test_listeners_of_the_session_can_change_the_object(store: Store) -> None:
    @event.listens_for(store.maker, "before_flush")
    def _(session: Session, context: Any, instances: Any) -> None:
        for instance in session.new:
            instance.name = "stamped"

    assert store.ask(User, email="outside@x")[0].name == "stamped"
    with store.session.begin():
        assert store.ask(User, email="inside@x")[0].name == "stamped"


@pytest.mark.parametrize("name", ["before_insert", "after_insert"])
def test_listeners_of_the_mapper_hear_of_it(store: Store, name: str) -> None:
    heard: list[Any] = []

    def listen(mapper: Any, connection: Any, target: Any) -> None:
        heard.append(target)

    event.listen(User, name, listen)
    try:
        ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
        with store.session.begin():
            bob, _ = store.ask(User, {"name": "Bob"}, email="bob@x")
    finally:
        event.remove(User, name, listen)
    assert heard == [ada, bob]


def test_init_events_and_attribute_events_run(store: Store, wire: WireProxy) -> None:
    heard: list[Any] = []

    def init(target: Any, args: Any, kwargs: Any) -> None:
        kwargs["age"] = 1

    def changed(target: Any, value: Any, old: Any, initiator: Any) -> str:
        heard.append(value)
        return str(value).title()

    event.listen(User, "init", init)
    event.listen(User.name, "set", changed, retval=True)
    try:
        with wire.record() as recording:
            ada, _ = store.ask(User, {"name": "ada"}, email="ada@x")
    finally:
        event.remove(User, "init", init)
        event.remove(User.name, "set", changed)
    assert (ada.name, ada.age, heard) == ("Ada", 1, ["ada"])
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert store.stored(User, "name", "age") == [("Ada", 1)]


# -- other sessions, other databases -------------------------------------------------------------


def test_a_session_of_sqlalchemy_is_always_inside(
    make_store: Callable[..., Store], wire: WireProxy
) -> None:
    store = make_store(create=sa.create_engine, session_class=Session)
    with wire.record() as recording:
        ada, created = store.ask(User, {"name": "Ada"}, email="ada@x")
        assert created
        assert store.ask(User, email="ada@x") == (ada, False)
    assert recording.verbs == ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE", "SELECT"]
    assert store.stored(User, "email") == []
    store.session.commit()
    assert store.stored(User, "email") == ["ada@x"]


def test_a_bind_of_sqlalchemy_is_always_inside(
    make_store: Callable[..., Store], wire: WireProxy
) -> None:
    store = make_store(create=sa.create_engine)
    assert isinstance(store.session, OptInSession)
    with wire.record() as recording:
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert recording.verbs == ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE"]
    store.session.commit()
    assert store.stored(User, "email") == ["ada@x"]


def test_a_connection_of_the_users_own_is_always_inside(store: Store) -> None:
    with store.engine.connect() as connection, connection.begin() as transaction:
        session = OptInSession(connection)
        assert store.ask(User, {"name": "Ada"}, session, email="ada@x")[1]
        session.close()
        transaction.rollback()
    assert store.stored(User, "email") == []


@pytest.mark.parametrize("create", [create_engine, sa.create_engine])
def test_sqlite(create: Callable[..., sa.Engine]) -> None:
    engine = create("sqlite://")
    names = ("users", "authors", "books")
    Base.metadata.create_all(engine, [Base.metadata.tables[name] for name in names])
    store = Store(engine)
    ada, created = store.ask(User, {"name": "Ada", "nick": "a"}, email="ada@x")
    assert created
    assert store.ask(User, email="ada@x") == (ada, False)
    with pytest.raises(exc.IntegrityError):
        store.ask(User, {"name": "Ada", "nick": "a"}, email="eve@x")
    store.session.commit()
    with store.session.begin():
        with pytest.raises(exc.IntegrityError):
            store.ask(User, {"name": "Ada", "nick": "a"}, email="eve@x")
        assert store.ask(User, {"name": "Bob"}, email="bob@x")[1]
    author, _ = store.ask(Author, name="A")
    assert store.ask(Book, title="T", author=author)[0].author is author
    store.session.commit()
    assert store.session.scalars(sa.select(User.email).order_by("email")).all() == [
        "ada@x",
        "bob@x",
    ]
    store.session.close()
    engine.dispose()


@pytest.mark.parametrize("create", [create_engine, sa.create_engine])
def test_sqlite_finds_a_row_that_another_session_has_created_meanwhile(
    create: Callable[..., sa.Engine], tmp_path: Path
) -> None:
    engine = create(f"sqlite:///{tmp_path}/database")
    Base.metadata.create_all(engine, [Base.metadata.tables["users"]])
    store = Store(engine)

    def create_it_meanwhile() -> str:
        with Session(engine) as other:
            other.add(User(email="ada@x", name="Ada"))
            other.commit()
        return "Bob"

    found, created = store.ask(User, {"name": create_it_meanwhile}, email="ada@x")
    assert (found.name, created) == ("Ada", False)
    store.session.close()
    engine.dispose()


# -- Flask-SQLAlchemy --------------------------------------------------------------------------


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    """Both mixins."""


class StockDatabase(FilterByOrCreateMixin, SQLAlchemy):
    """This mixin alone."""


def plain() -> type[Any]:
    class Plain(FlaskModel):
        pass

    return Plain


def created_by_function() -> type[Any]:
    base: type[Any] = declarative_base()
    return base


def declarative() -> type[Any]:
    class Declarative(DeclarativeBase):
        pass

    return Declarative


def declarative_without_meta() -> type[Any]:
    class WithoutMeta(DeclarativeBaseNoMeta):
        pass

    return WithoutMeta


def dataclass_base() -> type[Any]:
    class Dataclass(MappedAsDataclass, DeclarativeBase):
        pass

    return Dataclass


def dataclass_base_without_meta() -> type[Any]:
    class DataclassWithoutMeta(MappedAsDataclass, DeclarativeBaseNoMeta):
        pass

    return DataclassWithoutMeta


FORMS = [
    plain,
    created_by_function,
    declarative,
    declarative_without_meta,
    dataclass_base,
    dataclass_base_without_meta,
]


@pytest.fixture
def make_app(url: str) -> Iterator[Callable[..., Flask]]:
    apps: list[Flask] = []

    def make(db: SQLAlchemy, **config: Any) -> Flask:
        app = Flask(__name__)
        app.config.update({"SQLALCHEMY_DATABASE_URI": url, **config})
        db.init_app(app)
        apps.append(app)
        return app

    yield make
    for app in apps:
        with app.app_context():
            for engine in app.extensions["sqlalchemy"].engines.values():
                engine.dispose()


def model_of(base: Any) -> Any:
    class Person(base):
        __tablename__ = "person"

        email: Mapped[str] = mapped_column(primary_key=True)
        name: Mapped[str]

    return Person


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extension", [Database, StockDatabase])
def test_every_model_class_gets_the_descriptor(
    make_app: Callable[..., Flask],
    form: Callable[[], type[Any]],
    extension: type[Database | StockDatabase],
) -> None:
    db = extension(model_class=form())
    Person = model_of(db.Model)
    with make_app(db).app_context():
        db.create_all()
        ada = Person.filter_by_or_create(email="ada@x", defaults={"name": "Ada"})
        assert type(ada) is Person
        assert ada in db.session
        assert Person.filter_by_or_create(email="ada@x") is ada
        assert Person.filter_by_or_create.with_created(email="ada@x") == (ada, False)
        bob, created = Person.filter_by_or_create.with_created(
            email="bob@x", defaults={"name": "Bob"}
        )
        assert (bob.name, created) == ("Bob", True)
        assert Person.__table__.columns.keys() == ["email", "name"]
        assert sa.inspect(Person).attrs.keys() == ["email", "name"]
        db.session.rollback()
        stored = db.session.scalars(sa.select(Person.email).order_by("email")).all()
        assert stored == (["ada@x", "bob@x"] if extension is Database else [])


@pytest.mark.parametrize("form", FORMS)
def test_make_declarative_base_makes_one_of_every_model_class(
    make_app: Callable[..., Flask], form: Callable[[], type[Any]]
) -> None:
    db = Database()
    Person = model_of(db.make_declarative_base(form()))
    with make_app(db).app_context():
        Person.metadata.create_all(db.engine)
        ada = Person.filter_by_or_create(email="ada@x", defaults={"name": "Ada"})
        assert db.session.get(Person, "ada@x") is ada


def test_make_declarative_base_leaves_its_own_bases_as_they_are() -> None:
    db = Database()
    assert db.make_declarative_base(db.Model) is db.Model


def test_the_metadata_of_make_declarative_base_is_the_default(
    make_app: Callable[..., Flask],
) -> None:
    db = Database()
    metadata = sa.MetaData(naming_convention={"uq": "unique_%(column_0_name)s"})
    Person = model_of(db.make_declarative_base(plain(), metadata=metadata))
    assert db.metadata is metadata is Person.metadata
    with make_app(db).app_context():
        db.create_all()
        assert Person.filter_by_or_create(email="ada@x", defaults={"name": "Ada"}).name
    with pytest.raises(exc.InvalidRequestError, match=r"metadata="):
        db.make_declarative_base(plain(), metadata=sa.MetaData())
    assert db.metadata is metadata


def test_the_mixin_behind_the_extension_is_noticed() -> None:
    bases: tuple[Any, ...] = (SQLAlchemy, FilterByOrCreateMixin)
    turned: Any = type("Turned", bases, {})
    with pytest.raises(TypeError, match=r"class Turned\(FilterByOrCreateMixin, SQLAlchemy\)"):
        turned()


def test_a_base_without_a_table_has_nothing_to_find(make_app: Callable[..., Flask]) -> None:
    db = Database()
    with make_app(db).app_context(), pytest.raises(UnmappedClassError):
        db.Model.filter_by_or_create(id=1)


def test_outside_an_app_context_it_is_the_error_of_flask(make_app: Callable[..., Flask]) -> None:
    db = Database()
    make_app(db)
    Person = model_of(db.Model)
    with pytest.raises(RuntimeError, match="application context"):
        Person.filter_by_or_create(email="ada@x")


def test_it_writes_to_the_bind_of_the_model(
    make_app: Callable[..., Flask], wire_url: str, wire: WireProxy
) -> None:
    db = Database()

    class Here(db.Model):
        name: Mapped[str] = mapped_column(primary_key=True)

    class There(db.Model):
        __bind_key__ = "there"
        name: Mapped[str] = mapped_column(primary_key=True)

    class Stock(db.Model):
        __bind_key__ = "stock"
        name: Mapped[str] = mapped_column(primary_key=True)

    app = make_app(db, SQLALCHEMY_BINDS={"there": wire_url, "stock": "sqlite://"})
    with app.app_context():
        db.create_all()
        with wire.record() as recording:
            assert Here.filter_by_or_create.with_created(name="a")[1]
            assert There.filter_by_or_create.with_created(name="a")[1]
        assert recording.verbs == ["SELECT", *STORED]
        stock, created = Stock.filter_by_or_create.with_created(name="a")
        assert created
        assert db.session().in_transaction()
        db.session.commit()
        assert Stock.filter_by_or_create.with_created(name="a") == (stock, False)


def test_modifications_are_tracked(make_app: Callable[..., Flask]) -> None:
    from flask_sqlalchemy.track_modifications import models_committed

    db = Database()
    Person = model_of(db.Model)
    heard: list[Any] = []

    def committed(sender: Any, changes: list[tuple[Any, str]]) -> None:
        heard.extend(changes)

    app = make_app(db, SQLALCHEMY_TRACK_MODIFICATIONS=True)
    with app.app_context(), models_committed.connected_to(committed):
        db.create_all()
        ada = Person.filter_by_or_create(email="ada@x", defaults={"name": "Ada"})
        assert heard == [(ada, "insert")]


def test_32_requests_at_once_create_one_row(make_app: Callable[..., Flask]) -> None:
    db = Database(engine_options={"pool_size": 5, "max_overflow": 0})
    Person = model_of(db.Model)
    app = make_app(db)
    with app.app_context():
        db.create_all()
    together = threading.Barrier(32)

    def request(number: int) -> tuple[str, bool]:
        with app.app_context():
            together.wait()
            person, created = Person.filter_by_or_create.with_created(
                email="ada@x", defaults={"name": f"of request {number}"}
            )
            return person.name, created

    with ThreadPoolExecutor(32) as executor:
        answers = list(executor.map(request, range(32)))
    assert len({name for name, _ in answers}) == 1
    assert [f"of request {n}" for n, (_, new) in enumerate(answers) if new] == [answers[0][0]]


def test_type_checkers_know_what_it_returns(make_app: Callable[..., Flask]) -> None:
    class Typed(DeclarativeBase):
        filter_by_or_create = FilterByOrCreateProperty()

    class Thing(Typed):
        __tablename__ = "things"
        name: Mapped[str] = mapped_column(primary_key=True)

    assert_type(Thing.filter_by_or_create, FilterByOrCreate[Thing])
    if TYPE_CHECKING:
        assert_type(Thing.filter_by_or_create(name="a"), Thing)
        assert_type(Thing.filter_by_or_create.with_created(name="a"), tuple[Thing, bool])
    assert sa.inspect(Thing).attrs.keys() == ["name"]
