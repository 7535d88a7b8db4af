"""Read replicas: where a session's reads outside a transaction go.

A session that has used the primary goes on using the primary, so that the session reads what it has
written. A session that has read from a replica keeps to this replica, so that later reads see no
older state. The connections that a session has on loan tell which servers the session has used.
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
from .errors import READ_ONLY, begins_to_write, reported, see, sqlstate
from .health import Health
from .hosts import check_hosts, one_url_per_host
from .loans import Loans
from .sql import evidently_reads, is_reading_function
from .standby import is_standby

#: What ``create_engine(replicas=…)`` takes.
ReplicaOptions: TypeAlias = "str | Iterable[str | URL | Mapping[str, Any]]"

# Key in the ``info`` of a pool's entry: how many promotions of the server were known at the first
# use of the connection.
_PROMOTIONS = "fictive_sqlalchemy.promotions"

# If a replica's engine had one of these options of the primary, it would connect to the primary.
_CONNECTS = ("creator", "pool", "async_creator")

# Parameters of libpq that tell which server to connect to.
_ADDRESSES = {"host", "hostaddr", "port", "service", "target_session_attrs"}


def options_of_replicas(
    replicas: ReplicaOptions, options: Mapping[str, Any]
) -> list[tuple[str | URL, dict[str, Any]]]:
    """Return the URL and the engine options of each replica.

    Each host of a URL with several hosts is a replica of its own.

    :param replicas: URLs, all in one string or one by one; or dictionaries of a ``url`` and of
        options that differ from the primary's.
    :param options: The options of the primary.
    :raises sqlalchemy.exc.ArgumentError: if a replica has no URL, or would connect to the primary.
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
                "connect_args of its own." + see("replica-options")
            )
        for name in _CONNECTS:
            if options.get(name) is not None and name not in own:
                raise exc.ArgumentError(
                    f"With {name}=… the replicas would connect to the primary: give each replica "
                    f"its own {name}, as in replicas=[{{'url': …, {name!r}: …}}]."
                    + see("replica-options")
                )
        for one in one_url_per_host(url, f"replica {number}"):
            result.append((one, {**options, **own}))
    return result


def _url(given: object, which: str, options: Mapping[str, Any]) -> URL:
    """Return the URL of a replica. The errors show no values, which may contain a password."""
    if given is None:
        has = f"has {listed(options)}" if options else "is empty"
        raise exc.ArgumentError(
            f"A replica needs a URL: {{'url': …}}, but {which} {has}." + see("replica-urls")
        )
    if not isinstance(given, (str, URL)):
        raise exc.ArgumentError(
            f"The URL of {which} is of the type {type(given).__name__}: give each replica as a "
            "URL, or as a dictionary, {'url': …}." + see("replica-urls")
        )
    try:
        url = make_url(given)
    except (exc.ArgumentError, ValueError):
        url = None  # the error below has no cause: SQLAlchemy's error may show parts of the URL
    if url is None:
        raise exc.ArgumentError(
            f"Could not parse the URL of {which}. One string with several URLs is split at spaces: "
            "percent-encode spaces, and other special characters, in a password."
            + see("replica-urls")
        )
    check_hosts(url, f"The URL of {which}")
    return url


def attach(primary: OptInEngine, replicas: Iterable[OptInEngine]) -> None:
    """Make engines the replicas of another engine.

    :raises sqlalchemy.exc.ArgumentError: if a replica is of another database system.
    """
    primary.replicas = tuple(replicas)
    for replica in primary.replicas:
        if replica.dialect.name != primary.dialect.name:
            raise exc.ArgumentError(
                f"A database of {replica.dialect.name} can't be a replica of one of "
                f"{primary.dialect.name}, which is another database system." + see("replica-urls")
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
                and not connection.in_transaction()  # one that the user has begun on the replica
            ):
                return _went_to_a_replica(connection, context.original_exception)
            return None


def _went_to_a_replica(connection: Connection, error: BaseException) -> exc.InvalidRequestError:
    engine: Any = connection.engine
    advice = "Put the statement into `with session.begin():`, or call read_from_primary() first"
    if reported(connection, "default_transaction_read_only") == "on":
        # Then the primary also refuses the write, unless its transaction begins READ WRITE.
        writes = begins_to_write(engine.primary.transaction_options)
        options = "" if writes else "read_only=False"
        advice = f"Put the statement into `with session.begin({options}):`"
    return exc.InvalidRequestError(
        "This statement writes, but it was sent to a replica, and the replica refused it "
        f"({str(error).strip()}). {advice}." + see("write-on-replica")
    )


def source_of(primary: OptInEngine, statement: Any, loans: Collection[OptInEngine]) -> OptInEngine:
    """Return the engine that a statement outside a transaction is sent to. Sends nothing.

    :param primary: An engine with replicas.
    :param statement: The argument ``clause`` of ``get_bind()``.
    :param loans: The engines that the session has used.
    """
    # If the pool is isolated for a test, no replica ever sees the writes of the test.
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

    :param statement: The argument ``clause`` of ``get_bind()``.
    :param engine: The engine for which the statement is compiled.
    """
    if isinstance(statement, FromStatement):
        statement = cast(Any, statement).element
    if not isinstance(statement, GenerativeSelect):
        return False
    calls = False
    for part in visitors.iterate(statement):
        if isinstance(part, ForUpdateArg):
            return True
        # Compiling the statement takes long, and most statements call no function that may write.
        calls = calls or isinstance(part, TextClause)
        if isinstance(part, FunctionElement):
            name: str = getattr(cast(Any, part), "name", "")  # a class of the user may have none
            calls = calls or not is_reading_function(name)
    return calls and not evidently_reads(str(statement.compile(dialect=engine.dialect)))


def _has_been_to(engine: OptInEngine, loans: Iterable[OptInEngine]) -> bool:
    """Tell whether a session has used an engine, or a copy of the engine with the same pool."""
    return any(one.pool is engine.pool for one in loans)


def borrow_to_read(
    replica: OptInEngine, borrow: Callable[[OptInEngine], OptInConnection], loans: Loans
) -> OptInConnection:
    """Return a connection to a replica, or to another server if the replica can't be reached.

    The other server is another replica, or the primary.

    :param replica: The replica.
    :param borrow: Returns the session's connection to an engine.
    :param loans: The session's connections. If the session has used this replica, the other server
        is the primary, because another replica may have an older state.
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
            loans.hand_back(one)  # otherwise the session would count as having used it
    return borrow(primary)


def _knows_of_promotions(held: PoolProxiedConnection, health: Health) -> bool:
    """Tell whether a connection was first used after the last promotion of its server.

    After a promotion, the server reports on each connection that it is no standby any more, but
    only with the next answer on that connection.
    """
    known: int = held.info.setdefault(_PROMOTIONS, health.promotions)
    return known == health.promotions
