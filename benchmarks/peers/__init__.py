"""The peers that are compared: one application, written for each as its documentation has it.

Five tables: ``document`` is read and updated, ``tag`` has unique names, ``note`` takes new rows,
and each ``book`` has one of the ``author`` rows. An operation is what a request does with the
database, its begin and its end included.
"""

from __future__ import annotations

import gc
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

POOL_SIZE, MAX_OVERFLOW = 5, 10

#: The tables, which are made once for all peers, with plain SQL.
TABLES = """
CREATE TABLE document (id serial PRIMARY KEY, title text NOT NULL);
CREATE TABLE tag (id serial PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE note (id serial PRIMARY KEY, title text NOT NULL);
CREATE TABLE author (id serial PRIMARY KEY, name text NOT NULL);
CREATE TABLE book (
    id serial PRIMARY KEY, title text NOT NULL, author_id integer NOT NULL REFERENCES author
);
INSERT INTO document (title) SELECT 'title ' || n FROM generate_series(1, {rows}) AS n;
INSERT INTO tag (name) VALUES ('found');
INSERT INTO author (name) SELECT 'name ' || n FROM generate_series(1, 100) AS n;
INSERT INTO book (title, author_id)
    SELECT 'title ' || n, (n - 1) % 100 + 1 FROM generate_series(1, 1000) AS n;
ANALYZE;
"""


@dataclass(frozen=True)
class Operation:
    """What one request does."""

    title: str
    """The name of the operation in the pages."""
    method: str
    """The method of a peer."""
    arguments: tuple[int, ...] = ()
    """The arguments of the method."""
    batch: int = 1
    """How many operations are measured at once. A batch takes about as long as the scheduler lets a
    process run."""


READ = Operation("read by key", "reads", (1,), batch=20)
TEN_READS = Operation("ten reads", "reads", (10,), batch=4)
LAZY_LOADS = Operation("100 rows with ten lazy loads", "lazy_loads", (100, 10), batch=2)
PAGINATE = Operation("paginate()", "paginate", batch=8)
STORE = Operation("store one object", "store", batch=12)
READ_THEN_UPDATE = Operation("read, then update", "read_then_update", batch=10)
UPDATE_BY_KEY = Operation("update by key, in a block", "update_in_block", batch=10)
BLOCK_OF_TWO = Operation("a block of two statements", "block_of_two", batch=6)
FOUND = Operation("get or create, found", "found", batch=15)
CREATED = Operation("get or create, created", "created", batch=8)
CREATED_INSIDE = Operation("get or create, created in a block", "created_inside", batch=8)
INSERT = Operation("insert 5,000 rows", "insert_many", (5000,))
TEN_READS_AND_UPDATE = Operation("ten reads and an update", "reads_then_update", (10,), batch=3)

READING = (READ, TEN_READS, LAZY_LOADS, PAGINATE)
WRITING = (
    STORE,
    READ_THEN_UPDATE,
    UPDATE_BY_KEY,
    BLOCK_OF_TWO,
    FOUND,
    CREATED,
    CREATED_INSIDE,
    INSERT,
)
OPERATIONS = (*READING, *WRITING)

#: The page that is read, and how many books are on it.
PAGE, PER_PAGE = 2, 20


