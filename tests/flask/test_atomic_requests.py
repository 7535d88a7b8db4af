"""A request is one transaction, which the status of its response ends: checked on the wire.

Each test runs with Flask-SQLAlchemy, with plain SQLAlchemy and our session, and with plain
SQLAlchemy and its own session, unless it says otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial, wraps
from typing import Any

import pytest
import sqlalchemy as sa
from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    after_this_request,
    copy_current_request_context,
    flash,
    g,
    got_request_exception,
    redirect,
    request,
    stream_with_context,
)
from flask import (
    session as cookie,
)
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from flask.typing import ResponseReturnValue
from flask.views import MethodView, View
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from werkzeug.exceptions import HTTPException

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import OptInTransactionMixin, flask_scoped_session
from fictive_sqlalchemy.ext.flask.atomic_requests import AtomicRequestsMixin
from tests.library import Author, Document, Onlooker, Seat, assert_at_rest, checked_out, fill, sent
from tests.wire import WireProxy

WRITTEN = ["BEGIN", "INSERT", "COMMIT"]
UNDONE = ["BEGIN", "INSERT", "ROLLBACK"]


class Database(OptInTransactionMixin, SQLAlchemy):
    pass


class House:
    """An application with an extension or a scoped session; engines are disposed of at the end.

    :param kind: ``"db"``, ``"scoped"`` or ``"stock"``.
    """

    def __init__(self, kind: str, url: str, **engine_options: Any) -> None:
        self.kind = kind
        self.url = url
        self.web = Flask(__name__)
        self.web.secret_key = "secret"
        self.extension: Any
        self.session: scoped_session[Any]
        self.engine: sa.Engine
        if kind == "db":
            self.web.config["SQLALCHEMY_DATABASE_URI"] = url
            self.web.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options
            self.extension = Database(self.web)
            self.session = self.extension.session
            with self.web.app_context():
                self.engine = self.extension.engine
        else:
            sessions: sessionmaker[Any]
            if kind == "scoped":
                self.engine = create_engine(url, **engine_options)
                sessions = sessionmaker(self.engine, class_=OptInSession)
            else:
                self.engine = sa.create_engine(url, **engine_options)
                sessions = sessionmaker(self.engine)
            self.extension = self.session = flask_scoped_session(sessions, self.web)
        self.owner: AtomicRequestsMixin = self.extension
        self.engine.connect().close()  # SQLAlchemy asks the server for its version, and the like

    def add(self, name: str = "new") -> None:
        self.session.add(Author(name=name))
        self.session.flush()

    def close(self) -> None:
        if isinstance(self.engine, OptInEngine):
            assert_at_rest(self.engine)
        else:
            assert checked_out(self.engine) == 0
        self.engine.dispose()


@pytest.fixture
def filled(url: str) -> str:
    fill(url)
    return url


@pytest.fixture
def onlooker(filled: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(filled)
    yield onlooker
    onlooker.close()


def open_house(kind: str, url: str) -> Iterator[House]:
    house = House(kind, url)
    yield house
    house.close()


@pytest.fixture(params=["db", "scoped", "stock"])
def plain(request: pytest.FixtureRequest, filled: str, wire_url: str) -> Iterator[House]:
    """A house that has not opted in."""
    yield from open_house(request.param, wire_url)


@pytest.fixture
def house(plain: House) -> House:
    plain.owner.atomic_requests(plain.web)
    return plain


@pytest.fixture(params=["db", "scoped"])
def opt_in(request: pytest.FixtureRequest, filled: str, wire_url: str) -> Iterator[House]:
    """A house whose reads are untransacted; it has opted in."""
    for house in open_house(request.param, wire_url):
        house.owner.atomic_requests(house.web)
        yield house


def post(house: House, path: str = "/", **options: Any) -> tuple[int, str]:
    response = house.web.test_client().post(path, **options)
    return response.status_code, response.text


# -- The status decides ---------------------------------------------------------------------------


def test_a_request_below_400_commits(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")
        house.add("two")
        assert onlooker.names() == []
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert onlooker.names() == ["one", "two"]


def test_what_is_pending_is_stored(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.session.add(Author(name="pending"))
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == WRITTEN
    assert onlooker.names() == ["pending"]


@pytest.mark.parametrize("status", [200, 201, 204, 301, 302, 304, 307, 399])
def test_each_status_below_400_commits(house: House, onlooker: Onlooker, status: int) -> None:
    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add()
        return "", status

    assert post(house)[0] == status
    assert onlooker.names() == ["new"]


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 503])
def test_each_status_from_400_rolls_back(
    house: House, wire: WireProxy, onlooker: Onlooker, status: int
) -> None:
    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add()
        return "no", status

    with wire.record() as recording:
        assert post(house) == (status, "no")
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


def test_a_redirect_commits(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> ResponseReturnValue:
        house.add()
        return redirect("/elsewhere")

    assert post(house)[0] == 302
    assert onlooker.names() == ["new"]


def test_a_not_modified_by_condition_commits(house: House, onlooker: Onlooker) -> None:
    house.owner.atomic_requests(house.web, methods=["GET"])

    @house.web.get("/")
    def view() -> Response:
        house.add()
        response = Response("same")
        response.set_etag("tag")
        return response.make_conditional(request)  # type: ignore[return-value]

    client = house.web.test_client()
    assert client.get("/", headers={"If-None-Match": '"tag"'}).status_code == 304
    assert onlooker.names() == ["new"]


def test_abort_rolls_back(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        abort(409)

    with wire.record() as recording:
        assert post(house)[0] == 409
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


def test_an_abort_that_redirects_commits(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        abort(redirect("/elsewhere"))

    assert post(house)[0] == 302
    assert onlooker.names() == ["new"]


def test_an_exception_rolls_back(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        raise ValueError

    with wire.record() as recording:
        assert post(house)[0] == 500
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


def test_an_exception_that_propagates_rolls_back(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        raise ValueError

    with wire.record() as recording, pytest.raises(ValueError, match=r"^$"):
        post(house)
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_rolls_back(
    house: House, wire: WireProxy, onlooker: Onlooker, error: type[BaseException]
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        raise error

    with wire.record() as recording, pytest.raises(error):
        post(house)
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize(("status", "stored"), [(422, []), (503, []), (302, ["new"])])
def test_the_page_of_an_error_handler_decides(
    house: House, wire: WireProxy, onlooker: Onlooker, status: int, stored: list[str]
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        raise ValueError("a reason")

    @house.web.errorhandler(ValueError)
    def handle(error: ValueError) -> tuple[str, int]:
        assert onlooker.names() == []
        return str(error), status

    with wire.record() as recording:
        assert post(house) == (status, "a reason")
    assert sent(recording) == (WRITTEN if stored else UNDONE)
    assert onlooker.names() == stored


def test_an_error_handler_of_http_errors_rolls_back(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        abort(404)

    @house.web.errorhandler(HTTPException)
    def handle(error: HTTPException) -> tuple[str, int]:
        return f"as JSON: {error.code}", error.code or 500

    assert post(house) == (404, "as JSON: 404")
    assert onlooker.names() == []


def test_a_handler_of_500_runs_after_the_rollback_and_may_write(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("Ada")  # there is one already
        return "never"

    @house.web.errorhandler(500)
    def handle(error: Exception) -> tuple[str, int]:
        house.session.add(Author(name="noted"))
        house.session.commit()
        return "sorry", 500

    with wire.record() as recording:
        assert post(house) == (500, "sorry")
    assert sent(recording) == [*UNDONE, *WRITTEN]
    assert onlooker.names() == ["noted"]


@pytest.mark.parametrize("status", [200, 202, 302, 409, 500])
def test_an_exception_that_a_view_reports_to_others_decides_nothing(
    house: House, wire: WireProxy, onlooker: Onlooker, status: int
) -> None:
    """The signal of Flask's tells error trackers of an error that the view has caught."""
    tracked: list[Any] = []

    def track(app: Flask, exception: Exception) -> None:
        tracked.append(exception)

    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add("before")
        error = ValueError("caught")
        got_request_exception.send(house.web, exception=error)
        house.add("after")
        with pytest.raises(InvalidRequestError, match="leave commit"):
            house.session.commit()
        assert onlooker.names() == []
        return "", status

    with got_request_exception.connected_to(track, house.web), wire.record() as recording:
        assert post(house)[0] == status
    end = "COMMIT" if status < 400 else "ROLLBACK"
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", end]
    assert onlooker.names() == (["after", "before"] if status < 400 else [])
    assert len(tracked) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("status", [202, 302, 409, 500])
