"""Find the lines that mean something else in the strict mode, while an application runs.

A session with ``begin_on_write=True`` has one transaction from the first write to ``commit()``,
``rollback()`` or ``close()``. In the strict mode, each write outside a block is stored at once. So
later calls decide whether a write is a difference: the writes of a transaction are noted, and it is
decided at the end of the transaction which of them are reported. Code inside a block, or inside a
savepoint, means the same in both modes.

:class:`Watch` listens to SQLAlchemy's events, and is the :class:`.Observer` of the core.
"""

from __future__ import annotations

import dis
from bisect import bisect
from collections.abc import Callable
from enum import Enum
from functools import partial
from itertools import zip_longest
from types import FrameType
from typing import Any, NamedTuple

from sqlalchemy import Column, event
from sqlalchemy.orm import ColumnProperty, Session, SessionTransaction

from . import observing
from .blocks import Block, OptInSavepoint, OptInSessionTransaction
from .places import Caller, calling, is_within
from .states import SessionStates

# With these functions SQLAlchemy sends SAVEPOINT, RELEASE and ROLLBACK TO as statements.
_SAVEPOINTS = frozenset({"do_savepoint", "do_release_savepoint", "do_rollback_to_savepoint"})

# After one of these instructions, Python never goes on with the instruction below.
_LEAVES = frozenset(
    {
        *("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"),
        *("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"),
    }
)

# The greatest number of places that is noted for one transaction.
_MOST_PLACES = 1000


class Kind(Enum):
    """The kind of a difference."""

    READ = "read"
    """A read flushes pending changes, and would not flush them in the strict mode."""

    FLUSH = "flush"
    """A flush would be stored at once in the strict mode."""

    WRITE = "write"
    """A statement that writes would be stored at once in the strict mode."""

    SAVEPOINT = "savepoint"
    """``begin_nested()`` outside a transaction would be stored at its end in the strict mode."""

    LOCK = "lock"
    """``with_for_update`` outside a transaction would be refused in the strict mode."""

    ROLLBACK = "rollback"
    """``rollback()`` would not undo earlier flushes and statements in the strict mode."""

    COMMIT = "commit"
    """``commit()`` inside a block would be refused in the strict mode."""

    PASSED_OVER = "passed over"
    """In the strict mode, a read has not flushed pending changes. SQLAlchemy would have."""

    CONNECTION = "connection"
    """A session is bound to the user's ``Connection``, and works as SQLAlchemy's in both modes."""


_WRITES = (Kind.FLUSH, Kind.WRITE, Kind.SAVEPOINT)
_FLUSHES = (Kind.READ, Kind.FLUSH)


class Difference(NamedTuple):
    """A difference that was found at one line of the application."""

    kind: Kind
    caller: Caller
    detail: str = ""


class _Noted(NamedTuple):
    kind: Kind
    caller: Caller
    end: Caller
    """The line at which the write would be stored: the end of a savepoint, or else the caller."""
    detail: str


class _Notes:
    """The notes about a transaction that a write has begun."""

    def __init__(self) -> None:
        self.found: dict[Any, _Noted] = {}
        self.writes = 0
        """How many calls would have been transactions of their own in the strict mode."""
        self.waits = False
        """Whether ``commit()`` would store something else that would still be pending."""
        self.flush_writes = False
        """Whether the flush that is under way, if any, has sent something."""
        self.call: FrameType | None = None
        """The last call that was noted."""
        self._key: Any = None
        self._before: _Noted | None = None

    def add(self, kind: Kind, caller: Caller, end: Caller | None = None, detail: str = "") -> None:
        """Note a place. Each call is noted once: as a write or lock, or else as a flush."""
        if caller.call is self.call:
            if kind in _FLUSHES or self._key[0] not in _FLUSHES:
                return
            self.take_back(self.call)
        key = kind, _key(caller)
        if key not in self.found and len(self.found) >= _MOST_PLACES:
            return
        self.call, self._key, self._before = caller.call, key, self.found.get(key)
        without = caller._replace(call=None)
        stored = end._replace(call=None) if end else without
        self.found[key] = _Noted(kind, without, stored, detail)
        if kind in _WRITES:
            self.writes += 1
            self.waits = False

    def take_back(self, call: FrameType | None) -> None:
        """Forget a call, if it was the last one. An earlier note about its line is kept."""
        if call is None or call is not self.call:
            return
        self.call = None
        self.writes -= self._key[0] in _WRITES
        if self._before is None:
            self.found.pop(self._key)
        else:
            self.found[self._key] = self._before


