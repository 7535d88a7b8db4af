"""This package and stock Flask-SQLAlchemy; a request is an application context."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Engine, ForeignKey, Text, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    make_transient_to_detached,
    mapped_column,
    relationship,
)

from benchmarks.peers import MAX_OVERFLOW, POOL_SIZE, Peer
from fictive_sqlalchemy.ext.flask import builtins


class OnSQLAlchemy(Peer):
    """What all peers that use SQLAlchemy's ORM in Flask have in common."""

    app: Flask
    document: Any
    tag: Any
    note: Any
    book: Any

    @property
    @abstractmethod
    def session(self) -> Any:
        """The session of the current request."""

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The engine."""

    def declare(self, base: Any) -> None:
        """Declare the models.

        :param base: What they inherit from.
        """

        class Document(base):  # type: ignore[misc]  # the base is a variable
            __tablename__ = "document"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(Text)

        class Tag(base):  # type: ignore[misc]
            __tablename__ = "tag"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(Text, unique=True)

        class Note(base):  # type: ignore[misc]
            __tablename__ = "note"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(Text)

        class Author(base):  # type: ignore[misc]
            __tablename__ = "author"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(Text)

        class Book(base):  # type: ignore[misc]
            __tablename__ = "book"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(Text)
            author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
            author = relationship(Author)

        self.document, self.tag, self.note, self.book = Document, Tag, Note, Book

    def request(self) -> AbstractContextManager[Any]:
        """Return an application context, whose end ends the session."""
        return self.app.app_context()

    def get(self, key: int) -> Any:
        """Call ``Session.get()``."""
        found = self.session.get(self.document, key)
        assert found is not None
        return found

    def update(self, document: Any, title: str) -> None:
        """Set the attribute, and commit."""
        document.title = title
        self.session.commit()

    def known(self, key: int) -> Any:
        """Call ``make_transient_to_detached()``, which takes an object for stored."""
        document = self.document(id=key)
        make_transient_to_detached(document)
        self.session.add(document)
        return document

    def update_by_key(self, key: int, title: str) -> None:
        """Execute an ORM-enabled UPDATE, and commit."""
        self.session.execute(self.update_statement(key, title))
        self.session.commit()

    def update_statement(self, key: int, title: str) -> Any:
        """Return the ORM-enabled UPDATE."""
        document = self.document
        return update(document).where(document.id == key).values(title=title)

    def create(self, title: str) -> None:
        """Add an object, and commit."""
        self.session.add(self.note(title=title))
        self.session.commit()

    def update_and_create(self, document: Any, title: str) -> None:
        """Set the attribute, add an object, and commit."""
        document.title = title
        self.session.add(self.note(title=title))
        self.session.commit()

    def get_or_create(self, name: str) -> Any:
        """Search, insert in a savepoint, and search again if somebody was faster."""
        session, query = self.session, select(self.tag).filter_by(name=name)
        found = session.scalar(query)
        if found is None:
            try:
                with session.begin_nested():
                    found = self.tag(name=name)
                    session.add(found)
            except IntegrityError:
                found = session.scalars(query).one()
            session.commit()
        return found

    def get_or_create_inside(self, name: str) -> Any:
        """Do the same: the session has begun a transaction with the read."""
        return self.get_or_create(name)

    def insert(self, titles: Sequence[str]) -> None:
        """Execute an ORM bulk insert."""
        self.session.execute(insert(self.note), [{"title": title} for title in titles])
        self.session.commit()

    def load(self, count: int) -> list[Any]:
        """Call ``Session.scalars()``."""
        document = self.document
        statement = select(document).where(document.id <= count).order_by(document.id)
        return list(self.session.scalars(statement))

    def books(self, count: int) -> list[Any]:
        """Call ``Session.scalars()``."""
        book = self.book
        return list(self.session.scalars(select(book).where(book.id <= count).order_by(book.id)))

    def author(self, book: Any) -> Any:
        """Get the attribute, which reads."""
        return book.author

    def stream(self) -> Iterator[Any]:
        """Use ``yield_per``."""
        statement = select(self.document).execution_options(yield_per=1000)
        yield from self.session.scalars(statement)

    def stream_rows(self) -> Iterator[Any]:
        """Read all rows, a thousand at a time, without the ORM."""
        with self.app.app_context(), self.engine.connect() as connection:
            statement = select(self.document.__table__).execution_options(yield_per=1000)
            yield from connection.execute(statement)

    def close(self) -> None:
        """Close the connections."""
        with self.app.app_context():
            self.engine.dispose()


class OnFlaskSQLAlchemy(OnSQLAlchemy):
    """What this package and stock Flask-SQLAlchemy have in common: all but the class."""

    extension: ClassVar[type[SQLAlchemy]]
    engine_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        super().__init__(url, pool_size, max_overflow)
        self.app = Flask("benchmark")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        pool = {"pool_size": pool_size, "max_overflow": max_overflow}
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {**self.engine_options, **pool}

        class Base(DeclarativeBase):  # one for each application: it carries the metadata
            pass

        extension: Any = self.extension
        self.db: SQLAlchemy = extension(self.app, model_class=Base)
        self.declare(self.db.Model)

    @property
    def session(self) -> Any:
        """``db.session``."""
        return self.db.session

    @property
    def engine(self) -> Engine:
        """``db.engine``."""
        return self.db.engine

    def page(self, number: int, per_page: int) -> list[Any]:
        """Call ``db.paginate()``."""
        statement = select(self.book).order_by(self.book.id)
        return list(self.db.paginate(statement, page=number, per_page=per_page))


class Ours(OnFlaskSQLAlchemy):
    """This package."""

    title = "fictive-sqlalchemy"
    extension = builtins.SQLAlchemy

    def update(self, document: Any, title: str) -> None:
        """Set the attribute in a ``begin()`` block."""
        with self.session.begin():
            document.title = title

    def update_by_key(self, key: int, title: str) -> None:
        """Execute the same UPDATE in a ``begin()`` block."""
        with self.session.begin():
            self.session.execute(self.update_statement(key, title))

    def update_and_create(self, document: Any, title: str) -> None:
        """Set the attribute and add an object in a ``begin()`` block."""
        with self.session.begin():
            document.title = title
            self.session.add(self.note(title=title))

    def get_or_create(self, name: str) -> Any:
        """Call ``filter_by_or_create()``."""
        return self.tag.filter_by_or_create(name=name)

    def get_or_create_inside(self, name: str) -> Any:
        """Call ``filter_by_or_create()`` in a ``begin()`` block."""
        with self.session.begin():
            return self.tag.filter_by_or_create(name=name)

    def insert(self, titles: Sequence[str]) -> None:
        """Execute the same bulk insert in a ``begin()`` block."""
        with self.session.begin():
            self.session.execute(insert(self.note), [{"title": title} for title in titles])


class Stock(OnFlaskSQLAlchemy):
    """Flask-SQLAlchemy as it is."""

    title = "Flask-SQLAlchemy"
    extension = SQLAlchemy


class Autocommit(OnFlaskSQLAlchemy):
    """Flask-SQLAlchemy on an engine in autocommit: ``commit()`` and ``rollback()`` do nothing."""

    title = "Flask-SQLAlchemy, AUTOCOMMIT (not atomic)"
    extension = SQLAlchemy
    engine_options: ClassVar[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT"}
    fails: ClassVar[Mapping[str, str]] = {
        "created": "a savepoint needs a transaction",
        "created_inside": "a savepoint needs a transaction",
        "stream_objects": "a server-side cursor needs a transaction",
    }
