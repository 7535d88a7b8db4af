"""Flask-Login: its user loader is a read like any other."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from typing import NamedTuple

import pytest
from flask import Flask, request
from flask.testing import FlaskClient
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from sqlalchemy import String
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Mapped, mapped_column

from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import WireProxy


class Site(NamedTuple):
    """An application with a login."""

    app: Flask
    db: Database
    login_manager: LoginManager
    client: FlaskClient
    """Logged in as Ada."""


@pytest.fixture(params=[False, True], ids=["", "atomic requests"])
def is_atomic(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def site(make_app: MakeApp, wire_url: str, is_atomic: bool) -> Site:
    db = Database()
    app = make_app(db, wire_url, SECRET_KEY="secret")
    if is_atomic:
        db.atomic_requests(app)

    class User(UserMixin, db.Model):
        __tablename__ = "users"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String, unique=True)
        seen: Mapped[int] = mapped_column(default=0)

    login_manager = LoginManager(app)

    @login_manager.user_loader
    def load_user(id: str) -> User | None:
        return db.session.get(User, int(id))

    @app.post("/login/<name>")
    def login(name: str) -> tuple[str, int]:
        user = db.session.scalar(db.select(User).filter_by(name=name))
        if user is None:
            return "who?", 401
        with db.atomic():
            user.seen += 1
        login_user(user)
        return user.name, 200

    @app.get("/")
    def public() -> str:
        return "welcome"

    @app.get("/me")
    @login_required
    def me() -> str:
        return f"{current_user.name} {current_user.id}"

    @app.post("/me")
    @login_required
    def rename() -> str:
        with db.atomic():
            current_user.name = request.form["name"]
        return str(current_user.name)

    @app.post("/become/<name>")
    def become(name: str) -> str:
        block = db.atomic() if is_atomic else db.session.begin()
        with block:  # the first to ask who is logged in
            current_user.name = name
        return str(current_user.seen)

    @app.errorhandler(IntegrityError)
    def taken(error: IntegrityError) -> tuple[str, int]:
        if is_atomic:
            db.session.rollback()
        return f"taken, {current_user.name}", 409

    with app.app_context():
        db.create_all()
        db.session.add_all([User(name="Ada"), User(name="Bob")])
        db.session.commit()
    client = app.test_client()
    assert client.post("/login/Ada").text == "Ada"
    return Site(app, db, login_manager, client)


def names(site: Site) -> list[str]:
    with site.app.app_context():
        return list(site.db.session.scalars(site.db.text("SELECT name FROM users ORDER BY id")))


def test_who_is_logged_in_is_one_read(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert site.client.get("/me").text == "Ada 1"
    assert sent(recording) == ["SELECT users"]
    assert recording.round_trips == 1


def test_a_page_that_does_not_ask_sends_nothing(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert site.client.get("/").status_code == 200
        assert site.app.test_client().get("/me").status_code == 401
    assert sent(recording) == []


def test_a_login_writes_in_a_transaction(site: Site, wire: WireProxy, is_atomic: bool) -> None:
    with wire.record() as recording:
        assert site.app.test_client().post("/login/Bob").text == "Bob"
    if is_atomic:  # db.atomic() is a savepoint there, which expires nothing
        assert sent(recording) == [
            "BEGIN",
            "SELECT users",
            "SAVEPOINT",
            "UPDATE users",
            "RELEASE",
            "COMMIT",
        ]
    else:  # the last is for what the end of the transaction has expired
        assert sent(recording) == ["SELECT users", "UPDATE users", "SELECT users"]


def test_a_login_that_fails_stores_nothing(site: Site, wire: WireProxy, is_atomic: bool) -> None:
    with wire.record() as recording:
        assert site.app.test_client().post("/login/nobody").status_code == 401
    assert sent(recording) == (
        ["BEGIN", "SELECT users", "ROLLBACK"] if is_atomic else ["SELECT users"]
    )


def test_the_user_that_is_logged_in_can_be_changed(site: Site) -> None:
    assert site.client.post("/me", data={"name": "Grace"}).text == "Grace"
    assert names(site) == ["Grace", "Bob"]


def test_an_error_page_may_ask_who_is_logged_in(
    site: Site, wire: WireProxy, is_atomic: bool
) -> None:
    with wire.record() as recording:
        response = site.client.post("/me", data={"name": "Bob"})
    assert (response.status_code, response.text) == (409, "taken, Ada")
    assert names(site) == ["Ada", "Bob"]
    if not is_atomic:
        assert sent(recording) == ["SELECT users", "UPDATE users", "SELECT users"]


def note_each_visit(site: Site, *, by_commit: bool) -> None:
    """Let the user loader write."""
    load_user = site.login_manager._user_callback
    assert load_user is not None

    @site.login_manager.user_loader
    def load_and_note(id: str) -> object:
        if by_commit:
            user = load_user(id)
            user.seen += 1
            site.db.session.commit()
            return user
        with site.db.atomic():
            user = load_user(id)
            user.seen += 1
        return user


def test_a_loader_may_write_with_atomic(site: Site, wire: WireProxy, is_atomic: bool) -> None:
    note_each_visit(site, by_commit=False)
    assert site.client.get("/me").text == "Ada 1"
    with wire.record() as recording:
        assert site.client.post("/become/Eve").text == "3"
    assert names(site) == ["Eve", "Bob"]
    assert recording.verbs.count("BEGIN") == recording.verbs.count("COMMIT") == 1


def test_a_loader_that_commits_is_refused_in_the_transaction_that_asks_first(site: Site) -> None:
    note_each_visit(site, by_commit=True)
    site.app.testing = True
    with pytest.raises(InvalidRequestError, match=r"leave commit\(\) out"):
        site.client.post("/become/Eve")
    assert names(site) == ["Ada", "Bob"]
    assert site.client.get("/me").text == "Ada 1"  # no transaction is open: the loader may commit
