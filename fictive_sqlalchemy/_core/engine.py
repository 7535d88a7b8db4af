"""Engines whose connections are in autocommit except during a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine.base import OptionEngine

from .connection import OptInConnection
from .health import Health
from .options import split_options, without_autocommit
from .resting import RestingEngine


class OptInEngine(RestingEngine):
    """An engine whose connections are in autocommit outside transactions.

    :func:`create_engine` makes such an engine. On a connection of ``connect()``, each statement is
    standalone. ``begin()`` of the engine or of the connection begins a real transaction. With
    ``begin_on_write=True``, the first write on the connection begins one, too.
    """

    replicas: tuple[OptInEngine, ...] = ()
    """The replicas to which sessions send reads outside a transaction: :func:`create_engine`."""

    primary: OptInEngine | None = None
    """The engine of the primary, if this engine is for a replica."""

    health: Health = Health()
    """Whether the replica can be used, if this engine is for a replica."""

    def connect(self) -> OptInConnection:
        """Return a connection, which is in autocommit. Sends no BEGIN.

        If the pool has no connection, a new one is made.

        With ``begin_on_write=True``, the first statement on the connection that writes or locks
        begins a transaction, which ``commit()`` of the connection commits. ``rollback()`` and
        ``close()`` roll the transaction back.
        """
        return OptInConnection(self)

    def execution_options(self, **opt: Any) -> OptInOptionEngine:
        """Return a copy of this engine with the same pool and other execution options.

        :param opt: The options of SQLAlchemy. ``isolation_level``, ``postgresql_readonly`` and
            ``postgresql_deferrable`` are those of the copy's transactions. With the level
            ``"AUTOCOMMIT"``, ``begin()`` sends no BEGIN.
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

        :param opt: The options, as for :meth:`execution_options`.
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
        """Dispose of the pool, and of the pools of the replicas.

        :param close: Whether idle connections are closed, as with SQLAlchemy.
        """
        super().dispose(close)
        for replica in self.replicas:
            replica.dispose(close)


class OptInOptionEngine(OptInEngine, OptionEngine):
    """A copy of an :class:`OptInEngine` with execution options of its own."""
