"""The growth of the client's CPU time with the size of what is done.

The size is the number of reads in a request, of objects in the session, or of rows in a result. The
unit is one read by key by hand, which is measured in the same turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, in_turns, progress, spread
from benchmarks.peers import READ, Operation
from benchmarks.worker import Worker, workers

READS = "reads in a request"
ROWS = "rows of a result"
READ_AMONG = "read by key, with objects in the session"
UPDATE_AMONG = "update, with objects in the session"

_READS = (1, 3, 10, 30, 100)
_OBJECTS = (1, 10, 100, 1_000, 10_000)
_TURNS = 3  # how often the peers take turns in a generation
SIZES = {READS: _READS, ROWS: _OBJECTS, READ_AMONG: _OBJECTS, UPDATE_AMONG: _OBJECTS}


def measure(
    driver: str, url: str, peers: Sequence[str], floor: str, generations: int
) -> Iterator[Figure]:
    """Measure the CPU time at all sizes.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param floor: The name of the peer that reads by hand.
    :param generations: How many generations of processes; the spread is that between them.
    """
    costs: dict[tuple[str, int, str], list[float]] = {}
    for generation in range(generations):
        progress(f"growth, {driver}, {generation + 1} of {generations}")
        with workers(peers, url) as all_workers:
            for kind, at, peer, cost in _costs(all_workers, floor):
                costs.setdefault((kind, at, peer), []).append(cost)
    for (kind, at, peer), values in costs.items():
        yield spread(kind, kind, driver, peer, values, at=at)


def _costs(all_workers: dict[str, Worker], floor: str) -> Iterator[tuple[str, int, str, float]]:
    """Measure in one generation of processes; give the kind, the size, the peer and the cost."""
    units = in_turns([all_workers[floor]], 3 * _TURNS, "cpu", READ)
    unit = statistics.median(units[floor])
    working = list(all_workers.values())
    for kind, method in ((READS, "reads"), (ROWS, "load_many")):
        for size in SIZES[kind]:
            operation = Operation(kind, method, (size,), max(1, 20 // size))
            for peer, seconds in in_turns(working, _TURNS, "cpu", operation).items():
                yield kind, size, peer, statistics.median(seconds) / unit
    for size in SIZES[UPDATE_AMONG]:
        repetitions = 3 if size > 1000 else 9
        for peer, found in in_turns(working, _TURNS, "among", size, repetitions).items():
            for kind, times in zip(
                (READ_AMONG, UPDATE_AMONG), zip(*found, strict=True), strict=True
            ):
                yield kind, size, peer, statistics.median(times) / unit
