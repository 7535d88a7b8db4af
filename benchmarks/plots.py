"""The plots of the page: SVG, narrow enough for a phone, with a background of their own.

The same figures make the same files: a file has no date and no random names. Text stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks import cpu, growth, latency, summary, waiting
from benchmarks.figures import Figure
from benchmarks.peers import (
    BLOCK_OF_TWO,
    DRIVER_TITLES,
    LAZY_LOADS,
    PEERS,
    READ,
    READ_THEN_UPDATE,
    STORE,
    TEN_READS,
    load_peer,
)

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "benchmarks",
}
#: In inches. A phone shows a plot of this width almost as it is, so that its text can be read.
WIDTH = 4.4

LOOKS: dict[str, dict[str, Any]] = {
    "ours": {"color": "#c2185b", "linewidth": 2.6, "zorder": 3},
    "stock": {"color": "#1f5fa8"},
    "autocommit": {"color": "#1f5fa8", "linestyle": ":"},
    "lite": {"color": "#5fa8d3", "linestyle": "--"},
    "django": {"color": "#1b7f4b"},
    "peewee": {"color": "#b8860b"},
    "by_hand": {"color": "#444444", "linestyle": "--"},
    "by_hand_alone": {"color": "#8a8a8a", "linestyle": ":"},
}

#: The peers in the first picture, without those by hand.
KNOWN = ("ours", "stock", "django", "peewee")

#: The operations with bars for their CPU time. The page's tables have all operations.
BARS = (READ, TEN_READS, LAZY_LOADS, STORE, READ_THEN_UPDATE, BLOCK_OF_TWO)


def draw(directory: Path, figures: Sequence[Figure]) -> None:
    """Draw all plots.

    :param directory: The directory of the files.
    :param figures: What was measured.
    """
    directory.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw_first(directory / "benchmarks.svg", "psycopg2", figures)
        for driver, title in DRIVER_TITLES.items():
            own = [one for one in figures if one.driver == driver and one.value is not None]
            draw_cpu(directory / f"benchmarks-cpu-{driver}.svg", title, own)
            draw_latency(directory / f"benchmarks-latency-{driver}.svg", title, own)
            draw_waiting(directory / f"benchmarks-waiting-{driver}.svg", title, own)
            draw_growth(directory / f"benchmarks-growth-{driver}.svg", title, own)


def draw_first(file: Path, driver: str, figures: Sequence[Figure]) -> None:
    """Draw bars for the figures at the top of the page."""
    rows = summary.FIRST
    title = f"{DRIVER_TITLES[driver]}, compared with others"
    with _panels(file, title, len(rows), height=1.5, legend=False) as panels:
        for panel, row in zip(panels, rows, strict=True):
            _title(panel, row.title)
            panel.grid(axis="y", visible=False)
            values = {peer: row.value(figures, driver, peer) for peer in reversed(KNOWN)}
            shown = {peer: value for peer, value in values.items() if value is not None}
            bars = panel.barh(
                [_short_title(peer) for peer in shown],
                list(shown.values()),
                color=[LOOKS[peer]["color"] for peer in shown],
                height=0.7,
            )
            panel.bar_label(bars, [row.form(value) for value in shown.values()], padding=3)
            panel.margins(x=0.12)


def draw_cpu(file: Path, driver: str, figures: Sequence[Figure]) -> None:
    """Draw bars for the CPU time of some operations."""
    operations = [one.title for one in BARS]
    title = f"{driver}: client CPU, Flask-SQLAlchemy = 1"
    with _panels(file, title, len(operations), height=1.6, legend=False) as panels:
        for panel, operation in zip(panels, operations, strict=True):
            _title(panel, operation, 24)
            panel.grid(axis="y", visible=False)
            panel.axvline(1.0, color="#888888", linewidth=1)
            bars = [one for one in figures if (one.kind, one.what) == (cpu.CPU, operation)]
            order = {peer: place for place, peer in enumerate(PEERS)}
            for one in sorted(bars, key=lambda bar: order[bar.peer], reverse=True):
                value, low, high = one.value or 0.0, one.low or 0.0, one.high or 0.0
                color = LOOKS[one.peer]["color"]
                panel.barh(
                    _short_title(one.peer),
                    value,
                    xerr=[[value - low], [high - value]],
                    color=color,
                    ecolor="#222222",
                    height=0.7,
                )


def draw_latency(file: Path, driver: str, figures: Sequence[Figure]) -> None:
    """Draw lines for the time of requests over the network's delay."""
    operations = [one.title for one in latency.OPERATIONS]
    with _panels(file, f"{driver}: time, by hand = 1", len(operations)) as panels:
        for panel, operation in zip(panels, operations, strict=True):
            _title(panel, operation)
            _lines(panel, figures, latency.LATENCY, operation, evenly=True)
            panel.set_xticks(range(len(latency.DELAYS)), [f"{one} ms" for one in latency.DELAYS])
            panel.set_ylim(bottom=0)
        panels[-1].set_xlabel("added to a round trip")


