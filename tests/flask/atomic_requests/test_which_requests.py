"""The method, the application and the blueprint of a request decide whether it is atomic."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Blueprint, Flask, abort, request

from tests.flask.atomic_requests.support import UNDONE, WRITTEN, Database, House, post
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_writing_methods_are_atomic(
    house: House, wire: WireProxy, onlooker: Onlooker, method: str
) -> None:
    @house.web.route("/", methods=[method])
    def view() -> str:
        house.add()
        abort(409)

    with wire.record() as recording:
        assert house.web.test_client().open("/", method=method).status_code == 409
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_reading_methods_stay_untransacted(opt_in: House, wire: WireProxy, method: str) -> None:
    @opt_in.web.get("/")
    def view() -> str:
        for id in (1, 2):
            assert opt_in.session.get(Author, id)
        return "read"

    with wire.record() as recording:
        assert opt_in.web.test_client().open("/", method=method).status_code == 200
    assert sent(recording) == ["SELECT", "SELECT"]


def test_options_sends_nothing(house: House, wire: WireProxy) -> None:
    house.owner.atomic_requests(house.web, methods=["OPTIONS"])

    @house.web.post("/")
    def view() -> str:
        return ""

    with wire.record() as recording:
        assert house.web.test_client().options("/").status_code == 200
    assert recording.messages == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_get_includes_head(house: House, wire: WireProxy, method: str) -> None:
    house.owner.atomic_requests(house.web, methods=["get"])

    @house.web.get("/")
    def view() -> str:
        house.add()
        return ""

    with wire.record() as recording:
        assert house.web.test_client().open("/", method=method).status_code == 200
    assert sent(recording) == WRITTEN


def test_other_methods_may_be_atomic(plain: House, wire: WireProxy) -> None:
    plain.owner.atomic_requests(plain.web, methods={"put"})

    @plain.web.route("/", methods=["PUT", "POST"])
    def view() -> str:
        plain.add(request.method)
        return ""

    client = plain.web.test_client()
    with wire.record() as recording:
        assert client.put("/").status_code == 200
    assert sent(recording) == WRITTEN
    with wire.record() as recording:
        assert client.post("/").status_code == 200
    assert sent(recording) == (UNDONE if plain.kind == "stock" else ["INSERT"])  # of its flush()


def test_without_opting_in_nothing_changes(plain: House, wire: WireProxy) -> None:
    @plain.web.post("/")
    def view() -> str:
        plain.session.add(Author(name="own"))
        plain.session.commit()
        plain.session.add(Author(name="other"))
        return ""

    with wire.record() as recording:
        assert post(plain)[0] == 200
    assert sent(recording) == plain.written_alone


def test_a_request_that_does_not_use_the_database_sends_nothing(
    house: House, wire: WireProxy
) -> None:
    @house.web.post("/")
    def view() -> str:
        return "nothing"

    with wire.record() as recording:
        assert post(house) == (200, "nothing")
        assert post(house, "/no-such-page")[0] == 404
        assert house.web.test_client().put("/").status_code == 405
    assert recording.messages == []


def test_a_page_for_no_route_may_read(house: House, wire: WireProxy) -> None:
    @house.web.errorhandler(404)
    def handle(error: Exception) -> tuple[str, int]:
        author = house.session.get(Author, 1)
        assert author
        return author.name, 404

    with wire.record() as recording:
        assert post(house, "/no-such-page") == (404, "Ada")
    assert sent(recording) == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a_blueprint_opts_in_for_those_in_it(plain: House, wire: WireProxy) -> None:
    api, inner = Blueprint("api", "api", url_prefix="/api"), Blueprint("inner", "inner")
    twice = Blueprint("twice", "twice")
    other = Blueprint("other", "other", url_prefix="/other")
    plain.owner.atomic_requests(api)
    plain.owner.atomic_requests(twice)

    def view() -> tuple[str, int]:
        plain.session.add(Author(name="new"))
        plain.session.flush()
        return "", 409

    for blueprint in (api, twice, other):
        blueprint.post("/")(view)
    inner.post("/inner")(view)
    api.register_blueprint(inner)
    other.register_blueprint(twice, url_prefix="/twice")
    for blueprint in (api, other):
        plain.web.register_blueprint(blueprint)
    plain.web.register_blueprint(twice, url_prefix="/again", name="again")
    plain.web.post("/")(view)

    for path in ("/api/", "/api/inner", "/other/twice/", "/again/"):
        with wire.record() as recording:
            assert post(plain, path)[0] == 409
        assert sent(recording) == UNDONE, path
    for path in ("/", "/other/"):
        with wire.record() as recording:
            assert post(plain, path)[0] == (409 if plain.kind == "stock" or path == "/" else 500)
        assert sent(recording) == (UNDONE if plain.kind == "stock" else ["INSERT"])


def test_a_blueprint_may_opt_in_for_two_applications(plain: House, wire: WireProxy) -> None:
    api = Blueprint("api", "api")
    plain.owner.atomic_requests(api)

    @api.post("/")
    def view() -> tuple[str, int]:
        plain.add()
        return "", 409

    second = Flask("second")
    second.config["SQLALCHEMY_DATABASE_URI"] = plain.url
    plain.extension.init_app(second)
    for web in (plain.web, second):
        web.register_blueprint(api)
    assert plain.web.test_client().post("/").status_code == 409
    with second.app_context():
        plain.session.get(Author, 1)
    with wire.record() as recording:
        assert second.test_client().post("/").status_code == 409
    assert sent(recording) == UNDONE
    if plain.kind == "db":
        with second.app_context():
            plain.extension.engine.dispose()


def test_application_and_blueprints_opted_in_is_one_transaction(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    outer, inner = Blueprint("outer", "outer"), Blueprint("inner", "inner")
    house.owner.atomic_requests(house.web)
    house.owner.atomic_requests(outer)
    house.owner.atomic_requests(inner, methods=["POST"])

    @inner.post("/")
    @house.owner.atomic_request
    def view() -> str:
        house.add()
        return "stored"

    outer.register_blueprint(inner)
    house.web.register_blueprint(outer)
    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == WRITTEN


def test_each_call_adds_methods(plain: House, wire: WireProxy) -> None:
    plain.owner.atomic_requests(plain.web, methods=["PUT"])
    plain.owner.atomic_requests(plain.web, methods=["DELETE"])

    @plain.web.route("/", methods=["PUT", "DELETE"])
    def view() -> str:
        plain.add()
        abort(400)

    for method in ("PUT", "DELETE"):
        with wire.record() as recording:
            assert plain.web.test_client().open("/", method=method).status_code == 400
        assert sent(recording) == UNDONE


def test_an_application_may_opt_in_before_it_is_initialised(
    filled: str, wire_url: str, wire: WireProxy
) -> None:
    db: Any = Database()
    web = Flask("late")
    web.config["SQLALCHEMY_DATABASE_URI"] = wire_url
    db.atomic_requests(web)
    db.init_app(web)

    @web.post("/")
    def view() -> str:
        db.session.add(Author(name="new"))
        return ""

    with web.app_context():
        db.engine.connect().close()
    with wire.record() as recording:
        assert web.test_client().post("/").status_code == 200
    assert sent(recording) == ["INSERT"]
    with web.app_context():
        db.engine.dispose()
