"""Random sequences of what two sessions can do, compared with a model of the contract.

Hypothesis chooses the steps. Each step is done to a real session on a real PostgreSQL, then to the
model in ``tests/state_machine``, which says what must come of it: a result, an error, the rows
in the database, the state of each object. After each step the two are compared, as are the
connections with where they have to rest; after each run nothing may be left open.

``MODEL_EXAMPLES=5000 MODEL_SEED=7 pytest tests/core/test_state_machine.py`` runs more of it.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import StopTest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import event, exc
from sqlalchemy.orm import attributes, make_transient, object_session
from sqlalchemy.pool import NullPool, QueuePool, SingletonThreadPool, StaticPool

import fictive_sqlalchemy
from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInConnection,
    OptInEngine,
    OptInSession,
    create_engine,
)
from tests.connections import Connections
from tests.postgres import PostgresServer
from tests.state_machine.model.parts import (
    ATTRIBUTES,
    Fails,
    Level,
    RawCursorFailed,
    Row,
    Store,
    Thing,
)
from tests.state_machine.model.session import Model
from tests.state_machine.tables import COLUMNS, SCHEMAS, TABLE, Base, Extra, Item, SecondBase

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "150"))
STEPS = int(os.environ.get("MODEL_STEPS", "40"))
SEED = os.environ.get("MODEL_SEED")
SHRINKS = os.environ.get("MODEL_SHRINKS", "1") == "1"

#: Who waits longer than this for a lock gets an error, so that one thread can play all parts.
LOCK_TIMEOUT = 10


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

#: Pools on whose connections psycopg prepares each statement at its first execution.
PREPARING = ("five", "one", "thread")


@event.listens_for(Item, "after_insert")
def call_on_commit(mapper: Any, connection: Any, item: Item) -> None:
    session: Any = object_session(item)
    if "inserted" in session.info:
        session.on_commit(partial(session.info["inserted"].append, item.id))


class Interruption(Exception):
    """What a signal handler raises, between any two lines."""


def interrupted(call: Callable[[], object], at: int) -> None:
    """Make a call, in which an exception comes at one of the lines of the package."""
    package = str(Path(fictive_sqlalchemy.__file__).parent)
    lines = 0

    def trace(frame: FrameType, what: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        if what == "line":
            lines += 1
            if lines - 1 == at:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


class Fixture(NamedTuple):
    driver: str
    control: Any
    engines: dict[str, tuple[OptInEngine, Connections]]
    second: tuple[OptInEngine, Connections]


def kinds(**weights: int) -> st.SearchStrategy[str]:
    return st.sampled_from([kind for kind, weight in weights.items() for _ in range(weight)])


#: For the result of an operation that the model has none for.
ANYTHING = object()

#: What a transaction may begin with, and at the end what it may not.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"isolation_level": "READ COMMITTED"},
    {"isolation_level": "REPEATABLE READ"},
    {"isolation_level": "SERIALIZABLE", "read_only": False},
    {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
    {"read_only": True, "deferrable": False},
    {"deferrable": True},
)

#: A name, an amount, or none of both for the row to be removed.
Change = str | int | None

number = st.integers(0, 9)
who = st.sampled_from((0, 0, 1))
name = st.sampled_from("abcdefg")
amount = st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, -1, -1))


class Sessions(RuleBasedStateMachine):
    """Two sessions, the model of each, and the steps."""

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

    # The steps: a few rules with many kinds, so that Hypothesis comes to all of them

    @rule(who=who, name=name, amount=amount, second=kinds(first=2, second=1))
    def add_new_object(self, who: int, name: str, amount: int, second: str) -> None:
        self.new(who, name, amount, second == "second" and self.has_second_bind)

    @rule(who=who, number=number, change=st.one_of(name, amount))
    def change_object(self, who: int, number: int, change: str | int) -> None:
        self.change(who, number, change)

    @rule(who=who, number=number, kind=kinds(read=4, delete=3, refresh=2, expunge=1, expire=1))
    def do_with_object(self, who: int, number: int, kind: str) -> None:
        if kind == "read":
            self.read(who, number, ATTRIBUTES[number % 3])
        else:
            getattr(self, kind)(who, number)

    @rule(who=who, number=number, name=name, amount=amount, anew=st.booleans())
    def add_object(self, who: int, number: int, name: str, amount: int, anew: bool) -> None:
        self.add_again(who, number, name, amount, anew)

    @rule(who=who, number=number, kind=kinds(get=4, lock=2, fail=2, expire_all=1))
    def do_with_row(self, who: int, number: int, kind: str) -> None:
        if kind in ("get", "lock"):
            getattr(self, kind)(who, self.row(who, number))
        else:
            getattr(self, kind)(who)

    @rule(
        who=who,
        kind=kinds(objects=4, populate_existing=2, core=1, orm=1, text=1, driver=1, connection=1),
    )
    def select(self, who: int, kind: str) -> None:
        if kind in ("objects", "populate_existing"):
            self.select_objects(who, kind == "populate_existing")
        else:
            self.select_rows(who, kind)

    @rule(who=who, kind=kinds(orm=2, rows=1, unread=2, read=4, close=1))
    def stream(self, who: int, kind: str) -> None:
        if kind == "read":
            self.read_stream(who)
        elif kind == "close":
            self.close_stream(who)
        else:
            self.open_stream(who, orm=kind == "orm", buffered=kind == "unread")

    @rule(
        who=who,
        number=number,
        change=st.one_of(name, amount, st.none()),
        kind=kinds(core=2, text=1, connection=1, orm=3, query=1, unsynchronized=1, criteria=1),
    )
    def write_one(self, who: int, number: int, change: Change, kind: str) -> None:
        self.write_row(who, self.row(who, number), change, kind)

    @rule(
        who=who,
        rows=st.lists(st.tuples(name, amount), min_size=1, max_size=3),
        numbers=st.lists(number, min_size=2, max_size=3, unique=True),
        kind=kinds(core=2, orm=1, plain=1, returning=1, mappings=1, objects=1)
        | kinds(connection=1, driver=1)
        | st.just("update"),
    )
    def write_many(
        self, who: int, rows: list[tuple[str, int]], numbers: list[int], kind: str
    ) -> None:
        if kind == "update":
            self.update_many(who, numbers, rows[0][1])
        else:
            self.insert_many(who, rows, kind)

    @rule(
        number=number,
        change=st.one_of(name, amount, st.none()),
        rows=st.lists(st.tuples(name, amount), min_size=1, max_size=2),
        kind=kinds(new=1, change=3, begin=1, begin_error=1, connect=1, connect_begin=1, nested=1)
        | st.just("migrate"),
    )
    def let_others_write(
        self, number: int, change: Change, rows: list[tuple[str, int]], kind: str
    ) -> None:
        if kind == "migrate":
            self.migrate()
        elif kind in ("new", "change"):
            self.write_elsewhere(number, change, kind == "new")
        else:
            self.write_on_engine(rows, kind)

    @rule(
        who=who,
        number=number,
        amount=amount,
        kind=kinds(hand_out=2, read=1, write=2, raw_read=1, raw_write=3, raw_fail=1),
    )
    def use_connection(self, who: int, number: int, amount: int, kind: str) -> None:
        """What is done with a connection that the session has handed out before."""
        if kind == "hand_out":
            self.hand_out(who)
        elif kind in ("read", "write"):
            self.use_handed_out(who, self.row(who, number), amount, kind == "write")
        else:
            self.use_raw_cursor(who, self.row(who, number), amount, kind)

    @rule(who=who)
    def enter_block(self, who: int) -> None:
        self.begin(who, {}, "block")

    @rule(who=who, options=st.sampled_from(OPTIONS), kind=kinds(block=4, plain=1, nested=1))
    def begin_as_asked(self, who: int, options: dict[str, Any], kind: str) -> None:
        self.begin(who, options, kind)

    def begin(self, who: int, options: dict[str, Any], kind: str) -> None:
        """A transaction; inside, a savepoint, or what is refused."""
        if self.models[who % len(self.models)].inside and kind != "plain":
            self.begin_nested(who)
        else:
            self.begin_outermost(who, {} if kind == "nested" else options, kind)

    @rule(who=who, error=st.booleans())
    def leave_block(self, who: int, error: bool) -> None:
        self.leave(who, error)

    @rule(who=who, kind=kinds(flush=4, commit=1, rollback=1))
    def flush_or_end(self, who: int, kind: str) -> None:
        getattr(self, kind)(who)

    @rule(
        who=who,
        number=number,
        name=name,
        at=st.integers(0, 400),
        kind=kinds(commit=2, flush=1, block=2, insert=2, update=1, read=1),
    )
    def interrupt(self, who: int, number: int, name: str, at: int, kind: str) -> None:
        """A call in which a signal handler raises at some line: the end of a request."""
        who, session, model = self.pick(who)
        if model.inside or self.blocks[who] or self.streams[who] is not None:
            return
        if any(thing.is_extra for thing in model.waiting()):
            return  # between two COMMITs
        number = self.row(who, number)
        rows = [Row(self.next(), each, 1) for each in (name, f"{name}{name}")]
        dicts = [row._asdict() for row in rows]
        update = sa.update(TABLE).where(TABLE.c.id == number).values(amount=3)
        calls: dict[str, Callable[[], object]] = {
            "commit": session.commit,
            "flush": session.flush,
            "block": lambda: self.write_in_block(session, dicts),
            "insert": lambda: session.execute(sa.insert(Item), dicts),
            "update": lambda: session.execute(update),
            "read": lambda: session.scalars(sa.select(Item)).all(),
        }

        def write() -> None:
            for row in rows:
                model.write(row.id, row, new=True)

        def write_in_block() -> None:
            model.begin(block=True)
            try:
                model.autoflushes()
                model.execute(write)
            except Fails:
                model.leave(error=True)
                raise
            model.leave(error=False)

        def update_() -> None:
            self.update(model, partial(model.flush_and_execute, orm=False), number, 3)

        modelled: dict[str, Callable[[], object]] = {
            "commit": model.commit,
            "flush": model.flush,
            "block": write_in_block,
            "insert": lambda: model.flush_and_execute(write, orm=True),
            "update": update_,
            "read": model.autoflushes,
        }
        with suppress(Interruption, exc.SQLAlchemyError):
            interrupted(calls[kind], at)
        session.close()
        before = dict(model.store.rows)
        with suppress(Fails):
            modelled[kind]()
        self.begin_anew(who)
        self.wait_for_end(self.connections.closing)
        self.connections.closing.clear()
        if self.rows_in(self.schemas[who]) != sorted(model.store.rows.values()):
            model.store.rows = before  # and if it is not that either, the invariant says so
        if session.info:
            model.called = list(session.info["inserted"])
        self.sessions[who] = self.make_session(who)
        if len(TRANSACTION_CONNECTIONS):
            gc.collect()  # the exception may still keep a connection that is closed

    def write_in_block(self, session: OptInSession, dicts: list[dict[str, Any]]) -> None:
        with session.begin():
            session.execute(sa.insert(Item), dicts)

    @rule(who=who, kind=kinds(give_back=5, close=1, reset=1, invalidate=1, kill=2))
    def do_with_session(self, who: int, kind: str) -> None:
        if kind == "kill":
            self.kill()
        elif kind == "give_back":
            self.give_back(who)
        else:
            self.close(who, kind)

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

    # Steps: objects

    def new(self, who: int, name: str, amount: int, second: bool) -> None:
        who, session, model = self.pick(who)
        if not model.usable:
            return
        values = {"id": self.next(), "name": name, "amount": amount}
        thing = Thing((Extra if second else Item)(**values), self.last, "pending", values)
        model.things.append(thing)
        session.add(thing.real)

    def change(self, who: int, number: int, change: str | int) -> None:
        who, _, model = self.pick(who)
        thing = self.thing(model, number, "transient", "pending", "persistent", "detached")
        if thing is None or not model.usable:
            return
        attribute = "name" if isinstance(change, str) else "amount"
        setattr(thing.real, attribute, change)
        model.change(thing, attribute, change)

    def read(self, who: int, number: int, attribute: str) -> None:
        who, _, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "persistent", "detached")
        if thing is None:
            return
        self.both(
            who,
            lambda: getattr(thing.real, attribute),
            lambda _: model.read(thing, attribute),
        )

    def delete(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending", "transient")
        if thing is None or not model.usable:
            return
        self.both(who, lambda: session.delete(thing.real), lambda _: model.delete(thing))

    def add_again(self, who: int, number: int, name: str, amount: int, anew: bool) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number)
        if thing is None or not model.usable:
            return
        if thing.state == "transient" or (anew and thing.state == "detached"):
            make_transient(thing.real)
            thing.state, thing.gone, thing.id = "transient", False, self.next()
            for key, value in (("id", thing.id), ("name", name), ("amount", amount)):
                setattr(thing.real, key, value)
                model.change(thing, key, value)
        self.both(who, lambda: session.add(thing.real), lambda _: model.add(thing))

    def expunge(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending")
        if thing is None or not model.usable:
            return
        self.both(who, lambda: session.expunge(thing.real), lambda _: model.expunge(thing))

    def expire(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent")
        if thing is None:
            return
        session.expire(thing.real)
        thing.expire()

    def expire_all(self, who: int) -> None:
        who, session, model = self.pick(who)
        session.expire_all()
        for thing in model.identities.values():
            thing.expire()

    def refresh(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending", "detached")
        if thing is None:
            return
        self.both(who, lambda: session.refresh(thing.real), lambda _: model.refresh(thing))

    # Steps: reads

    def get(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, lambda: session.get(Item, number), lambda real: model.get(number, real))

    def select_objects(self, who: int, populate_existing: bool) -> None:
        who, session, model = self.pick(who)
        statement = sa.select(Item).order_by(Item.id)
        if populate_existing:
            statement = statement.execution_options(populate_existing=True)

        def modelled(reals: list[Item] | None) -> list[Any]:
            model.autoflushes()
            model.send()
            assert reals is not None
            rows = model.rows()
            for real, row in zip(reals, rows, strict=True):
                model.see(row, real, overwrite=populate_existing)
            return [model.identities[row.id].real for row in rows]

        self.both(who, lambda: session.scalars(statement).all(), modelled)

    def select_rows(self, who: int, kind: str) -> None:
        who, session, model = self.pick(who)
        text = f"SELECT id, name, amount FROM {self.schemas[who]}.item ORDER BY id"

        def real() -> list[tuple[Any, ...]]:
            if kind == "core":
                result = session.execute(sa.select(*COLUMNS).order_by(TABLE.c.id))
            elif kind == "orm":
                columns = (Item.id, Item.name, Item.amount)
                result = session.execute(sa.select(*columns).order_by(Item.id))
            elif kind == "text":
                result = session.execute(sa.text(text))
            elif kind == "driver":
                result = session.connection().exec_driver_sql(text)
            else:
                result = session.connection().execute(sa.text(text))
            return [tuple(row) for row in result]

        def modelled(_: Any) -> list[Row]:
            if kind in ("driver", "connection"):
                model.connection()
            else:
                model.autoflushes(orm=kind == "orm")
            model.send()
            return model.rows()

        self.both(who, real, modelled)

    def lock(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        statement = (
            sa.select(Item)
            .where(Item.id == number)
            .with_for_update()
            .execution_options(populate_existing=True)
        )

        def modelled(real: Item | None) -> Item | None:
            if not model.inside and not model.begins_on_write:
                raise Fails(exc.InvalidRequestError)
            model.autoflushes()
            model.begin_implicitly()
            model.send()
            try:
                if model.read_only:
                    raise Fails(exc.DBAPIError)
                row = model.view().get(number)
                if row is None:
                    return None
                if not model.store.is_free(number, model=model):
                    raise Fails(exc.OperationalError)
                model.check_snapshot(number)
            except Fails:
                model.abort()
                raise
            model.levels[-1].locks.add(number)
            assert real is not None
            model.see(row, real, overwrite=True)
            return real

        self.both(who, lambda: session.scalars(statement).one_or_none(), modelled)

    def fail(self, who: int) -> None:
        """A statement that the database refuses, for a reason of its own."""
        who, session, model = self.pick(who)

        def modelled(_: Any) -> None:
            model.autoflushes(orm=False)
            model.send()
            if model.inside:
                model.abort()
            raise Fails(exc.DataError)

        self.both(who, lambda: session.execute(sa.text("SELECT 1/0")), modelled)

    # Steps: streams

    def open_stream(self, who: int, orm: bool, buffered: bool) -> None:
        """A result of which not a row is read yet; a buffered one has no cursor on the server."""
        who, session, model = self.pick(who)
        if self.streams[who] is not None:
            return
        # A cursor on the server is gone with its savepoint, and closing it then is an error that
        # aborts the transaction: SQLAlchemy's, as ever.
        buffered = buffered or len(model.levels) > 1
        orm = orm and not buffered  # the first fetch would make objects of all rows
        columns: Any = (Item,) if orm else COLUMNS
        statement = sa.select(*columns).order_by(TABLE.c.id)
        if not buffered:
            statement = statement.execution_options(yield_per=2)

        def real() -> Stream:
            result = session.execute(statement)
            read: Callable[[], Any] = lambda: result.fetchmany(2)  # noqa: E731
            return Stream(read, result.close, [], len(model.levels), orm, buffered)

        def modelled(_: Any) -> object:
            model.autoflushes(orm=orm)
            model.send()
            return ANYTHING

        stream = self.both(who, real, modelled, keeps=not buffered)
        if stream is not None:
            stream.rows = model.rows()
            self.streams[who] = stream

    def read_stream(self, who: int) -> None:
        who, _, model = self.pick(who)
        stream = self.streams[who]
        if stream is None:
            return
        try:
            got = stream.read()
        except exc.DBAPIError as error:
            # Not asked for in the model: what is buffered comes even so.
            if not stream.doomed and not model.aborted:
                raise
            if error.connection_invalidated and model.connected:
                model.dead = model.noticed = True
            self.drop_stream(who)
            return
        want, stream.rows = stream.rows[:2], stream.rows[2:]
        assert len(got) == len(want)
        for result, row in zip(got, want, strict=True):
            if stream.orm:
                model.see(row, result[0])
            else:
                assert tuple(result) == row
        if not want:
            self.streams[who] = None
            if not stream.buffered:
                self.check_loan(who)

    def close_stream(self, who: int) -> None:
        who, *_ = self.pick(who)
        self.drop_stream(who)

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

    # Steps: writes past the objects

    def write_row(self, who: int, number: int, change: Change, kind: str) -> None:
        """One UPDATE, or a DELETE."""
        who, session, model = self.pick(who)
        orm = kind in ("orm", "unsynchronized", "query")
        entity: Any = Item if orm else TABLE
        identity = entity.id if orm else entity.c.id
        criteria: Any = identity == number
        if kind == "criteria":  # a statement of the core whose criteria are of the ORM
            criteria = identity.in_(sa.select(Item.id).where(Item.id == number))
        attribute = "name" if isinstance(change, str) else "amount"
        table = f"{self.schemas[who]}.item"
        statement: Any
        if kind == "text" and change is not None:
            statement = sa.text(f"UPDATE {table} SET {attribute} = :change WHERE id = :id")
        elif kind == "text":
            statement = sa.text(f"DELETE FROM {table} WHERE id = :id")
        elif change is None:
            statement = sa.delete(entity).where(criteria)
        else:
            statement = sa.update(entity).where(criteria).values({attribute: change})
        if kind == "unsynchronized":
            statement = statement.execution_options(synchronize_session=False)
        parameters = {"id": number, "change": change} if kind == "text" else None

        def real() -> int:
            if kind == "query":
                query = session.query(Item).filter(criteria)
                return query.delete() if change is None else query.update({attribute: change})
            on: Any = session.connection() if kind == "connection" else session
            result = on.execute(statement, parameters)
            count: int = result.rowcount
            return count

        def modelled(_: Any) -> int:
            count = 0

            def writes() -> None:
                nonlocal count
                row = model.view().get(number)
                if row is None:
                    return
                count += model.write(number, row.changed(change))

            if kind == "connection":
                model.connection()
                model.execute(writes)
            else:
                orm = kind not in ("core", "text")
                model.flush_and_execute(writes, orm=orm, text=kind == "text")
            if kind in ("orm", "query"):
                thing = model.identities.get(number)
                if change is not None:
                    model.synchronize(number, attribute, change)
                elif thing is not None and not thing.expired:
                    model.mark_deleted(thing)
            return count

        self.both(who, real, modelled)

    def insert_many(self, who: int, given: list[tuple[str, int]], kind: str) -> None:
        """Several rows in one call: all of them or none."""
        who, session, model = self.pick(who)
        if kind == "plain":
            given = given[:1]
        rows = [Row(self.next(), *row) for row in given]
        dicts = [row._asdict() for row in rows]

        def real() -> Any:
            if kind == "mappings":
                return session.bulk_insert_mappings(sa.inspect(Item), dicts)
            if kind == "objects":
                return session.bulk_save_objects([Item(**values) for values in dicts])
            if kind == "returning":
                return sorted(session.scalars(sa.insert(Item).returning(Item.id), dicts).all())
            if kind == "driver":
                placeholders = "%(id)s, %(name)s, %(amount)s"
                session.connection().exec_driver_sql(
                    f"INSERT INTO {self.schemas[who]}.item VALUES ({placeholders})", dicts
                )
                return None
            if kind == "plain":  # a dictionary, and no list of them
                session.execute(sa.insert(Item), dicts[0])
                return None
            on: Any = session.connection() if kind == "connection" else session
            on.execute(sa.insert(Item if kind == "orm" else TABLE), dicts)
            return None

        def writes() -> None:
            for row in rows:
                model.write(row.id, row, new=True)

        def modelled(_: Any) -> Any:
            if kind in ("mappings", "objects"):
                model.bulk(writes)
            elif kind not in ("driver", "connection"):
                model.flush_and_execute(writes, orm=kind != "core")
            else:
                model.connection()
                model.execute(writes, text=kind == "driver")
            return [row.id for row in rows] if kind == "returning" else None

        self.both(who, real, modelled)

    def update_many(self, who: int, numbers: list[int], amount: int) -> None:
        """Several UPDATEs by key in one call, the last with an amount that may be refused."""
        who, session, model = self.pick(who)
        known = sorted(model.view())
        chosen = sorted({known[number % len(known)] for number in numbers}) if known else []
        if len(chosen) < 2:
            return
        dicts: list[dict[str, Any]] = [{"id": number, "amount": 8} for number in chosen]
        dicts[-1]["amount"] = amount

        def writes() -> None:
            for values in dicts:
                row = model.view()[values["id"]]
                model.write(values["id"], row._replace(amount=values["amount"]))

        def modelled(_: Any) -> None:
            model.bulk(writes)

        self.both(who, lambda: session.bulk_update_mappings(sa.inspect(Item), dicts), modelled)

    # Steps: a connection that was handed out

    def hand_out(self, who: int) -> None:
        who, session, model = self.pick(who)

        def modelled(connection: Any) -> Any:
            model.connection()
            return connection

        connection = self.both(who, session.connection, modelled)
        if connection is not None:
            self.handed_out[who] = connection

    def connection(self, who: int) -> OptInConnection | None:
        """The connection that the session has handed out, if it can still be used."""
        model, connection = self.models[who], self.handed_out[who]
        if connection is None or connection.closed or model.spent:
            return None
        # After a flush has failed in a savepoint, it sends in what is around the savepoint.
        return connection if model.usable or len(model.levels) == 1 else None

    def use_handed_out(self, who: int, number: int, amount: int, writes: bool) -> None:
        who, _, model = self.pick(who)
        connection = self.connection(who)
        if connection is None:
            return
        if not writes:
            select = sa.select(*COLUMNS).order_by(TABLE.c.id)

            def modelled(_: Any) -> list[Row]:
                model.send()
                return model.rows()

            self.both(who, lambda: [tuple(row) for row in connection.execute(select)], modelled)
            return
        update = sa.update(TABLE).where(TABLE.c.id == number).values(amount=amount)
        self.both(
            who,
            lambda: connection.execute(update).rowcount,
            lambda _: self.update(model, model.execute, number, amount),
        )

    def use_raw_cursor(self, who: int, number: int, amount: int, kind: str) -> None:
        """A cursor of the driver, as pandas and psycopg's COPY use it."""
        who, _, model = self.pick(who)
        connection = self.connection(who)
        if connection is None:
            return
        if not model.inside and self.connections.killed:
            return  # SQLAlchemy does not see that the connection is lost
        table = f"{self.schemas[who]}.item"
        sql, parameters = {
            "raw_read": (f"SELECT id, name, amount FROM {table} ORDER BY id", ()),
            "raw_write": (f"UPDATE {table} SET amount = %s WHERE id = %s", (amount, number)),
            "raw_fail": ("SELECT 1/0", ()),
        }[kind]

        def real() -> Any:
            cursor: Any = None
            dbapi_connection = connection.connection
            try:
                cursor = dbapi_connection.cursor()
                cursor.execute(sql, parameters)
                return cursor.rowcount if kind == "raw_write" else cursor.fetchall()
            except Exception as error:
                raise RawCursorFailed from error
            finally:
                with suppress(Exception):
                    cursor.close()
                # The session keeps a connection of whose cursors it cannot know. Here none is left:
                # one thread plays all parts, so that the next part would wait for ever.
                connection.is_seen = False

        def modelled(_: Any) -> Any:
            if kind == "raw_write":
                return self.update(model, model.execute_raw, number, amount)
            model.send_raw()
            if kind == "raw_read":
                return model.rows()
            if model.inside:
                model.abort()
            raise Fails(RawCursorFailed)

        self.both(who, real, modelled)

    def update(
        self, model: Model, execute: Callable[[Callable[[], Any]], Any], number: int, amount: int
    ) -> int:
        count = 0

        def writes() -> None:
            nonlocal count
            row = model.view().get(number)
            if row is not None:
                count += model.write(number, row.changed(amount))

        execute(writes)
        return count

    def write_elsewhere(self, number: int, change: Change, new: bool) -> None:
        """Another program writes, where it need not wait."""
        known = sorted(self.stores[0].rows)
        elsewhere = Model(self.stores[0], True, True)
        elsewhere.levels = [Level()]
        if new:
            row = Row(self.next(), change if isinstance(change, str) else "z", 1)
        elif known:
            row = self.stores[0].rows[known[number % len(known)]]
        else:
            return
        after = row if new else row.changed(change)
        try:
            elsewhere.write(row.id, after, new=new)
        except Fails:
            return
        if after is not None and new:
            self.query("INSERT INTO public.item VALUES (%s, %s, %s)", *after)
        elif after is None:
            self.query("DELETE FROM public.item WHERE id = %s", row.id)
        else:
            _, *values = after
            self.query(
                "UPDATE public.item SET name = %s, amount = %s WHERE id = %s", *values, row.id
            )
        self.stores[0].apply(elsewhere.levels[0].rows)

    def write_on_engine(self, given: list[tuple[str, int]], how: str) -> None:
        """The engine's own connections, without a session."""
        if self.pool in SHARED:
            return
        self.connections.holder = None
        rows = [Row(self.next(), *row) for row in given]
        dicts = [row._asdict() for row in rows]
        model = Model(self.stores[0], True, True)

        class Stop(Exception):
            pass

        def real() -> None:
            if how.startswith("begin"):
                with self.engine.begin() as connection:
                    for values in dicts:
                        connection.execute(sa.insert(TABLE), values)
                    if how == "begin_error":
                        raise Stop
                return
            with self.engine.connect() as connection:
                if how == "connect":
                    for values in dicts:
                        connection.execute(sa.insert(TABLE), values)
                else:
                    with connection.begin_nested() if how == "nested" else connection.begin():
                        for values in dicts:
                            connection.execute(sa.insert(TABLE), values)

        error: Exception | None = None
        try:
            real()
        except Stop as raised:
            error = raised
        except exc.DBAPIError as raised:
            error = raised
            if raised.connection_invalidated:
                assert self.connections.killed
                return
        try:
            model.levels = [Level()]
            for row in rows:
                model.write(row.id, row, new=True)
                if how == "connect":
                    self.stores[0].apply(model.levels[0].rows)
                    model.levels = [Level()]
            if how == "begin_error":
                assert isinstance(error, Stop)
                return
        except Fails as fails:
            assert isinstance(error, fails.errors)
            return
        assert error is None
        self.stores[0].apply(model.levels[0].rows)

    def migrate(self) -> None:
        """Another program changes the type of a column, where it need not wait."""
        streams = [stream for stream in self.streams if stream is not None]
        if any(model.sent for model in self.models) or streams:
            return
        self.type_of_amount = "bigint" if self.type_of_amount == "integer" else "integer"
        for schema in SCHEMAS:
            self.query(f"ALTER TABLE {schema}.item ALTER amount TYPE {self.type_of_amount}")

    # Steps: the unit of work and transactions

    def flush(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.flush, lambda _: model.flush())

    def commit(self, who: int) -> None:
        who, session, model = self.pick(who)
        if len(model.levels) > 1 or (model.inside and not model.usable):
            return
        # As SQLAlchemy asks for, where the commit() is not refused.
        must_roll_back = model.begins_on_write or (model.inside and not model.blocks)
        failed: list[bool] = []

        def modelled(_: Any) -> None:
            try:
                model.commit()
            except Fails:
                failed.append(True)
                raise

        self.both(who, session.commit, modelled)
        if must_roll_back and failed:
            self.both(who, session.rollback, lambda _: model.rollback())

    def rollback(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.rollback, lambda _: model.rollback())

    def begin_outermost(self, who: int, options: dict[str, Any], kind: str) -> None:
        who, session, model = self.pick(who)
        level = options.get("isolation_level")
        if level == "SERIALIZABLE" and any(each.serializable for each in self.models):
            return  # two of them may fail where the model does not see why

        def modelled(_: Any) -> object:
            refused = options.get("deferrable") and level != "SERIALIZABLE"
            if model.inside or model.spent:
                raise Fails(exc.InvalidRequestError, exc.ArgumentError)
            if refused:
                raise Fails(exc.ArgumentError)
            if kind == "nested" and model.begins_on_write:
                model.begin_nested()
                return ANYTHING
            if kind == "nested":
                model.flush()
            model.begin(level=level, read_only=options.get("read_only"), block=kind != "plain")
            return ANYTHING

        begin = session.begin_nested if kind == "nested" else session.begin
        transaction = self.both(who, lambda: begin(**options), modelled)
        if transaction is not None and kind != "plain":
            self.blocks[who].append(transaction)
            transaction.__enter__()

    def begin_nested(self, who: int) -> None:
        who, session, model = self.pick(who)
        if not model.usable or len(model.levels) > 3:
            return

        def modelled(_: Any) -> object:
            model.begin_nested()
            return ANYTHING

        savepoint = self.both(who, session.begin_nested, modelled)
        if savepoint is not None:
            self.blocks[who].append(savepoint)
            savepoint.__enter__()

    def leave(self, who: int, error: bool) -> None:
        """Leave the innermost `with` block, by its end or by an exception."""
        who, _, model = self.pick(who)
        if not self.blocks[who]:
            return
        block = self.blocks[who].pop()

        def real() -> None:
            if not error:
                block.__exit__(None, None, None)
                return
            raised = ValueError("out of the block")
            assert not block.__exit__(ValueError, raised, None)

        self.both(who, real, lambda _: model.leave(error=error))

    # Steps: the session and its connections

    def close(self, who: int, how: str) -> None:
        who, session, model = self.pick(who)
        self.drop_stream(who)
        self.handed_out[who] = None
        self.both(who, getattr(session, how), lambda _: model.close())

    def give_back(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.give_back)
        if not model.connected and self.streams[who] is None:
            assert who not in self.connections.holders.values()

    def kill(self) -> None:
        """The server ends every connection there is, as it does when it is shut down."""
        pids = [each.info.backend_pid for each in self.connections.living()]
        if not pids:
            return
        self.connections.killed.update(pids)
        self.query("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", pids)
        self.wait_for_end(pids)
        for model, stream in zip(self.models, self.streams, strict=True):
            if stream is not None:
                stream.doomed = True
            if model.connected:
                model.dead = True
                for level in model.levels:
                    level.forget_rows()

    # What holds after each step

    @invariant()
    def all_is_as_modelled(self) -> None:
        if self.sessions:
            self.check_database()
            self.check_objects()
            self.check_connections()

    def check_database(self) -> None:
        for schema, store in zip(self.schemas, self.stores, strict=True):
            rows = self.rows_in(schema)
            known = sorted(store.rows.values())
            assert rows == known, f"{rows} in the database, {known} expected"
        rows = self.query("SELECT id, name, amount FROM extra ORDER BY id")
        known = sorted({row for store in self.stores for row in store.extras.values()})
        assert rows == known, f"{rows} in the second database, {known} expected"

    def check_objects(self) -> None:
        for session, model in zip(self.sessions, self.models, strict=True):
            for thing in model.things:
                self.compare(session, thing)
            assert len(session.new) == sum(t.state == "pending" for t in model.things)
            assert len(session.identity_map) == len(model.identities)
            assert session.info.get("inserted", model.called) == model.called
            assert session.in_transaction() == model.inside
            assert (session.get_transaction() is not None) == model.inside

    def compare(self, session: OptInSession, thing: Thing) -> None:
        state: Any = sa.inspect(thing.real)
        assert getattr(state, thing.state), f"{thing} is not {thing.state}"
        values = attributes.instance_dict(thing.real)
        assert {name: values[name] for name in ATTRIBUTES if name in values} == thing.values
        assert (thing.real in session.new) == (thing.state == "pending")
        assert (thing.real in session.deleted) == thing.waits, thing
        if thing.state == "persistent":
            assert (thing.real in session.dirty) == (thing.modified and not thing.waits)
            assert state.expired == thing.expired

    def check_connections(self) -> None:
        assert not self.connections.surprises
        known = [each for each in self.connections.alive.values() if not each.closed]
        statuses = [self.connections.status(each) for each in known]
        modes = [each.autocommit for each in known]
        # A driver may know that a connection is dead before SQLAlchemy does.
        sure = [model for model in self.models if not model.dead]
        assert (
            sum(model.in_database for model in sure)
            <= len([status for status in statuses if status])
            <= sum(model.in_database for model in self.models)
        )
        assert (
            sum(model.out_of_autocommit for model in sure)
            <= modes.count(False)
            <= sum(model.out_of_autocommit for model in self.models)
        )
        open_transactions = [model for model in self.models if model.connected]
        at_most = len(open_transactions) + sum(model.inside for model in self.models)
        assert len(TRANSACTION_CONNECTIONS) <= at_most
        if not any(model.inside for model in self.models):
            self.second[1].check_rest()
        assert len(TRANSACTION_CONNECTIONS) >= sum(model.in_database for model in self.models)

    def teardown(self) -> None:
        if not self.sessions:
            return
        if not SHRINKS and sys.exc_info()[0] not in (None, StopTest):
            traceback.print_exc()  # Hypothesis says nothing of what does not fail again
        try:
            self.leave_everything()
            self.check_end()
        finally:
            for session in self.sessions:
                with suppress(Exception):
                    session.invalidate()
            self.engine.dispose()
            self.wait_for_end(self.connections.closing)
            self.connections.closing.clear()
            self.connections.alive.clear()
            self.connections.holders.clear()

    def leave_everything(self) -> None:
        for who, session in enumerate(self.sessions):
            while self.blocks[who]:
                self.leave(who=who, error=True)
            self.drop_stream(who)
            if self.models[who].inside:
                self.rollback(who=who)
            session.close()

    def check_end(self) -> None:
        assert len(TRANSACTION_CONNECTIONS) == 0
        assert not self.connections.holders
        self.connections.check_rest()
        self.second[1].check_rest()
        assert not self.query(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%%'"
        )