def draw_waiting(file: Path, driver: str, figures: Sequence[Figure]) -> None:
    """Draw lines for what is served over the number of threads."""
    kinds = {
        waiting.SHARE: "requests/s, ideal = 1",
        waiting.P99: "99th percentile of the time, in waits",
        waiting.IDLE_SECONDS: "seconds idle in a transaction, per request",
        waiting.CONNECTIONS: "connections, the most",
    }
    with _panels(file, driver, len(kinds)) as panels:
        for panel, (kind, title) in zip(panels, kinds.items(), strict=True):
            _title(panel, title)
            _lines(panel, figures, kind, evenly=True)
            numbers = waiting.NUMBERS_OF_THREADS
            panel.set_xticks(range(len(numbers)), [str(one) for one in numbers])
            panel.set_ylim(bottom=0)
        panels[-1].set_xlabel("threads; 50 ms between two reads; pool of 5 + 10")


def draw_growth(file: Path, driver: str, figures: Sequence[Figure]) -> None:
    """Draw lines for the CPU time over the size, both with a logarithmic scale."""
    title = f"{driver}: client CPU, one read by hand = 1"
    with _panels(file, title, len(growth.SIZES)) as panels:
        for panel, (kind, sizes) in zip(panels, growth.SIZES.items(), strict=True):
            _title(panel, kind)
            _lines(panel, figures, kind)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(sizes, [f"{one:,}" for one in sizes])
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))


def _title(panel: Any, title: str, width: int = 36) -> None:
    """Set the title of a panel, in lines of so many letters."""
    panel.set_title("\n".join(wrap(title, width)))


def _short_title(peer: str) -> str:
    return load_peer(peer).title.removeprefix("Flask-SQLAlchemy, ").removeprefix("psycopg ")


def _lines(
    panel: Any,
    figures: Sequence[Figure],
    kind: str,
    what: str | None = None,
    evenly: bool = False,
) -> None:
    """Draw a line for each peer over the size that the figures depend on.

    :param evenly: Whether all sizes have the same distance from each other.
    """
    own = [one for one in figures if one.kind == kind and what in (None, one.what)]
    places = {at: place for place, at in enumerate(sorted({one.at or 0.0 for one in own}))}
    for peer in PEERS:
        points = sorted((one.at or 0.0, one.value) for one in own if one.peer == peer)
        if points:
            panel.plot(
                [places[at] if evenly else at for at, _ in points],
                [value for _, value in points],
                marker="o",
                label=_short_title(peer),
                **LOOKS[peer],
            )


@contextmanager
def _panels(
    file: Path, title: str, count: int, height: float = 2.5, legend: bool = True
) -> Iterator[Sequence[Any]]:
    """Give panels, one below the other, and store them in a file at the end of the block."""
    figure, panels = pyplot.subplots(
        count, figsize=(WIDTH, height * count + 1.2), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=12, x=0.01, horizontalalignment="left")
    yield list(panels[:, 0])
    if legend:
        handles, titles = panels[0, 0].get_legend_handles_labels()
        figure.legend(
            handles,
            titles,
            loc="outside lower left",
            ncols=2,
            frameon=False,
            fontsize=9,
            columnspacing=1.0,
        )
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
