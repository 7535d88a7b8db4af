"""Requests that wait for something else between two reads, on a pool that has too few connections.

The ideal is the number of requests per second if everything but the wait took no time: if the wait
is 50 ms, each thread could serve 20 requests per second.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from sqlalchemy import make_url
from typing_extensions import Self

from benchmarks.figures import Figure, orders, progress, spread
from benchmarks.worker import workers

WAIT = 0.05
NUMBERS_OF_THREADS = (1, 5, 15, 50, 100, 200)

SHARE = "requests/s of the ideal"
P99 = "99th percentile"
IDLE = "connections idle in a transaction"
IDLE_SECONDS = "seconds idle in a transaction"
CONNECTIONS = "connections"


def measure(
    driver: str,
    url: str,
    peers: Sequence[str],
    threads: Sequence[int],
    turns: int,
    seconds: float,
    **pool: int,
) -> Iterator[Figure]:
    """Let each peer serve, in turns, with each number of threads.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param threads: The numbers of threads.
    :param turns: How often each peer serves.
    :param seconds: How many seconds each peer serves in its turn.
    :param pool: The pool's size, if it is not the default.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    with workers(peers, url, **pool) as all_workers, Onlooker(url) as onlooker:
        for turn, order in enumerate(orders(list(all_workers.values()), turns), start=1):
            for count in threads:
                progress(f"requests that wait, {driver}, {count} threads, {turn} of {turns}")
                for worker in order:
                    peer = worker.peer
                    with onlooker.watch(peer) as seen:
                        served, start, end, p99 = worker.do("serve", count, WAIT, seconds)
                    rate = served / (end - start)
                    idle = seen.idle(start, end)
                    figures = {
                        SHARE: rate / (count / WAIT),
                        P99: p99 / WAIT,
                        IDLE: idle,
                        IDLE_SECONDS: idle / rate,
                        CONNECTIONS: seen.connections,
                    }
                    for kind, value in figures.items():
                        found.setdefault((kind, peer, count), []).append(value)
    what = f"{WAIT * 1000:.0f} ms between two reads"
    for (kind, peer, count), values in found.items():
        yield spread(kind, what, driver, peer, values, at=count)


class Onlooker:
    """Looks at ``pg_stat_activity`` while a process works.

    :param url: The database.
    """

    _LOOK = """
        SELECT count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%%')
        FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s
    """

    def __init__(self, url: str) -> None:
        dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(dsn, autocommit=True)

    def watch(self, peer: str) -> Sight:
        """Return a context manager that looks at connections until the end of its block.

        :param peer: The name of the peer whose connections are looked at.
        """
        return Sight(lambda: self._connection.execute(self._LOOK, (peer,)).fetchone())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


class Sight:
    """What an onlooker has seen.

    :param look: Returns how many connections there are, and how many are idle in a transaction.
    """

    _PAUSE = 0.017  # no divisor of the wait, so that the looks are not always at the same moment

    def __init__(self, look: Any) -> None:
        self._look = look
        self._looks: list[tuple[float, int, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def idle(self, start: float, end: float) -> float:
        """Return the mean number of connections that were idle in a transaction.

        :param start: When the time began, by :func:`time.monotonic`, which all processes share.
        :param end: When the time ended.
        """
        return statistics.mean(idle for at, _, idle in self._looks if start <= at <= end)

    @property
    def connections(self) -> int:
        """The largest number of connections that there were."""
        return max(connections for _, connections, _ in self._looks)

    def _watch(self) -> None:
        while True:
            self._looks.append((time.monotonic(), *self._look()))
            if self._end.wait(self._PAUSE):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
