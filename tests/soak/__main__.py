"""``python -m tests.soak --minutes 30``: the bank and the state machine, see :mod:`tests.soak`."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random, SystemRandom

from tests.postgres import PostgresServer, server_from_environment
from tests.soak.bank import Round, Settings, run_round
from tests.soak.machine import StateMachine
from tests.soak.office import PATIENCE
from tests.soak.records import Report
from tests.soak.tenants import Seen, programs, run, tenants

DRIVERS = ("psycopg2", "psycopg")
MODES = ("strict", "begin-on-write")

#: So many failures are enough for one evening.
_MOST_FAILURES = 5


@dataclass
class Totals:
    """What all rounds with a driver came to."""

    rounds: int = 0
    report: Report = field(default_factory=Report)
    faults: Counter[str] = field(default_factory=Counter[str])
    pools: Counter[str] = field(default_factory=Counter[str])
    failures: list[str] = field(default_factory=list[str])
    tenants: Seen = field(default_factory=Seen)

    def add_tenants(self, seen: Seen, repeat: str) -> None:
        """Add what the programs of the tenants have seen.

        :param seen: What they have seen.
        :param repeat: The command that repeats it.
        """
        self.tenants.steps.update(seen.steps)
        self.tenants.lost += seen.lost
        if seen.violations:
            said = "\n".join(seen.violations)
            self.failures.append(f"{repeat}\n{said}")
            print(f"FAILED: {self.failures[-1]}\n", flush=True)

    def add(self, done: Round, repeat: str) -> None:
        """Add a round.

        :param done: The round.
        :param repeat: The command that repeats it.
        """
        self.rounds += 1
        self.faults.update(done.faults)
        self.pools["at rest" if not done.report.violations else "in a round that failed"] += 1
        if done.report.violations:
            said = "\n".join(done.report.violations)
            self.failures.append(f"{repeat}\n{done.said}\n{said}")
            print(f"FAILED: {self.failures[-1]}\n", flush=True)
        self.report.add(done.report)

    def __str__(self) -> str:
        report = self.report
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(report.operations.items()))
        faults = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        logged = "".join(f"\n  logged {n} times: {what}" for what, n in report.logged.most_common())
        return (
            f"  {self.rounds} rounds, {len(self.failures)} failed\n"
            f"  {report.operations.total()} operations: {kinds}\n"
            f"  {len(report.records)} transactions: {report.count('stored')} stored,"
            f" {report.count('not stored')} not stored, {report.count('unknown')} unknown\n"
            f"  {self.faults.total()} faults: {faults}\n"
            f"  {report.lost.total()} operations lost their connection\n"
            f"  pools: {dict(self.pools)}{logged}\n"
            f"  tenants: {self.tenants.steps.total()} steps,"
            f" {self.tenants.lost} lost their connection"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak.

    :param arguments: The command line.
    :returns: The exit code: 1 if anything has failed.
    """
    options = _parse(arguments)
    failures = 0
    for driver in options.driver:
        print(f"{driver}, seed {options.seed}", flush=True)
        failures += _soak(options, driver)
    return 1 if failures else 0


def _soak(options: argparse.Namespace, driver: str) -> int:
    deadline = time.monotonic() + options.minutes * 60
    # Whatever hangs in spite of all timeouts is shown, and ended.
    faulthandler.dump_traceback_later(options.minutes * 60 + PATIENCE, exit=True)
    machine = StateMachine(driver, options.seed)
    totals = Totals()
    try:
        if options.only == "machine":
            machine.run(deadline - time.monotonic())
        else:
            with server_from_environment() as server:
                _run_bank(options, driver, server, machine, totals, deadline)
    finally:
        machine.stop()
        faulthandler.cancel_dump_traceback_later()
    for failure in machine.failures:
        print(f"FAILED: {failure}\n")
    print(f"{driver}, seed {options.seed}:")
    if options.only != "machine":
        print(totals)
    if options.only not in ("bank", "tenants"):
        print(f"  state machine: {machine.seeds_done} seeds passed, {len(machine.failures)} failed")
    sys.stdout.flush()
    return len(totals.failures) + len(machine.failures)


def _run_bank(
    options: argparse.Namespace,
    driver: str,
    server: PostgresServer,
    machine: StateMachine,
    totals: Totals,
    deadline: float,
) -> None:
    longest = 0.0
    number = 0
    settings = Settings(options.threads, options.processes, options.visits)
    # The longest round so far is what the next one may take.
    while time.monotonic() + longest < deadline and len(totals.failures) < _MOST_FAILURES:
        if options.rounds is not None and number == options.rounds * len(options.mode):
            return
        if options.only is None:
            machine.go_on()
        if options.only in (None, "tenants"):
            started = time.monotonic()
            seed = options.seed + number
            with tenants(server, driver) as engines:
                seen = run(*engines, programs(Random(seed), threads=5, visits=options.visits * 4))
            repeat = (
                f"python -m tests.soak --only tenants --rounds 1 --driver {driver} --seed {seed} "
                f"--visits {options.visits}"
            )
            totals.add_tenants(seen, repeat)
            longest = max(longest, time.monotonic() - started)
        if options.only == "tenants":
            number += 1
            continue
        seed = options.seed + number // len(options.mode)
        mode = options.mode[number % len(options.mode)]
        number += 1
        started = time.monotonic()
        done = run_round(
            server, driver, seed, begin_on_write=mode == "begin-on-write", settings=settings
        )
        longest = max(longest, time.monotonic() - started)
        threads = "" if options.threads is None else f" --threads {options.threads}"
        repeat = (
            f"python -m tests.soak --only bank --rounds 1 --driver {driver} --mode {mode}"
            f" --seed {seed} --processes {options.processes} --visits {options.visits}{threads}"
        )
        totals.add(done, repeat)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for each driver; default: %(default)s"
    )
    parser.add_argument(
        "--driver", action="append", choices=DRIVERS, help="default: one after the other"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=SystemRandom().randrange(1, 10**6),
        help="the seed of the first round, the next one has the next number; default: random",
    )
    parser.add_argument("--rounds", type=int, help="end after so many rounds of the bank")
    parser.add_argument(
        "--mode", action="append", choices=MODES, help="of the bank's sessions; default: in turn"
    )
    parser.add_argument("--begin-on-write", action="store_true", help="--mode begin-on-write")
    parser.add_argument(
        "--only", choices=("bank", "machine", "tenants"), help="leave the others out"
    )
    parser.add_argument("--threads", type=int, help="of each process; default: by the seed")
    parser.add_argument(
        "--processes", type=int, default=2, help="beside the first; default: %(default)s"
    )
    parser.add_argument(
        "--visits", type=int, default=25, help="sessions of a thread; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    options.driver = options.driver or DRIVERS
    if options.begin_on_write:
        options.mode = ["begin-on-write"]
    options.mode = options.mode or MODES
    return options


if __name__ == "__main__":
    sys.exit(main())
