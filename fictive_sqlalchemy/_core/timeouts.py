"""The timeout of a transaction, as in ``begin(timeout="2s")``."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, TypeAlias

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from .errors import TransactionTimeout, see, sqlstate

Timeout: TypeAlias = str | int | float | timedelta
"""A number of seconds, a ``timedelta``, or text with a unit of PostgreSQL, such as ``"500ms"``."""

# https://www.postgresql.org/docs/current/config-setting.html
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s|min|h|d)\s*\Z")

_MOST_SECONDS = 2_147_483  # PostgreSQL has the milliseconds in an int of 32 bits

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_WHICH = {
    "57014": "during a statement, which the server has cancelled",
    "25P03": "between two statements, and the server has closed the connection",
    "25P04": "and the server has closed the connection",
}


def seconds_of(timeout: Any) -> float:
    """Return a timeout in seconds.

    :param timeout: What the user has given.
    :raises sqlalchemy.exc.ArgumentError: if this is no timeout, is less than a millisecond, or is
        more than PostgreSQL allows.
    """
    seconds = 0.0
    if isinstance(timeout, timedelta):
        seconds = timeout.total_seconds()
    elif isinstance(timeout, (int, float)) and not isinstance(timeout, bool):
        seconds = float(timeout)
    elif isinstance(timeout, str) and (found := _TEXT.match(timeout)):
        seconds = float(found[1]) * _UNITS[found[2]]
    if not 0.001 <= seconds <= _MOST_SECONDS:
        raise exc.ArgumentError(
            f"timeout is a number of seconds, a timedelta, or text with a unit such as "
            f'"500ms" or "2s", from a millisecond to 24 days, and not {timeout!r}.'
            + see("timeout-argument")
        )
    return seconds


def settings_for(seconds: float, dialect: Dialect) -> dict[str, str]:
    """Return the settings of PostgreSQL for a transaction with a timeout.

    Each statement and each pause between two statements has the timeout. PostgreSQL 17 and newer
    also have a setting for the whole transaction. It overrides the other two, because they are not
    shorter: https://www.postgresql.org/docs/current/runtime-config-client.html

    :param seconds: The timeout.
    :param dialect: The dialect of an engine that has connected.
    """
    value = f"{max(1, round(seconds * 1000))}ms"
    names = ["statement_timeout", "idle_in_transaction_session_timeout"]
    version: tuple[int, ...] = getattr(dialect, "server_version_info", None) or ()
    if version >= (17,):
        names.append("transaction_timeout")
    return dict.fromkeys(names, value)


def ran_out(error: exc.DBAPIError, seconds: float, elapsed: float) -> TransactionTimeout | None:
    """Return the error for a timeout that has run out; ``None`` if an error has another cause.

    :param error: The driver's error, as SQLAlchemy has wrapped it.
    :param seconds: The timeout.
    :param elapsed: How many seconds ago the transaction began.
    """
    which = _WHICH.get(sqlstate(error) or "")
    if which is None and error.connection_invalidated:
        which = "and the server has closed the connection"  # nobody has read its last message
    # If the timeout has not run out, somebody else has cancelled the statement, or the connection
    # was lost for another reason.
    if which is None or elapsed < 0.99 * seconds:
        return None
    timeout = TransactionTimeout(
        error.statement,
        error.params,
        error.orig or error,
        connection_invalidated=error.connection_invalidated,
    )
    # If the connection is closed, the whole transaction has ended, with its savepoints.
    unless = ", unless this error is caught around a savepoint"
    if error.connection_invalidated:
        unless = ""
    timeout.add_detail(
        f"The timeout of {seconds:g} seconds of this transaction ran out {which}. The transaction "
        f"is rolled back{unless}. Move slow work out of the block, or give it a longer timeout."
        + see("timeout")
    )
    return timeout
