"""How the settings of a session travel with a statement, for each driver.

Outside a transaction the settings are in force for the one statement. psycopg2 sends both in one
simple query, and psycopg 3 in one pipeline. PostgreSQL runs either as one implicit transaction, at
whose end a setting that is local to the transaction is gone:
https://www.postgresql.org/docs/current/protocol-flow.html. In a transaction the settings are sent
once: psycopg2 sends them in one message with the first statement, and psycopg 3 with BEGIN.

It happens below SQLAlchemy's events and log, which have the statement alone. The functions of a
dialect are wrapped when the first session has settings for it, and are left alone until then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakSet

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from . import observing
from .autocommit import PSYCOPG
from .errors import TransactionTimeout, sqlstate
from .local_settings import LocalSettings
from .prepared import prepared_anew
from .psycopg_private import begin_with
from .timeouts import Timeout, ran_out, seconds_of, settings_for

# In an aborted transaction PostgreSQL refuses everything else.
_ENDS = re.compile(r"\s*(?:ROLLBACK|RELEASE|COMMIT|END|ABORT|PREPARE)\b", re.IGNORECASE)

_SET = "pg_catalog.set_config(%s, %s, true)"

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_IN_TRANSACTION_BLOCK = "25001"
_OF_SETTINGS = frozenset({"22023", "42501", "42602", "42704", "55P02"})

_UNKNOWN: Any = object()

_carrying: WeakSet[Dialect] = WeakSet()


class Carried:
    """What a connection has sent of its session's settings, and what its next statement carries.

    :param settings: The settings of the session; ``None`` if the connection is on loan to none.
    """

    def __init__(self, settings: LocalSettings | None) -> None:
        self.settings = settings
        self._seconds: float | None = None
        self._timeouts: dict[str, str] = {}
        self._begun = 0.0
        self._sent: dict[str, Any] = {}
        self._last: tuple[str, ...] = ()
        self.trips = 0
        """How many round trips the last statement has taken for the settings."""
        self.is_pipeline = False
        """Whether the last statement and its settings were one pipeline, and so one round trip."""

    def begin(self, timeout: float | None, dialect: Dialect) -> None:
        """Note that a transaction begins, in which nothing was sent yet.

        :param timeout: Its timeout in seconds, if it has one.
        :param dialect: The dialect.
        """
        self._sent, self._seconds, self._timeouts = {}, timeout, {}
        if timeout is not None:
            self._timeouts, self._begun = settings_for(timeout, dialect), monotonic()

    def forget(self) -> None:
        """Note that a savepoint was rolled back, and with it what was set since."""
        self._sent = dict.fromkeys(self._sent, _UNKNOWN)

    def take(self, connection: Any, sql: str) -> dict[str, str | None]:
        """Return what a statement carries.

        :param connection: The connection.
        :param sql: The statement.
        """
        self.trips, self.is_pipeline, self._last = 0, False, ()
        wanted = self._wanted(connection)
        if not (wanted or self._sent) or _ENDS.match(sql):
            return {}
        if not _is_inside(connection):
            missing: dict[str, str | None] = {**wanted}
        else:
            missing = {name: None for name in self._sent if name not in wanted}
            for name, value in wanted.items():
                if self._sent.get(name) != value:
                    missing[name] = value
        self._last = tuple(missing)
        return missing

    def note(self, connection: Any) -> None:
        """Note that the statement was executed, and what it carried is in force."""
        if _is_inside(connection):
            self._sent = {**self._wanted(connection)}

    def _wanted(self, connection: Any) -> dict[str, str]:
        values = {} if self.settings is None else self.settings.values
        return {**values, **self._timeouts} if _is_inside(connection) else values

    def timed_out(self, error: exc.DBAPIError) -> TransactionTimeout | None:
        """Return the error to raise if the timeout of the transaction has run out.

        :param error: An error in the transaction.
        """
        if self._seconds is None:
            return None
        return ran_out(error, self._seconds, monotonic() - self._begun)

    def explain(self, error: exc.DBAPIError) -> None:
        """Add to the text of an error what the settings have to do with it.

        :param error: The error.
        """
        code, names = sqlstate(error), ", ".join(self._last)
        if not names:
            return
        if code == _IN_TRANSACTION_BLOCK:
            error.add_detail(
                f"The settings of set_local() travelled with this statement ({names}), which makes "
                "the two one transaction, and PostgreSQL refuses this statement in one. Send it "
                "on a connection without settings: `with engine.connect() as connection:`."
            )
        elif code in _OF_SETTINGS:
            error.add_detail(
                f"The settings of set_local() travelled with this statement ({names}): one of them "
                "may be what the server has refused. Nothing of the statement was executed then."
            )


def carried_in(connection: Any, timeout: Timeout | None) -> Carried | None:
    """Return what a connection carries in a transaction that begins.

    :param connection: The connection.
    :param timeout: The timeout of the transaction, if it has one.
    :raises sqlalchemy.exc.InvalidRequestError: if it has one, and the driver can't carry it.
    """
    carried: Carried | None = connection.carried
    if carried is None and timeout is not None and refuse_unless_it_carries(connection.dialect):
        carry(connection.dialect)
        carried = Carried(None)
    if carried is not None:
        carried.begin(None if timeout is None else seconds_of(timeout), connection.dialect)
    return carried


def _is_inside(connection: Any) -> bool:
    """Tell whether a transaction is open in which what is set stays until its end."""
    return connection.is_out_of_autocommit() and not connection.is_standing_alone


def refuse_unless_it_carries(dialect: Dialect) -> bool:
    """Refuse a PostgreSQL driver whose statements can't carry settings.

    :param dialect: The dialect of an engine.
    :returns: Whether they carry some; those to another database do not.
    :raises sqlalchemy.exc.InvalidRequestError: for a driver other than psycopg2 and psycopg 3.
    """
    if dialect.name != "postgresql":
        return False
    if dialect.driver not in PSYCOPG or dialect.is_async:
        raise exc.InvalidRequestError(
            "The settings of set_local(), and the timeout of begin(), can't travel with the "
            f"statements of {dialect.driver}: use psycopg2 or psycopg 3. Nothing was sent."
        )
    return True


def carry(dialect: Dialect) -> None:
    """Wrap the functions of a dialect that execute a statement, unless that was done.

    :param dialect: The dialect of an engine of ours, and of no other.
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
        for name in ("do_execute", "do_execute_no_params"):
            setattr(changed, name, _psycopg(changed, getattr(changed, name)))
        changed.do_executemany = _psycopg(changed, changed.do_executemany)
    else:
        dbapi = changed.loaded_dbapi
        changed.do_execute = _psycopg2(dbapi, changed.do_execute, doubles_percent=True)
        changed.do_execute_no_params = _psycopg2(
            dbapi, changed.do_execute_no_params, doubles_percent=False
        )
        changed.do_executemany = _psycopg2_many(dbapi, changed.do_executemany)


