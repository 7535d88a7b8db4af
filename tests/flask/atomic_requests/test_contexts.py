"""A request is one transaction in test clients and in contexts that are shared or copied, too."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from flask import copy_current_request_context, g, request
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS
from tests.flask.atomic_requests.support import UNDONE, WRITTEN, House, post
from tests.library import Author, Document, Onlooker, checked_out, sent
from tests.wire import WireProxy

# -- Test clients and shared contexts -------------------------------------------------------------


def test_a_client_that_keeps_the_context_gets_a_transaction_for_each_request(
    house: House, wire: WireProxy, onlooker: Onlooker
) -> None:
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


def test_an_exception_that_propagates_to_a_client_that_keeps_the_context_rolls_back(
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
def test_a_request_in_the_context_of_a_test_is_a_transaction_of_its_own(
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


def test_a_request_in_the_context_of_a_test_that_has_a_transaction_open_is_refused(
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


# -- Copies of a context, and what is left of one --------------------------------------------------


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
