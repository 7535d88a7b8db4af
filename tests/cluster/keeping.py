"""Runs programs of which none outlives us, and waits for what they do."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Far longer than anything takes, so that a run that would hang fails instead.
PATIENCE = 120.0


class ClusterError(Exception):
    """The cluster does not do what it should; the text says what, and what its programs said."""


class Keeper:
    """Runs programs, all of which end when this process does: see :mod:`tests.cluster.keeper`.

    :param directory: Where they run; it is removed at the end.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keeper.py")), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        # PostgreSQL and PgBouncer refuse to run as root.
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._account:
            os.chown(directory, self._account.pw_uid, self._account.pw_gid)
            directory.chmod(0o755)

    @property
    def pid(self) -> int:
        """The parent of all that was started."""
        return self._process.pid

    def start(
        self,
        name: str,
        command: list[str],
        environment: dict[str, str] | None = None,
        *,
        as_ourselves: bool = False,
        cwd: Path | None = None,
    ) -> int:
        """Start a program.

        :param name: The name of its log file, without the suffix.
        :param command: The program and its arguments.
        :param environment: What it finds there beside what we do.
        :param as_ourselves: Whether it runs as the account that we run as.
        :param cwd: Where it runs; in the directory if left out.
        :returns: Its process id.
        """
        account = None if as_ourselves else self._account
        home = {} if as_ourselves else {"HOME": str(self.directory)}
        wanted = {
            "command": command,
            "log": str(self.log(name)),
            "cwd": str(cwd or self.directory),
            "environment": {**os.environ, **home, **(environment or {})},
            "user": account.pw_uid if account else None,
            "group": account.pw_gid if account else None,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def log(self, name: str) -> Path:
        """Return where a program's log is."""
        return self.directory / f"{name}.log"

    def end(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """End one of our processes, and wait until it has gone.

        :param pid: Its id.
        :param number: The signal that ends it.
        """
        if not self.runs(pid):
            raise ClusterError(f"The process {pid} is not one of ours.")
        os.kill(pid, number)
        wait_for(lambda: not self.runs(pid), f"the end of process {pid}")

    def runs(self, pid: int) -> bool:
        """Tell whether one of our processes has not ended yet."""
        return parent_of(pid) == self.pid

    def write(self, name: str, text: str) -> Path:
        """Write a file that the programs can read, and return where it is."""
        path = self.directory / name
        path.write_text(text)
        if self._account:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)
        path.chmod(0o600)
        return path

    def stop(self) -> None:
        """End all, and remove the directory."""
        self._process.communicate()


def wait_for(
    condition: Callable[[], object],
    what: str,
    said: Callable[[], str] = str,
    patience: float = PATIENCE,
) -> None:
    """Look until something is so.

    :param condition: Tells whether it is.
    :param what: What is waited for, for the error.
    :param said: What else to tell in the error.
    :param patience: How many seconds to wait.
    :raises ClusterError: If it is not so by then.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"No sign of {what} after {patience:.0f} seconds.\n{said()}")
        time.sleep(0.05)


def parent_of(pid: int) -> int | None:
    """Return the id of a process's parent; ``None`` if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
