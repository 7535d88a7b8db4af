"""The engine of a mapped class is the one that Flask-SQLAlchemy's own session finds."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import gc
from collections.abc import Mapping
from threading import Thread
from typing import Any
from weakref import ref

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy.orm import Mapped, aliased, declarative_base, mapped_column

from tests.flask.support import Database

db: Any = Database()


class Animal(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__: Any = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Dog(Animal):
    """Joined inheritance."""

    id: Mapped[int] = mapped_column(sa.ForeignKey(Animal.id), primary_key=True)
    __mapper_args__: Any = {"polymorphic_identity": "dog"}  # noqa: RUF012


class Cat(Animal):
    """Single-table inheritance."""

    __mapper_args__: Any = {"polymorphic_identity": "cat"}  # noqa: RUF012


class Invoice(db.Model):
    __bind_key__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)


class Lost(db.Model):
    __bind_key__ = "nowhere"
    id: Mapped[int] = mapped_column(primary_key=True)


class OfASelect(db.Model):
    """Mapped to what is no table."""

    __table__ = sa.select(Invoice.__table__).subquery()
    __mapper_args__: Any = {"primary_key": [__table__.c.id]}  # noqa: RUF012


class OfAnother(declarative_base()):
    """With tables that no extension has made."""

    __tablename__ = "of_another"
    id: Mapped[int] = mapped_column(primary_key=True)


WAYS: list[dict[str, Any]] = [
    *({"mapper": each} for each in (Animal, Dog, Cat, Invoice, Lost, OfASelect, OfAnother, Flask)),
    *({"mapper": sa.inspect(each)} for each in (Animal, Dog, Cat, Invoice, Lost, OfASelect)),
    {"mapper": aliased(Invoice)},
    {"mapper": sa.inspect(OfAnother), "clause": sa.insert(Invoice.__table__)},
    {"mapper": sa.inspect(OfASelect), "clause": sa.select(OfASelect)},
    {"clause": Invoice.__table__},
    {"clause": sa.insert(Invoice.__table__)},
    {"clause": sa.select(Invoice.__table__)},
    {"clause": sa.text("SELECT 1")},
    {},
]


def new_app(db: SQLAlchemy, *, default: bool = True) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_BINDS"] = {"accounts": "sqlite://"}
    if default:
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db.init_app(app)
    return app


def outcome(session: FlaskSession, way: dict[str, Any]) -> Any:
    try:
        return session.get_bind(**way)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("way", WAYS, ids=range(len(WAYS)))
@pytest.mark.parametrize("default", [True, False])
def test_the_engine_is_the_one_that_flask_sqlalchemy_finds(
    way: dict[str, Any], default: bool
) -> None:
    db_of_models = db
    with new_app(db_of_models, default=default).app_context():
        ours, stock = db.session(), FlaskSession(db)
        for _ in range(2):  # the second time, it has found the engines already
            assert outcome(ours, way) == outcome(stock, way)


def test_a_bind_that_is_given_is_returned() -> None:
    with new_app(db).app_context():
        given = db.engines["accounts"]
        assert db.session().get_bind(sa.inspect(Animal), bind=given) is given


def test_a_session_that_is_used_in_another_application_finds_the_engines_of_that() -> None:
    one, other = new_app(db), new_app(db)
    with one.app_context():
        session = db.session()
        first = session.get_bind(sa.inspect(Animal))
        assert first is db.engine
        with other.app_context():
            assert session.get_bind(sa.inspect(Animal)) is db.engine
            assert db.engine is not first
        assert session.get_bind(sa.inspect(Animal)) is first


def test_an_engine_that_a_test_has_replaced_is_used() -> None:
    """As a common fixture does, which puts a Connection in the place of the engine."""
    with new_app(db).app_context():
        session = db.session()
        engine = session.get_bind(sa.inspect(Animal))
        with engine.connect() as connection:
            db.engines[None] = connection
            assert session.get_bind(sa.inspect(Animal)) is connection
        db.engines[None] = engine
        assert session.get_bind(sa.inspect(Animal)) is engine


def test_engines_of_the_users_own_are_asked_for_each_time() -> None:
    asked: list[None] = []

    class Own(Database):
        @property
        def engines(self) -> Mapping[str | None, sa.Engine]:
            asked.append(None)
            return super().engines

    own: Any = Own()

    class Thing(own.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    with new_app(own).app_context():
        session = own.session()
        for _ in range(3):
            asked.clear()
            session.get_bind(sa.inspect(Thing))
            assert asked


def test_get_bind_of_the_users_own_session_is_called() -> None:
    class OwnSession(FlaskSession):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            called.append((args, set(kwargs)))
            return super().get_bind(*args, **kwargs)

    called: list[Any] = []
    own: Any = Database(session_options={"class_": OwnSession})

    class Thing(own.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    with new_app(own).app_context():
        own.create_all()
        called.clear()
        assert own.session.get(Thing, 1) is None
        assert called == [((), {"mapper", "clause"})]


def test_outside_an_application_context_get_bind_raises_flasks_own_error() -> None:
    with new_app(db).app_context():
        session = db.session()
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        session.get_bind(sa.inspect(Animal))


class TestRegistry:
    def test_a_context_keeps_its_session_while_others_come_and_go(self) -> None:
        app = new_app(db)
        with app.app_context():
            session = db.session()
            for _ in range(3):
                with app.app_context():
                    assert db.session.registry.has() is False
                    assert db.session() is not session
            assert db.session() is session
            assert db.session.registry.has()

    def test_a_context_that_is_gone_without_its_end_leaves_nothing(self) -> None:
        app = new_app(db)
        registry = db.session.registry.registry
        before, sessions, during = len(registry), [], []

        def push_and_leave() -> None:
            app.app_context().push()
            sessions.append(ref(db.session()))
            during.append(len(registry))

        thread = Thread(target=push_and_leave)
        thread.start()
        thread.join()
        gc.collect()
        assert during == [before + 1]
        assert len(registry) == before
        assert [session() for session in sessions] == [None]

    def test_set_replaces_the_session_of_the_context(self) -> None:
        with new_app(db).app_context():
            db.session()
            another = db.session.session_factory()
            db.session.registry.set(another)
            assert db.session() is another
            db.session.registry.clear()
            db.session.registry.clear()
            assert not db.session.registry.has()

    def test_threads_that_share_a_context_get_one_session(self) -> None:
        context = new_app(db).app_context()
        found: list[Any] = []

        def find() -> None:
            with context:
                found.append(db.session())

        with context:
            here = db.session()
            threads = [Thread(target=find) for _ in range(4)]
            for thread in threads:
                thread.start()
                thread.join()
        assert found == [here] * 4
