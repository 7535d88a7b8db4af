"""What a transaction begins with: isolation level, read-only, deferrable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict, cast

from sqlalchemy import exc
from sqlalchemy.engine import Dialect

from .errors import see
from .timeouts import Timeout, seconds_of

IsolationLevel: TypeAlias = Literal[
    "READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"
]
"""An isolation level of PostgreSQL, in SQLAlchemy's spelling. SQLite has the first and the last."""


class BeginOptions(TypedDict, total=False):
    """The options of a transaction that ``begin()``, ``atomic()``, ``retry_transaction()`` take.

    For an option that is left out, or is ``None``, the option of the engine or the connection
    applies, or else the server's default.
    """

    isolation_level: IsolationLevel | None
    """The isolation level in SQLAlchemy's spelling, such as ``"REPEATABLE READ"``."""

    read_only: bool | None
    """Whether the server refuses writes."""

    deferrable: bool | None
    """Whether a serializable, read-only transaction waits for a snapshot with which it can't
    fail."""

    timeout: Timeout | None
    """After how long the server ends the transaction: seconds, a ``timedelta``, or text with a
    unit, such as ``"2s"``."""


_EXECUTION_OPTIONS = {
    "isolation_level": "isolation_level",
    "postgresql_readonly": "read_only",
    "postgresql_deferrable": "deferrable",
}


@dataclass(frozen=True)
class TransactionOptions:
    """The options that a transaction begins with; ``None`` means that there is no such option.

    The isolation level and the flags are part of the one BEGIN:
    https://www.postgresql.org/docs/current/sql-begin.html. The timeout is sent with the first
    statement (psycopg2) or with BEGIN (psycopg 3).
    """

    isolation_level: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None
    timeout: Timeout | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            object.__setattr__(self, "timeout", seconds_of(self.timeout))
        if isinstance(self.isolation_level, str):  # read it as SQLAlchemy does
            level = self.isolation_level.replace("_", " ").upper()
            object.__setattr__(self, "isolation_level", level)

    def over(self, base: TransactionOptions) -> TransactionOptions:
        """Return these options, with the values of ``base`` for those that are ``None``.

        :param base: The other options.
        """
        if self is DEFAULT:
            return base
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(base, **given) if given else base

    def as_begin(self) -> str:
        """Return the BEGIN that the drivers send for these options."""
        words = ["BEGIN"]
        if self.isolation_level is not None:
            words.append(f"ISOLATION LEVEL {self.isolation_level}")
        if self.read_only is not None:
            words.append("READ ONLY" if self.read_only else "READ WRITE")
        if self.deferrable is not None:
            words.append("DEFERRABLE" if self.deferrable else "NOT DEFERRABLE")
        return " ".join(words)

    def check(self, dialect: Dialect) -> None:
        """Refuse options that the database would not understand. Sends nothing.

        :param dialect: The dialect of the engine on which the transaction begins.
        :raises sqlalchemy.exc.ArgumentError: if a value is unknown, or makes no sense together with
            the other values.
        """
        if self is DEFAULT or self == DEFAULT:
            return
        if self.isolation_level is not None:
            levels = [level for level in isolation_levels(dialect) if level != "AUTOCOMMIT"]
            if self.isolation_level not in levels:
                raise exc.ArgumentError(
                    f"A transaction of {dialect.name} has no isolation level "
                    f"{self.isolation_level!r}: use one of {', '.join(levels)}. Outside of "
                    "transactions connections are in autocommit anyway." + see("isolation-level")
                )
        if self.timeout is not None and dialect.name != "postgresql":
            raise exc.ArgumentError(
                f"{dialect.name} has no timeout for transactions: leave timeout out."
                + see("timeout-argument")
            )
        for name, known in (
            ("read_only", hasattr(dialect, "set_readonly")),
            ("deferrable", hasattr(dialect, "set_deferrable")),
        ):
            value = getattr(self, name)
            if value not in (None, True, False):
                raise exc.ArgumentError(
                    f"{name} is True, False or None, not {value!r}." + see("flags")
                )
            if value is not None and not known:
                raise exc.ArgumentError(
                    f"{dialect.name} has no option {name} for transactions: leave it out."
                    + see("flags-of-database")
                )
        if self.deferrable and not (self.isolation_level == "SERIALIZABLE" and self.read_only):
            raise exc.ArgumentError(
                "PostgreSQL ignores deferrable unless the transaction is serializable and "
                'read-only: add isolation_level="SERIALIZABLE" and read_only=True, or leave '
                "deferrable out." + see("deferrable")
            )


DEFAULT = TransactionOptions()


def given_options(call: str, options: BeginOptions) -> BeginOptions:
    """Return the options that a call was given, without those that are ``None``.

    :param call: The name of the call, for the error.
    :param options: The keywords of the call.
    :raises TypeError: if the call does not take one of the keywords.
    """
    known = BeginOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(
                f"{call} got an unexpected keyword argument {name!r}: the options of the "
                f"transaction are {', '.join(known)}." + see("options-of-begin")
            )
    given = {name: value for name, value in options.items() if value is not None}
    return cast(BeginOptions, given)


def split_options(options: Mapping[str, Any]) -> tuple[TransactionOptions, dict[str, Any]]:
    """Split SQLAlchemy's execution options into the options of transactions and the others.

    :param options: Execution options, as ``Connection.execution_options()`` takes them.
    :returns: The options that transactions begin with, and the other execution options.
    """
    rest = dict(options)
    given = {field: rest.pop(name) for name, field in _EXECUTION_OPTIONS.items() if name in rest}
    return TransactionOptions(**given) if given else DEFAULT, rest


def without_autocommit(options: TransactionOptions) -> TransactionOptions:
    """Return options without the level AUTOCOMMIT, with which no transaction begins.

    :param options: The options of a connection or an engine.
    """
    if options.isolation_level == "AUTOCOMMIT":
        return replace(options, isolation_level=None)
    return options


def join_options(options: TransactionOptions) -> dict[str, Any]:
    """Return the options of a transaction as SQLAlchemy's execution options.

    :param options: The options of a transaction.
    """
    given = {name: getattr(options, field) for name, field in _EXECUTION_OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}


def isolation_levels(dialect: Dialect) -> list[str]:
    """Return the isolation levels that a dialect offers. Sends nothing.

    :param dialect: The dialect of an engine.
    """
    connection: Any = None  # the dialects that offer AUTOCOMMIT have a fixed list
    try:
        return list(dialect.get_isolation_level_values(connection))
    except NotImplementedError:
        return []
