"""Streamed answers in one process: whose session a generator has, and where a context stays."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from itertools import chain
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, Response, stream_with_context
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.test import create_environ

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.wire import WireProxy

db: Any = Database()


class Page(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


# Flask ends the context of the view before the stream since then.
NEW_CONTEXT = tuple(map(int, version("flask").split(".")[:3])) >= (3, 1, 2)


@pytest.fixture
def app(make_app: MakeApp, wire_url: str) -> Flask:
    app = make_app(db, wire_url)
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add_all([Page(id=number, text=f"page {number}") for number in (1, 2, 3)])
    return app


def in_use(app: Flask) -> tuple[int, int]:
    """Return how many connections are in use, and how many transactions are open."""
    with app.app_context():
        return db.engine.pool.checkedout(), len(TRANSACTION_CONNECTIONS)


def begin_answer(app: Flask, path: str) -> Any:
    """Ask as a server does, up to the second part of the answer."""
    answer = iter(app(create_environ(path), lambda status, headers, error=None: bytes))
    next(answer)
    next(answer)
    return answer


def in_thread(function: Callable[[], Any]) -> Any:
    """Run a function in a thread of its own, which has no context when it begins."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


def test_a_stream_with_the_context_has_a_session_of_its_own(app: Flask) -> None:
    sessions = []

    @app.get("/")
    def view() -> Response:
        page = db.session.get(Page, 1)
        sessions.append(db.session())

        def parts() -> Iterator[str]:
            sessions.append(db.session())
            yield str(page in db.session)

        return Response(stream_with_context(parts()))

    assert app.test_client().get("/").text == str(not NEW_CONTEXT)
    assert (sessions[0] is sessions[1]) is not NEW_CONTEXT
    assert in_use(app) == (0, 0)


def test_what_waits_in_the_view_is_not_stored_by_the_stream(app: Flask) -> None:
    @app.get("/")
    def view() -> Response:
        db.session.add(Page(id=4, text="pending"))

        def parts() -> Iterator[str]:
            yield str(len(db.session.new))

        return Response(stream_with_context(parts()))

    assert app.test_client().get("/").text == str(int(not NEW_CONTEXT))
    with app.app_context():
        assert db.session.get(Page, 4) is None


def test_an_object_that_is_held_is_not_read_again(app: Flask, wire: WireProxy) -> None:
    with app.app_context():
        held = db.session.get(Page, 1)
        with app.app_context(), db.session.begin():
            db.session.get(Page, 1).text = "changed"
        with wire.record() as recording:
            assert db.session.get(Page, 1).text == "page 1"
        assert recording.verbs == []
        db.session.remove()
        assert db.session.get(Page, 1).text == "changed"
        assert held.text == "page 1"


@pytest.mark.parametrize("with_context", [True, False])
def test_a_client_that_goes_away_rolls_a_block_back(
    app: Flask, wire: WireProxy, with_context: bool
) -> None:
    ended_with = []

    @app.get("/")
    def view() -> Response:
        def parts() -> Iterator[str]:
            try:
                with db.session.begin():
                    for page in db.session.scalars(sa.select(Page).order_by(Page.id)):
                        page.text = "seen"
                        db.session.flush()
                        yield page.text
            except BaseException as error:
                ended_with.append(type(error))
                raise

        def parts_in_context() -> Iterator[str]:
            with app.app_context():
                yield from parts()

        return Response(stream_with_context(parts()) if with_context else parts_in_context())

    def leave_half_way() -> None:
        answer = begin_answer(app, "/")
        assert in_use(app) == (1, 1)
        answer.close()
        assert in_use(app) == (0, 0)

    with wire.record() as recording:
        in_thread(leave_half_way)
    verbs = [verb for verb in recording.verbs if verb != "DEALLOCATE"]  # psycopg 3's, after it
    assert verbs == ["BEGIN", "SELECT", "UPDATE", "UPDATE", "ROLLBACK"]
    assert ended_with == [GeneratorExit]
    with app.app_context():
        assert db.session.get(Page, 1).text == "page 1"


def test_a_stream_that_is_asked_for_in_the_view_is_closed_with_the_response(app: Flask) -> None:
    kept: list[Any] = []

    @app.get("/")
    def view() -> Response:
        def parts() -> Iterator[str]:
            for page in db.session.scalars(sa.select(Page).execution_options(yield_per=1)):
                yield page.text

        stream: Any = stream_with_context(parts())
        kept.append(stream)  # which keeps it from being closed when nobody refers to it
        response = Response(chain([next(stream)], stream))
        response.call_on_close(stream.close)
        return response

    def leave_half_way() -> None:
        answer = begin_answer(app, "/")
        assert in_use(app) == (1, 0)
        answer.close()
        assert in_use(app) == (0, 0)

    in_thread(leave_half_way)


def test_a_stream_that_nobody_closes_leaves_its_context_to_the_next_request(app: Flask) -> None:
    """Flask's doing: a request in the context of another has none of its own."""
    kept: list[Any] = []

    @app.get("/stream")
    def stream() -> Response:
        def parts() -> Iterator[str]:
            with db.session.begin():
                for page in db.session.scalars(sa.select(Page)):
                    yield page.text

        stream: Any = stream_with_context(parts())
        kept.append(stream)
        return Response(chain([next(stream)], stream))

    @app.get("/next")
    def next_request() -> str:
        with pytest.raises(InvalidRequestError, match="already begun"):
            db.session.begin()
        return str(db.session().in_transaction())

    def leave_and_ask() -> None:
        begin_answer(app, "/stream").close()
        assert in_use(app) == (1, 1)
        answer = app(create_environ("/next"), lambda status, headers, error=None: bytes)
        assert b"".join(answer) == b"True"
        assert in_use(app) == (1, 1)
        kept.pop().close()
        assert in_use(app) == (0, 0)

    in_thread(leave_and_ask)


def test_a_block_whose_session_a_foreign_teardown_removes_stores_nothing(app: Flask) -> None:
    """As by a stream of another request that is garbage-collected in the block."""

    def block() -> None:
        with db.session.begin():
            db.session.add(Page(id=4, text="first half"))
            db.session.flush()
            with suppress(InvalidRequestError):
                db.session.remove()
            db.session.add(Page(id=5, text="second half"))
            db.session.flush()

    with app.app_context():
        with pytest.raises(InvalidRequestError, match="closed transaction inside"):
            block()
        assert db.session.get(Page, 4) is None
        assert db.session.get(Page, 5) is None
    assert in_use(app) == (0, 0)


def test_a_session_whose_block_nobody_leaves_is_forgotten_at_the_second_time(app: Flask) -> None:
    with app.app_context():
        session = db.session()
        db.session.begin().__enter__()
        for is_kept in (True, False):
            with pytest.raises(InvalidRequestError, match=r"remove\(\) inside a transaction"):
                db.session.remove()
            assert db.session.registry.has() is is_kept
        assert db.session() is not session
        assert db.session.get(Page, 1).text == "page 1"
    assert in_use(app) == (0, 0)
