"""One call of ``filter_by_or_create()``: its search, and its new object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any, Generic, TypeVar

from sqlalchemy import exc, null, select
from sqlalchemy.orm import Mapper, RelationshipDirection, Session, SessionTransaction, class_mapper
from sqlalchemy.orm.attributes import set_committed_value

from .._core.describe import listed, state_of
from .._core.errors import sqlstate
from .._core.session import OptInSession
from .._core.states import is_opt_in
from .attempt import Attempt
from .values import is_function, mapped_state, may_store_none_otherwise

T = TypeVar("T")

# https://www.postgresql.org/docs/current/errcodes-appendix.html
SERIALIZATION_FAILURE = "40001"
# A unique or an exclusion constraint: a row that is there already is in the way.
_TAKEN = ("23505", "23P01")


class FindOrCreate(Generic[T]):
    """One call: its search, and its new object."""

    CALL = "filter_by_or_create()"
    """The call, for errors."""

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

    def check(self) -> None:
        """Refuse what can't be searched for or stored, while nothing is sent."""
        self.check_names()
        self.check_related({**self.filters, **self.defaults})

    def check_names(self) -> None:
        """Refuse what the model does not have, while nothing is sent."""
        name = self.model.__name__
        if not self.filters:
            raise exc.ArgumentError(
                f"{name}.{self.CALL} has nothing to search for: name an attribute and its value, "
                "best one that is unique."
            )
        twice = [key for key in self.defaults if key in self.filters]
        if twice:
            raise exc.ArgumentError(
                f"{name}.{self.CALL} searches for {listed(twice)}, which a new object gets anyway: "
                "leave it out of the defaults."
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
            if name not in self.mapper.relationships or is_function(value):
                continue
            relationship = self.mapper.relationships[name]
            if relationship.viewonly:
                raise exc.InvalidRequestError(
                    f"{relationship} is viewonly, so it would not be stored: give the columns it "
                    "depends on instead. Nothing was stored."
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
                        f"{relationship} is a change to other rows, and {self.CALL} outside a "
                        "transaction writes one alone: put it into `with session.begin():`. "
                        "Nothing was stored."
                    )
                continue
            state = mapped_state(value)
            if state is None or state.key is not None:
                continue
            if self.is_outside(asks_for_bind=True):
                raise exc.InvalidRequestError(
                    f"The object given for {relationship} is not stored yet, and "
                    f"{self.CALL} outside a transaction writes one row alone: store it first, or "
                    "put both into `with session.begin():`. Nothing was stored."
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
        return not asks_for_bind or self.is_on_ours(session)

    def is_on_ours(self, session: OptInSession) -> bool:
        """Tell whether the bind of the model is an engine of ours, as far as is known."""
        if session.connection_callable is not None:
            return True  # with shards, each object may have another bind
        return is_opt_in(session.get_bind(mapper=self.mapper, clause=self.statement()))

    # -- what is done --------------------------------------------------------------------------

    def statement(self) -> Any:
        """Make the SELECT. Two rows are enough to know that there are too many."""
        return select(self.model).filter_by(**self.filters).limit(2)

    def find(self) -> T | None:
        """Search: one SELECT."""
        return self.session.scalars(self.statement()).unique().one_or_none()

    def create(self) -> tuple[T, bool]:
        """Create the object, or find what another has created meanwhile."""
        # If the model's bind is a stock one, the search has begun a transaction on it.
        if isinstance(self.session, OptInSession) and self.is_outside():
            return self.create_outside(self.session)
        return self.create_inside()

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
            created = Attempt(session, self.CALL).store(self.build)
            self.settle(created)
            return created, True
        except exc.DBAPIError as error:
            if not _is_taken(error) and sqlstate(error) != SERIALIZATION_FAILURE:
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
        called = {key: value() for key, value in self.defaults.items() if is_function(value)}
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
                if values.get(attribute.key) is None and may_store_none_otherwise(attribute):
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
            if sqlstate(error) == SERIALIZATION_FAILURE:
                raise
        finally:
            savepoint.rollback()

    def connection_of(self, created: T, transaction: SessionTransaction) -> Any:
        """Return the connection that a flush writes the object with, asked for as a flush does."""
        ask = self.session.connection_callable
        if ask is not None:
            return ask(self.mapper.base_mapper, created)
        return transaction.connection(self.mapper.base_mapper)


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
