"""The row that has these values, or a new one: one row, however many ask for it at the same time.

Two callers may both search and find nothing. The unique constraint of the database decides which of
them creates the row, and the other one searches again and gets what the first has created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from sqlalchemy import Column, ForeignKeyConstraint, exc, inspect, literal, null, select
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.orm import (
    ColumnProperty,
    InstanceState,
    Mapper,
    RelationshipDirection,
    RelationshipProperty,
    Session,
    class_mapper,
    make_transient_to_detached,
    object_session,
)
from sqlalchemy.orm.attributes import set_committed_value

from ._core.engine import OptInEngine
from ._core.session import OptInSession

T = TypeVar("T")

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SERIALIZATION_FAILURE = "40001"
# A unique or an exclusion constraint: a row that is there already is in the way.
_TAKEN = ("23505", "23P01")

# PostgreSQL takes no ON CONFLICT for a table that has rules or deferrable unique constraints.
_NO_ON_CONFLICT = ("0A000", "55000")

# Where a program takes part in a flush and its transaction. Who listens there is owed both.
_MAPPER_EVENTS = ("before_insert", "after_insert")
_INSTANCE_EVENTS = ("refresh_flush",)
_SESSION_EVENTS = (
    "before_attach",
    "transient_to_pending",
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "pending_to_persistent",
    "after_begin",
    "before_commit",
    "after_commit",
)


def filter_by_or_create(
    session: Session,
    model: type[T],
    filters: Mapping[str, Any],
    defaults: Mapping[str, Any],
    new_session: Callable[[], Session],
) -> tuple[T, bool]:
    """Return the one object that has the values of ``filters``, or create it.

    What goes over the wire: a SELECT, and nothing else if it finds the object. Created outside a
    transaction, the object is stored when the call returns, and all that waits in the session goes
    on waiting: one INSERT more, alone if nothing listens to the events of a flush and one table
    takes it all, else in a transaction of its own (BEGIN, INSERT, COMMIT). Created inside, the
    object is part of the transaction (SAVEPOINT, INSERT, RELEASE): an error undoes nothing else.
    Joined inheritance is an INSERT for each table.

    However many ask for the same new object at the same time, one creates it and the others get it.
    This needs a unique constraint on what is searched for.

    :param session: Where to search, and what the object will belong to. Only an
        :class:`.OptInSession` whose bind is made by :func:`.create_engine` is ever outside.
    :param model: The mapped class.
    :param filters: The values to search for, as ``filter_by()`` takes them; a new object gets them.
    :param defaults: What else a new object gets, as its constructor takes it.
    :param new_session: Makes another session of the same kind, for a transaction of its own.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or a name is both in
        ``filters`` and in ``defaults``. Nothing is sent.
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of that name, or a
        related object can't be used here. Nothing is sent.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the new row. Inside, at REPEATABLE
        READ or SERIALIZABLE, this is a serialization failure (SQLSTATE 40001) if a concurrent
        transaction has created a row that this one can't see: run the transaction again.
    """
    if not isinstance(defaults, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise exc.ArgumentError(
            f"The defaults are the values of a new object by their names, not {defaults!r}."
        )
    wanted = _Wanted(session, model, filters, defaults)
    outside = (
        isinstance(session, OptInSession)
        and not session.in_transaction()
        and isinstance(session.get_bind(wanted.mapper), OptInEngine)
    )
    wanted.check_names()
    wanted.check_related(outside)
    found = wanted.find()
    if found is not None:
        return found, False
    return wanted.create_outside(new_session) if outside else wanted.create_inside()


class _Wanted(Generic[T]):
    """What one call is about."""

    def __init__(
        self,
        session: Session,
        model: type[T],
        filters: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        self.session = session
        self.model = model
        self.filters = filters
        self.defaults = defaults
        self.mapper: Mapper[T] = class_mapper(model)
        self.related = {
            name: value
            for name, value in {**filters, **defaults}.items()
            if name in self.mapper.relationships
        }

    # -- before anything is sent ---------------------------------------------------------------

    def check_names(self) -> None:
        """Refuse what the model does not have, while nothing is sent."""
        name = self.model.__name__
        if not self.filters:
            raise exc.ArgumentError(
                f"{name}.filter_by_or_create() has nothing to search for: name an attribute and "
                "its value, best one that is unique."
            )
        twice = [key for key in self.defaults if key in self.filters]
        if twice:
            raise exc.ArgumentError(
                f"{name}.filter_by_or_create() searches for {_listed(twice)}, which the new object "
                "gets anyway: leave it out of the defaults."
            )
        mapped = self.mapper.all_orm_descriptors
        unknown = [key for key in self.filters if key not in mapped]
        unknown += [key for key in self.defaults if not self.is_accepted(key)]
        if unknown:
            raise exc.InvalidRequestError(
                f"{name} has no attribute {_listed(unknown)}; it has {_listed(mapped.keys())}. "
                "Nothing was sent."
            )

    def is_accepted(self, name: str) -> bool:
        """Tell whether the constructor takes this, which may be more than is mapped."""
        if hasattr(self.model, name):  # such as a property: SQLAlchemy's own constructor sets it
            return True
        parameters = signature(self.model).parameters
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
            # What the user's own constructor makes of them can't be known.
            constructor = self.mapper.class_manager.original_init
            return constructor is not self.mapper.registry.constructor
        return name in parameters

    def check_related(self, outside: bool) -> None:
        """Refuse related objects that would have to be written, too, where that can't be."""
        for name, value in self.related.items():
            relationship = self.mapper.relationships[name]
            if relationship.viewonly:
                raise exc.InvalidRequestError(
                    f"{relationship} is viewonly, so a new object would not get it: give the "
                    "columns it depends on instead. Nothing was sent."
                )
            related = relationship.mapper.class_
            if not (relationship.uselist or value is None or isinstance(value, related)):
                raise exc.ArgumentError(
                    f"{relationship} is a {related.__name__} or None, not {value!r}. Nothing was "
                    "sent."
                )
            if outside and relationship.direction is not RelationshipDirection.MANYTOONE:
                raise exc.InvalidRequestError(
                    f"{relationship} is a change to other rows, and filter_by_or_create() outside "
                    "a transaction writes one alone: put it into `with session.begin():`. Nothing "
                    "was sent."
                )
            state = _mapped(value)
            if state is None or state.key is not None:
                continue
            if outside:
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, and "
                    "filter_by_or_create() outside a transaction writes one row alone: store it "
                    "first, or put both into `with session.begin():`. Nothing was sent."
                )
            flushed_in_time = state.session is self.session and self.session.autoflush
            if name in self.filters and not flushed_in_time:
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, so nothing can refer "
                    "to it: add it to the session and flush() first. Nothing was sent."
                )

    # -- what is done --------------------------------------------------------------------------

    def find(self) -> T | None:
        """Search: one SELECT, of no more rows than it takes to know that there are too many."""
        statement = select(self.model).filter_by(**self.filters).limit(2)
        return self.session.scalars(statement).unique().one_or_none()

    def create_inside(self) -> tuple[T, bool]:
        """Create it as a part of the transaction, or find what another has created meanwhile."""
        # This flushes what waits in the session; if that fails it is no matter of ours.
        savepoint = self.session.begin_nested()
        created: T | None = None
        try:
            with savepoint:
                # Made in here, because a related object may take it into a collection at once, and
                # going back to the savepoint takes it out again.
                created = self.build(self.related)
                self.session.add(created)
            return created, True
        except exc.IntegrityError as error:
            if not _is_taken(error):
                raise
            refusal = error
        found = self.find()
        if found is not None:
            return found, False
        if created is not None:
            self.raise_if_unseen(created)
        try:
            raise refusal
        finally:
            del refusal  # its traceback refers to this frame

    def create_outside(self, new_session: Callable[[], Session]) -> tuple[T, bool]:
        """Create it and write nothing else, or find what another has created meanwhile."""
        refusal: exc.DBAPIError | None = None
        # Made for a session of its own, where it meets nothing that waits in the caller's.
        with closing(new_session()) as other:
            other.expire_on_commit = False
            if self.related:
                _give_back(self.session)
            stand_ins = {name: _stand_in(value, other) for name, value in self.related.items()}
            created = self.build(stand_ins)
            if created in self.session:  # its constructor adds it
                self.session.expunge(created)
            attempts = [self.flush]
            if self.is_one_insert(created):
                attempts = [self.insert_unless_taken, self.flush]
            for attempt in attempts:
                try:
                    if attempt(created, other):
                        return self.take_over(created, other), True
                except exc.DBAPIError as error:
                    if not _is_taken(error) and _sqlstate(error) != _SERIALIZATION_FAILURE:
                        raise
                    refusal = error
                found = self.find()
                if found is not None:
                    return found, False
                if refusal is not None:
                    break
        assert refusal is not None
        try:
            raise refusal
        finally:
            del refusal  # its traceback refers to this frame

    def build(self, related: Mapping[str, Any]) -> T:
        """Construct the object, with others in place of the related ones where it must be."""
        created = self.model(**{**self.filters, **self.defaults, **related})
        for name, value in self.filters.items():
            # None would leave a column to its default, and no search would find that again.
            if value is None and name in self.mapper.column_attrs:
                column = self.mapper.column_attrs[name].columns[0]
                if isinstance(column, Column) and _has_default(column):
                    set_committed_value(created, name, null())
        return created

    def flush(self, created: T, other: Session) -> bool:
        """Write it as SQLAlchemy does, in a transaction of the other session."""
        for instance, *_ in self.mapper.cascade_iterator("save-update", _state(created)):
            if object_session(instance) not in (None, other):
                raise exc.InvalidRequestError(
                    f"The new {self.model.__name__} takes along a {type(instance).__name__} of "
                    "this session, and filter_by_or_create() outside a transaction writes nothing "
                    "that waits there: put it into `with session.begin():`."
                )
        # No thread holds two connections: as many threads as the pool has could wait for ever.
        _give_back(self.session)
        if isinstance(self.session, OptInSession):
            self.session.read_from_primary()  # for it is the other one that goes there
        try:
            with other.begin():
                other.add(created)
        finally:
            _give_back(other)
        return True

    def insert_unless_taken(self, created: T, other: Session) -> bool:
        """Write it in one statement; tell whether there was nothing in the way."""
        for name in self.related:
            _refer(created, self.mapper.relationships[name])
        _give_back(other)
        statement = self.insert(created, self.mapper.local_table)
        given = _state(created).dict
        returned = [
            (attribute.key, column)
            for attribute, column in self.columns(self.mapper.local_table)
            if attribute.key in given or not attribute.deferred
        ]
        try:
            row = self.session.execute(
                statement.returning(*[column for _, column in returned]),
                bind_arguments={"mapper": self.mapper},
            ).one_or_none()
        except exc.DBAPIError as error:
            if _sqlstate(error) not in _NO_ON_CONFLICT:
                raise
            return False
        if row is None:
            return False
        for (name, _), value in zip(returned, row, strict=True):
            set_committed_value(created, name, value)
        make_transient_to_detached(created)
        other.add(created)
        return True

    def take_over(self, created: T, other: Session) -> T:
        """Move the object, which is stored now, from the other session to the caller's."""
        loaded = _state(created).dict.keys() & set(self.mapper.relationships.keys())
        if loaded:  # they are objects of the other session
            other.expire(created, loaded)
        other.expunge(created)
        known = _known(self.session, created)
        if known is not None:
            # Its row was deleted by someone else; it has the same primary key again.
            self.session.expire(known)
            return known
        self.session.add(created)
        for name, value in self.related.items():
            if value is None or value in self.session:
                set_committed_value(created, name, value)
            if value is not None and value in self.session:
                _forget_unless_changed(value, self.mapper.relationships[name].back_populates)
        return created

    def raise_if_unseen(self, created: T) -> None:
        """Raise a serialization failure if the row in the way is one this transaction can't see.

        The server knows: an INSERT that may pass over such a row fails all the same.
        """
        if self.session.get_bind(self.mapper).dialect.name != "postgresql":
            return
        bind_arguments = {"mapper": self.mapper}
        savepoint = self.session.begin_nested()
        try:
            for table in self.tables():
                statement = self.insert(created, table).returning(literal(1))
                if not self.session.execute(statement, bind_arguments=bind_arguments).all():
                    break  # passed over: the row is there for all to see
        except exc.DBAPIError as error:
            if _sqlstate(error) == _SERIALIZATION_FAILURE:
                raise
        finally:
            savepoint.rollback()

    # -- the model -----------------------------------------------------------------------------

    def is_one_insert(self, created: T) -> bool:
        """Tell whether one INSERT is all that a flush would do, and nobody would notice it."""
        mapper = self.mapper
        bind = self.session.get_bind(mapper)
        # Where the server refuses writes outside, it has to be a transaction.
        reads_only = isinstance(bind, OptInEngine) and bind.transaction_options.read_only is False
        return (
            bind.dialect.name == "postgresql"
            and not reads_only
            and self.tables() == list(mapper.tables) == [mapper.local_table]
            and not any(
                getattr(constraint, "deferrable", False)
                for constraint in self.tables()[0].constraints
                if not isinstance(constraint, ForeignKeyConstraint)
            )
            and mapper.version_id_col is None
            and not _is_listened_to(mapper.dispatch, _MAPPER_EVENTS)
            and not _is_listened_to(mapper.class_manager.dispatch, _INSTANCE_EVENTS)
            and not _is_listened_to(self.session.dispatch, _SESSION_EVENTS)
            and not any(
                related is not None
                for name in mapper.relationships.keys() - self.related.keys()
                for related in _state(created).attrs[name].history.added or ()
            )
        )

    def tables(self) -> list[Any]:
        """The tables that have a part of the object, in the order in which they are written."""
        parts: list[Any] = [mapper.local_table for mapper in self.mapper.iterate_to_root()]
        return [part for part in dict.fromkeys(reversed(parts)) if part in self.mapper.tables]

    def columns(self, table: Any) -> Iterable[tuple[ColumnProperty[Any], Column[Any]]]:
        """The mapped columns of one table, each with its attribute."""
        for attribute in self.mapper.column_attrs:
            for column in attribute.columns:
                if isinstance(column, Column) and column.table is table:
                    yield attribute, column

    def insert(self, created: T, table: Any) -> Insert:
        """The INSERT that a flush would send, but one that passes over a row that is in the way."""
        attributes = _state(created).attrs
        values: dict[Column[Any], Any] = {}
        for attribute, column in self.columns(table):
            value = attributes[attribute.key].value
            # As in a flush, None is what has not been set, except to types that give it a meaning.
            if value is not None or column.type.should_evaluate_none:
                values[column] = value
        return insert(table).values(values).on_conflict_do_nothing()


