"""Stand-ins for DBAPI connections that share one real connection, for tests.

Each has an autocommit flag and a transaction of its own, as psycopg2 and psycopg have them; what
it sends is decided by :class:`.testing.Isolation`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from sqlalchemy import exc

if TYPE_CHECKING:
    from typing_extensions import Self

    from .testing import Isolation

# PQtransactionStatus: https://www.postgresql.org/docs/current/libpq-status.html
IDLE, IN_TRANSACTION, IN_ERROR, UNKNOWN = 0, 2, 3, 4

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_NO_ACTIVE_SQL_TRANSACTION = "25P01"
_IN_FAILED_SQL_TRANSACTION = "25P02"


class State(Enum):
    """Where a stand-in stands."""

    IDLE = "idle"
    """In no transaction."""

    CURRENT = "current"
    """In the transaction that has a savepoint."""

    PARKED = "parked"
    """In a transaction that has written nothing and so needs none."""

    ABORTED = "aborted"
    """In a transaction that is undone already, because a statement failed, or by an end of
    isolation. It still has to be rolled back."""


class StandIn:
    """What the pool takes for a DBAPI connection of its own.

    :param isolation: The isolation it belongs to.
    """

    READ_ONLY: ClassVar[str]
    """The driver's name of its read-only flag."""

    PASSED_ON: ClassVar[frozenset[str]]
    """What of the driver's connection does nothing to a transaction."""

    isolation_level: Any
    read_only: bool | None
    deferrable: bool | None

    def __init__(self, isolation: Isolation) -> None:
        self._isolation: Isolation | None = isolation
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
        """Be in no transaction."""
        self.state = State.IDLE
        self.is_bound = False  # whether it needs its savepoint, though it may have written nothing

    @property
    def isolation(self) -> Isolation:
        """The isolation it belongs to.

        :raises Exception: the driver's ``OperationalError``, if it is closed.
        """
        if self._isolation is None:
            raise self._dbapi.OperationalError("the connection is closed")
        return self._isolation

    def is_read_only(self) -> bool:
        """Tell whether its transactions may not write."""
        return self.isolation.is_read_only if self.read_only is None else self.read_only

    def is_read_only_outside(self) -> bool:
        """Tell whether its statements in autocommit may not write."""
        return self.isolation.is_read_only

    # What isolation does with the driver's connection

    @classmethod
    def flags_of(cls, physical: Any) -> tuple[Any, ...]:
        """Return how the one connection is, for :meth:`return_to_autocommit`."""
        names = ("autocommit", "isolation_level", cls.READ_ONLY, "deferrable")
        return tuple(getattr(physical, name) for name in names)

    @classmethod
    def leave_autocommit(cls, physical: Any, read_only: bool | None) -> None:
        """Take the one connection out of autocommit. Its next statement sends BEGIN."""
        physical.autocommit = False
        physical.isolation_level = physical.deferrable = None
        setattr(physical, cls.READ_ONLY, read_only)

    @classmethod
    def return_to_autocommit(cls, physical: Any, flags: tuple[Any, ...]) -> None:
        """Make the one connection what it was."""
        autocommit, isolation_level, read_only, deferrable = flags
        physical.isolation_level = isolation_level
        setattr(physical, cls.READ_ONLY, read_only)
        physical.deferrable = deferrable
        physical.autocommit = autocommit

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        """Return a cursor for what isolation sends."""
        raise NotImplementedError

    @property
    def for_cursors(self) -> Any:
        """What its cursors have for their connection."""
        raise NotImplementedError

    def forget_cursor(self, cursor: Any) -> None:
        """Close a cursor that is no more on the server. Sends nothing."""
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
        """Return the transaction status of a connection that has only its own transaction.

        :param real: The status of the one connection, for its class.
        """
        if self._isolation is None:
            return type(real)(UNKNOWN)
        if self.state is State.CURRENT:
            return real
        statuses = {State.IDLE: IDLE, State.PARKED: IN_TRANSACTION, State.ABORTED: IN_ERROR}
        return type(real)(statuses[self.state])

    @property
    def info(self) -> Any:
        return _Info(self.isolation.physical.info, self)

    def fileno(self) -> int:
        """Return a socket from which there is never anything to read.

        What there is to read from the one connection may be the answer to another stand-in.
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
            )
        return value

    # What its cursors do

    @contextmanager
    def statement(self, query: object = None, fetches: bool = False) -> Generator[None]:
        """What surrounds a statement on one of its cursors.

        :param query: The statement, if the caller has written it.
        :param fetches: Whether it is one that goes on with a cursor on the server.
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
        statements = list(_first_words(query))
        for words in statements:
            if _ends_transaction(words):
                raise exc.InvalidRequestError(
                    f"{words[0]} as a statement would end what isolates this test: use begin(), "
                    "commit() and rollback() of the session or the connection."
                )
        if self._autocommit:
            if len(statements) == 1 and statements[0][0] in ("SAVEPOINT", "RELEASE", "ROLLBACK"):
                self.refuse_outside(statements[0][0])
        elif _NEEDS_SAVEPOINT.search(query):
            self.is_bound = True

    def refuse_outside(self, what: str) -> None:
        """Refuse what the server refuses outside a transaction."""
        raise self._error(
            _NO_ACTIVE_SQL_TRANSACTION, f"{what} can only be used in transaction blocks"
        )

    def _error(self, sqlstate: str, message: str) -> Exception:
        error: Exception = self._dbapi.errors.lookup(sqlstate)(message)
        return error


