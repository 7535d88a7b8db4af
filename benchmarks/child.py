"""The process of one peer, and the functions that measure in this process.

The process reads tasks, one JSON array per line, with the name of a function of this module and its
arguments. It answers each task with one line of JSON. :class:`benchmarks.worker.Worker` is the
other end.

python -m benchmarks.child PEER URL OPTIONS
"""

from __future__ import annotations

import gc
import json
import math
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.peers import Operation, Peer, load_peer

_warm: set[Operation] = set()


def main(name: str, url: str, options: str) -> None:
    """Do what the other end asks for, until the other end closes the input."""
    peer = load_peer(name)(url, **json.loads(options))
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        function: Callable[..., Any] = globals()[task]
        print(json.dumps(function(peer, *arguments)), flush=True)


def repeat(peer: Peer, operation: list[Any], count: int) -> None:
    """Do an operation several times, without a warm-up."""
    _repeat(peer, _operation(operation), count)


def warm_up(peer: Peer, operation: list[Any]) -> None:
    """Do an operation until Python, the library, the driver and the server have warm caches."""
    _warmed_up(peer, operation)


def cpu(peer: Peer, operation: list[Any]) -> float:
    """Do a batch of an operation; return the thread's CPU time for one operation, in seconds.

    The kernel's share is included; background threads of a pool are not counted.
    """
    known = _warmed_up(peer, operation)
    gc.collect()  # no batch pays for the garbage of another
    start = time.thread_time()
    _repeat(peer, known, known.batch)
    return (time.thread_time() - start) / known.batch


def wall(peer: Peer, operation: list[Any], count: int) -> float:
    """Do an operation several times; return how many seconds one operation takes."""
    known = _warmed_up(peer, operation)
    start = time.perf_counter()
    _repeat(peer, known, count)
    return (time.perf_counter() - start) / count


def calls(peer: Peer, operation: list[Any]) -> float:
    """Return how many calls of Python functions an operation makes."""
    known = _warmed_up(peer, operation)
    count = 0

    def note(frame: FrameType, happening: str, argument: object) -> None:
        nonlocal count
        count += happening == "call"

    sys.setprofile(note)
    try:
        _repeat(peer, known, 10)
    finally:
        sys.setprofile(None)
    return count / 10


def among(peer: Peer, count: int, repetitions: int) -> tuple[float, float]:
    """Return the CPU time of work in a request that has read many objects before.

    :returns: The seconds for a read of one more object by its key, and for an update of one of the
        objects.
    """
    found: list[tuple[float, float]] = []
    for _ in range(repetitions + 1):
        start, read, end = peer.read_then_update_among(count, time.thread_time)
        found.append((read - start, end - read))
    reads, updates = zip(*found[1:], strict=True)  # the first one warmed up
    return statistics.median(reads), statistics.median(updates)


def hold(peer: Peer, count: int) -> int:
    """Return by how many bytes this process grows at most while it reads and holds objects."""
    peer.load_many(10)  # the memory that the first statement needs does not count
    before = _memory()
    with peer.request():
        objects = peer.load(count)
        assert len(objects) == count
    return _memory(peak=True) - before


def stream(peer: Peer, method: str) -> tuple[int, int]:
    """Stream all rows.

    :returns: The number of rows, and by how many bytes this process has grown at most meanwhile.
    """
    peer.load_many(10)
    before = _memory()
    rows = sum(1 for _ in getattr(peer, method)())
    return rows, _memory(peak=True) - before


def serve(peer: Peer, threads: int, wait: float, seconds: float) -> tuple[int, float, float, float]:
    """Serve requests that wait between two reads.

    :param threads: How many threads.
    :param wait: How many seconds a request waits.
    :param seconds: How many seconds the threads serve.
    :returns: The number of requests, the times at which serving began and ended, and the seconds
        within which 99 of 100 requests were done.
    """
    return _serve(
        peer,
        threads,
        seconds,
        connect=lambda: peer.read_wait_read(0.0),
        request=lambda: peer.read_wait_read(wait),
    )


def contend(peer: Peer, threads: int, seconds: float) -> float:
    """Update the same row in some threads.

    :param threads: How many threads.
    :param seconds: How many seconds the threads update.
    :returns: The number of updates per second.
    """
    update = peer.update_known
    served, start, end, _ = _serve(peer, threads, seconds, connect=update, request=update)
    return served / (end - start)


def _serve(
    peer: Peer,
    threads: int,
    seconds: float,
    connect: Callable[[], None],
    request: Callable[[], None],
) -> tuple[int, float, float, float]:
    """Serve requests, one after the other in each of some threads.

    :param connect: A function that makes the thread's connection before the time begins.
    :param request: A function that does the request.
    :returns: What :func:`serve` returns.
    """
    barrier = threading.Barrier(threads + 1)
    times: list[float] = []
    failures: list[BaseException] = []

    def serve_one() -> None:
        own: list[float] = []
        try:
            connect()
            barrier.wait()
            end = time.monotonic() + seconds
            while (start := time.monotonic()) < end:
                request()
                own.append(time.monotonic() - start)
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()
        finally:
            peer.end_thread()
        times.extend(own)

    workers = [threading.Thread(target=serve_one) for _ in range(threads)]
    for worker in workers:
        worker.start()
    with suppress(threading.BrokenBarrierError):
        barrier.wait()
    start = time.monotonic()
    for worker in workers:
        worker.join()
    end = time.monotonic()
    if failures:
        raise failures[0]
    peer.close()
    return len(times), start, end, sorted(times)[math.ceil(len(times) * 0.99) - 1]


def _operation(plain: list[Any]) -> Operation:
    title, method, arguments, batch = plain
    return Operation(title, method, tuple(arguments), batch)


def _warmed_up(peer: Peer, plain: list[Any]) -> Operation:
    operation = _operation(plain)
    if operation not in _warm:
        # psycopg 3 prepares a statement when it is executed for the sixth time.
        _repeat(peer, operation, max(8, 3 * operation.batch))
        _warm.add(operation)
        gc.collect()
        gc.freeze()  # from now on, a collection looks only at new objects
    return operation


def _repeat(peer: Peer, operation: Operation, count: int) -> None:
    function = getattr(peer, operation.method)
    for _ in range(count):
        function(*operation.arguments)


def _memory(peak: bool = False) -> int:
    """Return the resident memory of this process in bytes, or its peak since the last call."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    if not peak:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
