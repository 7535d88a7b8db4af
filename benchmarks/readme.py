"""README's table: the main figures of this package and of stock Flask-SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import contention, cpu, memory, round_trips, waiting
from benchmarks.core import CPU, GROWTH, ROUND_TRIPS
from benchmarks.figures import Figure
from benchmarks.peers import (
    BLOCK_OF_TWO,
    CREATED_INSIDE,
    DRIVER_TITLES,
    LAZY_LOADS,
    MAX_OVERFLOW,
    PAGINATE,
    POOL_SIZE,
    READ,
    READ_THEN_UPDATE,
    STORE,
    TEN_READS,
)

_TRIPS = (READ, READ_THEN_UPDATE, STORE, CREATED_INSIDE)
_CPU = (READ, TEN_READS, LAZY_LOADS, PAGINATE, READ_THEN_UPDATE, STORE, BLOCK_OF_TWO)

#: The number of threads of which the table has the requests per second.
THREADS = 50


def table(figures: Sequence[Figure]) -> str:
    """Return the table.

    :param figures: The figures.
    """
    head = ["", *DRIVER_TITLES.values(), "aim"]
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, _rows(figures))])


def _rows(figures: Sequence[Figure]) -> Iterator[list[str]]:
    """Yield the cells of each line."""
    for one in _TRIPS:
        aim = ROUND_TRIPS.get(one.title)
        cells = _cells(figures, round_trips.ROUND_TRIPS, one.title, None, "{:,.0f}".format)
        yield [f"round trips, {one.title}", *cells, "" if aim is None else f"≤ {aim}"]
    for one in _CPU:
        ours = _values(figures, "ours", cpu.CPU, one.title)
        cells = ["" if value is None else f"{value:.2f}" for value in ours]
        yield [f"client CPU, {one.title}, as a ratio to stock's", *cells, f"≤ {CPU[one.title]:.2f}"]
    connections = POOL_SIZE + MAX_OVERFLOW
    cells = _cells(figures, waiting.SHARE, None, THREADS, "{:.2f}".format)
    yield [
        f"requests per second as a share of the ideal, {THREADS} threads, {connections} "
        "connections",
        *cells,
        "",
    ]
    cells = _cells(figures, contention.RATE, None, None, "{:,.0f}".format)
    yield [
        f"{contention.RATE}, {contention.THREADS} threads, round trips {contention.DELAY} ms "
        "longer",
        *cells,
        "",
    ]
    streamed = next((one.what for one in figures if one.kind == memory.STREAMED), "")
    cells = _cells(figures, memory.STREAMED, None, None, lambda value: f"{value / 1000**2:.1f} MB")
    yield [f"memory for streaming {streamed}", *cells, f"< {GROWTH // 1000**2} MB"]


def _cells(
    figures: Sequence[Figure],
    kind: str,
    what: str | None,
    at: float | None,
    form: Callable[[float], str],
) -> list[str]:
    """Return this package's figure, and that of stock in brackets, for each driver."""
    return [
        "" if ours is None or stock is None else f"{form(ours)} (stock {form(stock)})"
        for ours, stock in zip(
            _values(figures, "ours", kind, what, at),
            _values(figures, "stock", kind, what, at),
            strict=True,
        )
    ]


def _values(
    figures: Sequence[Figure],
    peer: str,
    kind: str,
    what: str | None = None,
    at: float | None = None,
) -> Iterator[float | None]:
    """Yield a figure of a peer for each driver."""
    for driver in DRIVER_TITLES:
        yield next(
            (
                one.value
                for one in figures
                if (one.kind, one.driver, one.peer) == (kind, driver, peer)
                and what in (None, one.what)
                and at in (None, one.at)
            ),
            None,
        )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
