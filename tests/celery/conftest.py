"""What the tests of the tasks share: workers, each a process of its own, and an application."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.result import AsyncResult
from flask import Flask

from fictive_sqlalchemy.ext.celery import DatabaseTask
from tests.celery.files import results
from tests.celery.settings import configure
from tests.celery.tasks import Item, celery_of, db
from tests.flask.conftest import MakeApp, make_app
from tests.library import Onlooker, assert_at_rest
from tests.postgres import PostgresServer
from tests.wire import WireProxy

__all__ = ["make_app"]

ROOT = Path(__file__).parent.parent.parent

# Far longer than anything takes, so that a test that would hang fails instead.
PATIENCE = 60

_TABLES = """
CREATE TABLE item (id serial PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE seat (id serial PRIMARY KEY, place integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
"""


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds; return what it is then."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


class Worker:
    """A worker, and the way to send it tasks."""

    def __init__(
        self, process: subprocess.Popen[bytes], celery: Celery[Any], folder: Path, url: str
    ) -> None:
        self.process = process
        self.celery = celery
        self.folder = folder
        self.database = Onlooker(url)

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        """Send a task."""
        return self.celery.send_task(name, args, **options)

    def run(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a task and return its result."""
        return self.result(self.send(name, *args, **options))

    def result(self, sent: AsyncResult[Any]) -> Any:
        """Wait for a result."""
        return sent.get(timeout=PATIENCE, interval=0.02)

    def wait_until_done(self, sent: AsyncResult[Any]) -> None:
        """Wait until a task has run, also where no result tells it."""
        wait_for((self.folder / f"done-{sent.id}").exists)

    def items(self) -> list[str]:
        """The names of the items that are stored."""
        return self.database.column("SELECT name FROM item ORDER BY name")

    def states(self) -> set[str]:
        """What the connections to the database do, our own left out."""
        return set(
            self.database.column(
                "SELECT state FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )

    def stop(self) -> None:
        """Stop it: what is under way is finished first."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE)


@contextmanager
def started(
    url: str,
    folder: Path,
    pool: str,
    *,
    wire_url: str | None = None,
    broker: str = "files://",
    backend: str | None = None,
    **environment: str,
) -> Iterator[Worker]:
    """A worker that is ready, stopped at the end."""
    if backend is None:
        (folder / "results").mkdir()
        backend = results(folder / "results")
    environment = {
        **os.environ,
        "TASKS_BACKEND": backend,
        "TASKS_BROKER": broker,
        "TASKS_DATABASE": wire_url or url,
        "TASKS_FOLDER": str(folder),
        "TASKS_SENT_BY": str(os.getpid()),
        **environment,
    }
    celery: Celery[Any] = Celery("client", set_as_current=False)
    configure(celery, broker, backend, folder)
    log = folder / "log"
    command = f"-m celery -A tests.celery.worker_app worker --pool={pool} --concurrency=2"
    command += " --loglevel=WARNING --without-gossip --without-mingle --without-heartbeat"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command.split()],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, its children included
        )
        worker = Worker(process, celery, folder, url)
        try:
            wait_for(lambda: (folder / "ready").exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield worker
            worker.stop()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            celery.close()
            worker.database.close()


@contextmanager
def own_database(server: PostgresServer, driver: str) -> Iterator[str]:
    """The URL of a database with the worker's tables."""
    name = server.create_database()
    url = server.url(driver, name)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text(_TABLES))
    try:
        yield url
    finally:
        server.drop_database(name)


@pytest.fixture(scope="module")
def make_worker(
    server: PostgresServer, driver: str, wire: WireProxy, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """``with make_worker(pool, **options) as worker:``, with an empty database of its own."""

    @contextmanager
    def make(pool: str, **options: Any) -> Iterator[Worker]:
        with (
            own_database(server, driver) as url,
            started(
                url, tmp_path_factory.mktemp(pool), pool, wire_url=wire.url(url), **options
            ) as worker,
        ):
            yield worker

    return make


@pytest.fixture
def app(make_app: MakeApp, url: str, wire_url: str) -> Iterator[Flask]:
    with make_app(db, url).app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Item(name="one"))
    app = make_app(db, wire_url)
    with app.app_context():  # what SQLAlchemy and psycopg ask on the first connection
        db.session.execute(sa.text("SELECT 1"))
    yield app
    with app.app_context():
        assert_at_rest(db.engine)


@pytest.fixture
def task(app: Flask) -> Callable[..., Any]:
    """``@task(**options)``, of a Celery app of this test."""
    celery = celery_of(DatabaseTask.of(app))

    def decorate(**options: Any) -> Any:
        return celery.task(shared=False, **options)

    return decorate
