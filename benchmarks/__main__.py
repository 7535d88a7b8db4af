"""All benchmarks, each peer beside the others: ``python -m nox -s bench``.

It writes the figures into ``docs/benchmarks.md``, its plots and README's table, and unrounded into
``build/benchmarks.json``, from which ``--draw`` writes the pages again. ``--quick`` takes a few
minutes; its figures are less exact. Times are ratios, because seconds depend on the machine. The
exceptions are the updates of one row per second, and the seconds that a connection is idle in a
transaction. Memory is in kB and MB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import contention, cpu, growth, latency, memory, page, quiet, round_trips, waiting
from benchmarks.figures import Figure
from benchmarks.peers import DRIVERS, OPERATIONS, PEERS
from benchmarks.setting import Setting, setting

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "build" / "benchmarks.json"
OTHERS = ("Flask-SQLAlchemy-Lite", "Django", "peewee")

#: All peers but ``by_hand_alone``, which reads as ``by_hand`` does, and differs only in its writes.
READERS = [peer for peer in PEERS if peer != "by_hand_alone"]

OBJECTS = 20_000


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    generations: int
    """How many generations of processes compare the CPU time."""
    batches: int
    """How many batches of each operation each process does."""
    processes: int
    """In how many processes the memory of a request is measured."""
    rows: int
    """How many rows are streamed."""
    delays: int
    """How often the peers take turns at each delay."""
    turns: int
    """How often the peers take turns to serve requests."""
    seconds: float
    """How many seconds each peer serves in its turn."""
    updates: int
    """How often the peers take turns to update one row, each for ``seconds``."""
    growths: int
    """How many generations of processes show how the CPU time grows."""


FULL = Effort(
    generations=4,
    batches=10,
    processes=3,
    rows=300_000,
    delays=8,
    turns=2,
    seconds=1.2,
    updates=5,
    growths=3,
)
QUICK = Effort(
    generations=2,
    batches=4,
    processes=1,
    rows=50_000,
    delays=3,
    turns=1,
    seconds=0.8,
    updates=2,
    growths=2,
)


def main() -> None:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(prog="python -m nox -s bench --", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="take a few minutes")
    parser.add_argument("--draw", action="store_true", help="measure nothing, write the page again")
    arguments = parser.parse_args()
    if not arguments.draw:
        effort = QUICK if arguments.quick else FULL
        began_quiet = quiet.wait(0.0 if arguments.quick else quiet.PATIENCE)
        watch = quiet.Watch()
        with setting(effort.rows) as where:
            plain = [asdict(figure) for figure in watch.over(measure(where, effort))]
            facts = [where.versions(*OTHERS)]
        if arguments.quick:
            facts.append("This was a quick run: the ratios are less exact.")
        facts += quiet.disturbances(began_quiet, watch.checks, watch.stolen)
        MEASURED.parent.mkdir(exist_ok=True)
        MEASURED.write_text(json.dumps({"facts": facts, "figures": plain}), encoding="utf-8")
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    figures = [Figure(**figure) for figure in measured["figures"]]
    page.write(ROOT, measured["facts"], figures)


def measure(where: Setting, effort: Effort) -> Iterator[Iterator[Figure]]:
    """Give the kinds of figures one after the other; each is measured when it is iterated over."""
    peers = list(PEERS)
    for driver in DRIVERS:
        url, proxied = where.urls[driver], where.proxied[driver]
        yield round_trips.measure(where.proxy, driver, proxied, peers, OPERATIONS)
        yield cpu.measure_calls(driver, url, peers, OPERATIONS)
        yield cpu.measure_time(
            driver, url, peers, "stock", OPERATIONS, effort.generations, effort.batches
        )
        yield cpu.measure_instructions(driver, url, peers, OPERATIONS, batches=10)
        yield memory.measure_held(driver, url, READERS, OBJECTS, effort.processes)
        yield memory.measure_streamed(driver, url, READERS, "stream_objects", effort.rows)
        yield latency.measure(where.proxy, driver, proxied, peers, "by_hand", effort.delays)
        yield waiting.measure(
            driver, url, READERS, waiting.NUMBERS_OF_THREADS, effort.turns, effort.seconds
        )
        yield contention.measure(
            where.proxy, driver, proxied, peers, "by_hand", effort.updates, effort.seconds
        )
        yield growth.measure(driver, url, peers, "by_hand", effort.growths)


if __name__ == "__main__":
    main()
