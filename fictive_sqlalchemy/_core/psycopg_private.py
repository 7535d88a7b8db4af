"""Every private name of psycopg 3 that this package uses, behind names of our own.

psycopg 3 has no public name that does the same. A comment beside each private name gives the reason
for its use. The tests of these names are in ``tests/core/test_prepared.py`` and
``tests/local_settings/``.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

PREPARED_NAME = '"_pg3_'
"""How the names of prepared statements begin in messages of the server."""


def prepared_so_far(connection: Any) -> tuple[int, int]:
    """Return how many statements psycopg 3 has prepared on a connection, and how many it knows now.

    :param connection: The DBAPI connection. For another driver, both numbers are 0.
    """
    # Nothing public tells these numbers, not even after another round trip.
    prepared: Any = getattr(connection, "_prepared", None)
    if prepared is None:
        return 0, 0
    return prepared._prepared_idx, len(prepared._names)


def begin_with(connection: Any, cursor: Any, sql: str) -> None:
    """Begin the transaction of a connection, and send a statement in the same message.

    :param connection: The DBAPI connection, which is out of autocommit and in no transaction.
    :param cursor: A cursor of the connection, of the driver's own class.
    :param sql: The statement, without parameters.
    """
    # psycopg sends BEGIN in a message of its own, its attribute autocommit can't be set in a
    # transaction, and nothing public sends another BEGIN. A pipeline of BEGIN, this statement and
    # the next one would be public, but psycopg ends a pipeline with a Flush after the Sync.
    # PostgreSQL starts the timer of idle_in_transaction_session_timeout when it has answered a
    # Sync, and any message stops the timer. So no timer would run until the statement after the
    # next one.
    connection._autocommit = True
    try:
        cursor.execute(f"{connection._get_tx_start_command().decode()}; {sql}", prepare=False)
    finally:
        connection._autocommit = False


@contextmanager
def as_pipeline(connection: Any, dbapi: Any) -> Generator[None]:
    """Send all statements that are executed in this block in one round trip.

    :param connection: The DBAPI connection.
    :param dbapi: The driver.
    :raises Exception: The first error. If an exception of a signal handler interrupts the wait for
        the answer, psycopg itself would raise another error: it can't leave pipeline mode.
    """
    try:
        with connection.pipeline() as pipeline:
            yield
            # The attribute is not documented. psycopg expects one result of the Sync at the end.
            # If the Sync fails, as with a deferred constraint, there are two results: the error and
            # the end of the Sync. psycopg would lose one of the two, or fail with an IndexError.
            pipeline.result_queue.append(None)
    except dbapi.OperationalError as error:
        first = error.__context__
        if first is None or not connection.pgconn.pipeline_status:
            raise
        raise first from None
