"""A real gunicorn, which a test starts and ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import pytest

needs_gunicorn = pytest.mark.skipif(
    find_spec("gunicorn") is None or find_spec("gevent") is None,
    reason="gunicorn or gevent is not installed",
)

# Far longer than anything takes, so that a test that would hang fails instead.
PATIENCE = 60.0

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
    """A gunicorn, and the address it listens on.

    :param directory: Where its configuration and its log are.
    :param url: The database.
    :param app: The application, as gunicorn takes it.
    :param uses_database: Whether the parent process uses the database before it forks.
    :param settings: Of gunicorn: ``worker_class``, ``workers``, ``threads``, ``preload``.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        app: str = "tests.deploy.served:app",
        uses_database: bool = False,
        **settings: Any,
    ) -> None:
        file = directory / "gunicorn.conf.py"
        values = {"worker_class": "gthread", "workers": 1, "threads": 20, "preload": False}
        file.write_text(CONFIGURATION.format(**{**values, **settings}))
        self.log = directory / "log"
        environment = {**os.environ, "SERVED_DATABASE": url}
        if uses_database:
            environment["SERVED_USES_DATABASE"] = "1"
        command = [sys.executable, "-m", "gunicorn", "-c", str(file), app]
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
        """Return the JSON of an answer, which is a 200."""
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
        """End it as a service manager does."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any]) -> None:
    """Look until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


KINDS = [
    pytest.param({"worker_class": "gthread"}, id="gthread"),
    pytest.param({"worker_class": "gevent", "preload": True}, id="gevent-preload"),
]


def skip_what_blocks(settings: dict[str, Any], driver: str) -> None:
    """Skip a test for which greenlets have to run while others wait for the database."""
    greenlets = settings["worker_class"] == "gevent"
    if greenlets and driver == "psycopg2" and not find_spec("psycogreen"):
        pytest.skip("psycogreen is not installed: psycopg2 blocks all greenlets while it waits")
