"""The row that has these values, or a new one: one row, however many ask for it at the same time.

Two callers may both search and find nothing. The unique constraint of the database decides which of
them creates the row, and the other one searches again and gets what the first has created.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import exc, inspect, null, select
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    RelationshipDirection,
    Session,
    SessionTransaction,
    class_mapper,
    make_transient,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.types import TypeDecorator

from ._core.describe import listed, state_of
from ._core.errors import sqlstate
from ._core.session import OptInSession
from ._core.sqlalchemy_private import forget_addition
from ._core.states import is_opt_in

T = TypeVar("T")

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SERIALIZATION_FAILURE = "40001"
# A unique or an exclusion constraint: a row that is there already is in the way.
_TAKEN = ("23505", "23P01")


def filter_by_or_create(
    session: Session,
    model: type[T],
    filters: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> tuple[T, bool]:
    """Return the one object that has the values of ``filters``, or create it.

    If the search finds the object, all that is sent is one SELECT. Outside a transaction, a new
    object is stored when the call returns, in a transaction of its own: the INSERT alone, or BEGIN,
    INSERT and COMMIT in some cases. Other pending changes stay pending. Inside, the new object is
    part of the transaction (SAVEPOINT, INSERT, RELEASE), so that an error undoes nothing else. With
    ``begin_on_write=True``, an object is always created inside: if no transaction is open, this
    begins one, which stays open. A model with joined inheritance needs one INSERT for each table.

    The new object is stored by a flush of the session, with all that its constructor and listeners
    add or change.

    However many ask for the same new object at the same time, one creates it and the others get it.
    This needs a unique constraint on what is searched for.

    :param session: Where to search, and what the object will belong to. Only an
        :class:`.OptInSession` whose bind is made by :func:`.create_engine` is ever outside.
    :param model: The mapped class.
    :param filters: The values to search for, as ``filter_by()`` takes them; a new object gets them.
        ``None`` is NULL, in the search and in the new row, whatever the default of the column.
    :param defaults: What else a new object gets, as its constructor takes it. A function without
        parameters is called for a new object alone, and what it returns is used.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or a name is both in
        ``filters`` and in ``defaults``. Nothing is sent.
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of that name, or a
        related object can't be used here. Nothing is stored.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the new row. Inside, at REPEATABLE
        READ or SERIALIZABLE, this is a serialization failure (SQLSTATE 40001) if a concurrent
        transaction has created a row that this one can't see: run the transaction again.
    """
    if not isinstance(defaults, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise exc.ArgumentError(
            f"The defaults are the values of a new object by their names, not {defaults!r}."
        )
    wanted = _FindOrCreate(session, model, filters, defaults)
    wanted.check_names()
    wanted.check_related({**filters, **defaults})
    found = wanted.find()
    if found is not None:
        return found, False
    # If the model's bind is a stock one, the search has begun a transaction on it.
    if isinstance(session, OptInSession) and wanted.is_outside():
        return wanted.create_outside(session)
    return wanted.create_inside()


class _FindOrCreate(Generic[T]):
    """One call: its search, and its new object."""

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
                f"{name}.filter_by_or_create() searches for {listed(twice)}, which the new object "
                "gets anyway: leave it out of the defaults."
            )
        mapped = self.mapper.all_orm_descriptors
        unknown = [key for key in self.filters if key not in mapped]
        unknown += [key for key in self.defaults if not self.is_accepted(key)]
        if unknown:
            raise exc.InvalidRequestError(
                f"{name} has no attribute {listed(unknown)}; it has {listed(mapped.keys())}. "
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

    def check_related(self, values: Mapping[str, Any]) -> None:
        """Refuse related objects that would have to be written, too, where that can't be.

        :param values: Values by their names; a function is checked when it has been called.
        """
        for name, value in values.items():
            if name not in self.mapper.relationships or _is_function(value):
                continue
            relationship = self.mapper.relationships[name]
            if relationship.viewonly:
                raise exc.InvalidRequestError(
                    f"{relationship} is viewonly, so a new object would not get it: give the "
                    "columns it depends on instead. Nothing was stored."
                )
            related = relationship.mapper.class_
            if not (relationship.uselist or value is None or isinstance(value, related)):
                raise exc.ArgumentError(
                    f"{relationship} is a {related.__name__} or None, not {value!r}. Nothing was "
                    "stored."
                )
            if relationship.direction is not RelationshipDirection.MANYTOONE:
                if self.is_outside(asks_for_bind=True):
                    raise exc.InvalidRequestError(
                        f"{relationship} is a change to other rows, and filter_by_or_create() "
                        "outside a transaction writes one alone: put it into `with "
                        "session.begin():`. Nothing was stored."
                    )
                continue
            state = _mapped(value)
            if state is None or state.key is not None:
                continue
            if self.is_outside(asks_for_bind=True):
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, and "
                    "filter_by_or_create() outside a transaction writes one row alone: store it "
                    "first, or put both into `with session.begin():`. Nothing was stored."
                )
            flushed_in_time = state.session is self.session and self.session.autoflush
            if name in self.filters and not flushed_in_time:
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, so nothing can refer "
                    "to it: add it to the session and flush() first. Nothing was stored."
                )

    def is_outside(self, *, asks_for_bind: bool = False) -> bool:
        """Tell whether a new object has a transaction of its own.

        :param asks_for_bind: Whether to look at the bind of the model as well. It is needed before
            the search, with which a stock bind begins a transaction.
        """
        session = self.session
        if not isinstance(session, OptInSession) or session.begins_on_write:
            return False
        if not session.is_outside:
            return False
        if not asks_for_bind or session.connection_callable is not None:
            return True  # with shards, each object may have another bind
        return is_opt_in(session.get_bind(mapper=self.mapper, clause=self.search()))

    # -- what is done --------------------------------------------------------------------------

    def search(self) -> Any:
        """Make the SELECT. Two rows are enough to know that there are too many."""
        return select(self.model).filter_by(**self.filters).limit(2)

    def find(self) -> T | None:
        """Search: one SELECT."""
        return self.session.scalars(self.search()).unique().one_or_none()

    def create_inside(self) -> tuple[T, bool]:
        """Create the object in the transaction, or find what another has created meanwhile."""
        # This flushes what waits in the session. An error of that is raised as it is.
        savepoint = self.session.begin_nested()
        created: T | None = None
        try:
            with savepoint:
                # Made in here, because a related object may take it into a collection at once, and
                # going back to the savepoint takes it out again.
                created = self.build()
                self.session.add(created)
            self.settle(created)
            return created, True
        except exc.IntegrityError as error:
            if not _is_taken(error):
                raise
            refusal = error
        found = self.find()
        if found is not None:
            return found, False
        if created is not None:
            self.raise_if_unseen(created, refusal)
        try:
            raise refusal
        finally:
            del refusal  # its traceback refers to this frame

    def create_outside(self, session: OptInSession) -> tuple[T, bool]:
        """Create the object alone, or find what another has created meanwhile."""
        try:
            created = _Attempt(session).store(self.build)
            self.settle(created)
            return created, True
        except exc.DBAPIError as error:
            if not _is_taken(error) and sqlstate(error) != _SERIALIZATION_FAILURE:
                raise
            refusal = error
        found = self.find()
        if found is not None:
            return found, False
        try:
            raise refusal
        finally:
            del refusal  # its traceback refers to this frame

    def build(self) -> T:
        """Construct the object, and call the functions among the defaults."""
        called = {key: value() for key, value in self.defaults.items() if _is_function(value)}
        self.check_related(called)
        created = self.model(**{**self.filters, **self.defaults, **called})
        for name in self.names_of_null(created):
            # With None, a column would get its default, or null of JSON, and the search would not
            # find the object again.
            set_committed_value(created, name, null())
        return created

    def settle(self, created: T) -> None:
        """Set the attributes that are stored as NULL to ``None``, without another SELECT."""
        values = state_of(created).dict
        for name in self.names_of_null(created):
            if name not in values:  # the flush has expired null(), which is an SQL expression
                set_committed_value(created, name, None)

    def names_of_null(self, created: T) -> Iterator[str]:
        """Yield the names of columns that are searched for as NULL, but might get another value.

        :param created: The new object.
        """
        values = state_of(created).dict
        for name, value in self.filters.items():
            while name in self.mapper.synonyms:
                name = self.mapper.synonyms[name].name
            attributes: Iterable[Any] = ()
            if name in self.mapper.composites:
                attributes = self.mapper.composites[name].props
            elif value is None and name in self.mapper.column_attrs:
                attributes = [self.mapper.column_attrs[name]]
            for attribute in attributes:
                if values.get(attribute.key) is None and _may_store_none_otherwise(attribute):
                    yield attribute.key

    def raise_if_unseen(self, created: T, refusal: exc.IntegrityError) -> None:
        """Raise a serialization failure if this transaction can't see the row that is in the way.

        The server can tell: the refused INSERT is sent again with ON CONFLICT DO NOTHING. At
        REPEATABLE READ and SERIALIZABLE this fails if the row in the way can't be seen.

        :param created: The object that could not be stored.
        :param refusal: The error of the flush.
        """
        statement = refusal.statement
        if not statement or statement.lstrip()[:6].upper() != "INSERT":
            return
        savepoint = self.session.begin_nested()
        try:
            connection = self.connection_of(created, savepoint)
            if connection.dialect.name == "postgresql":
                parameters: Any = refusal.params
                connection.exec_driver_sql(_passing_over(statement), parameters)
        except exc.DBAPIError as error:
            if sqlstate(error) == _SERIALIZATION_FAILURE:
                raise
        finally:
            savepoint.rollback()

    def connection_of(self, created: T, transaction: SessionTransaction) -> Any:
        """Return the connection that a flush writes the object with, asked for as a flush does."""
        ask = self.session.connection_callable
        if ask is not None:
            return ask(self.mapper.base_mapper, created)
        return transaction.connection(self.mapper.base_mapper)


class _Attempt(Collection[object]):
    """One attempt to store a new object outside, without storing what waits in the session.

    It is the collection of the objects that it stores: the new one, and what has become new,
    changed or deleted since, because of a constructor, a backref or a listener. A flush reads it
    after the listeners. If the attempt fails, these objects are what they were before.

    :param session: The session, outside.
    """

    def __init__(self, session: OptInSession) -> None:
        self.session = session
        self.waiting = self.all_that_waits()
        """What waited before, and goes on waiting."""
        self.created: Any = None
        self.seen: list[object] = []
        """The objects that were stored or that there was an attempt to store."""
        self.new: list[object] = []
        """Those of ``seen`` that are new."""
        self.attached: list[object] = []
        """Stored objects that were in no session, and came along with the new one."""
        self.known: object = None
        """An object of the session with the same primary key, whose row somebody has deleted."""

    # -- the objects of the flush --------------------------------------------------------------

    def all_that_waits(self) -> Any:
        """Return the objects that a flush of everything would write."""
        return self.session.new | self.session.dirty | self.session.deleted

    def __iter__(self) -> Iterator[object]:
        since = self.all_that_waits() - self.waiting
        for instance in since:
            if not any(instance is seen for seen in self.seen):
                self.seen.append(instance)
                if instance in self.session.new:
                    self.new.append(instance)
        yield self.created  # even if it is flushed: from an empty one, everything would be flushed
        yield from (instance for instance in since if instance is not self.created)

    def __contains__(self, instance: object) -> bool:
        return any(instance is other for other in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # -- the attempt ---------------------------------------------------------------------------

    def store(self, build: Callable[[], T]) -> T:
        """Construct the object, store it, and return it. Sends what one flush does.

        :param build: Constructs the object.
        """
        relations: list[tuple[object, str, object]] = []
        try:
            created = self.created = build()
            self.make_room()
            self.add()
            relations = [relation for new in self.new for relation in _backrefs(new)]
            self.refuse_waiting(relations)
            self.session.store_alone(self)
        except BaseException:
            self.undo(relations)
            raise
        for other, name, new in relations:
            if other in self.waiting:  # it is not flushed yet, and its flush would store this again
                _note_as_stored(other, name, new)
        return created if self.known is None else self.have_known_back()

    def make_room(self) -> None:
        """Expunge the object of the session that has the primary key of the new one."""
        session = self.session
        key = state_of(self.created).mapper.identity_key_from_instance(self.created)
        known = session.identity_map.get(key)
        if known is not None and known is not self.created and known not in session.deleted:
            self.known = known
            session.let_go([known])

    def add(self) -> None:
        """Add the object to the session, with the related objects to which that cascades."""
        session, state = self.session, state_of(self.created)
        self.attached = [
            instance
            for instance, _, related, _ in state.mapper.cascade_iterator(
                "save-update", state, halt_on=lambda related: related.obj() in session
            )
            if related.has_identity
        ]
        session.add(self.created)
        list(self)  # so that __iter__() notes what is new

    def refuse_waiting(self, relations: Iterable[tuple[object, str, object]]) -> None:
        """Refuse to go on if the new object can't be stored without an object that waits."""
        waiting = [other for new in self.new for other in _related(new)]
        waiting += [other for other, _, _ in relations]
        for other in waiting:
            if other in self.waiting and other in self.session.new:
                raise exc.InvalidRequestError(
                    f"The new {type(self.created).__name__} takes along a {type(other).__name__} "
                    "of this session, which is not stored yet, and filter_by_or_create() outside a "
                    "transaction writes nothing that waits there: put it into `with "
                    "session.begin():`. Nothing was stored."
                )

    def undo(self, relations: Iterable[tuple[object, str, object]]) -> None:
        """Bring the session and its objects back to what they were before.

        :param relations: The objects that got a new one by a backref, see :func:`_backrefs`.
        """
        session = self.session
        list(self)  # so that __iter__() notes what has become new meanwhile
        for other, name, new in relations:
            if other in self.waiting or any(other is attached for attached in self.attached):
                _take_out(other, name, new)
        session.let_go([*self.new, *self.attached])
        for instance in self.seen:
            if any(instance is new for new in self.new):
                continue
            if instance in session.deleted:
                session.add(instance)  # takes back the delete()
            elif state_of(instance).deleted:
                make_transient(instance)
                make_transient_to_detached(instance)
                session.add(instance)
            if instance in session:
                session.expire(instance)
        if self.known is not None:
            session.add(self.known)

    def have_known_back(self) -> Any:
        """Put the object that :meth:`make_room` expunged in the place of the new one; return it."""
        self.session.let_go([self.created])
        self.session.add(self.known)
        for instance in (self.known, *self.seen):
            if instance in self.session:
                self.session.expire(instance)
        return self.known


