"""The base class of the engine, with what a connection needs of its engine."""

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
    """Enters and leaves autocommit, in the way of the driver."""

    transaction_options: TransactionOptions = DEFAULT
    """The isolation level and flags of transactions that were begun without these options."""

    begins_on_write: bool = False
    """Whether the first write on a connection of ``connect()`` begins a transaction, which
    ``commit()`` ends. For connections on loan to a session, the option of the session counts."""

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a DBAPI connection from the pool, in autocommit. Sends no BEGIN."""
        connection: PoolProxiedConnection | None = None
        recorder = observing.recorder
        started = 0.0 if recorder is None else perf_counter()
        try:
            connection = super().raw_connection()
            info = connection.info
            if recorder is not None:
                recorder.note_connection(self, info, started)
            if STARTED_WITH not in info:  # the first use, after all listeners to "connect"
                started_with = self.switch.started_with(connection.dbapi_connection)
                info[STARTED_WITH] = started_with
                self.switch.reset(connection.dbapi_connection, started_with)
            return connection
        except BaseException:
            # SingletonThreadPool counts the users of its connection. The caller does not get this
            # one, so nobody else would give it back.
            if connection is not None:
                connection.close()
            raise
