"""Writes what was measured into the page: ``docs/benchmarks.md``.

What stands between ``<!-- measured: NAME -->`` and ``<!-- end -->`` is written here, all else in
the page is prose that stays. So the prose can only say what does not change with the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import cpu, growth, latency, memory, plots, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import DRIVERS, PEERS, load_peer

#: What a reader calls the drivers.
DRIVER_TITLES = {"psycopg2": "psycopg2", "psycopg": "psycopg 3"}

#: Where more is better. Everywhere else less is.
MORE_IS_BETTER = {waiting.SHARE}


def write(docs: Path, facts: Sequence[str], figures: Sequence[Figure]) -> None:
    """Write the page's parts and the plots.

    :param docs: The directory of the pages.
    :param facts: What was measured with what.
    :param figures: What was measured.
    """
    plots.draw(docs / "images", figures)
    page = docs / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts(facts, figures).items():
        begin = f"<!-- measured: {name} -->\n"
        text, count = re.subn(
            f"{re.escape(begin)}.*?(?=<!-- end -->)",
            lambda _, whole=f"{begin}\n{part}\n\n": whole,  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{page} needs one place for {name!r}, it has {count}.")
    page.write_text(text, encoding="utf-8")


def parts(facts: Sequence[str], figures: Sequence[Figure]) -> dict[str, str]:
    """Return what is written into the page, by its name there."""
    threads = sorted({one.at for one in figures if one.kind == waiting.SHARE and one.at})
    most = threads[-1]
    return {
        "facts": "\n\n".join(facts),
        "round trips": _by_driver(lambda driver: _table(figures, round_trips.ROUND_TRIPS, driver)),
        "cpu": _by_driver(lambda driver: _table(figures, cpu.CPU, driver)),
        "calls": _by_driver(lambda driver: _table(figures, cpu.CALLS, driver)),
        "instructions": _instructions(figures),
        "memory": _by_driver(lambda driver: _memory(figures, driver)),
        "latency": _by_driver(lambda driver: _latency(figures, driver)),
        "waiting": _by_driver(lambda driver: _waiting(figures, driver, most)),
        "growth": _by_driver(lambda driver: _growth(figures, driver)),
        "behind": behind(figures),
    }


def _by_driver(table: Callable[[str], str]) -> str:
    return "\n\n".join(f"With {DRIVER_TITLES[one]}:\n\n{table(one)}" for one in DRIVERS)
