"""The two sessions, the model of each, and how a session and its model take the same step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from sqlalchemy import event, exc
from sqlalchemy.orm import object_session
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

from fictive_sqlalchemy import OptInConnection, OptInEngine, OptInSession
from tests.connections import Connections
from tests.state_machine.model.parts import Fails, Row, Store, Thing
from tests.state_machine.model.session import Model
from tests.state_machine.tables import SCHEMAS, Extra, Item

POOLS: dict[str, dict[str, Any]] = {
    "one": {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 3},
    "two": {"poolclass": QueuePool, "pool_size": 2, "max_overflow": 2},
    "five": {"poolclass": QueuePool, "pool_size": 5, "max_overflow": 0},
    "null": {"poolclass": NullPool},
    "static": {"poolclass": StaticPool},
    "thread": {"poolclass": SingletonThreadPool},
}
#: Pools that give every session of a thread the same connection: there is one session then.
SHARED = ("static", "thread")

#: For the result of an operation that the model has none for.
ANYTHING = object()


class Fixture(NamedTuple):
    driver: str
    control: Any
    engines: dict[str, tuple[OptInEngine, Connections]]
    second: tuple[OptInEngine, Connections]


class Interruption(Exception):
    """What a signal handler raises, between any two lines."""


@dataclass
class Stream:
    """A result that is read bit by bit, and the rows that it still has to bring."""

    read: Callable[[], list[Any]]
    close: Callable[[], object]
    rows: list[Row]
    depth: int
    """The levels there were when it was opened: inside, it ends with the innermost of them."""
    orm: bool
    buffered: bool
    """Whether all rows are with the client already."""
    doomed: bool = False
    """Whether its server process was killed."""


@event.listens_for(Item, "after_insert")
def call_on_commit(mapper: Any, connection: Any, item: Item) -> None:
    session: Any = object_session(item)
    if "inserted" in session.info:
        session.on_commit(partial(session.info["inserted"].append, item.id))


class SessionsAndModels(RuleBasedStateMachine):
    """Two sessions, the model of each, and how one of them and its model do a step."""

    begin_on_write = False

    def __init__(self, fixture: Fixture) -> None:
        super().__init__()
        self.driver, self.control, self.engines, self.second = fixture
        self.last = 0
        self.models: list[Model] = []
        self.sessions: list[OptInSession] = []
        self.blocks: list[list[Any]] = []
        self.streams: list[Stream | None] = []
        self.handed_out: list[OptInConnection | None] = []
        self.logged: list[list[Thing]] = []
        self.has_second_bind = False
        self.query("DELETE FROM extra")
        self.type_of_amount = "integer"
        for schema in SCHEMAS:
            self.query(f"DELETE FROM {schema}.item")
            self.query(f"ALTER TABLE {schema}.item ALTER amount TYPE {self.type_of_amount}")

    @initialize(
        pool=st.sampled_from(sorted(POOLS)),
        expire_on_commit=st.sampled_from((True, True, True, False)),
        autoflush=st.sampled_from((True, True, True, False)),
        tenants=st.booleans(),
        listens=st.booleans(),
        second=st.booleans(),
        rows=st.integers(0, 3),
    )
    def start(
        self,
        pool: str,
        expire_on_commit: bool,
        autoflush: bool,
        tenants: bool,
        listens: bool,
        second: bool,
        rows: int,
    ) -> None:
        self.pool = pool
        self.has_second_bind = second
        self.listens = listens
        self.engine, self.connections = self.engines[pool]
        self.connections.killed.clear()
        self.schemas = SCHEMAS if tenants else SCHEMAS[:1] * 2
        stores = {schema: Store() for schema in self.schemas}
        self.stores = [stores[schema] for schema in self.schemas]
        for who in range(1 if pool in SHARED else 2):
            self.models.append(
                Model(self.stores[who], expire_on_commit, autoflush, self.begin_on_write)
            )
            self.logged.append([])
            self.sessions.append(self.make_session(who))
            self.blocks.append([])
            self.streams.append(None)
            self.handed_out.append(None)
        for _ in range(rows):
            row = Row(self.next(), "abcdefg"[self.last - 1], 5)
            for schema, store in stores.items():
                self.query(f"INSERT INTO {schema}.item VALUES (%s, %s, %s)", *row)
                store.apply({row.id: row})

    def make_session(self, who: int) -> OptInSession:
        engine: Any = self.engine
        model = self.models[who]
        if len(set(self.schemas)) > 1:
            engine = engine.execution_options(schema_translate_map={None: self.schemas[who]})
        session = OptInSession(
            engine,
            binds={Extra: self.second[0]} if self.has_second_bind else None,
            expire_on_commit=model.expire_on_commit,
            autoflush=model.autoflush,
            begin_on_write=self.begin_on_write,
        )
        if self.listens:
            self.listen(who, session)
        return session

    def listen(self, who: int, session: OptInSession) -> None:
        """Listeners that use the session: one adds an object, one registers a callback."""
        model = self.models[who]
        session.info["inserted"] = list(model.called)

        @event.listens_for(session, "before_flush")
        def log(session: OptInSession, *_: Any) -> None:
            names = [each.name for each in session.new]
            if names and not any(name.startswith("log") for name in names):
                row = Row(self.next(), f"log {self.last}", 0)
                item = Item(**row._asdict())
                self.logged[who].append(Thing(item, row.id, "pending", row._asdict()))
                session.add(item)

        def logged() -> None:
            model.things += self.logged[who]
            self.logged[who].clear()

        model.before_flush = logged

    # Tools

    def query(self, sql: str, *parameters: Any) -> list[Any]:
        with self.control.cursor() as cursor:
            cursor.execute(sql, parameters)
            return list(cursor.fetchall()) if cursor.description else []

    def rows_in(self, schema: str) -> list[Any]:
        return self.query(f"SELECT id, name, amount FROM {schema}.item ORDER BY id")

    def wait_for_end(self, pids: list[int]) -> None:
        deadline = time.monotonic() + 20
        while pids and self.query("SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)", pids):
            assert time.monotonic() < deadline, "a server process does not end"

    def next(self) -> int:
        self.last += 1
        return self.last

    def pick(self, who: int) -> tuple[int, OptInSession, Model]:
        """One of the sessions; what it takes from the pool from now on is noted as its."""
        who %= len(self.sessions)
        self.connections.holder = who
        return who, self.sessions[who], self.models[who]

    def thing(self, model: Model, number: int, *states: str) -> Thing | None:
        """One of the objects in these states, or any."""
        things = [t for t in model.things if not states or t.state in states]
        return things[number % len(things)] if things else None

    def row(self, who: int, number: int) -> int:
        """The key of a row that the session sees, or that nobody has."""
        known = [*sorted(self.models[who % len(self.models)].view()), 99]
        return known[number % len(known)]

    # A step

    def both(
        self,
        who: int,
        real: Callable[[], Any],
        modelled: Callable[[Any], Any] | None = None,
        *,
        keeps: bool = False,
    ) -> Any:
        """Do it, then compare it with what the model says of it."""
        who, _, model = self.pick(who)
        in_transaction = model.inside or bool(model.waiting())
        value = error = None
        try:
            value = real()
        except Exception as raised:
            error = raised
        if in_transaction and self.is_of_migration(error):
            self.begin_anew(who)
            return None
        try:
            return self.compare_outcome(who, value, error, modelled, keeps)
        finally:
            self.end_streams(who)

    def is_of_migration(self, error: Exception | None) -> bool:
        """Tell whether a statement in a transaction was refused that psycopg had prepared before.

        Outside it never is.
        """
        return isinstance(error, exc.NotSupportedError) and "cached plan" in str(error)

    def begin_anew(self, who: int) -> None:
        """Go on with a closed session, of whose objects nobody knows any more."""
        session, model = self.sessions[who], self.models[who]
        self.drop_stream(who)
        while self.blocks[who]:
            with suppress(exc.InvalidRequestError):
                self.blocks[who].pop().__exit__(Interruption, Interruption(), None)
        session.close()
        self.handed_out[who] = None
        self.logged[who].clear()
        model.close()
        model.blocks.clear()
        model.things.clear()

    def compare_outcome(
        self,
        who: int,
        value: Any,
        error: Exception | None,
        modelled: Callable[[Any], Any] | None,
        keeps: bool,
    ) -> Any:
        model = self.models[who]
        self.wait_for_end(self.connections.closing)
        self.connections.closing.clear()
        disconnected = isinstance(error, exc.DBAPIError) and error.connection_invalidated
        model.talked = False
        try:
            expected = modelled(value) if modelled else value
        except Fails as fails:
            assert error is not None, f"no error, but {fails.errors} was expected"
            if not isinstance(error, fails.errors) or fails.disconnect != disconnected:
                raise AssertionError(f"{fails.errors} was expected") from error
            if model.talked:
                self.check_loan(who)
            return None
        except AssertionError as failure:  # the model had no result to look at
            raise failure from error
        if error is not None:
            raise AssertionError("no error was expected") from error
        assert expected is ANYTHING or value == expected
        if model.talked and not keeps:
            self.check_loan(who)
        return value

    def check_loan(self, who: int) -> None:
        """Outside, after a statement, nobody keeps a connection that others may wait for."""
        if self.models[who].inside or self.streams[who] is not None:
            return
        pool = self.engine.pool
        if isinstance(pool, QueuePool) and who in self.connections.holders.values():
            assert pool.checkedout() < pool.size()

    def drop_stream(self, who: int) -> None:
        stream, self.streams[who] = self.streams[who], None
        if stream is not None:
            stream.close()

    def end_streams(self, who: int) -> None:
        """Those that were opened inside end with what they were opened in."""
        stream, model = self.streams[who], self.models[who]
        if stream is not None:
            left = [level for level in model.levels[: stream.depth] if not level.failed]
            if len(left) < stream.depth:
                self.drop_stream(who)
