"""The one connection to the server that all stand-ins share, and the savepoints on it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from .stand_in import IDLE, Settings

_MARK = "fictive_sqlalchemy_isolation"

# Without a timeout, a test could wait for ever for a lock that the test itself holds, on a
# connection that is not isolated.
_LOCK_TIMEOUT = """
SELECT pg_catalog.set_config('lock_timeout', '{milliseconds}', true)
WHERE pg_catalog.current_setting('lock_timeout') = '0'
"""

# COMMIT checks the constraints that are deferred until then, and the next transaction begins with
# each constraint as it was declared. They are listed by name, because SET CONSTRAINTS ALL would
# also hold for constraints that are made later.
# https://www.postgresql.org/docs/current/sql-set-constraints.html
_DEFERRABLE = """
SELECT string_agg(name, ', '), string_agg(name, ', ') FILTER (WHERE deferred) FROM (
    SELECT format('%I.%I', nspname, conname) AS name, bool_and(condeferred) AS deferred
    FROM pg_catalog.pg_constraint
    JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
    WHERE has_schema_privilege(connamespace, 'USAGE') AND NOT pg_is_other_temp_schema(connamespace)
    GROUP BY 1 HAVING bool_or(condeferrable)
) AS named
"""

# A transaction or savepoint gets an id, and a lock on this id, with the first row that it writes.
# https://www.postgresql.org/docs/current/subxacts.html
_IDS = """
SELECT count(*) FROM pg_catalog.pg_locks
WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND pid = pg_backend_pid()
AND transactionid::text::bigint IS DISTINCT FROM txid_current_if_assigned() % 4294967296
"""


class Savepoints:
    """Sends what isolation itself needs: savepoints, their release, and the rollback to them.

    An interruption, such as Ctrl-C or a timeout, may come at any moment. So a savepoint that an
    error has to undo is noted before anything is done in it, and :meth:`release` takes the note
    back. The next use of the connection undoes the savepoints that are still noted.

    :param dbapi: The driver's module.
    :param physical: The driver's connection, in autocommit.
    :param cursor: A cursor of the connection, of the driver's own class.
    """

    def __init__(self, dbapi: Any, physical: Any, cursor: Any) -> None:
        self.physical = physical
        self.is_sending = False
        """Whether a statement of the isolation itself is being sent."""
        self._error: type[Exception] = dbapi.Error
        self._cursor = cursor
        self._names = count(1)
        self._to_undo: list[str] = []  # the innermost savepoint first
        self._released = ""  # the savepoint whose RELEASE was sent last

    @property
    def status(self) -> Any:
        """The driver's transaction status."""
        return self.physical.info.transaction_status

    @property
    def is_over(self) -> bool:
        """Whether the connection is lost, or its transaction has ended."""
        return bool(self.physical.closed) or self.status == IDLE

    def is_read_only_server(self) -> bool:
        """Ask whether transactions on this connection are read-only unless they say otherwise."""
        self._send("SHOW default_transaction_read_only")
        return bool(self._cursor.fetchone()[0] == "on")

    def open(self, lock_timeout: float) -> None:
        """Begin the transaction that is rolled back at the end.

        :param lock_timeout: How many seconds a statement waits for a lock.
        """
        self._send(_LOCK_TIMEOUT.format(milliseconds=int(lock_timeout * 1000)))
        self._send(f"SAVEPOINT {_MARK}")

    def close(self) -> bool:
        """Roll back everything.

        :returns: Whether the transaction had been ended before, so that something is stored.
        """
        was_ended = bool(self.status == IDLE)
        try:
            if not was_ended:
                self._send(f"ROLLBACK TO SAVEPOINT {_MARK}")
        except self._error:
            was_ended = not self.physical.closed
        if not self.physical.closed:
            self._cursor.close()
            self.physical.rollback()
        return was_ended

    def set(self) -> str:
        """Set a savepoint, and return its name."""
        name = f"{_MARK}_{next(self._names)}"
        self._send(f"SAVEPOINT {name}")
        return name

    def drop(self, savepoint: str) -> None:
        """Release a savepoint in which nothing was written."""
        self._send(f"RELEASE SAVEPOINT {savepoint}")

    def make_read_only(self) -> None:
        """Let the server refuse writes until the innermost savepoint is released or undone."""
        self._send("SET TRANSACTION READ ONLY")

    def set_local(self, settings: Settings) -> None:
        """Send settings that were not sent yet; they last until :meth:`take_back`.

        If the savepoint is undone, the server restores the earlier values.
        """
        if settings.are_sent:
            return
        if new := [name for name in settings.wanted if name not in settings.before]:
            calls = ", ".join(["pg_catalog.current_setting(%s, true)"] * len(new))
            self._send(f"SELECT {calls}", new)
            settings.before.update(zip(new, self._cursor.fetchone(), strict=True))
        self._set(settings.with_defaults())
        settings.are_sent = True

    def take_back(self, settings: Settings) -> None:
        """Take back the settings of a released savepoint, as the end of a transaction does."""
        if settings.before:
            self._set(settings.before)
        settings.before, settings.are_sent = {}, not settings.wanted

    def _set(self, settings: dict[str, str | None]) -> None:
        calls = ", ".join(["pg_catalog.set_config(%s, %s, true)"] * len(settings))
        self._send(f"SELECT {calls}", [each for item in settings.items() for each in item])

    def count_ids(self) -> int:
        """Ask how many savepoints have written something."""
        self._send(_IDS)
        return int(self._cursor.fetchone()[0])

    def release(self, savepoint: str, check: bool = True) -> None:
        """Do what COMMIT would do in production.

        :param savepoint: A savepoint that was noted by :meth:`note_innermost`.
        :param check: Whether to check the deferred constraints before.
        :raises Exception: the driver's error, if a deferred constraint is violated.
        """
        if check:
            self._send(_DEFERRABLE)
            deferrable, deferred = self._cursor.fetchone()
            if deferrable:
                self._send(f"SET CONSTRAINTS {deferrable} IMMEDIATE")
            if deferred:
                self._send(f"SET CONSTRAINTS {deferred} DEFERRED")
        self._released = savepoint
        self._send(f"RELEASE SAVEPOINT {savepoint}")
        self._to_undo.remove(savepoint)

    def undo(self, savepoint: str) -> None:
        """Do what ROLLBACK would do in production."""
        self.note_innermost(savepoint)
        self.undo_noted()

    def note_innermost(self, savepoint: str) -> None:
        """Note a savepoint to undo unless it is released; it is nested in those noted before."""
        self._to_undo.insert(0, savepoint)

    def note_outermost(self, savepoint: str) -> None:
        """Note a savepoint to undo; those noted before are nested in it."""
        self._to_undo.append(savepoint)

    def undo_noted(self) -> None:
        """Undo every savepoint that is noted, the innermost first."""
        while self._to_undo:
            savepoint = self._to_undo[0]
            # An interruption may have come after the RELEASE was sent and before the note was
            # taken back.
            is_released = (savepoint, "RELEASE") == (self._released, self._cursor.statusmessage)
            try:
                if not is_released and not self.is_over:
                    self._send(f"ROLLBACK TO SAVEPOINT {savepoint}")
            except self._error:
                self.physical.close()  # the next statement raises an error
            self._to_undo.remove(savepoint)
            if not is_released and not self.is_over:
                self._send(f"RELEASE SAVEPOINT {savepoint}")

    def _send(self, sql: str, parameters: Sequence[str | None] | None = None) -> None:
        self.is_sending = True
        try:
            self._cursor.execute(sql, parameters)
        finally:
            self.is_sending = False
