"""Prepared statements of psycopg 3 that the server does not execute any more.

psycopg 3 prepares a statement that was executed often, on each connection by itself. Outside a
transaction nothing makes it forget that again: after a migration has changed what the statement
returns, and after DISCARD ALL or a pooler has dropped it, each execution would fail for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from secrets import token_hex
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.engine.default import DefaultDialect

from .errors import sqlstate
from .sql import statements

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_FEATURE_NOT_SUPPORTED, _NO_SUCH_STATEMENT, _STATEMENT_EXISTS = "0A000", "26000", "42P05"

# The function of PostgreSQL that says "cached plan must not change result type"; the text of the
# message depends on the server's language.
_CHANGED = "RevalidateCachedQuery"

# What psycopg names the statements that it prepares.
_NAME = '"_pg3_'


def prepare_anew(dialect: Dialect) -> None:
    """Send a statement outside a transaction again when psycopg had prepared it in vain.

    The server refuses such a statement before it does anything, so that nothing is done twice.
    It happens below SQLAlchemy's events and log, which know of one execution. Inside a
    transaction the refusal aborts the transaction, and the ROLLBACK makes psycopg forget.

    :param dialect: The dialect of an engine of ours, and of no other. It is changed if its driver
        is psycopg 3.
    """
    if dialect.driver != "psycopg" or dialect.is_async:
        return
    changed: Any = dialect
    for name in ("do_execute", "do_execute_no_params"):
        setattr(changed, name, prepared_anew(dialect, getattr(changed, name)))
    if type(dialect).do_execute is DefaultDialect.do_execute:
        # The same without another function around the driver's, because each statement comes here.
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
    """Return what executes a statement, and again if psycopg had prepared it in vain.

    What executes it only once is ``once`` of that.

    :param dialect: The dialect.
    :param execute: Executes the statement once.
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

    Nothing was done either where the statement was the only one: no transaction is open now.
    """
    code = sqlstate(error)
    if code == _FEATURE_NOT_SUPPORTED:
        # Of what the user has prepared, psycopg knows nothing. In a function there is a context.
        refused = (
            error.diag.source_function == _CHANGED
            and error.diag.context is None
            and next(statements(statement))[0][0] != "EXECUTE"
        )
    else:
        refused = code in (_NO_SUCH_STATEMENT, _STATEMENT_EXISTS) and _NAME in str(error)
    return refused and not cursor.connection.info.transaction_status


def forget_prepared(connection: Any) -> None:
    """Have psycopg, and the server, forget all statements that are prepared on a connection.

    Cursors on the server stay open. psycopg notices DEALLOCATE ALL only where it has not counted
    that text before, hence the comment.
    """
    with connection.cursor() as cursor:
        cursor.execute(f"DEALLOCATE ALL -- {token_hex(4)}")