class Psycopg2StandIn(StandIn):
    """The same for psycopg2, with what only psycopg2 has."""

    READ_ONLY = "readonly"
    PASSED_ON = frozenset(
        {"async", "async_", "binary_types", "cancel", "cursor_factory", "dsn", "encoding"}
        | {"get_backend_pid", "get_dsn_parameters", "get_native_connection", "get_parameter_status"}
        | {"isexecuting", "notices", "notifies", "pgconn_ptr", "protocol_version", "server_version"}
        | {"string_types"}
    )

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        return physical.cursor(cursor_factory=dbapi.extensions.cursor)

    @property
    def readonly(self) -> Any:
        return self.read_only

    @readonly.setter
    def readonly(self, value: Any) -> None:
        self.read_only = value

    def is_read_only_outside(self) -> bool:
        return self.is_read_only()  # for psycopg2 tells the server, for all transactions

    @property
    def status(self) -> int:
        extensions = self._dbapi.extensions
        begun = self.state is not State.IDLE
        return int(extensions.STATUS_BEGIN if begun else extensions.STATUS_READY)

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
        return int(self.transaction_status(self._isolation.status))

    def cursor(self, name: Any = None, cursor_factory: Any = None, **kwargs: Any) -> Any:
        physical = self.isolation.physical
        factory = cursor_factory or self.__dict__.get("cursor_factory")
        if factory is None:
            factory = cast(
                Any, type(physical.cursor())
            )  # the connection may be of a class of the user's
        if name is not None:
            if self._autocommit and not kwargs.get("withhold"):
                raise self._dbapi.ProgrammingError(
                    "can't use a named cursor outside of transactions"
                )
            kwargs["name"] = name
        return physical.cursor(cursor_factory=partial(_make_cursor, self, factory), **kwargs)

    @property
    def for_cursors(self) -> Any:
        return self

    def forget_cursor(self, cursor: Any) -> None:
        pass


