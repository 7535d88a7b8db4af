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

from .autocommit import PSYCOPG
from .options import DEFAULT
from .sqlalchemy_private import has_listeners, is_orphan, orphan_rules

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

_OURS = __name__.partition(".")[0] + "."

_SHAPE = "fictive_sqlalchemy: shape"


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
    it some (``read_only_outside`` does), or a listener     driver's connections started with
    to the driver's connect
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
    engine = connection.engine
    if (
        engine.dialect.driver not in PSYCOPG
        or connection.get_transaction() is not None
        or connection.transaction_options is not DEFAULT
        or engine.switch.has_met_flags
        or session.twophase
        or session.connection_callable is not None
        or not _is_ours(session.flush)
        or isinstance(engine.pool, (StaticPool, SingletonThreadPool))
    ):
        return False
    states = _flushed(session, only) or ()
    return bool(states) and not (
        _listens(session, _SESSION_EVENTS)
        or (has_listeners(connection) and _hears(connection, _CONNECTION_EVENTS))
        or (has_listeners(engine) and _hears(engine, _CONNECTION_EVENTS))
        or (has_listeners(engine.dialect) and _hears(engine.dialect, _DIALECT_EVENTS))
        or any(
            _listens(state.mapper, _MAPPER_EVENTS) or _listens(state.manager, _CLASS_EVENTS)
            for state in states
        )
    )


class _Shape:
    """What is known of a class: how its objects are stored."""

    __slots__ = ("has_one_table", "plain", "rules")

    def __init__(self, mapper: Mapper[Any]) -> None:
        table = mapper.persist_selectable
        self.has_one_table = (
            isinstance(table, Table)
            and len(mapper.tables) == 1
            and tuple(mapper.primary_key) == tuple(table.primary_key)
            and table.implicit_returning
            and mapper.eager_defaults is not True
            and (mapper.version_id_col is None or mapper.version_id_generator is not False)
        )
        """Whether an INSERT or UPDATE of one table stores an object, and brings back all."""
        self.plain = frozenset(
            attribute.key
            for attribute in mapper.column_attrs
            if not any(column.primary_key for column in attribute.columns)
        )
        """The attributes for columns that are no part of the key."""
        self.rules = orphan_rules(mapper)


def _shape(state: Any) -> _Shape:
    known: dict[Any, Any] = state.manager.info
    if _SHAPE not in known:
        known[_SHAPE] = _Shape(state.mapper)
    shape: _Shape = known[_SHAPE]
    return shape


def _flushed(session: Any, only: Collection[object] | None) -> list[Any] | None:
    """Return the states that a flush looks at, if it sends one statement for all of them."""
    if session.deleted_states:
        return None
    new, changed = list(session.new_states), list(session.changed_states)
    if only is not None:
        known = {inspect(instance) for instance in only}
        new = [state for state in new if state in known]
        changed = [state for state in changed if state in known]
    if len(new) > 1:
        return None
    if not new and len(changed) == 1:
        return changed if _fits(changed[0]) else None
    writing = new + [state for state in changed if not _has_changed_collections_alone(state)]
    if len(writing) != 1 or not _fits(writing[0]):
        return None
    if not all(_sends_nothing(one, writing[0]) for one in changed if one is not writing[0]):
        return None
    return new + changed


def _fits(state: Any) -> bool:
    """Tell whether a flush sends one statement for an object, and what comes back is all it needs.

    :param state: The state of an object that is new or changed.
    """
    shape = _shape(state)
    if not shape.has_one_table or (any(shape.rules) and is_orphan(state)):
        return False
    is_new = state.key is None
    for name in state.committed_state:
        if name in shape.plain:
            continue
        relationship = state.mapper.relationships.get(name)
        if relationship is not None:
            if not _leads_to_stored(state, relationship):
                return False
        elif not is_new or name not in state.mapper.column_attrs:
            return False
    # What was in the dictionary before the object was made new is in no history.
    return not is_new or all(
        _leads_to_stored(state, relationship)
        for relationship in state.mapper.relationships
        if relationship.key in state.dict
    )


def _leads_to_stored(state: Any, relationship: RelationshipProperty[Any]) -> bool:
    """Tell whether a relationship is many-to-one, and leads to nothing or to a stored object."""
    if relationship.viewonly:
        return True
    value = state.dict.get(relationship.key)
    if relationship.direction is not RelationshipDirection.MANYTOONE:
        is_empty = value is None or (isinstance(value, Sized) and len(value) == 0)
        return is_empty and state.key is None
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


def _sends_nothing(state: Any, target: Any) -> bool:
    """Tell whether a flush sends nothing for an object that has changed collections alone.

    :param state: The state of the object.
    :param target: The state of the one object for which something is sent.
    """
    shape = _shape(state)
    if not shape.has_one_table or (any(shape.rules) and is_orphan(state)):
        return False
    for name in state.committed_state:
        history = state.attrs[name].history
        members = [*history.added, *history.deleted]
        if any(member is not None and inspect(member) is not target for member in members):
            return False
        if history.deleted and state.mapper.relationships[name].cascade.delete_orphan:
            return False
    return True


def _listens(target: Any, names: Iterable[str]) -> bool:
    """Tell whether somebody other than this package listens to an event of a session or a class.

    As :func:`_hears`, and without a call for each event that nobody listens to.
    """
    dispatch = target.dispatch
    for name in names:
        listeners = getattr(dispatch, name)
        heard = listeners.parent_listeners or listeners.listeners
        if heard and not all(map(_is_ours, listeners)):
            return True
    return False


def _hears(target: Any, names: Iterable[str]) -> bool:
    """Tell whether somebody other than this package listens to an event."""
    dispatch = target.dispatch
    return not all(_is_ours(listener) for name in names for listener in getattr(dispatch, name))


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_OURS)
