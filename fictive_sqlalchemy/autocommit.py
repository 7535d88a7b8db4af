"""The way out of autocommit and back, on the DBAPI connection itself.

A connection of this package *rests* in autocommit. It leaves autocommit when a transaction begins and is put
back when the transaction ends. Both ways are attributes of the driver, so neither costs a round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

# Keys in the ``info`` of a pooled connection, which lives exactly as long as the DBAPI connection.
STARTED_WITH = "fictive_sqlalchemy.started_with"
HELD_CURSORS = "fictive_sqlalchemy.held_cursors"
TAKEN_BY = "fictive_sqlalchemy.taken_by"

# PQtransactionStatus of libpq, the same numbers in psycopg2 and psycopg:
# https://www.postgresql.org/docs/current/libpq-status.html
_IDLE, _IN_TRANSACTION, _IN_ERROR = 0, 2, 3

_PSYCOPG = frozenset({"psycopg2", "psycopg"})


@dataclass(frozen=True)
class TransactionOptions:
    """The characteristics a transaction begins with; ``None`` leaves a characteristic to the server's default.

    They are part of the one ``BEGIN`` (https://www.postgresql.org/docs/current/sql-begin.html).
    """

    isolation_level: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None

    def over(self, base: TransactionOptions) -> TransactionOptions:
        """Return these options, with those left at ``None`` taken from ``base``.

        :param base: The options that stand behind these.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(base, **given) if given else base

    def check(self, dialect: Dialect) -> None:
        """Refuse what the database would not understand. Sends nothing.

        :param dialect: The dialect of the engine the transaction is for.
        :raises sqlalchemy.exc.ArgumentError: if a value is unknown, or makes no sense with the others.
        """
        if self == DEFAULT:
            return
        level = self.isolation_level
        if level is not None:
            known = [name for name in dialect.get_isolation_level_values(None) if name != "AUTOCOMMIT"]  # type: ignore[arg-type]
            if level == "AUTOCOMMIT":
                raise exc.ArgumentError(
                    "AUTOCOMMIT is not an isolation level of a transaction: connections rest in autocommit already. "
                    f"Leave isolation_level out, or use one of {', '.join(known)}."
                )
            if level not in known:
                raise exc.ArgumentError(
                    f"{dialect.name} has no isolation level {level!r}. Use one of {', '.join(known)}."
                )
        for name in ("read_only", "deferrable"):
            value = getattr(self, name)
            if value not in (None, True, False):
                raise exc.ArgumentError(f"{name} is True, False or None, not {value!r}.")
            if value is not None and f"postgresql_{name.replace('_', '')}" not in dialect.connection_characteristics:
                raise exc.ArgumentError(f"{dialect.name} has no {name} transactions: leave {name} out.")
        if self.deferrable and not (level == "SERIALIZABLE" and self.read_only):
            raise exc.ArgumentError(
                "PostgreSQL ignores deferrable unless the transaction is SERIALIZABLE and read-only: use "
                'begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True).'
            )

    def as_execution_options(self) -> dict[str, Any]:
        """Return these options under the names SQLAlchemy has for them on a ``Connection``."""
        return {name: getattr(self, field) for name, field in _OPTION_NAMES.items() if getattr(self, field) is not None}


DEFAULT = TransactionOptions()

_OPTION_NAMES = {
    "isolation_level": "isolation_level",
    "postgresql_readonly": "read_only",
    "postgresql_deferrable": "deferrable",
}


def split_options(options: Mapping[str, Any]) -> tuple[TransactionOptions, dict[str, Any]]:
    """Take the characteristics of transactions out of SQLAlchemy's execution options.

    :param options: Execution options, as ``Connection.execution_options()`` takes them.
    :returns: the transaction's part and the rest.
    """
    rest = dict(options)
    given = {field: rest.pop(name) for name, field in _OPTION_NAMES.items() if name in rest}
    level = given.get("isolation_level")
    if isinstance(level, str):
        given["isolation_level"] = level.replace("_", " ")  # as SQLAlchemy reads it
    return TransactionOptions(**given), rest


class Switch:
    """Takes connections of any dialect that offers AUTOCOMMIT out of it and back.

    It uses SQLAlchemy's dialect alone, so what it costs is what the driver makes of ``set_isolation_level``.

    :param dialect: The dialect of the engine.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect

    def rest(self, connection: Any, used: TransactionOptions = DEFAULT) -> None:
        """Put a connection that is in no transaction into autocommit.

        :param connection: The DBAPI connection.
        :param used: What the transaction that has ended had begun with.
        """
        if used.read_only is not None:
            self._set("readonly", connection, False)
        if used.deferrable is not None:
            self._set("deferrable", connection, False)
        self.dialect.set_isolation_level(connection, "AUTOCOMMIT")

    def leave(self, connection: Any, options: TransactionOptions) -> None:
        """Take a connection out of autocommit: its driver begins a transaction with the next statement.

        :param connection: The DBAPI connection.
        :param options: What that transaction begins with.
        """
        level = options.isolation_level or self.dialect.default_isolation_level
        self.dialect.set_isolation_level(connection, level)  # type: ignore[arg-type]
        if options.read_only is not None:
            self._set("readonly", connection, options.read_only)
        if options.deferrable is not None:
            self._set("deferrable", connection, options.deferrable)

    def aborted(self, connection: Any) -> bool:
        """Tell whether the server has aborted the transaction, so that a COMMIT would roll back. Sends nothing.

        :param connection: The DBAPI connection.
        """
        return False

    @contextmanager
    def holding(self, connection: Any) -> Iterator[None]:
        """Make server-side cursors outlive the statement that declares them, where the driver can.

        :param connection: The DBAPI connection.
        """
        yield

    def started_with(self, connection: Any) -> Any:
        """Return the flags that :meth:`reset` brings a connection back to.

        :param connection: The DBAPI connection, before its first use.
        """
        return None

    def reset(self, connection: Any, info: dict[Any, Any]) -> None:
        """Make a connection fit to go back to the pool, whatever was done with it.

        :param connection: The DBAPI connection.
        :param info: The ``info`` of its place in the pool.
        :raises Exception: if that can't be done; the pool then closes the connection.
        """
        self.dialect.do_rollback(connection)
        self.rest(connection)

    def _set(self, name: str, connection: Any, value: bool | None) -> None:
        getattr(self.dialect, f"set_{name}")(connection, value)


class PsycopgSwitch(Switch):
    """The same for psycopg2 and psycopg, where all of it is an attribute and nothing is sent.

    psycopg2 sends a ``SET`` when it goes into autocommit, or out of it, with a level or a flag set. So these are
    cleared while the connection is still out of autocommit, where they are only noted for the next BEGIN.
    """

    def rest(self, connection: Any, used: TransactionOptions = DEFAULT) -> None:
        if used.isolation_level is not None:
            connection.isolation_level = None
        if used.read_only is not None:
            self._set("readonly", connection, None)
        if used.deferrable is not None:
            self._set("deferrable", connection, None)
        connection.autocommit = True

    def leave(self, connection: Any, options: TransactionOptions) -> None:
        if options.isolation_level is None:
            connection.autocommit = False
        else:
            self.dialect.set_isolation_level(connection, options.isolation_level)  # type: ignore[arg-type]
        if options.read_only is not None:
            self._set("readonly", connection, options.read_only)
        if options.deferrable is not None:
            self._set("deferrable", connection, options.deferrable)

    def aborted(self, connection: Any) -> bool:
        return bool(connection.info.transaction_status == _IN_ERROR)

    @contextmanager
    def holding(self, connection: Any) -> Iterator[None]:
        # SQLAlchemy makes the cursor itself; both drivers let the connection say how cursors are made.
        psycopg = self.dialect.driver == "psycopg"
        attribute = "server_cursor_factory" if psycopg else "cursor_factory"
        factory = getattr(connection, attribute)
        if psycopg:
            held = _held_by_argument(factory)
        else:
            held = _held_by_attribute(factory or self.dialect.loaded_dbapi.extensions.cursor)
        setattr(connection, attribute, held)
        try:
            yield
        finally:
            setattr(connection, attribute, factory)

    def started_with(self, connection: Any) -> Any:
        dialect: Any = self.dialect
        return (
            connection.isolation_level,
            dialect.get_readonly(connection),
            dialect.get_deferrable(connection),
        )

    def reset(self, connection: Any, info: dict[Any, Any]) -> None:
        status = connection.info.transaction_status
        started_with = info.get(STARTED_WITH, (None, None, None))
        if status == _IDLE and connection.autocommit and self.started_with(connection) == started_with:
            return
        if status in (_IN_TRANSACTION, _IN_ERROR):
            if connection.autocommit:  # a BEGIN the driver does not know of: its rollback() would send nothing
                with connection.cursor() as cursor:
                    cursor.execute("ROLLBACK")
            else:
                connection.rollback()
        elif status != _IDLE:
            raise exc.InvalidRequestError(
                "A connection came back to the pool in the middle of a conversation with the server; it is closed."
            )
        connection.autocommit = False
        self.rest(connection, TransactionOptions("any", False, False))
        # In autocommit these speak to the server (psycopg2), which is right: that is how they were set at first.
        for name, value in zip(("isolation_level", "readonly", "deferrable"), started_with, strict=True):
            if value is None:
                continue
            if name == "isolation_level":
                connection.isolation_level = value
            else:
                self._set(name, connection, value)


def _held_by_argument(factory: Callable[..., Any]) -> Callable[..., Any]:
    def held_cursor(*args: Any, **kwargs: Any) -> Any:
        return factory(*args, **{**kwargs, "withhold": True})

    return held_cursor


def _held_by_attribute(factory: type[Any]) -> type[Any]:
    class HeldCursor(factory):
        def execute(self, *args: Any, **kwargs: Any) -> Any:
            self.withhold = True  # not in __init__: connection.cursor() sets it again after that
            return super().execute(*args, **kwargs)

    return HeldCursor


def switch_for(dialect: Dialect) -> Switch:
    """Return the way out of autocommit and back for a dialect.

    :param dialect: The dialect of the engine.
    :raises sqlalchemy.exc.ArgumentError: if the dialect does not offer AUTOCOMMIT.
    """
    try:
        levels = dialect.get_isolation_level_values(None)  # type: ignore[arg-type]
    except NotImplementedError:
        levels = []
    if "AUTOCOMMIT" not in levels:
        raise exc.ArgumentError(
            f"SQLAlchemy's {dialect.name}+{dialect.driver} dialect does not offer AUTOCOMMIT, so its connections can't "
            f"rest in autocommit: take {dialect.name!r} out of AUTOCOMMIT_DRIVERS, or use sqlalchemy.create_engine()."
        )
    return (PsycopgSwitch if dialect.driver in _PSYCOPG else Switch)(dialect)