def _mapped(value: Any) -> InstanceState[Any] | None:
    """Return the state of an object of a mapped class; ``None`` for anything else."""
    state: Any = inspect(value, raiseerr=False)
    return state if isinstance(state, InstanceState) else None  # pyright: ignore


def _is_function(value: Any) -> bool:
    """Tell whether a default has to be called for its value."""
    return callable(value) and _mapped(value) is None


def _related(instance: object, name: str | None = None) -> Iterator[Any]:
    """Yield the objects that were put into the relationships of an object that is not flushed."""
    state = state_of(instance)
    for relationship in state.mapper.relationships:
        if name in (None, relationship.key):
            for other in state.attrs[relationship.key].history.added or ():
                if other is not None:
                    yield other


def _backrefs(new: object) -> Iterator[tuple[object, str, object]]:
    """Yield what backrefs have given a new object to: an object, its attribute, the new one."""
    for relationship in state_of(new).mapper.relationships:
        if relationship.back_populates:
            for other in _related(new, relationship.key):
                yield other, relationship.back_populates, new


def _note_as_stored(other: object, name: str, new: object) -> None:
    """Note that an object in a relationship is stored, so that no flush stores it again."""
    state = state_of(other)
    forget_addition(other, name, new)
    before: Any = state.committed_state.get(name)
    if isinstance(before, list):  # a collection that is loaded
        cast("list[object]", before).append(new)
    else:
        _forget_dynamic(before, new)


