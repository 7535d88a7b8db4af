"""The mapped attributes of an object: their lookup by name, and their values before an update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import Column
from sqlalchemy.orm import (
    ColumnProperty,
    InstanceState,
    Mapper,
    MapperProperty,
    RelationshipProperty,
    SynonymProperty,
)
from sqlalchemy.orm.attributes import flag_modified, set_attribute, set_committed_value
from sqlalchemy.orm.collections import collection_adapter

from .describe import state_of

_NOT_LOADED = object()


def attribute_of(mapper: Mapper[Any], name: str) -> MapperProperty[Any] | None:
    """Return the mapped attribute that a name or a synonym stands for.

    :returns: ``None`` if the name is not mapped, such as the name of a hybrid property.
    """
    attribute = mapper.attrs.get(name)
    while isinstance(attribute, SynonymProperty):
        attribute = mapper.attrs.get(attribute.name)
    return attribute


def columns_of(attribute: ColumnProperty[Any]) -> list[Column[Any]]:
    """Return the columns of a mapped attribute, without SQL expressions."""
    return [column for column in attribute.columns if isinstance(column, Column)]


class AttributeSnapshot:
    """The values of an object before an update, to restore them if the update fails.

    :param instance: The object.
    :param changes: The new values by name. A collection that the update replaces is loaded now.
    """

    def __init__(self, instance: object, changes: Mapping[str, Any]) -> None:
        self.instance = instance
        self.state = state_of(instance)
        # Mapped expressions that are no attributes, such as that of polymorphic_on, are left out.
        attributes = self.state.mapper.column_attrs
        self.columns = [each.key for each in attributes if each.key in self.state.attrs]
        self.relationships = self.state.mapper.relationships
        self.others: list[tuple[InstanceState[Any], str, Any]] = []
        self.given: set[str] = set()
        """The names of the attributes that get new values."""
        for name, value in changes.items():
            attribute = attribute_of(self.state.mapper, name)
            if attribute is not None:
                self.given.add(attribute.key)
            if isinstance(attribute, RelationshipProperty):
                self.note_others(attribute, value)
        self.values = dict(self.state.dict)
        self.changed = self.find_changed()

    def note_others(self, relationship: RelationshipProperty[Any], value: Any) -> None:
        """Note the back references of the objects that a relationship is about to get."""
        others: Any = [value]
        if relationship.uselist:
            getattr(self.instance, relationship.key)
            others = value.values() if isinstance(value, Mapping) else value  # pyright: ignore
        back = relationship.mapper.relationships.get(relationship.back_populates or "")
        if back is None or back.uselist or not isinstance(others, Collection):
            return
        for other in others:  # pyright: ignore[reportUnknownVariableType]
            if isinstance(other, relationship.mapper.class_):
                state = state_of(other)
                self.others.append((state, back.key, state.dict.get(back.key, _NOT_LOADED)))

    def find_changed(self) -> set[str]:
        """Return the names of the attributes with pending changes. Sends nothing."""
        attributes = self.state.attrs
        mapped = [*self.columns, *self.relationships.keys()]
        return {name for name in mapped if attributes[name].history.has_changes()}

    def put_back(self) -> None:
        """Restore the values of the object's attributes, and which changes were pending."""
        now = self.state.dict
        changed = self.find_changed()
        for name in [*now]:
            if name in self.values:
                continue
            if name not in self.columns and name not in self.relationships:
                del now[name]  # a composite, or an attribute that a setter has set
            elif name in changed or name in self.given:
                if name in self.relationships:  # the other side has changed, too
                    self.take_out(name)
                _forget(self.state, name)
        for name, value in self.values.items():
            if name in now and now[name] is value:
                continue
            if name in self.columns or name in self.relationships:
                # set_attribute() changes the other side of a relationship, too, and notifies a
                # Mutable. If a validator refuses the value, the value is set below, without events.
                with suppress(Exception):
                    set_attribute(self.instance, name, value)
            if name in self.columns and name not in self.changed:
                set_committed_value(self.instance, name, value)
            elif name not in self.relationships:
                now[name] = value
        for state, name, value in self.others:
            if value is _NOT_LOADED:
                _forget(state, name)
            elif state.dict.get(name) is not value:
                set_attribute(state.object, name, value)
        # If COMMIT failed after a flush, SQLAlchemy no longer knows that the changes are pending.
        for name in self.changed - self.find_changed():
            if name in now:
                flag_modified(self.instance, name)

    def take_out(self, name: str) -> None:
        """Remove what the update has put into a relationship that was not loaded before."""
        if not self.relationships[name].uselist:
            set_attribute(self.instance, name, None)
            return
        adapter = collection_adapter(self.state.dict[name])
        for item in self.state.attrs[name].history.added:
            adapter.remove_with_event(item)


def _forget(state: InstanceState[Any], name: str) -> None:
    """Expire an attribute, so that it is loaded at its next use."""
    if state.session is not None and state.persistent:
        state.session.expire(state.object, [name])
