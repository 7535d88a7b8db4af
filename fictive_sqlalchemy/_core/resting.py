"""The base class of the engine: what a connection needs of its engine."""

from __future__ import annotations

from time import perf_counter

from sqlalchemy.engine import Engine
from sqlalchemy.pool import PoolProxiedConnection

from . import observing
from .autocommit import STARTED_WITH, Switch
from .options import DEFAULT, TransactionOptions


class RestingEngine(Engine):
    """An engine whose DBAPI connections are in autocommit except during a transaction."""

    switch: Switch
    """Enters and leaves autocommit, as its driver does that."""

    transaction_options: TransactionOptions = DEFAULT
    """The isolation level and flags of transactions that do not ask for others."""

    begins_on_write: bool = False
    """Whether, on a connection that its user holds, the first write begins the transaction that
    ``commit()`` ends. A session says it for the connections that it has on loan."""

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a DBAPI connection from the pool, in autocommit. Sends nothing."""
        connection: PoolProxiedConnection | None = None
        recorder = observing.recorder
        started = 0.0 if recorder is None else perf_counter()
        try:
            connection = super().raw_connection()
            info = connection.info
            if recorder is not None:
                recorder.note_connection(self, info, started)
            if STARTED_WITH not in info:  # its first use, after all "connect" listeners
                started_with = self.switch.started_with(connection.dbapi_connection)
                info[STARTED_WITH] = started_with
                self.switch.reset(connection.dbapi_connection, started_with)
            return connection
        except BaseException:
            # SingletonThreadPool counts the users of its connection, and nobody else would give
            # this one back.
            if connection is not None:
                connection.close()
            raise
