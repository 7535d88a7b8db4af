"""psycopg2 or psycopg 3 by hand: what the driver and the server need is the floor.

Rows are tuples. A request that needs no transaction takes a connection of the pool for a statement.
There are two peers. One sends BEGIN and COMMIT around each change, as any transaction may need. The
other sends a change alone, which is enough if the transaction is one statement.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from queue import LifoQueue
from typing import Any, ClassVar, NoReturn

from sqlalchemy import make_url

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE, Peer

_UPDATE = "UPDATE document SET title = %s WHERE id = %s"
_CREATE = "INSERT INTO note (title) VALUES (%s) RETURNING id"


class ByHand(Peer):
    """The driver alone, its connections in autocommit, in the simplest pool.

    :param url: The database; the URL names the driver.
    :param pool_size: How many connections the pool has, together with ``max_overflow``.
    :param max_overflow: How many connections the pool has in addition.
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
        """Give a connection of the pool; it goes back without a transaction."""
        connection = self._pool.get()
        try:
            if connection is None:
                connection = self._driver.connect(self._dsn)
                connection.autocommit = True
            yield connection
        finally:
            self._pool.put(connection)

    def request(self) -> AbstractContextManager[Any]:
        """Return a context manager that does nothing."""
        return nullcontext()

    @contextmanager
    def statement(self) -> Iterator[Any]:
        """Give a cursor for a statement that is a transaction of its own."""
        with self.connection() as connection, connection.cursor() as cursor:
            yield cursor

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Give a cursor for what is sent between BEGIN and COMMIT."""
        with self.statement() as cursor:
            cursor.execute("BEGIN")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    def change(self) -> AbstractContextManager[Any]:
        """Give a cursor for the only statement of a transaction, here between BEGIN and COMMIT."""
        return self.transaction()

    def get(self, key: int) -> Any:
        """Send a SELECT."""
        with self.statement() as cursor:
            cursor.execute("SELECT id, title FROM document WHERE id = %s", (key,))
            row = cursor.fetchone()
        assert row is not None
        return row

    def update(self, document: Any, title: str) -> None:
        """Send an UPDATE."""
        self.update_by_key(document[0], title)

    def known(self, key: int) -> Any:
        """Return a row with the key."""
        return key, ""

    def update_by_key(self, key: int, title: str) -> None:
        """Send an UPDATE."""
        with self.change() as cursor:
            cursor.execute(_UPDATE, (title, key))

    def create(self, title: str) -> None:
        """Send an INSERT that returns the key."""
        with self.change() as cursor:
            cursor.execute(_CREATE, (title,))
            cursor.fetchone()

    def update_and_create(self, document: Any, title: str) -> None:
        """Send an UPDATE and an INSERT between BEGIN and COMMIT."""
        with self.transaction() as cursor:
            cursor.execute(_UPDATE, (title, document[0]))
            cursor.execute(_CREATE, (title,))
            cursor.fetchone()

    def get_or_create(self, name: str) -> Any:
        """Send a SELECT, and an INSERT that gives way to an existing row; each is stored alone."""
        with self.statement() as cursor:
            return self._get_or_create(cursor, name)

    def get_or_create_inside(self, name: str) -> Any:
        """Send the same between BEGIN and COMMIT."""
        with self.transaction() as cursor:
            return self._get_or_create(cursor, name)

    def _get_or_create(self, cursor: Any, name: str) -> Any:
        select = "SELECT id, name FROM tag WHERE name = %s"
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
        """Send a COPY."""
        copy = "COPY note (title) FROM STDIN"
        with self.statement() as cursor:
            if self._driver.__name__ == "psycopg2":
                cursor.copy_expert(copy, io.StringIO("".join(f"{title}\n" for title in titles)))
            else:
                with cursor.copy(copy) as rows:
                    for title in titles:
                        rows.write_row((title,))

    def load(self, count: int) -> list[Any]:
        """Send a SELECT."""
        with self.statement() as cursor:
            cursor.execute(
                "SELECT id, title FROM document WHERE id <= %s ORDER BY id",
                (count,),
            )
            rows: list[Any] = cursor.fetchall()
            return rows

    def books(self, count: int) -> list[Any]:
        """Send a SELECT."""
        with self.statement() as cursor:
            cursor.execute(
                "SELECT id, title, author_id FROM book WHERE id <= %s ORDER BY id", (count,)
            )
            rows: list[Any] = cursor.fetchall()
            return rows

    def author(self, book: Any) -> Any:
        """Send a SELECT."""
        with self.statement() as cursor:
            cursor.execute("SELECT id, name FROM author WHERE id = %s", (book[2],))
            return cursor.fetchone()

    def page(self, number: int, per_page: int) -> list[Any]:
        """Send a SELECT with LIMIT and OFFSET, and a SELECT that counts."""
        with self.statement() as cursor:
            cursor.execute(
                "SELECT id, title, author_id FROM book ORDER BY id LIMIT %s OFFSET %s",
                (per_page, (number - 1) * per_page),
            )
            rows: list[Any] = cursor.fetchall()
            cursor.execute("SELECT count(*) FROM book")
            cursor.fetchone()
            return rows

    def stream(self) -> Iterator[Any]:
        """Use a cursor WITH HOLD."""
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


class ByHandAlone(ByHand):
    """The driver alone, with each change sent alone: PostgreSQL makes it a transaction."""

    title = "psycopg by hand, one statement"
    fails: ClassVar[Mapping[str, str]] = {
        "block_of_two": "two statements need a transaction",
        "created_inside": "a block that could hold more needs a transaction",
    }

    def change(self) -> AbstractContextManager[Any]:
        """Give a cursor for the only statement of a transaction, which is sent alone."""
        return self.statement()

    def transaction(self) -> NoReturn:
        """Refuse: transactions of several statements are for :class:`ByHand`."""
        raise NotImplementedError("More than one statement needs a transaction.")
