"""The rules by which Hypothesis chooses the steps.

There are few rules, with many kinds of steps each, so that Hypothesis comes to all of them.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.state_machine.machine.checks import Checks
from tests.state_machine.machine.connections import ConnectionSteps
from tests.state_machine.machine.interruptions import InterruptedSteps
from tests.state_machine.machine.objects import ObjectSteps
from tests.state_machine.machine.others import StepsOfOthers
from tests.state_machine.machine.queries import QuerySteps
from tests.state_machine.machine.streams import StreamSteps
from tests.state_machine.machine.writes import Change
from tests.state_machine.model.parts import ATTRIBUTES

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

number = st.integers(0, 9)
who = st.sampled_from((0, 0, 1))
name = st.sampled_from("abcdefg")
amount = st.sampled_from((0, 1, 2, 3, 4, 5, 6, 7, -1, -1))


def kinds(**weights: int) -> st.SearchStrategy[str]:
    return st.sampled_from([kind for kind, weight in weights.items() for _ in range(weight)])


class Sessions(
    ObjectSteps,
    QuerySteps,
    StreamSteps,
    ConnectionSteps,
    StepsOfOthers,
    InterruptedSteps,
    Checks,
):
    """Two sessions, the model of each, and the steps."""

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

    @rule(who=who, error=st.booleans())
    def leave_block(self, who: int, error: bool) -> None:
        self.leave(who, error)

    @rule(who=who, kind=kinds(flush=4, commit=1, rollback=1, swallow_error=1))
    def flush_or_end(self, who: int, kind: str) -> None:
        getattr(self, kind)(who)

    def swallow_error(self, who: int) -> None:
        """A block on both binds that catches an error, and goes on to its end as if all was well.

        The chance that single steps come to that is so small that they don't.
        """
        who, _, model = self.pick(who)
        if model.read_only:
            return
        self.begin(who, {}, "block")
        self.new(who, "swallowed", 0, self.has_second_bind)
        self.flush(who)
        self.fail(who)
        self.leave(who, error=False)

    @rule(
        who=who,
        number=number,
        name=name,
        at=st.integers(0, 400),
        kind=kinds(commit=2, flush=1, block=2, insert=2, update=1, read=1),
    )
    def interrupt(self, who: int, number: int, name: str, at: int, kind: str) -> None:
        """A call in which a signal handler raises at some line: the end of a request."""
        self.call_interrupted(who, number, name, at, kind)

    @rule(who=who, kind=kinds(give_back=5, close=1, reset=1, invalidate=1, kill=2))
    def do_with_session(self, who: int, kind: str) -> None:
        if kind == "kill":
            self.kill()
        elif kind == "give_back":
            self.give_back(who)
        else:
            self.close(who, kind)


class SessionsThatBeginOnWrite(Sessions):
    """The same with ``begin_on_write=True``."""

    begin_on_write = True
