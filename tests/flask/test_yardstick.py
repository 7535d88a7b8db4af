"""One view with two atomic operations: what it sends when it works, and when anything fails."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, abort, jsonify, request
from flask.testing import FlaskClient
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Mapped, mapped_column, relationship, validates

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import WireProxy

# The view reads with Model.query.get(), which SQLAlchemy calls legacy.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.LegacyAPIWarning")

UTC = timezone.utc

db: Any = Database()


class Author(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    last_seen: Mapped[str | None]
    changed: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))

    __table_args__ = (
        sa.CheckConstraint("last_seen <> 'refused'"),
        sa.CheckConstraint("last_seen <> 'refused later' OR changed IS NULL"),
    )

    @validates("last_seen")
    def refuse(self, key: str, value: str) -> str:
        if value == "refused in Python":
            raise ValueError(value)
        return value


class Document(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(sa.ForeignKey(Author.id))
    title: Mapped[str]
    changed: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    author: Mapped[Author] = relationship()

    __table_args__ = (
        sa.CheckConstraint("title <> 'refused in the first block'"),
        sa.CheckConstraint("title <> 'refused in the second block' OR changed IS NULL"),
    )

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "title": self.title}


def add_views(app: Flask) -> None:
    @app.patch("/documents/<int:document_id>")
    def update_document(document_id: int) -> ResponseReturnValue:
        document = Document.query.get(document_id)
        if document is None:
            abort(404)
        with db.session.begin():
            db.session.add(document)
            document.title = request.form["title"]
            document.author.last_seen = request.args["at"]
        with db.session.begin():
            document.changed = document.author.changed = datetime.now(UTC)
        return jsonify(document.to_dict())

    @app.errorhandler(500)
    def report(error: Exception) -> ResponseReturnValue:
        # In the same session as the view, after its error, without a rollback().
        return jsonify(title=db.session.scalar(sa.select(Document.title))), 500


@pytest.fixture
def app(make_app: MakeApp, wire_url: str) -> Flask:
    app = make_app(db, wire_url)
    add_views(app)
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Document(id=1, title="first", author=Author(id=1, last_seen="then")))
    return app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture(autouse=True)
def _nothing_is_left_open(app: Flask) -> Iterator[None]:
    yield
    assert not TRANSACTION_CONNECTIONS
    with app.app_context():
        assert db.engine.pool.checkedout() == 0


def stored(app: Flask) -> tuple[str, bool, str | None, bool]:
    """The title, whether the document was changed, the author's time, whether she was changed."""
    with app.app_context(), db.engine.connect() as connection:
        query = sa.select(Document.title, Document.changed, Author.last_seen, Author.changed)
        title, changed, last_seen, author_changed = connection.execute(query.join(Author)).one()
        return title, changed is not None, last_seen, author_changed is not None


# Each block flushes the document before it loads the author, and the author at its end. The second
# block begins with expired objects. All of that is SQLAlchemy's, and the same with its own session.
FIRST_BLOCK = ["BEGIN", "UPDATE document", "SELECT author", "UPDATE author", "COMMIT"]
SECOND_BLOCK = [
    "BEGIN", "SELECT document", "UPDATE document",
    "SELECT document", "SELECT author", "UPDATE author", "COMMIT",
]  # fmt: skip


