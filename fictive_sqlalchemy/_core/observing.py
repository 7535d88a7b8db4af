"""The hook through which the core tells an observer what the two modes do differently.

There is no observer unless :class:`fictive_sqlalchemy.strict_report.StrictReport` is on. The core
asks for one only where something waits, writes or locks, so that a read costs the same as ever.
"""

from __future__ import annotations

from collections.abc import Callable
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
