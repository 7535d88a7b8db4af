"""Models that store themselves: ``save()``, ``update()``, ``delete()``, ``create()``, ``query``.

Each call is one atomic unit. All names are checked before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, overload

from sqlalchemy import Column, ColumnElement, exc
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    Mapper,
    Query,
    RelationshipDirection,
    RelationshipProperty,
    Session,
    SessionTransactionOrigin,
    class_mapper,
    object_session,
    scoped_session,
    sessionmaker,
)
from sqlalchemy.sql import visitors

from ._core.attributes import AttributeSnapshot, attribute_of, columns_of
from ._core.describe import listed, state_of
from ._core.errors import see

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
Q_co = TypeVar("Q_co", covariant=True)

#: How many wrong names an error lists at most, because a form may have any number of them.
_MOST_NAMED = 5


class _HasQueryClass(Protocol[Q_co]):
    """A model with a query class of its own, as the models of Flask-SQLAlchemy have."""

    @property
    def query_class(self) -> type[Q_co]: ...


class QueryProperty:
    """The descriptor that gives every model its ``query``."""

    @overload
    def __get__(self, instance: object, owner: _HasQueryClass[Q_co]) -> Q_co: ...

    @overload
    def __get__(self, instance: object, owner: type[T]) -> Query[T]: ...

    def __get__(self, instance: object, owner: Any) -> Any:
        following = owner.__mro__[owner.__mro__.index(ActiveRecordMixin) + 1 :]
        if any("query" in vars(base) for base in following):
            found: Any = super(ActiveRecordMixin, owner)
            return found.query
        return _current_session(owner).query(owner)


class ActiveRecordMixin:
    """Models with ``save()``, ``update()``, ``delete()``, ``create()`` and ``query``.

    For one model, or for all models of a base class::

        from fictive_sqlalchemy import ActiveRecordMixin

        class Tag(ActiveRecordMixin, db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

    Outside a transaction, each call is a transaction of its own, which is committed when the call
    returns: all of it is stored, or nothing. Inside a transaction, the call is part of the
    transaction. Each call flushes the session, so all pending changes are stored with it.

    Errors are raised unchanged. If the flush or the commit fails outside, all pending changes are
    rolled back, and the session is usable at once. Inside, such an error ends the transaction, as
    any error does. Code that catches the error and goes on has to put the call into
    ``with session.atomic():``, or into ``with session.begin_nested():`` on a session of SQLAlchemy.

    Each call raises ``sqlalchemy.exc.InvalidRequestError`` if the model has no current session, and
    ``sqlalchemy.exc.ArgumentError`` if ``__scoped_session__`` returns no session.

    SQLAlchemy's own session begins a transaction by itself, and so does Flask-SQLAlchemy's without
    :class:`.OptInTransactionMixin`. On such a session, *outside* means that no code has called
    ``begin()`` or ``begin_nested()``. There, each call outside ends with ``commit()``, or with
    ``rollback()`` on an error.
    """

    __scoped_session__: ClassVar[Callable[[], Session]]
    """The source of the current session: a ``scoped_session``, or any callable that returns the
    session. Models of Flask-SQLAlchemy do not need this attribute, because they use
    ``db.session``."""

    # There is no annotation, because it would contradict the one of Flask-SQLAlchemy's models.
    query = QueryProperty()
    """A query of the model in the current session. Models of Flask-SQLAlchemy keep their own
    ``query``, with its ``query_class``."""

    def save(self) -> Self:
        """Store this new or changed object, and all pending changes of the session.

        The call sends what a flush sends: the ``INSERT`` or ``UPDATE``, or nothing if nothing has
        changed. Outside, if more than one statement is sent, ``BEGIN`` and ``COMMIT`` surround
        them. If the object belongs to no session, it is added to the current session.

        :returns: This object.
        :raises sqlalchemy.exc.InvalidRequestError: if the object belongs to a session other than
            the current one, or was deleted. Nothing is sent.
        :raises sqlalchemy.exc.DBAPIError: if the database reports an error.
        """
        session = _session_for(self)
        session.add(self)
        _store(session)
        return self

    def update(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        only: Collection[str] | None = None,
        **names: Any,
    ) -> Self:
        """Change attributes of this object and store it, as :meth:`save` does.

        All names are checked before anything is changed. Without ``only``, these are refused:
        primary keys, foreign keys, relationships, hybrid properties, names with a leading
        underscore, and columns that SQLAlchemy or the database maintains (the discriminator, the
        version, identity columns). If an attribute refuses its value, the attributes that were
        changed before it get their old values back.

        :param values: The new values by the names of attributes, such as ``request.form``. If a
            name has several values, the first one is used. Values are not converted.
        :param only: The names that may be changed, including names that are refused without
            ``only``. All other names are refused. Keywords are also checked as without ``only``, so
            that ``**form`` can't bring an ``only`` of its own.
        :param names: More values.
        :returns: This object.
        :raises sqlalchemy.exc.ArgumentError: if ``values`` is no mapping, if ``only`` is no
            collection of names or is given without a mapping, if a name is given twice, or if
            nothing is given at all. Nothing is changed.
        :raises sqlalchemy.exc.InvalidRequestError: if a name is no mapped attribute or may not be
            changed, or if the object is not stored or belongs to a session other than the current
            one. Nothing is changed, and nothing is sent.
        :raises sqlalchemy.exc.DBAPIError: if the database reports an error.
        """
        call = f"{type(self).__name__}.update()"
        session = _session_for(self)
        _check_is_stored(self, session, call)
        if only is not None and values is None:
            raise exc.ArgumentError(
                f"{call} got only= without a mapping. only= allows names of a mapping: give it the "
                "form as it is: update(form, only=…), not **form. An attribute that is called "
                "'only' goes into the mapping. Nothing was changed." + see("changed-names")
            )
        mapper = class_mapper(type(self))
        given = _checked_mapping(call, values, names)
        _check_names(call, mapper, given, only)
        _check_keywords(call, mapper, names, only)
        changes = {**given, **names}
        if values is None and not names:
            raise exc.ArgumentError(
                f"{call} got nothing to change. Give it keywords or a mapping; save() stores what "
                "was changed before." + see("changed-names")
            )
        before = AttributeSnapshot(self, changes)
        try:
            with session.no_autoflush:  # an autoflush must not send half of the changes
                for name, value in changes.items():
                    setattr(self, name, value)
        except BaseException as error:
            before.put_back()
            if isinstance(error, exc.DBAPIError) and not _is_inside(session):
                session.rollback()  # a read has failed, in an autobegun transaction
            raise
        _store(session)
        return self

    def delete(self) -> None:
        """Delete the row of this object, and store all pending changes of the session.

        Outside, the call sends ``BEGIN``, ``DELETE`` and ``COMMIT``. Inside, it sends ``DELETE``.
        As with ``Session.delete()``, SELECTs for related objects are sent before, and statements
        that write related objects are sent together with the ``DELETE``.

        :raises sqlalchemy.exc.InvalidRequestError: if the object is not stored, or belongs to a
            session other than the current one. Nothing is sent.
        :raises sqlalchemy.exc.DBAPIError: if the database reports an error.
        """
        session = _session_for(self)
        _check_is_stored(self, session, f"{type(self).__name__}.delete()")
        _store(session, deleted=self)

    @classmethod
    def create(
        cls,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        only: Collection[str] | None = None,
        **names: Any,
    ) -> Self:
        """Make an object of this model, and store it as :meth:`save` does.

        Keywords are passed to the constructor without a check. The names of a mapping are checked
        by the rules of :meth:`update`. So pass a form as the mapping, never as keywords.

        :param values: Values by the names of attributes, such as ``request.form``.
        :param only: The names that the mapping may have, including names that are refused without
            ``only``. All other names are refused.
        :param names: Keywords of the constructor.
        :returns: The object.
        :raises sqlalchemy.exc.ArgumentError: if ``values`` is no mapping, if ``only`` is no
            collection of names or is given without a mapping, or if a name is given twice. Nothing
            is sent.
        :raises sqlalchemy.exc.InvalidRequestError: if a name of the mapping is no mapped attribute
            or may not be set. Nothing is sent.
        :raises sqlalchemy.exc.DBAPIError: if the database reports an error.
        """
        call = f"{cls.__name__}.create()"
        mapper = class_mapper(cls)
        if only is not None and values is None:
            raise exc.ArgumentError(
                f"{call} got only= without a mapping, and keywords are not checked. Give it the "
                f"form as it is: {cls.__name__}.create(form, only=…), not **form."
                + see("changed-names")
            )
        session = _current_session(cls)
        given = _checked_mapping(call, values, names)
        _check_names(call, mapper, given, only)
        created = cls(**given, **names)
        session.add(created)
        _store(session)
        return created


# The session


def _current_session(model: type[Any]) -> Session:
    source: Any = getattr(model, "__scoped_session__", None)
    if source is None:
        # private: no public name leads from a model of Flask-SQLAlchemy to its extension
        source = getattr(getattr(model, "__fsa__", None), "session", None)
    if source is None:
        raise exc.InvalidRequestError(
            f"{model.__name__} does not know which session is the current one. Set "
            "__scoped_session__ on it or on its base class, to a scoped_session or to a callable "
            "that returns the session; or derive it from Flask-SQLAlchemy's db.Model."
            + see("current-session")
        )
    if isinstance(source, (sessionmaker, type)) or not callable(source):
        raise exc.ArgumentError(
            f"__scoped_session__ of {model.__name__} has to return the same session each time it "
            f"is called, until the work with that session is done. {source!r} doesn't: make it a "
            "scoped_session(sessionmaker(…)), or a callable that returns the session."
            + see("current-session")
        )
    session: Any = source()
    if isinstance(session, scoped_session):
        session = session()  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(session, Session):
        raise exc.ArgumentError(
            f"__scoped_session__ of {model.__name__} returned {session!r}, which is no "
            "sqlalchemy.orm.Session: let it return one." + see("current-session")
        )
    return session


def _session_for(instance: object) -> Session:
    """Return the current session, if the object belongs to it or to none.

    The object's own session could be that of another thread, and a transaction that is open in the
    current session would not include the object's changes.
    """
    name = type(instance).__name__
    current = _current_session(type(instance))
    if object_session(instance) not in (None, current):
        raise exc.InvalidRequestError(
            f"This {name} belongs to another session than the current one: to that of another "
            "thread or application context, or to one made by hand. Nothing was sent. Get the "
            "object from the current session, or store it with flush() or commit() of its own "
            "session." + see("other-session")
        )
    return current


def _check_is_stored(instance: object, session: Session, call: str) -> None:
    state = state_of(instance)
    if state.persistent and instance not in session.deleted:
        return
    if state.was_deleted or instance in session.deleted:
        why = "is deleted"
    elif state.detached:
        why = "belongs to no session any more: get it from the current session"
    else:
        why = "is not stored yet: call save() first"
    raise exc.InvalidRequestError(
        f"{call} needs a row, and this object {why}. Nothing was sent." + see("no-row")
    )


def _store(session: Session, deleted: object = None) -> None:
    """Flush the session: outside in a transaction of its own, inside as part of the transaction.

    :param deleted: An object that the same flush deletes.
    """
    inside = _is_inside(session)
    try:
        if deleted is not None:
            session.delete(deleted)
        session.flush()
        # Outside, an OptInSession has committed now. On SQLAlchemy's own session, or on a stock
        # bind, the transaction that SQLAlchemy has begun by itself is still open.
        if not inside and session.in_transaction():
            session.commit()
    except BaseException:
        if not inside:
            session.rollback()
        raise


def _is_inside(session: Session) -> bool:
    """Tell whether code has asked for a transaction. SQLAlchemy's autobegin does not count."""
    transaction = session.get_transaction()
    return session.get_nested_transaction() is not None or (
        transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN
    )


# The names


def _checked_mapping(
    call: str, values: Mapping[str, Any] | None, names: Mapping[str, Any]
) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise exc.ArgumentError(
            f"{call} takes a mapping of names and values, such as request.form or a dict, not "
            f"{type(values).__name__!r}. Nothing was changed." + see("changed-names")
        )
    twice = [name for name in values if name in names]
    if twice:
        raise exc.ArgumentError(
            f"{call} got {listed(twice, _MOST_NAMED)} both in the mapping and as a keyword. "
            "Nothing was changed." + see("changed-names")
        )
    # dict(values) would make lists of the values of a werkzeug MultiDict.
    return {name: values[name] for name in values}


def _check_names(
    call: str, mapper: Mapper[Any], names: Iterable[str], only: Collection[str] | None
) -> None:
    if only is not None:
        given: list[object] = [*only] if isinstance(only, Collection) else [only]  # pyright: ignore
        if isinstance(only, str) or not all(isinstance(name, str) for name in given):
            raise exc.ArgumentError(
                f"{call} takes the names that may be changed as only={{'name', …}}, not as "
                f"{only!r}. An attribute that is called 'only' goes into the "
                "mapping. Nothing was changed." + see("changed-names")
            )
        _raise_if_any(f"{call}, only=", ((name, _why_never(mapper, name)) for name in only))
    _raise_if_any(call, ((name, _why_not(mapper, name, only)) for name in names))


def _check_keywords(
    call: str, mapper: Mapper[Any], names: Iterable[str], only: Collection[str] | None
) -> None:
    """Check keywords with and without ``only``, which allows names of the mapping alone."""
    if only is not None:
        _raise_if_any(call, ((name, _why_not(mapper, name, only)) for name in names))
    put = "give it in a mapping, and name it in only={…}"
    _raise_if_any(call, ((name, _why_not(mapper, name, None, put)) for name in names))


def _raise_if_any(call: str, reasons: Iterable[tuple[str, str | None]]) -> None:
    wrong = islice((f"{name!r} {reason}" for name, reason in reasons if reason), _MOST_NAMED)
    if said := "; ".join(wrong):
        raise exc.InvalidRequestError(
            f"{call}: {said}. Nothing was changed." + see("changed-names")
        )


def _why_not(
    mapper: Mapper[Any],
    name: str,
    only: Collection[str] | None,
    put: str = "name it in only={…}",
) -> str | None:
    """Say why an attribute may not be changed; ``None`` if it may.

    :param put: What the message tells the caller to do if the attribute may be changed after all.
    """
    reason = _why_never(mapper, name)
    if reason is not None:
        return reason
    if only is not None:
        return None if name in only else "is not named in only"
    reason = _why_unless_named(mapper, name)
    if reason is None and name.startswith("_"):
        reason = "private by its name"
    return reason and f"is {reason}: if it may be changed, {put}"


def _why_never(mapper: Mapper[Any], name: str) -> str | None:
    """Say why an attribute can't be changed, not even by name; ``None`` if it can."""
    descriptor = mapper.all_orm_descriptors.get(name)
    if descriptor is None:
        return f"is not a mapped attribute of {mapper.class_.__name__}{_hint(mapper, name)}"
    attribute = attribute_of(mapper, name)
    if isinstance(attribute, ColumnProperty):
        if any(not isinstance(column, Column) for column in attribute.columns):
            return "is a SQL expression, which has no value to set"
        if any(column.computed is not None for column in columns_of(attribute)):
            return "is computed by the database"
        return None
    if isinstance(attribute, RelationshipProperty):
        if attribute.viewonly:
            return "is a viewonly relationship: change the columns it depends on"
        if attribute.lazy in ("dynamic", "write_only"):
            return "is a collection that is never loaded: use its own add() and remove()"
        return None
    if isinstance(attribute, CompositeProperty):
        reasons = (_why_never(mapper, part.key) for part in attribute.props)
        return next(filter(None, reasons), None)
    if isinstance(descriptor, hybrid_property):
        writable = descriptor.fset is not None  # pyright: ignore[reportUnknownMemberType]
        return None if writable else "is a hybrid property without a setter"
    return "is no attribute that stores a value of its own: set it by itself, and call save()"


def _why_unless_named(mapper: Mapper[Any], name: str) -> str | None:
    """Say why an attribute may be changed only if ``only`` names it; ``None`` otherwise."""
    attribute = attribute_of(mapper, name)
    if isinstance(attribute, RelationshipProperty):
        return "a relationship"
    if isinstance(attribute, CompositeProperty):
        reasons = (_why_unless_named(mapper, part.key) for part in attribute.props)
        return next(filter(None, reasons), None)
    if not isinstance(attribute, ColumnProperty):
        return "a hybrid property, whose setter may change anything"
    columns = columns_of(attribute)
    family = list(mapper.iterate_to_root())
    if any(column.primary_key or column in mapper.primary_key for column in columns):
        return "a primary key"
    if any(column.foreign_keys for column in columns) or _is_referring(mapper, columns):
        return "a foreign key"
    if any(_drives(one.polymorphic_on, column) for one in family for column in columns):
        return "the discriminator, which tells the class of the object"
    if any(one.version_id_col is column for one in family for column in columns):
        return "the version, which SQLAlchemy counts"
    if any(column.identity is not None for column in columns):
        return "an identity column, which the database counts"
    return None


def _drives(discriminator: Any, column: Column[Any]) -> bool:
    """Tell whether a column is the discriminator, or a part of the discriminating expression."""
    return discriminator is not None and any(
        isinstance(part, ColumnElement) and part.shares_lineage(column)
        for part in visitors.iterate(discriminator)
    )


def _is_referring(mapper: Mapper[Any], columns: list[Column[Any]]) -> bool:
    """Tell whether a relationship uses a column as foreign key, even if the table declares none."""
    return any(
        column in relationship.local_columns
        for relationship in mapper.relationships
        if relationship.direction is RelationshipDirection.MANYTOONE
        for column in columns
    )


def _hint(mapper: Mapper[Any], name: object) -> str:
    for attribute in mapper.column_attrs:
        if any(column.name == name for column in columns_of(attribute)):
            return f" (the attribute of this column is {attribute.key!r})"
    similar = get_close_matches(str(name), mapper.all_orm_descriptors.keys(), 1)
    return f" (did you mean {similar[0]!r}?)" if similar else ""
