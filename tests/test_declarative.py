"""``model_class`` in every form that Flask-SQLAlchemy accepts, on each line of SQLAlchemy."""

# The base classes are made at run time, so no type checker can know them.
# mypy: disable-error-code="name-defined,misc,valid-type"

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import DefaultMeta, Model
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    declarative_base,
    mapped_column,
)

from fictive_sqlalchemy.ext.flask.declarative import DeclarativeBaseMixin


class Database(DeclarativeBaseMixin, SQLAlchemy):
    """The mixin alone."""


def plain() -> type[Any]:
    class Base(Model):
        pass

    return Base


def created_by_function() -> type[Any]:
    base: type[Any] = declarative_base(cls=Model, name="Base", metaclass=DefaultMeta)
    return base


def declarative() -> type[Any]:
    class Base(DeclarativeBase):
        pass

    return Base


def declarative_no_meta() -> type[Any]:
    class Base(DeclarativeBaseNoMeta):
        pass

    return Base


def dataclass_first() -> type[Any]:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    return Base


def dataclass_last() -> type[Any]:
    class Base(DeclarativeBase, MappedAsDataclass):
        pass

    return Base


def dataclass_first_no_meta() -> type[Any]:
    class Base(MappedAsDataclass, DeclarativeBaseNoMeta):
        pass

    return Base


def dataclass_last_no_meta() -> type[Any]:
    class Base(DeclarativeBaseNoMeta, MappedAsDataclass):
        pass

    return Base


def dataclass_over_a_base() -> type[Any]:
    class Root(DeclarativeBase):
        pass

    class Base(MappedAsDataclass, Root):
        __abstract__ = True

    return Base


def dataclass_below_a_base() -> type[Any]:
    class Root(MappedAsDataclass, DeclarativeBase):
        pass

    class Base(Root):
        __abstract__ = True

    return Base


PLAIN = [plain, created_by_function, declarative, declarative_no_meta]
DATACLASSES = [
    dataclass_first,
    dataclass_last,
    dataclass_first_no_meta,
    dataclass_last_no_meta,
    dataclass_over_a_base,
    dataclass_below_a_base,
]


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Makes extensions on databases in memory, each with its app's context entered."""
    with ExitStack() as stack:

        def make(model_class: Any, **options: Any) -> Any:
            app = Flask(__name__)
            app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
            app.config["SQLALCHEMY_BINDS"] = {"other": "sqlite://"}
            db = Database(app, model_class=model_class, **options)
            stack.enter_context(app.app_context())
            for engine in db.engines.values():
                stack.callback(engine.dispose)
            stack.callback(db.session.remove)
            return db

        yield make


def saved(db: Any, *objects: Any) -> list[Any]:
    """What a new session reads after the objects were committed in another."""
    db.create_all()
    db.session.add_all(objects)
    db.session.commit()
    db.session.remove()
    model = type(objects[0])
    return list(db.session.scalars(db.select(model).order_by(model.id)))


@pytest.mark.parametrize("form", PLAIN)
def test_a_base_that_is_no_dataclass_is_made_as_by_flask_sqlalchemy(make: Any, form: Any) -> None:
    db = make(form())

    class BookShelf(db.Model):
        id = sa.Column(sa.Integer, primary_key=True)
        title = sa.Column(sa.String)

    (found,) = saved(db, BookShelf(title="Emma"))
    assert (found.id, found.title) == (1, "Emma")
    assert BookShelf.__tablename__ == "book_shelf"
    assert repr(found) == "<BookShelf 1>"
    assert BookShelf.query.one() is found


@pytest.mark.parametrize("form", DATACLASSES)
def test_a_model_of_a_dataclass_base_is_a_dataclass_and_a_table(make: Any, form: Any) -> None:
    db = make(form())

    class BookShelf(db.Model):
        id: Mapped[int] = mapped_column(init=False, primary_key=True)
        title: Mapped[str]
        pages: Mapped[int] = mapped_column(default=7)

    assert BookShelf("Emma") == BookShelf(title="Emma", pages=7)
    with pytest.raises(TypeError):
        BookShelf()

    first, second = saved(db, BookShelf("Emma"), BookShelf("Persuasion", 9))
    assert [f.name for f in dataclasses.fields(first)] == ["id", "title", "pages"]
    assert dataclasses.asdict(second) == {"id": 2, "title": "Persuasion", "pages": 9}
    assert repr(first).endswith("BookShelf(id=1, title='Emma', pages=7)")
    assert BookShelf.__tablename__ == "book_shelf"
    assert BookShelf.query.filter_by(pages=9).one() is second


@pytest.mark.parametrize("form", DATACLASSES)
def test_a_dataclass_model_goes_to_its_bind(make: Any, form: Any) -> None:
    db = make(form())

    class Book(db.Model):
        __bind_key__ = "other"
        id: Mapped[int] = mapped_column(init=False, primary_key=True)

    assert Book.metadata is db.metadatas["other"]
    assert [book.id for book in saved(db, Book(), Book())] == [1, 2]
    assert sa.inspect(db.engines["other"]).has_table("book")
    assert not sa.inspect(db.engine).has_table("book")


