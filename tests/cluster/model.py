"""How many connections are at work, by a model and by what the servers say.

The model is Little's law: so many are at work on average as the seconds that all requests together
have needed one, divided by the seconds in which they came. It is what the docs reckon with for more
workers than run here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2

from tests.cluster.nodes import USER, Node

_PAUSE = 0.1

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


class Census:
    """Threads that count the connections to each server, from the beginning until :meth:`stop`.

    :param nodes: The servers.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._ended = False
        self._counted: list[Counted] = []
        self._threads = [
            threading.Thread(target=self._run, args=(node,), daemon=True) for node in nodes
        ]
        for thread in self._threads:
            thread.start()

    def counted(self, since: float, until: float) -> list[Counted]:
        """Return what was counted between two times."""
        return [one for one in list(self._counted) if since <= one.at <= until]

    def stop(self) -> None:
        """End the threads."""
        self._ended = True
        for thread in self._threads:
            thread.join(10)

    def _run(self, node: Node) -> None:
        connection: Any = None
        while not self._ended:
            try:
                connection = connection or node.connect()
                with connection.cursor() as cursor:
                    cursor.execute(_COUNT)
                    self._counted.append(Counted(time.monotonic(), *cursor.fetchone()))
            except psycopg2.Error:
                if connection is not None:
                    with suppress(psycopg2.Error):
                        connection.close()
                connection = None
            time.sleep(_PAUSE)
        if connection is not None:
            connection.close()


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
        f"connections at work by the model, and {at_work:.1f} by what the servers counted; "
        f"requests held {held:.1f}, and the pools had {opened:.0f} open"
    )
