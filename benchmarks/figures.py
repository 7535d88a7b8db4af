"""How each figure is measured. None of them depends on how fast the machine is."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.apps import OPERATIONS, Ours, Side, Stock
from tests.wire import WireProxy

# Enough for the driver, SQLAlchemy and Python to have prepared and cached what they will.
_WARM_UP = 50

# How many operations are measured at once: about as long as the scheduler lets a process run.
_BATCHES = {"read": 20, "ten_reads": 4, "read_then_update": 10}


def round_trips(proxy: WireProxy, side: Side, operation: str) -> int:
    """Count the round trips of an operation.

    :param proxy: What the connections of the side go through.
    :param operation: Its name.
    """
    _repeat(side, operation, _WARM_UP)
    with proxy.record() as recording:
        _repeat(side, operation, 1)
    return recording.round_trips


@dataclass(frozen=True)
class Cpu:
    """The client's CPU time for one operation."""

    ours: float
    """Seconds, the median."""
    stock: float
    """Seconds, the median."""
    ratios: list[float]
    """Ours to stock's, one for each process: the median of its pairs. In ascending order."""

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)


def cpu(url: str, processes: int, rounds: int) -> dict[str, Cpu]:
    """Compare the client's CPU time on both sides.

    A batch on one side is followed by one on the other, so what else the machine does meets both.
    It is the time of the thread, with the kernel's for it, without the wait for the server. What
    Python's caches make of a program differs by some percent from one process to the next, and
    stays for its life: that is why there are several.

    :param url: The database.
    :param processes: How many processes to measure in, one after the other.
    :param rounds: How many pairs of batches each measures.
    :returns: the comparison of each operation, by its name.
    """
    measured = [_child("cpu", url, rounds) for _ in range(processes)]
    found: dict[str, Cpu] = {}
    for operation in OPERATIONS:
        pairs: list[list[tuple[float, float]]] = [one[operation] for one in measured]
        found[operation] = Cpu(
            statistics.median(ours for process in pairs for ours, _ in process),
            statistics.median(stock for process in pairs for _, stock in process),
            sorted(statistics.median(o / s for o, s in process) for process in pairs),
        )
    return found


def cpu_batches(url: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measure the seconds that an operation takes, on our side and on the other, by its name."""
    ours, stock = Ours(url), Stock(url)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in OPERATIONS}
    for operation in OPERATIONS:
        _repeat(ours, operation, _WARM_UP)
        _repeat(stock, operation, _WARM_UP)
    gc.freeze()  # what is there now is looked at by no further collection
    for turn in range(rounds):
        for operation, pairs in measured.items():
            if turn % 2:
                second, first = _batch(stock, operation), _batch(ours, operation)
            else:
                first, second = _batch(ours, operation), _batch(stock, operation)
            pairs.append((first, second))
    return measured


def instructions(url: str, side: type[Side], operation: str, count: int) -> float | None:
    """Count the instructions that the client executes for an operation, the kernel's apart.

    :param url: The database.
    :param operation: Its name.
    :param count: How many operations to count.
    :returns: their mean, or ``None`` where there is no ``perf`` or the machine does not count.
    """
    counted: list[int] = []
    for repetitions in (_WARM_UP, _WARM_UP + count):  # what both have in common is not counted
        task = ("repeat", url, side.name, operation, str(repetitions))
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "--", *_command(*task)]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, "LC_ALL": "C", "PYTHONHASHSEED": "0"},
                check=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError:
            return None
        lines = [line.split(",") for line in done.stderr.splitlines() if "instructions" in line]
        if done.returncode or not lines or not lines[-1][0].isdigit():
            return None
        counted.append(int(lines[-1][0]))
    return (counted[1] - counted[0]) / count


def served(side: Side, threads: int, wait: float, seconds: float) -> float:
    """Serve requests that wait between two reads, one after the other in each of some threads.

    :param threads: How many threads.
    :param wait: How many seconds a request waits.
    :param seconds: For how long.
    :returns: requests per second, as a share of what they would be if only the wait took time.
    """
    barrier = threading.Barrier(threads + 1)
    counts: list[int] = []
    failures: list[BaseException] = []

    def serve() -> None:
        count = 0
        barrier.wait()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                side.read_wait_read(wait)
                count += 1
        except BaseException as failure:
            failures.append(failure)
        counts.append(count)

    workers = [threading.Thread(target=serve) for _ in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.monotonic()
    for worker in workers:
        worker.join()
    elapsed = time.monotonic() - start
    if failures:
        raise failures[0]
    return sum(counts) / elapsed / (threads / wait)


def grown(url: str, side: type[Side], method: str, rows: int) -> int:
    """Return by how many bytes a new process grows while it streams rows.

    :param url: The database.
    :param method: The name of the method that streams.
    :param rows: How many rows there are.
    """
    read, growth = _child("stream", url, side.name, method)
    if read != rows:
        raise RuntimeError(f"{side.name}.{method}() has read {read} of {rows} rows.")
    return int(growth)


def _batch(side: Side, operation: str) -> float:
    gc.collect()  # no batch pays for the garbage of another
    count = _BATCHES[operation]
    start = time.thread_time()
    _repeat(side, operation, count)
    return (time.thread_time() - start) / count


def _repeat(side: Side, operation: str, count: int) -> None:
    function = getattr(side, operation)
    for _ in range(count):
        function()


def _command(*task: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.child", *map(str, task)]


def _child(*task: object) -> Any:
    done = subprocess.run(_command(*task), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)
