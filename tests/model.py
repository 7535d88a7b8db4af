"""The contract of a session as a model in plain Python, which sends nothing to anybody.

It knows three things:

* :class:`Store`: what is committed, what each open transaction has changed, and who waits for whom;
* :class:`Thing`: one object as SQLAlchemy sees it, its loaded values and its unsaved changes;
* :class:`Model`: one session, which is outside, inside, or inside savepoints.

An operation of the model either returns what the real one returns, or raises :class:`Fails` with
the errors that the real one may raise. A killed server process is an error where its connection has
sent something of a transaction, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.orm.exc import DetachedInstanceError, ObjectDeletedError, StaleDataError


class Base(DeclarativeBase):
    pass


class Item(Base):
    """Rows that can break two rules: a name is unique, and an amount is not negative."""

    __tablename__ = "item"
    __table_args__ = (sa.CheckConstraint("amount >= 0"),)
    # A row that someone else has deleted before is no error, and no warning either.
    __mapper_args__ = {"confirm_deleted_rows": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    amount: Mapped[int]


class SecondBase(DeclarativeBase):
    pass


class Extra(SecondBase):
    """Rows on a second bind, which break no rule, and which no statement but a flush writes."""

    __tablename__ = "extra"
    __mapper_args__ = {"confirm_deleted_rows": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    amount: Mapped[int]


class Row(NamedTuple):
    id: int
    name: str
    amount: int

    def changed(self, change: str | int | None) -> Row | None:
        """The row with another name, or another amount; or none at all."""
        if change is None:
            return None
        changes: dict[str, Any] = {"name" if isinstance(change, str) else "amount": change}
        return self._replace(**changes)


class Fails(Exception):
    """The operation has to fail, with one of these errors."""

    def __init__(self, *errors: type[Exception], disconnect: bool = False) -> None:
        self.errors = errors
        self.disconnect = disconnect


class RawCursorFailed(Exception):
    """The driver's own error, of a cursor that SQLAlchemy knows nothing of."""


#: What a statement of the unit of work may end in: a broken rule, a lock, a row that is gone.
WRITE_ERRORS = (exc.IntegrityError, exc.OperationalError, StaleDataError)


@dataclass
class Level:
    """A transaction or a savepoint: what it has changed."""

    rows: dict[int, Row | None] = field(default_factory=dict[int, "Row | None"])
    extras: dict[int, Row | None] = field(default_factory=dict[int, "Row | None"])
    """The same on the second bind."""
    names: set[str] = field(default_factory=set[str])
    """Names it has written or written over: someone else who wants one has to wait."""
    locks: set[int] = field(default_factory=set[int])
    new: list[Thing] = field(default_factory=list["Thing"])
    dirty: list[Thing] = field(default_factory=list["Thing"])
    deleted: list[Thing] = field(default_factory=list["Thing"])
    inserted: list[int] = field(default_factory=list[int])
    """The rows for which a listener has called ``on_commit()``."""
    used: bool = False
    """Whether its SAVEPOINT is sent, which waits for a first statement."""
    failed: bool = False
    """Whether a flush has failed: SQLAlchemy has rolled it back and waits for its end."""
    kept: Level | None = None
    """What it had when a savepoint in it was rolled back: an error does not give that up.

    After ROLLBACK TO the savepoint is there as before, and SQLAlchemy does not release it. So a
    later error aborts what came after, and the server keeps the locks of what came before.
    """

    def forget_rows(self) -> None:
        """What a rollback does in the database, or the end of the server process."""
        self.rows.clear()
        self.names.clear()
        self.locks.clear()
        self.kept = None

    def roll_back_to_savepoint(self) -> None:
        """What ROLLBACK TO a savepoint in it does."""
        self.kept = Level(dict(self.rows), names=set(self.names), locks=set(self.locks))

    def abort(self) -> None:
        """What an error does."""
        kept = self.kept or Level()
        self.rows, self.names, self.locks = dict(kept.rows), set(kept.names), set(kept.locks)

    def absorb(self, inner: Level) -> None:
        """What the release of a savepoint does."""
        self.rows.update(inner.rows)
        self.extras.update(inner.extras)
        self.names |= inner.names
        self.locks |= inner.locks
        self.inserted += inner.inserted
        for mine, its in (
            (self.new, inner.new),
            (self.dirty, inner.dirty),
            (self.deleted, inner.deleted),
        ):
            mine.extend(its)


