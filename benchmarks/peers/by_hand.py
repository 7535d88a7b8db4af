"""psycopg2 or psycopg 3 by hand: what the driver and the server need is the floor.

Rows are tuples. A request that needs no transaction takes a connection of the pool for a statement.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from queue import LifoQueue
from typing import Any

from sqlalchemy import make_url

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE, Peer


class ByHand(Peer):
    """The driver alone, its connections in autocommit, in the simplest pool.

    :param url: The database; the URL names the driver.
    :param pool_size: How many connections the pool has,
    :param max_overflow: with these.
    """

    title = "psycopg by hand"

    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        super().__init__(url, pool_size, max_overflow)
        at = make_url(url)
        self._driver: Any = import_module(at.get_driver_name())
        self._dsn = at.set(drivername="postgresql").render_as_string(hide_password=False)
        self._pool: LifoQueue[Any] = LifoQueue()
        for _ in range(pool_size + max_overflow):
            self._pool.put(None)  # a connection that is made when it is taken

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection of the pool; it goes back without a transaction."""
        connection = self._pool.get()
        try:
            if connection is None:
                connection = self._driver.connect(self._dsn)
                connection.autocommit = True
            yield connection
        finally:
            self._pool.put(connection)

    def request(self) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()

    def get(self, key: int) -> Any:
        """A SELECT."""
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute("SELECT id, title FROM document WHERE id = %s", (key,))
            row = cursor.fetchone()
        assert row is not None
        return row

    def update(self, document: Any, title: str) -> None:
        """An UPDATE between BEGIN and COMMIT: it stands for any transaction."""
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                cursor.execute("UPDATE document SET title = %s WHERE id = %s", (title, document[0]))
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    def get_or_create(self, name: str) -> Any:
        """A SELECT, and an INSERT that gives way."""
        select = "SELECT id, name FROM tag WHERE name = %s"
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute(select, (name,))
            row = cursor.fetchone()
            if row is None:
                cursor.execute(
                    "INSERT INTO tag (name) VALUES (%s) ON CONFLICT DO NOTHING RETURNING id, name",
                    (name,),
                )
                row = cursor.fetchone()
            if row is None:  # somebody was faster
                cursor.execute(select, (name,))
                row = cursor.fetchone()
        return row

    def insert(self, titles: Sequence[str]) -> None:
        """A COPY."""
        copy = "COPY note (title) FROM STDIN"
        with self.connection() as connection, connection.cursor() as cursor:
            if self._driver.__name__ == "psycopg2":
                cursor.copy_expert(copy, io.StringIO("".join(f"{title}\n" for title in titles)))
            else:
                with cursor.copy(copy) as rows:
                    for title in titles:
                        rows.write_row((title,))

    def load(self, count: int) -> list[Any]:
        """A SELECT."""
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute(
                "SELECT id, title FROM document WHERE id <= %s ORDER BY id",
                (count,),
            )
            rows: list[Any] = cursor.fetchall()
            return rows

    def stream(self) -> Iterator[Any]:
        """A cursor WITH HOLD."""
        with (
            self.connection() as connection,
            connection.cursor(name="stream", withhold=True) as cursor,
        ):
            cursor.itersize = 1000
            cursor.execute("SELECT id, title FROM document")
            yield from cursor

    def close(self) -> None:
        """Close the connections."""
        connections = [self._pool.get() for _ in range(self._pool.qsize())]
        for connection in connections:
            if connection is not None:
                connection.close()
            self._pool.put(None)
