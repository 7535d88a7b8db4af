"""What is said, and tidied up, when the database reports an error."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

# What an error outside a transaction may come from, by SQLSTATE:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_OUTSIDE = {
    "25006": "Outside a transaction this engine only reads: wrap it in `with db.session.begin():`, "
    "or in begin() of the session or the connection.",
    "34000": "Between here and PostgreSQL is a pooler, such as PgBouncer in transaction mode, that "
    "gave this statement another server connection than the one with the cursor: put the stream "
    "into `with session.begin():`.",
}


def explain_errors(engine: Engine) -> None:
    """Add what to do to errors that have one cause here; the errors stay what they are.

    :param engine: The engine.
    """

    @event.listens_for(engine, "handle_error")
    def explain(context: ExceptionContext) -> None:
        if context.is_disconnect and context.execution_context is not None:
            close_lost_cursor(context.execution_context.cursor)
        error: Any = context.original_exception
        said = context.sqlalchemy_exception
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", "") or ""
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