@dataclass(eq=False)
class Thing:
    """One object."""

    real: Item | Extra
    id: int
    state: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attributes that are loaded or set."""
    old: dict[str, Any] = field(default_factory=dict[str, Any])
    """The attributes that were set, each with its value before, ABSENT if that was not loaded."""
    modified: bool = False
    expired: bool = False
    gone: bool = False
    """Whether its DELETE was sent."""
    waits: bool = False
    """Whether its DELETE waits for a flush."""

    @property
    def is_extra(self) -> bool:
        return isinstance(self.real, Extra)

    def expire(self) -> None:
        self.values.clear()
        self.old.clear()
        self.modified = False
        self.expired = True

    def row(self) -> Row:
        return Row(self.id, self.values["name"], self.values["amount"])

    def fill(self, row: Row) -> None:
        """Load what is not loaded."""
        for name, value in row._asdict().items():
            if name not in self.old:
                self.values.setdefault(name, value)
        self.expired = False

    def overwrite(self, row: Row) -> None:
        self.old.clear()
        self.modified = False
        self.values.clear()
        self.fill(row)


ABSENT = object()
#: Since 2.1 a session flushes before a statement that names no class, too.
CORE_AUTOFLUSHES = not sa.__version__.startswith("2.0.")
ATTRIBUTES = Row._fields


class Store:
    """The database: what is committed, and the transactions that are open on it."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.extras: dict[int, Row] = {}
        self.versions: dict[int, int] = {}
        self.open: list[Model] = []

    def others(self, model: Model | None) -> Iterator[Level]:
        for other in self.open:
            if other is not model:
                yield from other.levels

    def apply(self, rows: dict[int, Row | None]) -> None:
        for number, row in rows.items():
            self.versions[number] = self.versions.get(number, 0) + 1
            if row is None:
                self.rows.pop(number, None)
            else:
                self.rows[number] = row

    def is_free(self, number: int, *names: str, model: Model | None = None) -> bool:
        """Whether nobody else has the row or one of the names."""
        return not any(
            number in level.rows or number in level.locks or level.names.intersection(names)
            for level in self.others(model)
        )


