"""The same changes have the same outcome, with one statement alone and with BEGIN and COMMIT.

Hypothesis chooses the changes, and what begins and ends each transaction. The changes are made in
two schemas of one database. The engine of the second schema has a listener to ``begin``, so that
BEGIN and COMMIT are always sent there. After each transaction the two have to agree in the rows,
the results and errors, the states and values of the objects, and the events and functions that were
called. No transaction may send two writing statements outside BEGIN and COMMIT.

``ONE_STATEMENT_EXAMPLES=5000 ONE_STATEMENT_SEED=7 pytest`` with this file tries more examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.core.one_statement.models import (
    Base,
    Cat,
    Club,
    Counted,
    Dog,
    Key,
    Member,
    Node,
    Note,
    Plain,
    Room,
    Versioned,
    WritesFirst,
)
from tests.library import assert_at_rest, sent
from tests.wire import WireProxy

EXAMPLES = int(os.environ.get("ONE_STATEMENT_EXAMPLES", "150"))
SEED = os.environ.get("ONE_STATEMENT_SEED")

KINDS: list[type[Any]] = [
    *(Club, Club, Room, Room, Key, Key, Member, Node, Note),
    *(Plain, Cat, Dog, Versioned, Counted, WritesFirst),
]
NAMES = ["one", "two", "three", None]
EVENTS = ("after_commit", "after_rollback", "after_soft_rollback")
WAYS = ["block", "block", "atomic", "nested", "commit", "commit", "flush", "flush", "begin"]


class Change(NamedTuple):
    """One change to the objects of a session."""

    what: str
    which: int
    other: int
    kind: int
    name: str | None
    number: int


changes = st.builds(
    Change,
    st.sampled_from(
        [
            *("add", "add", "rename", "rename", "count", "lead", "lead", "append", "take"),
            *("delete", "expire", "read", "flush", "join", "rekey", "by SQL"),
        ]
    ),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, len(KINDS) - 1),
    st.sampled_from(NAMES),
    st.integers(-1, 2),
)
rounds = st.tuples(
    st.sampled_from(WAYS),
    st.lists(changes, max_size=2),
    st.lists(changes, min_size=1, max_size=3),
    st.booleans(),
)


class Side:
    """One of the two sessions, its objects by their numbers, and what it tells."""

    def __init__(self, session: OptInSession) -> None:
        self.session = session
        self.objects: list[Any] = []
        self.said: list[str] = []
        for name in EVENTS:
            event.listen(session, name, lambda *_, name=name: self.said.append(name))

    def do(self, way: str, before: list[Change], changes: list[Change], calls: bool) -> str:
        """Do the changes in a transaction, and return what came of it."""
        session = self.session
        around: Any = nullcontext()
        try:
            for change in before:
                self.change(change)
            if way in ("block", "atomic", "nested"):
                around = {"block": session.begin, "nested": session.begin_nested}.get(
                    way, session.atomic
                )()
            elif way == "begin":
                session.begin()
            with around:
                if calls and way not in ("commit", "flush"):
                    session.on_commit(lambda: self.said.append("on_commit"))
                    session.on_rollback(lambda: self.said.append("on_rollback"))
                for change in changes:
                    self.change(change)
            if way in ("commit", "begin"):
                session.commit()
            elif way == "flush":
                session.flush()
        except Exception as error:
            if way == "begin":
                session.rollback()
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return "done"

    def change(self, change: Change) -> None:
        session = self.session
        if change.what == "add":
            kind = KINDS[change.kind]
            instance = kind(name=change.name)
            if kind in (Club, Dog):
                setattr(instance, "size" if kind is Club else "rank", change.number)
            self.objects.append(instance)
            session.add(instance)
            return
        if change.what == "read":
            self.said.append(f"read {session.scalar(sa.select(sa.func.count(Club.id)))}")
            return
        if change.what == "flush":
            session.flush()
            return
        if not self.objects:
            return
        one = self.objects[change.which % len(self.objects)]
        other = self.objects[change.other % len(self.objects)]
        if change.what == "rename":
            one.name = change.name
        elif change.what == "count":
            setattr(one, "rank" if isinstance(one, Dog) else "size", change.number)
        elif change.what == "by SQL" and isinstance(one, Club):
            one.size = Club.size + change.number
        elif change.what == "rekey" and sa.inspect(one).persistent:
            one.id = 100 + change.number
        elif change.what == "lead":
            self.lead(one, other if change.number >= 0 else None)
        elif change.what == "append" and isinstance(one, Club):
            if isinstance(other, (Room, Key)):
                (one.rooms if isinstance(other, Room) else one.keys).append(other)  # type: ignore[arg-type]
            elif isinstance(other, Note):
                one.notes.add(other)
        elif change.what == "take" and isinstance(one, Club):
            for collection in (one.rooms, one.keys):
                if other in collection:
                    collection.remove(other)
        elif change.what == "join" and isinstance(one, Club) and isinstance(other, Member):
            one.members.add(other)
        elif change.what == "delete" and sa.inspect(one).persistent:
            session.delete(one)
        elif change.what == "expire" and sa.inspect(one).persistent:
            session.expire(one)

    def lead(self, one: Any, other: Any) -> None:
        if isinstance(one, (Room, Key)) and (other is None or isinstance(other, Club)):
            one.club = other
        elif isinstance(one, Node) and (other is None or isinstance(other, Node)):
            one.parent = other

    def state(self) -> list[Any]:
        """Return what is known of each object."""
        found: list[Any] = []
        for instance in self.objects:
            state: Any = sa.inspect(instance)
            held = {
                name: str(value) if isinstance(value, sa.ClauseElement) else value
                for name, value in state.dict.items()
                if name in state.mapper.column_attrs and name not in ("made_at", "changed_at")
            }
            flags = (
                state.transient,
                state.pending,
                state.persistent,
                state.deleted,
                state.detached,
            )
            found.append((type(instance).__name__, flags, state.modified, held))
        return found


class Pair(NamedTuple):
    """The two engines, and somebody who looks at their schemas."""

    engines: tuple[OptInEngine, OptInEngine]
    control: sa.Connection
    wire: WireProxy

    def rows(self, schema: str) -> dict[str, Any]:
        return {
            table: self.control.execute(
                sa.text(
                    f"SELECT to_jsonb(t) - 'made_at' - 'changed_at' FROM {schema}.{table} t"
                    " ORDER BY 1"
                )
            ).all()
            for table in tables(Base)
        }

    def empty(self) -> None:
        for schema in ("one", "two"):
            names = ", ".join(f"{schema}.{table}" for table in tables(Base))
            self.control.execute(sa.text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))


def tables(base: type[DeclarativeBase]) -> list[str]:
    return [table.name for table in base.metadata.sorted_tables]


@pytest.fixture
def pair(url: str, wire_url: str, wire: WireProxy) -> Iterator[Pair]:
    control = sa.create_engine(url, isolation_level="AUTOCOMMIT").connect()
    engines: list[OptInEngine] = []
    for schema in ("one", "two"):
        control.execute(sa.text(f"CREATE SCHEMA {schema}"))
        engine = create_engine(
            wire_url if schema == "one" else url,
            connect_args={"options": f"-c search_path={schema}"},
        )
        Base.metadata.create_all(engine)
        engines.append(engine)
    event.listen(engines[1], "begin", lambda _: None)  # so BEGIN and COMMIT are sent
    one, two = engines
    yield Pair((one, two), control, wire)
    for engine in engines:
        assert_at_rest(engine)
        engine.dispose()
    control.close()
    control.engine.dispose()


def transactions(way: str, before: list[Change], within: list[Change]) -> int:
    """Return how many transactions a round has at most."""
    outside = [*before, *within] if way in ("commit", "flush") else before
    # What waits before begin_nested() is stored before, and is no part of the block.
    return 1 + (way == "nested") + sum(change.what == "flush" for change in outside)


def writes_outside(verbs: list[str]) -> int:
    """Count the statements that write outside BEGIN and COMMIT."""
    count, inside = 0, False
    for verb in verbs:
        if verb == "BEGIN":
            inside = True
        elif verb in ("COMMIT", "ROLLBACK"):
            inside = False
        else:
            count += not inside and verb in ("INSERT", "UPDATE", "DELETE")
    return count


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("expire", [False, True])
def test_the_same_changes_come_to_the_same_alone_and_in_a_transaction(
    pair: Pair, expire: bool
) -> None:
    alone = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=SEED is None,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    @given(st.lists(rounds, min_size=1, max_size=5))
    def run(given_rounds: list[Any]) -> None:
        nonlocal alone
        pair.empty()
        sides = [Side(OptInSession(engine, expire_on_commit=expire)) for engine in pair.engines]
        one, two = sides
        try:
            for way, before, within, calls in given_rounds:
                with pair.wire.record() as recording:
                    came = one.do(way, before, within, calls)
                assert came == two.do(way, before, within, calls)
                assert one.said == two.said
                assert pair.rows("one") == pair.rows("two")
                assert one.state() == two.state()
                outside = writes_outside(sent(recording))
                assert outside <= transactions(way, before, within)
                alone += outside
        finally:
            for side in sides:
                side.session.close()

    if SEED is not None:
        seed(int(SEED))(run)()
    else:
        run()
    assert alone > EXAMPLES / 10
