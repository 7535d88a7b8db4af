"""What the clients were told and what the servers have, which are compared after each moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any, Literal

Kind = Literal["transfer", "transfer and read", "read and transfer", "read"]
Outcome = Literal["stored", "not stored", "unknown"]

#: How many accounts there are, what each has at the beginning, and the tenant that is set.
ACCOUNTS = 40
BALANCE = 100_000
TENANT = "7"


@dataclass(frozen=True)
class Seen:
    """What one read of a request has seen, and where."""

    value: int
    """The highest number in the ledger, which only grows."""
    engine: str
    """``"primary"``, or ``"replica 1"`` and so on: the engine whose connection it was."""
    port: int
    """The port that the connection goes to."""
    standby: bool
    """Whether the server said, with its answer, that it is a standby."""
    at: float = 0.0
    """When it was answered, by :func:`time.monotonic`, which all processes share."""


@dataclass(frozen=True)
class Answer:
    """One request and what came of it."""

    kind: Kind
    started: float
    """By :func:`time.monotonic`."""
    ended: float
    status: int
    """The HTTP status; 0 if there was no answer at all."""
    id: str = ""
    """The id that the client has chosen for a transfer."""
    source: int = 0
    target: int = 0
    amount: int = 0
    outcome: Outcome = "not stored"
    """What the answer says of the transfer."""
    serial: int = 0
    """The transfer's number in the ledger, where the answer says it."""
    before: int = 0
    """How many of the reads came before the transfer."""
    error: str = ""
    """The classes of the exception, or what went wrong with the answer; empty if all is well."""
    text: str = ""
    """What the exception says."""
    reads: tuple[Seen, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the client got what it asked for."""
        return not self.error

    @property
    def writes(self) -> bool:
        """Whether it is a transfer."""
        return self.kind != "read"


@dataclass(frozen=True)
class Row:
    """A row of the ledger."""

    id: str
    source: int
    target: int
    amount: int
    tenant: str | None


@dataclass
class Stored:
    """What the database has."""

    balances: dict[int, Decimal]
    ledger: list[Row]


@dataclass
class Rest:
    """What is left in a worker and on the servers when no request is under way."""

    workers: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    """What ``/pool`` has answered, for each process."""
    in_transaction: list[str] = field(default_factory=list[str])
    """The connections that the servers say are idle in a transaction."""


@dataclass(frozen=True)
class Change:
    """A server has changed what it is."""

    at: float
    node: str
    state: Literal["primary", "standby", "down"]
    """It is a primary from when it has stored something."""


@dataclass
class Moment:
    """One moment: what was done, and what was seen around it."""

    name: str
    began: float = 0.0
    """When the clients began."""
    at: float = 0.0
    """When it was done."""
    ended: float = 0.0
    """When the clients had all their answers."""
    done: str = ""
    """What was done, in words."""
    before: str = ""
    """The primary at the beginning."""
    after: str = ""
    """The primary at the end."""
    cuts: int = 0
    """How many connections were cut in the middle of a COMMIT."""
    answers: list[Answer] = field(default_factory=list[Answer])
    changes: list[Change] = field(default_factory=list[Change])
    """Of the servers, from the beginning of the run."""
    lost: int = 0
    """Transfers that were answered with success and are not there; only without a synchronous
    standby this is no failure."""
    failures: list[str] = field(default_factory=list[str])
    model: str = ""
    """How many connections were at work before it, by the model and by the servers."""
    reported: list[str] = field(default_factory=list[str])
    """Lines of ``report_requests()`` from around it."""

    @property
    def took_writes(self) -> float | None:
        """When a server that was not the primary before first took a write; ``None`` if none."""
        for change in self.changes:
            if change.at > self.at and change.state == "primary" and change.node != self.before:
                return change.at
        return None

    @property
    def first_stored(self) -> float | None:
        """When the first transfer after that was answered with success."""
        if self.took_writes is None:
            return None
        ends = (one.ended for one in self.answers if one.writes and one.outcome == "stored")
        return min((end for end in ends if end >= self.took_writes), default=None)

    @property
    def longest_gap(self) -> float:
        """The longest time in which no transfer was answered with success, in seconds."""
        ends = (one.ended for one in self.answers if one.writes and one.outcome == "stored")
        times = [self.began, *sorted(ends), self.ended]
        return max(later - earlier for earlier, later in pairwise(times))