class PsycopgStandIn(StandIn):
    """The same for psycopg, with what only psycopg has."""

    READ_ONLY = "read_only"
    PASSED_ON = frozenset(
        {"adapters", "add_notice_handler", "add_notify_handler", "broken", "cancel", "cancel_safe"}
        | {"cursor_factory", "prepare_threshold", "prepared_max", "row_factory"}
        | {"remove_notice_handler", "remove_notify_handler", "server_cursor_factory"}
    )

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        return dbapi.Cursor(physical, row_factory=dbapi.rows.tuple_row)

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_isolation_level(self, value: Any) -> None:
        self.isolation_level = value

    def set_read_only(self, value: bool | None) -> None:
        self.read_only = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    @property
    def connection(self) -> Any:
        """The connection, for psycopg's adaptation, to which this is a context."""
        return self.for_cursors

    @property
    def pgconn(self) -> Any:
        return _Info(self.isolation.physical.pgconn, self)

    def cursor(
        self, name: str = "", *, binary: bool = False, row_factory: Any = None, **kwargs: Any
    ) -> Any:
        if name:
            if self._autocommit and not kwargs.get("withhold"):
                self.refuse_outside("DECLARE CURSOR")
            kwargs["name"] = name
        factory = self.server_cursor_factory if name else self.cursor_factory
        kwargs["row_factory"] = row_factory or self.row_factory
        cursor = _make_cursor(self, factory, self.isolation.physical, **kwargs)
        if binary:
            cursor.format = type(cursor.format)(1)
        return cursor

    @property
    def for_cursors(self) -> Any:
        return _Context(self)

    def forget_cursor(self, cursor: Any) -> None:
        self._dbapi.Cursor.close(cursor)

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Any:
        binary = kwargs.pop("binary", False)
        return self.cursor(binary=binary).execute(query, params, **kwargs)

    def __exit__(self, type_: object, *error: object) -> None:
        super().__exit__(type_, *error)
        self.close()


STAND_INS: dict[str, type[StandIn]] = {"psycopg2": Psycopg2StandIn, "psycopg": PsycopgStandIn}


