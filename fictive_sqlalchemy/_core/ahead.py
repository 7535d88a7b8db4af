"""Savepoints that wait: what goes ahead of a statement, in one flight with it.

:func:`.filter_by_or_create` inside a transaction sets a savepoint for one INSERT. The SAVEPOINT
waits for that statement, and the two are one round trip. The RELEASE waits for the next SAVEPOINT
of this kind, and goes ahead of it; at COMMIT nobody needs it any more. Nobody goes back to a
savepoint that waits for its RELEASE, so the statements between are sent as ever. But it is not
left out: thousands of savepoints, each inside the last, would slow down the server.

psycopg2 sends one simple query, psycopg 3 a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect

from .autocommit import PSYCOPG
from .connection_transactions import OptInTransaction
from .errors import sqlstate
from .one_statement import is_heard

_SAVEPOINT_EVENTS = ("savepoint", "rollback_savepoint", "release_savepoint")

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_NO_SUCH_SAVEPOINT = "3B001"


class Ahead:
    """What waits on a connection in its open transaction."""

    __slots__ = ("_to_log", "is_flying", "late", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        """What waits, in order: at most one RELEASE, and then each SAVEPOINT."""
        self.late: set[str] = set()
        """The names of the savepoints that wait or have waited, and are open."""
        self._to_log: list[str] = []  # what waits and is not in the log yet
        self.is_flying = False
        """Whether nobody knows if the server has executed what waits."""

    def set(self, name: str) -> None:
        """Have a SAVEPOINT wait for the next statement."""
        self.late.add(name)
        self.texts.append(f"SAVEPOINT {name}")
        self._to_log = [*self.texts]

    def release(self, name: str) -> None:
        """Have a RELEASE wait for the next SAVEPOINT; those of savepoints inside are included."""
        self.late.discard(name)
        self.texts = [f"RELEASE SAVEPOINT {name}"]
        self._to_log = [*self.texts]

    def forget(self, name: str) -> bool:
        """Forget a SAVEPOINT that still waits, and what comes after it.

        :returns: Whether it was still waiting, so that the server knows nothing of it.
        """
        self.late.discard(name)
        text = f"SAVEPOINT {name}"
        if text not in self.texts:
            return False
        del self.texts[self.texts.index(text) :]
        self._to_log = []
        return True

    def take_for_log(self) -> list[str]:
        """Return what goes with the statement that is about to be logged."""
        if not self.has_savepoint():
            return []
        lines, self._to_log = self._to_log, []
        return lines

    def has_savepoint(self) -> bool:
        """Tell whether a SAVEPOINT waits, and not a RELEASE alone."""
        return bool(self.texts) and self.texts[-1].startswith("SAVEPOINT")

    def send(self, connection: Any) -> None:
        """Send what waits, each as a statement of its own.

        :param connection: The connection.
        """
        if self.texts:
            self._take_off(connection)
            texts, self.texts = self.texts, []
            for text in texts:
                connection.exec_driver_sql(text)
            self.land()

    def send_before(self, connection: Any) -> None:
        """Send what waits immediately before a statement that is in the log already.

        :param connection: The connection.
        """
        self._take_off(connection)
        with connection.taken.cursor() as cursor:
            for text in self.texts:
                cursor.execute(text)
        self.land()

    def land(self) -> None:
        """Note that the server has what was waiting."""
        self.texts = []
        self.is_flying = False

    def _take_off(self, connection: Any) -> None:
        if self.is_flying:
            connection.invalidate()  # somebody has caught what interrupted it: see fly()
        self.is_flying = True

    def fly(
        self, connection: Any, send: Callable[[str], object], cursor: Any, statement: str
    ) -> None:
        """Send what waits together with a statement.

        An exception of a signal handler may come at any line. If nobody knows then whether the
        server has set the savepoint, ROLLBACK TO might undo nothing, or abort the transaction. So
        the connection is invalidated in place of it.

        :param connection: The connection.
        :param send: Executes SQL on the cursor, with the parameters of the statement.
        :param cursor: An ordinary cursor of the driver.
        :param statement: The statement.
        """
        self._take_off(connection)
        if hasattr(cursor.connection, "pipeline"):
            self._fly_in_pipeline(send, cursor, statement)
        else:
            self._fly_in_one_query(send, cursor, statement)
        self.land()

    def _fly_in_one_query(self, send: Callable[[str], object], cursor: Any, statement: str) -> None:
        before = cursor.query  # psycopg2 sets it immediately before it sends
        try:
            send("; ".join([*self.texts, statement]))
        except BaseException:
            if cursor.query is not before:
                self.land()
            else:
                self.is_flying = False
            raise

    def _fly_in_pipeline(self, send: Callable[[str], object], cursor: Any, statement: str) -> None:
        last: Any = None
        try:
            with cursor.connection.pipeline():
                for text in self.texts:
                    last = cursor.connection.execute(text, prepare=False)
                send(statement)
        except BaseException:
            if last is not None and last.statusmessage is not None:
                self.land()
            raise


def let_savepoints_wait(dialect: Dialect) -> None:
    """Have a dialect send the SAVEPOINT of an ``is_late`` savepoint with the next statement.

    :param dialect: The dialect of an engine of ours, and of no other. It is changed if its driver
        is psycopg2 or psycopg 3.
    """
    if dialect.driver not in PSYCOPG or dialect.is_async:
        return
    changed: Any = dialect
    execute, execute_many = changed.do_execute, changed.do_executemany
    set_savepoint, release = changed.do_savepoint, changed.do_release_savepoint
    roll_back_to = changed.do_rollback_to_savepoint

    is_plain = getattr(execute, "__func__", None) is DefaultDialect.do_execute

    def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        connection = getattr(context, "root_connection", None)
        ahead: Ahead | None = getattr(connection, "ahead", None)
        if ahead is not None and ahead.has_savepoint():
            if parameters and not getattr(cursor, "name", None):  # with a name it is on the server

                def send(sql: str) -> None:
                    execute(cursor, sql, parameters, context)

                ahead.fly(connection, send, cursor, statement)
                return
            ahead.send_before(connection)
        if is_plain:  # one function less for each statement
            cursor.execute(statement, parameters)
        else:
            execute(cursor, statement, parameters, context)

    def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        ahead = getattr(context.root_connection, "ahead", None)
        if ahead is not None and ahead.has_savepoint():
            ahead.send_before(context.root_connection)
        execute_many(cursor, statement, parameters, context)

    def do_savepoint(connection: Any, name: str) -> None:
        if not _may_wait(connection):
            set_savepoint(connection, name)
            return
        if connection.ahead is None:
            connection.ahead = Ahead()
        connection.ahead.set(name)

    def do_release_savepoint(connection: Any, name: str) -> None:
        ahead: Ahead | None = getattr(connection, "ahead", None)
        if ahead is not None:
            is_late = name in ahead.late
            if ahead.forget(name):
                return
            if is_late and _is_left_to_us(connection):
                ahead.release(name)
                return
            ahead.texts = []  # a RELEASE of one inside
        release(connection, name)

    def do_rollback_to_savepoint(connection: Any, name: str) -> None:
        ahead: Ahead | None = getattr(connection, "ahead", None)
        is_late = ahead is not None and name in ahead.late
        if ahead is not None:
            if ahead.is_flying and is_late:
                connection.invalidate()  # see Ahead.fly()
                return
            if ahead.forget(name):
                return
            ahead.land()  # whatever was set or released inside, nothing of it is left
        try:
            roll_back_to(connection, name)
        except exc.DBAPIError as error:
            # The server could not parse the one query that had the SAVEPOINT and the statement.
            # The transaction is aborted, and the error to see is that of the statement.
            if not is_late or sqlstate(error) != _NO_SUCH_SAVEPOINT:
                raise

    changed.do_execute = do_execute
    changed.do_executemany = do_executemany
    changed.do_savepoint = do_savepoint
    changed.do_release_savepoint = do_release_savepoint
    changed.do_rollback_to_savepoint = do_rollback_to_savepoint


def _may_wait(connection: Any) -> bool:
    """Tell whether the SAVEPOINT that is about to be sent may wait for the next statement."""
    owner = getattr(connection, "owner", None)
    return (
        owner is not None
        and getattr(owner.get_nested_transaction(), "is_late", False)
        and isinstance(connection.get_transaction(), OptInTransaction)  # not one in two phases
        and _is_left_to_us(connection)
        and _can_fly(connection)
    )


def _is_left_to_us(connection: Any) -> bool:
    """Tell whether nobody sees when SAVEPOINT and RELEASE are sent, nor sends anything past us."""
    return not connection.is_seen and not is_heard(connection, _SAVEPOINT_EVENTS)


def _can_fly(connection: Any) -> bool:
    driver, held = connection.dialect.loaded_dbapi, connection.held
    if held is None or connection.engine.switch.is_aborted(held.dbapi_connection):
        return False
    dbapi_connection = held.dbapi_connection
    if connection.dialect.driver == "psycopg":
        return isinstance(dbapi_connection, driver.Connection) and driver.Pipeline.is_supported()
    # The server converts one query as a whole. If it can't, it has not set the savepoint either.
    return isinstance(dbapi_connection, driver.extensions.connection) and all(
        dbapi_connection.get_parameter_status(name) == "UTF8"
        for name in ("server_encoding", "client_encoding")
    )
