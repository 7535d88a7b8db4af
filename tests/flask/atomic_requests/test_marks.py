"""A view opts in or out by a mark."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from flask import abort, request
from flask.views import MethodView, View
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from tests.flask.atomic_requests.support import UNDONE, WRITTEN, House, post
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy


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


def test_a_view_may_opt_in_by_a_mark(plain: House, wire: WireProxy, onlooker: Onlooker) -> None:
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


def test_a_view_may_opt_out_by_a_mark(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/")
    @house.owner.non_atomic_request
    def view() -> str:
        for name in ("one", "two"):
            with house.session.begin():
                house.add(name)
        abort(409)

    with wire.record() as recording:
        assert post(house)[0] == 409
    assert sent(recording) == [*WRITTEN, *WRITTEN]
    assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize("order", ["above", "below", "twice", "after the route"])
def test_marks_work_among_other_decorators(house: House, wire: WireProxy, order: str) -> None:
    out = house.owner.non_atomic_request

    def view() -> str:
        with house.session.begin():
            house.add()
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


def test_marks_work_on_classes_and_their_methods(house: House, wire: WireProxy) -> None:
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
                house.add("put")
            abort(409)

    @owner.non_atomic_request
    class Own(View):
        methods = ("POST", "PUT")

        def dispatch_request(self) -> str:
            with session.begin():
                house.add(self.name())
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
                house.add("mixed")
            abort(409)

    class Single(View):
        methods = ("POST",)

        @owner.non_atomic_request
        def dispatch_request(self) -> str:
            with session.begin():
                house.add("single")
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


def test_marks_work_on_async_views(house: House, wire: WireProxy, onlooker: Onlooker) -> None:
    @house.web.post("/<name>/<int:status>")
    async def view(name: str, status: int) -> tuple[str, int]:
        house.add(name)
        return "", status

    @house.web.post("/out")
    @house.owner.non_atomic_request
    async def out() -> str:
        with house.session.begin():
            house.add("out")
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
