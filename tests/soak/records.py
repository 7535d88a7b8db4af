"""What the clients of the bank were told, which is compared with the database afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["stored", "not stored", "unknown"]


@dataclass(frozen=True)
class Record:
    """What the client was told of one thing that it wanted to store."""

    token: str
    """Its key in the table."""
    kind: str
    """Which operation it was."""
    outcome: Outcome
    parts: int = 0
    """How many rows of ``entry`` belong to it; 0 for a transfer."""
    error: str = ""
    """The error that was the answer."""


@dataclass
class Report:
    """What one process of the bank has done and seen."""

    records: list[Record] = field(default_factory=list[Record])
    increased: Counter[int] = field(default_factory=Counter[int])
    """How often each counter was increased, for sure."""
    maybe_increased: Counter[int] = field(default_factory=Counter[int])
    """How often each counter was increased, or not."""
    found: set[str] = field(default_factory=set[str])
    """The names of labels that were found or created."""
    created: Counter[str] = field(default_factory=Counter[str])
    """How often the creation of a label was answered with success."""
    maybe_created: set[str] = field(default_factory=set[str])
    """The labels that may have been created by a call that was answered with a lost connection."""
    operations: Counter[str] = field(default_factory=Counter[str])
    """How many operations of each kind were begun."""
    lost: Counter[str] = field(default_factory=Counter[str])
    """How many operations of each kind ended with a lost connection."""
    logged: Counter[str] = field(default_factory=Counter[str])
    """How often each warning or error was logged."""
    violations: list[str] = field(default_factory=list[str])
    """What was seen that the contract does not allow."""
    pool: str = ""
    """The state of the pool at the end."""

    def add(self, other: Report) -> None:
        """Add what another process, thread or round has done and seen."""
        self.records += other.records
        self.increased += other.increased
        self.maybe_increased += other.maybe_increased
        self.found |= other.found
        self.created += other.created
        self.maybe_created |= other.maybe_created
        self.operations += other.operations
        self.lost += other.lost
        self.logged += other.logged
        self.violations += other.violations

    def count(self, outcome: Outcome) -> int:
        """Return how many records have an outcome."""
        return sum(record.outcome == outcome for record in self.records)
