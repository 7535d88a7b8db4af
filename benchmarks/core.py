"""The figures that README quotes, ours beside stock Flask-SQLAlchemy's.

``python -m nox -s bench -- core`` runs it; ``--quick`` takes a minute, ``--markdown FILE`` stores
the table. It measures and judges nothing by the clock: what it prints are counts and ratios from
one run in which both sides take turns.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy

import fictive_sqlalchemy
from benchmarks.apps import OPERATIONS, SIDES, Ours, Stock
from benchmarks.figures import Cpu, calls, cpu, grown, instructions, round_trips, served
from tests.postgres import PostgresServer, server_from_environment
from tests.wire import WireProxy

DRIVERS = ("psycopg2", "psycopg")

#: The most that is met, by the name of the operation.
ROUND_TRIPS = {"read": 1, "read_then_update": 4}
CPU = {"read": 0.85, "ten_reads": 1.0, "read_then_update": 1.0}

THREADS, POOL, WAIT, SHARE = 20, 5, 0.05, 0.9
STREAMS = {"stream_objects": "objects", "stream_rows": "rows, without the ORM"}
GROWTH = 64 * 1024 * 1024


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    pairs: int
    """How many pairs of processes compare the CPU time."""
    rounds: int
    """How many batches of each operation they compare."""
    turns: int
    """How often the sides take turns to serve."""
    seconds: float
    """How long a side serves in its turn."""
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
    goal: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        met = "" if self.met is None else "yes" if self.met else "no"
        cells = (self.figure, self.driver, self.ours, self.stock, self.ratio, self.goal, met)
        return f"| {' | '.join(cells)} |"


HEAD = """\
| figure | driver | ours | stock | ratio | goal | met |
|---|---|---|---|---|---|---|"""


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="take about a minute")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="store the table in a file")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    with server_from_environment() as server:
        database = server.create_database()
        try:
            app = Stock(server.url("psycopg2", database))
            app.fill(effort.rows)
            app.close()
            rows = list(measure(server, database, effort))
        finally:
            server.drop_database(database)
        table = "\n".join([HEAD, *map(str, rows), "", *notes(server, arguments.quick)])
    print(f"\n{table}")
    if arguments.markdown:
        arguments.markdown.write_text(f"{table}\n", encoding="utf-8")


def measure(server: PostgresServer, database: str, effort: Effort) -> Iterator[Row]:
    """Measure all figures, one kind after the other."""
    urls = {driver: server.url(driver, database) for driver in DRIVERS}
    with WireProxy(server.host, server.port) as proxy:
        for driver, url in urls.items():
            progress(f"round trips, {driver}")
            yield from measure_round_trips(proxy, driver, proxy.url(url))
    for driver, url in urls.items():
        progress(f"Python calls, {driver}")
        yield from measure_calls(driver, url)
    for driver, url in urls.items():
        progress(f"client CPU, {driver}")
        for operation, compared in cpu(url, effort.pairs, effort.rounds).items():
            yield cpu_row(driver, operation, compared)
    for driver, url in urls.items():
        progress(f"instructions, {driver}")
        yield from measure_instructions(driver, url)
    for driver, url in urls.items():
        progress(f"requests that wait, {driver}")
        yield measure_served(driver, url, effort)
    for driver, url in urls.items():
        for method, what in STREAMS.items():
            progress(f"streaming {what}, {driver}")
            yield measure_growth(driver, url, method, effort.rows)


def measure_round_trips(proxy: WireProxy, driver: str, url: str) -> Iterator[Row]:
    """Count the round trips of each operation."""
    sides = [side(url) for side in SIDES]
    for operation, what in OPERATIONS.items():
        ours, stock = (round_trips(proxy, side, operation) for side in sides)
        goal = ROUND_TRIPS.get(operation)
        yield Row(
            f"round trips, {what}",
            driver,
            str(ours),
            str(stock),
            f"{ours / stock:.2f}",
            "" if goal is None else str(goal),
            None if goal is None else ours <= goal,
        )
    for side in sides:
        side.close()


def measure_calls(driver: str, url: str) -> Iterator[Row]:
    """Count the calls of Python functions that each operation makes."""
    sides = [side(url) for side in SIDES]
    for operation, what in OPERATIONS.items():
        ours, stock = (calls(side, operation) for side in sides)
        yield Row(
            f"Python calls, {what}",
            driver,
            f"{ours:.0f}",
            f"{stock:.0f}",
            f"{ours / stock:.2f}",
        )
    for side in sides:
        side.close()


def cpu_row(driver: str, operation: str, compared: Cpu) -> Row:
    """Say how the client's CPU time compares."""
    ratio, goal = compared.ratio, CPU[operation]
    return Row(
        f"client CPU, {OPERATIONS[operation]}",
        driver,
        f"{compared.ours * 1e6:.0f} µs",
        f"{compared.stock * 1e6:.0f} µs",
        f"{ratio:.2f} ({compared.ratios[0]:.2f} to {compared.ratios[-1]:.2f})",
        f"≤ {goal:.2f}",
        round(ratio, 2) <= goal,
    )


