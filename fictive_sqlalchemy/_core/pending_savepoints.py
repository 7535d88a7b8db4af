"""Savepoints whose SAVEPOINT is sent together with the next statement, in one round trip.

:func:`.filter_by_or_create` inside a transaction sets a savepoint for one INSERT. The SAVEPOINT is
kept back and sent with that INSERT. The RELEASE is kept back, too: until the next such SAVEPOINT,
or until a statement without parameters, before which it is sent alone. At COMMIT it is dropped,
because COMMIT releases all savepoints. It can be kept back because nobody rolls back to a savepoint
that is about to be released. It is not dropped before: without RELEASE, thousands of savepoints
would be nested, which slows the server down.

psycopg2 sends SAVEPOINT and statement as one simple query, psycopg 3 as a pipeline.
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


class PendingSavepoints:
    """What is kept back on a connection in its open transaction."""

    __slots__ = ("_to_log", "is_in_doubt", "names", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        """What is kept back, in order: at most one RELEASE, and then each SAVEPOINT."""
        self.names: set[str] = set()
        """The names of the open savepoints whose SAVEPOINT is or was kept back."""
        self._to_log: list[str] = []  # what is kept back and is not in the log yet
        self.is_in_doubt = False
        """Whether nobody knows if the server has executed what was kept back."""

    def add_savepoint(self, name: str) -> None:
        """Keep a SAVEPOINT back until the next statement."""
        self.names.add(name)
        self.texts.append(f"SAVEPOINT {name}")
        self._to_log = [*self.texts]

    def add_release(self, name: str) -> None:
        """Keep a RELEASE back; it includes those of the savepoints inside."""
        self.names.discard(name)
        self.texts = [f"RELEASE SAVEPOINT {name}"]
        self._to_log = [*self.texts]

    def drop_savepoint(self, name: str) -> bool:
        """Drop a SAVEPOINT that is still kept back, and what comes after it.

        :returns: Whether it was still kept back, so that the server knows nothing of it.
        """
        self.names.discard(name)
        text = f"SAVEPOINT {name}"
        if text not in self.texts:
            return False
        del self.texts[self.texts.index(text) :]
        self._to_log = [text for text in self._to_log if text in self.texts]
        return True

    def take_for_log(self) -> list[str]:
        """Return what is sent with the statement that is about to be logged."""
        if not self.has_savepoint():
            return []
        lines, self._to_log = self._to_log, []
        return lines

    def has_savepoint(self) -> bool:
        """Tell whether a SAVEPOINT is kept back, and not a RELEASE alone."""
        return bool(self.texts) and self.texts[-1].startswith("SAVEPOINT")

    def send(self, connection: Any) -> None:
        """Send what is kept back, each as a statement of its own, which is logged.

        :param connection: The connection.
        """
        if self.texts:
            self._begin_to_send(connection)
            texts, self.texts = self.texts, []
            for text in texts:
                connection.exec_driver_sql(text)
            self.note_sent()

    def send_before(self, connection: Any) -> None:
        """Send what is kept back immediately before a statement that is in the log already.

        :param connection: The connection.
        """
        self._begin_to_send(connection)
        with connection.taken.cursor() as cursor:
            for text in self.texts:
                cursor.execute(text)
        self.note_sent()

    def note_sent(self) -> None:
        """Note that nothing is kept back any more, because the server has executed it."""
        self.texts = []
        self.is_in_doubt = False

    def _begin_to_send(self, connection: Any) -> None:
        if self.is_in_doubt:
            connection.invalidate()  # somebody has caught what interrupted it: see send_with()
        self.is_in_doubt = True

    def send_with(
        self, connection: Any, send: Callable[[str], object], cursor: Any, statement: str
    ) -> None:
        """Send what is kept back together with a statement.

        An exception of a signal handler may come at any line. If nobody knows then whether the
        server has set the savepoint, ROLLBACK TO might undo nothing, or abort the transaction. So
        the connection is invalidated instead of rolling back to the savepoint.

        :param connection: The connection.
        :param send: Executes SQL on the cursor, with the parameters of the statement.
        :param cursor: An ordinary cursor of the driver.
        :param statement: The statement.
        """
        self._begin_to_send(connection)
        if hasattr(cursor.connection, "pipeline"):
            self._send_in_pipeline(send, cursor, statement)
        else:
            self._send_in_one_query(send, cursor, statement)
        self.note_sent()

    def _send_in_one_query(
        self, send: Callable[[str], object], cursor: Any, statement: str
    ) -> None:
        before = cursor.query  # psycopg2 sets it immediately before it sends
        try:
            send("; ".join([*self.texts, statement]))
        except BaseException:
            # If psycopg2 had begun to send, the server has parsed SAVEPOINT together with the
            # statement, and has set the savepoint, unless it could not parse them:
            # do_rollback_to_savepoint() notices that.
            if cursor.query is not before:
                self.note_sent()
            else:
                self.is_in_doubt = False
            raise

    def _send_in_pipeline(self, send: Callable[[str], object], cursor: Any, statement: str) -> None:
        last: Any = None
        try:
            with cursor.connection.pipeline():
                for text in self.texts:
                    last = cursor.connection.execute(text, prepare=False)
                send(statement)
        except BaseException:
            # psycopg 3 sets statusmessage when an answer to the last of the texts has come. The
            # server has then executed all of them, and what failed is the statement.
            if last is not None and last.statusmessage is not None:
                self.note_sent()
            raise


def keep_savepoints_back(dialect: Dialect) -> None:
    """Have a dialect send the SAVEPOINT of an ``is_kept_back`` savepoint with the next statement.

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
        kept_back: PendingSavepoints | None = getattr(connection, "kept_back", None)
        if kept_back is not None and kept_back.has_savepoint():
            # Before a statement without parameters, pre_exec() has sent what was kept back. A
            # cursor with a name is on the server: the driver would put DECLARE before all.
            if parameters and not getattr(cursor, "name", None):

                def send(sql: str) -> None:
                    execute(cursor, sql, parameters, context)

                kept_back.send_with(connection, send, cursor, statement)
                return
            kept_back.send_before(connection)
        if is_plain:  # one Python call less for each statement
            cursor.execute(statement, parameters)
        else:
            execute(cursor, statement, parameters, context)

    def do_executemany(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        connection = getattr(context, "root_connection", None)
        kept_back: PendingSavepoints | None = getattr(connection, "kept_back", None)
        if kept_back is not None and kept_back.has_savepoint():
            kept_back.send_before(connection)
        execute_many(cursor, statement, parameters, context)

    def do_savepoint(connection: Any, name: str) -> None:
        if not _is_to_be_kept_back(connection):
            set_savepoint(connection, name)
            return
        if connection.kept_back is None:
            connection.kept_back = PendingSavepoints()
        connection.kept_back.add_savepoint(name)

    def do_release_savepoint(connection: Any, name: str) -> None:
        kept_back: PendingSavepoints | None = getattr(connection, "kept_back", None)
        if kept_back is not None:
            was_kept_back = name in kept_back.names
            if kept_back.drop_savepoint(name):
                return
            if was_kept_back and _is_unobserved(connection):
                kept_back.add_release(name)
                return
            kept_back.texts = []  # the RELEASE of a savepoint inside, which this one includes
        release(connection, name)

    def do_rollback_to_savepoint(connection: Any, name: str) -> None:
        kept_back: PendingSavepoints | None = getattr(connection, "kept_back", None)
        was_kept_back = kept_back is not None and name in kept_back.names
        if kept_back is not None:
            if kept_back.is_in_doubt and was_kept_back:
                connection.invalidate()  # see PendingSavepoints.send_with()
                return
            if kept_back.drop_savepoint(name):
                return
            # ROLLBACK TO removes all savepoints inside. So the RELEASE of one of them, if it is
            # kept back, would be an error.
            kept_back.note_sent()
        try:
            roll_back_to(connection, name)
        except exc.DBAPIError as error:
            # The server could not parse the one query that had the SAVEPOINT and the statement.
            # The transaction is aborted, and the error to see is that of the statement.
            if not was_kept_back or sqlstate(error) != _NO_SUCH_SAVEPOINT:
                raise

    changed.do_execute = do_execute
    changed.do_executemany = do_executemany
    changed.do_savepoint = do_savepoint
    changed.do_release_savepoint = do_release_savepoint
    changed.do_rollback_to_savepoint = do_rollback_to_savepoint


def _is_to_be_kept_back(connection: Any) -> bool:
    """Tell whether to keep back the SAVEPOINT that is about to be sent."""
    owner = getattr(connection, "owner", None)
    return (
        owner is not None
        and getattr(owner.get_nested_transaction(), "is_kept_back", False)
        and isinstance(connection.get_transaction(), OptInTransaction)  # not one in two phases
        and _is_unobserved(connection)
        and _has_driver_that_combines(connection)
    )


def _is_unobserved(connection: Any) -> bool:
    """Tell whether no listener sees when SAVEPOINT and RELEASE are sent.

    Nor may the user have the DBAPI connection, whose cursors send without asking this module.
    """
    return not connection.is_seen and not is_heard(connection, _SAVEPOINT_EVENTS)


def _has_driver_that_combines(connection: Any) -> bool:
    """Tell whether the driver can send SAVEPOINT and a statement in one round trip."""
    driver, held = connection.dialect.loaded_dbapi, connection.held
    if held is None or connection.engine.switch.is_aborted(held.dbapi_connection):
        return False
    dbapi_connection = held.dbapi_connection
    if connection.dialect.driver == "psycopg":
        return isinstance(dbapi_connection, driver.Connection) and driver.Pipeline.is_supported()
    # The server converts the encoding of one query as a whole. If that fails, the savepoint is not
    # set. With UTF8 on both sides, nothing is converted.
    return isinstance(dbapi_connection, driver.extensions.connection) and all(
        dbapi_connection.get_parameter_status(name) == "UTF8"
        for name in ("server_encoding", "client_encoding")
    )