def test_an_extension_that_answers_errors_by_itself_as_flask_restful_does(
    plain: House, wire: WireProxy, onlooker: Onlooker, status: int, when: str
) -> None:
    """It puts itself in the place of two methods, sends the signal, and makes a response."""
    web = plain.web

    def answer(error: Exception) -> Response:
        got_request_exception.send(web, exception=error)
        plain.add("by the answer")
        return web.make_response((str(error), status))

    def replace_the_methods() -> None:
        for method in ("handle_exception", "handle_user_exception"):
            setattr(web, method, answer)

    if when == "before":
        replace_the_methods()
    plain.owner.atomic_requests(web)
    if when == "after":
        replace_the_methods()

    @web.post("/")
    def view() -> str:
        plain.add("by the view")
        raise ValueError("a reason")

    with wire.record() as recording:
        assert post(plain) == (status, "a reason")
    end = "COMMIT" if status < 400 else "ROLLBACK"
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", end]
    assert onlooker.names() == (["by the answer", "by the view"] if status < 400 else [])


# -- Which requests -------------------------------------------------------------------------------


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


def test_other_methods(plain: House, wire: WireProxy) -> None:
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
    assert sent(recording) == (UNDONE if plain.kind == "stock" else WRITTEN)  # of its own flush()


def test_without_opting_in_nothing_changes(plain: House, wire: WireProxy) -> None:
    @plain.web.post("/")
    def view() -> str:
        plain.session.add(Author(name="own"))
        plain.session.commit()
        plain.session.add(Author(name="other"))
        return ""

    with wire.record() as recording:
        assert post(plain)[0] == 200
    assert sent(recording) == WRITTEN


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


def test_a_blueprint_and_those_in_it(plain: House, wire: WireProxy) -> None:
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
        assert sent(recording) == (UNDONE if plain.kind == "stock" or path != "/" else WRITTEN)


def test_a_blueprint_in_two_applications(plain: House, wire: WireProxy) -> None:
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


def test_before_the_application_is_initialised(filled: str, wire_url: str, wire: WireProxy) -> None:
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
    assert sent(recording) == WRITTEN
    with web.app_context():
        db.engine.dispose()


# -- Marks ----------------------------------------------------------------------------------------


