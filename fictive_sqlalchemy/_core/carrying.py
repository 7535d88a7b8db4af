"""Send the settings of a session together with its statements, for each driver.

Outside a transaction, the settings are in force for one statement. psycopg2 sends the settings and
the statement in one simple query, and psycopg 3 sends them in one pipeline. PostgreSQL runs either
as one implicit transaction, and drops settings that are local to a transaction at its end:
https://www.postgresql.org/docs/current/protocol-flow.html. In a transaction, the settings are sent
once: psycopg2 sends them in one message with the first statement, and psycopg 3 with BEGIN.

SQLAlchemy's events and log show the statement alone, because the settings are added below them. The
functions of a dialect are wrapped as soon as a session has settings, or a transaction a timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from time import monotonic
from typing import Any
from weakref import WeakSet

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from . import observing
from .autocommit import PSYCOPG
from .errors import TransactionTimeout, see, sqlstate
from .local_settings import LocalSettings
from .prepared import forget_prepared, prepared_anew
from .psycopg_private import as_pipeline, begin_with
from .sql import first_words
from .timeouts import Timeout, ran_out, seconds_of, settings_for

# These statements carry no settings: an aborted transaction would refuse settings before them.
_ENDS = frozenset({"ROLLBACK", "RELEASE", "COMMIT", "END", "ABORT", "PREPARE"})

# After one of these statements nobody knows which settings are in force, so they are sent again.
_DISTURBS = (_ENDS - {"RELEASE"}) | {"SET", "RESET", "DISCARD", "CALL", "DO"}

_SET = "pg_catalog.set_config(%s, %s, true)"

# The values of these settings are lists. Only set_config() reads a list from one string.
_LISTS = frozenset(
    {"search_path", "temp_tablespaces", "local_preload_libraries", "session_preload_libraries"}
)

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_IN_TRANSACTION_BLOCK, _ENDS_TRANSACTION, _SYNTAX_ERROR = "25001", "2D000", "42601"

# The files of PostgreSQL's source code that raise errors about settings.
_OF_SETTINGS = frozenset({"guc.c", "guc_funcs.c", "variable.c"})

_UNKNOWN: Any = object()

_carrying: WeakSet[Dialect] = WeakSet()


@lru_cache(maxsize=2048)
def _beginnings(sql: str) -> frozenset[str]:
    """Return the first word of each statement, skipping comments; SET for set_config(), too."""
    words = [statement[0] for statement in first_words(sql)]
    return frozenset([*words, "SET"] if "set_config" in sql.lower() else words)


class Carried:
    """The settings that a connection has sent, and those that its next statement carries.

    :param settings: The settings of the session; ``None`` if no session has the connection on loan.
    """

    def __init__(self, settings: LocalSettings | None) -> None:
        self.settings = settings
        self._seconds: float | None = None
        self._timeouts: dict[str, str] = {}
        self._begun = 0.0
        # The settings in force in the open transaction, and those after the next statement.
        self._sent: dict[str, Any] = {}
        self._wanted: dict[str, str] = {}
        self._last: tuple[str, ...] = ()
        self.trips = 0
        """How many round trips the last statement has taken for the settings."""
        self.is_pipeline = False
        """Whether the last statement and its settings were one pipeline, and so one round trip."""

    def begin(self, timeout: float | None, dialect: Dialect) -> None:
        """Note that a transaction begins, in which nothing was sent yet.

        :param timeout: The timeout of the transaction in seconds, if it has one.
        :param dialect: The dialect.
        """
        self._sent, self._seconds, self._timeouts = {}, timeout, {}
        if timeout is not None:
            self._timeouts, self._begun = settings_for(timeout, dialect), monotonic()

    def forget(self) -> None:
        """Note that the settings in force are unknown, as after the rollback of a savepoint."""
        self._sent = dict.fromkeys(self._sent, _UNKNOWN)

    def take(self, connection: Any, sql: str) -> dict[str, str | None]:
        """Return the settings that a statement carries.

        :param connection: The connection.
        :param sql: The statement.
        :returns: The values by name; ``None`` for a setting that returns to its default.
        """
        self.trips, self.is_pipeline, self._last = 0, False, ()
        inside = is_inside(connection)
        values = {} if self.settings is None else self.settings.values
        self._wanted = wanted = {**values, **self._timeouts} if inside else values
        if not inside:
            self._last = tuple(wanted)
            return {**wanted}
        if self._sent and not connection.is_open_on_server():
            self._sent = {}  # the user has ended the transaction on a cursor
        if not (wanted or self._sent) or not _ENDS.isdisjoint(_beginnings(sql)):
            return {}
        missing: dict[str, str | None] = {name: None for name in self._sent if name not in wanted}
        for name, value in wanted.items():
            if self._sent.get(name) != value:
                missing[name] = value
        self._last = tuple(missing)
        # The settings are unknown until the statement succeeds: a failed one may have set them.
        self._sent = {**self._sent, **dict.fromkeys(missing, _UNKNOWN)}
        return missing

    def note(self, connection: Any, sql: str) -> None:
        """Note that a statement was executed, and that the settings it carried are in force.

        :param connection: The connection.
        :param sql: The statement.
        """
        carried, self._last = self._last, ()
        if not is_inside(connection):
            return
        if carried:
            self._sent = {**self._wanted}
        if self._sent and not _DISTURBS.isdisjoint(_beginnings(sql)):
            self.forget()

    def timed_out(self, error: exc.DBAPIError) -> TransactionTimeout | None:
        """Return the error to raise if the timeout of the transaction has run out.

        :param error: An error in the transaction.
        """
        if self._seconds is None:
            return None
        return ran_out(error, self._seconds, monotonic() - self._begun)

    def explain(self, error: exc.DBAPIError) -> None:
        """Add to an error's text how the settings may have caused the error.

        :param error: The error.
        """
        names, self._last = ", ".join(self._last), ()
        if not names:
            return
        code, diag = sqlstate(error), getattr(error.orig, "diag", None)
        if code in (_IN_TRANSACTION_BLOCK, _ENDS_TRANSACTION):
            error.add_detail(
                f"The settings of set_local() were sent with this statement ({names}). That makes "
                "the settings and the statement one transaction, and PostgreSQL refuses this "
                "statement in a transaction. Send it on a connection without settings: "
                "`with engine.connect() as connection:`." + see("settings-in-transaction")
            )
        elif code == _SYNTAX_ERROR and self.is_pipeline:
            error.add_detail(
                f"The settings of set_local() were sent with this statement ({names}) in a "
                "pipeline, which takes one statement and not several: send the statements one by "
                "one." + see("settings-several-statements")
            )
        elif getattr(diag, "source_file", None) in _OF_SETTINGS:
            error.add_detail(
                f"The settings of set_local() were sent with this statement ({names}): the server "
                "may have refused one of the settings, so check their values. Then the server has "
                "executed nothing of the statement." + see("settings-refused")
            )


def carried_in(connection: Any, timeout: Timeout | None) -> Carried | None:
    """Return the :class:`Carried` of a connection on which a transaction begins.

    :param connection: The connection.
    :param timeout: The timeout of the transaction, if it has one.
    :returns: ``None`` if there are neither settings nor a timeout.
    :raises sqlalchemy.exc.InvalidRequestError: if there is a timeout that the driver can't send.
    """
    carried: Carried | None = connection.carried
    if carried is None and timeout is not None and refuse_unless_it_carries(connection.dialect):
        carry(connection.dialect)
        carried = Carried(None)
    if carried is not None:
        carried.begin(None if timeout is None else seconds_of(timeout), connection.dialect)
    return carried


def is_inside(connection: Any) -> bool:
    """Tell whether a transaction is open, so that a setting stays in force until its end.

    :param connection: The connection.
    """
    return connection.is_out_of_autocommit() and not connection.is_standing_alone


def refuse_unless_it_carries(dialect: Dialect) -> bool:
    """Refuse a PostgreSQL driver whose statements can't carry settings.

    :param dialect: The dialect of an engine.
    :returns: Whether the statements carry settings. Those for another database do not.
    :raises sqlalchemy.exc.InvalidRequestError: for a driver other than psycopg2 and psycopg 3.
    """
    if dialect.name != "postgresql":
        return False
    if dialect.driver not in PSYCOPG or dialect.is_async:
        raise exc.InvalidRequestError(
            "The settings of set_local(), and the timeout of begin(), can't be sent with the "
            f"statements of {dialect.driver}: use psycopg2 or psycopg 3. Nothing was sent."
            + see("settings-on-other-engine")
        )
    return True


def carry(dialect: Dialect) -> None:
    """Wrap the functions of a dialect that execute a statement, unless they are wrapped already.

    :param dialect: The dialect of an engine that :func:`.create_engine` has made.
    """
    if dialect in _carrying:
        return
    with observing.changing_dialects:
        if dialect in _carrying:
            return
        if (recorder := observing.recorder) is None:
            _wrap(dialect)
        else:
            recorder.beneath(dialect, partial(_wrap, dialect))
        _carrying.add(dialect)


def _wrap(dialect: Dialect) -> None:
    changed: Any = dialect
    if dialect.driver == "psycopg":
        for name in ("do_execute", "do_execute_no_params", "do_executemany"):
            setattr(changed, name, _psycopg(changed, getattr(changed, name)))
        return
    wrap = partial(_psycopg2, changed.loaded_dbapi)
    changed.do_execute = wrap(changed.do_execute)
    changed.do_execute_no_params = wrap(changed.do_execute_no_params, doubles_percent=False)
    changed.do_executemany = wrap(changed.do_executemany, is_many=True)


def _carrying_with(
    original: Callable[..., Any],
    send: Callable[[Any, dict[str, str | None], Any, str, tuple[Any, ...]], None],
) -> Callable[..., Any]:
    """Return a function that executes a statement with the settings of its connection, if any.

    :param original: The function that executes a statement without settings.
    :param send: The function that executes a statement with settings. The connection and the
        settings are its first arguments.
    """

    def execute(cursor: Any, sql: str, *args: Any) -> None:
        connection: Any = getattr(args[-1] if args else None, "root_connection", None)
        carried: Carried | None = getattr(connection, "carried", None)
        if carried is None:
            original(cursor, sql, *args)
            return
        if not (settings := carried.take(connection, sql)):
            original(cursor, sql, *args)
            carried.note(connection, sql)
            return
        take_settings = getattr(connection.held.dbapi_connection, "take_settings", None)
        if take_settings is None:
            send(connection, settings, cursor, sql, args)
        else:  # an isolated test is one transaction, so a savepoint limits the settings
            take_settings(settings)
            original(cursor, sql, *args)
        carried.note(connection, sql)

    return execute


def _set_config(settings: dict[str, str | None]) -> tuple[str, list[str | None]]:
    """Return the statement that sets settings in a pipeline, and its parameters."""
    sql = "SELECT " + ", ".join([_SET] * len(settings))
    return sql, [each for item in settings.items() for each in item]


def _set_local(settings: dict[str, str | None], literal: Callable[[str], str]) -> str:
    """Return the statements that set settings in a transaction, which may be an implicit one.

    Unlike ``SELECT set_config(…)``, SET LOCAL takes no snapshot and returns no row.

    :param settings: The settings.
    :param literal: A function that returns a string as an SQL literal of the driver.
    """
    parts: list[str] = []
    for name, value in settings.items():
        if value is not None and name in _LISTS:
            parts.append(f"SELECT pg_catalog.set_config('{name}', {literal(value)}, true)")
            continue
        quoted = ".".join(f'"{word}"' for word in name.split("."))
        parts.append(f"SET LOCAL {quoted} TO {'DEFAULT' if value is None else literal(value)}")
    return "; ".join(parts)


# psycopg2


def _psycopg2(
    dbapi: Any, original: Callable[..., Any], *, doubles_percent: bool = True, is_many: bool = False
) -> Callable[..., Any]:
    def send(
        connection: Any,
        settings: dict[str, str | None],
        cursor: Any,
        sql: str,
        args: tuple[Any, ...],
    ) -> None:
        plain = dbapi.extensions.cursor(connection.held.dbapi_connection)
        before = _set_local(settings, partial(_literal, dbapi, plain))
        if cursor.name is not None:
            declare = partial(original, cursor, sql, *args)
            _stream(connection, before, plain.execute, declare)
        elif is_many and is_inside(connection):
            # psycopg2 sends one message for each row or page. In a transaction, the settings need
            # not be part of each message.
            plain.execute(before)
            connection.carried.trips = 1
            original(cursor, sql, *args)
        else:
            if doubles_percent:
                before = before.replace("%", "%%")
            original(cursor, f"{before};\n{sql}", *args)

    return _carrying_with(original, send)


def _literal(dbapi: Any, cursor: Any, value: str) -> str:
    encoding = dbapi.extensions.encodings[cursor.connection.encoding]
    literal: str = cursor.mogrify("%s", (value,)).decode(encoding)
    return literal


# psycopg 3


def _psycopg(dialect: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    # The function without prepared_anew(), because prepared_anew() has to surround the pipeline.
    once = getattr(original, "once", original)
    dbapi = dialect.loaded_dbapi

    def send(
        connection: Any,
        settings: dict[str, str | None],
        cursor: Any,
        sql: str,
        args: tuple[Any, ...],
    ) -> None:
        driver, carried = connection.held.dbapi_connection, connection.carried
        plain = dbapi.Cursor(driver, row_factory=dbapi.rows.tuple_row)

        def literal(value: str) -> str:
            return str(dbapi.sql.Literal(value).as_string(driver))

        if is_inside(connection):
            before = _set_local(settings, literal)
            if connection.is_open_on_server():
                plain.execute(before, prepare=False)
                carried.trips = 1
            else:
                begin_with(driver, plain, before)
            original(cursor, sql, *args)
        elif getattr(cursor, "name", None) is not None:
            before = _set_local(settings, literal)
            declare = partial(original, cursor, sql, *args)
            _stream(connection, before, partial(plain.execute, prepare=False), declare)
        else:
            carried.is_pipeline = True

            def in_one_pipeline(cursor: Any, sql: str, *args: Any) -> None:
                with as_pipeline(driver, dbapi):
                    plain.execute(*_set_config(settings), prepare=False)
                    once(cursor, sql, *args)

            try:
                prepared_anew(dialect, in_one_pipeline)(cursor, sql, *args)
            except dbapi.Error:
                # psycopg counts the statement as prepared, but the server has skipped it.
                if plain.pgresult is None and not driver.info.transaction_status:
                    forget_prepared(driver)
                raise

    return _carrying_with(original, send)


# Both drivers


def _stream(
    connection: Any, before: str, send: Callable[..., Any], declare: Callable[[], Any]
) -> None:
    """Declare a cursor on the server while the settings are in force.

    Outside a transaction, a short one surrounds DECLARE. The cursor is WITH HOLD, so the server has
    executed the cursor's statement when the short transaction ends.

    :param connection: The connection.
    :param before: The SQL that sets the settings.
    :param send: A function that executes a statement on another cursor of the connection.
    :param declare: A function that declares the cursor.
    """
    carried: Carried = connection.carried
    if is_inside(connection):
        carried.trips = 1
        send(before)
        declare()
        return
    try:
        carried.trips = 2  # one for BEGIN, and one for COMMIT or ROLLBACK
        send(f"BEGIN; {before}")
        declare()
        send("COMMIT")
    except BaseException:
        with suppress(connection.dialect.loaded_dbapi.Error):
            send("ROLLBACK")
        raise
