"""What a connection needs of its engine: connections of the pool that are in autocommit."""

from __future__ import annotations

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from .autocommit import STARTED_WITH, Switch
from .options import DEFAULT, TransactionOptions


class RestingEngine(Engine):
    """An engine whose DBAPI connections are in autocommit except during a transaction."""

    switch: Switch
    """Into autocommit and out of it, for its driver."""

    transaction_options: TransactionOptions = DEFAULT
    """What its transactions begin with unless they ask for something else."""

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a DBAPI connection from the pool, in autocommit. Sends nothing."""
        connection: PoolProxiedConnection | None = None
        try:
            connection = super().raw_connection()
            info = connection.info
            if STARTED_WITH not in info:  # its first use: all listeners have had it
                started_with = self.switch.started_with(connection.dbapi_connection)
                info[STARTED_WITH] = started_with
                self.switch.reset(connection.dbapi_connection, started_with)
            return connection
        except BaseException:
            # SingletonThreadPool counts who has its connection, and nobody else would give this one
            # back.
            if connection is not None:
                connection.close()
            raise
