"""A connection is lost before the one statement, during it, or with the answer to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, CommitOutcomeUnknown, OptInSession
from tests.core.one_statement.models import Club
from tests.core.one_statement.ways import Way, atomic, block, commit, flush
from tests.library import Onlooker, sent
from tests.wire import Message, WireProxy

WAYS: dict[str, Way] = {
    "block": block,
    "atomic": atomic,
    "flush": flush,
    "commit": commit,
    "commit with begin_on_write": commit,
}

Where = Literal["before", "within", "after"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """The way in which the statement comes to be the whole transaction."""
    return str(request.param)


@pytest.fixture
def session(sessions: sessionmaker[OptInSession], way: str) -> Iterator[OptInSession]:
    """A session of that way, whose connection the drivers and SQLAlchemy know already."""
    with sessions(begin_on_write=way.endswith("begin_on_write")) as session:
        session.get(Club, 1)
        yield session


@pytest.fixture
def called(session: OptInSession) -> list[str]:
    """The functions that were called after the end, of those that each flush registers."""
    called: list[str] = []

    @event.listens_for(session, "after_transaction_create")
    def register(session: OptInSession, transaction: Any) -> None:
        if transaction.parent is not None:  # that of the flush
            session.on_commit(lambda: called.append("commit"))
            session.on_rollback(lambda: called.append("rollback"))

    return called


def cut(wire: WireProxy, word: str, where: Where) -> None:
    """Cut the connection at the message that runs the next statement with a word."""

    def decide(message: Message) -> Where | None:
        if message.is_statement and message.verb == word:
            wire.cut_where = None
            return where
        return None

    wire.cut_where = decide


def kill(onlooker: Onlooker, pid: int, wire: WireProxy) -> None:
    onlooker.kill(pid)
    while pid in wire.pids:  # until the client can know
        time.sleep(0.001)


@contextmanager
def locked(url: str, onlooker: Onlooker) -> Iterator[Callable[[int], threading.Thread]]:
    """Hold a lock on the clubs, for which every write waits.

    :returns: A context manager that gives a function: it starts a thread that kills a server
        process as soon as that waits for the lock.
    """

    def kill(pid: int) -> None:
        waits_for = "SELECT wait_event_type FROM pg_stat_activity WHERE pid = :pid"
        deadline = time.monotonic() + 30
        while onlooker.scalar(waits_for, pid=pid) != "Lock" and time.monotonic() < deadline:
            time.sleep(0.001)
        onlooker.kill(pid)

    def start(pid: int) -> threading.Thread:
        killer = threading.Thread(target=kill, args=(pid,))
        killer.start()
        return killer

    other = sa.create_engine(url)
    with other.begin() as holder:
        holder.execute(sa.text("LOCK TABLE club IN EXCLUSIVE MODE"))
        yield start
    other.dispose()


def names(onlooker: Onlooker) -> list[str]:
    return onlooker.column("SELECT name FROM club ORDER BY id")


def goes_on(session: OptInSession, onlooker: Onlooker) -> None:
    """Check that no transaction is open, and that the session stores what comes next."""
    if session.begins_on_write:
        session.rollback()  # as in SQLAlchemy's session
    assert not session.in_transaction()
    assert len(TRANSACTION_CONNECTIONS) == 0
    assert not session.new
    assert not session.dirty
    stored = names(onlooker)
    with session.begin():
        session.add(Club(name="after"))
    assert names(onlooker) == [*stored, "after"]
    assert sorted(session.scalars(sa.select(Club.name))) == sorted([*stored, "after"])


@pytest.mark.parametrize("where", ["before", "within", "after"])
class TestCutAtTheStatement:
    def test_an_insert_that_is_cut_off_says_that_the_outcome_is_unknown(
        self,
        session: OptInSession,
        called: list[str],
        wire: WireProxy,
        onlooker: Onlooker,
        way: str,
        where: Where,
    ) -> None:
        cut(wire, "INSERT", where)
        with (
            wire.record() as recording,
            pytest.raises(CommitOutcomeUnknown, match="may be stored or not") as raised,
        ):
            WAYS[way](session, lambda: session.add(Club(name="new")))
        assert raised.value.connection_invalidated
        assert sent(recording) == ["INSERT"]  # never twice
        assert called == []
        assert names(onlooker) == ["chess", "tennis", *(["new"] if where == "after" else [])]
        goes_on(session, onlooker)

    def test_an_update_that_is_cut_off_says_that_the_outcome_is_unknown(
        self,
        session: OptInSession,
        called: list[str],
        wire: WireProxy,
        onlooker: Onlooker,
        way: str,
        where: Where,
    ) -> None:
        club = session.get_one(Club, 1)
        cut(wire, "UPDATE", where)
        with (
            wire.record() as recording,
            pytest.raises(CommitOutcomeUnknown, match="may be stored or not"),
        ):
            WAYS[way](session, lambda: setattr(club, "name", "go"))
        assert sent(recording) == ["UPDATE"]
        assert called == []
        name = "go" if where == "after" else "chess"
        assert names(onlooker)[0] == name
        goes_on(session, onlooker)
        assert club.name == name  # read anew


def test_a_process_that_was_killed_while_idle_is_replaced_and_nothing_is_sent_twice(
    session: OptInSession,
    called: list[str],
    wire: WireProxy,
    onlooker: Onlooker,
    way: str,
) -> None:
    [pid] = wire.pids
    kill(onlooker, pid, wire)
    with wire.record() as recording:
        WAYS[way](session, lambda: session.add(Club(name="new")))
    assert recording.verbs.count("INSERT") == 1
    assert "BEGIN" not in recording.verbs
    assert pid not in wire.pids
    assert called == ["commit"]
    assert names(onlooker) == ["chess", "tennis", "new"]
    goes_on(session, onlooker)


def test_a_process_that_is_killed_inside_a_block_before_the_statement_is_replaced(
    session: OptInSession, called: list[str], wire: WireProxy, onlooker: Onlooker, way: str
) -> None:
    def change() -> None:
        [pid] = wire.pids
        kill(onlooker, pid, wire)
        session.add(Club(name="new"))

    with wire.record() as recording:
        WAYS[way](session, change)
    assert recording.verbs.count("INSERT") == 1
    assert called == ["commit"]
    assert names(onlooker) == ["chess", "tennis", "new"]
    goes_on(session, onlooker)


@pytest.mark.parametrize("verb", ["INSERT", "UPDATE"])
def test_a_process_that_is_killed_during_the_statement_leaves_the_outcome_unknown(
    session: OptInSession,
    called: list[str],
    wire: WireProxy,
    url: str,
    onlooker: Onlooker,
    way: str,
    verb: str,
) -> None:
    club = session.get_one(Club, 1)
    change: dict[str, Callable[[], object]] = {
        "INSERT": lambda: session.add(Club(name="new")),
        "UPDATE": lambda: setattr(club, "name", "go"),
    }
    [pid] = wire.pids
    with locked(url, onlooker) as kill_who_waits:
        killer = kill_who_waits(pid)
        with (
            wire.record() as recording,
            pytest.raises(CommitOutcomeUnknown, match="may be stored or not"),
        ):
            WAYS[way](session, change[verb])
        killer.join()
    assert sent(recording) == [verb]
    assert called == []
    assert names(onlooker) == ["chess", "tennis"]
    goes_on(session, onlooker)
