"""Memory: by how much a process grows. Each measurement has a new process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, able, progress, spread, unable
from benchmarks.worker import Worker

HELD, STREAMED = "memory of a request", "memory of a stream"
#: The methods that stream, and the names in the pages for what they give.
STREAMS = {"stream_objects": "objects", "stream_rows": "rows, without the ORM"}


def measure_held(
    driver: str, url: str, peers: Sequence[str], count: int, processes: int
) -> Iterator[Figure]:
    """Measure the resident memory of a request that reads and holds objects, at its peak.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param count: How many objects.
    :param processes: How many times to measure, each time in a new process.
    :returns: The figures, in bytes for one object.
    """
    progress(f"memory of a request, {driver}")
    found: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(processes):
        for peer in peers:
            with Worker(peer, url) as worker:
                found[peer].append(worker.do("hold", count) / count)
    for peer, values in found.items():
        yield spread(HELD, f"{count:,} objects", driver, peer, values)


def measure_streamed(
    driver: str, url: str, peers: Sequence[str], method: str, rows: int
) -> Iterator[Figure]:
    """Measure by how many bytes a process grows while it streams all rows.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param method: The method of the peers that streams.
    :param rows: How many rows there are.
    """
    what = f"{rows:,} {STREAMS[method]}"
    progress(f"streaming {what}, {driver}")
    yield from unable(STREAMED, what, driver, peers, method)
    for peer in able(peers, method):
        with Worker(peer, url) as worker:
            read, growth = worker.do("stream", method)
        if read != rows:
            raise RuntimeError(f"{peer}: {method}() has read {read} of {rows} rows.")
        yield Figure(STREAMED, what, driver, peer, growth)
