"""What is measured in a process of its own; the other modules start it.

python -m benchmarks.child work URL SIDE
python -m benchmarks.child repeat URL SIDE OPERATION COUNT
python -m benchmarks.child stream URL SIDE METHOD
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from benchmarks.apps import SIDES, Side
from benchmarks.figures import work


def main(task: str, url: str, name: str, *arguments: str) -> None:
    """Do what the command line says, and print what was measured."""
    side = next(side for side in SIDES if side.name == name)(url)
    if task == "work":
        for seconds in work(side, map(str.strip, sys.stdin)):
            print(seconds, flush=True)
    elif task == "repeat":
        operation, count = arguments
        for _ in range(int(count)):
            getattr(side, operation)()
    else:
        print(json.dumps(stream(side, *arguments)))


def stream(side: Side, method: str) -> tuple[int, int]:
    """Stream all rows.

    :param method: The name of the method that streams.
    :returns: how many rows, and by how many bytes this process has grown meanwhile, at most.
    """
    side.read()  # what the first statement needs is not the stream's
    before, _ = memory()
    rows = sum(1 for _ in getattr(side, method)())
    _, peak = memory()
    return rows, peak - before


def memory() -> tuple[int, int]:
    """Return the bytes of memory that this process has now, and the most it has had."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak, peak) if sys.platform == "darwin" else (peak * 1024, peak * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
