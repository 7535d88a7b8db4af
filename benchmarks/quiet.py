"""Tells whether other programs use the machine, which makes the measured times less exact.

Before a run, we look at the load average of the last minute. During a run, the load is our own, so
we measure how busy the CPUs are while nothing is being measured. If ``DATABASE_URL`` names a server
on the same machine, this server counts as another program. Other virtual machines are seen while we
measure, too: Linux counts as stolen the time for which a CPU had work but was not given to us. This
time is hardly ever stolen from a CPU that has nothing to do, so a check between two measurements is
not enough.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Figure, progress

#: The load average up to which the machine counts as quiet.
LOAD = 0.3
#: How many seconds to wait for a quiet machine before a run.
PATIENCE = 300.0
#: How many CPUs other programs may use during a run.
CPUS = 0.2
#: How many CPUs other virtual machines may take from us while we measure.
STOLEN = 0.05

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
    """Return how many CPUs are busy while this process sleeps; ``None`` if that is not known.

    A CPU that works for another virtual machine while ours waits for it is busy, too.
    """
    if not _STAT.exists():
        return None
    (busy, stolen), start = _cpu_seconds(), time.monotonic()
    time.sleep(_CHECK)
    busy_now, stolen_now = _cpu_seconds()
    return (busy_now - busy + stolen_now - stolen) / (time.monotonic() - start)


@dataclass
class Watch:
    """What was seen of other programs and of other virtual machines during a run."""

    checks: list[float | None] = field(default_factory=list)
    """How many CPUs were in use before the first kind of figures, and after each kind."""
    stolen: list[float] = field(default_factory=list)
    """How many CPUs other virtual machines took from us while each kind was measured."""

    def over(self, kinds: Iterable[Iterable[Figure]]) -> Iterator[Figure]:
        """Give all figures, and check the machine between their kinds and at both ends.

        :param kinds: The kinds of figures; each is measured when it is iterated over.
        """
        self.checks.append(cpus_in_use())
        for kind in kinds:
            before, start = _stolen_seconds(), time.monotonic()
            yield from kind
            self.stolen.append((_stolen_seconds() - before) / (time.monotonic() - start))
            self.checks.append(cpus_in_use())


def disturbances(
    began_quiet: bool, checks: Sequence[float | None], stolen: Sequence[float] = ()
) -> Iterator[str]:
    """Yield sentences for the page about the use of the machine by others.

    :param began_quiet: Whether the machine was quiet when the run began.
    :param checks: How many CPUs were in use at each check during the run.
    :param stolen: How many CPUs other virtual machines took while each kind was measured.
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
    taken = [one for one in stolen if one > STOLEN]
    if taken:
        yield (
            f"Other virtual machines took up to {max(taken):.2f} CPUs from this one while "
            f"{len(taken)} of {len(stolen)} kinds of figures were measured: the times are less "
            "exact than their spread suggests."
        )


def _cpu_seconds() -> tuple[float, float]:
    """Return for how many seconds all CPUs together were busy, and stolen, since the start."""
    user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def _stolen_seconds() -> float:
    """Return for how many seconds all CPUs together were stolen; 0 if that is not known."""
    return _cpu_seconds()[1] if _STAT.exists() else 0.0
