"""Django's ORM; a request is what the signals at its begin and end do, without a view.

With psycopg 3, this peer uses Django's pool. With psycopg2, Django has no pool, and each thread
keeps a connection (``CONN_MAX_AGE = None``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import make_url

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE, Peer


class Django(Peer):
    """Django as it is. There can be one in a process, because Django is configured once.

    :param url: The database.
    :param pool_size: How many connections the pool keeps.
    :param max_overflow: How many more it may open.
    """

    title = "Django"

    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        super().__init__(url, pool_size, max_overflow)
        at = make_url(url)
        options: dict[str, Any] = dict(at.query)
        if at.get_driver_name() == "psycopg2":
            # Django takes psycopg 3 if it can import it.
            sys.modules["psycopg"] = None  # type: ignore[assignment]
        else:
            options["pool"] = {"min_size": 0, "max_size": pool_size + max_overflow}

        from django.conf import settings

        settings.configure(
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": at.database,
                    "USER": at.username or "",
                    "PASSWORD": at.password or "",
                    "HOST": at.host or "",
                    "PORT": str(at.port or ""),
                    "OPTIONS": options,
                    "CONN_MAX_AGE": 0 if "pool" in options else None,
                }
            },
            DEFAULT_AUTO_FIELD="django.db.models.AutoField",
            USE_TZ=True,
        )

        import django
        from django.core import signals
        from django.core.paginator import Paginator
        from django.db import connections, models, transaction

        django.setup()
        self._signals, self._connections = signals, connections
        self._atomic: Any = transaction.atomic
        self._paginator: Any = Paginator

        class Document(models.Model):  # type: ignore[misc]  # Django has no types
            title = models.TextField()

            class Meta:
                app_label, db_table = "benchmarks", "document"

        class Tag(models.Model):  # type: ignore[misc]
            name = models.TextField(unique=True)

            class Meta:
                app_label, db_table = "benchmarks", "tag"

        class Note(models.Model):  # type: ignore[misc]
            title = models.TextField()

            class Meta:
                app_label, db_table = "benchmarks", "note"

        class Author(models.Model):  # type: ignore[misc]
            name = models.TextField()

            class Meta:
                app_label, db_table = "benchmarks", "author"

        class Book(models.Model):  # type: ignore[misc]
            title = models.TextField()
            author = models.ForeignKey(Author, models.CASCADE)

            class Meta:
                app_label, db_table = "benchmarks", "book"

        self.document: Any = Document
        self.tag: Any = Tag
        self.note: Any = Note
        self.book: Any = Book

    @contextmanager
    def request(self) -> Iterator[None]:
        """Send the signals at which Django gives its connections back."""
        self._signals.request_started.send(sender=type(self))
        try:
            yield
        finally:
            self._signals.request_finished.send(sender=type(self))

    def get(self, key: int) -> Any:
        """Call ``objects.get()``."""
        return self.document.objects.get(pk=key)

    def update(self, document: Any, title: str) -> None:
        """Call ``save()`` in an ``atomic()`` block."""
        with self._atomic():
            document.title = title
            document.save(force_update=True)

    def known(self, key: int) -> Any:
        """Return a model instance with the key."""
        return self.document(pk=key)

    def update_by_key(self, key: int, title: str) -> None:
        """Call ``objects.filter().update()`` in an ``atomic()`` block."""
        with self._atomic():
            self.document.objects.filter(pk=key).update(title=title)

    def create(self, title: str) -> None:
        """Call ``objects.create()`` in autocommit, as Django does without a block."""
        self.note.objects.create(title=title)

    def update_and_create(self, document: Any, title: str) -> None:
        """Call ``save()`` and ``objects.create()`` in an ``atomic()`` block."""
        with self._atomic():
            document.title = title
            document.save(force_update=True)
            self.note.objects.create(title=title)

    def get_or_create(self, name: str) -> Any:
        """Call ``objects.get_or_create()``."""
        found, _ = self.tag.objects.get_or_create(name=name)
        return found

    def get_or_create_inside(self, name: str) -> Any:
        """Call ``objects.get_or_create()`` in an ``atomic()`` block."""
        with self._atomic():
            return self.get_or_create(name)

    def insert(self, titles: Sequence[str]) -> None:
        """Call ``objects.bulk_create()``, which is atomic."""
        self.note.objects.bulk_create([self.note(title=title) for title in titles])

    def load(self, count: int) -> list[Any]:
        """Call ``objects.filter()``."""
        return list(self.document.objects.filter(pk__lte=count).order_by("pk"))

    def books(self, count: int) -> list[Any]:
        """Call ``objects.filter()``."""
        return list(self.book.objects.filter(pk__lte=count).order_by("pk"))

    def author(self, book: Any) -> Any:
        """Get the attribute, which reads."""
        return book.author

    def page(self, number: int, per_page: int) -> list[Any]:
        """Use ``Paginator``."""
        return list(self._paginator(self.book.objects.order_by("pk"), per_page).page(number))

    def stream(self) -> Iterator[Any]:
        """Call ``iterator()``."""
        yield from self.document.objects.iterator(chunk_size=1000)

    def end_thread(self) -> None:
        """Close the connection of the thread."""
        self._connections.close_all()

    def close(self) -> None:
        """Close the connections."""
        self._connections.close_all()
        connection = self._connections["default"]
        if connection.pool:
            connection.close_pool()
