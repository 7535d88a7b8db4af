"""One hot row: many threads update the same row, over a connection with some delay.

PostgreSQL locks an updated row until the transaction ends. With BEGIN and COMMIT, other
transactions wait while the answer to the UPDATE and the COMMIT travel. An UPDATE that is sent alone
holds the lock only while the server executes it. The object is not read before, so that the figures
compare nothing but these locks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, in_turns, progress, spread
from benchmarks.worker import workers
from tests.wire import WireProxy

RATE, RATIO = "updates of one row per second", "updates of one row"
THREADS = 20
DELAY = 1
"""Milliseconds added to each round trip, half of them each way."""


def measure(
    proxy: WireProxy,
    driver: str,
    url: str,
    peers: Sequence[str],
    reference: str,
    turns: int,
    seconds: float,
) -> Iterator[Figure]:
    """Count the updates per second, with a connection for each thread.

    :param proxy: The proxy.
    :param driver: The driver's name.
    :param url: The database, through the proxy.
    :param peers: The names of the peers.
    :param reference: The name of the peer that the others are compared with, in each turn.
    :param turns: How often the peers take turns.
    :param seconds: How many seconds each peer updates in its turn.
    """
    progress(f"one hot row, {driver}")
    with workers(peers, url, pool_size=THREADS, max_overflow=0) as all_workers:
        proxy.delay = DELAY / 2000
        try:
            rates = in_turns(list(all_workers.values()), turns, "contend", THREADS, seconds)
        finally:
            proxy.delay = 0.0
    what = f"{THREADS} threads, round trips {DELAY} ms longer"
    for peer, own in rates.items():
        ratios = [mine / other for mine, other in zip(own, rates[reference], strict=True)]
        yield spread(RATE, what, driver, peer, own, at=THREADS)
        yield spread(RATIO, what, driver, peer, ratios, at=THREADS)
