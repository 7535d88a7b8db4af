"""Cursors of any class whose statements are isolated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, cast

from .stand_in import StandIn, State


def make_cursor(stand_in: StandIn, factory: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a cursor whose statements are isolated.

    :param stand_in: The stand-in that the cursor belongs to.
    :param factory: The class of the cursor: one of the driver's, or of the user's own.
    :param args: The positional arguments of the class.
    :param kwargs: The keyword arguments of the class.
    """
    class_: Any = _isolated_cursor(factory)
    cursor = class_.__new__(class_, *args, **kwargs)
    cursor.stand_in = stand_in  # before psycopg's __init__(), which asks for the connection
    cursor.__init__(*args, **kwargs)
    return cursor


@cache
def _isolated_cursor(factory: Any) -> Any:
    sending = {name: make(name) for name, make in _SENDING.items() if hasattr(factory, name)}
    return type(factory.__name__, (type("_Sending", (_IsolatedCursor,), sending), factory), {})


class _IsolatedCursor:
    """What isolation adds to every cursor class."""

    stand_in: StandIn
    is_sending = False  # whether one of its methods is being called
    settings: Mapping[str, str | None] = MappingProxyType({})
    """The settings that a FETCH carries if the cursor was declared outside a transaction. In
    production the server makes all rows when the cursor is declared. Here it makes each row when
    the row is fetched."""

    @property
    def connection(self) -> Any:
        """The stand-in. A commit() of the one connection would be a real commit."""
        return self.stand_in.for_cursors

    def plain(self, query: Any) -> Any:
        """Return a query as a string, even if it is bytes or an object of the driver's ``sql``."""
        if isinstance(query, bytes):
            return query.decode(errors="replace")
        as_string: Any = getattr(query, "as_string", None)
        return query if as_string is None else as_string(self.stand_in.isolation.physical)

    def pages(self) -> Iterator[Any]:
        """Yield the rows of a cursor on the server, fetched page by page."""
        cursor: Any = self
        while rows := cursor.fetchmany(cursor.itersize):
            yield from rows

    @contextmanager
    def sending(self, query: object = None, fetches: bool = False) -> Generator[None]:
        """Surround a call that sends something with what isolates it."""
        if self.is_sending:  # one method has called another, as a class of the user's may do
            yield
            return
        with self.stand_in.statement(query, fetches):
            self.is_sending = True
            try:
                yield
            finally:
                self.is_sending = False


def _method(name: str) -> Callable[..., Any]:
    """Return a method whose first argument is SQL."""

    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        query = self.plain(query)
        if self.stand_in.autocommit:
            self.settings = self.stand_in.settings.wanted
        with self.sending(query):
            return getattr(super(_IsolatedCursor, self), name)(query, *args, **kwargs)

    return method


def _other_method(name: str) -> Callable[..., Any]:
    """Return a method that makes its SQL itself."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sending():
            return getattr(super(_IsolatedCursor, self), name)(*args, **kwargs)

    return method


def _mogrify(name: str) -> Callable[..., Any]:
    """Return a method that takes SQL and sends nothing."""

    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(_IsolatedCursor, self), name)(self.plain(query), *args, **kwargs)

    return method


def _stream(name: str) -> Callable[..., Any]:
    """Return a method that takes SQL and yields rows as they arrive."""

    def method(self: Any, query: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        query = self.plain(query)
        # All rows are read at once: the caller may send other statements between two rows.
        with self.sending(query):
            rows = list(getattr(super(_IsolatedCursor, self), name)(query, *args, **kwargs))
        yield from rows

    return method


def _copy(name: str) -> Callable[..., Any]:
    """Return a method that takes a COPY statement and returns a context manager."""

    @contextmanager
    def method(self: Any, statement: Any, *args: Any, **kwargs: Any) -> Generator[Any]:
        statement = self.plain(statement)
        copy = getattr(super(_IsolatedCursor, self), name)
        with self.sending(statement), copy(statement, *args, **kwargs) as value:
            yield value

    return method


def _fetch(name: str) -> Callable[..., Any]:
    """Return a method that sends FETCH if the cursor is on the server."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        fetch = getattr(super(_IsolatedCursor, self), name)
        if getattr(self, "name", None) is None:  # the client has all rows of the cursor
            return fetch(*args, **kwargs)
        if self.settings:
            self.stand_in.take_settings(self.settings)
        with self.sending(fetches=True):
            return fetch(*args, **kwargs)

    return method


def _iter(name: str) -> Callable[..., Any]:
    """Return the method of iteration, which sends FETCH for each page of a server-side cursor."""

    def method(self: Any) -> Iterator[Any]:
        if getattr(self, "name", None) is None:
            return cast("Iterator[Any]", getattr(super(_IsolatedCursor, self), name)())
        pages: Iterator[Any] = self.pages()
        return pages

    return method


def _close(name: str) -> Callable[..., Any]:
    """Return a method that sends CLOSE if the cursor is on the server and still open there."""
    close = _fetch(name)

    def method(self: Any) -> Any:
        if getattr(self, "name", None) is None or self.closed:
            return getattr(super(_IsolatedCursor, self), name)()
        if self.stand_in.closed or self.stand_in.state is State.ABORTED:
            return self.stand_in.forget_cursor(self)  # the rollback has closed it
        return close(self)

    return method


# The methods that send something, or may do so, and the function that makes the wrapper of each.
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