def other_decorator(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return wrapped


def other_async_decorator(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        return await view(*args, **kwargs)

    return wrapped


def test_a_view_opts_in(plain: House, wire: WireProxy, onlooker: Onlooker) -> None:
    """It needs no atomic_requests()."""

    @plain.web.get("/")
    @plain.owner.atomic_request
    def view() -> str:
        plain.add("one")
        plain.add("two")
        abort(int(request.args["status"]))

    for method in ("GET", "HEAD"):
        with wire.record() as recording:
            response = plain.web.test_client().open("/?status=409", method=method)
        assert response.status_code == 409
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
    assert onlooker.names() == []


def test_a_view_opts_out(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    @house.owner.non_atomic_request
    def view() -> str:
        for name in ("one", "two"):
            with house.session.begin():
                house.session.add(Author(name=name))
        abort(409)

    with wire.record() as recording:
        assert post(house)[0] == 409
    assert sent(recording) == [*WRITTEN, *WRITTEN]
    assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize("order", ["above", "below", "twice", "after the route"])
def test_marks_among_other_decorators(house: House, wire: WireProxy, order: str) -> None:
    out = house.owner.non_atomic_request

    def view() -> str:
        with house.session.begin():
            house.session.add(Author(name="new"))
        abort(409)

    decorated: Any = view
    if order == "above":
        decorated = out(other_decorator(view))
    elif order == "below":
        decorated = other_decorator(out(view))
    elif order == "twice":
        decorated = out(other_decorator(house.owner.atomic_request(view)))
    house.web.post("/")(decorated)
    if order == "after the route":
        out(decorated)
    with wire.record() as recording:
        assert post(house)[0] == 409
    assert sent(recording) == WRITTEN


def test_marks_on_classes_and_their_methods(house: House, wire: WireProxy) -> None:
    owner, session = house.owner, house.session

    class Resource(MethodView):
        @owner.atomic_request
        def get(self) -> str:
            session.add(Author(name="new"))
            session.flush()
            abort(409)

        def post(self) -> str:
            session.add(Author(name="new"))
            session.flush()
            abort(409)

        @owner.non_atomic_request
        def put(self) -> str:
            with session.begin():
                session.add(Author(name="put"))
            abort(409)

    @owner.non_atomic_request
    class Own(View):
        methods = ("POST", "PUT")

        def dispatch_request(self) -> str:
            with session.begin():
                session.add(Author(name=self.name()))
            abort(409)

        def name(self) -> str:
            return "own" + request.method

    class Inherits(Own):
        def name(self) -> str:
            return "inherited" + request.method

    @owner.atomic_request
    class Again(Inherits):
        def dispatch_request(self) -> str:
            session.add(Author(name="again"))
            session.flush()
            abort(409)

    class Mixed(Resource):
        @owner.non_atomic_request
        def post(self) -> str:
            with session.begin():
                session.add(Author(name="mixed"))
            abort(409)

    class Single(View):
        methods = ("POST",)

        @owner.non_atomic_request
        def dispatch_request(self) -> str:
            with session.begin():
                session.add(Author(name="single"))
            abort(409)

    class Decorated(Single):
        decorators = [owner.non_atomic_request]  # noqa: RUF012

    house.web.add_url_rule("/resource", view_func=Resource.as_view("resource"))
    house.web.add_url_rule("/own", view_func=other_decorator(Own.as_view("own")))
    house.web.add_url_rule("/inherits", view_func=Inherits.as_view("inherits"))
    house.web.add_url_rule("/again", view_func=Again.as_view("again"))
    house.web.add_url_rule("/mixed", view_func=Mixed.as_view("mixed"))
    house.web.add_url_rule("/single", view_func=Single.as_view("single"))
    house.web.add_url_rule("/decorated", view_func=Decorated.as_view("decorated"))
    client = house.web.test_client()

    def run(method: str, path: str) -> list[str]:
        with wire.record() as recording:
            assert client.open(path, method=method).status_code == 409
        return sent(recording)

    assert run("GET", "/resource") == UNDONE
    assert run("HEAD", "/resource") == UNDONE
    assert run("POST", "/resource") == UNDONE
    assert run("PUT", "/resource") == WRITTEN
    assert run("POST", "/own") == WRITTEN
    assert run("PUT", "/own") == WRITTEN
    assert run("POST", "/inherits") == WRITTEN
    assert run("POST", "/again") == UNDONE
    assert run("POST", "/mixed") == WRITTEN
    assert run("GET", "/mixed") == UNDONE
    assert run("POST", "/single") == WRITTEN


def test_async_views(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/<name>/<int:status>")
    async def view(name: str, status: int) -> tuple[str, int]:
        house.add(name)
        return "", status

    @house.web.post("/out")
    @house.owner.non_atomic_request
    async def out() -> str:
        with house.session.begin():
            house.session.add(Author(name="out"))
        abort(409)

    @house.web.get("/in")
    @other_async_decorator
    @house.owner.atomic_request
    async def in_() -> str:
        house.add("in")
        abort(409)

    for path, status, verbs in (
        ("/one/200", 200, WRITTEN),
        ("/two/409", 409, UNDONE),
        ("/out", 409, WRITTEN),
    ):
        with wire.record() as recording:
            assert post(house, path)[0] == status
        assert sent(recording) == verbs
    with wire.record() as recording:
        assert house.web.test_client().get("/in").status_code == 409
    assert sent(recording) == UNDONE
    assert onlooker.names() == ["one", "out"]


def test_a_mark_is_for_its_own_extension(
    filled: str, wire_url: str, wire: WireProxy, onlooker: Onlooker
) -> None:
    house = House("db", wire_url)
    house.owner.atomic_requests(house.web)
    other = flask_scoped_session(sessionmaker(house.engine, class_=OptInSession), house.web)

    @house.web.post("/")
    @other.non_atomic_request
    def view() -> str:
        house.add()
        with other.begin():
            other.add(Author(name="other"))
        abort(409)

    assert post(house)[0] == 409
    assert onlooker.names() == ["other"]
    house.close()


# -- A commit that fails --------------------------------------------------------------------------


def two_in_one_seat(house: House) -> None:
    """What COMMIT refuses, and nothing before it."""
    house.session.add_all([Seat(place=1), Seat(place=1)])
    house.session.flush()


def test_a_commit_that_fails_is_a_500(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        two_in_one_seat(house)
        return "stored"

    with wire.record() as recording:
        status, text = post(house)
    assert status == 500
    assert "stored" not in text
    assert [*sent(recording)[:2], sent(recording)[-1]] == WRITTEN
    assert onlooker.names() == []
    assert onlooker.scalar("SELECT count(*) FROM seat") == 0


def test_a_commit_that_fails_propagates_when_testing(house: House, onlooker: Onlooker) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        two_in_one_seat(house)
        return "stored"

    with pytest.raises(IntegrityError):
        post(house)
    assert onlooker.scalar("SELECT count(*) FROM seat") == 0


def test_a_pending_change_that_the_database_refuses_is_a_failing_commit(
    house: House, onlooker: Onlooker
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.session.add(Author(name="new"))
        house.session.add(Author(name="Ada"))  # there is one already
        return "stored"

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> tuple[str, int]:
        return "taken", 409

    assert post(house) == (409, "taken")
    assert onlooker.names() == []


def test_a_commit_that_fails_goes_to_the_error_handlers_of_the_application(
    house: House, onlooker: Onlooker
) -> None:
    order: list[str] = []

    @house.web.post("/")
    def view() -> Response:
        two_in_one_seat(house)
        cookie["name"] = "value"

        @after_this_request
        def this(response: Response) -> Response:
            order.append(f"this {response.status_code}")
            return response

        response = Response("stored", headers={"X-Stored": "yes"})
        response.call_on_close(lambda: order.append("closed"))
        return response

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> tuple[str, int]:
        order.append("handler")
        assert house.session.get(Author, 1)
        assert onlooker.scalar("SELECT count(*) FROM seat") == 0
        return "taken", 409

    @house.web.after_request
    def after(response: Response) -> Response:
        order.append(f"after {response.status_code}")
        response.headers.add("X-After", "yes")
        return response

    response = house.web.test_client().post("/")
    assert (response.status_code, response.text) == (409, "taken")
    assert "X-Stored" not in response.headers
    assert response.headers.getlist("X-After") == ["yes"]
    assert len(response.headers.getlist("Set-Cookie")) == 1
    assert order == ["this 200", "after 200", "handler", "closed", "this 409", "after 409"]


def test_an_error_handler_for_a_failing_commit_may_write(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    @house.web.post("/")
    def view() -> str:
        two_in_one_seat(house)
        return "stored"

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> str:
        with house.session.begin():
            house.session.add(Author(name="noted"))
        return "noted"

    assert post(house) == (200, "noted")
    assert onlooker.names() == ["noted"]


def test_a_failing_commit_and_a_handler_of_500(house: House) -> None:
    @house.web.post("/")
    def view() -> str:
        two_in_one_seat(house)
        return "stored"

    @house.web.errorhandler(500)
    def handle(error: Any) -> tuple[str, int]:
        return type(error.original_exception).__name__, 500

    assert post(house) == (500, "IntegrityError")


def test_a_failing_commit_and_a_handler_that_fails(house: House) -> None:
    @house.web.post("/")
    def view() -> str:
        two_in_one_seat(house)
        return "stored"

    @house.web.errorhandler(IntegrityError)
    def handle(error: Any) -> tuple[str, int]:
        raise ValueError

    assert post(house)[0] == 500


def test_a_serialization_failure_is_no_200(filled: str, wire_url: str, onlooker: Onlooker) -> None:
    """The two requests each read what the other writes; the second COMMIT fails."""
    house = House("scoped", wire_url, isolation_level="SERIALIZABLE")
    house.owner.atomic_requests(house.web)
    both_have_read = threading.Barrier(2)

    @house.web.post("/<int:id>")
    def view(id: int) -> str:
        ages = house.session.scalars(sa.select(Author.age)).all()
        both_have_read.wait(30)
        house.session.execute(
            sa.update(Author).where(Author.id == id).values(age=sum(map(int, filter(None, ages))))
        )
        return "stored"

    @house.web.errorhandler(OperationalError)
    def handle(error: Exception) -> tuple[str, int]:
        return "try again", 503

    answers: list[tuple[int, str]] = []
    threads = [
        threading.Thread(target=lambda id=id: answers.append(post(house, f"/{id}")))
        for id in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(200, "stored"), (503, "try again")]
    assert onlooker.scalar("SELECT count(*) FROM author WHERE age = 90") == 1
    house.close()


@pytest.mark.parametrize("how", ["flush", "statement", "read"])
def test_a_swallowed_error_of_the_database_is_no_200(
    house: House, onlooker: Onlooker, how: str
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("new")
        with suppress(DBAPIError):
            if how == "flush":
                house.add("Ada")
            elif how == "statement":
                house.session.execute(sa.insert(Author).values(name="Ada"))
            else:
                house.session.execute(sa.text("SELECT 1/0"))
        return "stored"

    errors: list[BaseException] = []

    @house.web.errorhandler(Exception)
    def handle(error: Exception) -> tuple[str, int]:
        errors.append(error)
        return "not stored", 500

    assert post(house) == (500, "not stored")
    assert [type(error) for error in errors] == [PendingRollbackError]
    assert onlooker.names() == []


@pytest.mark.parametrize("status", [200, 409])
def test_a_server_that_has_gone(house: House, onlooker: Onlooker, status: int) -> None:
    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add()
        onlooker.kill(house.session.scalar(sa.text("SELECT pg_backend_pid()")))
        return "no", status

    @house.web.get("/")
    def again() -> str:
        author = house.session.get(Author, 1)
        assert author
        return author.name

    assert post(house)[0] == (500 if status == 200 else 409)
    assert onlooker.names() == []
    house.engine.dispose()
    assert house.web.test_client().get("/").text == "Ada"


# -- Order ----------------------------------------------------------------------------------------


def test_all_functions_around_the_view_run_inside(
    plain: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    """Whether they are registered before or after atomic_requests()."""
    web, api = plain.web, Blueprint("api", "api")
    seen: list[str] = []

    def before(name: str) -> None:
        seen.append(name)
        plain.add(name)

    def after(name: str, response: Response) -> Response:
        seen.append(name)
        plain.add(name)
        assert onlooker.names() == []
        return response

    web.before_request(partial(before, "1 early"))
    web.after_request(partial(after, "9 early"))
    plain.owner.atomic_requests(web)
    web.before_request(partial(before, "2 late"))
    web.after_request(partial(after, "8 late"))
    api.before_app_request(partial(before, "3 of all"))
    api.after_app_request(partial(after, "7 of all"))
    api.before_request(partial(before, "4 of the blueprint"))
    api.after_request(partial(after, "6 of the blueprint"))

    @api.post("/")
    def view() -> str:
        after_this_request(partial(after, "5 this"))
        return "stored"

    web.register_blueprint(api)
    with wire.record() as recording:
        assert post(plain) == (200, "stored")
    assert sent(recording) == ["BEGIN", *["INSERT"] * 9, "COMMIT"]
    assert onlooker.names() == seen == sorted(seen)


@pytest.mark.parametrize("where", ["application", "this"])
@pytest.mark.parametrize(("status", "stored"), [(409, []), (200, ["new"])])
def test_the_status_that_an_after_request_function_sets_counts(
    house: House, onlooker: Onlooker, where: str, status: int, stored: list[str]
) -> None:
    def change(response: Response) -> Response:
        response.status_code = status
        return response

    if where == "application":
        house.web.after_request(change)

    @house.web.post("/")
    def view() -> tuple[str, int]:
        if where == "this":
            after_this_request(change)
        house.add()
        return "", 200 if status == 409 else 409

    assert post(house)[0] == status
    assert onlooker.names() == stored


@pytest.mark.parametrize("where", ["application", "this"])
def test_an_after_request_function_that_fails_rolls_back(
    house: House, wire: WireProxy, onlooker: Onlooker, where: str
) -> None:
    def fail(response: Response) -> Response:
        if response.status_code == 200:
            raise ValueError
        return response

    if where == "application":
        house.web.after_request(fail)

    @house.web.post("/")
    def view() -> str:
        if where == "this":
            after_this_request(fail)
        house.add()
        return ""

    with wire.record() as recording:
        assert post(house)[0] == 500
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize(("status", "stored"), [(302, ["new"]), (401, [])])
def test_a_before_request_function_that_answers(
    house: House, onlooker: Onlooker, status: int, stored: list[str]
) -> None:
    @house.web.before_request
    def answer() -> tuple[str, int]:
        house.add()
        return "early", status

    assert post(house) == (status, "early")
    assert onlooker.names() == stored


def test_a_before_request_function_that_fails(house: House, onlooker: Onlooker) -> None:
    @house.web.before_request
    def answer() -> None:
        house.add()
        abort(403)

    assert post(house)[0] == 403
    assert onlooker.names() == []


def test_teardown_functions_run_outside(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    seen: list[Any] = []

    @house.web.teardown_request
    def teardown(error: BaseException | None) -> None:
        seen.append(onlooker.names())
        with house.session.begin():
            house.session.add(Author(name=f"teardown {len(seen)}"))

    @house.web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        house.add("new")
        return "", status

    with wire.record() as recording:
        assert post(house, "/409")[0] == 409
        assert post(house, "/200")[0] == 200
    assert sent(recording) == [*UNDONE, *WRITTEN, *WRITTEN, *WRITTEN]
    assert seen == [[], ["new", "teardown 1"]]


def test_a_session_interface_that_stores_in_the_database(house: House, onlooker: Onlooker) -> None:
    """Flask saves its session after the end: also when the request has been rolled back."""

    class Stores(SecureCookieSessionInterface):
        def save_session(self, app: Flask, session: Any, response: Response) -> None:
            assert isinstance(session, SecureCookieSession)
            if session.modified:
                house.session.add(Author(name=f"saved {session['name']}"))
                house.session.commit()

    house.web.session_interface = Stores()

    @house.web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        cookie["name"] = status
        house.add("new")
        return "", status

    assert post(house, "/409")[0] == 409
    assert onlooker.names() == ["saved 409"]
    assert post(house, "/200")[0] == 200
    assert onlooker.names() == ["new", "saved 200", "saved 409"]


def test_the_cookie_is_set_once(house: House) -> None:
    @house.web.post("/")
    def view() -> str:
        flash("stored")
        house.add()
        return ""

    response = house.web.test_client().post("/")
    assert len(response.headers.getlist("Set-Cookie")) == 1


# -- Inside ---------------------------------------------------------------------------------------


def test_begin_inside_points_at_savepoints(house: House, onlooker: Onlooker) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        with house.session.begin():
            raise AssertionError("never comes here")

    message = "already begun" if house.kind == "stock" else r"already begun.*begin_nested\(\)"
    with pytest.raises(InvalidRequestError, match=message):
        post(house)
    assert onlooker.names() == []


def test_savepoints(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")
        with suppress(IntegrityError), house.session.begin_nested():
            house.add("Ada")
        with house.session.begin_nested():
            house.add("two")
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == [
        "BEGIN",
        "INSERT",
        *("SAVEPOINT", "INSERT", "ROLLBACK TO"),
        *("SAVEPOINT", "INSERT", "RELEASE"),
        "COMMIT",
    ]
    assert onlooker.names() == ["one", "two"]


def test_a_savepoint_that_nobody_ended_commits(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.session.begin_nested()
        house.add()
        return "stored"

    assert post(house) == (200, "stored")
    assert onlooker.names() == ["new"]


@pytest.mark.parametrize("where", ["session", "transaction", "savepoint"])
def test_commit_is_refused_before_anything_is_committed(
    house: House, wire: WireProxy, onlooker: Onlooker, where: str
) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        if where == "session":
            house.session.commit()
        elif where == "transaction":
            transaction = house.session().get_transaction()
            assert transaction
            transaction.commit()
        else:
            with house.session.begin_nested():
                house.session.commit()
        return "never"

    with (
        wire.record() as recording,
        pytest.raises(InvalidRequestError, match=r"leave commit\(\) out.*non_atomic_request"),
    ):
        post(house)
    assert "COMMIT" not in sent(recording)
    assert sent(recording)[-1] == "ROLLBACK"
    assert onlooker.names() == []


def test_after_a_refused_commit_the_request_goes_on(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")
        with pytest.raises(InvalidRequestError):
            house.session.commit()
        house.add("two")
        assert onlooker.names() == []
        return ""

    assert post(house)[0] == 200
    assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize(("status", "stored"), [(200, ["after"]), (409, [])])
def test_rollback_undoes_and_the_request_goes_on_in_a_new_transaction(
    house: House, wire: WireProxy, onlooker: Onlooker, status: int, stored: list[str]
) -> None:
    @house.web.post("/")
    def view() -> tuple[str, int]:
        house.add("before")
        house.session.add(Author(name="pending"))
        house.session.rollback()
        with pytest.raises(InvalidRequestError, match="already begun"):
            house.session.begin()
        house.add("after")
        with pytest.raises(InvalidRequestError, match="leave commit"):
            house.session.commit()
        assert onlooker.names() == []
        return "", status

    with wire.record() as recording:
        assert post(house)[0] == status
    assert sent(recording) == [*UNDONE, *(WRITTEN if stored else UNDONE)]
    assert onlooker.names() == stored


@pytest.mark.parametrize("how", ["flush", "statement"])
def test_a_form_that_is_shown_again_after_an_integrity_error(
    house: House, wire: WireProxy, onlooker: Onlooker, how: str
) -> None:
    @house.web.post("/")
    def view() -> ResponseReturnValue:
        house.add("before")
        try:
            if how == "flush":
                house.add("Ada")
            else:
                house.session.execute(sa.insert(Author).values(name="Ada"))
        except IntegrityError:
            house.session.rollback()
            author = house.session.get(Author, 1)
            assert author
            return f"{author.name} is taken"
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "Ada is taken")
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK", "BEGIN", "SELECT", "COMMIT"]
    assert onlooker.names() == []


def test_an_error_handler_that_rolls_back_may_read(house: House, wire: WireProxy) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("Ada")
        return "never"

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> tuple[str, int]:
        house.session.rollback()
        author = house.session.get(Author, 1)
        assert author
        return f"{author.name} is taken", 409

    with wire.record() as recording:
        assert post(house) == (409, "Ada is taken")
    assert sent(recording) == [*UNDONE, "BEGIN", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("call", ["close", "remove", "reset", "invalidate"])
def test_a_session_that_was_ended_inside_is_no_200(
    house: House, onlooker: Onlooker, call: str
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add()
        getattr(house.session() if call == "invalidate" else house.session, call)()
        return "stored"

    @house.web.errorhandler(InvalidRequestError)
    def handle(error: Exception) -> tuple[str, int]:
        return str(error), 500

    status, text = post(house)
    assert status == 500
    if call == "remove" and house.kind != "stock":
        assert "nothing of it is stored. Leave" in text
    else:
        assert "Nothing of this request is stored" in text
        assert "Leave that out" in text
    assert onlooker.names() == []


@pytest.mark.parametrize(
    "then", ["execute", "flush", "commit", "nothing", "bulk", "connection", "begin"]
)
@pytest.mark.parametrize("call", ["close", "remove", "rollback in a savepoint"])
def test_nothing_is_stored_on_its_own_after_that(
    house: House, onlooker: Onlooker, call: str, then: str
) -> None:
    if house.kind == "stock" and (call, then) == ("remove", "commit"):
        pytest.skip("A session of SQLAlchemy's own that is new, and committed by hand.")

    @house.web.post("/")
    def view() -> str:
        house.add("new")
        if call == "close":
            house.session.close()
        elif call == "remove":
            house.session.remove()
        else:
            with suppress(InvalidRequestError), house.session.begin_nested():
                house.session.rollback()
        with suppress(InvalidRequestError):
            if then == "execute":
                house.session.execute(sa.insert(Author).values(name="later"))
            elif then == "flush":
                house.add("later")
            elif then == "commit":
                house.session.add(Author(name="later"))
                house.session.commit()
            elif then == "bulk":
                house.session.bulk_save_objects([Author(name="later")])
            elif then == "connection":
                insert = sa.insert(Author).values(name="later")
                house.session.connection().execute(insert)
            elif then == "begin" and house.kind != "stock":
                with house.session.begin():
                    house.session.add(Author(name="later"))
        return "stored"

    assert post(house)[0] == 500
    assert onlooker.names() == []


def test_reads_are_of_the_transaction(house: House, wire: WireProxy) -> None:
    @house.web.post("/")
    def view() -> str:
        author = house.session.get(Author, 1, with_for_update=True)
        assert author
        author.age = 31
        return author.name

    with wire.record() as recording:
        assert post(house) == (200, "Ada")
    assert sent(recording) == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]


def test_atomic_blocks_are_savepoints(opt_in: House, wire: WireProxy, onlooker: Onlooker) -> None:
    sessions: Any = opt_in.session

    @opt_in.web.post("/")
    def view() -> str:
        with sessions.atomic():
            opt_in.add("one")
        with suppress(IntegrityError), sessions.atomic():
            opt_in.add("Ada")
        return "stored"

    with wire.record() as recording:
        assert post(opt_in) == (200, "stored")
    assert sent(recording) == [
        *("BEGIN", "SAVEPOINT", "INSERT", "RELEASE"),
        *("SAVEPOINT", "INSERT", "ROLLBACK TO", "COMMIT"),
    ]
    assert onlooker.names() == ["one"]


def test_set_rollback_rolls_back_whatever_the_status(
    opt_in: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    sessions: Any = opt_in.session

    @opt_in.web.post("/")
    def view() -> str:
        opt_in.add()
        sessions.set_rollback()
        return "a rehearsal"

    with wire.record() as recording:
        assert post(opt_in) == (200, "a rehearsal")
    assert sent(recording) == UNDONE
    assert onlooker.names() == []


@pytest.mark.parametrize(("status", "called"), [(200, ["commit"]), (409, ["rollback"])])
def test_what_is_called_after_the_transaction(
    opt_in: House, onlooker: Onlooker, status: int, called: list[str]
) -> None:
    sessions: Any = opt_in.session
    calls: list[str] = []

    @opt_in.web.post("/")
    def view() -> tuple[str, int]:
        sessions.on_commit(lambda: calls.append("commit"))
        sessions.on_rollback(lambda: calls.append("rollback"))
        opt_in.add()
        return "", status

    @opt_in.web.after_request
    def after(response: Response) -> Response:
        assert calls == []
        return response

    assert post(opt_in)[0] == status
    assert calls == called


def test_an_error_after_the_commit_is_a_500_of_what_is_stored(
    opt_in: House, onlooker: Onlooker
) -> None:
    sessions: Any = opt_in.session

    def fail() -> None:
        raise ValueError

    @opt_in.web.post("/")
    def view() -> str:
        sessions.on_commit(fail)
        opt_in.add()
        return "stored"

    assert post(opt_in)[0] == 500
    assert onlooker.names() == ["new"]


# -- Streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_context", [True, False])
def test_the_commit_comes_before_a_stream(
    opt_in: House, wire: WireProxy, onlooker: Onlooker, with_context: bool
) -> None:
    @opt_in.web.post("/")
    def view() -> Response:
        opt_in.add()

        def lines() -> Iterator[str]:
            yield f"{onlooker.names()}\n"
            if with_context:
                yield from opt_in.session.scalars(sa.select(Author.name).where(Author.id < 3))
                opt_in.session.add(Author(name="streamed"))
                opt_in.session.commit()

        return Response(stream_with_context(lines()) if with_context else lines())

    with wire.record() as recording:
        response = opt_in.web.test_client().post("/")
        text = response.text
        response.close()
    assert text.startswith("['new']\n")
    assert sent(recording) == ([*WRITTEN, "SELECT", *WRITTEN] if with_context else WRITTEN)
    assert onlooker.names() == (["new", "streamed"] if with_context else ["new"])


def test_a_stream_whose_commit_fails_is_not_sent(house: House, onlooker: Onlooker) -> None:
    closed: list[bool] = []

    @house.web.post("/")
    def view() -> Response:
        two_in_one_seat(house)

        def lines() -> Iterator[str]:
            try:
                yield "stored"
            finally:
                closed.append(True)

        return Response(stream_with_context(lines()))

    @house.web.errorhandler(IntegrityError)
    def handle(error: IntegrityError) -> tuple[str, int]:
        return "taken", 409

    assert post(house) == (409, "taken")
    assert post(house) == (409, "taken")


def test_an_error_in_a_stream_comes_too_late(house: House, onlooker: Onlooker) -> None:
    @house.web.post("/")
    def view() -> Response:
        house.add()

        def lines() -> Iterator[str]:
            yield "some"
            raise ValueError

        return Response(stream_with_context(lines()))

    with pytest.raises(ValueError, match=r"^$"):
        post(house)
    assert onlooker.names() == ["new"]


# -- Test clients and shared contexts -------------------------------------------------------------


def test_a_client_that_keeps_the_context(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/<name>/<int:status>")
    def view(name: str, status: int) -> tuple[str, int]:
        g.name = name
        house.add(name)
        return "", status

    with house.web.test_client() as client:
        for name, status in (("one", 200), ("two", 409), ("three", 200)):
            with wire.record() as recording:
                assert client.post(f"/{name}/{status}").status_code == status
            assert sent(recording) == (WRITTEN if status == 200 else UNDONE)
            assert g.name == name
            assert house.session.scalar(sa.select(Author.id).where(Author.name == name)) == (
                None if status == 409 else onlooker.scalar("SELECT max(id) FROM author")
            )
            house.session.rollback()  # what stock SQLAlchemy has begun
    assert onlooker.names() == ["one", "three"]


def test_a_client_that_keeps_the_context_and_an_exception_that_propagates(
    house: House, onlooker: Onlooker
) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        house.add()
        raise ValueError

    with house.web.test_client() as client:
        with pytest.raises(ValueError, match=r"^$"):
            client.post("/")
        assert not TRANSACTION_CONNECTIONS
        assert checked_out(house.engine) == 0
        with pytest.raises(ValueError, match=r"^$"):
            client.post("/")
    assert onlooker.names() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_in_the_context_of_a_test(
    house: House, wire: WireProxy, onlooker: Onlooker, error: type[BaseException]
) -> None:
    """The request has the session of the test, also one that stock SQLAlchemy has begun on."""
    house.web.testing = True

    @house.web.post("/<name>")
    def view(name: str) -> str:
        house.add(name)
        if name == "fails":
            raise error
        return ""

    with house.web.app_context():
        author = house.session.get(Author, 1)
        assert author
        assert post(house, "/one")[0] == 200
        assert onlooker.names() == ["one"]
        assert author.name == "Ada"
        with pytest.raises(error):
            post(house, "/fails")
        if house.kind != "stock":
            assert not TRANSACTION_CONNECTIONS
        assert house.session.scalar(sa.select(Author).where(Author.name == "fails")) is None
        assert author.name == "Ada"
        house.session.add(Author(name="by the test"))
        house.session.commit()
    assert onlooker.names() == ["by the test", "one"]


def test_in_the_context_of_a_test_that_has_a_transaction_open(
    house: House, onlooker: Onlooker
) -> None:
    house.web.testing = True

    @house.web.post("/")
    def view() -> str:
        raise AssertionError("never comes here")

    with house.web.app_context(), house.session.begin():
        house.add("by the test")
        with pytest.raises(InvalidRequestError, match="shares the application context"):
            post(house)
    assert onlooker.names() == ["by the test"]


# -- Threads, binds, extensions -------------------------------------------------------------------


def test_threads(house: House, onlooker: Onlooker) -> None:
    """Half of the requests are rolled back while others are under way."""

    @house.web.post("/<name>/<int:status>")
    def view(name: str, status: int) -> tuple[str, int]:
        house.add(name)
        house.add(f"{name}, too")
        return "", status

    def client(number: int) -> None:
        for turn in range(5):
            name = f"{number}-{turn}"
            status = 200 if turn % 2 else 409
            assert post(house, f"/{name}/{status}")[0] == status

    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            client(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    expected = [
        f"{number}-{turn}{end}" for number in range(8) for turn in (1, 3) for end in ("", ", too")
    ]
    assert sorted(onlooker.names()) == sorted(expected)


@pytest.mark.parametrize("twophase", [False, True])
def test_several_binds(
    filled: str,
    wire: WireProxy,
    wire_url: str,
    other_database: str,
    onlooker: Onlooker,
    twophase: bool,
) -> None:
    """One transaction each, or one for all."""
    other_url = sa.make_url(wire_url).set(database=other_database).render_as_string(False)
    web = Flask("binds")
    web.config["SQLALCHEMY_DATABASE_URI"] = wire_url
    web.config["SQLALCHEMY_BINDS"] = {"other": other_url}
    db: Any = Database(web, session_options={"twophase": twophase})

    class Note(db.Model):  # type: ignore[misc]
        __bind_key__ = "other"
        id = sa.Column(sa.Integer, primary_key=True)

    with web.app_context():
        db.create_all("other")
        db.engine.connect().close()
    db.atomic_requests(web)

    @web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        db.session.add_all([Author(name="new"), Note()])
        db.session.flush()
        return "", status

    @web.post("/fails")
    def fails() -> str:
        db.session.add_all([Seat(place=1), Seat(place=1), Note()])
        return "stored"

    client = web.test_client()
    with wire.record() as recording:
        assert client.post("/409").status_code == 409
    assert sorted(sent(recording)) == sorted([*UNDONE, *UNDONE])
    with wire.record() as recording:
        assert client.post("/200").status_code == 200
    if not twophase:
        assert sorted(sent(recording)) == sorted([*WRITTEN, *WRITTEN])
    assert onlooker.names() == ["new"]
    assert client.post("/fails").status_code == 500
    assert onlooker.scalar("SELECT count(*) FROM seat") == 0
    with web.app_context():
        if twophase:
            assert db.session.scalar(sa.select(sa.func.count(Note.id))) == 1
        db.session.remove()
        for engine in db.engines.values():
            assert_at_rest(engine)
            engine.dispose()


def test_two_extensions_in_one_application(filled: str, wire_url: str, onlooker: Onlooker) -> None:
    """Each has a transaction of its own; that of the one which opted in last ends last."""
    house = House("db", wire_url)
    other = flask_scoped_session(sessionmaker(house.engine, class_=OptInSession), house.web)
    other.atomic_requests(house.web)
    house.owner.atomic_requests(house.web)

    @house.web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        house.add(f"db {status}")
        other.add(Author(name=f"other {status}"))
        other.flush()
        return "", status

    @house.web.post("/fails")
    def fails() -> str:
        house.add("db fails")
        other.add_all([Seat(place=1), Seat(place=1)])
        return ""

    assert post(house, "/409")[0] == 409
    assert onlooker.names() == []
    assert post(house, "/200")[0] == 200
    assert onlooker.names() == ["db 200", "other 200"]
    assert post(house, "/fails")[0] == 500
    assert onlooker.names() == ["db 200", "other 200"]
    house.close()


# -- Misuse ---------------------------------------------------------------------------------------


def test_after_the_first_request(plain: House) -> None:
    plain.web.test_client().get("/")
    with pytest.raises(AssertionError, match="can no longer be called on the application"):
        plain.owner.atomic_requests(plain.web)


def test_a_blueprint_that_is_registered_already(plain: House) -> None:
    api = Blueprint("api", "api")
    plain.web.register_blueprint(api)
    with pytest.raises(AssertionError, match="can no longer be called on the blueprint"):
        plain.owner.atomic_requests(api)


def test_methods_that_are_one_string(plain: House) -> None:
    with pytest.raises(TypeError, match=r"methods=\['POST'\]"):
        plain.owner.atomic_requests(plain.web, methods="POST")


def test_neither_application_nor_blueprint(plain: House) -> None:
    def view() -> None: ...

    with pytest.raises(TypeError, match="takes a Flask application or blueprint"):
        plain.extension.atomic_requests(view)
    with pytest.raises(TypeError, match="takes a Flask application or blueprint"):
        plain.extension.atomic_requests(None)


@pytest.mark.parametrize("mark", ["atomic_request", "non_atomic_request"])
def test_what_can_not_be_marked(plain: House, mark: str) -> None:
    class Views:
        def view(self) -> str:
            return ""

    with pytest.raises(TypeError, match=r"can't be marked.*where the view is defined"):
        getattr(plain.owner, mark)(Views().view)


def test_requests_leave_nothing_behind(house: House, onlooker: Onlooker) -> None:
    """No listener stays on a session that lives on, and no request in the books."""

    @house.web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        house.add()
        return "", status

    with house.web.app_context():
        session: Session = house.session()
        for status in (200, 409, 500):
            post(house, f"/{status}")
        house.session.add(Document(title="after", author_id=1))
        house.session.commit()  # which nobody refuses
        assert house.session() is session
    assert onlooker.scalar("SELECT count(*) FROM document WHERE title = 'after'") == 1


@pytest.mark.parametrize("where", ["thread", "same thread"])
def test_a_copy_of_the_context_has_no_part_in_the_transaction(
    house: House, wire: WireProxy, onlooker: Onlooker, where: str
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.add("one")

        @copy_current_request_context
        def work() -> None:
            assert request.path == "/"

        if where == "thread":
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        else:
            work()
        house.add("two")
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert onlooker.names() == ["one", "two"]