def _take_out(other: object, name: str, new: object) -> None:
    """Take an object out of a relationship, with no event, as if it had never been there."""
    state = state_of(other)
    forget_addition(other, name, new)
    value: Any = state.dict.get(name)
    if value is new:
        del state.dict[name]
        if state.persistent:
            assert state.session is not None
            state.session.expire(other, [name])
    elif value is not None and not _forget_dynamic(state.committed_state.get(name), new):
        adapter = collection_adapter(value)
        if any(item is new for item in adapter):
            adapter.remove_without_event(new)


def _forget_dynamic(history: Any, new: object) -> bool:
    """Take an object out of what waits for a collection with lazy="dynamic" or "write_only"."""
    added = getattr(history, "added_items", None)
    if added is None:
        return False
    if new in added:
        added.remove(new)
    return True


def _may_store_none_otherwise(attribute: Any) -> bool:
    """Tell whether None may be stored as something else than NULL."""
    column: Any = attribute.columns[0]
    if not hasattr(column, "server_default"):
        return False  # an SQL expression, which is not stored
    return (
        column.default is not None
        or column.server_default is not None
        or column.type.should_evaluate_none  # JSON
        or isinstance(column.type, TypeDecorator)
    )


def _passing_over(insert: str) -> str:
    """Add ON CONFLICT DO NOTHING to an INSERT of SQLAlchemy's."""
    before, returning, after = insert.rpartition(" RETURNING ")
    if not returning:
        before, after = insert, ""
    return f"{before}\nON CONFLICT DO NOTHING{returning}{after}"


def _is_taken(error: exc.DBAPIError) -> bool:
    """Tell whether the database refuses the new row because of one that is there already."""
    # SQLite has no SQLSTATE. If another constraint is violated, the search finds no row.
    return isinstance(error, exc.IntegrityError) and sqlstate(error) in (None, *_TAKEN)
