"""What is done about the driver's connection and cursor when a statement has failed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from .autocommit import HELD_CURSORS, Switch
from .errors import close_lost_cursor


def close_if_busy(engine: Engine, switch: Switch) -> None:
    """Close a connection on which a statement is still under way after an exception.

    That is one of a signal handler, such as Celery's ``SoftTimeLimitExceeded``, or of a timeout of
    gevent, while psycopg waited for the answer. Each later statement would fail with "another
    command is already in progress", the ROLLBACK included, which would hide the exception.

    :param engine: The engine.
    :param switch: Its switch.
    """

    @event.listens_for(engine, "handle_error")
    def close(context: ExceptionContext) -> None:
        connection = context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if switch.is_busy(connection.connection.dbapi_connection):
            connection.invalidate()
            if context.execution_context is not None:
                close_lost_cursor(context.execution_context.cursor)
            context.is_disconnect = True  # or SQLAlchemy would go on with it
            context.invalidate_pool_on_disconnect = False  # the server is well


def leave_undeclared(engine: Engine) -> None:
    """Leave a cursor on the server alone whose DECLARE has failed outside a transaction.

    There is no such cursor, and the drivers would ask the server about it, or close it in vain.

    :param engine: The engine.
    """

    @event.listens_for(engine, "handle_error")
    def leave(context: ExceptionContext) -> None:
        execution: Any = context.execution_context
        connection: Any = context.connection
        cursor = getattr(execution, "declares", None)
        # SQLAlchemy tells no statement for an error of a later FETCH.
        if cursor is None or connection is None or context.statement is None:
            return
        if context.is_disconnect or connection.invalidated or connection.closed:
            return
        connection.undeclared = cursor
        if not execution.had_cursors:
            connection.info.pop(HELD_CURSORS, None)
        if engine.dialect.driver == "psycopg":  # which warns of a cursor that is not closed
            engine.dialect.loaded_dbapi.Cursor.close(cursor)
