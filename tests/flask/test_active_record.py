"""Models of Flask-SQLAlchemy that store themselves, with our transactions and with its own."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined,misc,valid-type"

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.model import Model as FlaskModel
from flask_sqlalchemy.query import Query as FlaskQuery
from sqlalchemy import exc
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    mapped_column,
    object_session,
    sessionmaker,
)
from typing_extensions import assert_type
from werkzeug.exceptions import NotFound

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.active_record import ActiveRecordMixin
from fictive_sqlalchemy.ext.flask.scoped_session import current_session, flask_scoped_session
from fictive_sqlalchemy.ext.flask.shared import Model as SharedModel
from fictive_sqlalchemy.ext.flask.shared import db as shared
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.library import Onlooker
from tests.postgres import PostgresServer
from tests.wire import WireProxy


class MyQuery(FlaskQuery):
    def named(self, name: str) -> Any:
        return self.filter_by(name=name).one()


@dataclass
class Site:
    """An application with a model, and what it takes to see what it does."""

    db: SQLAlchemy
    app: Flask
    User: Any
    wire: WireProxy
    onlooker: Onlooker

    @property
    def opts_in(self) -> bool:
        return isinstance(self.db, Database)

    def names(self) -> list[str]:
        return self.onlooker.column('SELECT name FROM "user" ORDER BY name')


@pytest.fixture(params=[Database, SQLAlchemy], ids=["opt-in", "stock"])
def site(
    request: pytest.FixtureRequest, make_app: MakeApp, wire: WireProxy, wire_url: str, url: str
) -> Iterator[Site]:
    db: Any = request.param()

    class User(ActiveRecordMixin, db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)
        is_admin: Mapped[bool] = mapped_column(default=False)
        boss_id: Mapped[int | None] = mapped_column(sa.ForeignKey("user.id"))

    app = make_app(db, wire_url, TESTING=True)
    with app.app_context():
        db.create_all()
        User.create(name="Ada")
    onlooker = Onlooker(url)
    yield Site(db, app, User, wire, onlooker)
    onlooker.close()


# -- in requests -------------------------------------------------------------------------------


def test_a_view_may_update_from_a_form(site: Site) -> None:
    User = site.User

    @site.app.post("/users/<int:id>")
    def change(id: int) -> str:
        user = User.query.filter_by(id=id).first_or_404()
        try:
            user.update(request.form, only={"name"})
        except exc.InvalidRequestError as error:
            return str(error)
        return str(user.name)

    client = site.app.test_client()
    with site.wire.record() as recording:
        assert client.post("/users/1", data={"name": "Augusta"}).text == "Augusta"
    if site.opts_in:
        assert sent(recording) == ["SELECT user", "UPDATE user"]
    else:
        assert sent(recording) == [
            *("BEGIN", "SELECT user", "UPDATE user", "COMMIT"),
            *("BEGIN", "SELECT user", "ROLLBACK"),  # it has expired, as ever
        ]
    with site.wire.record() as recording:
        answer = client.post("/users/1", data={"name": "Bob", "is_admin": "1"}).text
    assert answer.startswith("User.update(): 'is_admin' is not named in only")
    assert [one for one in sent(recording) if "UPDATE" in one] == []
    assert site.names() == ["Augusta"]
    assert client.post("/users/9", data={"name": "Bob"}).status_code == 404


def test_a_view_may_create_from_json(site: Site) -> None:
    User = site.User

    @site.app.post("/users")
    def create() -> dict[str, Any]:
        user = User.create(request.get_json(), only={"name"}, is_admin=True)
        return {"id": user.id}

    client = site.app.test_client()
    assert client.post("/users", json={"name": "Bob"}).json == {"id": 2}
    assert site.onlooker.scalar("SELECT is_admin FROM \"user\" WHERE name = 'Bob'") is True
    with pytest.raises(exc.InvalidRequestError, match="'boss_id' is not named in only"):
        client.post("/users", json={"name": "Cid", "boss_id": 2})
    with pytest.raises(exc.ArgumentError, match="not 'list'"):
        client.post("/users", json=[{"name": "Cid"}])
    assert site.names() == ["Ada", "Bob"]


def test_an_error_that_a_view_handles_leaves_a_usable_session(site: Site) -> None:
    User = site.User

    @site.app.post("/users")
    def create() -> str:
        try:
            User.create(request.form, only={"name"})
        except exc.IntegrityError:
            return str(User.query.count()) + str(User.create(name="Bob").name)
        return "created"

    assert site.app.test_client().post("/users", data={"name": "Ada"}).text == "1Bob"
    assert site.names() == ["Ada", "Bob"]


def test_a_block_of_a_view_is_one_transaction(site: Site) -> None:
    User, db = site.User, site.db
    with site.app.app_context():
        with site.wire.record() as recording, db.session.begin():
            User.create(name="Bob")
            User.query.filter_by(name="Ada").one().delete()
        assert sent(recording) == [
            *("BEGIN", "INSERT user", "SELECT user", "DELETE user", "COMMIT")
        ]
        with pytest.raises(exc.IntegrityError), db.session.begin():  # noqa: PT012
            User.create(name="Cid")
            User.create(name="Bob")
    assert site.names() == ["Bob"]


def test_requests_at_the_same_time_share_no_session(site: Site) -> None:
    User = site.User
    together = threading.Barrier(4)

    @site.app.post("/users/<name>")
    def create(name: str) -> str:
        together.wait(10)
        user = User.create(name=name)
        with pytest.raises(exc.IntegrityError):
            User.create(name="Ada")
        together.wait(10)
        session = object_session(user)
        user.update(name=f"{name}!")
        return str(id(session))

    def post(name: str) -> str:
        return site.app.test_client().post(f"/users/{name}").text

    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(post, ["Bob", "Cid", "Dan", "Eve"]))
    assert len(set(found)) == 4
    assert site.names() == ["Ada", "Bob!", "Cid!", "Dan!", "Eve!"]


def test_an_object_of_an_earlier_request_can_be_saved_and_nothing_else(site: Site) -> None:
    with site.app.app_context():
        user = site.User.query.one()
        assert user.name == "Ada"
    with site.app.app_context():
        with pytest.raises(exc.InvalidRequestError, match="belongs to no session any more: get it"):
            user.update(name="Bob")
        with pytest.raises(exc.InvalidRequestError, match="belongs to no session any more: get it"):
            user.delete()
        user.name = "Bob"
        user.save()
    assert site.names() == ["Bob"]


def test_an_object_of_the_outer_context_is_refused_in_the_inner_one(site: Site) -> None:
    with site.app.app_context():
        user = site.User.query.one()
        with (
            site.app.app_context(),
            pytest.raises(exc.InvalidRequestError, match="another thread or application context"),
        ):
            user.update(name="Bob")
        user.update(name="Cid")
    assert site.names() == ["Cid"]


def test_outside_an_application_context_flask_says_so(site: Site) -> None:
    User = site.User
    user = User(name="Bob")
    for call in (user.save, user.delete, User.create, lambda: user.update(name="x")):
        with pytest.raises(RuntimeError, match=r"Working outside of application context"):
            call()
    with pytest.raises(RuntimeError, match=r"Working outside of application context"):
        _ = User.query


def test_a_model_on_another_bind_is_stored_there(
    make_app: MakeApp, url: str, server: PostgresServer, driver: str, other_database: str
) -> None:
    db = Database()

    class Here(ActiveRecordMixin, db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    class There(ActiveRecordMixin, db.Model):
        __bind_key__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True)

    other = server.url(driver, other_database)
    with make_app(db, url, SQLALCHEMY_BINDS={"other": other}).app_context():
        db.create_all()
        Here.create()
        there = There.create()
        assert not db.session().in_transaction()
        there.delete()
        assert (Here.query.count(), There.query.count()) == (1, 0)


def test_a_model_on_a_stock_bind_beside_ours_is_stored(make_app: MakeApp, url: str) -> None:
    db = Database()

    class Here(ActiveRecordMixin, db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    class Lite(ActiveRecordMixin, db.Model):
        __bind_key__ = "lite"
        id: Mapped[int] = mapped_column(primary_key=True)

    with make_app(db, url, SQLALCHEMY_BINDS={"lite": "sqlite://"}).app_context():
        db.create_all()
        assert Lite.query.count() == 0  # which begins, there
        Here.create()
        Lite.create()
        assert not db.session().in_transaction()
        db.session.rollback()
        assert (Here.query.count(), Lite.query.count()) == (1, 1)
        db.session.rollback()
        with pytest.raises(RuntimeError), db.session.begin():  # noqa: PT012
            Here.create()
            Lite.create()
            raise RuntimeError
        assert (Here.query.count(), Lite.query.count()) == (1, 1)


# -- how a model gets it -----------------------------------------------------------------------


def base() -> type[Any]:
    class Base(ActiveRecordMixin, DeclarativeBase):
        pass

    return Base


def dataclass_base() -> type[Any]:
    class Base(ActiveRecordMixin, MappedAsDataclass, DeclarativeBase):
        pass

    return Base


def flask_model() -> type[Any]:
    class Base(ActiveRecordMixin, FlaskModel):
        pass

    return Base


def mixin_itself() -> type[Any]:
    return ActiveRecordMixin


@pytest.mark.parametrize("extension", [Database, SQLAlchemy])
@pytest.mark.parametrize("make_base", [base, dataclass_base, flask_model, mixin_itself])
def test_the_mixin_may_be_in_the_model_class(
    make_app: MakeApp, url: str, extension: type[SQLAlchemy], make_base: Any
) -> None:
    if extension is SQLAlchemy and make_base is dataclass_base and sa.__version__ >= "2.1":
        return  # Flask-SQLAlchemy itself makes none of it
    db: Any = extension(model_class=make_base(), query_class=MyQuery)

    class Thing(db.Model):
        name: Mapped[str]
        id: Mapped[int] = mapped_column(primary_key=True, default=None)

    with make_app(db, url).app_context():
        db.create_all()
        thing = Thing.create(name="one")
        assert Thing.query.named("one") is thing
        thing.update(name="two").delete()
        assert db.session.query(Thing).count() == 0


@pytest.mark.parametrize("first", [True, False])
def test_the_mixin_may_come_before_or_after_db_model(
    make_app: MakeApp, url: str, first: bool
) -> None:
    db = Database(query_class=MyQuery)
    bases = (ActiveRecordMixin, db.Model) if first else (db.Model, ActiveRecordMixin)
    columns = {"id": mapped_column(sa.Integer, primary_key=True), "name": mapped_column(sa.Text)}
    Thing: Any = type("Thing", bases, columns)
    with make_app(db, url).app_context():
        db.create_all()
        thing = Thing.create(name="one")
        assert isinstance(Thing.query, MyQuery)
        assert Thing.query.named("one") is thing is thing.query.first_or_404()
        assert Thing.query.paginate(page=1, per_page=5).items == [thing]
        with pytest.raises(NotFound):
            Thing.query.filter_by(name="?").first_or_404()
        thing.update(name="two").save().delete()


def test_one_model_may_have_its_own_query_class(make_app: MakeApp, url: str) -> None:
    db = Database()

    class Thing(ActiveRecordMixin, db.Model):
        query_class = MyQuery
        id: Mapped[int] = mapped_column(primary_key=True)

    with make_app(db, url).app_context():
        assert isinstance(Thing.query, MyQuery)


def test_filter_by_or_create_goes_together_with_the_mixin(site: Site) -> None:
    with site.app.app_context():
        if site.opts_in:
            user, created = site.User.filter_by_or_create.with_created(name="Bob")
            assert created
            user.update(name="Cid")
    assert site.names() == (["Ada", "Cid"] if site.opts_in else ["Ada"])


# -- without Flask-SQLAlchemy -------------------------------------------------------------------


@pytest.mark.parametrize("through", ["session", "current_session"])
def test_models_of_a_request_scoped_session_may_have_the_mixin(url: str, through: str) -> None:
    engine = create_engine(url)
    app = Flask(__name__)
    session = flask_scoped_session(sessionmaker(engine, class_=OptInSession), app)

    class Plain(ActiveRecordMixin, DeclarativeBase):
        __scoped_session__ = session if through == "session" else lambda: current_session()

    class Thing(Plain):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    with app.app_context():
        Plain.metadata.create_all(engine)
        thing = Thing.create(name="one")
        assert object_session(thing) is session()
        assert Thing.query.filter_by(name="one").one() is thing.update(name="two")
        with app.app_context(), pytest.raises(exc.InvalidRequestError, match="another session"):
            thing.delete()
        thing.delete()
    with pytest.raises(RuntimeError, match="application context"):
        Thing.create(name="one")
    engine.dispose()


# -- types -------------------------------------------------------------------------------------


class Guest(ActiveRecordMixin, SharedModel):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def test_type_checkers_know_what_is_returned(make_app: MakeApp, url: str) -> None:
    with make_app(shared, url).app_context():
        shared.create_all()
        guest = assert_type(Guest.create(name="Ada"), Guest)
        assert_type(guest.save(), Guest)
        assert_type(guest.update(name="Bob"), Guest)
        assert_type(Guest.query, FlaskQuery)
        assert Guest.query.filter_by(name="Bob").first_or_404() is guest
        guest.delete()
