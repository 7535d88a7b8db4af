"""A real threaded server: requests that wait between two reads keep nothing from the others."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.wire import WireProxy

pytestmark = pytest.mark.slow

REQUESTS = 20
POOL = 5

# Far longer than any request takes, so that a test that would hang fails instead.
PATIENCE = 60

db: Any = Database()


class Counted(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serving(app: Flask) -> Iterator[BaseWSGIServer]:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(server: BaseWSGIServer, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.fixture
def app(make_app: MakeApp, url: str, wire_url: str) -> Flask:
    with make_app(db, url).app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Counted(id=1, number=0))
    options = {"pool_size": POOL, "max_overflow": 0, "pool_timeout": PATIENCE}
    app = make_app(db, wire_url, SQLALCHEMY_ENGINE_OPTIONS=options)
    with app.app_context():  # psycopg asks for some types on its first connection
        db.session.execute(sa.text("SELECT 1"))
    return app


def test_more_requests_wait_than_the_pool_has_connections(
    app: Flask, url: str, wire: WireProxy
) -> None:
    all_have_read = threading.Barrier(REQUESTS + 1)
    go_on = threading.Event()

    @app.get("/")
    def view() -> str:
        before = db.session.get(Counted, 1).number
        # Another service, a model, a file: every request of all is here at the same time.
        all_have_read.wait(PATIENCE)
        go_on.wait(PATIENCE)
        db.session.expire_all()
        after = db.session.get(Counted, 1).number
        return f"{before} {after}"

    watcher = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with serving(app) as server, ThreadPoolExecutor(REQUESTS) as clients:
        answers = [clients.submit(get, server, "/") for _ in range(REQUESTS)]
        all_have_read.wait(PATIENCE)
        # All of them are between their two reads now.
        with watcher.connect() as connection:
            states = connection.execute(
                sa.text(
                    "SELECT state, count(*) FROM pg_stat_activity WHERE datname ="
                    " current_database() AND pid <> pg_backend_pid() GROUP BY state"
                )
            )
            assert {state for state, _ in states} == {"idle"}
            connection.execute(sa.update(Counted).values(number=7))
        assert wire.transactions_open == 0
        assert not TRANSACTION_CONNECTIONS
        with app.app_context():
            assert db.engine.pool.checkedout() < POOL
        go_on.set()
        assert Counter(answer.result() for answer in answers) == {(200, "0 7"): REQUESTS}
    with app.app_context():
        assert db.engine.pool.checkedout() == 0


def test_transactions_after_the_wait_are_stored_one_by_one(app: Flask, wire: WireProxy) -> None:
    all_have_read = threading.Barrier(REQUESTS)

    @app.get("/")
    def view() -> str:
        counted: Any = db.session.get(Counted, 1)
        all_have_read.wait(PATIENCE)
        with db.session.begin():
            db.session.refresh(counted, with_for_update=True)
            counted.number += 1
        return str(counted.number)

    with (
        wire.record() as recording,
        serving(app) as server,
        ThreadPoolExecutor(REQUESTS) as clients,
    ):
        answers = list(clients.map(lambda _: get(server, "/"), range(REQUESTS)))
    assert {status for status, _ in answers} == {200}
    with app.app_context():
        assert db.session.get(Counted, 1).number == REQUESTS
        assert db.engine.pool.checkedout() == 1
    count = Counter(recording.verbs)
    assert count["BEGIN"] == count["UPDATE"] == count["COMMIT"] == REQUESTS
    assert count["ROLLBACK"] == 0
    assert not TRANSACTION_CONNECTIONS


def test_requests_that_fail_leave_nothing_to_the_others(app: Flask, wire: WireProxy) -> None:
    @app.get("/<int:number>")
    def view(number: int) -> str:
        db.session.get(Counted, 1)
        with db.session.begin():
            db.session.execute(sa.update(Counted).values(number=Counted.number + 1))
            if number % 2:
                raise ValueError(number)
        return "stored"

    with serving(app) as server, ThreadPoolExecutor(REQUESTS) as clients:
        answers = list(clients.map(lambda number: get(server, f"/{number}"), range(REQUESTS * 2)))
    assert Counter(status for status, _ in answers) == {200: REQUESTS, 500: REQUESTS}
    wire.quiesce()
    assert wire.transactions_open == 0
    with app.app_context():
        assert db.session.get(Counted, 1).number == REQUESTS
        connections = [db.engine.raw_connection() for _ in range(POOL - 1)]
        assert all(connection.driver_connection.autocommit for connection in connections)
        for connection in connections:
            connection.close()