@pytest.mark.parametrize("form", [declarative, *DATACLASSES])
def test_without_autonaming_the_model_names_its_table(make: Any, form: Any) -> None:
    db = make(form(), disable_autonaming=True)

    class Book(db.Model):
        __tablename__ = "printed"
        id: Mapped[int] = mapped_column(primary_key=True)

    (found,) = saved(db, Book(id=3))
    assert found.id == 3
    assert Book.__table__ is db.metadata.tables["printed"]

    with pytest.raises(InvalidRequestError, match="__tablename__"):

        class Nameless(db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize("root", [DeclarativeBase, DeclarativeBaseNoMeta])
@pytest.mark.parametrize("before", [True, False])
def test_dataclass_arguments_of_the_base_hold_for_its_models(
    make: Any, root: Any, before: bool
) -> None:
    bases = (MappedAsDataclass, root) if before else (root, MappedAsDataclass)
    arguments = {"kw_only": True, "order": True, "unsafe_hash": True, "repr": False}
    db = make(types.new_class("Base", bases, arguments))

    class Book(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True, default=None)
        title: Mapped[str]

    with pytest.raises(TypeError, match="positional"):
        Book(1, "Emma")
    assert Book(id=1, title="Emma") < Book(id=2, title="Emma")
    assert hash(Book(id=1, title="Emma")) == hash(Book(id=1, title="Emma"))

    (found,) = saved(db, Book(title="Emma"))
    assert (found.id, found.title) == (1, "Emma")
    assert repr(found) == "<Book 1>"  # Flask-SQLAlchemy's, as the dataclass makes none


def test_arguments_of_a_model_go_before_those_of_its_base(make: Any) -> None:
    class Base(MappedAsDataclass, DeclarativeBase, kw_only=True, eq=False):
        pass

    db = make(Base)

    def body(namespace: dict[str, Any]) -> None:
        namespace["__annotations__"] = {"id": Mapped[int]}
        namespace["id"] = mapped_column(primary_key=True)

    Book = types.new_class("Book", (db.Model,), {"kw_only": False}, body)

    assert Book(1).id == 1
    assert Book(1) != Book(1)


def test_methods_that_the_base_defines_are_kept(make: Any) -> None:
    class Base(MappedAsDataclass, DeclarativeBase, repr=False, eq=False):
        def __repr__(self) -> str:
            return f"a {type(self).__name__}"

        def __eq__(self, other: object) -> bool:
            return type(self) is type(other)

        def __hash__(self) -> int:
            return 5

    db = make(Base)

    class Book(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    assert repr(Book(1)) == "a Book"
    assert Book(1) == Book(2)
    assert hash(Book(1)) == 5


class _WithFields(MappedAsDataclass):
    """A mixin, so that the base has fields of its own and inherited ones."""

    note: Mapped[str] = mapped_column(default="none", kw_only=True)


def with_fields() -> type[Any]:
    class Base(_WithFields, MappedAsDataclass, DeclarativeBase, unsafe_hash=True):
        id: Mapped[int] = mapped_column(init=False, primary_key=True)
        pages: Mapped[int] = mapped_column(default=7, kw_only=True)

    return Base


def test_fields_of_the_base_are_fields_of_each_model(make: Any) -> None:
    db = make(with_fields())

    class Book(db.Model):
        title: Mapped[str]

    class Paper(db.Model):
        pages: Mapped[int] = mapped_column(default=1)

    (book,) = saved(db, Book("Emma", pages=10, note="good"))
    assert (book.id, book.title, book.pages, book.note) == (1, "Emma", 10, "good")
    (paper,) = saved(db, Paper(2))
    assert (paper.id, paper.pages, paper.note) == (1, 2, "none")


def test_the_class_passed_in_stays_a_dataclass_that_can_have_models_itself(make: Any) -> None:
    base = with_fields()
    before = dict(vars(base))
    db = make(base)
    assert dict(vars(base)) == before
    assert db.Model is not base

    class Script(base):
        __tablename__ = "script"
        title: Mapped[str]

    assert Script("Emma", note="good").pages == 7
    assert hash(Script("Emma")) == hash(Script("Emma"))


def test_one_base_serves_many_extensions_made_at_once() -> None:
    base = with_fields()
    before = dict(vars(base))
    start = Barrier(8)

    def build(_: int) -> Any:
        start.wait()
        return [Database(model_class=base).Model for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        models = [model for made in pool.map(build, range(8)) for model in made]

    assert len(set(models)) == 160
    assert all("pages" in model.__dataclass_fields__ for model in models)
    assert dict(vars(base)) == before


def test_a_base_that_flask_sqlalchemy_refuses_is_left_whole() -> None:
    class One(DeclarativeBase):
        pass

    class Two(DeclarativeBase):
        pass

    class Both(MappedAsDataclass, One, Two):
        __abstract__ = True

    before = dict(vars(Both))
    with pytest.raises(ValueError, match="Only one declarative base"):
        Database(model_class=Both)
    assert dict(vars(Both)) == before


def test_a_base_decorated_by_the_user_is_passed_on_as_it_is(make: Any) -> None:
    @dataclasses.dataclass(order=True)
    class Base(DeclarativeBase):
        pass

    db = make(Base)

    class Book(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    assert dataclasses.is_dataclass(db.Model)
    assert vars(db.Model)["__lt__"] is vars(Base)["__lt__"]
    assert [book.id for book in saved(db, Book())] == [1]


def test_flask_sqlalchemy_still_makes_its_base_in_the_method_that_is_extended() -> None:
    """The private name this package relies on; everything above fails with it."""
    assert callable(getattr(SQLAlchemy, "_make_declarative_base", None))
