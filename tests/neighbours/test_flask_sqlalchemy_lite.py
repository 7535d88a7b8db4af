"""Flask-SQLAlchemy-Lite, with OptInSession on engines of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from flask import Flask, abort
from flask_sqlalchemy_lite import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from fictive_sqlalchemy import OptInEngine, OptInSession, engine_from_config
from fictive_sqlalchemy.testing import isolate
from tests.flask.support import sent
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Database(SQLAlchemy):
    """The extension, whose engines are replaced by ours before anybody uses them."""

    def init_app(self, app: Flask) -> None:  # type: ignore[override]
        super().init_app(app)
        with app.app_context():
            for name, engine in self.engines.items():
                given = app.config["SQLALCHEMY_ENGINES"][name]
                options = {**given} if isinstance(given, dict) else {}
                options["url"] = engine.url
                self.engines[name] = engine_from_config(options, prefix="")
            self.sessionmaker.configure(bind=self.engine)


@pytest.fixture
def make(wire_url: str) -> Iterator[Callable[[type[SQLAlchemy]], tuple[Flask, SQLAlchemy]]]:
    """``make(class)``: an application with two users, Ada and Bob."""
    with ExitStack() as cleanup:

        def make(class_: type[SQLAlchemy] = Database) -> tuple[Flask, SQLAlchemy]:
            app = Flask(__name__)
            app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": wire_url, "pool_size": 1}}
            db = class_(app, session_options={"class_": OptInSession})

            @app.get("/<int:id>")
            def name(id: int) -> str:
                return str(db.get_or_abort(User, id).name)

            @app.post("/<int:id>/<name>")
            def rename(id: int, name: str) -> str:
                user = db.get_or_abort(User, id)
                with db.session.begin():
                    user.name = name
                return "done"

            @app.errorhandler(IntegrityError)
            def taken(error: IntegrityError) -> str:
                user = db.session.get(User, 1)
                return f"{user.name} stays" if user else abort(404)

            with app.app_context():
                cleanup.callback(db.engine.dispose)
                Base.metadata.create_all(db.engine)
                db.session.add_all([User(name="Ada"), User(name="Bob")])
                db.session.commit()
            return app, db

        yield make


@pytest.fixture
def site(make: Callable[[], tuple[Flask, SQLAlchemy]]) -> tuple[Flask, SQLAlchemy]:
    return make()


def test_engines_of_flask_sqlalchemy_lite_are_ours_with_its_options(
    site: tuple[Flask, SQLAlchemy],
) -> None:
    app, db = site
    with app.app_context():
        assert isinstance(db.engine, OptInEngine)
        assert isinstance(db.engine.pool, QueuePool)
        assert db.engine.pool.size() == 1
        assert db.session.get_bind() is db.engine


def test_a_read_is_the_statement_alone(site: tuple[Flask, SQLAlchemy], wire: WireProxy) -> None:
    with wire.record() as recording:
        assert site[0].test_client().get("/1").text == "Ada"
    assert sent(recording) == ["SELECT users"]
    assert recording.round_trips == 1


def test_a_write_is_a_transaction(site: tuple[Flask, SQLAlchemy], wire: WireProxy) -> None:
    client = site[0].test_client()
    with wire.record() as recording:
        assert client.post("/1/Grace").text == "done"
    assert sent(recording) == ["SELECT users", "UPDATE users"]
    with wire.record() as recording:
        assert client.post("/1/Bob").text == "Grace stays"
    assert sent(recording) == ["SELECT users", "UPDATE users", "SELECT users"]


def test_each_session_of_flask_sqlalchemy_lite_has_transactions_of_its_own(
    site: tuple[Flask, SQLAlchemy], wire: WireProxy
) -> None:
    app, db = site
    with app.app_context(), db.session.begin():
        db.session.add(User(name="Cid"))
        db.session.flush()
        other = db.get_session("other")
        assert other.scalars(select(User.name).order_by(User.id)).all() == ["Ada", "Bob"]
        assert not other.in_transaction()


def test_flask_sqlalchemy_lite_with_its_own_engines_begins_by_itself(
    make: Callable[[type[SQLAlchemy]], tuple[Flask, SQLAlchemy]], wire: WireProxy
) -> None:
    app, _ = make(SQLAlchemy)
    with wire.record() as recording:
        assert app.test_client().get("/1").text == "Ada"
    assert recording.verbs == ["BEGIN", "SELECT", "ROLLBACK"]
    app.testing = True
    with pytest.raises(InvalidRequestError, match="are not in autocommit"):
        app.test_client().post("/1/Grace")


@pytest.mark.parametrize("by_its_own", [False, True])
def test_flask_sqlalchemy_lite_is_isolated_by_our_isolation_and_by_its_own(
    site: tuple[Flask, SQLAlchemy], by_its_own: bool
) -> None:
    app, db = site
    client = app.test_client()
    with app.app_context():
        engine = db.engine
    assert isinstance(engine, OptInEngine)
    with db.test_isolation() if by_its_own else isolate(engine):
        assert client.post("/1/Grace").text == "done"
        assert client.post("/1/Bob").text == "Grace stays"
        assert client.get("/1").text == "Grace"
    assert client.get("/1").text == "Ada"
