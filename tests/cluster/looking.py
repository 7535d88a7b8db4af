"""Threads that look at each server, again and again, until they are told to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, ClassVar

import psycopg2

from tests.cluster.nodes import Node


class Looking:
    """Looks at each server in a thread of its own, from the beginning until :meth:`stop`.

    :param nodes: The servers.
    """

    pause: ClassVar[float]
    """How long it waits after each look, in seconds."""

    prepare: ClassVar[str] = ""
    """What it sends on a new connection."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, args=(node,), daemon=True) for node in nodes
        ]
        for thread in self._threads:
            thread.start()

    def look(self, node: Node, cursor: Any) -> None:
        """Look at a server.

        :param node: The server.
        :param cursor: A cursor of psycopg2, in autocommit.
        """
        raise NotImplementedError

    def note_down(self, node: Node) -> None:
        """Note that a server does not answer."""

    def stop(self) -> None:
        """End the threads."""
        self._ended = True
        for thread in self._threads:
            thread.join(10)

    def _run(self, node: Node) -> None:
        connection: Any = None
        while not self._ended:
            try:
                is_new, connection = connection is None, connection or node.connect()
                with connection.cursor() as cursor:
                    if is_new and self.prepare:
                        cursor.execute(self.prepare)
                    self.look(node, cursor)
            except psycopg2.Error:
                self.note_down(node)
                if connection is not None:
                    with suppress(psycopg2.Error):
                        connection.close()
                connection = None
            time.sleep(self.pause)
        if connection is not None:
            connection.close()
