"""Whether the machine is quiet: what other programs do with it meanwhile makes the times rougher.

Before a run the load average of one minute tells it. During a run that is our own; so between two
kinds of measurement, while nothing of ours works, we look how busy the CPUs are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import progress

#: The load average up to which the machine is quiet, and how many seconds to wait for that.
LOAD, PATIENCE = 0.3, 300.0
#: How many CPUs others may use.
CPUS = 0.2

_PAUSE = 15.0
_LOOK = 1.0
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


def busy() -> float | None:
    """Return how many CPUs are busy while this process sleeps a moment, if the machine tells."""
    if not _STAT.exists():
        return None
    before, start = _cpu_seconds(), time.monotonic()
    time.sleep(_LOOK)
    return (_cpu_seconds() - before) / (time.monotonic() - start)


def disturbances(began_quiet: bool, looks: Sequence[float | None]) -> Iterator[str]:
    """Say for the page where the machine was not quiet.

    :param began_quiet: Whether it was when the run began.
    :param looks: How many CPUs were busy each time that we looked during the run.
    """
    if not began_quiet:
        yield (
            "Other programs kept the machine busy when the run began: the times are rougher than "
            "their spread says."
        )
    seen = [one for one in looks if one is not None]
    disturbed = [one for one in seen if one > CPUS]
    if disturbed:
        yield (
            f"Other programs used up to {max(disturbed):.1f} CPUs during the run, in "
            f"{len(disturbed)} of {len(seen)} looks: the times are rougher than their spread says."
        )


def _cpu_seconds() -> float:
    """Return how many seconds all CPUs have worked since the machine was started."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, _STAT.read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
