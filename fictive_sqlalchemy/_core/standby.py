"""A server that is a standby: how an engine that writes finds the primary again.

After a failover the address of an engine may for a moment still lead to the server that was the
primary. A primary becomes a standby only by a restart, which closes all its connections. But new
connections may then reach the standby, and the pool would keep them.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .errors import reported_to, was_refused

#: Key in the ``info`` of a pool's entry: whether the session or the user still needs a connection
#: on which a write was refused, for a savepoint, a stream or a lock.
IN_USE = "fictive_sqlalchemy.in_use_on_standby"

# The shortest time in seconds between two errors that close the connections to a standby.
_PAUSE = 1.0


def is_loss(error: BaseException, dialect: Any, driver: Any, cursor: Any) -> bool:
    """Tell whether it is unknown if the server has executed a statement that has failed.

    :param error: The error of the driver, or of a signal handler that has interrupted the driver.
    :param dialect: SQLAlchemy's dialect.
    :param driver: The DBAPI connection.
    :param cursor: The cursor.
    """
    if not isinstance(error, dialect.loaded_dbapi.Error):
        return True
    return not was_refused(error) and bool(dialect.is_disconnect(error, driver, cursor))


def leave_standbys(dialect: Dialect) -> None:
    """Have SQLAlchemy close the connections to a server that has refused a write as a standby.

    SQLAlchemy then treats the error as that of a lost connection: this connection, and all
    connections of the pool that are as old, are replaced at their next use. Sends nothing, because
    since PostgreSQL 14 the server tells the driver at connect whether it is a standby.

    This happens once a second at most, because a new connection may reach the standby again. If
    the address of the engine is that of a standby on purpose, each new connection does.

    :param dialect: The dialect of an engine that writes, and so not that of a replica.
    """
    original = dialect.is_disconnect
    left_at = -_PAUSE

    def is_disconnect(error: Any, connection: Any, cursor: Any) -> bool:
        nonlocal left_at
        if original(error, connection, cursor):
            return True
        # A ping of the pool passes the driver's connection. No standby refuses a ping.
        if not (isinstance(connection, PoolProxiedConnection) and was_refused(error)):
            return False
        if connection.info.get(IN_USE) or not is_standby(connection.driver_connection):
            return False
        now = time.monotonic()
        if now < left_at + _PAUSE:
            return False
        left_at = now
        return True

    changed: Any = dialect
    changed.is_disconnect = is_disconnect


def is_standby(driver_connection: Any) -> bool:
    """Tell whether the server of a connection has said that it is a standby. Sends nothing.

    :param driver_connection: The driver's connection, or ``None``.
    """
    return reported_to(driver_connection, "in_hot_standby") == "on"
