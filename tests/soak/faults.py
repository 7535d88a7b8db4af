"""What the proxy does to connections, decided by a seed."""

from __future__ import annotations

import threading
from collections import Counter
from random import Random
from typing import Any, Literal

import sqlalchemy as sa

from tests.wire import Message, WireProxy

Where = Literal["before", "within", "after"]


class Faults:
    """Cut connections at random messages, end server processes, and break the whole network.

    Each connection has a random generator of its own, which is asked once for each message. So the
    faults of a connection depend on the seed, its number and what is sent on it, and not on what
    other connections do meanwhile.

    :param proxy: The proxy.
    :param url: The server without the proxy, for ending server processes.
    :param seed: The seed.
    :param rate: The share of messages at which something happens.
    """

    def __init__(self, proxy: WireProxy, url: str, seed: int, rate: float) -> None:
        self.done: Counter[str] = Counter()
        """How often each kind of fault was done."""
        self._proxy = proxy
        self._seed = seed
        self._rate = rate
        self._lock = threading.Lock()
        self._control_lock = threading.Lock()
        self._stopped = False
        self._randoms: dict[int, Random] = {}
        self._control = sa.create_engine(
            url, isolation_level="AUTOCOMMIT", poolclass=sa.pool.StaticPool
        )

    def start(self) -> None:
        """Do faults from now on."""
        self._proxy.delay = Random(self._seed).choice((0.0, 0.0, 0.0005, 0.002))
        self._proxy.cut_where = self._cut_where

    def stop(self) -> None:
        """Do no more faults."""
        self._proxy.cut_where = None
        self._proxy.delay = 0.0
        with self._control_lock:  # a message may be in the middle of its fault
            self._stopped = True
        self._control.dispose()

    def _cut_where(self, message: Message) -> Where | None:
        fault = self._choose(message)
        if fault is None:
            return None
        with self._lock:
            self.done[fault] += 1
        if fault == "kill":
            self._kill(message.pid)
            return None
        if fault == "network":
            self._proxy.cut_all()
            return "before"
        cuts: dict[str, Where] = {"before": "before", "within": "within", "after": "after"}
        return cuts[fault]

    def _choose(self, message: Message) -> str | None:
        with self._lock:
            random = self._randoms.get(message.connection)
            if random is None:
                random = Random(f"{self._seed} {message.connection}")
                self._randoms[message.connection] = random
        # Twice as likely at a COMMIT, where it matters most.
        rate = self._rate * (2 if message.verb == "COMMIT" else 1)
        if random.random() >= rate:
            return None
        [fault] = random.choices(
            ("before", "within", "after", "kill", "network"), weights=(6, 3, 6, 4, 1)
        )
        return fault

    def _kill(self, pid: int) -> None:
        parameters: dict[str, Any] = {"pid": pid}
        with self._control_lock:
            if not self._stopped:
                with self._control.connect() as connection:
                    connection.execute(
                        sa.text("SELECT pg_terminate_backend(:pid, 1000)"), parameters
                    )