def measure_instructions(driver: str, url: str) -> Iterator[Row]:
    """Count the client's instructions, if the machine can."""
    for operation, what in OPERATIONS.items():
        counts = [instructions(url, side, operation, count=300) for side in SIDES]
        ours, stock = counts
        if ours is None or stock is None:
            progress("  this machine does not count them")
            return
        yield Row(
            f"client instructions, {what}",
            driver,
            f"{ours / 1000:.0f} k",
            f"{stock / 1000:.0f} k",
            f"{ours / stock:.2f}",
        )


def measure_served(driver: str, url: str, effort: Effort) -> Row:
    """Serve requests that wait, on both sides in turn."""
    sides = [side(url, pool_size=POOL, max_overflow=0) for side in SIDES]
    shares: list[list[float]] = [[], []]
    for side in sides:
        served(side, THREADS, WAIT, 0.2)  # to make the connections
    for _ in range(effort.turns):
        for side, found in zip(sides, shares, strict=True):
            found.append(served(side, THREADS, WAIT, effort.seconds))
    for side in sides:
        side.close()
    ours, stock = (sum(found) / len(found) for found in shares)
    return Row(
        f"requests/s of the ideal, {WAIT * 1000:.0f} ms between two reads, {THREADS} threads on "
        f"a pool of {POOL}",
        driver,
        f"{ours:.2f}",
        f"{stock:.2f}",
        f"{ours / stock:.2f}",
        f"≥ {SHARE}",
        round(ours, 2) >= SHARE,
    )


def measure_growth(driver: str, url: str, method: str, rows: int) -> Row:
    """Stream rows, each side in a process of its own."""
    ours, stock = (grown(url, side, method, rows) for side in (Ours, Stock))
    return Row(
        f"memory, streaming {rows:,} {STREAMS[method]}",
        driver,
        f"{ours / 1024**2:.1f} MB",
        f"{stock / 1024**2:.1f} MB",
        f"{ours / stock:.2f}" if stock else "",
        f"< {GROWTH // 1024**2} MB",
        ours < GROWTH,
    )


def notes(server: PostgresServer, quick: bool) -> Iterator[str]:
    """Say what was measured with what, and how to measure it again."""
    yield (
        f"fictive-sqlalchemy {fictive_sqlalchemy.__version__}, "
        f"Flask-SQLAlchemy {version('flask-sqlalchemy')}, SQLAlchemy {sqlalchemy.__version__}, "
        f"Flask {version('flask')}, {', '.join(map(with_version, DRIVERS))}, "
        f"PostgreSQL {server.version}, "
        f"{platform.python_implementation()} {platform.python_version()}, "
        f"{platform.system()} on {platform.machine()} with {os.cpu_count()} CPUs."
    )
    yield (
        "An operation is a whole request: it pushes an application context, and the session ends "
        "with that. The ratio of the CPU times is the median over several pairs of processes, "
        "in brackets their lowest and highest."
    )
    yield f"Made by `python -m nox -s bench -- core{' --quick' if quick else ''}`."


def with_version(driver: str) -> str:
    """Return the name and the version of a driver."""
    dbapi: Any = sqlalchemy.create_engine(f"postgresql+{driver}://").dialect.loaded_dbapi
    return f"{driver} {dbapi.__version__.split()[0]}"


def progress(text: str) -> None:
    """Tell a waiting reader what is going on."""
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
