"""Switch the DBAPI connection into autocommit and out of it, for each driver.

A connection of this package is in autocommit, except during a transaction. With psycopg2 and
psycopg the driver has attributes for both directions, so neither costs a round trip.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from .errors import see
from .options import DEFAULT, TransactionOptions, isolation_levels

# Keys in the ``info`` of a pool's entry. The pool empties ``info`` when it closes the connection.
STARTED_WITH = "fictive_sqlalchemy.started_with"
HELD_CURSORS = "fictive_sqlalchemy.held_cursors"
USED_BY = "fictive_sqlalchemy.used_by"
LEFT_BEHIND = "fictive_sqlalchemy.left_behind"

# The drivers that have attributes for isolation level and flags, and cursors WITH HOLD.
PSYCOPG = ("psycopg2", "psycopg")

# The numbers of PQtransactionStatus of libpq, which psycopg2 and psycopg use as well:
# https://www.postgresql.org/docs/current/libpq-status.html
_IDLE, _ACTIVE, _IN_TRANSACTION, _IN_ERROR = 0, 1, 2, 3

# The server sends an ErrorResponse to an idle client only before it closes the connection:
# https://www.postgresql.org/docs/current/protocol-message-formats.html
_ERROR_RESPONSE = b"E"


# For enter_autocommit(), if nobody knows which options were set: all options are reset.
_ANYTHING = TransactionOptions("ANY", True, True)

# Autocommit, isolation level, read-only and deferrable of a psycopg2 or psycopg connection in
# autocommit on which nothing else was set.
_UNTOUCHED = (True, None, None, None)


class Switch:
    """Takes connections out of autocommit and back, with any dialect that offers AUTOCOMMIT.

    This class uses only methods of SQLAlchemy's dialect. The driver decides whether they send
    something.

    :param dialect: The dialect of the engine.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect: Any = dialect

    def enter_autocommit(
        self, connection: Any, used: TransactionOptions = DEFAULT, started_with: Any = None
    ) -> None:
        """Put a connection that is in no transaction into autocommit.

        :param connection: The DBAPI connection.
        :param used: The options of the transaction that has ended.
        :param started_with: What :meth:`started_with` returned before the connection's first use.
        """
        if used.isolation_level is not None:
            self.dialect.set_isolation_level(connection, self.dialect.default_isolation_level)
        read_only, deferrable = started_with or (False, False)
        if used.read_only is not None:
            self.dialect.set_readonly(connection, read_only)
        if used.deferrable is not None:
            self.dialect.set_deferrable(connection, deferrable)
        self.dialect.set_isolation_level(connection, "AUTOCOMMIT")

    def leave_autocommit(self, connection: Any, options: TransactionOptions) -> None:
        """Take a connection out of autocommit: its next statement begins a transaction.

        :param connection: The DBAPI connection.
        :param options: The options of that transaction.
        """
        level = options.isolation_level or self.dialect.default_isolation_level
        self.dialect.set_isolation_level(connection, level)
        self._set_flags(connection, options.read_only, options.deferrable)

    def _set_flags(self, connection: Any, read_only: bool | None, deferrable: bool | None) -> None:
        """Set the flags that are not ``None``."""
        if read_only is not None:
            self.dialect.set_readonly(connection, read_only)
        if deferrable is not None:
            self.dialect.set_deferrable(connection, deferrable)

    def has_begun(self, connection: Any) -> bool:
        """Tell whether a transaction is open on the server, as far as the driver knows.

        Sends nothing.

        :param connection: The DBAPI connection.
        """
        return False

    def is_aborted(self, connection: Any) -> bool:
        """Tell whether COMMIT would roll back, because a statement failed. Sends nothing.

        :param connection: The DBAPI connection.
        """
        return False

    def is_busy(self, connection: Any) -> bool:
        """Tell whether a statement was sent and its answer was not read yet. Sends nothing.

        :param connection: The DBAPI connection.
        """
        return False

    def is_lost(self, connection: Any) -> bool:
        """Tell whether the server has closed an idle connection, as far as the client can know.

        Sends nothing, and waits for nothing.

        :param connection: The DBAPI connection.
        """
        return bool(self.is_closed(connection))

    def is_closed(self, connection: Any) -> Any:
        """Tell whether the driver has closed a connection. Sends nothing.

        :param connection: The DBAPI connection.
        """
        return getattr(connection, "closed", False)

    def watch(self, connection: Any) -> Callable[[int], Any]:
        """Return a function that tells whether the server has sent something that nobody has read.

        The argument of the function is 0, the milliseconds to wait. Only one thread at a time may
        call it.

        :param connection: The DBAPI connection, which is idle.
        """
        return bool

    def started_with(self, connection: Any) -> Any:
        """Return the flags of a new connection, which :meth:`reset` restores later.

        :param connection: The DBAPI connection, before its first use.
        """
        if hasattr(self.dialect, "get_readonly"):
            return self.dialect.get_readonly(connection), self.dialect.get_deferrable(connection)
        return None

    def reset(self, connection: Any, started_with: Any = None) -> None:
        """Restore the initial state of a connection that goes back to the pool.

        :param connection: The DBAPI connection.
        :param started_with: What :meth:`started_with` returned before the connection's first use.
        :raises Exception: if the state can't be restored. The pool then closes the connection.
        """
        self.dialect.do_rollback(connection)
        self.enter_autocommit(connection, DEFAULT, started_with)


