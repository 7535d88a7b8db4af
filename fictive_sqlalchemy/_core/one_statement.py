"""Which transactions are a single INSERT or UPDATE, so that they need neither BEGIN nor COMMIT.

PostgreSQL runs a statement outside a transaction as a transaction of its own. If the last flush of
a transaction sends one INSERT or UPDATE, and nothing else is sent in the transaction, the statement
alone stores the same in one round trip instead of three. :func:`is_one_statement` decides this for
blocks, for ``commit()`` and ``flush()`` outside a transaction, and for all functions that use them.
The decision sends nothing. In case of doubt BEGIN and COMMIT are sent.
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
    "after_transaction_end",
    "pending_to_persistent",
)
_MAPPER_EVENTS = ("before_insert", "after_insert", "before_update", "after_update")
_CLASS_EVENTS = ("refresh_flush", "expire")
_CONNECTION_EVENTS = (
    *("begin", "commit", "rollback"),
    *("before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute"),
)
_DIALECT_EVENTS = ("do_execute",)

_OURS = __name__.partition(".")[0] + "."

_SHAPE = "fictive_sqlalchemy: shape"


def is_one_statement(session: Any, connection: Any, only: Collection[object] | None) -> bool:
    """Tell whether a flush sends one INSERT or UPDATE that needs neither BEGIN nor COMMIT.

    The caller has checked that the flush is the last one of its transaction, that the transaction
    was begun without options, that no bind has joined the transaction, and that no savepoint is
    open. The answer is no in these cases:

    ======================================================  ========================================
    case                                                    what tells it
    ======================================================  ========================================
    more than one object is new or changed, or one is       the session's collections. (An object
    deleted                                                 does not count if only the one stored
                                                            object was added to its collections, or
                                                            removed from them.)
    several tables, or something other than a table,        ``mapper.tables``,
    store the object                                        ``mapper.persist_selectable``
    the mapped primary key is not that of the table, or     ``mapper.primary_key``,
    it has changed                                          ``committed_state``
    a relationship has changed, unless it is many-to-one    ``committed_state``, and the
    and now leads to a stored object or to ``None``         relationship's ``direction``
    the object is an orphan                                 ``delete-orphan`` of its parents
    the object was stored before, and a relationship has    ``passive_updates``
    ``passive_updates=False``, so that the flush may
    update related rows
    the flush has to read a value besides the statement:    ``eager_defaults=True``,
    after an UPDATE, a version that the server makes, or    ``version_id_generator=False``,
    a key before an INSERT                                  ``implicit_returning=False``
    a listener that is not one of this package is           ``dispatch`` of the session, class,
    registered for one of the events in                     connection, engine and dialect
    ``_SESSION_EVENTS``, ``_MAPPER_EVENTS``,
    ``_CLASS_EVENTS``, ``_CONNECTION_EVENTS`` or
    ``_DIALECT_EVENTS``. (``after_commit`` is not among
    them: it is called as after a COMMIT.)
    the connection, its engine (as with                     ``transaction_options``, and the
    ``read_only_outside``) or a listener of the pool sets   attributes of the driver's connection
    an isolation level or flags
    a transaction is open on the connection, as in a test   ``root_transaction``
    that rolls everything back
    two-phase commit; shards; an overridden ``flush()``     the session
    the pool gives one connection to several sessions       ``StaticPool``, ``SingletonThreadPool``
    the driver is neither psycopg2 nor psycopg 3            ``dialect.driver``
    ======================================================  ========================================

    This function can't foresee SQL that the flush itself sends first, such as that of a column's
    default. If the flush sends such SQL, the transaction begins before: see
    ``OptInConnection.join_instead()``. In ``retry_transaction()`` the answer is always no, because
    ``retry_transaction()`` flushes before ``commit()``, to know how many binds will be committed.

    :param session: The session.
    :param connection: The session's connection to the bind that the flush has asked for.
    :param only: The objects that are flushed; ``None`` for all pending changes of the session.
    """
    engine = connection.engine
    if (
        engine.dialect.driver not in PSYCOPG
        or connection.root_transaction is not None
        or connection.transaction_options is not DEFAULT
        or engine.switch.has_flags(connection.taken.dbapi_connection)
        or session.twophase
        or session.connection_callable is not None
        or getattr(session.flush, "__func__", None) is not session.own_flush.__func__
        or isinstance(engine.pool, (StaticPool, SingletonThreadPool))
    ):
        return False
    states = _flushed(session, only)
    if (
        not states
        or _listens(session, _SESSION_EVENTS)
        or (has_listeners(connection) and _hears(connection, _CONNECTION_EVENTS))
        or (has_listeners(engine) and _hears(engine, _CONNECTION_EVENTS))
        or (has_listeners(engine.dialect) and _hears(engine.dialect, _DIALECT_EVENTS))
    ):
        return False
    for state in states:
        if _listens(state.manager.mapper, _MAPPER_EVENTS) or _listens(state.manager, _CLASS_EVENTS):
            return False
    return True


class _Shape:
    """How the objects of one mapped class are stored: what is known from the class alone."""

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
        """Whether one INSERT or UPDATE stores an object and returns all values that are needed."""
        self.plain = frozenset(
            attribute.key
            for attribute in mapper.column_attrs
            if not any(column.primary_key for column in attribute.columns)
        )
        """The attributes for columns that are not part of the primary key."""
        self.rules = orphan_rules(mapper)


def _shape(state: Any) -> _Shape:
    known: dict[Any, Any] = state.manager.info
    shape: _Shape | None = known.get(_SHAPE)
    if shape is None:
        shape = known[_SHAPE] = _Shape(state.mapper)
    return shape


def _flushed(session: Any, only: Collection[object] | None) -> list[Any] | None:
    """Return the states of the new and changed objects, if a flush sends one statement for them."""
    new, changed, deleted = map(list, session.pending_states)
    if deleted:
        return None
    if only is not None:
        known = {inspect(instance) for instance in only}
        new = [state for state in new if state in known]
        changed = [state for state in changed if state in known]
    if len(new) > 1:
        return None
    if len(new) + len(changed) == 1:
        return new + changed if _fits((new or changed)[0]) else None
    writing = new + [state for state in changed if not _has_changed_collections_alone(state)]
    if len(writing) != 1 or not _fits(writing[0]):
        return None
    if not all(_sends_nothing(one, writing[0]) for one in changed if one is not writing[0]):
        return None
    return new + changed


def _fits(state: Any) -> bool:
    """Tell whether a flush stores an object with one statement, and reads no other value for it.

    :param state: The state of an object that is new or changed.
    """
    shape = _shape(state)
    if not shape.has_one_table or (any(shape.rules) and is_orphan(state)):
        return False
    is_new = state.key is None
    if not is_new:
        for relationship in state.manager.mapper.relationships:
            if not relationship.passive_updates:
                return False  # the flush may also update related rows
    for name in state.committed_state:
        if name in shape.plain:
            continue
        relationship = state.mapper.relationships.get(name)
        if relationship is not None:
            if not _leads_to_stored(state, relationship):
                return False
        elif not is_new or name not in state.mapper.column_attrs:
            return False
    if is_new:
        # committed_state lacks attributes that were set before the object was made a new one.
        for relationship in state.manager.mapper.relationships:
            if relationship.key in state.dict and not _leads_to_stored(state, relationship):
                return False
    return True


def _leads_to_stored(state: Any, relationship: RelationshipProperty[Any]) -> bool:
    """Tell whether a flush sends nothing for a relationship.

    A flush sends nothing for a many-to-one relationship to ``None`` or to a stored object, for an
    empty collection of a new object, and for a relationship with ``viewonly=True``.
    """
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
        and relationships[name].uselist  # for a scalar one, the flush reads the replaced object
        and not relationships[name].viewonly
        and not relationships[name].post_update
        for name in state.committed_state
    )


def _sends_nothing(state: Any, target: Any) -> bool:
    """Tell whether a flush sends nothing for an object of which only collections have changed.

    :param state: The state of the object.
    :param target: The state of the one object that is stored. If another object was added to the
        collections or removed from them, the answer is no.
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
    """Tell whether a session or class has a listener to an event that is not one of this package.

    This does the same as :func:`_hears`, but is faster if most of the events have no listener.
    """
    dispatch = target.dispatch
    for name in names:
        listeners = getattr(dispatch, name)
        if listeners.parent_listeners or listeners.listeners:
            for listener in listeners:
                if not _is_ours(listener):
                    return True
    return False


def _hears(target: Any, names: Iterable[str]) -> bool:
    """Tell whether a target has a listener to an event that is not one of this package."""
    dispatch = target.dispatch
    return not all(_is_ours(listener) for name in names for listener in getattr(dispatch, name))


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_OURS)
