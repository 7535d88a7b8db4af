"""How many connections are at work, by a model and by what the servers say.

The model is Little's law: so many are at work on average as the seconds that all requests together
have needed one, divided by the seconds in which they came. It is what the docs reckon with for more
workers than run here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.looking import Looking
from tests.cluster.nodes import USER, Node

_COUNT = (
    "SELECT count(*), count(*) FILTER (WHERE state <> 'idle') FROM pg_stat_activity"
    f" WHERE usename = '{USER}'"
)


@dataclass(frozen=True)
class Work:
    """What one request has needed, as its report says."""

    at: float
    """When it ended, by :func:`time.monotonic`."""
    at_work: float
    """For how many seconds a statement was under way, or a transaction open."""
    held: float
    """For how many seconds it had a connection."""
    round_trips: int

    def line(self) -> str:
        """Return it as a line of a file."""
        return f"{self.at:.6f} {self.at_work:.6f} {self.held:.6f} {self.round_trips}\n"


def read_work(file: Path, since: float, until: float) -> list[Work]:
    """Return what was noted in a file between two times."""
    if not file.exists():
        return []
    lines = (line.split() for line in file.read_text().splitlines())
    found = [Work(float(a), float(b), float(c), int(d)) for a, b, c, d in lines]
    return [work for work in found if since <= work.at <= until]


@dataclass(frozen=True)
class Counted:
    """How many connections of the bank one server had at one time."""

    at: float
    open: int
    at_work: int


class Census(Looking):
    """Counts the connections to each server.

    :param nodes: The servers.
    """

    pause = 0.1

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._counted: list[Counted] = []
        super().__init__(nodes)

    def counted(self, since: float, until: float) -> list[Counted]:
        """Return what was counted between two times."""
        return [one for one in list(self._counted) if since <= one.at <= until]

    def look(self, node: Node, cursor: Any) -> None:
        cursor.execute(_COUNT)
        self._counted.append(Counted(time.monotonic(), *cursor.fetchone()))


def compared(work: list[Work], counted: list[Counted], seconds: float, servers: int) -> str:
    """Return a sentence that has the model beside what was counted; empty if nothing was noted.

    :param work: What the requests have needed.
    :param counted: What the servers have counted.
    :param seconds: In how many seconds.
    :param servers: How many servers were counted.
    """
    if not work or not counted:
        return ""
    model = sum(one.at_work for one in work) / seconds
    held = sum(one.held for one in work) / seconds
    trips = sum(one.round_trips for one in work) / len(work)
    rounds = len(counted) / servers
    at_work = sum(one.at_work for one in counted) / rounds
    opened = sum(one.open for one in counted) / rounds
    return (
        f"{len(work) / seconds:.0f} requests/s with {trips:.1f} round trips each kept {model:.1f} "
        f"connections at work, calculated from the application's times; the servers counted "
        f"{at_work:.1f}. The requests held {held:.1f} connections, and the pools had {opened:.0f} "
        "open"
    )
