"""Results that are read in full before their connection goes back to the pool."""

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

# If a connection has more unread results than this, they are read in full, except streams.
_MOST_UNREAD = 8


class UnreadResults(list[CursorResult[Any]]):
    """The results of one connection that have not been read to their end."""

    def note(self, result: CursorResult[Any]) -> None:
        """Note the result of the statement that was just executed."""
        while self and self[-1].cursor is None:  # this result was read meanwhile
            self.pop()
        if len(self) > _MOST_UNREAD:
            self.read()
        self.append(result)

    def read(self) -> None:
        """Read all results except streams from the driver, so that they need no connection."""
        for result in self:
            if result.cursor is not None and not is_stream(result):
                with suppress(Exception):  # the caller who reads the result gets the error
                    _read_in_full(result)
        self[:] = self.streams()

    def streams(self) -> Iterator[CursorResult[Any]]:
        """Yield the streams, whose next rows are still on the server."""
        return filter(is_stream, self)

    def close_lost_streams(self) -> None:
        """Close the cursors of streams whose connection is lost. Their next row is an error."""
        for stream in self.streams():
            close_lost_cursor(stream.cursor)

    def forget(self) -> list[CursorResult[Any]]:
        """Forget all results. Return the streams among them."""
        streams = list(self.streams())
        self.clear()
        return streams


class DeclaredCursors(WeakSet[Any]):
    """The server-side cursors of psycopg 3 that end with one transaction."""

    def close(self, dbapi: Any) -> None:
        """Close the cursors when the transaction has ended. Sends nothing.

        Otherwise a stream that was read in part would still send FETCH and CLOSE. If the next
        borrower of the connection is in a transaction, they would abort this transaction. psycopg2
        itself refuses to send them.

        :param dbapi: The module of psycopg 3.
        """
        for cursor in self:
            dbapi.Cursor.close(cursor)


def is_stream(result: CursorResult[Any]) -> bool:
    """Tell whether a result reads from a server-side cursor that was not read to its end."""
    return result.cursor is not None and isinstance(
        result.cursor_strategy, BufferedRowCursorFetchStrategy
    )


def _read_in_full(result: CursorResult[Any]) -> None:
    """Read the rows while the connection is held. The caller gets them from the result as usual."""
    strategy = result.cursor_strategy
    if not isinstance(strategy, FullyBufferedCursorFetchStrategy):
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(
            result.cursor, alternate_description=strategy.alternate_cursor_description
        )
