"""Round trips: how often a request waits for the server, counted by a proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, able, progress, spread, unable
from benchmarks.peers import Operation
from benchmarks.worker import workers
from tests.wire import WireProxy

ROUND_TRIPS = "round trips"


def measure(
    proxy: WireProxy, driver: str, url: str, peers: Sequence[str], operations: Sequence[Operation]
) -> Iterator[Figure]:
    """Count the round trips of each operation on each peer, three times.

    :param proxy: The proxy.
    :param driver: The driver's name.
    :param url: The database, through the proxy.
    :param peers: The names of the peers.
    :param operations: The operations.
    """
    progress(f"round trips, {driver}")
    with workers(peers, url) as all_workers:
        for operation in operations:
            what = operation.title
            yield from unable(ROUND_TRIPS, what, driver, peers, operation.method)
            for peer in able(peers, operation.method):
                worker = all_workers[peer]
                worker.do("warm_up", operation)
                counts: list[float] = []
                for _ in range(3):
                    with proxy.record() as recording:
                        worker.do("repeat", operation, 1)
                    counts.append(recording.round_trips)
                yield spread(ROUND_TRIPS, what, driver, peer, counts)
