"""Writes what was measured into ``docs/benchmarks.md`` and into README's table.

The text between ``<!-- measured: NAME -->`` and ``<!-- end -->`` is replaced. All other text stays,
so it may state what the package and its peers send, but no measured time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    behind,
    contention,
    cpu,
    growth,
    latency,
    memory,
    plots,
    round_trips,
    summary,
    waiting,
)
from benchmarks.figures import Figure, find
from benchmarks.peers import DRIVER_TITLES, PEERS, READING, WRITING, load_peer
from benchmarks.places import fill, markdown

#: How many columns with figures a table has at most, so that a phone can show the whole table.
MOST_COLUMNS = 3


def write(root: Path, facts: Sequence[str], figures: Sequence[Figure]) -> None:
    """Write the figures into the page and into README's table, and draw the plots.

    :param root: The directory of the project.
    :param facts: The versions and the conditions of the run.
    :param figures: The figures.
    """
    plots.draw(root / "docs" / "images", figures)
    fill(root / "docs" / "benchmarks.md", parts(facts, figures))
    table = summary.table(figures, summary.rows_of_readme(figures))
    fill(root / "README.md", {"figures": "\n\n".join([table, *facts])})


def parts(facts: Sequence[str], figures: Sequence[Figure]) -> dict[str, str]:
    """Return the texts for the page, by the names of their places."""
    written = {
        "round trips": _by_operation(figures, round_trips.ROUND_TRIPS, count),
        "cpu": _by_operation(figures, cpu.CPU, ratio),
        "calls": _by_operation(figures, cpu.CALLS, count),
        "instructions": _instructions(figures),
    }
    tables = {
        "memory": [
            Column("one object of a request that holds many", memory.HELD, kilobytes),
            Column("a stream of objects", memory.STREAMED, megabytes),
        ],
        "latency": [
            Column(f"{one.title}, {delay:.0f} ms", latency.LATENCY, ratio, one.title, delay)
            for one in latency.OPERATIONS
            for delay in latency.DELAYS
        ],
        "served": [
            Column(
                "1 thread" if threads == 1 else f"{threads} threads",
                waiting.SHARE,
                ratio,
                at=threads,
            )
            for threads in waiting.NUMBERS_OF_THREADS
        ],
        "crowd": [
            Column(title, kind, form, at=waiting.NUMBERS_OF_THREADS[-1])
            for title, kind, form in (
                ("99th percentile, in waits", waiting.P99, ratio),
                ("connections, the most", waiting.CONNECTIONS, count),
                ("idle in a transaction, the mean", waiting.IDLE, ratio),
                ("seconds idle in a transaction, per request", waiting.IDLE_SECONDS, ratio),
            )
        ],
        "hot row": [
            Column("updates per second", contention.RATE, count),
            Column("as a ratio to psycopg by hand", contention.RATIO, ratio),
        ],
        "growth": [
            Column(f"{kind}: {sizes[-1]:,}", kind, ratio, at=sizes[-1])
            for kind, sizes in growth.SIZES.items()
        ],
    }
    for name, columns in tables.items():
        written[name] = "\n\n".join(_tables(figures, columns))
    written["first"] = summary.table(figures, summary.FIRST)
    written["facts"] = "\n\n".join(facts)
    written["behind"] = behind.text(figures)
    return written


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: str
    form: Callable[[Figure], str]
    what: str | None = None
    at: float | None = None

    def cell(self, figures: Sequence[Figure], driver: str, peer: str) -> str:
        """Return the cell of a peer."""
        one = find(figures, self.kind, driver, peer, self.what, self.at)
        if one is None:
            return ""
        return "fails" if one.value is None else self.form(one)


def ratio(figure: Figure) -> str:
    """Format a ratio and its spread."""
    return _spread(figure, lambda value: f"{value:.2f}" if value < 10 else f"{value:.0f}")


def count(figure: Figure) -> str:
    """Format a number and its spread."""
    return _spread(figure, lambda value: f"{value:,.0f}")


def kilobytes(figure: Figure) -> str:
    """Format a number of bytes in kB, and its spread."""
    return _spread(figure, lambda value: f"{value / 1000:.2f} kB")


def megabytes(figure: Figure) -> str:
    """Format a number of bytes in MB, and its spread."""
    return _spread(figure, lambda value: f"{value / 1000**2:.1f} MB")


def _spread(figure: Figure, form: Callable[[float], str]) -> str:
    assert figure.value is not None
    middle = form(figure.value)
    if figure.low is None or figure.high is None:
        return middle
    low, high = form(figure.low), form(figure.high)
    return middle if low == high else f"{middle} ({low} to {high})"


def _by_operation(figures: Sequence[Figure], kind: str, form: Callable[[Figure], str]) -> str:
    """Return the tables of the operations that read, and of those that write."""
    tables: list[str] = []
    for operations in (READING, WRITING):
        columns = [Column(one.title, kind, form, one.title) for one in operations]
        tables.extend(_tables(figures, columns))
    return "\n\n".join(tables)


def _instructions(figures: Sequence[Figure]) -> str:
    """Return the paragraph and its tables; no text if no instructions were counted."""
    if not any(one.kind == cpu.INSTRUCTIONS and one.value is not None for one in figures):
        return ""
    tables = _by_operation(figures, cpu.INSTRUCTIONS, count)
    return (
        f"These are the instructions that the client executes, as `perf` counts them:\n\n{tables}"
    )


def _tables(figures: Sequence[Figure], columns: Sequence[Column]) -> Iterator[str]:
    """Yield tables for each driver, with a line for each peer that has figures."""
    number = -(-len(columns) // MOST_COLUMNS)
    size = -(-len(columns) // number)
    for driver, title in DRIVER_TITLES.items():
        for start in range(0, len(columns), size):
            yield _table(figures, columns[start : start + size], driver, title)


def _table(figures: Sequence[Figure], columns: Sequence[Column], driver: str, title: str) -> str:
    rows: list[list[str]] = []
    for peer in PEERS:
        cells = [column.cell(figures, driver, peer) for column in columns]
        if any(cells):
            rows.append([load_peer(peer).title, *cells])
    return markdown([title, *(column.title for column in columns)], rows)
