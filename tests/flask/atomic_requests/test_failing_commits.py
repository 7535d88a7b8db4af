"""A request whose commit fails is answered with status 500."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Response, after_this_request
from flask import session as cookie
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError

from tests.flask.atomic_requests.support import WRITTEN, House, post, two_in_one_seat
from tests.library import Author, Onlooker, sent
from tests.wire import WireProxy


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


def test_a_handler_of_500_gets_the_error_of_a_failing_commit(house: House) -> None:
    @house.web.post("/")
    def view() -> str:
        two_in_one_seat(house)
        return "stored"

    @house.web.errorhandler(500)
    def handle(error: Any) -> tuple[str, int]:
        return type(error.original_exception).__name__, 500

    assert post(house) == (500, "IntegrityError")


def test_a_handler_that_fails_after_a_failing_commit_is_a_500(house: House) -> None:
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
def test_a_server_that_has_gone_before_the_commit_is_no_200(
    house: House, onlooker: Onlooker, status: int
) -> None:
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
