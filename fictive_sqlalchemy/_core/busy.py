"""Connections on which an exception has interrupted a statement."""

from __future__ import annotations

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from .autocommit import Switch
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
