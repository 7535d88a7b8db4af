"""How the client's CPU time grows: with the reads of a request, the objects in the session, and the
rows of a result. The unit is one read by key by hand, measured in the same turns."""

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
SIZES = {READS: _READS, ROWS: _OBJECTS, READ_AMONG: _OBJECTS, UPDATE_AMONG: _OBJECTS}


def measure(
    driver: str, url: str, peers: Sequence[str], floor: str, turns: int
) -> Iterator[Figure]:
    """Measure all of them.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param floor: The name of the one that reads by hand.
    :param turns: How often the peers take turns.
    """
    with workers(peers, url) as all_workers:
        units = in_turns([all_workers[floor]], 3 * turns, "cpu", READ)
        unit = statistics.median(units[floor])
        working = list(all_workers.values())
        for count in _READS:
            progress(f"{count} reads in a request, {driver}")
            operation = Operation(READS, "reads", (count,), max(1, 20 // count))
            yield from _cpu(driver, working, operation, count, unit, turns)
        for count in _OBJECTS:
            progress(f"{count:,} rows of a result, {driver}")
            operation = Operation(ROWS, "load_many", (count,), max(1, 20 // count))
            yield from _cpu(driver, working, operation, count, unit, turns)
        for count in _OBJECTS:
            progress(f"{count:,} objects in the session, {driver}")
            repetitions = 3 if count > 1000 else 9
            for peer, found in in_turns(working, turns, "among", count, repetitions).items():
                reads, updates = zip(*found, strict=True)
                for kind, seconds in ((READ_AMONG, reads), (UPDATE_AMONG, updates)):
                    costs = [one / unit for one in seconds]
                    yield spread(kind, kind, driver, peer, costs, at=count)


def _cpu(
    driver: str, working: list[Worker], operation: Operation, count: int, unit: float, turns: int
) -> Iterator[Figure]:
    for peer, seconds in in_turns(working, turns, "cpu", operation).items():
        costs = [one / unit for one in seconds]
        yield spread(operation.title, operation.title, driver, peer, costs, at=count)