def _control(url: str) -> Any:
    """A plain connection of the driver."""
    plain = sa.make_url(url)
    driver = importlib.import_module(plain.get_driver_name())
    connection = driver.connect(
        plain.set(drivername="postgresql").render_as_string(hide_password=False),
        options=f"-c lock_timeout={LOCK_TIMEOUT}",
    )
    connection.autocommit = True
    if hasattr(connection, "prepare_threshold"):
        connection.prepare_threshold = None  # a migration would change what it has prepared
    return connection


@pytest.fixture
def machine(url: str, driver: str, server: PostgresServer) -> Iterator[Fixture]:
    engines: dict[str, tuple[OptInEngine, Connections]] = {}
    for pool, options in POOLS.items():
        arguments: dict[str, Any] = {"options": f"-c lock_timeout={LOCK_TIMEOUT}"}
        if driver == "psycopg" and pool in PREPARING:
            arguments["prepare_threshold"] = 0
        engine = create_engine(url, **options, connect_args=arguments)
        engines[pool] = (engine, Connections(engine, driver))
    control = _control(url)
    with control.cursor() as cursor:
        cursor.execute("CREATE SCHEMA acme")
    for schema in SCHEMAS:
        options_of_tenant = {"schema_translate_map": {None: schema}}
        Base.metadata.create_all(engines["null"][0].execution_options(**options_of_tenant))
    second = create_engine(url)
    connections = Connections(second, driver)
    SecondBase.metadata.create_all(second)
    yield Fixture(driver, control, engines, (second, connections))
    control.close()
    second.dispose()
    for engine, _ in engines.values():
        engine.dispose()
    gc.collect()  # while the filter above is in force


class SessionsThatBeginOnWrite(Sessions):
    """The same with ``begin_on_write=True``."""

    begin_on_write = True


def run(
    machine: type[Sessions], fixture: Fixture, *, examples: int = EXAMPLES, seed_: int | None = None
) -> None:
    """Run a state machine; the seed that it was run with repeats what fails.

    :param machine: One of the two classes above.
    :param fixture: What :func:`machine` yields.
    :param examples: How many sequences of steps.
    :param seed_: The seed; the same sequences each time if it is left out.
    """
    profile = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=seed_ is None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink) if SHRINKS else (Phase.generate,),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    make: Any = lambda: machine(fixture)  # noqa: E731
    if seed_ is not None:
        make = seed(seed_)(make)
    run_state_machine_as_test(make, settings=profile)


# An exception between the making of the socket that is looked at and its `with`: Python closes it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("class_", [Sessions, SessionsThatBeginOnWrite])
def test_random_sequences_do_what_the_contract_says(
    machine: Fixture, class_: type[Sessions]
) -> None:
    run(class_, machine, seed_=None if SEED is None else int(SEED))