class _SavepointNotes:
    """The notes about an outermost savepoint in a transaction that a write has begun."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.is_used = False
        """Whether the savepoint has written or locked."""


class Watch:
    """Finds the differences between :meth:`begin` and :meth:`end`.

    :param tell: A function that is called with each difference, in the thread that has found it.
    """

    def __init__(self, tell: Callable[[Difference], object]) -> None:
        self._tell = tell

    def begin(self) -> None:
        """Listen to SQLAlchemy's events, and become the observer of the core."""
        for name, method in self._listeners():
            event.listen(SessionStates, name, method)
        observing.observer = self

    def end(self) -> None:
        """Stop listening to SQLAlchemy's events and observing the core."""
        observing.observer = None
        for name, method in self._listeners():
            event.remove(SessionStates, name, method)

    def _listeners(self) -> tuple[tuple[str, Callable[..., None]], ...]:
        return (
            ("after_flush", self.flushed),
            ("after_transaction_create", self.transaction_created),
            ("after_transaction_end", self.transaction_ended),
        )

    # Methods that the core calls

    def statement_writes(
        self, session: SessionStates | None, *, only_locks: bool
    ) -> Callable[[], object] | None:
        if session is None or (notes := self._notes(session)) is None:
            return None
        caller = calling()
        if not _SAVEPOINTS.isdisjoint(name for _, name in caller.way):
            return None
        if isinstance(notes, _SavepointNotes):
            notes.is_used = True
            return None
        if is_within("flush", session):
            notes.flush_writes = True
            return None
        if is_within("commit", session.noted_transaction()):  # a listener to commit
            notes.waits = True
            return None
        notes.add(Kind.LOCK if only_locks else Kind.WRITE, caller)
        # A lock that has failed stays noted, because the strict mode would refuse it.
        return None if only_locks else partial(notes.take_back, caller.call)

    def read_passes_over(self, session: SessionStates) -> None:
        caller = calling()
        module, name = caller.way[2] if len(caller.way) > 2 else ("", "")
        if (
            not module.startswith("sqlalchemy.orm.")
            or module == "sqlalchemy.orm.scoping"  # the application itself has read it
            or name == "no_autoflush"
            or _is_of_one_row(caller.attribute)
        ):
            return
        if changed := _changed_classes(session):
            self._tell(Difference(Kind.PASSED_OVER, caller, changed))

    def flush_fails(self, session: SessionStates) -> None:
        if not session.begins_on_write or not session.is_on_ours():
            return
        caller = calling()
        if _is_inside_block(session):
            if caller.place.call == "commit":
                self._tell(Difference(Kind.COMMIT, caller))
            return
        root = session.noted_transaction()
        if (
            session.writing_call is None  # before a write, a flush fails in both modes
            and not session.in_nested_transaction()
            and (root is None or root.begun_at is not None or not session.is_inside)
            and _kind_of_flush(caller.way) is Kind.READ
            and not _is_before_write(caller.way)
        ):
            self._tell(Difference(Kind.READ, caller, "and the flush fails"))

    def runs_on_connection(self) -> None:
        self._tell(Difference(Kind.CONNECTION, calling()))

    # Methods that SQLAlchemy calls

    def flushed(self, session: SessionStates, _: object) -> None:
        """Note a flush that has sent something."""
        notes = self._notes(session)
        if isinstance(notes, _SavepointNotes):
            notes.is_used = True
            return
        if notes is None or not notes.flush_writes:
            return
        notes.flush_writes = False
        caller = calling()
        kind = _kind_of_flush(caller.way)
        if kind is None or is_within("commit", session.noted_transaction()):
            notes.waits = True
            return
        if kind is Kind.FLUSH:
            notes.add(kind, caller)
        else:
            notes.add(kind, caller, detail=_changed_classes(session))
            notes.waits = True

    def transaction_created(self, session: Session, transaction: SessionTransaction) -> None:
        """Note the line that sets a savepoint, if it would be a transaction in the strict mode."""
        parent = transaction.parent
        if (
            isinstance(transaction, OptInSavepoint)
            and isinstance(parent, OptInSessionTransaction)
            and parent.begun_at is not None
        ):
            transaction.notes = _SavepointNotes(calling()._replace(call=None))

    def transaction_ended(self, session: SessionStates, transaction: SessionTransaction) -> None:
        """Decide which notes about a transaction or a savepoint are differences."""
        if isinstance(transaction, OptInSavepoint):
            notes: Any = transaction.notes
            root = transaction.parent
            if notes is None or not isinstance(root, OptInSessionTransaction):
                return
            if notes.is_used and transaction.is_committed and root.joined:
                if is_within("commit", root):
                    _notes_of(root).waits = True
                    return
                own: str = notes.caller.place.call
                kind = Kind.SAVEPOINT if own == "begin_nested" else Kind.WRITE
                end = calling()
                _notes_of(root).add(kind, notes.caller._replace(call=end.call), end)
        elif isinstance(transaction, OptInSessionTransaction):
            if (
                session.begins_on_write
                and _is_inside_block(session)
                and (transaction.has_ours() or session.is_on_ours())
                and (end := calling()).place.call == "commit"
            ):
                self._tell(Difference(Kind.COMMIT, end))
            if isinstance(transaction.notes, _Notes):
                self._decide(transaction.notes, transaction.is_committed)
                transaction.notes = None

    def _decide(self, notes: _Notes, is_committed: bool) -> None:
        end = calling()
        if is_committed and end.call is notes.call:  # as in save(), which writes and commits
            notes.take_back(end.call)
            notes.waits = True
        writes = [noted for noted in notes.found.values() if noted.kind in _WRITES]
        is_alone = (
            is_committed
            and notes.writes == len(writes) == 1
            and not notes.waits
            and _follows(writes[0].end, end)
        )
        for noted in notes.found.values():
            if not is_alone or noted is not writes[0]:
                self._tell(Difference(noted.kind, noted.caller, noted.detail))
        if writes and not is_committed and end.place.call == "rollback":
            first = writes[0].caller
            where = f"line {first.place.line}"
            if first.place.filename != end.place.filename:
                where = f"{first.place.filename}, {where}"
            self._tell(Difference(Kind.ROLLBACK, end, f"{first.called} in {where}"))

    def _notes(self, session: SessionStates) -> _Notes | _SavepointNotes | None:
        """Return the notes about the transaction or savepoint that a statement now belongs to.

        :returns: ``None`` inside a block, and in a transaction of stock binds alone.
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


def _changed_classes(session: SessionStates) -> str:
    """Return the names of the classes that have objects with pending changes."""
    changed = filter(session.is_modified, session.dirty)
    classes = {type(one).__name__ for one in [*session.new, *changed, *session.deleted]}
    return ", ".join(sorted(classes)[:5])


def _is_of_one_row(attribute: Any) -> bool:
    """Tell whether an attribute loads the row of its object, and nothing else."""
    return isinstance(getattr(attribute, "property", None), ColumnProperty) and all(
        isinstance(column, Column) and column.server_onupdate is None
        for loaded in attribute.parent.column_attrs
        for column in loaded.columns
    )


def _is_inside_block(session: SessionStates) -> bool:
    """Tell whether a ``with`` block of the session was entered, and does not end right now."""
    entered = session.entered
    return isinstance(entered, Block) and entered.is_ended_inside()


def _key(caller: Caller) -> Any:
    return caller.place[:3], caller.called_from and caller.called_from[:3]


def _notes_of(root: OptInSessionTransaction) -> _Notes:
    if root.notes is None:
        root.notes = _Notes()
    notes: _Notes = root.notes
    return notes


def _kind_of_flush(way: tuple[tuple[str, str], ...]) -> Kind | None:
    """Tell whether a flush was an explicit one or an autoflush before a read.

    :param way: The functions that have led to the flush, from :class:`.Caller`.
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


