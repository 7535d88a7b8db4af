"""The client's CPU per request: its time, its calls of Python functions, its instructions."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence

from benchmarks.figures import Figure, able, in_turns, progress, ratio, spread, unable
from benchmarks.peers import Operation
from benchmarks.worker import command, line, workers

#: CPU time as a ratio to a reference, and in seconds.
CPU, SECONDS = "client CPU", "client CPU seconds"
CALLS = "Python calls"
INSTRUCTIONS = "client instructions"


def measure_time(
    driver: str,
    url: str,
    peers: Sequence[str],
    reference: str,
    operations: Sequence[Operation],
    generations: int,
    turns: int,
) -> Iterator[Figure]:
    """Compare the CPU time that the client takes for each operation, the kernel's share included.

    A batch of operations on one peer is followed by a batch on the next. The effect of the caches
    on a program differs by some percent between processes, and stays the same for the life of a
    process. So there are several generations of processes, and the spread is that between them.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param reference: The name of the peer that the others are compared with.
    :param operations: The operations.
    :param generations: How many generations of processes.
    :param turns: How many batches each process does of each operation.
    """
    ratios: dict[tuple[Operation, str], list[float]] = {}
    seconds: dict[tuple[Operation, str], list[float]] = {}
    for generation in range(generations):
        progress(f"client CPU, {driver}, {generation + 1} of {generations}")
        with workers(peers, url) as all_workers:
            for operation in operations:
                working = [all_workers[peer] for peer in able(peers, operation.method)]
                times = in_turns(working, turns, "cpu", operation)
                for peer, own in times.items():
                    ratios.setdefault((operation, peer), []).append(ratio(own, times[reference]))
                    seconds.setdefault((operation, peer), []).append(statistics.median(own))
    for operation in operations:
        yield from unable(CPU, operation.title, driver, peers, operation.method)
    for (operation, peer), values in ratios.items():
        yield spread(CPU, operation.title, driver, peer, values)
        yield spread(SECONDS, operation.title, driver, peer, seconds[operation, peer])


def measure_calls(
    driver: str, url: str, peers: Sequence[str], operations: Sequence[Operation]
) -> Iterator[Figure]:
    """Count the calls of Python functions: they take most of the CPU time, and the count is exact.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param operations: The operations.
    """
    progress(f"Python calls, {driver}")
    with workers(peers, url) as all_workers:
        for operation in operations:
            yield from unable(CALLS, operation.title, driver, peers, operation.method)
            for peer in able(peers, operation.method):
                count = all_workers[peer].do("calls", operation)
                yield Figure(CALLS, operation.title, driver, peer, count)


def measure_instructions(
    driver: str, url: str, peers: Sequence[str], operations: Sequence[Operation], batches: int
) -> Iterator[Figure]:
    """Count the instructions that the client executes, without the kernel's, if the machine can.

    :param driver: The driver's name.
    :param url: The database.
    :param peers: The names of the peers.
    :param operations: The operations.
    :param batches: How many batches of each operation to count.
    """
    progress(f"instructions, {driver}")
    for operation in operations:
        yield from unable(INSTRUCTIONS, operation.title, driver, peers, operation.method)
        for peer in able(peers, operation.method):
            count = instructions(peer, url, operation, batches * operation.batch)
            if count is None:
                progress("  this machine does not count them")
                return
            yield Figure(INSTRUCTIONS, operation.title, driver, peer, count)


def instructions(peer: str, url: str, operation: Operation, count: int) -> float | None:
    """Count the instructions that the client executes for an operation, without the kernel's.

    :param peer: The name of the peer.
    :param url: The database.
    :param operation: The operation.
    :param count: How many operations to count.
    :returns: The mean for one operation; ``None`` if there is no ``perf``, or if the machine does
        not count.
    """
    counted: list[int] = []
    for repetitions in (0, count):  # what both runs have in common is not counted
        tasks = [line("warm_up", operation), line("repeat", operation, repetitions)]
        try:
            done = subprocess.run(
                ["perf", "stat", "-x,", "-e", "instructions:u", "--", *command(peer, url)],
                input="".join(f"{task}\n" for task in tasks),
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
