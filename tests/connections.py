"""Every DBAPI connection of an engine, watched through its pool's events, and where it rests."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event

from fictive_sqlalchemy import OptInEngine


class Connections:
    """The connections of an engine from now on.

    :param engine: The engine; no connection of it may have been made before.
    :param driver: ``"psycopg2"`` or ``"psycopg"``.
    """

    def __init__(self, engine: OptInEngine, driver: str) -> None:
        self.driver = driver
        self.alive: dict[int, Any] = {}
        """The DBAPI connections that are not closed, each by its id."""
        self.flags: dict[int, Any] = {}
        """The flags each had when it was made."""
        self.holders: dict[int, object] = {}
        """Who has each that is out of the pool: what :attr:`holder` was at that time."""
        self.holder: object = None
        self.killed: set[int] = set()
        """The server processes that the test has killed."""
        self.closing: list[int] = []
        """The server processes of connections that were closed in a transaction: only the server
        ends that, when it comes to read of the close."""
        self.surprises: list[str] = []
        """The disconnections while nothing was killed."""
        event.listen(engine, "connect", self._connect)
        event.listen(engine, "checkout", self._checkout)
        event.listen(engine, "checkin", self._checkin)
        event.listen(engine, "close", self._close)
        event.listen(engine, "close_detached", self._close)
        event.listen(engine, "handle_error", self._error)

    def living(self) -> list[Any]:
        """The connections whose server process was not killed."""
        return [
            connection
            for connection in list(self.alive.values())
            if not connection.closed and connection.info.backend_pid not in self.killed
        ]

    def status(self, connection: Any) -> int:
        """The libpq transaction status: 0 when idle."""
        return int(connection.info.transaction_status)

    def check_rest(self) -> None:
        """Check that each rests: in autocommit, idle, its flags as it started, here and there."""
        for connection in self.living():
            assert connection.autocommit
            assert self.status(connection) == 0
            assert self._flags_of(connection) == self.flags[id(connection)]
            with connection.cursor() as cursor:
                for setting, value in (
                    ("isolation", "read committed"),
                    ("read_only", "off"),
                    ("deferrable", "off"),
                ):
                    cursor.execute(f"SHOW default_transaction_{setting}")
                    assert cursor.fetchone() == (value,)

    def _flags_of(self, connection: Any) -> tuple[Any, ...]:
        readonly = "readonly" if self.driver == "psycopg2" else "read_only"
        return tuple(
            getattr(connection, name) for name in ("isolation_level", readonly, "deferrable")
        )

    def _connect(self, connection: Any, record: Any) -> None:
        self.alive[id(connection)] = connection
        self.flags[id(connection)] = self._flags_of(connection)

    def _checkout(self, connection: Any, record: Any, proxy: Any) -> None:
        self.holders[id(connection)] = self.holder

    def _checkin(self, connection: Any, record: Any) -> None:
        self.holders.pop(id(connection), None)

    def _close(self, connection: Any, *_: Any) -> None:
        if self.status(connection):
            self.closing.append(connection.info.backend_pid)
        for known in (self.alive, self.flags, self.holders):
            known.pop(id(connection), None)

    def _error(self, context: Any) -> None:
        if context.is_disconnect and not self.killed:
            self.surprises.append(f"a disconnection that nobody caused: {context!r}")
