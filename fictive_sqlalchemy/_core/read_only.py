"""Have the server refuse writes outside a transaction: the option ``read_only_outside``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import Engine

from .errors import see


def forbid_writes(engine: Engine) -> None:
    """Have the server refuse what an engine writes outside a transaction.

    Sends one SET for each new connection, and nothing later, because READ WRITE is part of the
    BEGIN of a transaction.
    https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-DEFAULT-TRANSACTION-READ-ONLY

    :param engine: The engine, whose database is PostgreSQL.
    :raises sqlalchemy.exc.ArgumentError: if the engine is for another database.
    """
    if engine.dialect.name != "postgresql":
        raise exc.ArgumentError(
            f"read_only_outside is for PostgreSQL, and this is {engine.dialect.name}: leave it out."
            + see("read-only-outside-option")
        )

    @event.listens_for(engine, "connect")
    def set_read_only(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only TO on")
