"""Stand-ins for DBAPI connections that share one real connection, for tests.

Each has an autocommit flag and a transaction of its own, as psycopg2 and psycopg have them; what
it sends is decided by :class:`.testing.Isolation`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

if TYPE_CHECKING:
    from typing_extensions import Self

    from .testing import Isolation

# PQtransactionStatus: https://www.postgresql.org/docs/current/libpq-status.html
IDLE, IN_ERROR, UNKNOWN = 0, 3, 4

# What would end the one transaction, or begin it again.
_TRANSACTION_CONTROL = re.compile(
    r"(?: \s | --[^\n]*(?:\n|$) | /\*.*?\*/ | ; )*"
    r"(BEGIN | START\s+TRANSACTION | COMMIT | END | ABORT | PREPARE\s+TRANSACTION"
    r"| ROLLBACK (?! \s+ (?: (?:WORK|TRANSACTION) \s+ )? TO \b)) \b",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


class StandIn:
    """What the pool takes for a DBAPI connection of its own.

    :param isolation: The isolation it belongs to.
    """

    def __init__(self, isolation: Isolation) -> None:
        self._isolation: Isolation | None = isolation
        self._dbapi = isolation.dialect.loaded_dbapi
        self._autocommit = isolation.autocommit
        self.isolation_level: Any = None
        self.read_only: bool | None = None
        self.deferrable: bool | None = None
        self.savepoint: str | None = None
        self.thread = 0
        self.undone = False

    @property
    def isolation(self) -> Isolation:
        """The isolation it belongs to.

        :raises Exception: the driver's ``OperationalError``, if it is closed.
        """
        if self._isolation is None:
            raise self._dbapi.OperationalError("the connection is closed")
        return self._isolation

    # What a driver offers

    @property
    def autocommit(self) -> bool:
        return self._autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        if self.savepoint is not None:
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
        self._refuse_undone()
        if self.savepoint is not None:
            with isolation.turn(self):
                isolation.commit(self)

    def rollback(self) -> None:
        self.undone = False
        self.isolation.roll_back(self)

    def status(self, real: Any) -> Any:
        """Return the transaction status of a connection that has only its own transaction.

        :param real: The status of the one connection, for its class.
        """
        if self._isolation is None:
            return type(real)(UNKNOWN)
        return real if self.savepoint is not None else type(real)(IDLE)

    @property
    def info(self) -> Any:
        return _Info(self.isolation.physical.info, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, type_: object, *error: object) -> None:
        self.commit() if type_ is None else self.rollback()

    def __getattr__(self, name: str) -> Any:
        if name in _UNSAFE:
            raise exc.InvalidRequestError(
                f"{name}() of the driver's connection can't be undone under isolation: use the "
                "session or SQLAlchemy's connection, or create the schema anew for this test."
            )
        return getattr(self.isolation.physical, name)

    # What its cursors do

    @contextmanager
    def statement(self, query: object = None) -> Generator[None]:
        """What surrounds a statement on one of its cursors.

        :param query: The statement.
        """
        isolation = self.isolation
        self._refuse_undone()
        _refuse_transaction_control(query)
        with isolation.turn(self):
            if self._autocommit:
                savepoint = isolation.new_savepoint()
                try:
                    yield
                except BaseException:
                    isolation.refuse_committed()
                    isolation.undo(savepoint)
                    raise
                isolation.refuse_committed()
                isolation.release(savepoint)
            else:
                if self.savepoint is None:
                    isolation.begin(self)
                    if self.read_only:  # until the savepoint is released or rolled back
                        isolation.send("SET TRANSACTION READ ONLY")
                yield
                isolation.refuse_committed()

    def _refuse_undone(self) -> None:
        if self.undone:
            raise exc.InvalidRequestError(
                "Under isolation a transaction that was begun before this one was rolled back, and "
                "took this one along. End the one that was begun last first, or create the schema "
                "anew for this test instead."
            )


class Psycopg2StandIn(StandIn):
    """The same for psycopg2, with what only psycopg2 has."""

    readonly: Any = property(
        lambda self: self.read_only, lambda self, value: setattr(self, "read_only", value)
    )

    def set_isolation_level(self, level: Any) -> None:
        self.rollback()
        self.autocommit = level == 0
        self.isolation_level = level or None

    def set_session(
        self,
        isolation_level: Any = None,
        readonly: Any = None,
        deferrable: Any = None,
        autocommit: bool | None = None,
    ) -> None:
        if isolation_level is not None:
            self.isolation_level = isolation_level
        if readonly is not None:
            self.read_only = readonly
        if deferrable is not None:
            self.deferrable = deferrable
        if autocommit is not None:
            self.autocommit = autocommit

    def get_transaction_status(self) -> int:
        if self._isolation is None:
            return UNKNOWN
        return int(self.status(self.isolation.status))

    def cursor(self, name: Any = None, cursor_factory: Any = None, **kwargs: Any) -> Any:
        physical = self.isolation.physical
        factory = cursor_factory or self.__dict__.get("cursor_factory") or physical.cursor_factory
        if factory is None:
            factory = self._dbapi.extensions.cursor
        if name is not None:  # psycopg2 would refuse it as it does in autocommit, and is not
            kwargs["name"] = name
        cursor = physical.cursor(cursor_factory=_isolated_cursor(factory), **kwargs)
        cursor.stand_in = self
        return cursor


class PsycopgStandIn(StandIn):
    """The same for psycopg, with what only psycopg has."""

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_isolation_level(self, value: Any) -> None:
        self.isolation_level = value

    def set_read_only(self, value: bool | None) -> None:
        self.read_only = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    @property
    def broken(self) -> bool:
        return self._isolation is not None and self.isolation.physical.broken

    @property
    def pgconn(self) -> Any:
        return _Info(self.isolation.physical.pgconn, self)

    def cursor(
        self, name: str = "", *, binary: bool = False, row_factory: Any = None, **kwargs: Any
    ) -> Any:
        physical = self.isolation.physical
        if name:
            kwargs["name"] = name
        factory = self.server_cursor_factory if name else self.cursor_factory
        cursor = _isolated_cursor(factory)(
            physical, row_factory=row_factory or self.row_factory, **kwargs
        )
        if binary:
            cursor.format = type(cursor.format)(1)
        cursor.stand_in = self
        return cursor

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Any:
        binary = kwargs.pop("binary", False)
        return self.cursor(binary=binary).execute(query, params, **kwargs)


STAND_INS = {"psycopg2": Psycopg2StandIn, "psycopg": PsycopgStandIn}

# What a driver's connection does to its transaction past its cursors.
_UNSAFE = {
    *("tpc_begin", "tpc_prepare", "tpc_commit", "tpc_rollback", "tpc_recover", "xid"),
    *("reset", "transaction", "pipeline"),
}


class _Info:
    """What a driver tells of a connection, but for the transaction status."""

    def __init__(self, real: Any, connection: StandIn) -> None:
        self._real = real
        self._connection = connection

    @property
    def transaction_status(self) -> Any:
        return self._connection.status(self._real.transaction_status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _IsolatedCursor:
    """What isolation adds to the cursor classes of the drivers."""

    stand_in: StandIn


def _method(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        query = args[0] if args else kwargs.get("query", kwargs.get("sql"))
        with self.stand_in.statement(query):
            return getattr(super(_IsolatedCursor, self), name)(*args, **kwargs)

    return method


def _generator(name: str) -> Callable[..., Any]:
    def generator(self: Any, query: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        with self.stand_in.statement(query):
            yield from getattr(super(_IsolatedCursor, self), name)(query, *args, **kwargs)

    return generator


def _context_manager(name: str) -> Callable[..., Any]:
    @contextmanager
    def manager(self: Any, query: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        copy = getattr(super(_IsolatedCursor, self), name)
        with self.stand_in.statement(query), copy(query, *args, **kwargs) as value:
            yield value

    return manager


# What sends something, and how it is called.
_SENDING: dict[str, Callable[[str], Callable[..., Any]]] = {
    "execute": _method,
    "executemany": _method,
    "callproc": _method,
    "copy_expert": _method,
    "copy_from": _method,
    "copy_to": _method,
    "stream": _generator,
    "copy": _context_manager,
}


@cache
def _isolated_cursor(factory: type[Any]) -> type[Any]:
    """Make a cursor class of one of the drivers, or of the user's own."""
    sending = {name: make(name) for name, make in _SENDING.items() if hasattr(factory, name)}
    return type(factory.__name__, (type("_Sending", (_IsolatedCursor,), sending), factory), {})


def _refuse_transaction_control(query: object) -> None:
    if isinstance(query, bytes):
        query = query.decode(errors="replace")
    if isinstance(query, str) and (found := _TRANSACTION_CONTROL.match(query)):
        raise exc.InvalidRequestError(
            f"{found[1].upper()} as a statement would end what isolates this test: use begin(), "
            "commit() and rollback() of the session or the connection."
        )
