"""``create_engine()``: creates an engine, and connects its parts and listeners."""

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
from .errors import see
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
    """Create an engine whose connections are in autocommit outside transactions. Sends nothing.

    :param url: The database, as ``sqlalchemy.create_engine()`` takes it. For ``postgresql://``,
        SQLAlchemy chooses psycopg2 or psycopg as the driver. If the chosen driver is not installed,
        the other one is used.
    :param kwargs: The options of ``sqlalchemy.create_engine()``. ``isolation_level`` is the level
        of the transactions; a statement outside a transaction has the server's default. These
        options are added: ``read_only_outside=True`` makes the server refuse writes outside a
        transaction. ``replicas`` is a list of the URLs of read replicas, to which sessions send
        their reads outside a transaction. An item of the list may be a dictionary of a ``url`` and
        of options that differ from the primary's. ``begin_on_write=True`` is for code that was
        written for SQLAlchemy's connections: on a connection of :meth:`.OptInEngine.connect`, the
        first statement that writes or locks begins the transaction that ``commit()`` ends. Sessions
        have an option of the same name.
    :raises sqlalchemy.exc.ArgumentError: if the database does not know the isolation level, if
        an option contradicts autocommit, if the dialect does not offer AUTOCOMMIT, if libpq would
        not understand the hosts of a URL, if ``read_only_outside`` is given for a database other
        than PostgreSQL, or if a replica has no URL, is of another database system, or has options
        that lead to the primary.
    :raises ModuleNotFoundError: if the driver is not installed.
    """
    return _opt_in(sqlalchemy.create_engine, url, kwargs)


def engine_from_config(
    configuration: Mapping[str, Any], prefix: str = "sqlalchemy.", **kwargs: Any
) -> OptInEngine:
    """Create an engine as :func:`create_engine` does, from options that may be strings.

    :param configuration: The options and the ``url``, as ``sqlalchemy.engine_from_config()``
        takes them.
    :param prefix: The prefix of the options' names in ``configuration``.
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
            + see("server-side-cursors")
        )
    begins_on_write = asbool(kwargs.pop("begin_on_write", False))
    read_only_outside = asbool(kwargs.pop("read_only_outside", False))
    by_option, execution_options = split_options(kwargs.pop("execution_options", None) or {})
    by_keyword, _ = split_options({"isolation_level": kwargs.pop("isolation_level", None)})
    options = by_keyword.over(by_option)
    if read_only_outside and not is_replica:  # a replica refuses READ WRITE
        options = options.over(TransactionOptions(read_only=False))
    # The function reset() below knows when the connection needs no reset.
    if "pool" not in kwargs:
        kwargs.setdefault("pool_reset_on_return", None)
    if "module" not in kwargs:
        url = with_installed_driver(url)
        if not is_replica:  # the URL of a replica is checked already
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

    # This listener comes first, because SQLAlchemy's own listeners read from the database.
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
            return  # the connection was detached from the pool, and is closed
        if USE in record.info:
            given_back(connection, record, state)
        if state.terminate_only:
            return
        if isinstance(engine.pool, StaticPool):
            # All users share one connection: one of them may give it back while another one is in a
            # transaction on it.
            used_by = record.info.get(USED_BY)
            owner = used_by and used_by()
            if owner is not None and owner.in_transaction():
                return
        if record.info.pop(HELD_CURSORS, False):
            connection.cursor().execute("CLOSE ALL")  # a stream was not closed
        if STARTED_WITH in record.info:
            switch.reset(connection, record.info[STARTED_WITH])
        else:  # the connection was taken from the pool without the engine
            switch.reset(connection)
        # If all users share one connection, they share what is set on it, too. (This is not done in
        # a listener to "checkin": there, an exception from a signal handler would make the pool
        # count the connection as in use for ever.)
        if record.info.pop(LEFT_BEHIND, False) and not isinstance(
            engine.pool, (StaticPool, SingletonThreadPool)
        ):
            record.invalidate()

    # SQLAlchemy has no parameter for the class. The class of this object is changed, because
    # SQLAlchemy and its plugins have registered their listeners for this object.
    engine.__class__ = OptInEngine
    assert isinstance(engine, OptInEngine)
    engine.switch = switch
    engine.transaction_options = options
    engine.begins_on_write = begins_on_write
    leave_to_parent(engine)
    attach(engine, [_opt_in(create, *replica, is_replica=True) for replica in replicas])
    return engine
