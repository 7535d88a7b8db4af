"""The errors of this package, and what it adds to those of the database."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import Engine, ExceptionContext

NOTHING_STORED = (
    "Nothing of this block was stored: a statement in it had failed, which aborted it, and the "
    "error was caught inside. Let the error leave the block, or put what may fail into "
    "`with session.begin_nested():`."
)

# What an error outside a transaction may come from, by SQLSTATE:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_OUTSIDE = {
    "25006": "Outside a transaction this engine only reads: wrap it in `with db.session.begin():`, "
    "or in begin() of the session or the connection.",
    "34000": "Between here and PostgreSQL is a pooler, such as PgBouncer in transaction mode, that "
    "gave this statement another server connection than the one with the cursor: put the stream "
    "into `with session.begin():`.",
}


class CommitOutcomeUnknown(exc.OperationalError):
    """The connection was lost during COMMIT: whether it was stored is not known.

    Look it up before you do it again.
    """


def sqlstate(error: BaseException | None) -> str:
    """Return the server's code for an error; empty where the driver has none.

    :param error: The error of the driver, or SQLAlchemy's error around it.
    """
    if isinstance(error, exc.DBAPIError):
        error = error.orig
    # psycopg 3 says sqlstate, psycopg2 pgcode
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or ""


def explain_errors(engine: Engine) -> None:
    """Add what to do to errors that have one cause here; the errors stay what they are.

    :param engine: The engine.
    """

    @event.listens_for(engine, "handle_error")
    def explain(context: ExceptionContext) -> None:
        if context.is_disconnect and context.execution_context is not None:
            close_lost_cursor(context.execution_context.cursor)
        error = context.original_exception
        said = context.sqlalchemy_exception
        code = sqlstate(error)
        if code == "34000" and "held_" not in str(error):
            return  # the stream of a block, which has ended
        advice = _OUTSIDE.get(code)
        if advice is None or said is None or context.connection is None:
            return
        if not context.connection.in_transaction():
            said.add_detail(advice)


def close_lost_cursor(cursor: Any) -> None:
    """Close a cursor whose connection is lost: psycopg leaves it open, and warns of it later.

    :param cursor: A cursor that was closed, or had its connection lost; or ``None``.
    """
    if not getattr(cursor, "closed", True):
        with suppress(Exception):
            cursor.close()