class Peer(ABC):
    """One of the applications. It has its own primitives, and the same operations as all others.

    :param url: The URL of the database, in SQLAlchemy's form, which names the driver.
    :param pool_size: How many connections the pool keeps, if it distinguishes these from others.
    :param max_overflow: How many more connections the pool may open.
    """

    title: ClassVar[str]
    fails: ClassVar[Mapping[str, str]] = {}
    """The methods that cannot work on this peer, each with the reason."""

    @abstractmethod
    def __init__(
        self, url: str, pool_size: int = POOL_SIZE, max_overflow: int = MAX_OVERFLOW
    ) -> None:
        self._count = 0

    @abstractmethod
    def request(self) -> AbstractContextManager[Any]:
        """Return what surrounds the work of a request."""

    @abstractmethod
    def get(self, key: int) -> Any:
        """Read one document by its key."""

    @abstractmethod
    def update(self, document: Any, title: str) -> None:
        """Change a document that was read, in a transaction."""

    @abstractmethod
    def known(self, key: int) -> Any:
        """Return an object for a document that is stored, without a read."""

    @abstractmethod
    def update_by_key(self, key: int, title: str) -> None:
        """Change a document without an object for it, in a transaction."""

    @abstractmethod
    def create(self, title: str) -> None:
        """Store one note."""

    @abstractmethod
    def update_and_create(self, document: Any, title: str) -> None:
        """Change a document that was read and store a note, in one transaction."""

    @abstractmethod
    def get_or_create(self, name: str) -> Any:
        """Return the tag with a name, or make the tag, which others may do at the same time."""

    @abstractmethod
    def get_or_create_inside(self, name: str) -> Any:
        """Do what :meth:`get_or_create` does, in a transaction that could hold more."""

    @abstractmethod
    def insert(self, titles: Sequence[str]) -> None:
        """Store many notes, all or none."""

    @abstractmethod
    def load(self, count: int) -> list[Any]:
        """Read the first documents with one statement."""

    @abstractmethod
    def books(self, count: int) -> list[Any]:
        """Read the first books with one statement."""

    @abstractmethod
    def author(self, book: Any) -> Any:
        """Read the author of a book."""

    @abstractmethod
    def page(self, number: int, per_page: int) -> list[Any]:
        """Read a page of the books, and how many books there are."""

    @abstractmethod
    def stream(self) -> Iterator[Any]:
        """Read all documents, a thousand at a time."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def end_thread(self) -> None:  # noqa: B027  # most peers have nothing to close
        """Close what belongs to the thread that ends now."""

    def reads(self, count: int) -> None:
        """Read some documents by their keys, one after the other."""
        with self.request():
            for key in range(1, count + 1):
                self.get(key)

    def read_then_update(self) -> None:
        """Read one document by its key and store a change of it."""
        with self.request():
            self.update(self.get(1), self._new())

    def reads_then_update(self, count: int) -> None:
        """Read some documents by their keys, and store a change of the last document."""
        with self.request():
            for key in range(1, count):
                self.get(key)
            self.update(self.get(count), self._new())

    def update_known(self) -> None:
        """Store a change of one document in a transaction, without a SELECT before it."""
        with self.request():
            self.update(self.known(1), self._new())

    def update_in_block(self) -> None:
        """Change one document by its key, without an object for it.

        :meth:`read_then_update` changes an object in a block, and the flush at the end knows that
        nothing else is sent. Here the block itself executes an UPDATE, and more may follow. So
        BEGIN, UPDATE and COMMIT are sent, even by a peer whose flush is one statement.
        """
        with self.request():
            self.update_by_key(1, self._new())

    def store(self) -> None:
        """Store one note."""
        with self.request():
            self.create(self._new())

    def block_of_two(self) -> None:
        """Read one document by its key; store a change of it and a note in one transaction."""
        with self.request():
            self.update_and_create(self.get(1), self._new())

    def lazy_loads(self, count: int, loads: int) -> None:
        """Read some books with one statement, and the author of each of the first with another."""
        with self.request():
            for book in self.books(count)[:loads]:
                self.author(book)

    def paginate(self) -> None:
        """Read a page of the books, with how many there are."""
        with self.request():
            self.page(PAGE, PER_PAGE)

    def found(self) -> None:
        """Get or create a tag that exists."""
        with self.request():
            self.get_or_create("found")

    def created(self) -> None:
        """Get or create a tag that does not exist."""
        with self.request():
            self.get_or_create(self._new())

    def created_inside(self) -> None:
        """Get or create a tag that does not exist, in a transaction that could hold more."""
        with self.request():
            self.get_or_create_inside(self._new())

    def insert_many(self, count: int) -> None:
        """Store many notes at once."""
        with self.request():
            self.insert([f"title {number}" for number in range(count)])

    def load_many(self, count: int) -> None:
        """Read many documents with one statement."""
        with self.request():
            self.load(count)

    def read_wait_read(self, seconds: float) -> None:
        """Read one document, wait on something that is not the database, and read another."""
        with self.request():
            self.get(1)
            time.sleep(seconds)
            self.get(2)

    def stream_objects(self) -> Iterator[Any]:
        """Read all documents in one request, a thousand at a time."""
        with self.request():
            yield from self.stream()

    def read_then_update_among(self, count: int, clock: Callable[[], float]) -> list[float]:
        """Read many documents, then one more by its key, and change one of them.

        :param clock: A function that tells the time.
        :returns: The times before the read by key, after this read, and after the update.
        """
        with self.request():
            documents = self.load(count)
            gc.collect()
            times = [clock()]
            self.get(count + 1)
            times.append(clock())
            self.update(documents[0], self._new())
            times.append(clock())
        return times

    def _new(self) -> str:
        """Return a text that is not stored yet: a change to the same text may send no UPDATE."""
        self._count += 1
        return f"{os.getpid()}-{self._count}"


#: The module and the class of each peer, by the peer's name. A peer whose library is not installed
#: may be named, but not loaded.
PEERS = {
    "ours": "flask_sqlalchemy:Ours",
    "stock": "flask_sqlalchemy:Stock",
    "autocommit": "flask_sqlalchemy:Autocommit",
    "lite": "flask_sqlalchemy_lite:Lite",
    "django": "django:Django",
    "peewee": "peewee:Peewee",
    "by_hand": "by_hand:ByHand",
    "by_hand_alone": "by_hand:ByHandAlone",
}
#: The drivers, and their names in the pages.
DRIVER_TITLES = {"psycopg2": "psycopg2", "psycopg": "psycopg 3"}
DRIVERS = tuple(DRIVER_TITLES)


def load_peer(name: str) -> type[Peer]:
    """Import a peer, and with it the peer's library.

    :param name: The name of the peer in :data:`PEERS`.
    """
    module, _, peer = PEERS[name].partition(":")
    loaded: type[Peer] = getattr(import_module(f"{__name__}.{module}"), peer)
    return loaded
