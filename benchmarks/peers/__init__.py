"""What is compared: one application, written for each peer as its documentation has it.

Three tables: ``document`` is read and updated, ``tag`` has unique names, ``note`` takes many rows
at once. An operation is what a request does with the database, its begin and its end included.
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

#: Made once for all peers, with plain SQL.
TABLES = """
CREATE TABLE document (id serial PRIMARY KEY, title text NOT NULL);
CREATE TABLE tag (id serial PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE note (id serial PRIMARY KEY, title text NOT NULL);
INSERT INTO document (title) SELECT 'title ' || n FROM generate_series(1, {rows}) AS n;
INSERT INTO tag (name) VALUES ('found');
ANALYZE;
"""


@dataclass(frozen=True)
class Operation:
    """What one request does."""

    title: str
    """What a reader calls it."""
    method: str
    """The method of a peer."""
    arguments: tuple[int, ...] = ()
    """Its arguments."""
    batch: int = 1
    """How many are measured at once: about as long as the scheduler lets a process run."""


READ = Operation("read by key", "reads", (1,), batch=20)
TEN_READS = Operation("ten reads", "reads", (10,), batch=4)
READ_THEN_UPDATE = Operation("read, then update", "read_then_update", batch=10)
FOUND = Operation("get or create, found", "found", batch=15)
CREATED = Operation("get or create, created", "created", batch=8)
INSERT = Operation("insert 5,000 rows", "insert_many", (5000,))

OPERATIONS = (READ, TEN_READS, READ_THEN_UPDATE, FOUND, CREATED, INSERT)


class Peer(ABC):
    """One of the applications: the primitives are its own, the operations are the same for all.

    :param url: The database, as SQLAlchemy has it; the URL names the driver.
    :param pool_size: How many connections the pool keeps, if it makes a difference.
    :param max_overflow: How many more it may open.
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
    def get_or_create(self, name: str) -> Any:
        """Return the tag with a name; make it if there is none. Others may make it meanwhile."""

    @abstractmethod
    def insert(self, titles: Sequence[str]) -> None:
        """Store many notes, all or none."""

    @abstractmethod
    def load(self, count: int) -> list[Any]:
        """Read the first documents with one statement."""

    @abstractmethod
    def stream(self) -> Iterator[Any]:
        """Read all documents, a thousand at a time."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def end_thread(self) -> None:  # noqa: B027  # most have nothing of the kind
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

    def found(self) -> None:
        """Get or create what is there."""
        with self.request():
            self.get_or_create("found")

    def created(self) -> None:
        """Get or create what is not there."""
        with self.request():
            self.get_or_create(self._new())

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
        """Read many documents; then one more by its key, and change one.

        :param clock: Tells the time.
        :returns: what it told before the read, after it, and after the update.
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
        """Return a text that is nowhere yet: what sets the same again may send no UPDATE."""
        self._count += 1
        return f"{os.getpid()}-{self._count}"


#: Where each peer is, by the name that the processes call it. One that is not installed may be
#: named, but not loaded.
PEERS = {
    "ours": "flask_sqlalchemy:Ours",
    "stock": "flask_sqlalchemy:Stock",
    "autocommit": "flask_sqlalchemy:Autocommit",
    "lite": "flask_sqlalchemy_lite:Lite",
    "django": "django:Django",
    "peewee": "peewee:Peewee",
    "by_hand": "by_hand:ByHand",
}
#: The drivers, and what a reader calls them.
DRIVER_TITLES = {"psycopg2": "psycopg2", "psycopg": "psycopg 3"}
DRIVERS = tuple(DRIVER_TITLES)


def load_peer(name: str) -> type[Peer]:
    """Import a peer, and with it the library that it is about.

    :param name: Its name in :data:`PEERS`.
    """
    module, _, peer = PEERS[name].partition(":")
    loaded: type[Peer] = getattr(import_module(f"{__name__}.{module}"), peer)
    return loaded
