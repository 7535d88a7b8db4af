"""Prepared statements of psycopg 3 that the server does not execute any more.

On each connection, psycopg 3 prepares the statements that were executed often. Outside a
transaction nothing makes psycopg forget a prepared statement again. So if a migration changes what
the statement returns, or if DISCARD ALL or a pooler drops the prepared statement, every later
execution on the connection would fail.
"""

from __future__ import annotations

from collections.abc import Callable
from secrets import token_hex
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect

from .errors import sqlstate
from .psycopg_private import PREPARED_NAME
from .sql import statements

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_FEATURE_NOT_SUPPORTED, _NO_SUCH_STATEMENT, _STATEMENT_EXISTS = "0A000", "26000", "42P05"

# The function of PostgreSQL that raises "cached plan must not change result type". The text of the
# message depends on the server's language.
_CHANGED = "RevalidateCachedQuery"


def prepare_anew(dialect: Dialect) -> None:
    """Send a statement outside a transaction again if the server refuses the prepared statement.

    The server refuses the prepared statement before it executes anything, so nothing is done twice.
    The second execution happens below SQLAlchemy's events and log, which know of one execution.
    Inside a transaction the refusal aborts the transaction, and the ROLLBACK makes psycopg forget
    the prepared statement.

    :param dialect: The dialect of an engine of ours, and of no other engine. The function changes
        the dialect if its driver is psycopg 3.
    """
    if dialect.driver != "psycopg" or dialect.is_async:
        return
    changed: Any = dialect
    for name in ("do_execute", "do_execute_no_params"):
        setattr(changed, name, prepared_anew(dialect, getattr(changed, name)))
    if type(dialect).do_execute is DefaultDialect.do_execute:
        # Does the same with one Python call less, because each statement passes through here.
        once, errors = changed.do_execute.once, changed.loaded_dbapi.Error

        def execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
            try:
                cursor.execute(statement, parameters)
            except errors as error:
                if not _is_refused(error, cursor, statement):
                    raise
                forget_prepared(cursor.connection)
                cursor.execute(statement, parameters)

        execute.once = once  # type: ignore[attr-defined]
        changed.do_execute = execute


def prepared_anew(dialect: Dialect, execute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that executes a statement, and again if its prepared form is refused.

    The attribute ``once`` of the returned function is ``execute``.

    :param dialect: The dialect.
    :param execute: A function that executes a statement once.
    """
    errors = dialect.loaded_dbapi.Error

    def execute_or_prepare_anew(cursor: Any, statement: str, *args: Any) -> None:
        try:
            execute(cursor, statement, *args)
        except errors as error:
            if not _is_refused(error, cursor, statement):
                raise
            forget_prepared(cursor.connection)
            execute(cursor, statement, *args)

    execute_or_prepare_anew.once = execute  # type: ignore[attr-defined]
    return execute_or_prepare_anew


def _is_refused(error: Any, cursor: Any, statement: str) -> bool:
    """Tell whether the server has refused a statement that psycopg had prepared, and done nothing.

    The answer is no while a transaction is open, because the refusal has aborted the transaction.
    """
    code = sqlstate(error)
    if code == _FEATURE_NOT_SUPPORTED:
        # psycopg can't prepare again what the user has prepared by PREPARE. If the error comes from
        # inside a function, it has a context, and the function may have done something already.
        refused = (
            error.diag.source_function == _CHANGED
            and error.diag.context is None
            and next(statements(statement))[0][0] != "EXECUTE"
        )
    else:
        refused = code in (_NO_SUCH_STATEMENT, _STATEMENT_EXISTS) and PREPARED_NAME in str(error)
    return refused and not cursor.connection.info.transaction_status


def forget_prepared(connection: Any) -> None:
    """Have psycopg and the server forget all statements that are prepared on a connection.

    Server-side cursors stay open. Only new versions of psycopg 3 notice a DEALLOCATE ALL, and all
    versions a ROLLBACK. They look only at statements that they have not counted before, hence the
    random comment.
    """
    with connection.cursor() as cursor:
        # Several statements can not be prepared, which prepare_threshold=0 would do at once.
        cursor.execute(f"DEALLOCATE ALL; BEGIN; ROLLBACK -- {token_hex(4)}", prepare=False)
