"""The main figures of this package and of stock Flask-SQLAlchemy, for README and the page's top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import contention, cpu, memory, round_trips, waiting
from benchmarks.figures import Figure, find
from benchmarks.peers import (
    BLOCK_OF_TWO,
    DRIVER_TITLES,
    MAX_OVERFLOW,
    OPERATIONS,
    POOL_SIZE,
    READ,
    READ_THEN_UPDATE,
    STORE,
    TEN_READS,
    Operation,
)
from benchmarks.places import markdown

#: The number of threads for which the table has the requests per second.
THREADS = 50


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    kind: str
    what: str | None = None
    at: float | None = None
    form: Callable[[float], str] = "{:.2f}".format
    is_ratio: bool = False
    """Whether the figure is a ratio to stock, whose own figure is 1."""

    def value(self, figures: Sequence[Figure], driver: str, peer: str) -> float | None:
        """Return the figure of a peer, if there is one."""
        one = find(figures, self.kind, driver, peer, self.what, self.at)
        return None if one is None else one.value

    def cell(self, figures: Sequence[Figure], driver: str) -> str:
        """Return this package's figure, and that of stock in brackets."""
        ours, stock = (self.value(figures, driver, peer) for peer in ("ours", "stock"))
        if ours is None or stock is None:
            return ""
        return self.form(ours) if self.is_ratio else f"{self.form(ours)} (stock {self.form(stock)})"


def _trips(operation: Operation) -> Row:
    return Row(
        f"round trips, {operation.title}",
        round_trips.ROUND_TRIPS,
        operation.title,
        form="{:,.0f}".format,
    )


def _cpu(operation: Operation) -> Row:
    title = f"client CPU, {operation.title} (stock = 1)"
    return Row(title, cpu.CPU, operation.title, is_ratio=True)


_SERVED = Row(
    f"requests per second as a share of the ideal, {THREADS} threads, "
    f"{POOL_SIZE + MAX_OVERFLOW} connections (more is better)",
    waiting.SHARE,
    at=THREADS,
)

#: The four figures at the top of the page, and in its picture.
FIRST = (_trips(READ), _trips(READ_THEN_UPDATE), _SERVED, _cpu(BLOCK_OF_TWO))

#: The figures of README, without the largest ratios of the CPU time.
ROWS = (
    _trips(READ),
    _trips(READ_THEN_UPDATE),
    _trips(STORE),
    _SERVED,
    Row(
        f"{contention.RATE}, {contention.THREADS} threads, round trips {contention.DELAY} ms "
        "longer (more is better)",
        contention.RATE,
        form="{:,.0f}".format,
    ),
    _cpu(READ),
    _cpu(TEN_READS),
    _cpu(READ_THEN_UPDATE),
    _cpu(STORE),
    _cpu(BLOCK_OF_TWO),
    Row(
        "memory for a stream of objects",
        memory.STREAMED,
        form=lambda value: f"{value / 1000**2:.1f} MB",
    ),
)


def rows_of_readme(figures: Sequence[Figure]) -> list[Row]:
    """Return the lines of README's table.

    The line with the largest ratio of the CPU time is among them, for each driver, so that README
    does not look better than the page.

    :param figures: The figures.
    """
    largest: set[str] = set()
    for driver in DRIVER_TITLES:
        ratios = {one: _cpu(one).value(figures, driver, "ours") for one in OPERATIONS}
        known = {one.title: value for one, value in ratios.items() if value is not None}
        largest |= {title for title, value in known.items() if value == max(known.values())}
    shown = {row.what for row in ROWS if row.kind == cpu.CPU}
    added = [_cpu(one) for one in OPERATIONS if one.title in largest - shown]
    last = max(at for at, row in enumerate(ROWS) if row.kind == cpu.CPU)
    return [*ROWS[: last + 1], *added, *ROWS[last + 1 :]]


def table(figures: Sequence[Figure], rows: Sequence[Row]) -> str:
    """Return the table.

    :param figures: The figures.
    :param rows: The lines of the table.
    """
    lines = [[row.title, *(row.cell(figures, driver) for driver in DRIVER_TITLES)] for row in rows]
    return markdown(["", *DRIVER_TITLES.values()], lines)
