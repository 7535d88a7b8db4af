"""The processes in which the peers work, told what to do from here.

Each peer has one of its own, for in one process they would take turns in Python's caches, too.
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

    :param peer: Its name.
    :param url: The database.
    :param options: What else the peer is made with.
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
        """Do a task; return what it returns.

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
        self._process.communicate()  # closes its input, which ends it


@contextmanager
def workers(peers: Iterable[str], url: str, **options: int) -> Iterator[dict[str, Worker]]:
    """A process for each of some peers, by the name of the peer."""
    with ExitStack() as stack:
        yield {peer: stack.enter_context(Worker(peer, url, **options)) for peer in peers}


def command(peer: str, url: str, **options: int) -> list[str]:
    """Return the command that starts a process."""
    return [sys.executable, "-m", "benchmarks.child", peer, url, json.dumps(options)]


def line(task: str, *arguments: Any) -> str:
    """Return the line that tells a process to do a task."""
    plain = [astuple(one) if isinstance(one, Operation) else one for one in arguments]
    return json.dumps([task, *plain])
