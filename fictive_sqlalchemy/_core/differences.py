"""What would mean something else in the strict mode: found while an application runs.

A session with ``begin_on_write=True`` has one transaction from the first write to ``commit()``,
``rollback()`` or ``close()``. In the strict mode each write outside a block is stored at once. So
what is different depends on what comes later: the writes of such a transaction are noted with it,
and it is decided at its end which of them are told. What is inside a block, or inside a savepoint,
means the same in both modes.

:class:`Watch` listens to SQLAlchemy's events, and is the :class:`.Observer` of the core.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.orm import ColumnProperty, Session, SessionTransaction

from . import observing
from .blocks import Block, OptInSavepoint, OptInSessionTransaction
from .places import Caller, calling, is_within
from .states import SessionStates

# With these SQLAlchemy sends SAVEPOINT, and the like, as a statement.
_SAVEPOINTS = frozenset({"do_savepoint", "do_release_savepoint", "do_rollback_to_savepoint"})

# How many places one transaction keeps at most.
_MOST_PLACES = 1000


class Kind(Enum):
    """What kind of difference it is."""

    READ = "read"
    """A read flushes what waits, and would not do so."""

    FLUSH = "flush"
    """A flush would be stored at once."""

    WRITE = "write"
    """A statement that writes would be stored at once."""

    SAVEPOINT = "savepoint"
    """``begin_nested()`` outside would be stored at its end."""

    LOCK = "lock"
    """``with_for_update`` outside would be refused."""

    ROLLBACK = "rollback"
    """``rollback()`` would not undo what was flushed or executed before."""

    COMMIT = "commit"
    """``commit()`` inside a block would be refused."""

    PASSED_OVER = "passed over"
    """In the strict mode: a read has not flushed what waits, and stock would have."""

    CONNECTION = "connection"
    """A session runs on a Connection of the user's own, where it is SQLAlchemy's in both modes."""


_WRITES = (Kind.FLUSH, Kind.WRITE, Kind.SAVEPOINT)


class Difference(NamedTuple):
    """What was found at one line of the application."""

    kind: Kind
    caller: Caller
    detail: str = ""


class _Noted(NamedTuple):
    kind: Kind
    caller: Caller
    end: Caller
    """Where it was stored: the end of a savepoint, otherwise the same."""


class _Notes:
    """What is noted of a transaction that a write has begun."""

    def __init__(self) -> None:
        self.found: dict[Any, _Noted] = {}
        self.writes = 0
        """How many calls would have been transactions of their own."""
        self.waits = False
        """Whether something else would be stored by ``commit()``, because it would still wait."""
        self._last: FrameType | None = None

    def add(
        self, kind: Kind, caller: Caller, end: Caller | None = None
    ) -> Callable[[], object] | None:
        """Note a place; return what takes that back."""
        key = _key(caller)
        known, writes = self.found.get(key), self.writes
        if kind in _WRITES:
            if caller.call is not self._last:  # a call may send several statements
                self.writes += 1
                self._last = caller.call
            self.waits = False
        if known is not None and kind in (Kind.READ, Kind.FLUSH):
            return None
        if known is None and len(self.found) >= _MOST_PLACES:
            return None
        without = caller._replace(call=None)
        self.found[key] = _Noted(kind, without, end._replace(call=None) if end else without)

        def take_back() -> None:
            self.writes = writes
            self._last = None
            if known is not None and known.kind in _WRITES:  # by an earlier call of the same line
                self.found[key] = known
            else:  # a flush before the statement has failed with it
                self.found.pop(key, None)

        return take_back


class _SavepointNotes:
    """What is noted of an outermost savepoint in such a transaction."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.has_written = False


