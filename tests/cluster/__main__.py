"""``python -m tests.cluster``: a failover while the bank is open, see :mod:`tests.cluster`."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom

from tests.cluster import programs, report
from tests.cluster.keeping import ClusterError
from tests.cluster.moments import MOMENTS, moments_for, play
from tests.cluster.records import Moment
from tests.cluster.servers import NAMES, ROOT
from tests.cluster.stage import Stage, Wanted

DRIVERS = ("psycopg2", "psycopg")

# Whatever hangs in spite of all timeouts is shown, and ended.
_LONGEST_START, _LONGEST_MOMENT = 300.0, 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the moments.

    :param arguments: The command line.
    :returns: The exit code: 1 if anything has failed.
    """
    options = parse(arguments)
    names: list[str] = options.moments
    wanted = Wanted(
        driver=options.driver,
        through=options.through,
        begin_on_write=options.begin_on_write,
        settings=options.settings,
        record=options.record,
        asynchronous=options.asynchronous,
        replicas_apart=options.replicas_apart,
        seconds=options.seconds,
        seed=options.seed,
    )
    try:
        programs.get_all()
        moments = _run(wanted, names, options.logs)
    except (programs.Missing, ClusterError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{report.table(moments)}\n")
    if options.write:
        report.write(moments, ROOT / "docs", NAMES, wanted)
    failures = sum(len(moment.failures) for moment in moments)
    print("All is well." if not failures else f"{failures} failures.")
    return 1 if failures else 0


def _run(wanted: Wanted, names: Sequence[str], logs: Path | None) -> list[Moment]:
    moments: list[Moment] = []
    longest = _LONGEST_START + len(names) * (_LONGEST_MOMENT + wanted.seconds)
    faulthandler.dump_traceback_later(longest, exit=True)
    print(f"{wanted.driver} through {wanted.through}, seed {wanted.seed}", flush=True)
    try:
        with Stage(wanted) as stage:
            try:
                for name in names:
                    moments.append(play(stage, name))
                    for line in (*report.lines(moments[-1]), *report.timeline(moments[-1])):
                        print(line, flush=True)
            finally:
                if logs is not None:
                    stage.cluster.save_logs(logs)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return moments


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; an error in it ends the program, with a text that says what.

    :param arguments: The command line.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    add = parser.add_argument
    add("--driver", choices=DRIVERS, default="psycopg2", help="default: %(default)s")
    add(
        "--through",
        choices=("hosts", "pgbouncer"),
        default="hosts",
        help="how the bank reaches the primary: libpq, which has all hosts, finds it, or PgBouncer"
        " with HAProxy behind it; default: %(default)s",
    )
    add("--begin-on-write", action="store_true", help="sessions with this option")
    add("--settings", action="store_true", help="each request sets a tenant with set_local()")
    add(
        "--record",
        action="store_true",
        help="with report_requests(), of which lines are shown, and the connections at work",
    )
    add(
        "--asynchronous",
        action="store_true",
        help="no COMMIT waits for a standby: lost transfers are counted, and are no failure",
    )
    add(
        "--replicas-apart",
        action="store_true",
        help="a URL for each replica, instead of one with all hosts",
    )
    add("--moments", help=f"by commas, out of: {', '.join(MOMENTS)}; default: all")
    add(
        "--seconds",
        type=float,
        default=12.0,
        help="how long the clients go on after each moment; default: %(default)s",
    )
    add("--write", action="store_true", help="write the picture and the table into docs/")
    add("--logs", type=Path, help="copy what the servers have logged to this directory")
    add(
        "--seed",
        type=int,
        default=SystemRandom().randrange(1, 10**6),
        help="what the clients do; default: random",
    )
    options = parser.parse_args(arguments)
    if options.seconds < 1:
        parser.error("--seconds is at least 1.")
    names = moments_for(options.through, synchronous=not options.asynchronous)
    if options.moments is not None:
        names = [name.strip() for name in options.moments.split(",")]
        unknown = [name for name in names if name not in MOMENTS]
        if unknown:
            parser.error(f"There is no moment {unknown[0]!r}, only {', '.join(MOMENTS)}.")
    options.moments = names
    return options


if __name__ == "__main__":
    sys.exit(main())
