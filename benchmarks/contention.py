"""One hot row: many threads update the same row, and the server is a little further away.

PostgreSQL locks a row that is updated until the transaction ends. Between BEGIN and COMMIT the
others wait while the answer to the UPDATE and the COMMIT travel; an UPDATE alone needs no lock for
longer than the server takes for it. A request is the update of an object that need not be read, so
that on each peer what waits is what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, in_turns, progress, spread
from benchmarks.worker import workers
from tests.wire import WireProxy

RATE, RATIO = "updates of one row per second", "updates of one row"
THREADS = 20
DELAY = 1
"""Milliseconds that a round trip takes longer, half of it each way."""


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
    :param reference: The name of the one that the others are compared with, in each turn.
    :param turns: How often the peers take turns.
    :param seconds: For how long each updates in its turn.
    """
    progress(f"one hot row, {driver}")
    with workers(peers, url, pool_size=THREADS, max_overflow=0) as all_workers:
        proxy.delay = DELAY / 2000
        try:
            rates = in_turns(list(all_workers.values()), turns, "contend", THREADS, seconds)
        finally:
            proxy.delay = 0.0
    what = f"{THREADS} threads, {DELAY} ms away"
    for peer, own in rates.items():
        ratios = [mine / other for mine, other in zip(own, rates[reference], strict=True)]
        yield spread(RATE, what, driver, peer, own, at=THREADS)
        yield spread(RATIO, what, driver, peer, ratios, at=THREADS)
