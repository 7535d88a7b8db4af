"""``create_engine()``: wires the parts of an engine and its listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import PoolResetState, SingletonThreadPool, StaticPool
from sqlalchemy.util import asbool

from .autocommit import HELD_CURSORS, LEFT_BEHIND, PSYCOPG, STARTED_WITH, USED_BY, switch_for
from .drivers import with_installed_driver
from .engine import OptInEngine
from .forks import leave_to_parent
from .hosts import check_hosts
from .options import TransactionOptions, split_options
from .prepared import prepare_anew
from .read_only import forbid_writes
from .records import USE, given_back
from .replicas import attach, options_of_replicas
from .standby import leave_standbys
from .statements import guard_statements_outside


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
        that are not the primary's. ``begin_on_write=True`` is for code that was written for
        SQLAlchemy's connections: on one of :meth:`.OptInEngine.connect` the first statement that
        writes or locks begins the transaction that ``commit()`` ends. Sessions have an option of
        the same name.
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
    begins_on_write = asbool(kwargs.pop("begin_on_write", False))
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
        if not is_replica:  # whose URL is checked already
            check_hosts(url)
    engine = create(url, execution_options=execution_options, **kwargs)
    if read_only_outside:
        forbid_writes(engine)
    switch = switch_for(engine.dialect)
    options.check(engine.dialect)
    guard_statements_outside(engine.dialect)
    if not is_replica and engine.dialect.driver in PSYCOPG:
        leave_standbys(engine.dialect)
    prepare_anew(engine.dialect)

    # First of all listeners: SQLAlchemy's own read from the database.
    @event.listens_for(engine, "connect", insert=True)
    def rest(connection: Any, record: Any) -> None:
        switch.enter_autocommit(connection)

    @event.listens_for(engine, "invalidate")
    @event.listens_for(engine, "detach")
    def leaves_pool(connection: Any, record: Any, failure: Any = None) -> None:
        if (use := record.info.pop(USE, None)) is not None:
            use.end()

    @event.listens_for(engine, "reset")
    def reset(connection: Any, record: Any, state: PoolResetState) -> None:
        if record is None:
            return  # it was detached from the pool, and is closed
        if USE in record.info:
            given_back(connection, record, state)
        if state.terminate_only:
            return
        if isinstance(engine.pool, StaticPool):
            # All share the one connection: it may come back from one while another is in a
            # transaction on it.
            used_by = record.info.get(USED_BY)
            owner = used_by and used_by()
            if owner is not None and owner.in_transaction():
                return
        if record.info.pop(HELD_CURSORS, False):
            connection.cursor().execute("CLOSE ALL")  # of a stream that nobody closed
        if STARTED_WITH in record.info:
            switch.reset(connection, record.info[STARTED_WITH])
        else:  # the pool's own connect(), past the engine
            switch.reset(connection)
        # Where all share one connection, what one has set is for all. (In a listener to "checkin",
        # an exception from a signal handler would cost the pool its place.)
        if record.info.pop(LEFT_BEHIND, False) and not isinstance(
            engine.pool, (StaticPool, SingletonThreadPool)
        ):
            record.invalidate()

    # create_engine() has no parameter for the class, and what it and its plugins have wired up
    # belongs to this very object.
    engine.__class__ = OptInEngine
    assert isinstance(engine, OptInEngine)
    engine.switch = switch
    engine.transaction_options = options
    engine.begins_on_write = begins_on_write
    leave_to_parent(engine)
    attach(engine, [_opt_in(create, *replica, is_replica=True) for replica in replicas])
    return engine
