"""The objects related to an object that is stored while they stay pending."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from sqlalchemy.orm.collections import collection_adapter

from .._core.describe import state_of
from .._core.sqlalchemy_private import forget_addition


def related_objects(instance: object, name: str | None = None) -> Iterator[Any]:
    """Yield the objects that were put into the relationships of an object that is not flushed."""
    state = state_of(instance)
    for relationship in state.mapper.relationships:
        if name in (None, relationship.key):
            for other in state.attrs[relationship.key].history.added or ():
                if other is not None:
                    yield other


def backrefs(new: object) -> Iterator[tuple[object, str, object]]:
    """Yield what backrefs have changed: a related object, its attribute, and the new object."""
    for relationship in state_of(new).mapper.relationships:
        if relationship.back_populates:
            for other in related_objects(new, relationship.key):
                yield other, relationship.back_populates, new


def note_as_stored(other: object, name: str, new: object) -> None:
    """Note that an object in a relationship is stored, so that no flush stores it again."""
    state = state_of(other)
    forget_addition(other, name, new)
    before: Any = state.committed_state.get(name)
    if isinstance(before, list):  # a collection that is loaded
        cast("list[object]", before).append(new)
    else:
        _forget_dynamic(before, new)


def take_out(other: object, name: str, new: object) -> None:
    """Take an object out of a relationship without an event, as if it had never been there."""
    state = state_of(other)
    forget_addition(other, name, new)
    value: Any = state.dict.get(name)
    if value is new:
        del state.dict[name]
        if state.persistent:
            assert state.session is not None
            state.session.expire(other, [name])
    elif value is None or not state.mapper.relationships[name].uselist:
        return
    elif not _forget_dynamic(state.committed_state.get(name), new):
        adapter = collection_adapter(value)
        if any(item is new for item in adapter):
            adapter.remove_without_event(new)


def _forget_dynamic(history: Any, new: object) -> bool:
    """Take an object out of the pending additions to a "dynamic" or "write_only" collection."""
    added = getattr(history, "added_items", None)
    if added is None:
        return False
    if new in added:
        added.remove(new)
    return True