def _carrying_with(
    original: Callable[..., Any],
    send: Callable[[Any, dict[str, str | None], Any, str, tuple[Any, ...]], None],
) -> Callable[..., Any]:
    """Return what executes a statement with the settings of its connection, if it has some.

    :param original: What executes it without.
    :param send: Executes it with settings. It is called with the connection and the settings.
    """

    def execute(cursor: Any, sql: str, *args: Any) -> None:
        connection: Any = getattr(args[-1] if args else None, "root_connection", None)
        carried: Carried | None = getattr(connection, "carried", None)
        if carried is None or not (settings := carried.take(connection, sql)):
            original(cursor, sql, *args)
            return
        take_settings = getattr(connection.held.dbapi_connection, "take_settings", None)
        if take_settings is None:
            send(connection, settings, cursor, sql, args)
        else:  # a connection of the test isolation, whose statements are not alone
            take_settings(settings)
            original(cursor, sql, *args)
        carried.note(connection)

    return execute


def _set_config(settings: dict[str, str | None]) -> tuple[str, list[str | None]]:
    """Return the statement that sets some, and its parameters."""
    sql = "SELECT " + ", ".join([_SET] * len(settings))
    return sql, [each for item in settings.items() for each in item]


# psycopg2


def _psycopg2(
    dbapi: Any, original: Callable[..., Any], *, doubles_percent: bool
) -> Callable[..., Any]:
    def send(
        connection: Any,
        settings: dict[str, str | None],
        cursor: Any,
        sql: str,
        args: tuple[Any, ...],
    ) -> None:
        plain = dbapi.extensions.cursor(connection.held.dbapi_connection)
        if cursor.name is not None:
            declare = partial(original, cursor, sql, *args)
            _stream(connection, settings, plain.execute, declare)
            return
        encoding = dbapi.extensions.encodings[cursor.connection.encoding]
        before: str = plain.mogrify(*_set_config(settings)).decode(encoding)
        if doubles_percent:
            before = before.replace("%", "%%")
        original(cursor, f"{before};\n{sql}", *args)

    return _carrying_with(original, send)


