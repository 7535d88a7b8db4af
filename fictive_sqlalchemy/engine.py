"""Engines whose connections rest in autocommit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import PoolProxiedConnection, PoolResetState, StaticPool

from .autocommit import DEFAULT, HELD_CURSORS, STARTED_WITH, TAKEN_BY, Switch, TransactionOptions, split_options, switch_for
from .connection import OptInConnection


class OptInEngine(Engine):
    """An engine whose connections rest in autocommit, made by :func:`create_engine`.

    ``connect()`` gives a connection on which each statement stands alone; ``begin()``, here or on the connection, is
    a real transaction.
    """

    switch: Switch
    """The way out of autocommit and back for its driver."""

    transaction_options: TransactionOptions = DEFAULT
    """What its transactions begin with unless they ask for something else."""

    def connect(self) -> OptInConnection:
        """Return a connection that rests in autocommit. Sends nothing once the pool has connections."""
        return OptInConnection(self)

    def raw_connection(self) -> PoolProxiedConnection:
        """Return a DBAPI connection from the pool, in autocommit. Sends nothing once the pool has connections."""
        connection = super().raw_connection()
        if STARTED_WITH not in connection.info:
            connection.info[STARTED_WITH] = self.switch.started_with(connection.dbapi_connection)
        return connection

    def execution_options(self, **opt: Any) -> OptInOptionEngine:  # type: ignore[override]
        """Return a copy of this engine with other execution options and the same pool.

        ``isolation_level``, ``postgresql_readonly`` and ``postgresql_deferrable`` are those of its transactions.

        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value.
        """
        options, rest = split_options(opt)
        if options.isolation_level == "AUTOCOMMIT":  # which is what its connections rest in
            options = TransactionOptions(None, options.read_only, options.deferrable)
        options = options.over(self.transaction_options)
        options.check(self.dialect)
        engine: Engine = super().execution_options(**rest)
        engine.__class__ = OptInOptionEngine  # as in _opt_in()
        assert isinstance(engine, OptInOptionEngine)
        engine.switch = self.switch
        engine.transaction_options = options
        return engine

    def update_execution_options(self, **opt: Any) -> None:
        """Change the execution options of this engine, see :meth:`execution_options`."""
        options, rest = split_options(opt)
        if rest != opt:
            options = options.over(self.transaction_options)
            options.check(self.dialect)
            self.transaction_options = options
        super().update_execution_options(**rest)


class OptInOptionEngine(OptInEngine, OptionEngine):
    """A copy of an :class:`OptInEngine` with execution options of its own."""


def create_engine(url: str | URL, **kwargs: Any) -> OptInEngine:
    """Create an engine whose connections rest in autocommit. Sends nothing.

    :param url: The database, as ``sqlalchemy.create_engine()`` takes it.
    :param kwargs: As ``sqlalchemy.create_engine()`` takes them, but ``isolation_level`` is the level of the
        transactions: outside of them a statement has the level the server gives it.
    :raises sqlalchemy.exc.ArgumentError: if the database does not know the isolation level, if its dialect does not
        offer AUTOCOMMIT, or if an option contradicts it.
    """
    return _opt_in(sqlalchemy.create_engine, url, kwargs)


def engine_from_config(configuration: Mapping[str, Any], prefix: str = "sqlalchemy.", **kwargs: Any) -> OptInEngine:
    """Create an engine as :func:`create_engine` does, from a mapping of options that may be strings.

    :param configuration: The options and the ``url``, as ``sqlalchemy.engine_from_config()`` takes them.
    :param prefix: What their names begin with.
    :param kwargs: More options, without the prefix.
    """
    options = {name[len(prefix) :]: value for name, value in configuration.items() if name.startswith(prefix)}
    options.update(kwargs)
    return _opt_in(_from_config, options.pop("url"), options)


def _from_config(url: str | URL, **options: Any) -> Engine:
    return sqlalchemy.engine_from_config({"url": url, **options}, prefix="")


def _opt_in(create: Callable[..., Engine], url: str | URL, kwargs: dict[str, Any]) -> OptInEngine:
    if kwargs.pop("server_side_cursors", False):
        raise exc.ArgumentError(
            "server_side_cursors=True makes every read a cursor that needs a transaction. Leave it out, and stream "
            "the statements that need it: execution_options(stream_results=True)."
        )
    options, execution_options = split_options(kwargs.pop("execution_options", None) or {})
    level, _ = split_options({"isolation_level": kwargs.pop("isolation_level", None)})
    options = level.over(options)
    kwargs.setdefault("pool_reset_on_return", None)  # _reset() does it, and knows when there is nothing to do
    engine = create(url, execution_options=execution_options, **kwargs)
    switch = switch_for(engine.dialect)
    options.check(engine.dialect)

    @event.listens_for(engine, "connect", insert=True)  # before SQLAlchemy's own, which read from the database
    def _rest(connection: Any, record: Any) -> None:
        switch.rest(connection)

    @event.listens_for(engine, "reset")
    def _reset(connection: Any, record: Any, state: PoolResetState) -> None:
        if state.terminate_only:
            return
        if isinstance(engine.pool, StaticPool):
            # The one connection of all: it may come back from one while another is in a transaction on it.
            taken_by = record.info.get(TAKEN_BY)
            other = taken_by and taken_by()
            if other is not None and other.in_transaction():
                return
        if record.info.pop(HELD_CURSORS, False):
            connection.cursor().execute("CLOSE ALL")  # of a stream that nobody closed
        switch.reset(connection, record.info)

    # create_engine() has no parameter for the class, and what it has wired up (the dialect's first connect, plugins,
    # the events above) belongs to this very object.
    engine.__class__ = OptInEngine
    assert isinstance(engine, OptInEngine)
    engine.switch = switch
    engine.transaction_options = options
    return engine
