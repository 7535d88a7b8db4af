"""Flask-DebugToolbar: its SQLAlchemy panel shows what a request sent."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import html
import re

import pytest
from flask import request
from flask.testing import FlaskClient
from flask_debugtoolbar import DebugToolbarExtension
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.test import TestResponse

from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.wire import Recording, WireProxy


@pytest.fixture
def client(make_app: MakeApp, wire_url: str) -> FlaskClient:
    """Of an application with two users, Ada and Bob, and a toolbar under each page."""
    db = Database()
    app = make_app(
        db,
        wire_url,
        SECRET_KEY="secret",
        DEBUG_TB_ENABLED=True,
        DEBUG_TB_PANELS=["flask_debugtoolbar.panels.sqlalchemy.SQLAlchemyDebugPanel"],
        SQLALCHEMY_RECORD_QUERIES=True,
    )
    DebugToolbarExtension(app)

    class User(db.Model):
        __tablename__ = "users"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    page = "<html><body>{}</body></html>"

    @app.get("/")
    def users() -> str:
        names = db.session.scalars(db.select(User.name)).all()
        return page.format(", ".join(names))

    @app.post("/")
    def rename() -> str:
        user = db.session.get_one(User, 1)
        with db.session.begin():
            user.name = request.form["name"]
            with db.session.begin_nested():
                db.session.add(User(name=f"{user.name}'s friend"))
        return page.format("")

    @app.errorhandler(IntegrityError)
    def taken(error: IntegrityError) -> str:
        return page.format("taken")

    with app.app_context():
        db.create_all()
        db.session.add_all([User(name="Ada"), User(name="Bob")])
        db.session.commit()
    return app.test_client()


def shown(page: TestResponse) -> list[str]:
    """The statements in the panel, in order."""
    found = re.findall(r'<div class="flDebugSql">(.*?)</div>\s*</div>', page.text, re.DOTALL)
    return [" ".join(html.unescape(re.sub(r"<[^>]+>", "", one)).split()) for one in found]


def verbs(statements: list[str]) -> list[str]:
    return [statement.split()[0] for statement in statements]


def sent_by_sqlalchemy(recording: Recording) -> list[str]:
    """What was sent, but for what the driver sends by itself."""
    return [verb for verb in recording.verbs if verb not in ("BEGIN", "COMMIT", "ROLLBACK")]


def test_the_toolbar_shows_the_reads(client: FlaskClient, wire: WireProxy) -> None:
    with wire.record() as recording:
        page = client.get("/")
    assert "1 query" in page.text
    assert verbs(shown(page)) == recording.verbs == ["SELECT"]
    assert "users.name" in shown(page)[0]


def test_the_toolbar_shows_each_statement_of_a_transaction(
    client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        page = client.post("/", data={"name": "Grace"})
    assert recording.verbs == [
        "SELECT",
        "BEGIN",
        "UPDATE",
        "SAVEPOINT",
        "INSERT",
        "RELEASE",
        "COMMIT",
    ]
    assert verbs(shown(page)) == sent_by_sqlalchemy(recording)
    assert f"{len(shown(page))} queries" in page.text


def test_the_toolbar_does_not_show_what_failed(client: FlaskClient, wire: WireProxy) -> None:
    with wire.record() as recording:
        page = client.post("/", data={"name": "Bob"})
    assert recording.verbs == ["SELECT", "BEGIN", "UPDATE", "ROLLBACK"]
    assert verbs(shown(page)) == ["SELECT"]
    assert verbs(shown(client.get("/"))) == ["SELECT"]


def test_the_links_of_the_toolbar_need_sqlalchemy_1(client: FlaskClient) -> None:
    page = client.post("/", data={"name": "Grace"})
    link = re.search(r'href="(/_debug_toolbar/[^"]*sql_explain[^"]*)"', page.text)
    assert link is not None
    client.application.testing = True
    with pytest.raises(AttributeError, match="execute"):
        client.get(html.unescape(link[1]))
