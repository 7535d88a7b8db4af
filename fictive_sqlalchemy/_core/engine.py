"""Engines whose connections rest in autocommit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import PoolProxiedConnection, PoolResetState, StaticPool
from sqlalchemy.util import asbool

from .autocommit import (
    DEFAULT,
    HELD_CURSORS,
    STARTED_WITH,
    TAKEN_BY,
    Switch,
    TransactionOptions,
    split_options,
    switch_for,
    without_autocommit,
)
from .connection import OptInConnection
from .drivers import with_installed_driver
from .errors import explain_errors
from .forks import leave_connection_to_parent, leave_to_parent
from .read_only import forbid_writes
from .replicas import Health, attach, copy_replicas, options_of_replicas
from .statements import stand_alone


class OptInEngine(Engine):
    """An engine whose connections rest in autocommit. Make it with :func:`create_engine`.

    ``connect()`` gives a connection on which each statement stands alone. ``begin()``, here or
    on the connection, is a real transaction.
    """

    switch: Switch
    """The way out of autocommit and back for its driver."""

    transaction_options: TransactionOptions = DEFAULT
    """What its transactions begin with unless they ask for something else."""

    replicas: tuple[OptInEngine, ...] = ()
    """Where the reads of sessions go that are outside a transaction, see :func:`create_engine`."""

    primary: OptInEngine | None = None
    """What it is a replica of, if it is one."""

    health: Health = Health()
    """Whether it can be used, if it is a replica."""

    def connect(self) -> OptInConnection:
        """Return a connection, which rests in autocommit. Sends nothing."""
        connection = OptInConnection(self)
        leave_connection_to_parent(connection)
        return connection

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a DBAPI connection from the pool, in autocommit. Sends nothing."""
        connection = super().raw_connection()
        info = connection.info
        if STARTED_WITH not in info:  # its first use: all listeners have had it
            started_with = self.switch.started_with(connection.dbapi_connection)
            info[STARTED_WITH] = started_with
            self.switch.reset(connection.dbapi_connection, started_with)
        return connection

    def execution_options(self, **opt: Any) -> OptInOptionEngine:
        """Return a copy of this engine with the same pool and other execution options.

        :param opt: As SQLAlchemy takes them, but ``isolation_level``, ``postgresql_readonly``
            and ``postgresql_deferrable`` are those of the copy's transactions, which are none
            with the level ``"AUTOCOMMIT"``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        """
        copy = super().execution_options()
        assert isinstance(copy, OptInOptionEngine)
        copy.switch = self.switch
        copy.transaction_options = self.transaction_options
        copy_replicas(self, copy)
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


# private: what Engine.execution_options() makes
OptInEngine._option_cls = OptInOptionEngine  # pyright: ignore[reportPrivateUsage]


def create_engine(url: str | URL, **kwargs: Any) -> OptInEngine:
    """Create an engine whose connections rest in autocommit. Sends nothing.

    :param url: The database, as ``sqlalchemy.create_engine()`` takes it. ``postgresql://`` is
        SQLAlchemy's choice of the driver, or the other one, of psycopg2 and psycopg, if that is
        not installed.
    :param kwargs: As ``sqlalchemy.create_engine()`` takes them, but ``isolation_level`` is that
        of the transactions. Outside of them a statement has the server's default.
        ``read_only_outside=True`` makes the server refuse writes outside of transactions. And
        ``replicas`` is a list of the URLs of read replicas, to which the reads of sessions go
        that are outside a transaction. An item may be a dictionary of a ``url`` and of options
        that are not the primary's.
    :raises sqlalchemy.exc.ArgumentError: if the database does not know the isolation level, if
        an option contradicts autocommit, if the dialect does not offer AUTOCOMMIT, or if a replica
        has no URL or is of another database system.
    :raises ModuleNotFoundError: if the driver is not installed.
    """
    return _opt_in(sqlalchemy.create_engine, url, kwargs)


def engine_from_config(
    configuration: Mapping[str, Any], prefix: str = "sqlalchemy.", **kwargs: Any
) -> OptInEngine:
    """Create an engine as :func:`create_engine` does, from options that may be strings.

    :param configuration: The options and the ``url``, as ``sqlalchemy.engine_from_config()``
        takes them.
    :param prefix: What their names begin with.
    :param kwargs: More options, without the prefix.
    """
    options = {
        name[len(prefix) :]: value
        for name, value in configuration.items()
        if name.startswith(prefix)
    }
    options.update(kwargs)
    return _opt_in(_create_from_config, options.pop("url"), options)


def _create_from_config(url: str | URL, **options: Any) -> Engine:
    return sqlalchemy.engine_from_config({**options, "url": url}, prefix="")


def _opt_in(
    create: Callable[..., Engine],
    url: str | URL,
    kwargs: dict[str, Any],
    *,
    is_replica: bool = False,
) -> OptInEngine:
    replicas = options_of_replicas(kwargs.pop("replicas", None) or (), kwargs)
    if kwargs.pop("server_side_cursors", False):
        raise exc.ArgumentError(
            "server_side_cursors=True would make every read a cursor on the server. Leave it "
            "out, and stream the reads that need it: execution_options(stream_results=True)."
        )
    read_only_outside = asbool(kwargs.pop("read_only_outside", False))
    by_option, execution_options = split_options(kwargs.pop("execution_options", None) or {})
    by_keyword, _ = split_options({"isolation_level": kwargs.pop("isolation_level", None)})
    options = by_keyword.over(by_option)
    if read_only_outside and not is_replica:  # which refuses to begin READ WRITE
        options = options.over(TransactionOptions(read_only=False))
    # Our own reset() knows when there is nothing to do.
    if "pool" not in kwargs:
        kwargs.setdefault("pool_reset_on_return", None)
    if "module" not in kwargs:
        url = with_installed_driver(url)
    engine = create(url, execution_options=execution_options, **kwargs)
    if read_only_outside:
        forbid_writes(engine)
    switch = switch_for(engine.dialect)
    options.check(engine.dialect)
    stand_alone(engine.dialect)
    explain_errors(engine)

    # First of all listeners: SQLAlchemy's own read from the database.
    @event.listens_for(engine, "connect", insert=True)
    def rest(connection: Any, record: Any) -> None:
        switch.rest(connection)

    @event.listens_for(engine, "reset")
    def reset(connection: Any, record: Any, state: PoolResetState) -> None:
        if state.terminate_only:
            return
        if isinstance(engine.pool, StaticPool):
            # All share the one connection: it may come back from one while another is in a
            # transaction on it.
            taken_by = record.info.get(TAKEN_BY)
            owner = taken_by and taken_by()
            if owner is not None and owner.in_transaction():
                return
        if record.info.pop(HELD_CURSORS, False):
            connection.cursor().execute("CLOSE ALL")  # of a stream that nobody closed
        if STARTED_WITH in record.info:
            switch.reset(connection, record.info[STARTED_WITH])
        else:  # the pool's own connect(), past the engine
            switch.reset(connection)

    # create_engine() has no parameter for the class, and what it and its plugins have wired up
    # belongs to this very object.
    engine.__class__ = OptInEngine
    assert isinstance(engine, OptInEngine)
    engine.switch = switch
    engine.transaction_options = options
    leave_to_parent(engine)
    attach(engine, [_opt_in(create, *replica, is_replica=True) for replica in replicas])
    return engine
