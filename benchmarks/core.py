"""Compares this package with stock Flask-SQLAlchemy alone, and each figure with its aim.

``python -m nox -s bench -- core`` runs it; ``--quick`` takes two minutes, ``--markdown FILE``
stores the table. Times are compared only as ratios from one run, in which both sides take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cpu, memory, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import (
    BLOCK_OF_TWO,
    LAZY_LOADS,
    PAGINATE,
    READ,
    READ_THEN_UPDATE,
    STORE,
    TEN_READS,
)
from benchmarks.setting import Setting, setting
from tests.wire import WireProxy

SIDES = ("ours", "stock")
OPERATIONS = (READ, TEN_READS, READ_THEN_UPDATE, STORE, BLOCK_OF_TWO, LAZY_LOADS, PAGINATE)

#: The aims for the round trips: how many an operation makes at most, by the title of the operation.
ROUND_TRIPS = {READ.title: 1, READ_THEN_UPDATE.title: 2, STORE.title: 1}
#: The aims for the Python calls and the CPU time: how large the ratio to stock is at most.
CPU = {one.title: 1.0 for one in OPERATIONS} | {READ.title: 0.9, BLOCK_OF_TWO.title: 1.05}

#: How many threads serve requests that wait, and with how many connections.
THREADS, POOL = 20, 5
#: The aim for these threads: at least this share of the ideal, in which everything but the wait
#: takes no time.
SHARE = 0.9
#: The aim for the memory of a stream: less than this number of bytes.
GROWTH = 64 * 1000**2


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    pairs: int
    """How many pairs of processes compare the CPU time."""
    rounds: int
    """How many batches of each operation a pair compares."""
    turns: int
    """How often the sides take turns to serve."""
    seconds: float
    """How many seconds a side serves in its turn."""
    rows: int
    """How many rows are streamed."""


FULL = Effort(pairs=10, rounds=30, turns=3, seconds=3.0, rows=1_000_000)
QUICK = Effort(pairs=3, rounds=10, turns=1, seconds=2.0, rows=200_000)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    figure: str
    driver: str
    ours: str
    stock: str
    ratio: str
    aim: str = ""
    met: bool | None = None
    """Whether the aim is met; ``None`` without an aim."""

    def __str__(self) -> str:
        met = "" if self.met is None else "yes" if self.met else "no"
        cells = (self.figure, self.driver, self.ours, self.stock, self.ratio, self.aim, met)
        return f"| {' | '.join(cells)} |"


HEAD = """\
| figure | driver | ours | stock | ratio | aim | met |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="take about two minutes")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="store the table in a file")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with setting(effort.rows) as where:
        rows = list(measure(where, effort))
        table = "\n".join([HEAD, *map(str, rows), "", *notes(where, arguments.quick)])
    print(f"\n{table}")
    if arguments.markdown:
        arguments.markdown.write_text(f"{table}\n", encoding="utf-8")


def measure(where: Setting, effort: Effort) -> Iterator[Row]:
    """Measure all figures, one kind after the other."""
    for driver, url in where.proxied.items():
        yield from measure_round_trips(where.proxy, driver, url)
    for driver, url in where.urls.items():
        yield from measure_calls(driver, url)
    for driver, url in where.urls.items():
        yield from measure_cpu(driver, url, effort)
    for driver, url in where.urls.items():
        yield from measure_instructions(driver, url)
    for driver, url in where.urls.items():
        yield from measure_served(driver, url, effort)
    for driver, url in where.urls.items():
        for method in memory.STREAMS:
            yield from measure_growth(driver, url, method, effort.rows)


def measure_round_trips(proxy: WireProxy, driver: str, url: str) -> Iterator[Row]:
    """Count the round trips of each operation."""
    figures = round_trips.measure(proxy, driver, url, SIDES, OPERATIONS)
    for what, ours, stock in pairs(figures, round_trips.ROUND_TRIPS):
        aim = ROUND_TRIPS.get(what)
        yield Row(
            f"round trips, {what}",
            driver,
            f"{ours:.0f}",
            f"{stock:.0f}",
            f"{ours / stock:.2f}",
            "" if aim is None else f"≤ {aim}",
            None if aim is None else ours <= aim,
        )


