"""``@db.local_settings`` and ``db.session.set_local()``: asked and set once a request."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, g, request
from flask_sqlalchemy import SQLAlchemy

from fictive_sqlalchemy.ext.flask import OptInTransactionMixin
from tests.wire import WireProxy

TENANT = sa.text("SELECT current_setting('app.tenant_id', true)")


class Database(OptInTransactionMixin, SQLAlchemy):
    pass


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def app(wire_url: str, asked: list[str]) -> Any:
    db = Database()
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = wire_url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 1, "max_overflow": 0}
    db.init_app(app)

    @db.local_settings
    def tenant() -> dict[str, Any] | None:
        asked.append(request.path)
        return {"app.tenant_id": g.tenant} if "tenant" in g else None

    @app.before_request
    def note() -> None:
        if "tenant" in request.args:
            g.tenant = request.args["tenant"]
        elif "user" in request.args:  # finding the tenant takes a read
            g.tenant = db.session.scalar(sa.select(sa.literal(request.args["user"])))

    @app.get("/read")
    def read() -> dict[str, Any]:
        first = db.session.scalar(TENANT)
        with db.session.begin():
            return {"seen": [first, db.session.scalar(TENANT)]}

    @app.get("/set")
    def by_hand() -> dict[str, Any]:
        db.session.set_local({"app.tenant_id": "by hand"})
        return {"seen": [db.session.scalar(TENANT)]}

    @app.get("/nothing")
    def nothing() -> dict[str, Any]:
        return {}

    @app.get("/atomic")
    @db.atomic_request
    def atomic() -> dict[str, Any]:
        first = db.session.scalar(TENANT)
        with db.session.begin_nested():
            return {"seen": [first, db.session.scalar(TENANT)]}

    @app.get("/anew")
    @db.atomic_request
    def begin_anew() -> dict[str, Any]:
        db.session.rollback()
        return {"seen": [db.session.scalar(TENANT)]}

    yield app
    with app.app_context():
        db.engine.dispose()


def test_each_request_has_its_own_settings(app: Flask, asked: list[str]) -> None:
    client = app.test_client()
    assert client.get("/read?tenant=7").json == {"seen": ["7", "7"]}
    assert client.get("/read?tenant=8").json == {"seen": ["8", "8"]}
    assert client.get("/read").json == {"seen": ["", ""]}
    assert client.get("/set?tenant=9").json == {"seen": ["by hand"]}
    assert client.get("/read").json == {"seen": ["", ""]}
    assert [path for path in asked if path != "/read"] == ["/set"]
    client.get("/nothing")
    assert "/nothing" not in asked


@pytest.mark.parametrize("path", ["/read", "/atomic"])
def test_the_function_is_asked_again_after_a_read_that_finds_the_tenant(
    app: Flask, asked: list[str], path: str
) -> None:
    client = app.test_client()
    assert client.get(f"{path}?user=7").json == {"seen": ["7", "7"]}
    assert client.get(f"{path}?user=8").json == {"seen": ["8", "8"]}
    assert asked == [path] * 4


def test_no_round_trip_is_sent_for_the_settings_of_a_request(app: Flask, wire: WireProxy) -> None:
    client = app.test_client()
    client.get("/read?tenant=7")
    with wire.record() as recording:
        client.get("/read?tenant=7")
    assert recording.round_trips == 4


def test_an_atomic_request_has_the_settings_that_its_own_code_has_decided(
    app: Flask, asked: list[str]
) -> None:
    """Its transaction begins before the first before_request function, where no tenant is known."""
    client = app.test_client()
    assert client.get("/atomic?tenant=7").json == {"seen": ["7", "7"]}
    assert client.get("/atomic?tenant=8").json == {"seen": ["8", "8"]}
    assert client.get("/anew?tenant=9").json == {"seen": ["9"]}
    assert asked == ["/atomic", "/atomic", "/anew"]
    assert client.get("/read").json == {"seen": ["", ""]}
