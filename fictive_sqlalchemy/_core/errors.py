"""The errors of this package, and the advice that is added to errors of the database."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

from sqlalchemy import exc
from sqlalchemy.engine import Connection

_PAGE = "fictive-sqlalchemy/docs/troubleshooting.md"


def see(anchor: str) -> str:
    """Return the end of a message: where the documentation explains the message.

    :param anchor: The anchor on the page about error messages.
    """
    return f" See {_PAGE}#{anchor}"


NOTHING_STORED = (
    "Nothing of this block was stored: a statement in it had failed, which aborted it, and the "
    "error was caught inside. Let the error leave the block, or put the statement "
    "that may fail into a block of its own, `with session.atomic():` or "
    "`with session.begin_nested():`. Without a block, call rollback() where the error is caught."
    + see("caught-error")
)

LOST_INSIDE = (
    "Nothing of this block was stored: the connection to the server was lost in it, and the error "
    "was caught inside. Let the error leave the block, and run the block again."
    + see("lost-in-block")
)

#: The SQLSTATE of a write in a transaction that is read-only:
#: https://www.postgresql.org/docs/current/errcodes-appendix.html
READ_ONLY = "25006"

# The code for "feature not supported", with which a standby refuses to begin a READ WRITE or
# SERIALIZABLE transaction, and the files of PostgreSQL's source code that raise this error. If
# another file raises an error with this code, no server supports the feature.
_NOT_SUPPORTED = "0A000"
_OF_BEGIN = ("guc.c", "predicate.c")

_NO_SUCH_CURSOR = "34000"

_POOLER = (
    "Between here and PostgreSQL is a pooler, such as PgBouncer in transaction mode, that gave "
    "this statement another server connection than the one with the cursor: put the stream into "
    "`with session.begin():`." + see("stream-through-pooler")
)
_STANDBY = (
    "This server is a standby, which refuses every write, in a transaction as well: connect to "
    "the primary to write." + see("standby")
)
_WRAP_IT = (
    "Outside a transaction this engine only reads. To write, put the statement into "
    "`with db.session.begin():`, or into begin() of the session or the connection."
    + see("write-outside-refused")
)
_READ_ONLY_BY_DEFAULT = (
    "default_transaction_read_only is on here, for the server, the database or the role, so a "
    "plain begin() refuses writes as well. To write, put the statement into "
    "`with session.begin(read_only=False):`, or connect as a role that may write. On a standby no "
    "write is possible: connect to the primary." + see("read-only-by-default")
)


class CommitOutcomeUnknown(exc.OperationalError):
    """The connection was lost during COMMIT: the transaction may be stored or not.

    The same error is raised if the connection is lost during a statement that is a whole
    transaction. Look up what is stored before you repeat the transaction.
    """


class TransactionTimeout(exc.OperationalError):
    """The timeout of a transaction ran out: ``begin(timeout=…)``.

    Either the server has closed the connection, so the transaction is rolled back. Or the server
    has cancelled a statement. Then the transaction is rolled back, unless the application catches
    the error around a savepoint.
    """


def outcome_unknown(error: exc.DBAPIError, during: str) -> CommitOutcomeUnknown:
    """Return the error for a connection that was lost when the transaction may be stored already.

    :param error: The driver's error, as SQLAlchemy has wrapped it.
    :param during: What was under way when the connection was lost, for the text of the error.
    """
    unknown = CommitOutcomeUnknown(
        error.statement, error.params, cast(BaseException, error.orig), connection_invalidated=True
    )
    unknown.add_detail(
        f"The connection was lost during {during}: the transaction may be stored or not. Look "
        "up what is stored before you run the transaction again." + see("outcome-unknown")
    )
    return unknown


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error; ``None`` if the server has not sent the error.

    :param error: An error of psycopg or psycopg2, or SQLAlchemy's error that wraps it.
    """
    if isinstance(error, exc.DBAPIError):
        error = error.orig
    # psycopg 3 calls the code sqlstate, and psycopg2 calls it pgcode.
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def was_refused(error: BaseException | None) -> bool:
    """Tell whether the server has refused a statement as a standby does, and executed nothing.

    https://www.postgresql.org/docs/current/hot-standby.html

    :param error: An error of the driver, or SQLAlchemy's error that wraps it.
    """
    code = sqlstate(error)
    if code != _NOT_SUPPORTED:
        return code == READ_ONLY
    diag = getattr(getattr(error, "orig", error), "diag", None)
    return getattr(diag, "source_file", None) in _OF_BEGIN


def advise(error: BaseException, connection: Connection) -> str | None:
    """Return advice for an error of the driver, if its cause is known.

    Sends nothing. Call this before SQLAlchemy handles the error, because SQLAlchemy may close the
    connection.

    :param error: The error.
    :param connection: The connection.
    """
    code = sqlstate(error)
    if was_refused(error) and reported(connection, "in_hot_standby") == "on":
        return _STANDBY
    if code == READ_ONLY:
        return why_read_only(connection)
    # The cursor of a stream that began outside a transaction has "held_" in its name. Any other
    # stream has ended with its block.
    if code == _NO_SUCH_CURSOR and "held_" in str(error) and not connection.in_transaction():
        return _POOLER
    return None


def why_read_only(connection: Connection) -> str | None:
    """Return advice for a write that the server has refused as read-only.

    Sends nothing.

    :param connection: The connection, from an engine of this package.
    :returns: ``None`` inside a transaction, except on a standby.
    """
    if reported(connection, "in_hot_standby") == "on":
        return _STANDBY
    if connection.in_transaction():
        return None
    options: Any = getattr(connection.engine, "transaction_options", None)
    return _WRAP_IT if begins_to_write(options) else _READ_ONLY_BY_DEFAULT


def begins_to_write(options: Any) -> bool:
    """Tell whether an engine's transactions begin with READ WRITE, regardless of the default.

    They do so with ``read_only_outside``, and with the option ``postgresql_readonly=False``.

    :param options: The transaction options of an engine.
    """
    return getattr(options, "read_only", None) is False


def reported(connection: Connection, parameter: str) -> str | None:
    """Return the value of a parameter, if the server has reported it to the driver.

    Sends nothing. PostgreSQL reports ``in_hot_standby`` and ``default_transaction_read_only`` since
    version 14.

    :param connection: The connection.
    :param parameter: The name of the parameter.
    """
    try:
        held: Any = getattr(connection, "held", None) or connection.connection
    except Exception:  # the connection is gone; this is advice only
        return None
    return reported_to(held.driver_connection, parameter)


def reported_to(driver_connection: Any, parameter: str) -> str | None:
    """Return the value of a parameter that the server has reported to the driver's connection.

    :param driver_connection: The driver's connection, or ``None``.
    :param parameter: The name of the parameter.
    """
    try:
        value: str | None = driver_connection.info.parameter_status(parameter)
    except Exception:  # the connection is gone, or the driver can't tell
        return None
    return value


def close_lost_cursor(cursor: Any) -> None:
    """Close a cursor whose connection is lost. psycopg leaves it open, and would warn later.

    :param cursor: The cursor, which may be closed already; or ``None``.
    """
    if not getattr(cursor, "closed", True):
        with suppress(Exception):
            cursor.close()
