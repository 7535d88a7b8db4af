"""What a forked child does with the connections of its parent: nothing.

A connection is one conversation with the server. A child that went on with it, closed it or only
ended a transaction would do so to the parent. So a child of ``os.fork()`` begins with empty pools,
what it has inherited counts as lost, and the parent goes on as if nothing had happened. This is
more than ``Engine.dispose(close=False)`` does, which knows nothing of the connections in use:
https://docs.sqlalchemy.org/en/20/core/pooling.html#using-connection-pools-with-multiprocessing-or-os-fork
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Engine

from .sqlalchemy_private import ConnectionHooks
from .transactions import open_transactions

_engines: WeakSet[Engine] = WeakSet()
_entries: WeakSet[Any] = WeakSet()  # the entries of the pools, which hold the DBAPI connections
_held: WeakSet[ConnectionHooks] = WeakSet()  # SQLAlchemy's connections


def leave_to_parent(engine: Engine) -> None:
    """Have forked children leave the pool of an engine to their parent.

    :param engine: The engine. SQLite is left alone: its database in memory is a child's own copy.
    """
    if engine.dialect.name == "sqlite":
        return
    _engines.add(engine)

    @event.listens_for(engine, "connect")
    def note(connection: Any, entry: Any) -> None:
        _entries.add(entry)


# Have forked children leave a connection that is in use to their parent. The connection is of an
# engine that leave_to_parent() was called for. Not a function: each session that reads comes here.
leave_connection_to_parent = _held.add


def _after_fork_in_child() -> None:
    inherited = [entry.dbapi_connection for entry in list(_entries)]
    for entry in list(_entries):
        entry.dbapi_connection = None  # so that the pool neither resets nor closes it
    _cut(filter(None, inherited))
    for connection in list(_held):
        open_transactions.discard(connection)
        connection.replace_held(None)  # and not invalidate(), which closes
    for engine in list(_engines):
        # The pool's locks may be held by threads that the child does not have.
        engine.dispose(close=False)
    _entries.clear()


def _cut(inherited: Iterable[Any]) -> None:
    """Put a socket without a peer in the place of each inherited one, which the parent keeps.

    Closing the connections would send Terminate, and psycopg2 might wait for a lock that a thread
    of the parent holds. Leaving them open would keep them open on the server, locks and all, when
    the parent dies.
    """
    dead, peer = socket.socketpair()
    peer.close()
    with dead:
        for connection in inherited:
            with suppress(Exception):  # it is closed, and has no socket
                os.dup2(dead.fileno(), connection.fileno(), inheritable=False)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork_in_child)
