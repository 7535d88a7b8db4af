"""The same small application twice: on this package, and on stock Flask-SQLAlchemy.

Each operation is what a request does with the database: an application context is pushed, the
work is done, and the context is popped, which removes the session.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Text, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive_sqlalchemy.ext.flask import OptInTransactionMixin


class Database(OptInTransactionMixin, SQLAlchemy):
    """The extension that is measured."""


class Side(ABC):
    """One of the two applications.

    :param url: The database.
    :param engine_options: ``SQLALCHEMY_ENGINE_OPTIONS``.
    """

    name: ClassVar[str]
    extension: ClassVar[type[SQLAlchemy]]

    def __init__(self, url: str, **engine_options: Any) -> None:
        self.app = Flask(self.name)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options

        class Base(DeclarativeBase):  # one for each application: it carries the metadata
            pass

        extension: Any = self.extension
        self.db: SQLAlchemy = extension(self.app, model_class=Base)
        model: Any = self.db.Model

        class Document(model):  # type: ignore[misc]  # Flask-SQLAlchemy's base is a variable
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(Text)

        self.document: Any = Document
        self._changes = 0

    def read(self) -> None:
        """Read one object by its key."""
        with self.app.app_context():
            self._get(1)

    def ten_reads(self) -> None:
        """Read ten objects by their keys."""
        with self.app.app_context():
            for key in range(1, 11):
                self._get(key)

    def read_then_update(self) -> None:
        """Read one object by its key and store a change of it."""
        self._changes += 1
        with self.app.app_context():
            self._store(self._get(1), f"title {self._changes}")

    def read_wait_read(self, seconds: float) -> None:
        """Read one object, wait on something that is not the database, and read another."""
        with self.app.app_context():
            self._get(1)
            time.sleep(seconds)
            self._get(2)

    def stream_objects(self) -> Iterator[Any]:
        """Read all objects a thousand at a time."""
        with self.app.app_context():
            statement = select(self.document).execution_options(yield_per=1000)
            yield from self.db.session.scalars(statement)

    def stream_rows(self) -> Iterator[Any]:
        """Read all rows a thousand at a time, without the ORM."""
        with self.app.app_context(), self.db.engine.connect() as connection:
            statement = select(self.document.__table__).execution_options(yield_per=1000)
            yield from connection.execute(statement)

    def fill(self, rows: int) -> None:
        """Make the table and its rows."""
        with self.app.app_context():
            self.db.create_all()
            with self.db.engine.begin() as connection:
                connection.exec_driver_sql(
                    "INSERT INTO document"
                    f" SELECT n, 'title ' || n FROM generate_series(1, {rows}) AS n"
                )
                connection.exec_driver_sql("ANALYZE document")

    def close(self) -> None:
        """Close the connections."""
        with self.app.app_context():
            self.db.engine.dispose()

    def _get(self, key: int) -> Any:
        found = self.db.session.get(self.document, key)
        assert found is not None
        return found

    @abstractmethod
    def _store(self, document: Any, title: str) -> None:
        """Change an object that was read, and make it durable."""


class Ours(Side):
    """On this package."""

    name = "ours"
    extension = Database

    def _store(self, document: Any, title: str) -> None:
        with self.db.session.begin():
            document.title = title


class Stock(Side):
    """On stock Flask-SQLAlchemy."""

    name = "stock"
    extension = SQLAlchemy

    def _store(self, document: Any, title: str) -> None:
        document.title = title
        self.db.session.commit()


SIDES: tuple[type[Side], ...] = (Ours, Stock)

OPERATIONS = {
    "read": "read by key",
    "ten_reads": "ten reads",
    "read_then_update": "read, then update",
}
"""The methods of a side that one request is, and what a reader calls them."""
