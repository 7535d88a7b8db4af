"""Several threads, several binds and several extensions do not get in each other's way."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from tests.flask.atomic_requests.support import UNDONE, WRITTEN, Database, House, post
from tests.library import Author, Onlooker, Seat, assert_at_rest, sent
from tests.wire import WireProxy


def test_each_thread_has_the_transaction_of_its_request(house: House, onlooker: Onlooker) -> None:
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
def test_several_binds_are_committed_and_rolled_back_with_the_request(
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


def test_two_extensions_in_one_application_have_a_transaction_each(
    filled: str, wire_url: str, onlooker: Onlooker
) -> None:
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
