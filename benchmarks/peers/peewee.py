"""peewee with its pool; a request is a ``connection_context()``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import peewee
from sqlalchemy import make_url

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE, Peer

#: Imported by its name, because type checkers know another playhouse, which has no such module.
postgres_ext: Any = import_module("playhouse.postgres_ext")


class Peewee(Peer):
    """peewee as it is.

    :param url: The database.
    :param pool_size: How many connections the pool has, together with ``max_overflow``.
    :param max_overflow: How many connections the pool has in addition.
    """

    title = "peewee"

    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        super().__init__(url, pool_size, max_overflow)
        at = make_url(url)
        self.db: Any = postgres_ext.PooledPostgresqlExtDatabase(
            at.database,
            host=at.host,
            port=at.port,
            user=at.username,
            password=at.password,
            max_connections=pool_size + max_overflow,
            timeout=30,
            prefer_psycopg3=at.get_driver_name() == "psycopg",
            **at.query,
        )
        model: Any = peewee.Model

        class Document(model):  # type: ignore[misc]  # what there is of types does not fit
            title = peewee.TextField()

            class Meta:
                database, table_name = self.db, "document"

        class Tag(model):  # type: ignore[misc]
            name = peewee.TextField(unique=True)

            class Meta:
                database, table_name = self.db, "tag"

        class Note(model):  # type: ignore[misc]
            title = peewee.TextField()

            class Meta:
                database, table_name = self.db, "note"

        class Author(model):  # type: ignore[misc]
            name = peewee.TextField()

            class Meta:
                database, table_name = self.db, "author"

        class Book(model):  # type: ignore[misc]
            title = peewee.TextField()
            author = peewee.ForeignKeyField(Author)

            class Meta:
                database, table_name = self.db, "book"

        self.document: Any = Document
        self.tag: Any = Tag
        self.note: Any = Note
        self.book: Any = Book

    def request(self) -> AbstractContextManager[Any]:
        """Return a context with a connection of the pool, for as long as the request takes."""
        context: AbstractContextManager[Any] = self.db.connection_context()
        return context

    def get(self, key: int) -> Any:
        """Call ``get_by_id()``."""
        return self.document.get_by_id(key)

    def update(self, document: Any, title: str) -> None:
        """Call ``save()`` in an ``atomic()`` block."""
        with self.db.atomic():
            document.title = title
            document.save()

    def known(self, key: int) -> Any:
        """Return a model instance with the key."""
        return self.document(id=key)

    def update_by_key(self, key: int, title: str) -> None:
        """Call ``set_by_id()`` in an ``atomic()`` block."""
        with self.db.atomic():
            self.document.set_by_id(key, {"title": title})

    def create(self, title: str) -> None:
        """Call ``create()`` in autocommit, as peewee does without a block."""
        self.note.create(title=title)

    def update_and_create(self, document: Any, title: str) -> None:
        """Call ``save()`` and ``create()`` in an ``atomic()`` block."""
        with self.db.atomic():
            document.title = title
            document.save()
            self.note.create(title=title)

    def get_or_create(self, name: str) -> Any:
        """Call ``get_or_create()``."""
        found, _ = self.tag.get_or_create(name=name)
        return found

    def get_or_create_inside(self, name: str) -> Any:
        """Call ``get_or_create()`` in an ``atomic()`` block."""
        with self.db.atomic():
            return self.get_or_create(name)

    def insert(self, titles: Sequence[str]) -> None:
        """Call ``insert_many()`` in an ``atomic()`` block."""
        with self.db.atomic():
            self.note.insert_many([{"title": title} for title in titles]).execute()

    def load(self, count: int) -> list[Any]:
        """Call ``select()``."""
        document = self.document
        return list(document.select().where(document.id <= count).order_by(document.id))

    def books(self, count: int) -> list[Any]:
        """Call ``select()``."""
        book = self.book
        return list(book.select().where(book.id <= count).order_by(book.id))

    def author(self, book: Any) -> Any:
        """Get the attribute, which reads."""
        return book.author

    def page(self, number: int, per_page: int) -> list[Any]:
        """Call ``paginate()`` and ``count()``."""
        query = self.book.select().order_by(self.book.id)
        rows = list(query.paginate(number, per_page))
        query.count()
        return rows

    def stream(self) -> Iterator[Any]:
        """Use ``ServerSide()``."""
        yield from postgres_ext.ServerSide(self.document.select(), array_size=1000)

    def close(self) -> None:
        """Close the connections."""
        self.db.close_all()
