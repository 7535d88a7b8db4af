"""The functions around a view run inside the transaction, and a stream is sent after the commit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Blueprint, Flask, Response, abort, after_this_request, flash, stream_with_context
from flask import session as cookie
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface
from sqlalchemy.exc import IntegrityError

from tests.flask.atomic_requests.support import UNDONE, WRITTEN, House, post, two_in_one_seat
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy

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
def test_the_status_of_a_before_request_function_that_answers_counts(
    house: House, onlooker: Onlooker, status: int, stored: list[str]
) -> None:
    @house.web.before_request
    def answer() -> tuple[str, int]:
        house.add()
        return "early", status

    assert post(house) == (status, "early")
    assert onlooker.names() == stored


def test_a_before_request_function_that_fails_rolls_back(house: House, onlooker: Onlooker) -> None:
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
            house.add(f"teardown {len(seen)}")

    @house.web.post("/<int:status>")
    def view(status: int) -> tuple[str, int]:
        house.add("new")
        return "", status

    with wire.record() as recording:
        assert post(house, "/409")[0] == 409
        assert post(house, "/200")[0] == 200
    assert sent(recording) == [*UNDONE, *WRITTEN, *WRITTEN, *WRITTEN]
    assert seen == [[], ["new", "teardown 1"]]


def test_a_session_interface_stores_in_the_database_after_the_end_of_the_transaction(
    house: House, onlooker: Onlooker
) -> None:
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
    assert sent(recording) == ([*WRITTEN, "SELECT", "INSERT"] if with_context else WRITTEN)
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
