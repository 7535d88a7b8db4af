"""Nothing waits inside a transaction: each client against a server on loopback."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import requests
import urllib3
from celery import Celery
from sqlalchemy import exc, select
from sqlalchemy.orm import scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy.guarding import Guard, WaitingInTransaction, allow_waiting
from fictive_sqlalchemy.testing import isolate
from tests.library import Author

READ = select(Author.name).where(Author.id == 1)
Call = Callable[[], object]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def guard(engine: OptInEngine) -> Iterator[Guard]:
    with Guard("raise", engine) as guard:
        yield guard
    assert observing.recorder is None


@pytest.fixture(params=["requests", "urllib3", "httpx", "http.client"])
def kept(request: pytest.FixtureRequest, port: int) -> Iterator[Call]:
    """A client that has a connection to the server already, and keeps it."""
    url = f"http://127.0.0.1:{port}/"
    clients: dict[str, Any] = {
        "requests": requests.Session,
        "urllib3": urllib3.PoolManager,
        "httpx": httpx.Client,
        "http.client": lambda: http.client.HTTPConnection("127.0.0.1", port),
    }
    client = clients[request.param]()

    def call() -> object:
        if request.param == "urllib3":
            return client.request("GET", url).data
        if request.param == "http.client":
            try:
                client.request("GET", "/")
            except WaitingInTransaction:
                client.close()  # half of the request is in it
                raise
            return client.getresponse().read()
        return client.get(url).content

    assert call() == b"ok"
    yield call
    client.clear() if request.param == "urllib3" else client.close()


def new_connections(port: int) -> dict[str, Call]:
    url = f"http://127.0.0.1:{port}/"

    def by_urllib() -> object:
        with urllib.request.urlopen(url) as response:
            return response.read()

    def by_socket() -> None:
        socket.create_connection(("localhost", port)).close()

    return {
        "requests": lambda: requests.get(url).content,
        "httpx": lambda: httpx.get(url).content,
        "urllib": by_urllib,
        "socket": by_socket,
        "subprocess": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
        "os.system": lambda: os.system("true"),
        "sleep": lambda: time.sleep(0.001),
    }


NAMES = [*new_connections(0)]


@pytest.mark.parametrize("name", NAMES)
def test_a_call_inside_a_transaction_is_refused(
    guard: Guard, session: OptInSession, port: int, name: str
) -> None:
    call = new_connections(port)[name]

    def work() -> None:
        with session.begin():
            session.execute(READ).all()
            call()

    with pytest.raises(WaitingInTransaction, match="inside an open transaction") as raised:
        work()
    message = str(raised.value)
    assert __file__ in message
    assert "begun by begin() in" in message
    assert "on_commit()" in message
    call()  # outside it works
    session.execute(READ).all()
    call()


def test_a_kept_connection_is_no_way_out(guard: Guard, session: OptInSession, kept: Call) -> None:
    assert kept() == b"ok"
    with pytest.raises(WaitingInTransaction, match="An HTTP request to 127"):
        inside(session, kept)


def inside(session: OptInSession, call: Call) -> object:
    with session.begin():
        session.execute(READ).all()
        return call()


def test_before_and_after_the_transaction_nothing_is_refused(
    guard: Guard, session: OptInSession, kept: Call
) -> None:
    with session.begin():
        kept()  # BEGIN was not sent yet
        session.execute(READ).all()
        session.on_commit(kept)
    kept()
    with suppress(KeyError), session.begin():
        session.execute(READ).all()
        raise KeyError
    kept()
    session.add(Author(name="new"))
    session.commit()
    kept()


def test_with_begin_on_write_the_transaction_of_the_write_counts(
    guard: Guard, engine: OptInEngine, kept: Call
) -> None:
    with OptInSession(engine, begin_on_write=True) as session:
        session.execute(READ).all()
        kept()
        session.add(Author(name="new"))
        session.flush()
        with pytest.raises(WaitingInTransaction, match="begun by flush"):
            kept()
        session.commit()
        kept()


def test_another_threads_transaction_does_not_count(
    guard: Guard, session: OptInSession, kept: Call
) -> None:
    found: list[object] = []
    with session.begin():
        session.execute(READ).all()
        thread = threading.Thread(target=lambda: found.append(kept()))
        thread.start()
        thread.join()
    assert found == [b"ok"]


def test_a_transaction_of_a_connection_counts(
    guard: Guard, engine: OptInEngine, kept: Call
) -> None:
    with engine.begin() as connection:
        connection.execute(READ).all()
        with pytest.raises(WaitingInTransaction):
            kept()
    kept()


def test_a_call_that_is_allowed_is_made(
    engine: OptInEngine, session: OptInSession, kept: Call
) -> None:
    with Guard("raise", engine, allow=["127.0.0.1"]):
        assert inside(session, kept) == b"ok"
    with Guard("raise", engine, allow=["example.com"]):
        with pytest.raises(WaitingInTransaction):
            inside(session, kept)

        def allowed() -> object:
            with allow_waiting():
                return kept()

        assert inside(session, allowed) == b"ok"
        with pytest.raises(WaitingInTransaction):
            inside(session, kept)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST."])
def test_a_host_is_allowed_by_its_name(
    engine: OptInEngine, session: OptInSession, port: int, host: str
) -> None:
    with Guard("raise", engine, allow=[host]):
        inside(session, new_connections(port)["socket"])
        inside(session, lambda: requests.get(f"http://localhost:{port}/"))
        with pytest.raises(WaitingInTransaction):
            inside(session, lambda: requests.get(f"http://127.0.0.1:{port}/"))


def test_in_production_a_call_is_logged_once_for_each_line(
    engine: OptInEngine, session: OptInSession, kept: Call, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        for _ in range(3):
            assert kept() == b"ok"

    with Guard("log", engine):
        inside(session, work)
        inside(session, work)
    records = [each for each in caplog.records if each.name == "fictive_sqlalchemy.transactions"]
    assert [each.levelno for each in records] == [logging.WARNING] * 2
    assert "An HTTP request to 127.0.0.1 inside an open transaction" in records[0].getMessage()
    assert f"{__file__}, line" in records[0].getMessage()


def test_the_error_names_the_lines_of_the_application(
    guard: Guard, session: OptInSession, port: int
) -> None:
    def pay() -> None:
        requests.get(f"http://127.0.0.1:{port}/")

    with pytest.raises(WaitingInTransaction) as raised:
        inside(session, pay)
    assert f"in {__file__}, line" in str(raised.value)
    assert "in pay." in str(raised.value)


def test_a_message_of_celery_is_refused(guard: Guard, session: OptInSession) -> None:
    celery = Celery("shop", broker="memory://")

    @celery.task(name="shop.mail", shared=False)
    def mail() -> None:
        pass

    with pytest.raises(WaitingInTransaction, match=r"A message of Celery for the task shop\.mail"):
        inside(session, mail.delay)
    mail.delay()


def test_under_isolation_the_transaction_of_the_code_counts(
    guard: Guard, engine: OptInEngine, kept: Call
) -> None:
    with isolate(engine), OptInSession(engine) as session:
        kept()
        session.execute(READ).all()
        kept()
        with pytest.raises(WaitingInTransaction):
            inside(session, kept)
        kept()


def test_an_open_cursor_of_a_session_that_is_gone_does_not_count(
    guard: Guard, engine: OptInEngine, kept: Call
) -> None:
    session = OptInSession(engine)
    session.begin()
    session.execute(READ).all()
    session.close()
    kept()


def test_nothing_is_refused_while_the_guard_is_off(
    engine: OptInEngine, session: OptInSession, kept: Call
) -> None:
    guard = Guard("raise", engine)
    assert inside(session, kept) == b"ok"
    guard.start().start()
    guard.stop()
    guard.stop()
    assert inside(session, kept) == b"ok"
    assert observing.recorder is None


@pytest.mark.parametrize("mode", ["warn", None, True, "RAISE"])
def test_an_unknown_mode_of_the_guard_is_refused(engine: OptInEngine, mode: Any) -> None:
    with pytest.raises(exc.ArgumentError, match='"raise" or "log"'):
        Guard(mode, engine)


def test_bad_sources_and_hosts_of_the_guard_are_refused(engine: OptInEngine) -> None:
    with pytest.raises(exc.ArgumentError, match=r"Guard\(\) needs a source"):
        Guard("log")
    with pytest.raises(exc.ArgumentError, match=r"Guard\(\) has found no engine"):
        Guard("log", "engine")
    for session in (OptInSession(engine), scoped_session(sessionmaker(engine))):
        with pytest.raises(exc.ArgumentError, match=r"Guard\(\) has found no engine"):
            Guard("log", session)
    with pytest.raises(exc.ArgumentError, match="list of hosts"):
        Guard("log", engine, allow="localhost")
