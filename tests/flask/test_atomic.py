"""``db.atomic()``, ``db.on_commit()`` and retries in an application: views, requests, streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, Response
from flask.testing import FlaskClient
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.flask.scoped_session import current_session, flask_scoped_session
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.library import Onlooker, Undo
from tests.wire import WireProxy

db = Database()


class Account(db.Model):  # type: ignore[name-defined,misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Event(db.Model):  # type: ignore[name-defined,misc]
    """On a bind that is stock."""

    __bind_key__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)


class PlainBase(DeclarativeBase):
    pass


class Plain(PlainBase):
    __tablename__ = "plain"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@db.atomic
def store(name: str, *, fail: bool = False) -> str:
    """Store an account. Decorated before there is an application."""
    db.session.add(Account(name=name))
    db.session.flush()
    if fail:
        raise Undo
    return name


@pytest.fixture
def app(make_app: MakeApp, wire_url: str) -> Flask:
    app = make_app(db, wire_url, SQLALCHEMY_BINDS={"events": "sqlite://"})
    with app.app_context():
        db.create_all()
        db.session.remove()
    return app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def names(onlooker: Onlooker) -> list[str]:
    return onlooker.column("SELECT name FROM account ORDER BY name")


class TestViews:
    def test_atomic_views_call_functions_that_compose(
        self, app: Flask, client: FlaskClient, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        @db.atomic(durable=True)
        def view() -> dict[str, str]:
            with suppress(Undo):
                store("undone", fail=True)
            return {"name": store("one")}

        with wire.record() as recording:
            assert client.post("/").json == {"name": "one"}
        assert sent(recording) == [
            *("BEGIN", "SAVEPOINT", "INSERT account", "ROLLBACK TO"),
            *("SAVEPOINT", "INSERT account", "RELEASE", "COMMIT"),
        ]
        assert names(onlooker) == ["one"]

    def test_options_of_atomic_count_where_the_function_is_given_with_them(
        self, app: Flask
    ) -> None:
        atomic: Any = db.atomic
        function = atomic(lambda: None, durable=True)
        refused = pytest.raises(InvalidRequestError, match="has to be outermost")
        with app.app_context(), db.session.begin(), refused:
            function()

    def test_each_request_has_its_own_session(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        app.post("/<name>")(store)
        for name in "abc":
            assert client.post(f"/{name}").text == name
        assert client.post("/a").status_code == 500
        assert names(onlooker) == ["a", "b", "c"]

    def test_atomic_views_may_be_async(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        @db.atomic
        async def view() -> str:
            await asyncio.sleep(0)
            return store("one")

        assert client.post("/").text == "one"
        assert names(onlooker) == ["one"]

    def test_a_second_task_of_an_async_view_is_refused_in_atomic(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @db.atomic
        async def slowly(name: str) -> str:
            db.session.add(Account(name=name))
            await asyncio.sleep(0)
            return name

        @app.post("/")
        async def view() -> list[str]:
            outcomes = await asyncio.gather(slowly("one"), slowly("two"), return_exceptions=True)
            return [type(outcome).__name__ for outcome in outcomes]

        assert client.post("/").json == ["str", "InvalidRequestError"]
        assert names(onlooker) == ["one"]

    def test_an_atomic_view_that_streams_is_refused(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        @db.atomic
        def view() -> Iterator[str]:
            store("one")
            return (row.name for row in db.session.scalars(sa.select(Account)))

        app.testing = True
        with pytest.raises(TypeError, match="returned a generator"):
            client.post("/")
        assert names(onlooker) == []

    def test_a_block_that_a_stream_holds_open_is_lost_with_the_context(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        def rows() -> Iterator[str]:
            with db.atomic():
                yield store("one")

        held: list[Iterator[str]] = []

        @app.post("/")
        def view() -> str:
            held.append(rows())
            return next(held[0])

        app.testing = True
        with pytest.raises(InvalidRequestError, match="inside a transaction"):
            client.post("/")
        with pytest.raises(InvalidRequestError, match="ended inside it"):
            next(held[0])
        assert names(onlooker) == []

    def test_atomic_is_refused_in_a_view_after_a_read_on_a_stock_bind(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        def view() -> list[int]:
            before = db.session.scalars(sa.select(Event.id)).all()
            with pytest.raises(InvalidRequestError, match="by SQLAlchemy itself"):
                store("one")
            db.session.commit()
            with db.atomic():
                db.session.add(Event())
                store("two")
            return [*before, *db.session.scalars(sa.select(Event.id))]

        assert client.post("/").json == [1]
        assert names(onlooker) == ["two"]


def test_atomic_and_retry_work_with_flask_scoped_session(wire_url: str, onlooker: Onlooker) -> None:
    """With the session of a context that flask_scoped_session makes, and the proxy of it."""
    engine = create_engine(wire_url)
    sessions = flask_scoped_session(sessionmaker(engine, class_=OptInSession))
    Plain.metadata.create_all(engine)

    @sessions.atomic
    def keep(text: str) -> None:
        current_session.add(Plain(text=text))

    @retry_transaction(current_session, isolation_level="SERIALIZABLE")
    def keep_two(*texts: str) -> None:
        for text in texts:
            keep(text)
        current_session.on_commit(lambda: keep("after"))

    app = Flask(__name__)
    sessions.init_app(app)
    sessions.atomic_requests(app)

    @app.post("/")
    def view() -> str:
        keep("kept")
        with current_session.atomic():
            keep("undone")
            current_session.set_rollback()
        return "kept"

    with app.app_context():
        keep_two("one", "two")
    assert app.test_client().post("/").text == "kept"
    assert onlooker.column("SELECT text FROM plain ORDER BY id") == ["one", "two", "after", "kept"]
    engine.dispose()


def test_a_context_that_ends_in_a_transaction_only_logs_errors(
    app: Flask, onlooker: Onlooker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise Undo

    with app.app_context():
        db.session.begin()
        db.on_rollback(fail)
        store("one")
    assert "Undo" in caplog.text
    assert not db.session.registry.registry
    assert names(onlooker) == []


class TestAtomicRequests:
    def test_an_error_after_the_rollback_never_hides_that_of_the_view(
        self, app: Flask, client: FlaskClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise ZeroDivisionError("the callback's")

        @app.post("/")
        def view() -> str:
            db.on_rollback(fail)
            raise ValueError("the view's")

        app.testing = True
        with pytest.raises(ValueError, match="the view's"):
            client.post("/")
        assert "the callback's" in caplog.text

    @pytest.fixture(autouse=True)
    def _atomic_requests(self, app: Flask) -> None:
        db.atomic_requests(app)

    def test_a_block_inside_is_a_savepoint(
        self, app: Flask, client: FlaskClient, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        def view() -> str:
            with suppress(Undo):
                store("undone", fail=True)
            return store("one")

        with wire.record() as recording:
            assert client.post("/").text == "one"
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording).count("SAVEPOINT") == 2
        assert sent(recording)[-1] == "COMMIT"
        assert names(onlooker) == ["one"]

    @pytest.mark.parametrize("options", [{"durable": True}, {"read_only": True}])
    def test_what_has_to_be_outermost_is_refused_in_an_atomic_request(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker, options: dict[str, Any]
    ) -> None:
        app.post("/")(db.atomic(**options)(lambda: store("one")))
        app.testing = True
        with pytest.raises(InvalidRequestError, match="outermost"):
            client.post("/")
        assert names(onlooker) == []

    def test_set_rollback_keeps_the_response(
        self, app: Flask, client: FlaskClient, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        def view() -> str:
            store("one")
            db.set_rollback()
            return "refused, but nicely"

        with wire.record() as recording:
            response = client.post("/")
        assert (response.status_code, response.text) == (200, "refused, but nicely")
        assert sent(recording)[-1] == "ROLLBACK"
        assert names(onlooker) == []

    def test_set_rollback_in_a_block_undoes_that_block(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        def view() -> str:
            with db.atomic():
                store("undone")
                db.set_rollback()
            return store("one")

        assert client.post("/").text == "one"
        assert names(onlooker) == ["one"]

    def test_a_joined_block_whose_error_is_caught_fails_the_request(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.post("/")
        def view() -> str:
            with suppress(Undo), db.atomic(savepoint=False):
                store("one")
                raise Undo
            return "stored"

        assert client.post("/").status_code == 500
        app.testing = True
        with pytest.raises(PendingRollbackError, match="savepoint=False"):
            client.post("/")
        assert names(onlooker) == []

    def test_functions_are_called_before_the_response_leaves(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        called: list[Any] = []

        def mail() -> None:
            assert not db.session().in_transaction()
            called.append(names(onlooker))
            store("by the mail")

        @app.post("/<int:status>")
        def view(status: int) -> tuple[str, int]:
            db.on_commit(mail)
            db.on_rollback(lambda: called.append("rolled back"))
            return store("one"), status

        assert client.post("/409").status_code == 409
        assert called == ["rolled back"]
        assert client.post("/201").status_code == 201
        assert called == ["rolled back", ["one"]]
        assert names(onlooker) == ["by the mail", "one"]

    def test_a_function_that_raises_is_the_response_and_leaves_what_is_stored(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        @app.errorhandler(Undo)
        def undo(error: Undo) -> tuple[str, int]:
            return "the mail has failed", 502

        def mail() -> None:
            raise Undo

        @app.post("/")
        def view() -> str:
            db.on_commit(mail)
            return store("one")

        response = client.post("/")
        assert (response.status_code, response.text) == (502, "the mail has failed")
        assert names(onlooker) == ["one"]

    def test_a_commit_that_fails_is_handled_and_calls_on_rollback(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        called: list[str] = []

        @app.errorhandler(IntegrityError)
        def refused(error: IntegrityError) -> tuple[str, int]:
            return "there is one", 409

        @app.post("/")
        def view() -> str:
            db.on_commit(lambda: called.append("committed"))
            db.on_rollback(lambda: called.append("rolled back"))
            db.session.add(Account(name="one"))
            return "stored"

        assert client.post("/").status_code == 200
        assert client.post("/").status_code == 409
        assert called == ["committed", "rolled back"]

    def test_a_retry_is_refused_but_in_a_view_that_is_left_out(
        self, app: Flask, client: FlaskClient, onlooker: Onlooker
    ) -> None:
        retried = retry_transaction(db.session, isolation_level="SERIALIZABLE")(store)
        app.add_url_rule("/inside/<name>", "inside", lambda name: retried(name), methods=["POST"])
        outside = db.non_atomic_request(lambda name: retried(name))
        app.add_url_rule("/outside/<name>", "outside", outside, methods=["POST"])
        assert client.post("/outside/one").text == "one"
        app.testing = True
        with pytest.raises(InvalidRequestError, match="has to be outermost"):
            client.post("/inside/two")
        assert names(onlooker) == ["one"]


class TestIsolated:
    """In tests of an application, inside ``db.test_isolation()``, all is as in production."""

    @pytest.fixture(autouse=True)
    def _isolated(self, app: Flask, onlooker: Onlooker) -> Iterator[None]:
        with db.test_isolation(app, bind_keys=[None]):
            yield
        assert names(onlooker) == []

    def test_isolated_blocks_call_functions_as_in_production(
        self, app: Flask, client: FlaskClient
    ) -> None:
        called: list[str] = []

        def register(name: str) -> None:
            db.on_commit(lambda: called.append(f"{name} committed"))
            db.on_rollback(lambda: called.append(f"{name} rolled back"))

        @app.post("/")
        @db.atomic(durable=True)
        def view() -> Response:
            register("view")
            with suppress(Undo), db.atomic():
                register("inner")
                store("undone", fail=True)
            store("one")
            return Response()

        assert client.post("/").status_code == 200
        assert called == ["inner rolled back", "view committed"]
        with app.app_context():
            assert db.session.scalars(sa.select(Account.name)).all() == ["one"]

    def test_isolated_functions_are_retried(self, app: Flask) -> None:
        tries = 0

        @retry_transaction(db.session)
        def fails_once() -> int:
            nonlocal tries
            tries += 1
            store("one")
            if tries == 1:
                again = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
                db.session.execute(sa.text(again))
            return tries

        with app.app_context():
            assert fails_once() == 2
            assert db.session.scalars(sa.select(Account.name)).all() == ["one"]
