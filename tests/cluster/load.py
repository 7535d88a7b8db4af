"""The clients: threads that move money and read, and write down what they are told."""

from __future__ import annotations

import json
import threading
import time
import uuid
from http.client import HTTPConnection, HTTPException
from random import Random
from typing import Any

from tests.cluster.records import Answer, Kind, Seen

#: How many clients there are.
CLIENTS = 8

# Longer than any timeout of the app: a request without an answer is a failure.
_PATIENCE = 40.0

# After an error a client waits a little, as a user does who tries again.
_LONGEST_REST = 0.05

_KINDS: tuple[Kind, ...] = ("transfer", "transfer and read", "read and transfer", "read")
_WEIGHTS = (4, 2, 1, 4)


class Load:
    """Clients that wait until :meth:`go_on`.

    :param port: Of the app.
    :param seed: Decides what they do, as far as that goes.
    :param accounts: How many accounts there are.
    :param clients: How many clients there are.
    """

    def __init__(self, port: int, seed: int, accounts: int, clients: int = CLIENTS) -> None:
        self._port = port
        self._accounts = accounts
        self._answers: list[Answer] = []
        self._going = threading.Event()
        self._ended = False
        self._busy = 0
        self._condition = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(Random(seed * 1000 + number),), daemon=True)
            for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def go_on(self) -> None:
        """Let the clients begin, or go on."""
        self._going.set()

    def pause(self) -> None:
        """Let the clients wait, from when each has its answer, until :meth:`go_on`."""
        self._going.clear()
        with self._condition:
            self._condition.wait_for(lambda: not self._busy, _PATIENCE * 2)

    def stop(self) -> None:
        """End the clients."""
        self._ended = True
        self._going.set()
        for thread in self._threads:
            thread.join(_PATIENCE)

    def answers(self) -> list[Answer]:
        """Return all answers so far."""
        return list(self._answers)

    def _run(self, random: Random) -> None:
        while True:
            self._going.wait()
            if self._ended:
                return
            with self._condition:
                if not self._going.is_set():
                    continue
                self._busy += 1
            try:
                (kind,) = random.choices(_KINDS, _WEIGHTS)
                answer = self._ask(kind, random)
                self._answers.append(answer)
            finally:
                with self._condition:
                    self._busy -= 1
                    self._condition.notify_all()
            if not answer.ok:
                time.sleep(random.uniform(0.0, _LONGEST_REST))

    def _ask(self, kind: Kind, random: Random) -> Answer:
        if kind == "read":
            # Few are long: these are there when a server is lost between two of their reads.
            pause = 0.3 if random.random() < 0.05 else 0.002
            return ask(self._port, kind, f"/reads?times=3&pause={pause}")
        source, target = random.sample(range(1, self._accounts + 1), 2)
        wanted: dict[str, Any] = {
            # Each try has a new one, also one that repeats a transfer that has failed.
            "id": str(uuid.UUID(int=random.getrandbits(128), version=4)),
            "source": source,
            "target": target,
            "amount": random.randint(1, 9),
        }
        return ask(self._port, kind, "/transfers", wanted)


def ask(port: int, kind: Kind, path: str, wanted: dict[str, Any] | None = None) -> Answer:
    """Send a request, and return what came of it.

    :param port: Of the app.
    :param kind: What it is.
    :param path: The path.
    :param wanted: The transfer that is posted; ``None`` for a GET.
    """
    started = time.monotonic()
    # Without any answer a transfer may be stored.
    found: dict[str, Any] = {"outcome": "unknown"}
    status = 0
    connection = HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        if wanted is None:
            connection.request("GET", path)
        else:
            reads = {"before": int(kind == "read and transfer"), "after": int(kind != "transfer")}
            body = json.dumps({**wanted, **reads})
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        status = response.status
        if response.headers.get_content_type() == "application/json":
            found = json.loads(content)
        else:
            found["error"] = f"HTTP {status}"
    except (OSError, HTTPException) as error:
        found["error"] = f"no answer: {type(error).__name__}"
        found["text"] = str(error)
    finally:
        connection.close()
    return Answer(
        kind=kind,
        started=started,
        ended=time.monotonic(),
        status=status,
        **(wanted or {}),
        outcome=found.get("outcome", "not stored"),
        serial=found.get("serial", 0),
        before=found.get("before", 0),
        error=found.get("error", ""),
        text=found.get("text", ""),
        reads=tuple(Seen(**one) for one in found.get("reads", ())),
    )
