"""The hooks through which the core tells an observer, and a recorder, what the core does.

There is no observer unless :class:`fictive_sqlalchemy.strict_report.StrictReport` is on. The core
looks for the observer only where changes are pending, or where a statement may write or lock. So a
plain read costs the same with and without an observer.

There is no recorder unless something of :mod:`fictive_sqlalchemy.recording` is on. The core looks
for the recorder where a transaction begins, and where the pool gives a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import RLock
from typing import Any, Protocol


class Observer(Protocol):
    """What the core tells an observer, which hears everything else from SQLAlchemy's events."""

    def statement_writes(self, session: Any, *, only_locks: bool) -> Callable[[], object] | None:
        """Hear that a statement of a session with ``begin_on_write=True`` may write or lock.

        :param session: The session, whose transaction has begun already.
        :param only_locks: Whether the statement locks rows, and no part of it writes.
        :returns: A function to call if the statement fails, or ``None``.
        """
        ...

    def read_passes_over(self, session: Any) -> None:
        """Hear that a session in the strict mode leaves changes pending that stock would flush.

        :param session: The session.
        """
        ...

    def flush_fails(self, session: Any) -> None:
        """Hear of a flush, explicit or automatic, that has raised an exception.

        :param session: The session, whose ``flush()`` is about to raise.
        """
        ...

    def runs_on_connection(self) -> None:
        """Hear that a session uses a ``Connection`` of the user, to which the session is bound."""
        ...


observer: Observer | None = None
"""The observer to tell; ``None`` if there is none."""


class Recorder(Protocol):
    """What the core tells while something records what is sent: see :mod:`.recorder`.

    What is recorded of the open transaction of a connection is in the connection's attribute
    ``recorded``. When the transaction ends, the connection itself notes the outcome there.
    """

    def note_block(self, transaction: Any) -> None:
        """Hear that a session has begun a transaction, which may never send anything.

        :param transaction: The ``SessionTransaction``.
        """
        ...

    def noting_cursor(self, connection: Any) -> AbstractContextManager[None]:
        """Return a context manager for the code that makes a server-side cursor.

        :param connection: The connection.
        """
        ...

    def note_begin(self, connection: Any) -> None:
        """Hear that a transaction of a connection has begun; BEGIN is not sent yet.

        :param connection: The connection.
        """
        ...

    def beneath(self, dialect: Any, change: Callable[[], object]) -> None:
        """Change functions of a dialect, and have the recorder's functions wrap the changed ones.

        :param dialect: The dialect.
        :param change: A function that changes them.
        """
        ...

    def note_connection(self, engine: Any, info: dict[str, Any], started: float) -> None:
        """Hear that the pool has given a DBAPI connection.

        :param engine: The engine.
        :param info: The ``info`` of the pool's entry.
        :param started: The time at which the pool was asked, by :func:`time.perf_counter`.
        """
        ...


changing_dialects = RLock()
"""Held while functions of a dialect are changed. A signal handler may change some meanwhile, so the
lock is reentrant."""

recorder: Recorder | None = None
"""The recorder to tell; ``None`` if nothing records."""

reporters: tuple[Callable[[str], AbstractContextManager[object]], ...] = ()
"""The functions that report units of work, such as tasks: see :mod:`fictive_sqlalchemy.reporting`.
Each function takes the name of a unit, and returns a context manager."""


def reported(name: Callable[[], str]) -> AbstractContextManager[object]:
    """Return a context manager for a unit of work, which :data:`reporters` report.

    :param name: A function that returns the name of the unit. Called only if there are reporters.
    """
    if not reporters:
        return nullcontext()
    said = name()
    with ExitStack() as stack:
        for reporter in reporters:
            stack.enter_context(reporter(said))
        return stack.pop_all()
