"""Looks at each server all the time: what is it, and does it take writes?"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Literal

import psycopg2

from tests.cluster.nodes import Node
from tests.cluster.records import Change

_PAUSE = 0.02

# The watch's own write waits for no standby: it asks what the server does, not its neighbours.
_PREPARE = "SET synchronous_commit = local; SET statement_timeout = '2s'"
_LOOK = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"
PROBE = "CREATE TABLE probe (id bigint GENERATED ALWAYS AS IDENTITY, at timestamptz DEFAULT now())"


class Watch:
    """Threads that look, one for each server, from the beginning until :meth:`stop`.

    :param nodes: The servers.
    """

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self._changes: list[Change] = []
        self._states: dict[str, str] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, args=(node,), daemon=True) for node in nodes
        ]
        for thread in self._threads:
            thread.start()

    def changes(self) -> list[Change]:
        """Return what each server has become, and when, in order."""
        with self._lock:
            return list(self._changes)

    def stop(self) -> None:
        """End the threads."""
        self._ended = True
        for thread in self._threads:
            thread.join(10)

    def _run(self, node: Node) -> None:
        connection: Any = None
        while not self._ended:
            try:
                if connection is None:
                    connection = node.connect()
                    with connection.cursor() as cursor:
                        cursor.execute(_PREPARE)
                self._note(node, self._look(connection, self._states.get(node.name)))
            except psycopg2.Error:
                self._note(node, "down")
                if connection is not None:
                    with suppress(psycopg2.Error):
                        connection.close()
                    connection = None
            time.sleep(_PAUSE)
        if connection is not None:
            connection.close()

    @staticmethod
    def _look(connection: Any, before: str | None) -> Literal["primary", "standby"]:
        with connection.cursor() as cursor:
            cursor.execute(_LOOK)
            ((refuses,),) = cursor.fetchall()
            if refuses:
                return "standby"
            if before != "primary":
                cursor.execute("INSERT INTO probe DEFAULT VALUES")
            return "primary"

    def _note(self, node: Node, state: Literal["primary", "standby", "down"]) -> None:
        with self._lock:
            if self._states.get(node.name) != state:
                self._states[node.name] = state
                self._changes.append(Change(time.monotonic(), node.name, state))
