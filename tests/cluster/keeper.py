"""A process that ends all it has started, and whatever these have started, when its input ends.

It is a program of its own, which :class:`tests.cluster.keeping.Keeper` runs. However the process
that holds the other end of its input ends, nothing outlives it: PostgreSQL, which Patroni starts
in a session of its own, becomes a child of this process when the one that started it is gone.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
# PostgreSQL, asked by this signal, ends at once and still gives its shared memory back.
_IMMEDIATE = signal.SIGQUIT


def main(directory: str) -> None:
    """Start what each line of the input says, until it ends; then end everything.

    :param directory: What is removed at the end.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started: list[subprocess.Popen[bytes]] = []
    try:
        rest = b""
        while True:
            _reap()
            if not select.select([0], [], [], 0.02)[0]:
                continue
            data = os.read(0, 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                started.append(_start(json.loads(line)))
                print(started[-1].pid, flush=True)
    finally:
        _end_all(started)
        shutil.rmtree(directory, ignore_errors=True)


def _start(wanted: dict[str, Any]) -> subprocess.Popen[bytes]:
    with Path(wanted["log"]).open("ab") as log:
        return subprocess.Popen(
            wanted["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=wanted["cwd"],
            env=wanted["environment"],
            user=wanted["user"],
            group=wanted["group"],
            extra_groups=None if wanted["user"] is None else [],
            start_new_session=True,
        )


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _end_all(started: list[subprocess.Popen[bytes]]) -> None:
    """End what was started first, so that it does not start anything anew."""
    _end({process.pid for process in started}, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while children := _children():
        _end(children, _IMMEDIATE if time.monotonic() < deadline else signal.SIGKILL)
        time.sleep(0.05)
        _reap()


def _end(pids: set[int], number: signal.Signals) -> None:
    for pid in pids & _children():
        os.kill(pid, number)


def _children() -> set[int]:
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        if int(parent) == os.getpid():
            found.add(int(stat.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
