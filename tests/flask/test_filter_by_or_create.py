"""Each model class of Flask-SQLAlchemy finds or creates its rows."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined,misc,valid-type"

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model as FlaskModel
from sqlalchemy import exc
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    declarative_base,
    mapped_column,
)
from sqlalchemy.orm.exc import UnmappedClassError
from typing_extensions import assert_type

from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin
from fictive_sqlalchemy.ext.flask.filter_by_or_create import (
    FilterByOrCreate,
    FilterByOrCreateProperty,
    UpdateOrCreate,
    UpdateOrCreateProperty,
)
from tests.wire import WireProxy


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
        assert Person.update_or_create(email="bob@x", defaults={"name": "Rob"}) is bob
        assert bob.name == "Rob"
        assert Person.update_or_create.with_created(
            email="eve@x", defaults={"name": "Eva"}, create_defaults={"name": "Eve"}
        ) == (db.session.get(Person, "eve@x"), True)
        assert Person.__table__.columns.keys() == ["email", "name"]
        assert sa.inspect(Person).attrs.keys() == ["email", "name"]
        db.session.rollback()
        stored = db.session.scalars(sa.select(Person.email).order_by("email")).all()
        assert stored == (["ada@x", "bob@x", "eve@x"] if extension is Database else [])


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


def test_an_update_or_create_of_the_users_own_is_not_replaced(
    make_app: Callable[..., Flask],
) -> None:
    class Base(FlaskModel):
        @classmethod
        def update_or_create(cls, **values: Any) -> str:
            return "mine"

    db = Database(model_class=Base)
    Person = model_of(db.Model)
    assert Person.update_or_create(email="ada@x") == "mine"
    assert isinstance(Person.filter_by_or_create, FilterByOrCreate)


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


def test_outside_an_app_context_flasks_own_error_is_raised(make_app: Callable[..., Flask]) -> None:
    db = Database()
    make_app(db)
    Person = model_of(db.Model)
    with pytest.raises(RuntimeError, match="application context"):
        Person.filter_by_or_create(email="ada@x")


def test_filter_by_or_create_writes_to_the_bind_of_the_model(
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
        assert recording.verbs == ["SELECT", "INSERT"]
        stock, created = Stock.filter_by_or_create.with_created(name="a")
        assert created
        assert db.session().in_transaction()
        db.session.commit()
        assert Stock.filter_by_or_create.with_created(name="a") == (stock, False)


def test_objects_that_are_created_are_tracked_modifications(make_app: Callable[..., Flask]) -> None:
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


def test_type_checkers_know_what_filter_by_or_create_returns(
    make_app: Callable[..., Flask],
) -> None:
    class Typed(DeclarativeBase):
        filter_by_or_create = FilterByOrCreateProperty()
        update_or_create = UpdateOrCreateProperty()

    class Thing(Typed):
        __tablename__ = "things"
        name: Mapped[str] = mapped_column(primary_key=True)

    assert_type(Thing.filter_by_or_create, FilterByOrCreate[Thing])
    assert_type(Thing.update_or_create, UpdateOrCreate[Thing])
    if TYPE_CHECKING:
        assert_type(Thing.filter_by_or_create(name="a"), Thing)
        assert_type(Thing.filter_by_or_create.with_created(name="a"), tuple[Thing, bool])
        assert_type(Thing.update_or_create(name="a", defaults={"name": "b"}), Thing)
        assert_type(Thing.update_or_create.with_created(name="a"), tuple[Thing, bool])
    assert sa.inspect(Thing).attrs.keys() == ["name"]