def measure_calls(driver: str, url: str) -> Iterator[Row]:
    """Count the calls of Python functions that each operation makes."""
    figures = cpu.measure_calls(driver, url, SIDES, OPERATIONS)
    for what, ours, stock in pairs(figures, cpu.CALLS):
        aim = CPU[what]
        yield Row(
            f"Python calls, {what}",
            driver,
            f"{ours:.0f}",
            f"{stock:.0f}",
            f"{ours / stock:.2f}",
            f"≤ {aim:.2f}",
            round(ours / stock, 2) <= aim,
        )


def measure_cpu(driver: str, url: str, effort: Effort) -> Iterator[Row]:
    """Compare the client's CPU time."""
    figures = list(
        cpu.measure_time(driver, url, SIDES, "stock", OPERATIONS, effort.pairs, effort.rounds)
    )
    ratios = {one.what: one for one in figures if (one.kind, one.peer) == (cpu.CPU, "ours")}
    for what, ours, stock in pairs(figures, cpu.SECONDS):
        ratio, aim = ratios[what], CPU[what]
        assert ratio.value is not None
        yield Row(
            f"client CPU, {what}",
            driver,
            f"{ours * 1e6:.0f} µs",
            f"{stock * 1e6:.0f} µs",
            f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            f"≤ {aim:.2f}",
            round(ratio.value, 2) <= aim,
        )


def measure_instructions(driver: str, url: str) -> Iterator[Row]:
    """Count the client's instructions, if the machine can."""
    figures = cpu.measure_instructions(driver, url, SIDES, OPERATIONS, batches=20)
    for what, ours, stock in pairs(figures, cpu.INSTRUCTIONS):
        yield Row(
            f"client instructions, {what}",
            driver,
            f"{ours / 1000:.0f} k",
            f"{stock / 1000:.0f} k",
            f"{ours / stock:.2f}",
        )


def measure_served(driver: str, url: str, effort: Effort) -> Iterator[Row]:
    """Serve requests that wait, on both sides in turn."""
    figures = waiting.measure(
        driver, url, SIDES, [THREADS], effort.turns, effort.seconds, pool_size=POOL, max_overflow=0
    )
    for what, ours, stock in pairs(figures, waiting.SHARE):
        yield Row(
            f"requests/s of the ideal, {what}, {THREADS} threads on a pool of {POOL}",
            driver,
            f"{ours:.2f}",
            f"{stock:.2f}",
            f"{ours / stock:.2f}",
            f"≥ {SHARE}",
            round(ours, 2) >= SHARE,
        )


def measure_growth(driver: str, url: str, method: str, rows: int) -> Iterator[Row]:
    """Stream rows, each side in a process of its own."""
    figures = memory.measure_streamed(driver, url, SIDES, method, rows)
    for what, ours, stock in pairs(figures, memory.STREAMED):
        yield Row(
            f"memory, streaming {what}",
            driver,
            f"{ours / 1000**2:.1f} MB",
            f"{stock / 1000**2:.1f} MB",
            f"{ours / stock:.2f}" if stock else "",
            f"< {GROWTH // 1000**2} MB",
            ours < GROWTH,
        )


def pairs(figures: Iterable[Figure], kind: str) -> Iterator[tuple[str, float, float]]:
    """Give the name of what was measured, and the values of both sides.

    :param figures: The figures.
    :param kind: The kind of the figures that are given.
    """
    found: dict[str, dict[str, float]] = {}
    for figure in figures:
        if figure.kind == kind and figure.value is not None:
            found.setdefault(figure.what, {})[figure.peer] = figure.value
    for what, values in found.items():
        if len(values) == len(SIDES):
            yield what, values["ours"], values["stock"]


def notes(where: Setting, quick: bool) -> Iterator[str]:
    """Say with which versions and how the figures were measured, and how to measure again."""
    yield where.versions()
    yield (
        "Each operation is a whole request: it pushes an application context, at whose end the "
        "session is removed. A ratio of CPU times is the median of several pairs of processes; "
        "the lowest and the highest are in brackets."
    )
    yield f"Made by `python -m nox -s bench -- core{' --quick' if quick else ''}`."


if __name__ == "__main__":
    main()
