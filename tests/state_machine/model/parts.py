"""What the model is made of: rows, objects, transactions and the database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

from tests.state_machine.tables import Extra, Item


class Row(NamedTuple):
    id: int
    name: str
    amount: int

    def changed(self, change: str | int | None) -> Row | None:
        """The row with another name, or another amount; or none at all."""
        if change is None:
            return None
        changes: dict[str, Any] = {"name" if isinstance(change, str) else "amount": change}
        return self._replace(**changes)


class Fails(Exception):
    """The operation has to fail, with one of these errors."""

    def __init__(self, *errors: type[Exception], disconnect: bool = False) -> None:
        self.errors = errors
        self.disconnect = disconnect


class RawCursorFailed(Exception):
    """The driver's own error, of a cursor that SQLAlchemy knows nothing of."""


#: What a statement of the unit of work may end in: a broken rule, a lock, a row that is gone.
WRITE_ERRORS = (exc.IntegrityError, exc.OperationalError, StaleDataError)

ABSENT = object()
ATTRIBUTES = Row._fields


@dataclass(eq=False)
class Thing:
    """One object."""

    real: Item | Extra
    id: int
    state: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attributes that are loaded or set."""
    old: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attributes that were set, each with its value before, ABSENT if that was not loaded."""
    modified: bool = False
    expired: bool = False
    gone: bool = False
    """Whether its DELETE was sent."""
    waits: bool = False
    """Whether its DELETE waits for a flush."""

    @property
    def is_extra(self) -> bool:
        return isinstance(self.real, Extra)

    def expire(self) -> None:
        self.values.clear()
        self.old.clear()
        self.modified = False
        self.expired = True

    def row(self) -> Row:
        return Row(self.id, self.values["name"], self.values["amount"])

    def fill(self, row: Row) -> None:
        """Load what is not loaded."""
        for name, value in row._asdict().items():
            if name not in self.old:
                self.values.setdefault(name, value)
        self.expired = False

    def overwrite(self, row: Row) -> None:
        self.old.clear()
        self.modified = False
        self.values.clear()
        self.fill(row)


@dataclass
class Level:
    """A transaction or a savepoint: what it has changed."""

    rows: dict[int, Row | None] = field(default_factory=dict[int, "Row | None"])
    extras: dict[int, Row | None] = field(default_factory=dict[int, "Row | None"])
    """The same on the second bind."""
    names: set[str] = field(default_factory=set[str])
    """Names it has written or written over: someone else who wants one has to wait."""
    locks: set[int] = field(default_factory=set[int])
    new: list[Thing] = field(default_factory=list["Thing"])
    dirty: list[Thing] = field(default_factory=list["Thing"])
    deleted: list[Thing] = field(default_factory=list["Thing"])
    inserted: list[int] = field(default_factory=list[int])
    """The rows for which a listener has called ``on_commit()``."""
    used: bool = False
    """Whether its SAVEPOINT is sent, which waits for a first statement."""
    used_second: bool = False
    """Whether the second bind has joined it."""
    failed: bool = False
    """Whether a flush has failed: SQLAlchemy has rolled it back and waits for its end."""
    held: Level | None = None
    """What it had changed when a savepoint in it was rolled back, which stays on the server: what
    fails after that gives up only what was done after that."""

    def forget_rows(self) -> None:
        """What a rollback does in the database, or the end of the server process."""
        self.rows.clear()
        self.names.clear()
        self.locks.clear()
        self.held = None

    def note_savepoint(self) -> None:
        """What the rollback of a savepoint in it does, which SQLAlchemy does not release."""
        self.held = Level(dict(self.rows), names=set(self.names), locks=set(self.locks))

    def fail(self) -> None:
        """What an error does in the database: others may have the rows that it gives up."""
        held = self.held
        self.forget_rows()
        if held is not None:
            self.absorb(held)

    def absorb(self, inner: Level) -> None:
        """What the release of a savepoint does."""
        self.rows.update(inner.rows)
        self.extras.update(inner.extras)
        self.names |= inner.names
        self.locks |= inner.locks
        self.inserted += inner.inserted
        for mine, its in (
            (self.new, inner.new),
            (self.dirty, inner.dirty),
            (self.deleted, inner.deleted),
        ):
            mine.extend(its)


class HasLevels(Protocol):
    """The model of a session, as far as the others see it."""

    levels: list[Level]


class Store:
    """The database: what is committed, and the transactions that are open on it."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.extras: dict[int, Row] = {}
        self.versions: dict[int, int] = {}
        self.open: list[HasLevels] = []

    def others(self, model: HasLevels | None) -> Iterator[Level]:
        for other in self.open:
            if other is not model:
                yield from other.levels

    def apply(self, rows: dict[int, Row | None]) -> None:
        for number, row in rows.items():
            self.versions[number] = self.versions.get(number, 0) + 1
            if row is None:
                self.rows.pop(number, None)
            else:
                self.rows[number] = row

    def is_free(self, number: int, *names: str, model: HasLevels | None = None) -> bool:
        """Whether nobody else has the row or one of the names."""
        return not any(
            number in level.rows or number in level.locks or level.names.intersection(names)
            for level in self.others(model)
        )
