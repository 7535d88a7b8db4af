"""One call of ``filter_by_or_create()``: its search, and its new object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from sqlalchemy import exc, null, select
from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    Mapper,
    RelationshipDirection,
    RelationshipProperty,
    Session,
    SessionTransaction,
    class_mapper,
)
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import UnmappedColumnError

from .._core.attributes import attribute_of
from .._core.describe import listed, state_of
from .._core.errors import see
from .._core.session import OptInSession
from .._core.states import is_opt_in
from .attempt import Attempt, make_room
from .refusals import columns_in_the_way, is_serialization_failure, is_taken, passing_over
from .values import is_function, mapped_state, may_store_none_otherwise

T = TypeVar("T")

#: How many attempts may fail because other transactions keep storing and deleting the row.
MOST_IN_VAIN = 10


class FindOrCreate(Generic[T]):
    """One call of ``filter_by_or_create()``: its search, and its new object."""

    CALL = "filter_by_or_create()"
    """The name of the call, for errors."""

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
        self.refused: T | None = None
        """The new object that the database has refused."""

    # -- before anything is sent ---------------------------------------------------------------

    def check(self) -> None:
        """Refuse values that can't be searched for or stored, before anything is sent."""
        self.check_names()
        self.check_related({**self.filters, **self.defaults})

    def check_names(self) -> None:
        """Refuse names that the model does not have, before anything is sent."""
        name = self.model.__name__
        if not self.filters:
            raise exc.ArgumentError(
                f"{name}.{self.CALL} has nothing to search for: name an attribute and its value, "
                "best one that is unique." + see("what-is-searched")
            )
        twice = [key for key in self.defaults if self.is_searched(key)]
        if twice:
            raise exc.ArgumentError(
                f"{name}.{self.CALL} searches for {listed(twice)}, which a new object gets anyway: "
                "leave it out of the defaults." + see("what-is-searched")
            )
        mapped = self.mapper.all_orm_descriptors
        unknown = [key for key in self.filters if key not in mapped]
        unknown += [key for key in self.defaults if not self.is_accepted(key)]
        if unknown:
            raise exc.InvalidRequestError(
                f"{name} has no attribute {listed(unknown)}; it has {listed(mapped.keys())}. "
                "Nothing was sent." + see("what-is-searched")
            )

    @cached_property
    def searched(self) -> set[str]:
        """The column attributes that are searched for, as far as they are known."""
        return {own for name in self.filters for own in self.names_of(name)}

    def is_searched(self, name: str) -> bool:
        """Tell whether a default sets what is searched for, maybe by another name."""
        # A related object does not count: it may have the very values that are searched for.
        is_related = isinstance(attribute_of(self.mapper, name), RelationshipProperty)
        names = {*self.names_of(name)}
        return name in self.filters or bool(names and names <= self.searched and not is_related)

    def names_of(self, name: str) -> Iterator[str]:
        """Yield the column attributes that an attribute sets, as far as they are known.

        :param name: The name of an attribute of any kind.
        """
        attribute = attribute_of(self.mapper, name)
        if isinstance(attribute, ColumnProperty):
            yield attribute.key
        elif isinstance(attribute, CompositeProperty):
            yield from (part.key for part in attribute.props)
        elif isinstance(attribute, RelationshipProperty):
            yield from (own for own, _ in self.pairs(attribute))

    def pairs(self, relationship: RelationshipProperty[Any]) -> list[tuple[str, str]]:
        """Return what a flush copies for a many-to-one relationship: pairs of target and source.

        :param relationship: Any relationship. If it is not many-to-one, there are no pairs.
        """
        if relationship.direction is not RelationshipDirection.MANYTOONE:
            return []
        of_other = relationship.mapper.get_property_by_column
        try:
            return [
                (self.mapper.get_property_by_column(target).key, of_other(source).key)
                for source, target in relationship.synchronize_pairs
            ]
        except UnmappedColumnError:
            return []  # no attribute tells whether the relationship has changed

    def is_accepted(self, name: str) -> bool:
        """Tell whether the constructor takes a name, which need not be a mapped attribute."""
        if hasattr(self.model, name):  # such as a property: SQLAlchemy's own constructor sets it
            return True
        parameters = signature(self.model).parameters
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
            # What a constructor of the user's does with other names can't be known.
            constructor = self.mapper.class_manager.original_init
            return constructor is not self.mapper.registry.constructor
        return name in parameters

    def check_related(self, values: Mapping[str, Any]) -> None:
        """Refuse related objects that would have to be written, too, if that is not possible.

        :param values: Values by their names. A function's result is checked after the call.
        """
        for name, value in values.items():
            if name not in self.mapper.relationships or is_function(value):
                continue
            relationship = self.mapper.relationships[name]
            if relationship.viewonly:
                raise exc.InvalidRequestError(
                    f"{relationship} is viewonly, so it would not be stored: set the columns that "
                    "it depends on instead. Nothing was stored." + see("more-than-one-object")
                )
            related = relationship.mapper.class_
            if not (relationship.uselist or value is None or isinstance(value, related)):
                raise exc.ArgumentError(
                    f"{relationship} is a {related.__name__} or None, not {value!r}. Nothing was "
                    "stored." + see("more-than-one-object")
                )
            if relationship.direction is not RelationshipDirection.MANYTOONE:
                if self.is_outside(asks_for_bind=True):
                    raise exc.InvalidRequestError(
                        f"Setting {relationship} changes other rows, but {self.CALL} outside a "
                        "transaction writes one row only: put the call into "
                        "`with session.begin():`. Nothing was stored." + see("more-than-one-object")
                    )
                continue
            state = mapped_state(value)
            if state is None or state.key is not None:
                continue
            if self.is_outside(asks_for_bind=True):
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, and "
                    f"{self.CALL} outside a transaction writes one row only: store that object "
                    "first, or put both into `with session.begin():`. Nothing was stored."
                    + see("more-than-one-object")
                )
            flushed_in_time = state.session is self.session and self.session.autoflush
            if name in self.filters and not flushed_in_time:
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, so nothing can refer "
                    "to it: add it to the session, and call flush() first. Nothing was stored."
                    + see("more-than-one-object")
                )

    def is_outside(self, *, asks_for_bind: bool = False) -> bool:
        """Tell whether a new object is stored in a transaction of its own.

        :param asks_for_bind: Whether to look at the bind of the model as well. This is needed
            before the search, because on a stock bind the search begins a transaction.
        """
        session = self.session
        if not isinstance(session, OptInSession) or session.begins_on_write:
            return False
        if not session.is_outside:
            return False
        return not asks_for_bind or self.is_on_ours(session)

    def is_on_ours(self, session: OptInSession) -> bool:
        """Tell whether the bind of the model is of this package, as far as that is known."""
        if session.connection_callable is not None:
            return True  # with shards, each object may have another bind
        return is_opt_in(session.get_bind(mapper=self.mapper, clause=self.statement()))

    # -- what is done --------------------------------------------------------------------------

    def statement(self) -> Any:
        """Make the SELECT. Its limit is two rows: they are enough to know that one is too many."""
        return select(self.model).filter_by(**self.filters).limit(2)

    def find(self) -> T | None:
        """Search for the object with one SELECT."""
        return self.session.scalars(self.statement()).unique().one_or_none()

    def create(self) -> tuple[T, bool]:
        """Create the object, or find the one that another caller has created meanwhile."""
        # If the model's bind is a stock one, the search has begun a transaction on it.
        own = self.session if isinstance(self.session, OptInSession) and self.is_outside() else None
        tries = 0
        while True:
            answer = self.create_inside() if own is None else self.create_outside(own)
            if not isinstance(answer, exc.DBAPIError):
                return answer, True
            found = self.find()
            if found is not None:
                return found, False
            if own is None:
                self.raise_if_unseen(answer)
            tries += 1
            if tries == MOST_IN_VAIN or not self.is_gone(answer):
                try:
                    raise answer
                finally:
                    del answer  # its traceback refers to this frame

    def create_inside(self) -> T | exc.DBAPIError:
        """Create the object in the transaction.

        :returns: The object, or the error if another caller has been faster.
        """
        # This flushes pending changes. An error of this flush is raised unchanged.
        savepoint = self.session.begin_nested()
        self.refused = None
        known: object = None
        try:
            with savepoint:
                # The object is made inside the savepoint: a related object may take it into a
                # collection at once, and a rollback to the savepoint takes it out again.
                created = self.refused = self.build()
                known = make_room(self.session, created)
                self.session.add(created)
        except BaseException as error:
            if known is not None:
                self.session.add(known)
            if not is_taken(error):
                raise
            return error
        self.settle(created)
        return created

    def create_outside(self, session: OptInSession) -> T | exc.DBAPIError:
        """Create the object in a transaction of its own.

        :returns: The object, or the error if another caller has been faster.
        """
        try:
            created = Attempt(session, self.CALL).store(self.build)
        except exc.DBAPIError as error:
            if not is_taken(error) and not is_serialization_failure(error):
                raise
            return error
        self.settle(created)
        return created

    def build(self) -> T:
        """Construct the object, and call the functions among the defaults."""
        called = {key: value() for key, value in self.defaults.items() if is_function(value)}
        self.check_related(called)
        created = self.model(**{**self.filters, **self.defaults, **called})
        for name in self.names_of_null(created):
            # With None, a column would get its default, or JSON's null, and the next search would
            # not find the object.
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
                if values.get(attribute.key) is None and may_store_none_otherwise(attribute):
                    yield attribute.key

    def is_gone(self, refusal: exc.DBAPIError) -> bool:
        """Tell whether the conflicting row is gone, so that it makes sense to try again.

        The conflicting row has the values of the new row in all columns of a unique constraint. If
        these columns include all that is searched for, the search after the INSERT should have
        found the row.

        :param refusal: The error of the flush.
        """
        if is_serialization_failure(refusal):
            return True
        columns = columns_in_the_way(refusal, self.mapper.tables)
        searched = [[*self.names_of(name)] for name in self.filters]
        return all(searched) and all(
            columns.intersection(self.mapper.column_attrs[own].columns)
            for names in searched
            for own in names
        )

    def raise_if_unseen(self, refusal: exc.DBAPIError) -> None:
        """Raise a serialization failure if this transaction can't see the conflicting row.

        The server can tell: the refused INSERT is sent again with ON CONFLICT DO NOTHING. At
        REPEATABLE READ and SERIALIZABLE, this INSERT fails if the conflicting row can't be seen.

        :param refusal: The error of the flush.
        """
        statement = refusal.statement
        if self.refused is None or not statement or statement.lstrip()[:6].upper() != "INSERT":
            return
        savepoint = self.session.begin_nested()
        try:
            connection = self.connection_of(self.refused, savepoint)
            if connection.dialect.name == "postgresql":
                parameters: Any = refusal.params
                connection.exec_driver_sql(passing_over(statement), parameters)
        except exc.DBAPIError as error:
            if is_serialization_failure(error):
                raise
        finally:
            savepoint.rollback()

    def connection_of(self, created: T, transaction: SessionTransaction) -> Any:
        """Return the connection that a flush writes the object with, asked for as a flush does."""
        ask = self.session.connection_callable
        if ask is not None:
            return ask(self.mapper.base_mapper, created)
        return transaction.connection(self.mapper.base_mapper)
