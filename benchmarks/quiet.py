"""Tells whether other programs use the machine, which makes the measured times less exact.

Before a run, we look at the load average of the last minute. During a run, the load is our own, so
we measure how busy the CPUs are while nothing is being measured. If ``DATABASE_URL`` names a server
on the same machine, this server counts as another program.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import progress

#: The load average up to which the machine counts as quiet.
LOAD = 0.3
#: How many seconds to wait for a quiet machine before a run.
PATIENCE = 300.0
#: How many CPUs other programs may use during a run.
CPUS = 0.2

# The seconds between two looks at the load average.
_PAUSE = 15.0
# For how many seconds one check during a run measures the CPUs.
_CHECK = 1.0
# Where Linux counts the CPU time of all programs.
_STAT = Path("/proc/stat")


def wait(patience: float) -> bool:
    """Wait until the machine is quiet; return whether it is.

    :param patience: For how many seconds at most.
    """
    end = time.monotonic() + patience
    while (load := os.getloadavg()[0]) > LOAD:
        if time.monotonic() >= end:
            return False
        progress(f"waiting until the machine is quiet, its load average is {load:.2f}")
        time.sleep(_PAUSE)
    return True


def cpus_in_use() -> float | None:
    """Return how many CPUs are busy while this process sleeps; ``None`` if that is not known."""
    if not _STAT.exists():
        return None
    before, start = _cpu_seconds(), time.monotonic()
    time.sleep(_CHECK)
    return (_cpu_seconds() - before) / (time.monotonic() - start)


def disturbances(began_quiet: bool, checks: Sequence[float | None]) -> Iterator[str]:
    """Yield sentences for the page about the use of the machine by other programs.

    :param began_quiet: Whether the machine was quiet when the run began.
    :param checks: How many CPUs were in use at each check during the run.
    """
    if not began_quiet:
        yield (
            "Other programs used the machine when the run began: the times are less exact than "
            "their spread suggests."
        )
    known = [one for one in checks if one is not None]
    disturbed = [one for one in known if one > CPUS]
    if disturbed:
        yield (
            f"Other programs used up to {max(disturbed):.1f} CPUs during the run, in "
            f"{len(disturbed)} of {len(known)} checks: the times are less exact than their spread "
            "suggests."
        )


def _cpu_seconds() -> float:
    """Return how many seconds all CPUs together have been busy since the system was started."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
