"""The model of a session: outside or inside, what takes it inside, and what is sent."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import exc

from tests.state_machine.model.parts import Fails, Level, RawCursorFailed, Row, Store, Thing


class ConnectionModel:
    """The state of a session, and what comes of a statement that is sent.

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
        self.closed_blocks = 0
        """In how many of these the session was closed, after something was done in them."""
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

    # What takes it inside

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
        for level in self.levels:
            level.used_second = True

    def abort(self) -> None:
        """A statement has failed: the server refuses all others until a rollback."""
        self.aborted = True
        self.levels[-1].fail()
