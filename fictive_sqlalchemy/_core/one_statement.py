"""Which transactions are one statement, so that they need neither BEGIN nor COMMIT.

PostgreSQL runs a statement outside a transaction as a transaction of its own. So where the last
flush of a transaction sends the only statement of that, one INSERT or UPDATE, the statement alone
stores the same in one round trip instead of three. :func:`is_one_statement` is the one predicate,
for blocks, ``commit()``, ``flush()`` outside and all that is built on them. It sends nothing. Where
anything is in doubt, BEGIN and COMMIT are sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sized
from typing import Any

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Mapper, RelationshipDirection, RelationshipProperty
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from .autocommit import PSYCOPG, STARTED_WITH
from .options import DEFAULT
from .sqlalchemy_private import has_listeners, is_orphan

_SESSION_EVENTS = (
    "before_commit",
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "after_begin",
    "pending_to_persistent",
)
_MAPPER_EVENTS = ("before_insert", "after_insert", "before_update", "after_update")
_CLASS_EVENTS = ("refresh_flush",)
_CONNECTION_EVENTS = ("begin", "commit", "rollback", "before_execute", "before_cursor_execute")
_DIALECT_EVENTS = ("do_execute",)

# In autocommit, without a level and flags.
_NO_FLAGS = (True, None, None, None)

_OURS = __name__.partition(".")[0] + "."

_HAS_ONE_TABLE = "fictive_sqlalchemy: has one table"


def is_one_statement(session: Any, connection: Any, only: Collection[object] | None) -> bool:
    """Tell whether a flush sends one INSERT or UPDATE, and nobody can tell that from a transaction.

    The caller knows that the flush is the last one of its transaction, that no bind has joined the
    transaction, and that no savepoint is open. BEGIN and COMMIT are sent, besides, where:

    ======================================================  ========================================
    what                                                    how it is seen
    ======================================================  ========================================
    more than one object is new or changed, or one is       the session's collections. An object
    deleted                                                 with a changed collection alone, to
                                                            which the one object was added or from
                                                            which it was taken, sends nothing
    an object has several tables; its key is not that of    ``mapper.tables``,
    the table, or has changed                               ``mapper.primary_key``,
                                                            ``committed_state``
    a relationship has changed, unless it is many-to-one    ``committed_state``, the direction, the
    and leads to a stored object; the object is an orphan   cascade
    the flush reads what the server has made: after         ``eager_defaults``, the version's
    an UPDATE, as a version, before an INSERT               generator, ``Table.implicit_returning``
    somebody listens to the begin or the end of the         ``dispatch``, listeners of this package
    transaction, to the flush, to what happens to the       apart
    object in it, or before the statement
    the transaction has a level or flags; the engine gives  ``transaction_options``, and what the
    it some (``read_only_outside`` does), or the driver     driver's connection started with
    somebody has begun a transaction on the connection,     ``get_transaction()``
    to roll it back after a test
    two phases; shards; an overridden ``flush()``           the session
    the pool gives one connection to all sessions           StaticPool, SingletonThreadPool
    the driver is not psycopg2 or psycopg 3                 ``dialect.driver``
    ======================================================  ========================================

    A default of a column that sends SQL is seen when it does: the transaction begins before it, see
    ``OptInConnection``. In ``retry_transaction()`` the flush is not the last of the transaction:
    it comes before, to know how many binds there are to commit.

    :param session: The session.
    :param connection: Its connection to the one bind of the flush.
    :param only: The objects that are flushed; all of the session if it is ``None``.
    """
    return (
        connection.dialect.driver in PSYCOPG
        and connection.get_transaction() is None
        and connection.transaction_options is DEFAULT
        and connection.taken.info[STARTED_WITH] == _NO_FLAGS
        and not session.twophase
        and session.connection_callable is None
        and _is_ours(session.flush)
        and not isinstance(connection.engine.pool, (StaticPool, SingletonThreadPool))
        and (sent := _sent(session, only)) is not None
        and not _is_listened_to(session, connection, sent)
    )


def _sent(session: Any, only: Collection[object] | None) -> list[Any] | None:
    """Return the states that a flush looks at, if it sends one statement for all of them."""
    if session.deleted:
        return None
    new, changed = list(session.new), list(session.dirty)
    if only is not None:
        new = [instance for instance in new if any(instance is one for one in only)]
        changed = [instance for instance in changed if any(instance is one for one in only)]
    if len(new) > 1:
        return None
    states: list[Any] = [inspect(instance) for instance in changed]
    writing = [state for state in states if not _has_changed_collections_alone(state)]
    if new:
        writing.append(inspect(new[0]))
    if len(writing) != 1:
        return None
    [state] = writing
    if not _fits(state) or not all(
        _sends_nothing(session, one, state) for one in states if one is not state
    ):
        return None
    return [*states, state] if new else states


def _fits(state: Any) -> bool:
    """Tell whether a flush sends one statement for an object, and what comes back is all it needs.

    :param state: The state of an object that is new or changed.
    """
    mapper: Mapper[Any] = state.mapper
    if not _has_one_table(state) or is_orphan(state):
        return False
    columns, relationships = mapper.column_attrs, mapper.relationships
    for name in state.committed_state:
        if name in relationships:
            if not _leads_to_stored(state, relationships[name]):
                return False
        elif name not in columns or (state.persistent and _is_of_key(mapper, name)):
            return False
    if state.persistent:
        return True
    # What was in the dictionary before the object was made new is in no history.
    return not any(
        relationship.key in state.dict and not _leads_to_stored(state, relationship)
        for relationship in relationships
    )


def _has_one_table(state: Any) -> bool:
    """Tell whether an INSERT or UPDATE of one table stores an object, and brings back all.

    :param state: The state of the object.
    """
    known: dict[Any, Any] = state.manager.info
    if _HAS_ONE_TABLE not in known:
        mapper: Mapper[Any] = state.mapper
        table = mapper.persist_selectable
        known[_HAS_ONE_TABLE] = (
            isinstance(table, Table)
            and len(mapper.tables) == 1
            and tuple(mapper.primary_key) == tuple(table.primary_key)
            and table.implicit_returning
            and mapper.eager_defaults is not True
            and (mapper.version_id_col is None or mapper.version_id_generator is not False)
        )
    return bool(known[_HAS_ONE_TABLE])


def _is_of_key(mapper: Mapper[Any], name: str) -> bool:
    return any(column.primary_key for column in mapper.column_attrs[name].columns)


def _leads_to_stored(state: Any, relationship: RelationshipProperty[Any]) -> bool:
    """Tell whether a relationship is many-to-one, and leads to nothing or to a stored object."""
    if relationship.viewonly:
        return True
    value = state.dict.get(relationship.key)
    if relationship.direction is not RelationshipDirection.MANYTOONE:
        is_empty = value is None or (isinstance(value, Sized) and len(value) == 0)
        return is_empty and not state.persistent
    if relationship.cascade.delete_orphan or relationship.post_update:
        return False
    if value is None:
        return True
    other: Any = inspect(value)
    return bool(other.persistent and other.session is state.session)


def _has_changed_collections_alone(state: Any) -> bool:
    relationships = state.mapper.relationships
    return bool(state.committed_state) and all(
        name in relationships
        and relationships[name].direction is RelationshipDirection.ONETOMANY
        and relationships[name].uselist  # of one object, the flush asks which it was before
        and not relationships[name].viewonly
        and not relationships[name].post_update
        for name in state.committed_state
    )


def _sends_nothing(session: Any, state: Any, target: Any) -> bool:
    """Tell whether a flush sends nothing for an object that has changed collections alone.

    :param session: The session.
    :param state: The state of the object.
    :param target: The state of the one object for which something is sent.
    """
    if not _has_one_table(state) or is_orphan(state):
        return False
    for name in state.committed_state:
        history = state.attrs[name].history
        members = [*history.added, *history.deleted]
        if any(member is not None and inspect(member) is not target for member in members):
            return False
        if history.deleted and state.mapper.relationships[name].cascade.delete_orphan:
            return False
    return True


def _is_listened_to(session: Any, connection: Any, states: list[Any]) -> bool:
    engine = connection.engine
    return (
        _listens(session, _SESSION_EVENTS)
        or (has_listeners(connection) and _listens(connection, _CONNECTION_EVENTS))
        or (has_listeners(engine) and _listens(engine, _CONNECTION_EVENTS))
        or (has_listeners(engine.dialect) and _listens(engine.dialect, _DIALECT_EVENTS))
        or any(
            _listens(state.mapper, _MAPPER_EVENTS) or _listens(state.manager, _CLASS_EVENTS)
            for state in states
        )
    )


def _listens(target: Any, names: Iterable[str]) -> bool:
    """Tell whether somebody other than this package listens to one of these events."""
    dispatch = target.dispatch
    for name in names:
        for listener in getattr(dispatch, name):
            if not _is_ours(listener):
                return True
    return False


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_OURS)
