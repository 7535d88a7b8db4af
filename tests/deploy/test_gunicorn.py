"""A real gunicorn: threads, greenlets, and an app that was loaded before the fork."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.library import Onlooker

pytestmark = pytest.mark.skipif(
    find_spec("gunicorn") is None or find_spec("gevent") is None,
    reason="gunicorn or gevent is not installed",
)

# Far longer than anything takes, so that a test that would hang fails instead.
PATIENCE = 60.0

REQUESTS = 10

# The monkey patches come first of all: psycopg decides at its import how it waits.
CONFIGURATION = """
bind = "127.0.0.1:0"
control_socket_disable = True
worker_class = "{worker_class}"
workers = {workers}
threads = {threads}
preload_app = {preload}
if worker_class == "gevent":
    from gevent import monkey
    monkey.patch_all()
    import importlib.util
    if importlib.util.find_spec("psycogreen"):
        from psycogreen.gevent import patch_psycopg
        patch_psycopg()
"""

Serve: TypeAlias = Callable[..., "Served"]


class Served:
    """A gunicorn, and the address it listens on."""

    def __init__(self, directory: Path, url: str, uses_database: bool, **settings: Any) -> None:
        file = directory / "gunicorn.conf.py"
        values = {"worker_class": "gthread", "workers": 1, "threads": 20, "preload": False}
        file.write_text(CONFIGURATION.format(**{**values, **settings}))
        self.log = directory / "log"
        environment = {**os.environ, "SERVED_DATABASE": url}
        if uses_database:
            environment["SERVED_USES_DATABASE"] = "1"
        command = [sys.executable, "-m", "gunicorn", "-c", str(file), "tests.deploy.served:app"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while "Listening at: http://127.0.0.1:" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        after = self.log.read_text().split("http://127.0.0.1:")[1]
        self.port = int(after.split()[0])

    def ask(self, path: str, method: str = "GET") -> Any:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, self.log.read_text()
            return json.loads(body)
        finally:
            connection.close()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def onlooker(url: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(url)
    onlooker.run("CREATE TABLE counted (id integer PRIMARY KEY, number integer NOT NULL)")
    onlooker.run("INSERT INTO counted VALUES (1, 7)")
    yield onlooker
    onlooker.close()


@pytest.fixture
def serve(url: str, onlooker: Onlooker, tmp_path: Path) -> Iterator[Serve]:
    """``serve(uses_database=False, **settings)``: a gunicorn that is ended after the test."""
    with ExitStack() as cleanup:

        def serve(uses_database: bool = False, **settings: Any) -> Served:
            served = Served(tmp_path, url, uses_database, **settings)
            cleanup.callback(served.stop)
            return served

        yield serve


def waiting(onlooker: Onlooker) -> int:
    return int(onlooker.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"))


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


KINDS = [
    pytest.param({"worker_class": "gthread"}, id="gthread"),
    pytest.param({"worker_class": "gevent", "preload": True}, id="gevent-preload"),
]


def skip_what_blocks(settings: dict[str, Any], driver: str) -> None:
    greenlets = settings["worker_class"] == "gevent"
    if greenlets and driver == "psycopg2" and not find_spec("psycogreen"):
        pytest.skip("psycogreen is not installed: psycopg2 blocks all greenlets while it waits")


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_no_connection_crosses_the_fork(
    worker_class: str, serve: Serve, onlooker: Onlooker
) -> None:
    served = serve(uses_database=True, worker_class=worker_class, workers=2, preload=True)
    by_process: dict[int, set[int]] = {}
    parents: set[int] = set()

    def both_have_answered() -> bool:
        with ThreadPoolExecutor(REQUESTS) as clients:
            for answer in clients.map(lambda _: served.ask("/pids"), range(REQUESTS)):
                by_process.setdefault(answer["process"], set()).update(answer["own"])
                parents.update(answer["parents"])
        return len(by_process) == 2

    wait_for(both_have_answered)
    one, other = by_process.values()
    assert not one & other
    assert not (one | other) & parents
    assert served.process.pid not in by_process
    # Nobody has ended the parent's own connections, which it keeps as they were.
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids) AND state = 'idle'"
    assert onlooker.scalar(alive, pids=list(parents)) == len(parents) > 0


@pytest.mark.parametrize("settings", KINDS)
def test_requests_wait_without_a_transaction_and_without_each_other(
    settings: dict[str, Any], serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    onlooker.run("SELECT pg_advisory_lock(1)")
    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = [clients.submit(served.ask, "/wait-outside") for _ in range(REQUESTS)]
        wait_for(lambda: waiting(onlooker) == REQUESTS)
        assert served.ask("/pids")["own"]  # while all of them wait
        inside = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        assert onlooker.scalar(inside) == 0
        onlooker.run("SELECT pg_advisory_unlock(1)")
        for answer in answers:
            assert answer.result(PATIENCE) == {"before": 7, "transactions": 0}


@pytest.mark.parametrize("settings", KINDS)
def test_transactions_at_the_same_time_do_not_mix(
    settings: dict[str, Any], serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    numbers = range(100, 100 + REQUESTS)
    onlooker.run("SELECT pg_advisory_lock(1)")
    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = [
            clients.submit(served.ask, f"/wait-inside/{number}", "POST") for number in numbers
        ]
        wait_for(lambda: waiting(onlooker) == REQUESTS)
        assert onlooker.scalar("SELECT count(*) FROM counted") == 1
        onlooker.run("SELECT pg_advisory_unlock(1)")
        said = [answer.result(PATIENCE) for answer in answers]
    for number, one in zip(numbers, said, strict=True):
        assert number in one["own"]
        assert one["pids"][0] == one["pids"][1]
    assert len({one["pids"][0] for one in said}) == REQUESTS
    assert len({one["session"] for one in said}) == REQUESTS
    assert max(one["transactions"] for one in said) == REQUESTS
    stored = onlooker.column("SELECT id FROM counted WHERE id >= 100 ORDER BY id")
    assert stored == [number for number in numbers if number % 2 == 0]


def test_a_greenlet_that_gives_up_leaves_no_transaction(
    serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    settings = {"worker_class": "gevent"}
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    onlooker.run("SELECT pg_advisory_lock(1)")
    assert served.ask("/timeout") == {"given_up": 2, "number": 7}
    onlooker.run("SELECT pg_advisory_unlock(1)")
    wait_for(
        lambda: (
            onlooker.scalar(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND state <> 'idle'"
            )
            == 0
        )
    )
    assert served.ask("/pids")["own"]
