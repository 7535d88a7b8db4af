"""The growth of the client's CPU time with the size of what is done.

The size is the number of reads in a request, of objects in the session, or of rows in a result. The
unit is one read by key by hand. It is measured before and after each figure, so that a machine that
becomes slower affects both. A process of its own measures it: the caches have then been used by
another process when any peer begins, the one by hand included.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.figures import Figure, orders, progress, spread
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
        with workers(peers, url) as all_workers, Worker(floor, url) as unit:
            for kind, at, peer, cost in _costs(list(all_workers.values()), unit):
                costs.setdefault((kind, at, peer), []).append(cost)
    for (kind, at, peer), values in costs.items():
        yield spread(kind, kind, driver, peer, values, at=at)


def _costs(working: Sequence[Worker], unit: Worker) -> Iterator[tuple[str, int, str, float]]:
    """Measure in one generation of processes; give the kind, the size, the peer and the cost."""
    for kind, method in ((READS, "reads"), (ROWS, "load_many")):
        for size in SIZES[kind]:
            operation = Operation(kind, method, (size,), max(1, 20 // size))
            for peer, costs in _in_units(working, unit, "cpu", operation).items():
                yield kind, size, peer, statistics.median(cost for (cost,) in costs)
    for size in SIZES[UPDATE_AMONG]:
        repetitions = 3 if size > 1000 else 9
        for peer, costs in _in_units(working, unit, "among", size, repetitions).items():
            for kind, own in zip((READ_AMONG, UPDATE_AMONG), zip(*costs, strict=True), strict=True):
                yield kind, size, peer, statistics.median(own)


def _in_units(
    working: Sequence[Worker], unit: Worker, task: str, *arguments: Any
) -> dict[str, list[list[float]]]:
    """Let all processes do the same task in turns, each time between two measurements of the unit.

    :returns: What each peer has measured in each turn, in units: one number, or several.
    """
    results: dict[str, list[list[float]]] = {worker.peer: [] for worker in working}
    for worker in working:
        if task == "cpu":
            worker.do("warm_up", *arguments)  # which would be a long time between the two units
    for order in orders(working, _TURNS):
        for worker in order:
            before = unit.do("cpu", READ)
            found = worker.do(task, *arguments)
            mean = statistics.mean([before, unit.do("cpu", READ)])
            seconds = found if isinstance(found, list) else [found]
            results[worker.peer].append([one / mean for one in seconds])
    return results
