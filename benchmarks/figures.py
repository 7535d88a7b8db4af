"""The figures that are measured, and how peers are compared.

Peers take turns, so that other work of the machine affects all of them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.peers import load_peer
from benchmarks.worker import Worker

One = TypeVar("One")


@dataclass(frozen=True)
class Figure:
    """One number, with its spread."""

    kind: str
    """What is measured: the pages have a table for each kind."""
    what: str
    """The operation that is measured."""
    driver: str
    peer: str
    value: float | None
    """The number; ``None`` if the operation cannot work on the peer."""
    low: float | None = None
    high: float | None = None
    at: float | None = None
    """The size at which the figure is measured, if the figure depends on a size."""


def find(
    figures: Iterable[Figure],
    kind: str,
    driver: str,
    peer: str,
    what: str | None = None,
    at: float | None = None,
) -> Figure | None:
    """Return the first figure of a kind, a driver and a peer, if there is one.

    :param figures: The figures to search.
    :param kind: What is measured.
    :param driver: The driver.
    :param peer: The peer.
    :param what: The operation; any operation if it is left out.
    :param at: The size; any size if it is left out.
    """
    for one in figures:
        if (
            (one.kind, one.driver, one.peer) == (kind, driver, peer)
            and what in (None, one.what)
            and at in (None, one.at)
        ):
            return one
    return None


def spread(
    kind: str,
    what: str,
    driver: str,
    peer: str,
    values: Sequence[float],
    at: float | None = None,
) -> Figure:
    """Return the median of some values, and how far they spread."""
    middle = statistics.median(values)
    return Figure(kind, what, driver, peer, middle, min(values), max(values), at)


def orders(ones: Sequence[One], turns: int) -> Iterator[Sequence[One]]:
    """Yield all of them once for each turn, each time in another order."""
    for turn in range(turns):
        first = turn % len(ones)
        yield (*ones[first:], *ones[:first])


def in_turns(
    workers: Sequence[Worker], turns: int, task: str, *arguments: Any
) -> dict[str, list[Any]]:
    """Let some processes do the same task in turns, each turn in another order.

    :returns: The results of each peer, one for each turn.
    """
    results: dict[str, list[Any]] = {worker.peer: [] for worker in workers}
    for order in orders(workers, turns):
        for worker in order:
            results[worker.peer].append(worker.do(task, *arguments))
    return results


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median of the ratios that two peers have in each turn."""
    return statistics.median(one / other for one, other in zip(values, reference, strict=True))


def able(peers: Iterable[str], method: str) -> list[str]:
    """Return the names of the peers on which a method works."""
    return [peer for peer in peers if method not in load_peer(peer).fails]


def unable(
    kind: str,
    what: str,
    driver: str,
    peers: Iterable[str],
    method: str,
    at: float | None = None,
) -> Iterator[Figure]:
    """Yield a figure without a number for each peer on which the method fails."""
    for peer in peers:
        if method in load_peer(peer).fails:
            yield Figure(kind, what, driver, peer, None, at=at)


def progress(text: str) -> None:
    """Tell a waiting reader what is going on."""
    print(f"{text} …", file=sys.stderr, flush=True)
