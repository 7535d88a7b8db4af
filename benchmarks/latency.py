"""How long a request takes when the server is far away: a proxy adds the delay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, able, in_turns, progress, spread, unable
from benchmarks.peers import READ, READ_THEN_UPDATE, TEN_READS, TEN_READS_AND_UPDATE
from benchmarks.worker import workers
from tests.wire import WireProxy

LATENCY = "latency"
OPERATIONS = (READ, TEN_READS, READ_THEN_UPDATE, TEN_READS_AND_UPDATE)
DELAYS = (0, 1, 10)
"""The delays that are added to a round trip, in milliseconds, half of each in each direction."""


def measure(
    proxy: WireProxy,
    driver: str,
    url: str,
    peers: Sequence[str],
    floor: str,
    turns: int,
) -> Iterator[Figure]:
    """Compare the time that each operation takes.

    :param proxy: The proxy.
    :param driver: The driver's name.
    :param url: The database, through the proxy.
    :param peers: The names of the peers.
    :param floor: The name of the peer that the others are compared with, in each turn.
    :param turns: How often the peers take turns.
    """
    with workers(peers, url) as all_workers:
        for delay in DELAYS:
            progress(f"latency with a delay of {delay} ms, {driver}")
            for operation in OPERATIONS:
                working = [all_workers[peer] for peer in able(peers, operation.method)]
                for worker in working:
                    worker.do("warm_up", operation)
                proxy.delay = delay / 2000
                try:
                    count = 1 if delay > 1 else operation.batch
                    times = in_turns(working, turns, "wall", operation, count)
                finally:
                    proxy.delay = 0.0
                what = operation.title
                yield from unable(LATENCY, what, driver, peers, operation.method, delay)
                for peer, own in times.items():
                    ratios = [mine / least for mine, least in zip(own, times[floor], strict=True)]
                    yield spread(LATENCY, what, driver, peer, ratios, at=delay)
