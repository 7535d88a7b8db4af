"""Make a forked child leave the connections of its parent alone.

A connection is one conversation with the server. If a child used or closed an inherited connection,
or ended its transaction, the parent's connection would be affected, too. So a child of
``os.fork()`` begins with empty pools, its inherited connections count as lost, and the parent goes
on as if nothing had happened. ``Engine.dispose(close=False)`` does less: it empties the pool, and
does nothing about connections that are in use:
https://docs.sqlalchemy.org/en/20/core/pooling.html#using-connection-pools-with-multiprocessing-or-os-fork
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import event
from sqlalchemy.engine import Engine

from .sqlalchemy_private import ConnectionHooks
from .transactions import open_transactions

_engines: WeakSet[Engine] = WeakSet()
_entries: WeakSet[Any] = WeakSet()  # the entries of the pools, which hold the DBAPI connections
# All open connections. This is a dictionary of weak references and not a WeakSet, which is written
# in Python and so is slower, because each new connection is added here.
_connections: dict[ref[ConnectionHooks], None] = {}


def leave_to_parent(engine: Engine) -> None:
    """Make forked children leave the pool of an engine to their parent.

    :param engine: The engine. An engine of SQLite is skipped, because a child has its own copy of a
        database in memory.
    """
    if engine.dialect.name == "sqlite":
        return
    _engines.add(engine)

    @event.listens_for(engine, "connect")
    def note(connection: Any, entry: Any) -> None:
        _entries.add(entry)


def leave_connection_to_parent(connection: ConnectionHooks) -> None:
    """Make forked children leave a connection that is in use to their parent.

    :param connection: The connection. :func:`leave_to_parent` was called for its engine, so that
        the child gets an empty pool.
    """
    _connections[ref(connection, _connections.__delitem__)] = None


def _after_fork_in_child() -> None:
    inherited = [entry.dbapi_connection for entry in list(_entries)]
    for entry in list(_entries):
        entry.dbapi_connection = None  # so that the pool neither resets nor closes the connection
    _cut(filter(None, inherited))
    for connection in filter(None, [reference() for reference in _connections.copy()]):
        if connection.dialect.name == "sqlite":
            continue  # the child has its own copy, with the open transaction
        open_transactions.discard(connection)
        connection.replace_held(None)  # invalidate() would close the parent's connection
    for engine in list(_engines):
        # The pool's locks may be held by threads that the child does not have.
        engine.dispose(close=False)
    _entries.clear()


def _cut(inherited: Iterable[Any]) -> None:
    """Replace the child's copy of each inherited socket with a socket that has no peer.

    The parent keeps its own copy. If the child closed the connections, the drivers would send
    Terminate, and psycopg2 might wait for a lock that a thread of the parent holds. If the child
    left the sockets open, the connections, with their locks, would stay open on the server after
    the parent has died.
    """
    dead, peer = socket.socketpair()
    peer.close()
    with dead:
        for connection in inherited:
            with suppress(Exception):  # a connection that is closed has no descriptor
                os.dup2(dead.fileno(), connection.fileno(), inheritable=False)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
