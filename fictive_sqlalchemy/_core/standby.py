"""A server that is a standby: an engine that is to write has to find the primary again.

After a failover the address of an engine may for a moment still lead to the server that was the
primary. There are no connections that became those of a standby while they were open, because a
primary becomes a standby only by a restart. But new ones may reach it, and the pool would keep
them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Dialect

from .errors import REFUSED_BY_STANDBY, sqlstate


def was_refused(error: BaseException | None) -> bool:
    """Tell whether an error is one with which a standby refuses a statement, executing nothing.

    :param error: An error of the driver, or SQLAlchemy's around one.
    """
    return sqlstate(error) in REFUSED_BY_STANDBY


def is_loss(error: BaseException, dialect: Any, driver: Any, cursor: Any) -> bool:
    """Tell whether nobody knows whether the server has executed a statement that has failed.

    :param error: The error: of the driver, or of a signal handler that has interrupted the driver.
    :param dialect: SQLAlchemy's dialect.
    :param driver: The DBAPI connection.
    :param cursor: The cursor.
    """
    if not isinstance(error, dialect.loaded_dbapi.Error):
        return True
    return not was_refused(error) and bool(dialect.is_disconnect(error, driver, cursor))


def leave_standbys(dialect: Dialect) -> None:
    """Have SQLAlchemy close the connections to a server that has refused a write as a standby.

    SQLAlchemy then treats the error as that of a lost connection: this connection and all those of
    the pool that are as old are replaced at their next use. Nothing is sent to find out: the server
    tells the driver when a connection is opened whether it is a standby, since PostgreSQL 14.

    :param dialect: The dialect of an engine that writes, so not of a replica's.
    """
    original = dialect.is_disconnect

    def is_disconnect(error: Any, connection: Any, cursor: Any) -> bool:
        return original(error, connection, cursor) or (
            was_refused(error) and is_standby(getattr(connection, "driver_connection", connection))
        )

    changed: Any = dialect
    changed.is_disconnect = is_disconnect


def is_standby(driver_connection: Any) -> bool:
    """Tell whether the server of a connection has said that it is a standby. Sends nothing.

    :param driver_connection: The driver's connection, or ``None``.
    """
    try:
        return bool(driver_connection.info.parameter_status("in_hot_standby") == "on")
    except Exception:  # the connection is gone, or the driver can't tell
        return False