class _Info:
    """What a driver tells of a connection, but for the transaction status."""

    def __init__(self, real: Any, stand_in: StandIn) -> None:
        self._real = real
        self._stand_in = stand_in

    @property
    def transaction_status(self) -> Any:
        return self._stand_in.transaction_status(self._real.transaction_status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Context:
    """A stand-in for what psycopg itself does with the connection of a cursor."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Any:
        if name in ("pgconn", "wait") or name.startswith("_"):  # for adaptation and COPY
            return getattr(self._stand_in.isolation.physical, name)
        return getattr(self._stand_in, name)


# Cursors


def _make_cursor(stand_in: StandIn, factory: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a cursor that isolation surrounds, of a class of a driver or of the user's own."""
    class_: Any = _isolated_cursor(factory)
    cursor = class_.__new__(class_, *args, **kwargs)
    cursor.stand_in = stand_in  # psycopg's __init__() asks for the connection
    cursor.__init__(*args, **kwargs)
    return cursor


@cache
def _isolated_cursor(factory: Any) -> Any:
    sending = {name: make(name) for name, make in _SENDING.items() if hasattr(factory, name)}
    return type(factory.__name__, (type("_Sending", (_IsolatedCursor,), sending), factory), {})


class _IsolatedCursor:
    """What isolation adds to a cursor class."""

    stand_in: StandIn
    is_sending = False

    @property
    def connection(self) -> Any:
        """The stand-in, and not the one connection, whose commit() would be a real one."""
        return self.stand_in.for_cursors

    def plain(self, query: Any) -> Any:
        """Return SQL as a string, if it is bytes or one of the driver's ``sql`` objects."""
        if isinstance(query, bytes):
            return query.decode(errors="replace")
        as_string: Any = getattr(query, "as_string", None)
        return query if as_string is None else as_string(self.stand_in.isolation.physical)

    def pages(self) -> Iterator[Any]:
        """Yield the rows of a cursor on the server, a page at a time."""
        cursor: Any = self
        while rows := cursor.fetchmany(cursor.itersize):
            yield from rows

    @contextmanager
    def sending(self, query: object = None, fetches: bool = False) -> Generator[None]:
        """What surrounds a call that sends something."""
        if self.is_sending:  # a class of the user's calls one method in another
            yield
            return
        with self.stand_in.statement(query, fetches):
            self.is_sending = True
            try:
                yield
            finally:
                self.is_sending = False


def _method(name: str) -> Callable[..., Any]:
    """A call whose first argument is SQL."""

    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        query = self.plain(query)
        with self.sending(query):
            return getattr(super(_IsolatedCursor, self), name)(query, *args, **kwargs)

    return method


def _other_method(name: str) -> Callable[..., Any]:
    """A call that makes its SQL itself."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sending():
            return getattr(super(_IsolatedCursor, self), name)(*args, **kwargs)

    return method


def _mogrify(name: str) -> Callable[..., Any]:
    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(_IsolatedCursor, self), name)(self.plain(query), *args, **kwargs)

    return method


def _stream(name: str) -> Callable[..., Any]:
    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        query = self.plain(query)
        with self.sending(query):  # to its end: who reads it may send something else meanwhile
            rows = list(getattr(super(_IsolatedCursor, self), name)(query, *args, **kwargs))
        yield from rows

    return method


def _copy(name: str) -> Callable[..., Any]:
    @contextmanager
    def method(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        statement = self.plain(statement)
        copy = getattr(super(_IsolatedCursor, self), name)
        with self.sending(statement), copy(statement, *args, **kwargs) as value:
            yield value

    return method


def _fetch(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        fetch = getattr(super(_IsolatedCursor, self), name)
        if getattr(self, "name", None) is None:  # its rows are here
            return fetch(*args, **kwargs)
        with self.sending(fetches=True):
            return fetch(*args, **kwargs)

    return method


def _iter(name: str) -> Callable[..., Any]:
    def method(self: Any) -> Iterator[Any]:
        if getattr(self, "name", None) is None:
            return cast("Iterator[Any]", getattr(super(_IsolatedCursor, self), name)())
        pages: Iterator[Any] = self.pages()
        return pages

    return method


def _close(name: str) -> Callable[..., Any]:
    close = _fetch(name)

    def method(self: Any) -> Any:
        if getattr(self, "name", None) is None or self.closed:
            return getattr(super(_IsolatedCursor, self), name)()
        if self.stand_in.closed or self.stand_in.state is State.ABORTED:
            return self.stand_in.forget_cursor(self)  # the server has closed it
        return close(self)

    return method


# What sends something, or may do so, and how it is called.
_SENDING: dict[str, Callable[[str], Callable[..., Any]]] = {
    "execute": _method,
    "executemany": _method,
    "copy_expert": _method,
    "mogrify": _mogrify,
    "callproc": _other_method,
    "copy_from": _other_method,
    "copy_to": _other_method,
    "stream": _stream,
    "copy": _copy,
    "fetchone": _fetch,
    "fetchmany": _fetch,
    "fetchall": _fetch,
    "__next__": _fetch,
    "scroll": _fetch,
    "__iter__": _iter,
    "close": _close,
}


# SQL

_TOKEN = re.compile(
    r"""
      --[^\n]* | /\*.*?\*/
    | [eE]'(?:[^'\\]|\\.)*' | '[^']*' | "[^"]*" | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    | (?P<word>[^\W\d][\w$]*) | (?P<mark>[();])
    """,
    re.VERBOSE | re.DOTALL,
)

# What is to be undone, or to end, with the transaction, though it writes nothing.
_NEEDS_SAVEPOINT = re.compile(r"\b(?:SAVEPOINT|SET|set_config)\b", re.IGNORECASE)


def _first_words(query: str) -> Iterator[list[str]]:
    """Yield up to three words of each statement, in capitals, with which it begins."""
    words: list[str] = []
    depth = 0
    for token in _TOKEN.finditer(query):
        if token["word"]:
            words.append(token["word"].upper())
            if words[0] == "CREATE" and words[-2:] == ["BEGIN", "ATOMIC"]:
                break  # a function of several statements, which end in END
        elif token["mark"] == "(":
            depth += 1
        elif token["mark"] == ")":
            depth -= 1
        elif token["mark"] and not depth and words:
            yield words[:3]
            words = []
    if words:
        yield words[:3]


def _ends_transaction(words: list[str]) -> bool:
    first, *others = words
    if first in ("START", "PREPARE"):
        return others[:1] == ["TRANSACTION"]
    if first == "ROLLBACK":
        return "TO" not in others
    return first in ("BEGIN", "COMMIT", "END", "ABORT")
