"""Celery tasks that run in an application context of their own, and in a transaction on request.

::

    from celery import Celery

    from fictive_sqlalchemy.ext.celery import DatabaseTask

    celery = Celery("example", task_cls=DatabaseTask.of(example))

    @celery.task(atomic=True)
    def rename(user_id, name):
        db.session.get(User, user_id).name = name
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import wraps
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakSet

from sqlalchemy import exc
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, scoped_session

from .._core.errors import see
from .._core.local_settings import begin_before_settings
from .._core.observing import reported
from .._extras import FLASK, installed_by
from ..owned import Owned

with installed_by("this package with the extra [celery]"):
    from celery import Task
    from celery.exceptions import ImproperlyConfigured
    from celery.signals import worker_process_init
with installed_by(FLASK):
    from flask import Flask

if TYPE_CHECKING:
    from typing_extensions import Self

    _Task = Task[..., Any]
else:
    _Task = Task  # not generic in Celery 5.4

__all__ = ["DatabaseTask"]

_apps: WeakSet[Flask] = WeakSet()
"""The apps that were given to DatabaseTask.of(), or made by its function, in this process."""


class _App:
    """The Flask app of a task class: given, or made when the process runs its first task."""

    def __init__(self, app: Flask | Callable[[], Flask]) -> None:
        self._lock = Lock()  # the first two tasks may run in two threads
        # An app is callable, too: it is a WSGI application.
        self._make = None if isinstance(app, Flask) else app
        self._made = app if isinstance(app, Flask) else None
        if self._made is not None:
            _apps.add(self._made)

    def get(self) -> Flask:
        with self._lock:
            if self._made is None:
                assert self._make is not None
                made: Any = self._make()
                if not isinstance(made, Flask):
                    raise ImproperlyConfigured(
                        f"The function given to DatabaseTask.of() returned {made!r}: let it "
                        "return the Flask app." + see("task-without-app")
                    )
                _apps.add(made)
                self._made = made
            return self._made


class DatabaseTask(_Task):
    """A task that runs in an application context of its own, and leaves no session behind.

    Make this class the task class of your Celery app with :meth:`of`, and every task uses it, with
    ``@celery.task``, with ``@shared_task`` and as a task class. If a task is called inside another
    context (in a view, in another task, in eager mode), it still has a new context, and with it a
    session of its own.

    Outside a transaction, the session behaves as in a view: a read is one statement, and
    ``with db.session.begin():`` is a transaction. With :attr:`atomic`, the whole task is one
    transaction.
    """

    abstract = True

    atomic: bool = False
    """Whether the task is a transaction: ``@celery.task(atomic=True)``.

    BEGIN is sent with the first statement. A transaction that is one INSERT or UPDATE sends that
    statement alone. COMMIT is sent when the task returns, before Celery stores the result, sends
    linked tasks or, with ``acks_late``, acknowledges the message. An error of COMMIT is an error of
    the task. ROLLBACK is sent on any exception, Celery's ``Retry``, ``Ignore``, ``Reject`` and
    ``SoftTimeLimitExceeded`` included. At the hard time limit, Celery kills the process, and
    PostgreSQL rolls back.
    """

    _app_of_task: ClassVar[_App | None] = None

    @classmethod
    def of(cls, app: Flask | Callable[[], Flask]) -> type[Self]:
        """Return this class for an app, to be the ``task_cls`` of a Celery app.

        :param app: The Flask app, or a function that makes it. The function is called once in
            each process that runs tasks, with the first task.
        :raises TypeError: if ``app`` is neither.
        """
        if not callable(app) or isinstance(app, type):
            raise TypeError(
                f"DatabaseTask.of() takes the Flask app, or a function that makes it, and not "
                f"{app!r}." + see("task-without-app")
            )
        of_app = type("DatabaseTask", (cls,), {"abstract": True, "_app_of_task": _App(app)})
        return cast("type[Self]", of_app)

    @property
    def flask_app(self) -> Flask:
        """The Flask app of the task's class, or of the ``task_cls`` of its Celery app.

        :raises celery.exceptions.ImproperlyConfigured: if neither of these classes has an app.
        """
        for task_class in (type(self), self.app.Task):
            if issubclass(task_class, DatabaseTask) and task_class._app_of_task is not None:
                return task_class._app_of_task.get()
        raise ImproperlyConfigured(
            f"The task {self.name} does not know its Flask app: make its Celery app with "
            "Celery(…, task_cls=DatabaseTask.of(app))." + see("task-without-app")
        )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Wrap ``run()``, which is called in every way of executing a task.

        ``run()`` is wrapped on the instance, as Celery's ``autoretry_for`` does. ``autoretry_for``
        is added later and surrounds this wrapper. So ``autoretry_for`` sees an error of COMMIT, and
        the rollback is done before the task is sent again.
        """
        task = super().__new__(cls)
        run = task.run

        @wraps(run)
        def run_in_context(*args: Any, **kwargs: Any) -> Any:
            app = task.flask_app
            with reported(lambda: f"task {task.name}"), _context(app), ExitStack() as stack:
                if task.atomic:
                    stack.enter_context(_one_transaction(_session(app, task.name)))
                result: Any = run(*args, **kwargs)
                _refuse_unfinished(task.name, result)
                return result

        instance: Any = task
        instance.run = run_in_context
        return task


