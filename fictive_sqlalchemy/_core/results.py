"""Results that have to be read before their connection goes back to the pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from sqlalchemy.engine import CursorResult
from sqlalchemy.engine.cursor import (
    BufferedRowCursorFetchStrategy,
    FullyBufferedCursorFetchStrategy,
)

from .errors import close_lost_cursor

# How many results are kept. Beyond that, those that are not read yet are read in full.
_MOST_UNREAD = 8


class UnreadResults(list[CursorResult[Any]]):
    """The results of one connection that have not been read to their end."""

    def note(self, result: CursorResult[Any]) -> None:
        """Note a result that has just come."""
        while self and self[-1].cursor is None:  # it was read meanwhile
            self.pop()
        if len(self) > _MOST_UNREAD:
            self.read()
        self.append(result)

    def read(self) -> None:
        """Read all but streams from the driver: afterwards they need no connection."""
        for result in self:
            if result.cursor is not None and not is_stream(result):
                with suppress(Exception):  # whoever reads the result gets the error
                    _read_in_full(result)
        self[:] = self.streams()

    def streams(self) -> Iterator[CursorResult[Any]]:
        """Yield the streams, whose next rows are still on the server."""
        return filter(is_stream, self)

    def close_lost_streams(self) -> None:
        """Close the cursors of streams whose connection is lost: the next row is an error."""
        for stream in self.streams():
            close_lost_cursor(stream.cursor)

    def forget(self) -> list[CursorResult[Any]]:
        """Forget all results, and return the streams among them."""
        streams = list(self.streams())
        self.clear()
        return streams


class DeclaredCursors(WeakSet[Any]):
    """The cursors of psycopg that end on the server with one transaction."""

    def close(self, dbapi: Any) -> None:
        """Close them when the transaction has ended. Sends nothing.

        Otherwise a stream that was left half way would still send FETCH and CLOSE, and perhaps in
        the transaction of the next borrower, which they would abort. psycopg2 refuses that itself.

        :param dbapi: The module of psycopg.
        """
        for cursor in self:
            dbapi.Cursor.close(cursor)


def is_stream(result: CursorResult[Any]) -> bool:
    """Tell whether a result has a cursor on the server that has more rows."""
    return result.cursor is not None and isinstance(
        result.cursor_strategy, BufferedRowCursorFetchStrategy
    )


def _read_in_full(result: CursorResult[Any]) -> None:
    """Read the rows while the connection is there; the caller gets them from the result as ever."""
    strategy = result.cursor_strategy
    if not isinstance(strategy, FullyBufferedCursorFetchStrategy):
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(
            result.cursor, alternate_description=strategy.alternate_cursor_description
        )