def _state(instance: Any) -> InstanceState[Any]:
    state: InstanceState[Any] = inspect(instance)
    return state


def _mapped(value: Any) -> InstanceState[Any] | None:
    """Return the state of an object of a mapped class; ``None`` for anything else."""
    state: Any = inspect(value, raiseerr=False)
    return state if isinstance(state, InstanceState) else None  # pyright: ignore


def _known(session: Session, instance: T) -> T | None:
    """Return what a session has of an object that is stored."""
    key = _state(instance).key
    return None if key is None else session.identity_map.get(key)


def _stand_in(related: Any, other: Session) -> Any:
    """Return the same object for another session, with what is loaded of it; the rest loads there.

    So the constructor can have a look at it, and neither its collections nor its session change.
    """
    state = _mapped(related)
    if state is None or state.identity is None:
        return related  # None; or nothing that a relationship takes, as the constructor will say
    stand_in = _known(other, related)
    if stand_in is None:
        mapper = state.mapper
        stand_in = mapper.class_manager.new_instance()
        for name in state.unmodified & state.dict.keys() & set(mapper.column_attrs.keys()):
            set_committed_value(stand_in, name, state.dict[name])
        for column, value in zip(mapper.primary_key, state.identity, strict=True):
            set_committed_value(stand_in, mapper.get_property_by_column(column).key, value)
        make_transient_to_detached(stand_in)
        other.add(stand_in)
    return stand_in