@contextmanager
def _context(app: Flask) -> Generator[None]:
    """Push a new application context, and leave no session behind at its end."""
    with ExitStack() as at_the_end, app.app_context():
        # The app removes a session in a teardown function, which is not called if another teardown
        # function fails. The next context may be at the same address, and would then find that
        # session with its pending changes.
        inside = copy_context()
        for sessions in _scoped_sessions(app):
            at_the_end.callback(inside.run, sessions.remove)
        yield


_NO_COMMIT = (
    "An atomic task is committed when it returns, and not before: leave commit() out, or leave "
    "atomic=True out and put each part that is to be stored at once into "
    "`with session.begin():`. Nothing was sent." + see("task-ended")
)


@contextmanager
def _one_transaction(session: Session) -> Generator[None]:
    """Begin a transaction that only the end of this block ends."""
    transaction = begin_before_settings(session)
    with transaction, Owned(session, transaction, _NO_COMMIT) as owned:
        yield
        owned.check_not_aborted()
        if session.get_transaction() is not transaction:
            raise exc.InvalidRequestError(
                "An atomic task has ended its own transaction, so that nothing is stored: leave "
                "rollback(), close() and remove() out. To roll back, raise an exception, or call "
                "session.set_rollback(). Put a statement that may fail into "
                "`with session.atomic():` or `with session.begin_nested():`." + see("task-ended")
            )


def _scoped_sessions(app: Flask) -> list[scoped_session[Any]]:
    """Return the sessions of an app: of Flask-SQLAlchemy and of ``flask_scoped_session``."""
    found = (
        getattr(app.extensions.get("sqlalchemy"), "session", None),
        getattr(app, "scoped_session", None),
    )
    return [sessions for sessions in found if isinstance(sessions, scoped_session)]


def _session(app: Flask, name: str) -> Session:
    found = _scoped_sessions(app)
    if len(found) == 1:
        session: Session = found[0]()
        return session
    if found:
        raise ImproperlyConfigured(
            f"The app of the atomic task {name} has two sessions, db.session and "
            "app.scoped_session, which can't be committed as one: leave atomic=True out and put "
            "`with session.begin():` around what one of them does." + see("task-session")
        )
    raise ImproperlyConfigured(
        f"The app of the atomic task {name} has no session: call db.init_app(app) or "
        "flask_scoped_session(session_factory, app)." + see("task-session")
    )


def _refuse_unfinished(name: str, result: object) -> None:
    if isinstance(result, (Generator, Coroutine)):
        unfinished: Any = result  # pyright: ignore[reportUnknownVariableType]
        unfinished.close()
        raise TypeError(
            f"The task {name} returned a {type(unfinished).__name__}, whose code would run, if "
            "ever, when the context and the transaction of the task have ended: return a list, "
            "or the result of asyncio.run()." + see("task-returns-generator")
        )


# After a fork

_imported_by = os.getpid()


@worker_process_init.connect
def _leave_connections_to_the_parent(**_: Any) -> None:
    """Empty the pools in a child process, because the parent goes on using the connections.

    A child that closed the connections would end them for the parent, hence ``close=False``: see
    "Using Connection Pools with Multiprocessing or os.fork()" in the documentation of SQLAlchemy.
    """
    if os.getpid() == _imported_by:  # the solo pool sends the signal, too, without a child process
        return
    for app in list(_apps):
        for engine in _engines(app):
            engine.dispose(close=False)


def _engines(app: Flask) -> set[Engine]:
    binds: list[Any] = []
    with app.app_context():
        binds += getattr(app.extensions.get("sqlalchemy"), "engines", {}).values()
    for sessions in _scoped_sessions(app):
        factory: Any = sessions.session_factory
        options: dict[str, Any] = getattr(factory, "kw", {})
        binds += [options.get("bind"), *(options.get("binds") or {}).values()]
    return {bind for bind in binds if isinstance(bind, Engine)}
