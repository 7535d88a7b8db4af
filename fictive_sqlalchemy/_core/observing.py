"""The hooks through which the core tells an observer, and a recorder, what it does.

There is no observer unless :class:`fictive_sqlalchemy.strict_report.StrictReport` is on. The core
asks for one only where something waits, writes or locks, so that a read costs the same as ever.

There is no recorder unless something of :mod:`fictive_sqlalchemy.recording` is on. The core asks
for one where a transaction begins and where the pool gives a connection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import RLock
from typing import Any, Protocol


class Observer(Protocol):
    """What the core tells. All else it hears from SQLAlchemy's events."""

    def statement_writes(self, session: Any, *, only_locks: bool) -> Callable[[], object] | None:
        """Hear of a statement that may write or lock, of a session with ``begin_on_write=True``.

        :param session: The session, whose transaction has begun already; ``None`` if it is gone.
        :param only_locks: Whether no part of the statement writes.
        :returns: What is called if the statement fails.
        """
        ...

    def read_passes_over(self, session: Any) -> None:
        """Hear that a session in the strict mode does not flush what waits, where stock would.

        :param session: The session.
        """
        ...

    def flush_fails(self, session: Any) -> None:
        """Hear of a flush, explicit or automatic, that has raised an exception.

        :param session: The session, whose ``flush()`` is about to raise.
        """
        ...

    def runs_on_connection(self) -> None:
        """Hear of each use of a ``Connection`` of the user's own, to which a session is bound."""
        ...


observer: Observer | None = None
"""Who is told; ``None`` where nobody is."""


class Recorder(Protocol):
    """What the core tells while something records what is sent: see :mod:`.recorder`.

    What a connection has recorded of its open transaction is ``recorded`` of the connection. The
    connection tells that itself how the transaction ends.
    """

    def note_block(self, transaction: Any) -> None:
        """Hear that a session has begun a transaction, which may never send anything.

        :param transaction: The ``SessionTransaction``.
        """
        ...

    def noting_cursor(self, connection: Any) -> AbstractContextManager[None]:
        """Return what surrounds the making of a cursor on the server.

        :param connection: The connection.
        """
        ...

    def note_begin(self, connection: Any) -> None:
        """Hear that a transaction of a connection has begun; BEGIN is not sent yet.

        :param connection: The connection.
        """
        ...

    def beneath(self, dialect: Any, change: Callable[[], object]) -> None:
        """Change functions of a dialect so that the recorder's are around them.

        :param dialect: The dialect.
        :param change: What changes them.
        """
        ...

    def note_connection(self, engine: Any, info: dict[str, Any], started: float) -> None:
        """Hear that the pool has given a DBAPI connection.

        :param engine: The engine.
        :param info: The ``info`` of the pool's entry.
        :param started: When the pool was asked, by :func:`time.perf_counter`.
        """
        ...


changing_dialects = RLock()
"""Held by who changes functions of a dialect. The handler of a signal may do so, too."""

recorder: Recorder | None = None
"""Who is told; ``None`` where nothing records."""

reporters: tuple[Callable[[str], AbstractContextManager[object]], ...] = ()
"""What reports each unit of work, such as a task: see :mod:`fictive_sqlalchemy.reporting`."""


def reported(name: Callable[[], str]) -> AbstractContextManager[object]:
    """Return what surrounds a unit of work, for those who report it.

    :param name: Returns what it is. Called only if somebody reports.
    """
    if not reporters:
        return nullcontext()
    said = name()
    with ExitStack() as stack:
        for reporter in reporters:
            stack.enter_context(reporter(said))
        return stack.pop_all()
