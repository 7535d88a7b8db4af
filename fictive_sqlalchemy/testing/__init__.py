"""Tests that leave nothing behind: what a test does to the database is undone at its end.

While an engine is isolated, all of its connections share one connection to the server, in one
transaction that is rolled back at the end. The code under test gets stand-ins for DBAPI
connections instead. Each stand-in has an autocommit flag and a transaction of its own, as a
connection from the pool would have, but its transactions are savepoints, and so is each statement
that it sends in autocommit. Everything above the driver works as in production.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import cast

from sqlalchemy import Engine, exc

from .._core.errors import see
from .pool import isolated_pool

__all__ = ["PATIENCE", "isolate"]

#: How many seconds a thread waits for a transaction of another thread to end, and a statement for
#: a lock that a connection outside the isolation holds. The value is read when isolation begins.
PATIENCE = 30.0


@contextmanager
def isolate(*engines: Engine) -> Generator[None]:
    """Undo all work of engines at the end of the block; until then, the work seems committed::

        with isolate(engine):
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE note (id int)"))

    Sessions, ``begin()`` blocks, commits and rollbacks, ``engine.connect()`` and
    ``engine.raw_connection()`` behave as in production: each error rolls back what it would roll
    back there. For each engine, BEGIN is sent on one connection, then a savepoint for each
    transaction and for each statement outside a transaction, and ROLLBACK at the end. The isolation
    also sends statements of its own, which read settings, locks and constraints of the server.

    Isolation may be nested: what is done in the inner block is undone at the end of the inner
    block.

    While one transaction has changes, no other connection can be used: a thread waits for the end
    of a transaction of another thread, and gets an error if the transaction is its own. Isolation
    levels have no effect.

    :param engines: The engines, of psycopg2 or psycopg. Each has a transaction of its own, so
        two engines don't see each other's work, even in one database.
    :returns: A context manager.
    :raises sqlalchemy.exc.ArgumentError: if there is no engine, or an engine has another driver.
    :raises sqlalchemy.exc.InvalidRequestError: if a connection of an engine is in use, or, at the
        end, if something was really committed, or another thread is still in a statement.
    """
    if not engines or not all(isinstance(one, Engine) for one in cast(tuple[object, ...], engines)):
        raise exc.ArgumentError(
            "isolate() takes engines, such as isolate(engine). To isolate all engines of a "
            "Flask-SQLAlchemy extension, use db.test_isolation()." + see("nothing-to-isolate")
        )
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(isolated_pool(engine, PATIENCE))
        yield
