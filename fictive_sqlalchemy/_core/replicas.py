"""Read replicas: where a session's reads outside a transaction go.

A session that has been to the primary stays there, so that it reads what it has written; one that
has read from a replica keeps to it, so that it does not go back in time. The connections that a
session has on loan tell where it has been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, cast

from sqlalchemy import GenerativeSelect, TextClause, event, exc
from sqlalchemy.engine import URL, Connection, ExceptionContext, make_url
from sqlalchemy.orm import FromStatement
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.sql import visitors
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ForUpdateArg

from .connection import OptInConnection
from .describe import listed
from .engine import OptInEngine
from .errors import READ_ONLY, begins_to_write, reported, sqlstate
from .health import Health
from .hosts import check_hosts, one_url_per_host
from .loans import Loans
from .sql import evidently_reads, is_reading_function
from .standby import is_standby

#: What ``create_engine(replicas=…)`` takes.
ReplicaOptions: TypeAlias = "str | Iterable[str | URL | Mapping[str, Any]]"

# In the ``info`` of a pool's entry: how many promotions of the server were known at its first use.
_PROMOTIONS = "fictive_sqlalchemy.promotions"

# Options of the primary with which a replica's engine would connect to the primary.
_CONNECTS = ("creator", "pool", "async_creator")

# Parameters of libpq that say where to connect to.
_ADDRESSES = {"host", "hostaddr", "port", "service", "target_session_attrs"}


def options_of_replicas(
    replicas: ReplicaOptions, options: Mapping[str, Any]
) -> list[tuple[str | URL, dict[str, Any]]]:
    """Return the URL and the engine's options of each replica.

    Each host of a URL with several hosts is a replica of its own.

    :param replicas: URLs, in one string or each by itself, or dictionaries of a ``url`` and of
        options that are not the primary's.
    :param options: The primary's.
    :raises sqlalchemy.exc.ArgumentError: if one has no URL, or would connect to the primary.
    """
    if isinstance(replicas, (URL, Mapping)):
        replicas = [cast("URL | Mapping[str, Any]", replicas)]
    elif isinstance(replicas, str):
        replicas = replicas.split()
    result: list[tuple[str | URL, dict[str, Any]]] = []
    for number, replica in enumerate(replicas, 1):
        own = dict(replica) if isinstance(replica, Mapping) else {"url": replica}
        url = _url(own.pop("url", None), f"replica {number}", own)
        inherited: dict[str, Any] = dict(options.get("connect_args") or {})
        addresses = sorted(_ADDRESSES & set(inherited))
        if addresses and "connect_args" not in own:
            raise exc.ArgumentError(
                f"With {listed(addresses)} in connect_args the replicas would connect to the same "
                "server as the primary: put the address into the URL, or give each replica "
                "connect_args of its own."
            )
        for name in _CONNECTS:
            if options.get(name) is not None and name not in own:
                raise exc.ArgumentError(
                    f"With {name}=… the replicas would connect to the primary: give each one of "
                    f"its own, as in replicas=[{{'url': …, {name!r}: …}}]."
                )
        for one in one_url_per_host(url, f"replica {number}"):
            result.append((one, {**options, **own}))
    return result


def _url(given: object, which: str, options: Mapping[str, Any]) -> URL:
    """Return the URL of a replica. No error shows a value, which may have a password in it."""
    if given is None:
        has = f"has {listed(options)}" if options else "is empty"
        raise exc.ArgumentError(f"A replica needs a URL: {{'url': …}}, but {which} {has}.")
    if not isinstance(given, (str, URL)):
        raise exc.ArgumentError(
            f"The URL of {which} is a {type(given).__name__}: give each replica as a URL, or as a "
            "dictionary, {'url': …}."
        )
    try:
        url = make_url(given)
    except (exc.ArgumentError, ValueError):
        url = None  # and not raised from here: SQLAlchemy's error may show parts of it
    if url is None:
        raise exc.ArgumentError(
            f"Could not parse the URL of {which}. One string with several URLs is split at spaces: "
            "percent-encode those, and other special characters, in a password."
        )
    check_hosts(url, f"The URL of {which}")
    return url


def attach(primary: OptInEngine, replicas: Iterable[OptInEngine]) -> None:
    """Make engines the replicas of another.

    :raises sqlalchemy.exc.ArgumentError: if one is of another database system.
    """
    primary.replicas = tuple(replicas)
    for replica in primary.replicas:
        if replica.dialect.name != primary.dialect.name:
            raise exc.ArgumentError(
                f"A database of {replica.dialect.name} can't be a replica of one of "
                f"{primary.dialect.name}, which is another database system."
            )
        replica.primary = primary
        health = replica.health = Health()

        @event.listens_for(replica, "handle_error")
        def note(context: ExceptionContext, health: Health = health) -> Exception | None:
            connection = context.connection
            if context.is_disconnect or connection is None:
                health.note(up=False)
            elif (
                sqlstate(context.original_exception) == READ_ONLY
                and not connection.in_transaction()  # begun by the user, on the replica itself
            ):
                return _went_to_a_replica(connection, context.original_exception)
            return None


def _went_to_a_replica(connection: Connection, error: BaseException) -> exc.InvalidRequestError:
    engine: Any = connection.engine
    advice = "Put it into `with session.begin():`, or call read_from_primary() before"
    if reported(connection, "default_transaction_read_only") == "on":
        # Then the primary refuses it, too, unless it is in a transaction that says READ WRITE.
        writes = begins_to_write(engine.primary.transaction_options)
        advice = f"Put it into `with session.begin({'' if writes else 'read_only=False'}):`"
    return exc.InvalidRequestError(
        "This statement writes, and it went to a replica, which refused it "
        f"({str(error).strip()}). {advice}."
    )


def source_of(primary: OptInEngine, statement: Any, loans: Collection[OptInEngine]) -> OptInEngine:
    """Return the engine that a statement outside a transaction goes to. Sends nothing.

    :param primary: An engine with replicas.
    :param statement: What ``get_bind()`` got as ``clause``.
    :param loans: The engines the session has been to.
    """
    # If the pool is isolated for a test, no replica will ever see what is done in it.
    is_isolated = hasattr(primary.pool, "isolation")
    if is_isolated or _has_been_to(primary, loans) or not _only_reads(statement):
        return primary
    for replica in primary.replicas:
        if _has_been_to(replica, loans):
            return replica if replica.health.is_up else primary
    for replica in random.sample(primary.replicas, len(primary.replicas)):
        if replica.health.may_be_tried():
            return replica
    return primary


def _only_reads(statement: Any) -> bool:
    if isinstance(statement, FromStatement):
        statement = cast(Any, statement).element
    return isinstance(statement, GenerativeSelect) and not any(
        getattr(part, "is_dml", False) for part in visitors.iterate(statement)
    )


def may_write(statement: Any, engine: OptInEngine) -> bool:
    """Tell whether a SELECT locks, or calls a function that may write. Sends nothing.

    :param statement: What ``get_bind()`` got as ``clause``.
    :param engine: The engine whose SQL it would be.
    """
    if isinstance(statement, FromStatement):
        statement = cast(Any, statement).element
    if not isinstance(statement, GenerativeSelect):
        return False
    calls = False
    for part in visitors.iterate(statement):
        if isinstance(part, ForUpdateArg):
            return True
        # To compile the statement takes long, and most statements call no other function.
        calls = calls or isinstance(part, TextClause)
        if isinstance(part, FunctionElement):
            name: str = getattr(cast(Any, part), "name", "")  # one of the user's own may have none
            calls = calls or not is_reading_function(name)
    return calls and not evidently_reads(str(statement.compile(dialect=engine.dialect)))


def _has_been_to(engine: OptInEngine, loans: Iterable[OptInEngine]) -> bool:
    """Tell whether a session has been to an engine, or to a copy of it, which has the same pool."""
    return any(one.pool is engine.pool for one in loans)


def borrow_to_read(
    replica: OptInEngine, borrow: Callable[[OptInEngine], OptInConnection], loans: Loans
) -> OptInConnection:
    """Return a connection to a replica; to another, or to the primary, if it can't be reached.

    :param replica: The replica.
    :param borrow: Returns the session's connection to an engine.
    :param loans: The session's connections. If it has been to this replica, it goes to the primary,
        and not to another replica, which may be behind.
    """
    primary = replica.primary
    assert primary is not None
    has_been_there = _has_been_to(replica, loans)
    others = [] if has_been_there else [one for one in primary.replicas if one is not replica]
    for one in (replica, *others):
        if one is not replica and not one.health.may_be_tried():
            continue
        try:
            connection = borrow(one)
            held = connection.live_connection()
            while not (has_been_there or _knows_of_promotions(held, one.health)):
                connection.invalidate()
                held = connection.live_connection()
        except (exc.DBAPIError, one.dialect.loaded_dbapi.Error):
            one.health.note(up=False)
        else:
            is_promoted = one.health.is_promoted(is_standby=is_standby(held.driver_connection))
            if not is_promoted:
                one.health.note(up=True)
            if has_been_there or not is_promoted:
                return connection
        if not has_been_there:
            loans.hand_back(one)  # else the session would seem to have been there
    return borrow(primary)


def _knows_of_promotions(held: PoolProxiedConnection, health: Health) -> bool:
    """Tell whether a connection was first used after the last promotion of its server.

    The server tells a connection that it is no standby any more with the next answer on it.
    """
    known: int = held.info.setdefault(_PROMOTIONS, health.promotions)
    return known == health.promotions