class Model:
    """One session by the contract.

    :param begins_on_write: Whether the first write outside begins a transaction that lasts.
    """

    def __init__(
        self,
        store: Store,
        expire_on_commit: bool = True,
        autoflush: bool = True,
        begins_on_write: bool = False,
    ) -> None:
        self.store = store
        self.expire_on_commit = expire_on_commit
        self.autoflush = autoflush
        self.begins_on_write = begins_on_write
        self.handed_out = False
        """Whether the user has its connection, which joins each transaction at its begin."""
        self.things: list[Thing] = []
        self.identities: dict[int, Thing] = {}
        self.blocks: list[bool] = []
        """One for each `with` block that is entered: whether it is a transaction's of now."""
        self.called: list[int] = []
        """The rows for which the functions of ``on_commit()`` were called."""
        self.before_flush: Callable[[], object] = lambda: None
        """What a listener does, before it is known what a flush writes."""
        self.talked = False
        """Whether this operation has sent a statement."""
        self.end()

    def end(self) -> None:
        """Forget the transaction."""
        self.levels: list[Level] = []
        self.repeatable = False
        self.serializable = False
        self.read_only = False
        self.snapshot: dict[int, Row] | None = None
        self.versions: dict[int, int] = {}
        self.connected = False
        self.sent = False
        self.sent_second = False
        self.sent_in_vain = False
        """Whether a cursor of the driver was used after a flush has failed, before the end."""
        self.aborted = False
        self.dead = False
        self.noticed = False
        if self in self.store.open:
            self.store.open.remove(self)

    # What is true now

    @property
    def inside(self) -> bool:
        return bool(self.levels)

    @property
    def spent(self) -> bool:
        """Whether a block is entered whose transaction has ended."""
        return bool(self.blocks) and not self.blocks[-1]

    @property
    def usable(self) -> bool:
        return not self.spent and not (self.levels and self.levels[-1].failed)

    @property
    def out_of_autocommit(self) -> bool:
        return (
            self.connected and not self.noticed and (not self.levels[0].failed or self.handed_out)
        )

    @property
    def in_database(self) -> bool:
        """Whether the server has a transaction open for it, as far as the client knows."""
        if self.out_of_autocommit and self.levels[0].failed:
            return self.sent_in_vain
        return self.sent and self.out_of_autocommit

    def waiting(self) -> list[Thing]:
        """What a flush would write."""
        pending = [thing for thing in self.things if thing.state == "pending"]
        known = self.identities.values()
        return pending + [thing for thing in known if thing.modified or thing.waits]

    def view(self) -> dict[int, Row]:
        """The rows that a statement sees."""
        rows = dict(self.store.rows if self.snapshot is None else self.snapshot)
        for level in self.levels:
            for number, row in level.rows.items():
                if row is None:
                    rows.pop(number, None)
                else:
                    rows[number] = row
        return rows

    def rows(self) -> list[Row]:
        return sorted(self.view().values())

    def row_of(self, thing: Thing) -> Row | None:
        """The row of an object, as a statement sees it."""
        if not thing.is_extra:
            return self.view().get(thing.id)
        row: Row | None = self.store.extras.get(thing.id)
        for level in self.levels:
            row = level.extras.get(thing.id, row)
        return row

    # What is sent

    def connect(self) -> None:
        """Take a connection into the transaction, and set the savepoints."""
        if self.levels[-1].failed or self.spent:
            raise Fails(exc.InvalidRequestError)
        self.connected = True
        for level in self.levels[1:]:
            if not level.used:
                self.exchange()
                level.used = True
        self.levels[0].used = True

    def exchange(self) -> None:
        """Send something inside and get an answer."""
        self.meet_disconnect()
        if not self.sent:
            self.sent, self.dead = True, False  # nothing can be sent twice: it goes on with another
        if self.aborted:
            raise Fails(exc.DBAPIError)

    def meet_disconnect(self) -> None:
        if self.dead and self.noticed:
            raise Fails(exc.InvalidRequestError)
        if self.dead and self.sent:
            self.noticed = True
            for level in self.levels:
                level.forget_rows()
            raise Fails(exc.DBAPIError, disconnect=True)

    def send(self, *, writes: bool = False) -> None:
        """Send one statement."""
        if writes:
            self.begin_implicitly()
        if not self.levels:
            if self.spent:
                raise Fails(exc.InvalidRequestError)
            self.talked = True
            return
        self.talked = True
        self.connect()
        if self.dead and self.noticed:
            raise Fails(exc.InvalidRequestError)
        if writes and self.read_only:
            raise Fails(exc.InvalidRequestError)
        self.exchange()
        self.take_snapshot()

    def take_snapshot(self) -> None:
        if self.repeatable and self.snapshot is None:
            self.snapshot = dict(self.store.rows)
            self.versions = dict(self.store.versions)

    def connection(self) -> None:
        """Hand the connection out."""
        self.begin_implicitly()
        if self.inside:
            self.connect()
        elif self.spent:
            raise Fails(exc.InvalidRequestError)
        self.handed_out = True

    def send_raw(self) -> None:
        """Send one statement on a cursor of the driver, of which the session knows nothing."""
        if not self.inside:
            return
        if self.dead:
            self.sent = True  # as far as the driver tells
            raise Fails(RawCursorFailed, exc.InvalidRequestError)
        self.sent = True
        self.sent_in_vain = self.levels[0].failed
        if self.aborted:
            raise Fails(RawCursorFailed)
        self.take_snapshot()

    def execute_raw(self, writes: Callable[[], Any]) -> None:
        """Write on a cursor of the driver: part of the transaction; outside it stands alone."""
        self.send_raw()
        try:
            if self.read_only:
                raise Fails
            if self.inside:
                writes()
            else:
                self.levels = [Level()]
                try:
                    writes()
                    self.store.apply(self.levels[0].rows)
                finally:
                    self.levels = []
        except Fails:
            if self.inside:
                self.abort()
            raise Fails(RawCursorFailed) from None

    def send_for(self, thing: Thing, *, writes: bool = False) -> None:
        """Send one statement for an object, to its bind."""
        if not thing.is_extra:
            self.send(writes=writes)
            return
        if self.spent or (self.levels and self.levels[-1].failed):
            raise Fails(exc.InvalidRequestError)
        if writes and self.read_only:
            raise Fails(exc.InvalidRequestError)
        self.sent_second = self.inside

    def abort(self) -> None:
        """A statement has failed: the server refuses all others until a rollback."""
        self.aborted = True
        self.levels[-1].abort()

    # What is written

    def write(self, number: int, row: Row | None, *, new: bool = False) -> bool:
        """Put a row in place, or remove it.

        :returns: whether there was one to write over.
        """
        store, level, before = self.store, self.levels[-1], self.view().get(number)
        if new and before is None:
            before = store.rows.get(number)  # taken by a row that the snapshot doesn't show
            if before is not None:
                raise Fails(*WRITE_ERRORS)
        names = {each.name for each in (before, row) if each is not None}
        if row is not None and row.amount < 0:
            raise Fails(*WRITE_ERRORS)
        if before is None and not new:
            return False
        if new and before is not None:
            raise Fails(*WRITE_ERRORS)
        if any(number in each.rows or number in each.locks for each in store.others(self)):
            raise Fails(*WRITE_ERRORS)
        self.check_snapshot(number)
        if row is not None and (before is None or before.name != row.name):
            if any(row.name in each.names for each in store.others(self)):
                raise Fails(*WRITE_ERRORS)
            latest: dict[int, Row | None] = dict(store.rows)
            for each in self.levels:
                latest.update(each.rows)
            if any(n != number and r is not None and r.name == row.name for n, r in latest.items()):
                raise Fails(*WRITE_ERRORS)
        level.rows[number] = row
        level.names |= names
        return True

    def write_for(self, thing: Thing, row: Row | None, *, new: bool = False) -> bool:
        """Put the row of an object in place, or remove it, on its bind."""
        if thing.is_extra:
            self.levels[-1].extras[thing.id] = row
            return True
        return self.write(thing.id, row, new=new)

    def check_snapshot(self, number: int) -> None:
        """At REPEATABLE READ nobody writes over, or locks, what the snapshot doesn't show."""
        if self.snapshot is None or any(number in level.rows for level in self.levels):
            return
        if self.store.versions.get(number) != self.versions.get(number):
            raise Fails(*WRITE_ERRORS)

    def execute(self, writes: Callable[[], Any], *, text: bool = False) -> None:
        """One statement, or one call, that writes past the objects.

        :param text: Whether it is SQL, which the server alone refuses in a read-only transaction.
        """
        if self.inside or self.begins_on_write:
            self.begin_implicitly()
            self.send(writes=not text)
            try:
                if self.read_only:
                    raise Fails(exc.DBAPIError)
                writes()
            except Fails:
                self.abort()
                raise
            return
        self.send()
        self.levels = [Level()]
        try:
            writes()
            self.store.apply(self.levels[0].rows)
        finally:
            self.levels = []

    def flush_and_execute(
        self, writes: Callable[[], Any], *, orm: bool, text: bool = False
    ) -> None:
        """The same, where SQLAlchemy flushes what waits before it: two writes keep their order.

        :param orm: Whether the statement names a class.
        :param text: As above.
        """
        flushes = self.autoflush and (orm or CORE_AUTOFLUSHES) and bool(self.waiting())
        if flushes and not self.inside and not self.begins_on_write:
            self.let_go(self.write_alone(expire=False, afterwards=lambda: self.execute(writes)))
            return
        self.autoflushes(orm=orm)
        self.execute(writes, text=text)

    def bulk(self, writes: Callable[[], Any]) -> None:
        """A ``bulk_…()`` call: it flushes nothing, and fails as a flush does.

        Outside, what waits goes on waiting, whatever happens.
        """
        if not self.usable:
            raise Fails(exc.InvalidRequestError)
        try:
            self.execute(writes)
        except Fails:
            if self.inside:
                self.roll_back_level()
            raise

    # The unit of work

    def autoflushes(self, *, orm: bool = True) -> None:
        """What comes before a statement, but for a write outside: see :meth:`flush_and_execute`."""
        if self.autoflush and (orm or CORE_AUTOFLUSHES):
            if self.inside:
                self.flush_inside()
            elif self.begins_on_write:
                self.flush()

    def flush_inside(self) -> None:
        if not self.waiting():
            return
        self.before_flush()
        if not self.usable:
            raise Fails(exc.InvalidRequestError)
        try:
            self.write_objects(self.waiting())
        except Fails:
            self.roll_back_level()
            raise

    def write_objects(self, waiting: list[Thing]) -> None:
        if not all(thing.is_extra for thing in waiting):
            self.connect()
        level = self.levels[-1]
        deleted = sorted((thing for thing in waiting if thing.waits), key=lambda thing: thing.id)
        changed = [t for t in waiting if not t.waits and t.state != "pending"]
        new = [thing for thing in waiting if thing.state == "pending"]
        for thing in sorted(changed, key=lambda thing: thing.id):
            values = {
                name: thing.values[name]
                for name, before in thing.old.items()
                if before is ABSENT or before != thing.values[name]
            }
            if values:
                row = self.load_key(thing)
                self.send_for(thing, writes=True)
                if row is None:
                    row = self.row_of(thing)
                if row is None or not self.write_for(thing, row._replace(**values)):
                    raise Fails(*WRITE_ERRORS)
        for thing in new:
            self.send_for(thing, writes=True)
            self.write_for(thing, thing.row(), new=True)
            if not thing.is_extra:
                level.inserted.append(thing.id)
        for thing in deleted:
            self.load_key(thing)
            self.send_for(thing, writes=True)
            if not self.write_for(thing, None):
                self.check_snapshot(thing.id)
        for thing in deleted:
            self.mark_deleted(thing)
        for thing in (*changed, *new):
            (level.new if thing.state == "pending" else level.dirty).append(thing)
            thing.state, thing.modified, thing.expired = "persistent", False, False
            thing.old.clear()
            self.identities[thing.id] = thing

    def load_key(self, thing: Thing) -> Row | None:
        """SQLAlchemy reads an expired object before it writes it, for the key."""
        if "id" in thing.values:
            return None
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(ObjectDeletedError)
        thing.fill(row)
        return row

    def mark_deleted(self, thing: Thing) -> None:
        thing.gone, thing.waits = True, False
        thing.state = "deleted"
        if self.identities.get(thing.id) is thing:
            del self.identities[thing.id]
        if self.inside:
            self.levels[-1].deleted.append(thing)
        else:
            thing.state = "detached"

    def restore(self, level: Level, *, all_of_them: bool) -> None:
        """What a rollback does to the objects."""
        new = set(level.new) | {thing for thing in self.things if thing.state == "pending"}
        for thing in new:
            if self.identities.get(thing.id) is thing:
                del self.identities[thing.id]
            thing.state, thing.waits = "transient", False
        for thing in level.deleted:
            if thing.state == "deleted":
                thing.state, thing.gone = "persistent", False
                self.identities[thing.id] = thing
        for thing in self.identities.values():
            thing.waits = False
            if all_of_them or thing.modified or thing in level.dirty:
                thing.expire()

    def roll_back_level(self) -> None:
        """What a failed flush does: the innermost level is rolled back and waits for its end."""
        level = self.levels[-1]
        if len(self.levels) > 1 and level.used and not self.noticed:
            self.aborted = False
        level.failed = True
        level.forget_rows()
        level.extras.clear()
        self.restore(level, all_of_them=len(self.levels) == 1)
        self.roll_back_on_server(level)
        if len(self.levels) == 1:
            self.aborted, self.snapshot = False, None

    def roll_back_on_server(self, level: Level) -> None:
        """The ROLLBACK, or ROLLBACK TO, of a level that sent something.

        On a dead connection it is no error: the server has rolled back.
        """
        if self.sent and level.used and self.dead:
            self.noticed = True
        elif self.sent and level.used:
            around = [each for each in self.levels if each is not level]
            if around:
                around[-1].roll_back_to_savepoint()

    # Transactions

    def begin(
        self, *, level: str | None = None, read_only: bool | None = None, block: bool = False
    ) -> None:
        self.levels = [Level()]
        self.store.open.append(self)
        self.repeatable = level in ("REPEATABLE READ", "SERIALIZABLE")
        self.serializable = level == "SERIALIZABLE"
        self.read_only = bool(read_only)
        if block:
            self.blocks.append(True)
        if self.handed_out:
            self.connect()

    def begin_implicitly(self) -> None:
        """What the first write does, with ``begin_on_write=True``."""
        if not self.inside and self.begins_on_write:
            if self.spent:
                raise Fails(exc.InvalidRequestError)
            self.begin()

    def begin_nested(self) -> None:
        self.begin_implicitly()
        self.flush_inside()
        self.levels.append(Level())
        if self.handed_out:
            try:
                self.connect()
            except Fails:
                self.roll_back_nested()
                raise
        self.blocks.append(True)

    def commit_root(self, *, expire: bool) -> None:
        root = self.levels[0]
        if self.aborted:  # the driver knows that before it sends anything
            raise Fails(exc.PendingRollbackError)
        if self.sent or self.noticed:
            self.meet_disconnect()
        self.store.apply(root.rows)
        for number, row in root.extras.items():
            if row is None:
                self.store.extras.pop(number, None)
            else:
                self.store.extras[number] = row
        self.called += root.inserted
        if expire:
            for thing in self.identities.values():
                thing.expire()
            for thing in root.deleted:
                if thing.state == "deleted":
                    thing.state = "detached"
        self.end()

    def roll_back_root(self) -> None:
        """Roll back what is left."""
        root = self.levels[0]
        try:
            if not root.failed:
                self.restore(root, all_of_them=True)
                self.roll_back_on_server(root)
        finally:
            self.end()

    def roll_back_all(self) -> None:
        while len(self.levels) > 1:
            self.roll_back_nested()
        self.roll_back_root()

    def roll_back_nested(self) -> None:
        level = self.levels[-1]
        try:
            if not level.failed:
                if level.used and not self.dead:
                    self.aborted = False
                self.restore(level, all_of_them=False)
                self.roll_back_on_server(level)
        finally:
            self.levels.pop()

    # Operations outside and inside

    def flush(self) -> None:
        if self.inside:
            self.flush_inside()
        elif self.waiting():
            if self.begins_on_write:
                self.begin_implicitly()
                self.flush_inside()
                if not self.sent and not self.sent_second:
                    self.end()  # what has changed has the values that it had
            else:
                self.let_go(self.write_alone(expire=False))

    def write_alone(
        self, *, expire: bool, afterwards: Callable[[], Any] | None = None
    ) -> list[Thing]:
        """A call outside that flushes: one transaction, which ends with the call.

        :param afterwards: What else belongs to the call.
        :returns: what it has deleted.
        """
        if self.spent:
            raise Fails(exc.InvalidRequestError)
        self.levels = [Level()]
        try:
            self.flush_inside()
            if afterwards is not None:
                afterwards()
            deleted = self.levels[0].deleted
            self.commit_root(expire=expire)
        except Fails:
            if self.levels and not self.levels[0].failed:
                self.restore(self.levels[0], all_of_them=True)
            self.end()
            raise
        return deleted

    def let_go(self, deleted: list[Thing]) -> None:
        for thing in deleted:
            thing.state = "detached"

    def commit(self) -> None:
        if self.blocks and not self.begins_on_write:
            raise Fails(exc.InvalidRequestError)
        self.begin_implicitly()
        if not self.inside:
            self.write_alone(expire=self.expire_on_commit)
            return
        # A commit() that fails leaves it to the caller to roll back, see the rule.
        self.flush_inside()
        if self.levels[-1].failed:
            raise Fails(exc.InvalidRequestError)
        self.commit_root(expire=self.expire_on_commit)
        self.spend()

    def rollback(self) -> None:
        if self.inside:
            try:
                self.roll_back_all()
            finally:
                self.spend()
        elif not self.spent:
            self.restore(Level(), all_of_them=True)

    def spend(self) -> None:
        self.blocks = [False for _ in self.blocks]

    def leave(self, *, error: bool) -> None:
        """Leave the innermost block."""
        now = self.blocks.pop()
        if not now:
            return
        if len(self.levels) > 1:
            self.leave_nested(error=error)
            return
        root = self.levels[0]
        if root.failed:
            self.end()
            if not error:
                raise Fails(exc.PendingRollbackError)
            return
        if error:
            self.roll_back_root()
            return
        try:
            self.flush_inside()
            self.commit_root(expire=self.expire_on_commit)
        except Fails:
            with suppress(Fails):
                self.roll_back_root()
            raise

    def leave_nested(self, *, error: bool) -> None:
        level = self.levels[-1]
        if level.failed:
            self.levels.pop()
            if not error:
                raise Fails(exc.PendingRollbackError)
            return
        if error:
            self.roll_back_nested()
            return
        try:
            self.flush_inside()
            if level.used and self.aborted:
                raise Fails(exc.PendingRollbackError)
            if level.used:
                self.exchange()
        except Fails:
            self.levels.pop()
            if not level.failed:
                self.aborted = False
                self.restore(level, all_of_them=False)
                self.roll_back_on_server(level)
            raise
        self.levels.pop()
        self.levels[-1].absorb(level)

    def close(self) -> None:
        for thing in self.things:
            if thing.state == "pending":
                thing.state = "transient"
            elif thing.state == "persistent":
                thing.state = "detached"
            thing.waits = False
        # What is deleted and not committed stays in limbo, as in any SQLAlchemy session.
        self.things = [thing for thing in self.things if thing.state != "deleted"]
        self.identities.clear()
        self.handed_out = False
        self.end()
        self.spend()

    # Objects

    def see(self, row: Row, real: Item, *, overwrite: bool = False) -> None:
        """A row came in as an object."""
        thing = self.identities.get(row.id)
        if thing is None:
            thing = Thing(real, row.id, "persistent")
            thing.fill(row)
            self.identities[row.id] = thing
            self.things.append(thing)
            return
        assert thing.real is real, "two objects for one row"
        if overwrite:
            thing.overwrite(row)
        elif any(name not in thing.values for name in ATTRIBUTES):
            thing.fill(row)

    def load(self, thing: Thing) -> None:
        """Load an object that is expired, at its next use."""
        self.autoflushes()
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(ObjectDeletedError)
        thing.fill(row)

    def get(self, number: int, real: Item | None) -> Item | None:
        thing = self.identities.get(number)
        if thing is not None:
            assert isinstance(thing.real, Item)
            if not thing.expired:
                return thing.real
            try:
                self.load(thing)
                return thing.real
            except Fails as fails:
                if fails.errors != (ObjectDeletedError,):
                    raise
                # not by the flush, which has it as an error of its own
                if self.levels and self.levels[-1].failed:
                    raise
                if thing.state == "persistent":
                    self.mark_deleted(thing)
        self.autoflushes()
        self.send()
        row = self.view().get(number)
        if row is None:
            return None
        assert real is not None, f"row {number} was not found"
        self.see(row, real)
        return real

    def read(self, thing: Thing, name: str) -> Any:
        if name not in thing.values:
            if thing.state == "detached":
                raise Fails(DetachedInstanceError)
            self.load(thing)
        return thing.values[name]

    def change(self, thing: Thing, name: str, value: Any) -> None:
        thing.old.setdefault(name, thing.values.get(name, ABSENT))
        thing.values[name] = value
        thing.modified = True

    def add(self, thing: Thing) -> None:
        if thing.state == "transient":
            thing.state = "pending"
            # SQLAlchemy inserts in the order of add().
            self.things.remove(thing)
            self.things.append(thing)
        elif thing.state in ("detached", "deleted"):
            other = self.identities.get(thing.id)
            if thing.gone or (other is not None and other is not thing):
                raise Fails(exc.InvalidRequestError)
            thing.state = "persistent"
            self.identities[thing.id] = thing
        thing.waits = False

    def delete(self, thing: Thing) -> None:
        if thing.state != "persistent":
            raise Fails(exc.InvalidRequestError)
        thing.waits = True

    def expunge(self, thing: Thing) -> None:
        if thing.state == "pending":
            thing.state = "transient"
        else:
            thing.state = "detached"
            del self.identities[thing.id]
        thing.waits = False

    def refresh(self, thing: Thing) -> None:
        if thing.state != "persistent":
            raise Fails(exc.InvalidRequestError)
        thing.expire()
        self.autoflushes()
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(exc.InvalidRequestError)
        thing.overwrite(row)

    def synchronize(self, number: int, name: str, value: Any) -> None:
        """What an ORM UPDATE does to the object that it evaluates to."""
        thing = self.identities.get(number)
        if thing is None or thing.expired:
            return
        if name in thing.old:
            del thing.values[name], thing.old[name]
        elif name in thing.values:
            thing.values[name] = value
        if self.levels:
            self.levels[-1].dirty.append(thing)
