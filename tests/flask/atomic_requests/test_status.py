"""The status of the response decides whether a request commits or rolls back."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask, Response, abort, got_request_exception, redirect, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import InvalidRequestError
from werkzeug.exceptions import HTTPException

from tests.flask.atomic_requests.support import UNDONE, WRITTEN, House, post
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy


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


def test_what_is_pending_at_the_end_of_a_request_is_stored(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
    @house.web.post("/")
    def view() -> str:
        house.session.add(Author(name="pending"))
        return "stored"

    with wire.record() as recording:
        assert post(house) == (200, "stored")
    assert sent(recording) == house.written_alone
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
    assert sent(recording) == [*UNDONE, *house.written_alone]
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
def test_an_extension_that_answers_errors_by_itself_decides_by_its_status(
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
