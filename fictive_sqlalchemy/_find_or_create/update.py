"""One call of ``update_or_create()``: what it changes of the object that it finds.

If two calls run at the same time, one is the last, and the row gets all values of the last call.
Inside a transaction, the search locks the row. Outside, one UPDATE sets each column that the
defaults name, even if the value stays the same. Otherwise one call could set one column, the other
call could set another, and the row would be a mixture of both.

Whether there is something to change depends on the row, and not on the values that the session
remembers. SQLAlchemy does not overwrite loaded attributes, so the SELECT reads the columns twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar

from sqlalchemy import ClauseElement, exc
from sqlalchemy.orm import (
    ColumnProperty,
    CompositeProperty,
    RelationshipProperty,
    Session,
)
from sqlalchemy.orm.attributes import flag_modified, set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from .._core.attributes import attribute_of, columns_of
from .._core.describe import listed, state_of
from .._core.errors import see
from .._core.session import OptInSession
from .attempt import Attempt
from .find import MOST_IN_VAIN, FindOrCreate
from .refusals import is_serialization_failure
from .values import is_function

T = TypeVar("T")

_NOT_LOADED = object()

#: How often an UPDATE may fail because of concurrent transactions. If there are many of them, most
#: may fail each time that one succeeds. There is a limit, because a trigger may raise that error.
_MOST_CONFLICTS = 1000


class UpdateOrCreate(FindOrCreate[T]):
    """One call of ``update_or_create()``: its search, and its changes or its new object.

    :param updates: The values for an object that is found.
    :param create_defaults: The values for a new object; with ``None``, these are ``updates``.
    """

    CALL = "update_or_create()"

    def __init__(
        self,
        session: Session,
        model: type[T],
        filters: Mapping[str, Any],
        updates: Mapping[str, Any],
        create_defaults: Mapping[str, Any] | None,
    ) -> None:
        creates = updates if create_defaults is None else create_defaults
        super().__init__(session, model, filters, creates)
        self.updates = updates
        self.names: list[str] = []
        """The column attributes that the updates set."""
        self.row: dict[str, Any] = {}
        """The values of these attributes, and the version, in the row that was found."""
        self.in_vain: list[Any] = []
        """The key and the version of a row, once for each UPDATE in succession that missed it."""
        self.conflicts = 0
        """How often an UPDATE has failed because of a concurrent transaction."""

    # -- before anything is sent ---------------------------------------------------------------

    def check(self) -> None:
        super().check()
        name = self.model.__name__
        twice = [key for key in self.updates if self.is_searched(key)]
        if twice:
            self.refuse_to_change(twice)
        unknown = [key for key in self.updates if not hasattr(self.model, key)]
        if unknown:
            raise exc.InvalidRequestError(
                f"{name} has no attribute {listed(unknown)} that can be set on an existing "
                "object: put values that only the constructor takes into create_defaults. Nothing "
                "was sent." + see("what-is-updated")
            )
        for key in self.updates:
            if reason := self.why_not(key):
                raise exc.InvalidRequestError(
                    f"{name}.{self.CALL} can't change {key!r} of an object that is found: it "
                    f"{reason}. Nothing was sent." + see("what-is-updated")
                )
        self.check_related(self.updates)
        self.names = [*dict.fromkeys(key for name in self.updates for key in self.names_of(name))]

    def refuse_to_change(self, names: list[str]) -> NoReturn:
        """Refuse to change attributes that are searched for."""
        raise exc.ArgumentError(
            f"{self.model.__name__}.{self.CALL} searches for {listed(names)}, and can't change it, "
            "too: the next call would not find the object again. Leave it out of the defaults, or "
            "find the object with filter_by() and change it." + see("what-is-updated")
        )

    def why_not(self, name: str) -> str | None:
        """Say why an attribute can't be changed; ``None`` if it can."""
        attribute = attribute_of(self.mapper, name)
        if isinstance(attribute, ColumnProperty):
            columns = columns_of(attribute)
            if not columns:
                return "is a SQL expression, which has no value to set"
            if any(column.computed is not None for column in columns):
                return "is computed by the database"
        for key in self.names_of(name):
            if any(one in self.mapper.primary_key for one in self.mapper.column_attrs[key].columns):
                return "is part of the primary key; a new object gets it from create_defaults"
        return None

    # -- what is done --------------------------------------------------------------------------

    def find_and_update(self) -> tuple[T, bool]:
        """Find the object and update it, or create it.

        :returns: The object, and whether this call has created it.
        """
        if isinstance(self.session, OptInSession):
            self.session.read_from_primary()  # a replica may not have the row's last version yet
        while True:
            found = self.find()
            if found is None:
                found, is_created = self.create()
                if is_created:
                    return found, True
            if self.update(found):
                return found, False

    def find(self) -> T | None:
        statement = self.statement()
        columns = [*self.names, *self.name_of_version()]
        statement = statement.add_columns(*(getattr(self.model, name) for name in columns))
        if self.is_locking() and (tables := self.tables()):
            # This is the lock of an UPDATE: rows that refer to this row may be stored meanwhile.
            statement = statement.with_for_update(key_share=True, of=tables)
        # An object may have several rows, because of joinedload(). unique() can't hash JSON values.
        rows = self.session.execute(statement).unique(lambda row: id(row[0]))
        row = rows.one_or_none()
        if row is None:
            return None
        found, *values = row
        self.row = dict(zip(columns, values, strict=True))
        return found  # type: ignore[no-any-return]

    def is_locking(self) -> bool:
        """Tell whether the search is part of a transaction, as it always is on a stock bind."""
        session = self.session
        if not isinstance(session, OptInSession) or session.is_inside:
            return True
        return not self.is_on_ours(session)

    def tables(self) -> list[Any]:
        """Return the tables whose rows are locked. Other tables may be outer joins."""
        own = {mapper.local_table for mapper in self.mapper.iterate_to_root()}
        return [table for table in self.mapper.tables if table in own]

    def name_of_version(self) -> list[str]:
        """Return the name of the attribute that counts the versions of a row, if there is one."""
        column = self.mapper.version_id_col
        return [] if column is None else [self.mapper.get_property_by_column(column).key]

    def update(self, found: T) -> bool:
        """Update the object with one UPDATE, or send nothing if it has the values.

        :param found: The object that the search has found.
        :returns: Whether the update is done. If not, another transaction has been faster, and the
            search has to be repeated.
        """
        session = self.session
        if found in session.deleted:
            raise exc.InvalidRequestError(
                f"The {type(found).__name__} that was found is deleted in this session, but its "
                "row is not deleted yet: call flush() or commit() first. Nothing was stored."
                + see("deleted-object")
            )
        self.refresh(found)
        if isinstance(session, OptInSession) and self.is_outside():
            return self.update_outside(session, found)
        return self.update_inside(found)

    def update_outside(self, session: OptInSession, found: T) -> bool:
        """Update the object in a transaction of its own."""
        was_modified = session.is_modified(found)
        try:
            Attempt(session, self.CALL).change(
                found, partial(self.new_values, found), partial(self.set_values, found)
            )
        except StaleDataError:
            if was_modified or self.is_in_vain(found):
                raise
            return False
        except exc.DBAPIError as error:
            self.conflicts += 1
            if not is_serialization_failure(error) or self.conflicts >= _MOST_CONFLICTS:
                raise
            return False
        return True

    def update_inside(self, found: T) -> bool:
        """Update the object in the transaction. An error undoes the update alone."""
        values = self.new_values(found)
        if not values:
            return True
        # This flushes pending changes. An error of this flush is raised unchanged.
        savepoint = self.session.begin_nested()
        try:
            with savepoint:
                self.set_values(found, values)
        except StaleDataError:
            if self.is_in_vain(found):
                raise
            return False
        return True

    def is_in_vain(self, found: T) -> bool:
        """Tell whether another attempt makes no sense after an UPDATE that found no row."""
        row = [state_of(found).key, *(self.row[name] for name in self.name_of_version())]
        if row not in self.in_vain:
            self.in_vain = []
        self.in_vain.append(row)
        return len(self.in_vain) >= MOST_IN_VAIN

    # -- the values ----------------------------------------------------------------------------

    def refresh(self, found: T) -> None:
        """Set the attributes to the values of the row, except for those with pending changes."""
        state = state_of(found)
        is_modified = self.session.is_modified(found)
        refreshed: list[str] = []
        for name, value in self.row.items():
            # Pending changes keep the version that the session knows: if the row has another
            # version, the UPDATE is refused.
            if is_modified and (self.is_pending(found, name) or name in self.name_of_version()):
                continue
            if not self.is_same(name, state.dict.get(name, _NOT_LOADED), value):
                set_committed_value(found, name, value)
                self.forget_made_of(found, name)
                refreshed.append(name)
        if refreshed:
            # SQLAlchemy sends this event, too: sqlalchemy.ext.mutable needs it for a new value.
            state.manager.dispatch.refresh(state, None, refreshed)

    def forget_made_of(self, found: T, name: str) -> None:
        """Forget the composite value, and the related object, that belong to an older value.

        :param name: The column attribute whose value has been set.
        """
        for composite in self.mapper.composites:
            if any(part.key == name for part in composite.props):
                state_of(found).dict.pop(composite.key, None)
        for relationship in self.mapper.relationships:
            is_of_it = any(own == name for own, _ in self.pairs(relationship))
            if is_of_it and not self.is_pending(found, relationship.key):
                self.session.expire(found, [relationship.key])

    def new_values(self, found: T) -> dict[str, Any]:
        """Call the functions among the updates; return the values that the object does not have."""
        called = {key: value() for key, value in self.updates.items() if is_function(value)}
        self.check_related(called)
        values = {**self.updates, **called}
        values = {key: value for key, value in values.items() if not self.has(found, key, value)}
        wrong = [key for key, value in values.items() if self.is_another_search(key, value)]
        if wrong:
            self.refuse_to_change(wrong)
        return values

    def is_another_search(self, name: str, value: Any) -> bool:
        """Tell whether a related object would change an attribute that is searched for."""
        attribute = attribute_of(self.mapper, name)
        if not isinstance(attribute, RelationshipProperty):
            return False
        copied = self.copied(attribute, value) or {}
        return any(
            own in self.searched and not self.is_same(own, self.row[own], copy)
            for own, copy in copied.items()
        )

    def has(self, found: T, name: str, value: Any) -> bool:
        """Tell whether an attribute has a value already, and no other value is pending."""
        attribute = attribute_of(self.mapper, name)
        if attribute is None or self.is_pending(found, attribute.key):
            return False
        values = state_of(found).dict
        if isinstance(attribute, ColumnProperty):
            return self.is_same(attribute.key, values.get(attribute.key, _NOT_LOADED), value)
        if isinstance(attribute, RelationshipProperty):
            pairs = self.pairs(attribute)
            if not pairs or any(self.is_pending(found, own) for own, _ in pairs):
                return False
            return self.copied(attribute, value) == {own: values.get(own) for own, _ in pairs}
        if isinstance(attribute, CompositeProperty):
            if any(self.is_pending(found, part.key) for part in attribute.props):
                return False
            return (getattr(found, attribute.key) == value) is True
        return False

    def copied(self, relationship: RelationshipProperty[Any], value: Any) -> dict[str, Any] | None:
        """Return what a flush would copy from a related object; ``None`` if that is not known."""
        pairs = self.pairs(relationship)
        if value is None or not pairs:
            return {own: None for own, _ in pairs}
        state = state_of(value)
        if state.identity is None:
            return None
        key_of = state.mapper.get_property_by_column
        key = [key_of(column).key for column in state.mapper.primary_key]
        # The key is known even if the object is expired.
        values = {**dict(zip(key, state.identity, strict=True)), **state.dict}
        if not all(other in values for _, other in pairs):
            return None
        return {own: values[other] for own, other in pairs}

    def is_pending(self, found: T, name: str) -> bool:
        """Tell whether an attribute has a pending change. Sends nothing."""
        attributes = state_of(found).attrs
        return name in attributes and attributes[name].history.has_changes()

    def is_same(self, name: str, one: Any, other: Any) -> bool:
        """Tell whether two values of a column are known to be the same; SQL expressions are not."""
        for value in (one, other):
            if value is _NOT_LOADED or isinstance(value, ClauseElement):
                return False
            if hasattr(value, "__clause_element__"):
                return False
        # SQLAlchemy compares in the same way. If the result is neither True nor False, as for an
        # array of a library, the values count as different.
        return self.mapper.column_attrs[name].columns[0].type.compare_values(one, other) is True

    def set_values(self, found: T, values: Mapping[str, Any]) -> None:
        """Set the values so that one UPDATE sets all columns of the defaults, or none is sent.

        :param found: The object.
        :param values: The values that the object does not have, by the names of attributes.
        """
        state = state_of(found)
        for name in self.names:
            if self.is_pending(found, name):  # the pending value gives way to the new value
                set_committed_value(found, name, self.row[name])
        for name, value in values.items():
            setattr(found, name, value)
            attribute = attribute_of(self.mapper, name)
            if isinstance(attribute, RelationshipProperty):
                # SQLAlchemy may see no change, because the session remembers another row.
                for own, copy in (self.copied(attribute, value) or {}).items():
                    if not self.is_pending(found, attribute.key) and state.dict.get(own) != copy:
                        setattr(found, own, copy)
        if self.session.is_modified(found):
            for name in self.names:
                if name in state.dict and not self.is_pending(found, name):
                    flag_modified(found, name)