class Watch:
    """Finds the differences while it is on.

    :param tell: Called with each difference, by the thread in which it was found.
    """

    def __init__(self, tell: Callable[[Difference], object]) -> None:
        self._tell = tell

    def begin(self) -> None:
        """Listen, and have the core call."""
        for name, method in self._listeners():
            event.listen(SessionStates, name, method)
        observing.observer = self

    def end(self) -> None:
        """Leave the core and SQLAlchemy as they were."""
        observing.observer = None
        for name, method in self._listeners():
            event.remove(SessionStates, name, method)

    def _listeners(self) -> tuple[tuple[str, Callable[..., None]], ...]:
        return (
            ("after_flush", self.flushed),
            ("after_transaction_create", self.transaction_created),
            ("after_transaction_end", self.transaction_ended),
        )

    # What the core calls

    def statement_writes(
        self, session: SessionStates | None, *, only_locks: bool
    ) -> Callable[[], object] | None:
        notes = None if session is None else self._notes(session)
        if notes is None:
            return None
        caller = calling()
        if not _SAVEPOINTS.isdisjoint(name for _, name in caller.way):
            return None
        if isinstance(notes, _SavepointNotes):
            notes.has_written = notes.has_written or not only_locks
            return None
        if is_within("flush"):
            return None
        take_back = notes.add(Kind.LOCK if only_locks else Kind.WRITE, caller)
        return None if only_locks else take_back  # a lock that fails would be refused, too

    def read_passes_over(self, session: SessionStates) -> None:
        caller = calling()
        module, name = caller.way[2] if len(caller.way) > 2 else ("", "")
        if (
            not module.startswith("sqlalchemy.orm.")
            or module == "sqlalchemy.orm.scoping"  # the application itself has asked
            or name == "no_autoflush"
            or isinstance(getattr(caller.attribute, "property", None), ColumnProperty)
        ):
            return
        classes = {type(one).__name__ for one in [*session.new, *session.dirty, *session.deleted]}
        self._tell(Difference(Kind.PASSED_OVER, caller, ", ".join(sorted(classes)[:5])))

    def runs_on_connection(self) -> None:
        self._tell(Difference(Kind.CONNECTION, calling()))

    # What SQLAlchemy calls

    def flushed(self, session: SessionStates, _: object) -> None:
        """Note a flush that has sent something."""
        notes = self._notes(session)
        if isinstance(notes, _SavepointNotes):
            notes.has_written = True
            return
        if notes is None:
            return
        caller = calling()
        kind = _kind_of_flush(caller.way)
        if kind is not None:
            notes.add(kind, caller)
        if kind is not Kind.FLUSH:
            notes.waits = True

    def transaction_created(self, session: Session, transaction: SessionTransaction) -> None:
        """Note where a savepoint is set that would be a transaction of its own."""
        parent = transaction.parent
        if (
            isinstance(transaction, OptInSavepoint)
            and isinstance(parent, OptInSessionTransaction)
            and parent.begun_at is not None
        ):
            transaction.notes = _SavepointNotes(calling()._replace(call=None))

    def transaction_ended(self, session: SessionStates, transaction: SessionTransaction) -> None:
        """Decide what of a transaction is a difference."""
        if isinstance(transaction, OptInSavepoint):
            notes: Any = transaction.notes
            root = transaction.parent
            if notes is None or not isinstance(root, OptInSessionTransaction):
                return
            if notes.has_written and transaction.is_committed and root.joined:
                own: str = notes.caller.place.call
                kind = Kind.SAVEPOINT if own == "begin_nested" else Kind.WRITE
                end = calling()
                _notes_of(root).add(kind, notes.caller._replace(call=end.call), end)
        elif isinstance(transaction, OptInSessionTransaction):
            entered = session.entered
            if (
                transaction.is_committed
                and isinstance(entered, Block)
                and entered.is_ended_inside()
                and session.begins_on_write
                and transaction.has_ours()
            ):
                self._tell(Difference(Kind.COMMIT, calling()))
            if isinstance(transaction.notes, _Notes):
                self._decide(transaction.notes, transaction.is_committed)
                transaction.notes = None

    def _decide(self, notes: _Notes, is_committed: bool) -> None:
        end = calling()
        writes = [noted for noted in notes.found.values() if noted.kind in _WRITES]
        is_alone = (
            is_committed
            and notes.writes == len(writes) == 1
            and not notes.waits
            and _follows(writes[0].end, end)
        )
        for noted in notes.found.values():
            if not is_alone or noted is not writes[0]:
                self._tell(Difference(noted.kind, noted.caller))
        if writes and not is_committed and end.place.call == "rollback":
            first = writes[0].caller
            where = f"line {first.place.line}"
            if first.place.filename != end.place.filename:
                where = f"{first.place.filename}, {where}"
            self._tell(Difference(Kind.ROLLBACK, end, f"{first.called} in {where}"))

    def _notes(self, session: SessionStates) -> _Notes | _SavepointNotes | None:
        """Return the notes of the transaction or savepoint that a statement now belongs to.

        :returns: ``None`` inside a block, and in a transaction that none of our binds has joined.
        """
        root: Any = session.noted_transaction()
        if root is None or root.begun_at is None or not root.joined:
            return None
        outermost: Any = session.get_nested_transaction()
        if outermost is None:
            return _notes_of(root)
        while isinstance(outermost.parent, OptInSavepoint):
            outermost = outermost.parent
        notes: _SavepointNotes | None = outermost.notes
        return notes


def _key(caller: Caller) -> Any:
    return caller.place[:3], caller.called_from and caller.called_from[:3]


def _notes_of(root: OptInSessionTransaction) -> _Notes:
    if root.notes is None:
        root.notes = _Notes()
    notes: _Notes = root.notes
    return notes


def _kind_of_flush(way: tuple[tuple[str, str], ...]) -> Kind | None:
    """Tell why a flush was made.

    :param way: The functions that have led to it, from :class:`.Caller`.
    :returns: ``None`` for the flush of a ``commit()``.
    """
    names = [name for _, name in way]
    if "commit" in names:
        return None
    if "begin_nested" in names:
        return Kind.FLUSH
    outermost = max((at for at, name in enumerate(names) if name == "flush"), default=-1)
    if outermost < 0 or outermost + 1 == len(way):
        return Kind.FLUSH
    module = way[outermost + 1][0]
    is_autoflush = module.startswith("sqlalchemy.") and module != "sqlalchemy.orm.scoping"
    return Kind.READ if is_autoflush else Kind.FLUSH


def _follows(write: Caller, commit: Caller) -> bool:
    """Tell whether a commit follows a write with no other call between them.

    Then nothing can fail between the two, and in both modes the write is one transaction.
    """
    code = write.code
    if code is not commit.code or write.offset > commit.offset:
        return False
    lines = {write.place.line, commit.place.line}
    between = {
        instruction.offset
        for instruction in dis.get_instructions(code)
        if write.offset < instruction.offset < commit.offset
        and instruction.opname.startswith("CALL")
        and "INTRINSIC" not in instruction.opname
    }
    return all(
        line in lines
        for start, end, line in code.co_lines()
        if any(start <= offset < end for offset in between)
    )
