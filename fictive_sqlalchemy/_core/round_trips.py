"""How many messages of a statement wait for an answer, for each driver.

No driver tells this number. It is computed from what is known about each driver, and the tests
compare the results with the messages on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache, partial
from math import ceil
from time import perf_counter
from typing import Any, TypeAlias

from sqlalchemy.engine import Dialect

from .autocommit import PSYCOPG
from .psycopg_private import prepared_so_far

#: The size of the pages of psycopg2's ``execute_batch()``, unless the engine has another.
_PAGE = 100

#: A function to call after a statement with whether the statement failed. It returns how many
#: round trips the statement took.
Trips: TypeAlias = Callable[[bool], int]

#: A function to call before a statement with the cursor and the parameters.
Counter: TypeAlias = Callable[[Any, Any], Trips]


def counters_for(dialect: Dialect) -> tuple[Counter | None, Counter | None]:
    """Return the counters of the round trips of ``execute()`` and of ``executemany()``.

    :param dialect: The dialect.
    :returns: Two counters. One is ``None`` if the call always takes one round trip.
    """
    if dialect.driver == "psycopg":  # its executemany() is one pipeline
        return _of_psycopg, None
    # With "values_plus_batch", psycopg2 sends many statements in one message.
    mode: Any = getattr(dialect, "executemany_mode", None)
    if getattr(mode, "name", "") == "EXECUTEMANY_VALUES_PLUS_BATCH":
        page: int = getattr(dialect, "executemany_batch_page_size", None) or _PAGE
        return None, partial(_one_for_each, page)
    return None, partial(_one_for_each, 1)


def _one_for_each(page: int, cursor: Any, parameters: Any) -> Trips:
    return lambda failed: ceil(len(parameters) / page)


def _of_psycopg(cursor: Any, parameters: Any) -> Trips:
    connection = cursor.connection
    before = prepared_so_far(connection)
    # After DECLARE the server-side cursor asks for the columns, unless DECLARE fails.
    own = 2 if type(cursor) in NOTING else 1

    def trips(failed: bool) -> int:
        count = 1 if failed else own
        after = prepared_so_far(connection)
        return count if after == before else count + _of_prepared(before, after)

    return trips


def of_rollback(connection: Any) -> Trips:
    """Count the round trips of a ROLLBACK, after which psycopg 3 forgets its prepared statements.

    :param connection: The DBAPI connection.
    """
    before = prepared_so_far(connection)
    return lambda failed: 1 + _of_prepared(before, prepared_so_far(connection))


def _of_prepared(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Count the messages of psycopg 3 that prepare statements and deallocate them."""
    new = after[0] - before[0]
    gone = before[1] + new - after[1]
    return new + (gone if after[1] else min(gone, 1))  # DEALLOCATE ALL is one message


# Streams


@contextmanager
def noting_cursor(connection: Any, dialect: Dialect) -> Generator[None]:
    """Have a server-side cursor that is made in this block note each message for reading from it.

    :param connection: The DBAPI connection.
    :param dialect: The dialect of its engine.
    """
    name = "server_cursor_factory" if dialect.driver == "psycopg" else "cursor_factory"
    if dialect.driver not in PSYCOPG or not hasattr(
        connection, name
    ):  # the connection of the test isolation has no such attribute
        yield
        return
    factory: Any = getattr(connection, name)
    dbapi: Any = dialect.loaded_dbapi
    made: Any = factory or dbapi.extensions.cursor  # psycopg2 has none until one is set
    try:
        if isinstance(made, type):  # a factory of the user may be any function
            setattr(connection, name, _noting(made))
        yield
    finally:
        setattr(connection, name, factory)


#: libpq's ``PQTRANS_INERROR``.
_INERROR = 3

NOTING: set[type[Any]] = set()
"""The classes of the cursors that :func:`noting_cursor` makes."""


@lru_cache(maxsize=16)
def _noting(base: Any) -> type[Any]:
    """Return a class of cursors that note each message for reading from them."""

    def noting(name: str) -> Callable[..., Any]:
        send = getattr(base, name)

        def note(self: Any, *args: Any, **kwargs: Any) -> Any:
            noted = self.noted
            if noted is None or self.closed:
                return send(self, *args, **kwargs)
            # In a transaction that is aborted, the drivers do not send CLOSE.
            is_sent = name != "close" or self.connection.info.transaction_status != _INERROR
            self.noted = None  # one method of the driver may call another
            started = perf_counter()
            try:
                return send(self, *args, **kwargs)
            finally:
                self.noted = noted
                if is_sent:
                    noted(perf_counter() - started)

        return note

    names = ("fetchone", "fetchmany", "fetchall", "scroll", "close")
    methods = {name: noting(name) for name in names}
    made = type(base.__name__, (base,), {"noted": None, **methods})
    NOTING.add(made)
    return made
