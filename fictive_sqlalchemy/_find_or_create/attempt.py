"""One attempt to store an object outside a transaction, without other pending changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.orm import Session, make_transient, make_transient_to_detached

from .._core.attributes import AttributeSnapshot
from .._core.describe import state_of
from .._core.errors import see
from .._core.session import OptInSession
from .related import backrefs, note_as_stored, related_objects, take_out
from .values import mapped_state

T = TypeVar("T")


class Attempt(Collection[object]):
    """One attempt to store an object outside, without storing other pending changes.

    An attempt is the collection of the objects that it stores: the new or changed object, and
    objects that have become new, changed or deleted since, because of a constructor, a backref or a
    listener. A flush iterates over the collection after it has called the listeners. If the attempt
    fails, these objects are restored.

    :param session: The session, which is outside a transaction.
    :param call: The call that the attempt is part of, for errors.
    """

    def __init__(self, session: OptInSession, call: str) -> None:
        self.session = session
        self.call = call
        self.pending = self.all_pending()
        """The objects with changes that were pending before, and stay pending."""
        self.target: Any = None
        """The new or changed object."""
        self.seen: list[object] = []
        """The objects that were stored or that there was an attempt to store."""
        self.new: list[object] = []
        """The objects of ``seen`` that are new."""
        self.attached: list[object] = []
        """Stored objects that were in no session, and that the target has brought with it."""
        self.known: object = None
        """An object of the session with the same primary key, whose row was deleted elsewhere."""

    # -- the objects of the flush --------------------------------------------------------------

    def all_pending(self) -> Any:
        """Return the objects that a flush of everything would write."""
        return self.session.new | self.session.dirty | self.session.deleted

    def __iter__(self) -> Iterator[object]:
        since = self.all_pending() - self.pending
        for instance in since:
            if not any(instance is seen for seen in self.seen):
                self.seen.append(instance)
                if instance in self.session.new:
                    self.new.append(instance)
        yield self.target  # even if it is flushed: given no object, a flush writes everything
        yield from (instance for instance in since if instance is not self.target)

    def __contains__(self, instance: object) -> bool:
        return any(instance is other for other in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # -- the attempt ---------------------------------------------------------------------------

    def store(self, build: Callable[[], T]) -> T:
        """Construct a new object, store it with one flush, and return it.

        :param build: A function that constructs the object.
        """
        relations: list[tuple[object, str, object]] = []
        try:
            created = self.target = build()
            self.known = make_room(self.session, self.target)
            self.add()
            relations = [relation for new in self.new for relation in backrefs(new)]
            self.refuse_pending(relations)
            self.session.store_alone(self)
        except BaseException:
            self.undo(relations)
            raise
        self.note_as_stored(relations)
        return created if self.known is None else self.have_known_back()

    def change(
        self,
        instance: object,
        find_changes: Callable[[], Mapping[str, Any]],
        apply: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Change an object, and store it with one flush. Without a change, nothing is sent.

        :param instance: An object of the session, which is stored already.
        :param find_changes: A function that returns the changes, by the names of attributes.
        :param apply: A function that makes the changes. It is not called if there are none.
        """
        self.target = instance
        before: AttributeSnapshot | None = None
        relations: list[tuple[object, str, object]] = []
        try:
            changes = find_changes()
            if not changes:
                return
            before = AttributeSnapshot(instance, changes)
            self.note_detached(changes.values())
            apply(changes)
            if not any(map(self.has_changed, self)):
                return
            relations = [relation for one in (*self.new, instance) for relation in backrefs(one)]
            self.refuse_pending(relations)
            self.session.store_alone(self)
        except BaseException:
            if before is not None:
                before.put_back()
            self.undo(relations)
            raise
        self.note_as_stored(relations)

    def has_changed(self, instance: object) -> bool:
        """Tell whether a flush has something to send for an object."""
        session = self.session
        return (
            instance in session.new or instance in session.deleted or session.is_modified(instance)
        )

    def note_as_stored(self, relations: Iterable[tuple[object, str, object]]) -> None:
        """Note in the pending objects which of their related objects are stored already.

        :param relations: What backrefs have changed, see :func:`.backrefs`.
        """
        for other, name, stored in relations:
            if other in self.pending:  # the flush of the other object would store this one again
                note_as_stored(other, name, stored)

    def add(self) -> None:
        """Add the target to the session, with the related objects that the cascade reaches."""
        self.attached = self.stored_ones_with(self.target)
        self.session.add(self.target)
        list(self)  # so that __iter__() notes what is new

    def note_detached(self, values: Iterable[Any]) -> None:
        """Note the detached objects that join the session when the target gets these values."""
        for value in values:
            state = mapped_state(value)
            if state is not None and state.detached:
                self.attached += [value, *self.stored_ones_with(value)]

    def stored_ones_with(self, instance: object) -> list[object]:
        """Return the stored objects that come into the session together with an object."""
        session, state = self.session, state_of(instance)
        return [
            related
            for related, _, related_state, _ in state.mapper.cascade_iterator(
                "save-update", state, halt_on=lambda related: related.obj() in session
            )
            if related_state.has_identity
        ]

    def refuse_pending(self, relations: Iterable[tuple[object, str, object]]) -> None:
        """Refuse to go on if the target can't be stored without a pending new object."""
        stored = [*self.new, self.target]
        others = [other for one in stored for other in related_objects(one)]
        others += [other for other, _, _ in relations]
        for other in others:
            if other in self.pending and other in self.session.new:
                raise exc.InvalidRequestError(
                    f"The {type(self.target).__name__} takes along a {type(other).__name__} "
                    f"of this session, which is not stored yet, and {self.call} outside a "
                    "transaction stores no other pending object: put the call into `with "
                    "session.begin():`. Nothing was stored." + see("more-than-one-object")
                )

    def undo(self, relations: Iterable[tuple[object, str, object]]) -> None:
        """Restore the session and its objects to the state before the attempt.

        :param relations: What backrefs have changed, see :func:`.backrefs`.
        """
        session = self.session
        list(self)  # so that __iter__() notes what has become new meanwhile
        for other, name, new in relations:
            if other in self.pending or any(other is attached for attached in self.attached):
                take_out(other, name, new)
        session.let_go([*self.new, *(one for one in self.attached if one in session)])
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
        """Replace the target by the object that :func:`make_room` expunged, and return that one."""
        self.session.let_go([self.target])
        self.session.add(self.known)
        for instance in (self.known, *self.seen):
            if instance in self.session:
                self.session.expire(instance)
        return self.known


def make_room(session: Session, new: object) -> object | None:
    """Expunge the object of the session with the primary key of a new object, and return it.

    :param session: The session. A session of SQLAlchemy's own warns about such an object instead.
    :param new: The new object. A search has not found its row.
    """
    key = state_of(new).mapper.identity_key_from_instance(new)
    known: object = session.identity_map.get(key)
    if not isinstance(session, OptInSession) or known is new or known in session.deleted:
        return None
    if known is not None:
        session.let_go([known])
    return known
