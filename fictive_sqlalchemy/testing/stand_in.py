"""The stand-in for a DBAPI connection, as far as it is the same for both drivers.

A stand-in has the autocommit flag and the transaction that a connection of psycopg2 or psycopg
would have. Its owner, the isolation, decides what is sent on the one real connection.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sqlalchemy import exc

from .._core.errors import see
from .._core.sql import begins_or_ends_transaction, first_words
from .sql import is_bound_to_transaction

if TYPE_CHECKING:
    from typing_extensions import Self

# PQtransactionStatus: https://www.postgresql.org/docs/current/libpq-status.html
IDLE, IN_TRANSACTION, IN_ERROR, UNKNOWN = 0, 2, 3, 4

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_NO_ACTIVE_SQL_TRANSACTION = "25P01"
_IN_FAILED_SQL_TRANSACTION = "25P02"


class State(Enum):
    """Which transaction a stand-in is in."""

    IDLE = "idle"
    """In no transaction."""

    CURRENT = "current"
    """In a transaction with a savepoint. One stand-in at a time has one."""

    PARKED = "parked"
    """In a transaction that has written nothing, and whose savepoint was released for another
    stand-in. It gets a new savepoint with its next statement."""

    ABORTED = "aborted"
    """In a transaction that is undone already, because a statement failed or a nested isolation
    ended. It still has to be rolled back."""


class Settings:
    """The settings of ``set_local()`` for a transaction, or for a statement in autocommit."""

    def __init__(self) -> None:
        self.wanted: dict[str, str | None] = {}
        """The settings that would be in effect in production."""
        self.are_sent = True
        """Whether all of these settings were sent."""
        self.before: dict[str, str | None] = {}
        """The earlier values of the settings that were sent."""

    def with_defaults(self) -> dict[str, str | None]:
        """Return the settings as in production; one that was taken back has its earlier value."""
        return {
            name: self.before.get(name) if value is None else value
            for name, value in self.wanted.items()
        }


class Owner(Protocol):
    """The part of the isolation that a stand-in uses."""

    dbapi: Any
    """The driver's module."""
    physical: Any
    """The one connection of the driver."""
    is_read_only: bool
    """Whether transactions are read-only unless they say otherwise."""
    started_with: tuple[Any, ...]
    """The flags with which the one connection came from the pool, see :meth:`StandIn.flags_of`."""
    quiet: tuple[socket.socket, socket.socket]
    """Two sockets that are connected with each other, and over which nothing is ever sent."""

    @property
    def status(self) -> Any:
        """The driver's transaction status of the one connection."""
        ...

    def statement(self, stand_in: StandIn, joins: bool = False) -> AbstractContextManager[None]:
        """Return a context manager that isolates a statement of a stand-in."""
        ...

    def commit(self, stand_in: StandIn) -> None:
        """Commit the transaction of a stand-in."""
        ...

    def roll_back(self, stand_in: StandIn) -> None:
        """Roll back the transaction of a stand-in."""
        ...


