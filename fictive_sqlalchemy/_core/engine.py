"""Engines whose connections are in autocommit except during a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine.base import OptionEngine

from .connection import OptInConnection
from .health import Health
from .options import split_options, without_autocommit
from .resting import RestingEngine


class OptInEngine(RestingEngine):
    """An engine whose connections are in autocommit. Make it with :func:`create_engine`.

    ``connect()`` gives a connection on which each statement stands alone. ``begin()``, here or
    on the connection, is a real transaction. With ``begin_on_write=True`` the first write on the
    connection begins it, too.
    """

    replicas: tuple[OptInEngine, ...] = ()
    """Where the reads of sessions go that are outside a transaction, see :func:`create_engine`."""

    primary: OptInEngine | None = None
    """What it is a replica of, if it is one."""

    health: Health = Health()
    """Whether it can be used, if it is a replica."""

    def connect(self) -> OptInConnection:
        """Return a connection, which is in autocommit. Sends nothing.

        With ``begin_on_write=True`` the first statement on it that writes or locks begins a
        transaction. ``commit()`` of the connection ends it; ``rollback()`` and ``close()`` undo it.
        """
        return OptInConnection(self)

    def execution_options(self, **opt: Any) -> OptInOptionEngine:
        """Return a copy of this engine with the same pool and other execution options.

        :param opt: As SQLAlchemy takes them, but ``isolation_level``, ``postgresql_readonly``
            and ``postgresql_deferrable`` are those of the copy's transactions, which are none
            with the level ``"AUTOCOMMIT"``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        """
        copy = OptInOptionEngine(self, {})
        copy.switch = self.switch
        copy.transaction_options = self.transaction_options
        copy.begins_on_write = self.begins_on_write
        copy.primary, copy.health = self.primary, self.health
        copy.replicas = tuple(replica.execution_options() for replica in self.replicas)
        for replica in copy.replicas:
            replica.primary = copy
        copy.update_execution_options(**opt)
        return copy

    def update_execution_options(self, **opt: Any) -> None:
        """Change the execution options of this engine.

        :param opt: As :meth:`execution_options` takes them.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        """
        options, rest = split_options(opt)
        options = options.over(self.transaction_options)
        without_autocommit(options).check(self.dialect)
        self.transaction_options = options
        super().update_execution_options(**rest)
        for replica in self.replicas:
            replica.update_execution_options(**opt)

    def dispose(self, close: bool = True) -> None:
        """Dispose of the pool, and of those of the replicas.

        :param close: As SQLAlchemy takes it.
        """
        super().dispose(close)
        for replica in self.replicas:
            replica.dispose(close)


class OptInOptionEngine(OptInEngine, OptionEngine):
    """A copy of an :class:`OptInEngine` with execution options of its own."""