def _psycopg2_many(dbapi: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def send(
        connection: Any,
        settings: dict[str, str | None],
        cursor: Any,
        sql: str,
        args: tuple[Any, ...],
    ) -> None:
        # psycopg2 sends one message for each row or page: the settings would be in each.
        dbapi.extensions.cursor(connection.held.dbapi_connection).execute(*_set_config(settings))
        connection.carried.trips = 1
        original(cursor, sql, *args)

    return _carrying_with(original, send)


# psycopg 3


def _psycopg(dialect: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    # Without prepared_anew(), which has to be around the pipeline.
    once = getattr(original, "once", original)
    dbapi = dialect.loaded_dbapi

    def send(
        connection: Any,
        settings: dict[str, str | None],
        cursor: Any,
        sql: str,
        args: tuple[Any, ...],
    ) -> None:
        driver = connection.held.dbapi_connection
        plain = dbapi.Cursor(driver, row_factory=dbapi.rows.tuple_row)
        send_plainly = partial(plain.execute, prepare=False)
        if _is_inside(connection):
            if connection.is_open_on_server():
                send_plainly(*_set_config(settings))
                connection.carried.trips = 1
            else:
                begin_with(driver, plain, _as_bytes(dbapi, driver, settings))
            original(cursor, sql, *args)
            return
        if getattr(cursor, "name", None) is not None:
            declare = partial(original, cursor, sql, *args)
            _stream(connection, settings, send_plainly, declare, driver.pipeline)
            return

        def in_one_pipeline(cursor: Any, sql: str, *args: Any) -> None:
            with driver.pipeline():
                send_plainly(*_set_config(settings))
                once(cursor, sql, *args)

        connection.carried.is_pipeline = True
        prepared_anew(dialect, in_one_pipeline)(cursor, sql, *args)

    return _carrying_with(original, send)


def _as_bytes(dbapi: Any, driver: Any, settings: dict[str, str | None]) -> bytes:
    """Return the statement that sets some, with the values in it."""
    sql, parameters = _set_config(settings)
    literals = map(dbapi.sql.Literal, parameters)
    as_bytes: bytes = dbapi.sql.SQL(sql.replace("%s", "{}")).format(*literals).as_bytes(driver)
    return as_bytes


# Both


def _stream(
    connection: Any,
    settings: dict[str, str | None],
    send: Callable[..., Any],
    declare: Callable[[], Any],
    pipeline: Callable[[], AbstractContextManager[Any]] | None = None,
) -> None:
    """Declare a cursor on the server, outside in a short transaction with the settings.

    The cursor is WITH HOLD: the server has executed its statement when the transaction ends.

    :param connection: The connection.
    :param settings: The settings.
    :param send: Executes a statement on another cursor of the connection.
    :param declare: Declares the cursor.
    :param pipeline: Surrounds what is sent in one round trip, if the driver can do that.
    """
    carried: Carried = connection.carried
    if _is_inside(connection):
        carried.trips = 1
        send(*_set_config(settings))
        declare()
        return
    with nullcontext() if pipeline is None else pipeline():
        send("BEGIN")
        send(*_set_config(settings))
    carried.trips = 2 if pipeline is None else 1
    try:
        declare()
        carried.trips += 1
        send("COMMIT")
    except BaseException:
        with suppress(connection.dialect.loaded_dbapi.Error):
            send("ROLLBACK")
        raise