class PsycopgSwitch(Switch):
    """The switch for psycopg2 and psycopg. It sets attributes of the driver, and sends nothing.

    If an isolation level or a flag is set, psycopg2 sends a SET when it enters or leaves
    autocommit. So the level and the flags are cleared while the connection is still out of
    autocommit, where the driver only notes them for its next BEGIN.
    """

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self._status: Callable[[Any], int]
        self._read: Callable[[Any], object]
        is_closed: Callable[[Any], Any]
        if dialect.driver == "psycopg":
            is_closed = attrgetter("pgconn.status")  # OK is 0, and BAD is 1
            self._status = attrgetter("pgconn.transaction_status")
            self._read = lambda connection: connection.pgconn.consume_input()
            self._flags = attrgetter("autocommit", "isolation_level", "read_only", "deferrable")
        else:
            is_closed = attrgetter("closed")
            self._status = methodcaller("get_transaction_status")
            self._read = methodcaller("poll")
            self._flags = attrgetter("autocommit", "isolation_level", "readonly", "deferrable")
        if not TYPE_CHECKING:
            # These are aliases, because each statement calls them, and a Python function would be
            # slower. The status is 0 if the connection is idle.
            self.has_begun = self._status
            self.is_closed = is_closed

    def enter_autocommit(
        self, connection: Any, used: TransactionOptions = DEFAULT, started_with: Any = _UNTOUCHED
    ) -> None:
        if used is DEFAULT and started_with == _UNTOUCHED:
            connection.autocommit = True
            return
        connection.isolation_level = None
        self.dialect.set_readonly(connection, None)
        self.dialect.set_deferrable(connection, None)
        connection.autocommit = True
        _, isolation_level, read_only, deferrable = started_with
        if isolation_level is not None:  # in autocommit, psycopg2 sends a SET for the level
            connection.isolation_level = isolation_level
        self._set_flags(connection, read_only, deferrable)

    def leave_autocommit(self, connection: Any, options: TransactionOptions) -> None:
        connection.autocommit = False
        if options is DEFAULT:
            return
        if options.isolation_level is not None:
            self.dialect.set_isolation_level(connection, options.isolation_level)
        self._set_flags(connection, options.read_only, options.deferrable)

    def is_aborted(self, connection: Any) -> bool:
        return self._status(connection) == _IN_ERROR

    def is_busy(self, connection: Any) -> bool:
        return self._status(connection) == _ACTIVE

    def is_lost(self, connection: Any) -> bool:
        if self.is_closed(connection):
            return True
        has_input = self.watch(connection)
        if not has_input(0):
            return False
        if _peek(connection.fileno()) in (b"", _ERROR_RESPONSE):
            return True
        try:
            # This is a notice or TLS data: let the driver read, and it finds out whether the server
            # has closed the connection.
            while has_input(0):
                self._read(connection)
        except (self.dialect.loaded_dbapi.Error, OSError, ValueError):
            return True
        return bool(self.is_closed(connection))

    def watch(self, connection: Any) -> Callable[[int], Any]:
        descriptor = connection.fileno()
        if hasattr(select, "poll"):  # not on Windows
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return poll.poll
        return lambda _: select.select([descriptor], [], [], 0)[0]

    def started_with(self, connection: Any) -> Any:
        return (True, *self._flags(connection)[1:])

    def has_flags(self, connection: Any) -> bool:
        """Tell whether the driver would send an isolation level or flags with BEGIN.

        :param connection: The DBAPI connection, in autocommit.
        """
        return bool(self._flags(connection) != _UNTOUCHED)

    def reset(self, connection: Any, started_with: Any = _UNTOUCHED) -> None:
        status = self._status(connection)
        if status == _IDLE and self._flags(connection) == started_with:
            return
        if status not in (_IDLE, _IN_TRANSACTION, _IN_ERROR):
            raise exc.InvalidRequestError(
                "A connection came back to the pool while a statement was under way, or after it "
                "had lost the server; the pool closes it." + see("interrupted-in-pool")
            )
        if status != _IDLE and connection.autocommit:
            # The driver does not know of this transaction, and its rollback() would send nothing.
            with connection.cursor() as cursor:
                cursor.execute("ROLLBACK")
        elif status != _IDLE:
            connection.rollback()
        connection.autocommit = False
        self.enter_autocommit(connection, _ANYTHING, started_with)


class PysqliteSwitch(Switch):
    """The switch for SQLite, whose driver sends BEGIN only before an INSERT, UPDATE or DELETE.

    So the driver stays in autocommit, and this class sends BEGIN. The driver's commit() and
    rollback() end the transaction all the same:
    https://docs.python.org/3/library/sqlite3.html#transaction-control
    """

    def leave_autocommit(self, connection: Any, options: TransactionOptions) -> None:
        if options.isolation_level is not None:
            self.dialect.set_isolation_level(connection, options.isolation_level)
            connection.isolation_level = None
        connection.execute("BEGIN")


def _peek(descriptor: int) -> bytes:
    """Return the first byte that can be read, and leave it to be read later."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        try:
            return copy.recv(1, socket.MSG_PEEK)
        except OSError:  # the connection was reset
            return b""


def switch_for(dialect: Dialect) -> Switch:
    """Return the :class:`Switch` for a dialect.

    :param dialect: The dialect of the engine.
    :raises sqlalchemy.exc.ArgumentError: if the dialect does not offer AUTOCOMMIT.
    """
    if "AUTOCOMMIT" not in isolation_levels(dialect):
        raise exc.ArgumentError(
            f"SQLAlchemy's dialect for {dialect.name} with {dialect.driver} does not offer "
            "AUTOCOMMIT, so its connections can't be in autocommit: take the backend out of "
            "AUTOCOMMIT_DRIVERS, or make the engine with sqlalchemy.create_engine()."
            + see("no-autocommit")
        )
    if dialect.driver in PSYCOPG:
        return PsycopgSwitch(dialect)
    return (PysqliteSwitch if dialect.driver == "pysqlite" else Switch)(dialect)
