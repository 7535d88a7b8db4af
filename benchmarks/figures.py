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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from typing_extensions import Self

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


def calls(side: Side, operation: str) -> float:
    """Count the calls of Python functions that an operation makes: most of its CPU time is those.

    :param operation: Its name.
    """
    count = 0

    def note(frame: FrameType, happening: str, argument: object) -> None:
        nonlocal count
        count += happening == "call"

    _repeat(side, operation, _WARM_UP)
    sys.setprofile(note)
    try:
        _repeat(side, operation, 10)
    finally:
        sys.setprofile(None)
    return count / 10


@dataclass(frozen=True)
class Cpu:
    """The client's CPU time for one operation."""

    ours: float
    """Seconds, the median."""
    stock: float
    """Seconds, the median."""
    ratios: list[float]
    """Ours to stock's in each pair of processes: the median of its rounds. In ascending order."""

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)


def cpu(url: str, pairs: int, rounds: int) -> dict[str, Cpu]:
    """Compare the client's CPU time on both sides.

    Each side has a process of its own, for in one they would take turns in Python's caches, too.
    A batch of operations on one is followed by a batch on the other, so what else the machine does
    meets both. What the caches make of a program differs by some percent from one process to the
    next and stays for its life: that is why there are several pairs.

    :param url: The database.
    :param pairs: How many pairs of processes, one after the other.
    :param rounds: How many batches each process does of each operation.
    :returns: the comparison of each operation, by its name.
    """
    measured = {operation: list[list[tuple[float, float]]]() for operation in OPERATIONS}
    for _ in range(pairs):
        with Worker(url, Ours) as ours, Worker(url, Stock) as stock:
            for operation, found in measured.items():
                found.append([_round(ours, stock, operation, turn) for turn in range(rounds)])
    return {
        operation: Cpu(
            statistics.median(ours for pair in found for ours, _ in pair),
            statistics.median(stock for pair in found for _, stock in pair),
            sorted(statistics.median(ours / stock for ours, stock in pair) for pair in found),
        )
        for operation, found in measured.items()
    }


def _round(ours: Worker, stock: Worker, operation: str, turn: int) -> tuple[float, float]:
    if turn % 2:
        second, first = stock.batch(operation), ours.batch(operation)
    else:
        first, second = ours.batch(operation), stock.batch(operation)
    return first, second


class Worker:
    """A process that does batches of operations on one side when it is told to.

    :param url: The database.
    :param side: The side.
    """

    def __init__(self, url: str, side: type[Side]) -> None:
        self._process = subprocess.Popen(
            _command("work", url, side.name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def batch(self, operation: str) -> float:
        """Do a batch of an operation; return its CPU time in seconds for one, the kernel's too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(operation, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("A process that measures has ended; its error is printed above.")
        return float(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it


def work(side: Side, operations: Iterable[str]) -> Iterator[float]:
    """Do a batch of each operation as it comes, and give the seconds for one."""
    for operation in OPERATIONS:
        _repeat(side, operation, _WARM_UP)
    gc.collect()
    gc.freeze()  # a collection looks only at what comes now
    for operation in operations:
        gc.collect()  # no batch pays for the garbage of another
        count = _BATCHES[operation]
        start = time.thread_time()
        _repeat(side, operation, count)
        yield (time.thread_time() - start) / count


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


def _repeat(side: Side, operation: str, count: int) -> None:
    function = getattr(side, operation)
    for _ in range(count):
        function()


def _command(*task: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.child", *map(str, task)]


def _child(*task: object) -> Any:
    done = subprocess.run(_command(*task), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)