def _refer(created: Any, relationship: RelationshipProperty[Any]) -> None:
    """Set the foreign key of a related object, as a flush does."""
    related = getattr(created, relationship.key)
    for local, remote in relationship.local_remote_pairs or ():
        value = None
        if related is not None:
            value = getattr(related, _state(related).mapper.get_property_by_column(remote).key)
        name = _state(created).mapper.get_property_by_column(local).key
        set_committed_value(created, name, value)


def _forget_unless_changed(instance: Any, name: str | None) -> None:
    """Let a collection be loaded again that misses a new object, unless it waits to be written."""
    state = _state(instance)
    if name and name in state.dict and not state.attrs[name].history.has_changes():
        assert state.session is not None
        state.session.expire(instance, [name])


def _give_back(session: Session) -> None:
    if isinstance(session, OptInSession):
        session.give_back()


def _is_listened_to(dispatch: Any, events: Iterable[str]) -> bool:
    """Tell whether there are listeners to these events, other than those of this package."""
    package = __name__.partition(".")[0]
    return any(
        getattr(listener, "__module__", "").partition(".")[0] != package
        for event in events
        for listener in getattr(dispatch, event)
    )


def _has_default(column: Column[Any]) -> bool:
    return column.default is not None or column.server_default is not None


def _sqlstate(error: exc.DBAPIError) -> str | None:
    """The server's code for an error; ``None`` from drivers other than psycopg and psycopg2."""
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def _is_taken(error: exc.DBAPIError) -> bool:
    """Tell whether a row that is there already is what the database has against the new one."""
    return isinstance(error, exc.IntegrityError) and _sqlstate(error) in (None, *_TAKEN)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
