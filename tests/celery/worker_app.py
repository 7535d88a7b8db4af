"""What a worker of the tests runs: ``python -m celery -A tests.celery.worker_app worker``.

The environment names the database, the broker, the result backend and a directory of the test's.
"""

# mypy: disable-error-code="name-defined,misc,untyped-decorator"

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery, shared_task
from celery.exceptions import Ignore, Reject
from celery.signals import task_postrun, worker_init, worker_ready, worker_shutdown
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy.ext.celery import DatabaseTask
from tests.celery.settings import configure
from tests.flask.support import Database

# Far longer than any task takes, so that a test that would hang fails instead.
PATIENCE = 30

FOLDER = Path(os.environ["TASKS_FOLDER"])

# Flask-SQLAlchemy as it is, or the extension under test.
db: Any = SQLAlchemy() if "TASKS_STOCK" in os.environ else Database()


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Seat(db.Model):
    """Its constraint is checked at COMMIT."""

    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["TASKS_DATABASE"]
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 1 if USED_BY_PARENT else 5}
    db.init_app(app)
    return app


USED_BY_PARENT = "TASKS_PARENT_USES_DATABASE" in os.environ

flask_app = create_app()  # as `app`, celery -A would take it for the Celery app
celery: Any = Celery("tests", task_cls=DatabaseTask.of(flask_app))
configure(celery, os.environ["TASKS_BROKER"], os.environ["TASKS_BACKEND"], FOLDER)
celery.set_default()


@worker_ready.connect
def say_that_it_is_ready(**_: Any) -> None:
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    (FOLDER / "ready").touch()


def end_with_the_tests() -> None:
    """Leave no process behind when the tests are killed."""
    while os.getppid() == int(os.environ["TASKS_SENT_BY"]):
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)  # the group is the worker and its children


@task_postrun.connect
def say_that_it_is_done(task_id: str, **_: Any) -> None:
    (FOLDER / f"done-{task_id}").touch()


# The parent process: it uses the database before it forks, and after its children have.

BACKEND_PID = sa.text("SELECT pg_backend_pid()")
of_parent: list[Any] = []


@worker_init.connect
def use_database_before_the_fork(**_: Any) -> None:
    if USED_BY_PARENT:
        with flask_app.app_context():
            engine = db.engine
            idle, in_use = engine.connect(), engine.connect()
            transaction = in_use.begin()
            pids = [idle.scalar(BACKEND_PID), in_use.scalar(BACKEND_PID)]
            in_use.execute(sa.insert(Item).values(name="of the parent"))
            idle.close()
            of_parent.extend([engine, in_use, transaction])
        (FOLDER / "parent-before").write_text(" ".join(map(str, pids)))


@worker_shutdown.connect
def use_database_after_the_tasks(**_: Any) -> None:
    if USED_BY_PARENT:
        engine, in_use, transaction = of_parent
        with engine.connect() as idle:
            pids = [idle.scalar(BACKEND_PID), in_use.scalar(BACKEND_PID)]
        transaction.commit()
        in_use.close()
        (FOLDER / "parent-after").write_text(" ".join(map(str, pids)))


# The tasks


@shared_task(name="read")
def read(id: int) -> str:
    return str(db.session.get(Item, id).name)


def write(self: Any, name: str, then: str = "return") -> str:
    db.session.add(Item(name=f"{name} {self.request.retries}"))
    db.session.flush()
    (FOLDER / f"has-written-{self.request.id}").touch()
    if then == "fail":
        raise ValueError(name)
    if then == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if then == "ignore":
        raise Ignore
    if then == "reject":
        raise Reject
    if then == "sleep":
        time.sleep(PATIENCE)
    return name


write_in_pieces = celery.task(write, name="write", bind=True)
write_atomically = celery.task(write, name="write_atomically", bind=True, atomic=True)


def sit(self: Any, place: int) -> int:
    place += self.request.retries
    db.session.add(Seat(place=place))
    db.session.flush()  # or the INSERT would be the whole transaction, without a COMMIT to fail
    return place


sit_or_fail = celery.task(sit, name="sit", bind=True, atomic=True)
sit_in_the_end = celery.task(
    sit,
    name="sit_in_the_end",
    bind=True,
    atomic=True,
    autoretry_for=(IntegrityError,),
    retry_kwargs={"countdown": 0},
)


@celery.task(name="count", atomic=True)
def count(_: Any) -> int:
    """Linked to another task, whose result it takes."""
    found: int = db.session.scalar(sa.select(sa.func.count(Item.id)))
    return found


@celery.task(name="meet")
def meet(name: str, others: int) -> tuple[int, int, int, list[str]]:
    """Wait for the others to come, each of whom stores its name; and say who one is."""
    with db.session.begin():
        db.session.add(Item(name=name))
    pending = Item(name=f"{name}, pending")
    db.session.add(pending)
    deadline = time.monotonic() + PATIENCE
    while db.session.scalar(sa.select(sa.func.count(Item.id))) < others:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    new = [item.name for item in db.session.new]
    return os.getpid(), threading.get_ident(), db.session.scalar(BACKEND_PID), new
