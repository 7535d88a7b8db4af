"""The processes in which the peers work. This module tells them what to do.

Each peer has a process of its own, because in one process the peers would share Python's caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from typing import Any

from typing_extensions import Self

from benchmarks.peers import Operation


class Worker:
    """A process that does tasks on one peer.

    :param peer: The name of the peer.
    :param url: The database.
    :param options: Further arguments of the peer.
    """

    def __init__(self, peer: str, url: str, **options: int) -> None:
        self.peer = peer
        self._process = subprocess.Popen(
            command(peer, url, **options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PGAPPNAME": peer},  # pg_stat_activity shows it
        )

    def do(self, task: str, *arguments: Any) -> Any:
        """Have the process do a task, and return the result.

        :param task: The name of a function in :mod:`benchmarks.child`.
        :param arguments: Its arguments.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line(task, *arguments), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("A process that measures has ended; its error is printed above.")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes the input of the process, which ends the process


@contextmanager
def workers(peers: Iterable[str], url: str, **options: int) -> Iterator[dict[str, Worker]]:
    """Start a process for each of some peers, and give the processes by the names of the peers."""
    with ExitStack() as stack:
        yield {peer: stack.enter_context(Worker(peer, url, **options)) for peer in peers}


def command(peer: str, url: str, **options: int) -> list[str]:
    """Return the command that starts a process."""
    return [sys.executable, "-m", "benchmarks.child", peer, url, json.dumps(options)]


def line(task: str, *arguments: Any) -> str:
    """Return the line that tells a process to do a task."""
    plain = [astuple(one) if isinstance(one, Operation) else one for one in arguments]
    return json.dumps([task, *plain])