def _is_before_write(way: tuple[tuple[str, str], ...]) -> bool:
    """Tell whether an INSERT, UPDATE or DELETE of the ORM has caused an autoflush."""
    return any(module == "sqlalchemy.orm.bulk_persistence" for module, _ in way)


def _follows(write: Caller, commit: Caller) -> bool:
    """Tell whether a commit follows a write with no other call between them.

    Then nothing can fail between the two, and the write is one transaction in both modes.
    """
    code = write.code
    if code is not commit.code:
        return False
    instructions = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
    ways = _ways(instructions)
    offsets = list(ways)
    begin, end = (offsets[bisect(offsets, one.offset) - 1] for one in (write, commit))
    lines = {write.place.line, commit.place.line}
    elsewhere = [range(start, stop) for start, stop, line in code.co_lines() if line not in lines]
    passed = _reachable(ways, begin, end)
    return (begin == end or end in passed) and not any(
        instruction.offset in passed
        and _runs_other_code(instruction)
        and any(instruction.offset in one for one in elsewhere)
        and end in _reachable(ways, instruction.offset, end)
        for instruction in instructions
    )


def _runs_other_code(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    return name.startswith(("CALL", "YIELD", "SEND")) and "INTRINSIC" not in name


def _ways(instructions: list[dis.Instruction]) -> dict[int, list[int]]:
    """Return for each instruction which ones may follow it, if no exception is raised."""
    ways: dict[int, list[int]] = {}
    for instruction, after in zip_longest(instructions, instructions[1:]):
        name, code = instruction.opname, instruction.opcode
        following: list[int] = []
        ways[instruction.offset] = following
        if (code in dis.hasjrel or code in dis.hasjabs) and not name.startswith("SETUP_"):
            following.append(instruction.argval)
        if after is not None and name not in _LEAVES:
            following.append(after.offset)
    return ways


def _reachable(ways: dict[int, list[int]], begin: int, end: int) -> set[int]:
    """Return the instructions that may be executed after one of them, up to another one."""
    found: set[int] = set()
    waiting = list(ways[begin])
    while waiting:
        offset = waiting.pop()
        if offset not in found:
            found.add(offset)
            if offset != end:
                waiting.extend(ways[offset])
    return found
