"""Looks at each server all the time: what is it, and does it take writes?"""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

from tests.cluster.looking import Looking
from tests.cluster.nodes import Node
from tests.cluster.records import Change

_LOOK = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"
PROBE = "CREATE TABLE probe (id bigint GENERATED ALWAYS AS IDENTITY, at timestamptz DEFAULT now())"


class Watch(Looking):
    """Notes when a server becomes something else.

    :param nodes: The servers.
    """

    pause = 0.02
    # Its own write waits for no standby: it asks what the server does, not its neighbours.
    prepare = "SET synchronous_commit = local; SET statement_timeout = '2s'"

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self._changes: list[Change] = []
        self._states: dict[str, str] = {}
        self._lock = threading.Lock()
        super().__init__(nodes)

    def changes(self) -> list[Change]:
        """Return what each server has become, and when, in order."""
        with self._lock:
            return list(self._changes)

    def look(self, node: Node, cursor: Any) -> None:
        cursor.execute(_LOOK)
        ((refuses,),) = cursor.fetchall()
        if not refuses and self._states.get(node.name) != "primary":
            cursor.execute("INSERT INTO probe DEFAULT VALUES")
        self._note(node, "standby" if refuses else "primary")

    def note_down(self, node: Node) -> None:
        self._note(node, "down")

    def _note(self, node: Node, state: Literal["primary", "standby", "down"]) -> None:
        with self._lock:
            if self._states.get(node.name) != state:
                self._states[node.name] = state
                self._changes.append(Change(time.monotonic(), node.name, state))