def test_the_view_sends_a_read_two_transactions_and_a_read(
    app: Flask, client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/1?at=now", data={"title": "second"})

    assert response.status_code == 200
    assert response.json == {"id": 1, "title": "second"}
    assert sent(recording) == [
        "SELECT document", *FIRST_BLOCK, *SECOND_BLOCK, "SELECT document",
    ]  # fmt: skip
    assert recording.round_trips == len(recording.statements)
    assert stored(app) == ("second", True, "now", True)


def test_the_reads_of_the_view_outside_are_the_statement_alone(
    client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        client.patch("/documents/1?at=now", data={"title": "second"})

    statuses = [message.text for message in recording.messages if message.name == "ReadyForQuery"]
    # After the first read, after both transactions and after the last read: idle, in none.
    assert statuses == ["I", *"TTTT", "I", *"TTTTTT", "I", "I"]


def test_an_object_that_is_not_found_sends_one_select(client: FlaskClient, wire: WireProxy) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/2?at=now", data={"title": "second"})

    assert response.status_code == 404
    assert sent(recording) == ["SELECT document"]
    assert recording.round_trips == 1


def test_an_error_in_the_first_block_before_any_statement_sends_nothing(
    app: Flask, client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/1", data={"title": "second"})  # no ?at=

    assert response.status_code == 400
    assert sent(recording) == ["SELECT document"]
    assert stored(app) == ("first", False, "then", False)
    assert client.patch("/documents/1?at=now", data={"title": "second"}).status_code == 200


def test_an_error_in_the_first_block_after_a_lazy_load_rolls_back(
    app: Flask, client: FlaskClient, wire: WireProxy
) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/1?at=refused+in+Python", data={"title": "second"})

    assert response.status_code == 500
    assert response.json == {"title": "first"}
    assert sent(recording) == [
        "SELECT document", *FIRST_BLOCK[:3], "ROLLBACK", "SELECT document",
    ]  # fmt: skip
    assert recording.round_trips == len(recording.statements)
    assert stored(app) == ("first", False, "then", False)
    assert client.patch("/documents/1?at=now", data={"title": "second"}).status_code == 200


@pytest.mark.parametrize(
    ("at", "title", "until"),
    [("now", "refused in the first block", 2), ("refused", "second", 4)],
    ids=["first write", "last write"],
)
def test_an_error_of_the_database_in_the_first_block_undoes_all_of_it(
    app: Flask, client: FlaskClient, wire: WireProxy, at: str, title: str, until: int
) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/1", query_string={"at": at}, data={"title": title})

    assert response.status_code == 500
    assert response.json == {"title": "first"}
    assert sent(recording) == [
        "SELECT document", *FIRST_BLOCK[:until], "ROLLBACK", "SELECT document",
    ]  # fmt: skip
    assert recording.round_trips == len(recording.statements)
    assert stored(app) == ("first", False, "then", False)
    assert client.patch("/documents/1?at=now", data={"title": "second"}).status_code == 200
    assert stored(app) == ("second", True, "now", True)


@pytest.mark.parametrize(
    ("at", "title", "until"),
    [("now", "refused in the second block", 3), ("refused later", "second", 6)],
    ids=["first write", "last write"],
)
def test_an_error_of_the_database_in_the_second_block_keeps_the_first(
    app: Flask, client: FlaskClient, wire: WireProxy, at: str, title: str, until: int
) -> None:
    with wire.record() as recording:
        response = client.patch("/documents/1", query_string={"at": at}, data={"title": title})

    assert response.status_code == 500
    assert response.json == {"title": title}
    assert sent(recording) == [
        "SELECT document", *FIRST_BLOCK, *SECOND_BLOCK[:until], "ROLLBACK", "SELECT document",
    ]  # fmt: skip
    assert recording.round_trips == len(recording.statements)
    assert stored(app) == (title, False, at, False)
    assert client.patch("/documents/1?at=now", data={"title": "third"}).status_code == 200
    assert stored(app) == ("third", True, "now", True)


def test_an_error_in_python_in_the_second_block_keeps_the_first(
    app: Flask, client: FlaskClient, wire: WireProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            raise ValueError("no time")

    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.datetime", Broken)
        with wire.record() as recording:
            response = client.patch("/documents/1?at=now", data={"title": "second"})

    assert response.status_code == 500
    assert response.json == {"title": "second"}
    # It fails before its first statement, so there is no transaction to roll back.
    assert sent(recording) == ["SELECT document", *FIRST_BLOCK, "SELECT document"]
    assert stored(app) == ("second", False, "now", False)
    assert client.patch("/documents/1?at=now", data={"title": "third"}).status_code == 200
    assert stored(app) == ("third", True, "now", True)


def test_a_backend_killed_in_the_second_block_keeps_the_first(
    app: Flask, client: FlaskClient, wire: WireProxy
) -> None:
    begun = []

    def cut_in_the_second_block(message: Any) -> None:
        begun.extend([message] if message.is_statement and message.verb == "BEGIN" else [])
        if len(begun) == 2 and message.verb == "UPDATE":
            wire.before_forward = None
            wire.cut_all()

    wire.before_forward = cut_in_the_second_block
    response = client.patch("/documents/1?at=now", data={"title": "second"})

    assert response.status_code == 500
    assert response.json == {"title": "second"}
    assert stored(app) == ("second", False, "now", False)
    assert client.patch("/documents/1?at=now", data={"title": "third"}).status_code == 200
    assert stored(app) == ("third", True, "now", True)