class StandIn:
    """The object that the pool takes for a DBAPI connection of its own.

    :param isolation: The isolation that the stand-in belongs to.
    """

    READ_ONLY: ClassVar[str]
    """The name of the driver's read-only flag."""

    PASSED_ON: ClassVar[frozenset[str]]
    """The attributes of the driver's connection that do not affect a transaction."""

    isolation_level: Any
    read_only: bool | None
    deferrable: bool | None

    def __init__(self, isolation: Owner) -> None:
        self._isolation: Owner | None = isolation
        self._dbapi = isolation.dbapi
        autocommit, isolation_level, read_only, deferrable = isolation.started_with
        self._autocommit: bool = autocommit
        self.isolation_level = isolation_level
        self.read_only = read_only
        self.deferrable = deferrable
        self.thread = 0
        self.ids_before = 0
        self.savepoint = ""
        self.forget()

    def forget(self) -> None:
        """Forget the transaction, so that the stand-in is in none."""
        self.state = State.IDLE
        self.is_bound = False  # whether the transaction can't be parked, even if it wrote nothing
        self.settings = Settings()

    def take_settings(self, settings: Mapping[str, str | None]) -> None:
        """Have the next statement, and all later statements of its transaction, carry settings.

        :param settings: The values by name. With ``None``, a setting is as if it was never set.
        """
        self.settings.wanted = {**self.settings.wanted, **settings}
        self.settings.are_sent = False

    @property
    def isolation(self) -> Owner:
        """The isolation that the stand-in belongs to.

        :raises Exception: the driver's ``OperationalError``, if the stand-in is closed.
        """
        if self._isolation is None:
            raise self._dbapi.OperationalError("the connection is closed")
        return self._isolation

    def is_read_only(self) -> bool:
        """Tell whether the stand-in's transactions are read-only."""
        return self.isolation.is_read_only if self.read_only is None else self.read_only

    def is_read_only_outside(self) -> bool:
        """Tell whether the stand-in's statements in autocommit are read-only."""
        return self.isolation.is_read_only

    # What isolation does with the driver's connection

    @classmethod
    def flags_of(cls, physical: Any) -> tuple[Any, ...]:
        """Return the flags of the one connection, for :meth:`return_to_autocommit`."""
        names = ("autocommit", "isolation_level", cls.READ_ONLY, "deferrable")
        return tuple(getattr(physical, name) for name in names)

    @classmethod
    def leave_autocommit(cls, physical: Any, read_only: bool | None) -> None:
        """Take the one connection out of autocommit. The next statement sends BEGIN."""
        physical.autocommit = False
        physical.isolation_level = physical.deferrable = None
        setattr(physical, cls.READ_ONLY, read_only)

    @classmethod
    def return_to_autocommit(cls, physical: Any, flags: tuple[Any, ...]) -> None:
        """Give the one connection the flags that :meth:`flags_of` has returned."""
        autocommit, isolation_level, read_only, deferrable = flags
        physical.isolation_level = isolation_level
        setattr(physical, cls.READ_ONLY, read_only)
        physical.deferrable = deferrable
        physical.autocommit = autocommit

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        """Return a cursor of the driver's own class, for what isolation itself sends."""
        raise NotImplementedError

    @property
    def for_cursors(self) -> Any:
        """The attribute ``connection`` of the stand-in's cursors."""
        raise NotImplementedError

    def forget_cursor(self, cursor: Any) -> None:
        """Close a cursor that the server has closed already. Sends nothing."""
        raise NotImplementedError

    # What a driver offers

    @property
    def autocommit(self) -> bool:
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        if self.state is not State.IDLE:
            raise self._dbapi.ProgrammingError("autocommit can't be changed in a transaction")
        self._autocommit = bool(value)

    @property
    def closed(self) -> bool:
        return self._isolation is None

    def close(self) -> None:
        isolation = self._isolation
        if isolation is not None:
            self._isolation = None
            isolation.roll_back(self)

    def commit(self) -> None:
        isolation = self.isolation
        if self.state is State.CURRENT:
            isolation.commit(self)
        self.forget()

    def rollback(self) -> None:
        self.isolation.roll_back(self)

    def transaction_status(self, real: Any) -> Any:
        """Return the transaction status that a connection of its own would have.

        :param real: The status of the one connection; the result has the same type.
        """
        if self._isolation is None:
            return type(real)(UNKNOWN)
        if self.state is State.CURRENT:
            return real
        statuses = {State.IDLE: IDLE, State.PARKED: IN_TRANSACTION, State.ABORTED: IN_ERROR}
        return type(real)(statuses[self.state])

    @property
    def info(self) -> Any:
        return Info(self.isolation.physical.info, self)

    def fileno(self) -> int:
        """Return a socket from which there is never anything to read.

        A check for a lost connection looks for something to read. On the one connection, the answer
        to another stand-in may be waiting.
        """
        return self.isolation.quiet[0].fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, type_: object, *error: object) -> None:
        self.commit() if type_ is None else self.rollback()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self.isolation.physical, name)
        if name not in self.PASSED_ON:
            raise exc.InvalidRequestError(
                f"{name} of the driver's connection can't be isolated: use a cursor, the session "
                "or SQLAlchemy's connection, or create the schema anew for this test instead."
                + see("isolated-cursors")
            )
        return value

    # What the stand-in's cursors call

    @contextmanager
    def statement(self, query: object = None, fetches: bool = False) -> Generator[None]:
        """Isolate a statement of one of the stand-in's cursors.

        :param query: The statement, unless the driver makes it.
        :param fetches: Whether the statement is a FETCH from a cursor on the server.
        """
        isolation = self.isolation
        if isinstance(query, str):
            self._look_at(query)
        if self.state is State.ABORTED:
            raise self._error(
                _IN_FAILED_SQL_TRANSACTION,
                "current transaction is aborted, commands ignored until end of transaction block",
            )
        joins = fetches and (self._autocommit or self.state is State.PARKED)
        with isolation.statement(self, joins):
            yield

    def _look_at(self, query: str) -> None:
        statements = first_words(query)
        for words in statements:
            if begins_or_ends_transaction(words):
                raise exc.InvalidRequestError(
                    f"{words[0]} as a statement would end what isolates this test: use begin(), "
                    "commit() and rollback() of the session or the connection."
                    + see("isolated-cursors")
                )
        if self._autocommit:
            if len(statements) == 1 and statements[0][0] in ("SAVEPOINT", "RELEASE", "ROLLBACK"):
                self.refuse_outside(statements[0][0])
        elif is_bound_to_transaction(query):
            self.is_bound = True

    def refuse_outside(self, what: str) -> None:
        """Refuse a statement with the error that the server raises outside a transaction."""
        raise self._error(
            _NO_ACTIVE_SQL_TRANSACTION, f"{what} can only be used in transaction blocks"
        )

    def _error(self, sqlstate: str, message: str) -> Exception:
        error: Exception = self._dbapi.errors.lookup(sqlstate)(message)
        return error


class Info:
    """A driver's ``info`` or ``pgconn``, with the transaction status of a stand-in.

    :param real: The driver's object, of the one connection.
    :param stand_in: The stand-in.
    """

    def __init__(self, real: Any, stand_in: StandIn) -> None:
        self._real = real
        self._stand_in = stand_in

    @property
    def transaction_status(self) -> Any:
        return self._stand_in.transaction_status(self._real.transaction_status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)
