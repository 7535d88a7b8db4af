"""``on_commit()`` and ``on_rollback()``: what is called, when, and how often."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from weakref import ref

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
)

from fictive_sqlalchemy import (
    CommitOutcomeUnknown,
    OptInEngine,
    OptInSession,
    create_engine,
    unit_of_work,
)
from fictive_sqlalchemy.testing import isolate
from tests.library import (
    Author,
    Note,
    NoteBase,
    Onlooker,
    Seat,
    Sessions,
    Undo,
    add,
    backend_pid,
    sent,
)
from tests.wire import Message, WireProxy


class Calls(list[str]):
    """What was called, and that it was called outside."""

    def __init__(self, session: OptInSession) -> None:
        super().__init__()
        self._session = session

    def note(self, name: str) -> None:
        assert not self._session.in_transaction()
        self.append(name)

    def watch(self, name: str) -> None:
        """Register one for each outcome."""
        self._session.on_commit(partial(self.note, f"{name} committed"))
        self._session.on_rollback(partial(self.note, f"{name} rolled back"))


@pytest.fixture
def calls(session: OptInSession) -> Calls:
    return Calls(session)


def fail(error: BaseException) -> None:
    raise error


# Each way to end a transaction that was begun.


def by_block(session: OptInSession) -> Any:
    return session.begin()


@contextmanager
def by_hand(session: OptInSession) -> Generator[None]:
    session.begin()
    try:
        yield
    except BaseException:
        session.rollback()
        raise
    session.commit()


@contextmanager
def by_transaction(session: OptInSession) -> Generator[None]:
    transaction = session.begin()
    try:
        yield
    except BaseException:
        transaction.rollback()
        raise
    transaction.commit()


@contextmanager
def that_allows_commit_inside(session: OptInSession) -> Generator[None]:
    """As SQLAlchemy does, and a session with ``begin_on_write=True``."""
    session.begins_on_write = True
    try:
        yield
    finally:
        session.begins_on_write = False


@contextmanager
def by_end_inside(session: OptInSession) -> Generator[None]:
    with that_allows_commit_inside(session), session.begin():
        try:
            yield
        except Undo:
            session.rollback()
        else:
            session.commit()


def by_atomic(session: OptInSession) -> Any:
    return session.atomic()


def by_unit(session: OptInSession) -> Any:
    return unit_of_work(lambda: session)


def by_begin_nested(session: OptInSession) -> Any:
    return session.begin_nested()


WAYS = [by_block, by_hand, by_transaction, by_end_inside, by_atomic, by_unit, by_begin_nested]


@pytest.mark.parametrize("way", WAYS)
class TestEachWay:
    def test_to_commit(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        wire: WireProxy,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with wire.record() as recording:
            with way(session):
                session.on_commit(lambda: calls.extend(onlooker.names()))
                calls.watch("first")
                add(session, "one")
                calls.watch("second")
                assert calls == []
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert calls == ["one", "first committed", "second committed"]

    def test_to_roll_back(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with suppress(Undo), way(session):
            calls.watch("first")
            add(session, "one")
            calls.watch("second")
            raise Undo
        assert calls == ["first rolled back", "second rolled back"]

    def test_without_a_statement(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with way(session):
            calls.watch("empty")
        with suppress(Undo), way(session):
            calls.watch("empty")
            raise Undo
        assert calls == ["empty committed", "empty rolled back"]

    def test_may_begin_another_and_register_more(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        way: Callable[[OptInSession], Any],
    ) -> None:
        def another() -> None:
            with way(session):
                add(session, "another")
                calls.watch("another")
            session.on_commit(partial(calls.note, "at once"))

        with way(session):
            add(session, "one")
            session.on_commit(another)
            session.on_commit(partial(calls.note, "last"))
        assert calls == ["another committed", "at once", "last"]
        assert onlooker.names() == ["another", "one"]

    def test_whose_commit_fails(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with pytest.raises(IntegrityError):
            with way(session):
                calls.watch("one")
                session.add_all([Seat(place=1), Seat(place=1)])
        session.rollback()  # which begin() and commit() by hand ask for
        assert calls == ["one rolled back"]

    def test_whose_function_raises(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        caplog: pytest.LogCaptureFixture,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with pytest.raises(Undo, match="first"), way(session):
            add(session, "one")
            session.on_commit(partial(fail, Undo("first")))
            calls.watch("between")
            session.on_commit(partial(fail, Undo("second")))
            calls.watch("last")
        assert calls == ["between committed", "last committed"]
        assert onlooker.names() == ["one"]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == "second"
        assert not session.in_transaction()
        with way(session):
            add(session, "two")
        assert onlooker.names() == ["one", "two"]

    def test_whose_function_is_interrupted(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        caplog: pytest.LogCaptureFixture,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with pytest.raises(KeyboardInterrupt), way(session):
            add(session, "one")
            calls.watch("first")
            session.on_commit(partial(fail, KeyboardInterrupt()))
            session.on_commit(partial(calls.note, "left out"))
        assert calls == ["first committed"]
        assert "left out" in caplog.text
        with way(session):
            add(session, "two")
            calls.watch("next")
        assert calls == ["first committed", "next committed"]
        assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize("way", [by_block, by_atomic, by_unit, by_begin_nested])
def test_an_error_that_ends_a_block_comes_first(
    session: OptInSession,
    calls: Calls,
    caplog: pytest.LogCaptureFixture,
    way: Callable[[OptInSession], Any],
) -> None:
    with pytest.raises(Undo, match="the block's"), way(session):
        session.on_rollback(partial(fail, Undo("first")))
        session.on_rollback(partial(fail, Undo("second")))
        calls.watch("last")
        raise Undo("the block's")
    assert calls == ["last rolled back"]
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == [
        "first",
        "second",
    ]


def test_an_error_after_a_commit_inside_comes_first(
    session: OptInSession, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    with that_allows_commit_inside(session):
        with pytest.raises(Undo, match="the block's"), session.begin():
            session.on_commit(partial(fail, Undo("logged")))
            calls.watch("one")
            session.commit()
            raise Undo("the block's")
    assert calls == ["one committed"]
    assert "logged" in caplog.text


class TestSavepoints:
    @pytest.mark.parametrize("way", [by_begin_nested, by_atomic, by_unit])
    def test_released_are_kept_and_rolled_back_are_dropped(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with session.begin() if way is not by_unit else by_unit(session):
            calls.watch("outer")
            with way(session):
                calls.watch("released")
                with pytest.raises(Undo), way(session):
                    calls.watch("undone")
                    with way(session):
                        calls.watch("released in undone")
                    raise Undo
            calls.watch("last")
            assert calls == []
        assert calls == [
            *("undone rolled back", "released in undone rolled back"),
            *("outer committed", "released committed", "last committed"),
        ]

    def test_released_in_what_is_rolled_back(self, session: OptInSession, calls: Calls) -> None:
        with pytest.raises(Undo), session.begin():
            calls.watch("outer")
            with session.begin_nested():
                calls.watch("released")
            with pytest.raises(IntegrityError), session.begin_nested():
                calls.watch("undone")
                add(session, "Ada")
            raise Undo
        assert calls == ["undone rolled back", "outer rolled back", "released rolled back"]

    def test_undone_by_set_rollback(self, session: OptInSession, calls: Calls) -> None:
        with session.atomic():
            with session.atomic():
                calls.watch("inner")
                session.set_rollback()
            calls.watch("outer")
        with session.atomic():
            calls.watch("all")
            session.set_rollback()
        assert calls == ["inner rolled back", "outer committed", "all rolled back"]

    def test_by_hand(self, session: OptInSession, calls: Calls) -> None:
        session.begin()
        savepoint = session.begin_nested()
        calls.watch("released")
        savepoint.commit()
        savepoint = session.begin_nested()
        calls.watch("undone")
        savepoint.rollback()
        session.begin_nested()
        calls.watch("open")
        session.commit()
        assert calls == ["undone rolled back", "released committed", "open committed"]

    def test_of_a_joined_atomic_are_of_the_block_around(
        self, session: OptInSession, calls: Calls
    ) -> None:
        with pytest.raises(PendingRollbackError), session.begin():
            calls.watch("outer")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                calls.watch("joined")
                raise Undo
        assert calls == ["outer rolled back", "joined rolled back"]


class TestOutside:
    def test_on_commit_is_called_at_once_and_on_rollback_never(
        self, session: OptInSession, calls: Calls, wire: WireProxy
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording:
            calls.watch("one")
            assert calls == ["one committed"]
        session.rollback()
        session.commit()
        session.close()
        assert calls == ["one committed"]
        assert recording.messages == []

    def test_its_error_is_the_callers(self, session: OptInSession) -> None:
        with pytest.raises(Undo):
            session.on_commit(partial(fail, Undo()))

    @pytest.mark.parametrize("how", ["flush", "commit"])
    def test_what_a_listener_registers_during_a_flush_or_commit(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        caplog: pytest.LogCaptureFixture,
        how: str,
    ) -> None:
        @event.listens_for(session, "before_flush")
        def register(*_: Any) -> None:
            session.on_commit(lambda: calls.extend(onlooker.names()))
            calls.watch("one")

        session.add(Author(name="one"))
        getattr(session, how)()
        assert calls == ["one", "one committed"]
        calls.clear()
        session.add(Author(name="Ada"))
        with pytest.raises(IntegrityError):
            getattr(session, how)()
        assert calls == ["one rolled back"]
        calls.clear()
        session.add_all([Seat(place=1), Seat(place=1)])
        event.listen(session, "before_flush", lambda *_: session.on_rollback(lambda: 1 // 0))
        with pytest.raises(IntegrityError):
            getattr(session, how)()
        assert calls == ["one rolled back"]
        assert "ZeroDivisionError" in caplog.text

    def test_what_a_listener_registers_during_a_bulk_call(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        @event.listens_for(session, "do_orm_execute")
        def register(*_: Any) -> None:
            session.on_commit(lambda: calls.extend(onlooker.names()))
            calls.watch("bulk")

        session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])
        assert calls == ["one", "two", "bulk committed"]
        calls.clear()
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author), [{"name": "three"}, {"name": "Ada"}])
        assert calls == ["bulk rolled back"]
        calls.clear()
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Seat), [{"place": 1}, {"place": 1}])
        assert calls == ["bulk rolled back"]

    def test_an_error_of_a_function_leaves_what_was_stored(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        @event.listens_for(session, "before_flush")
        def register(*_: Any) -> None:
            session.on_commit(partial(fail, Undo()))

        session.add(Author(name="one"))
        with pytest.raises(Undo):
            session.commit()
        session.add(Author(name="two"))
        with pytest.raises(Undo):
            session.flush()
        assert onlooker.names() == ["one", "two"]
        assert not session.in_transaction()


class TestListenersToTheEnd:
    def test_may_register(self, session: OptInSession, calls: Calls) -> None:
        event.listen(session, "after_commit", lambda _: calls.watch("after_commit"))
        with session.begin():
            calls.watch("one")
            with session.begin_nested():
                pass
        assert calls == ["one committed", *["after_commit committed"] * 2]

    def test_may_register_after_a_rollback(self, session: OptInSession, calls: Calls) -> None:
        event.listen(session, "after_rollback", lambda _: calls.watch("after_rollback"))
        with pytest.raises(Undo), session.begin():
            calls.watch("one")
            raise Undo
        assert calls == ["one rolled back", "after_rollback rolled back"]

    @pytest.mark.parametrize("how", ["commit", "flush", "begin", "atomic"])
    def test_that_raise_keep_nothing_from_being_called(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker, how: str
    ) -> None:
        def raise_(_: Any) -> None:
            raise Undo

        event.listen(session, "after_commit", raise_)
        event.listen(session, "before_flush", lambda *_: calls.watch("one"))
        session.add(Author(name="one"))
        with pytest.raises(Undo):
            if how in ("begin", "atomic"):
                with getattr(session, how)():
                    pass
            else:
                getattr(session, how)()
        assert calls == ["one committed"]
        assert onlooker.names() == ["one"]


class TestTheEndOfTheSession:
    @pytest.mark.parametrize("how", ["close", "reset", "invalidate"])
    def test_rolls_back(self, session: OptInSession, calls: Calls, how: str) -> None:
        session.begin()
        calls.watch("outer")
        session.begin_nested()
        calls.watch("inner")
        add(session, "one")
        getattr(session, how)()
        assert calls == ["inner rolled back", "outer rolled back"]
        session.close()
        assert calls == ["inner rolled back", "outer rolled back"]

    @pytest.mark.parametrize("how", ["close", "reset", "invalidate"])
    def test_in_a_block_is_told_after_the_block(
        self, session: OptInSession, calls: Calls, how: str
    ) -> None:
        with session.begin():
            calls.watch("one")
            getattr(session, how)()
            assert calls == []
        assert calls == ["one rolled back"]

    @pytest.mark.parametrize("how", ["close", "reset", "invalidate"])
    def test_only_logs_errors(
        self, session: OptInSession, calls: Calls, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        """It tidies up: who calls it, at the end of a context, goes on to tidy up."""
        session.begin()
        session.on_rollback(partial(fail, Undo("logged")))
        calls.watch("one")
        getattr(session, how)()
        assert calls == ["one rolled back"]
        assert "logged" in caplog.text

    def test_by_its_block(self, sessions: Sessions, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(Undo, match="the block's"), sessions() as session:
            session.begin()
            session.on_rollback(partial(fail, Undo("logged")))
            raise Undo("the block's")
        assert "logged" in caplog.text

    def test_by_the_transaction_itself(self, session: OptInSession, calls: Calls) -> None:
        transaction = session.begin()
        calls.watch("one")
        transaction.close()
        assert calls == ["one rolled back"]

    def test_when_it_is_collected_nothing_is_called_or_kept(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        called: list[str] = []

        class Function:
            def __call__(self) -> None:
                called.append("called")

        function = Function()
        session = sessions()
        session.begin()
        add(session, "lost")
        session.on_commit(function)
        session.on_rollback(function)
        gone = ref(session), ref(function)
        del session, function
        gc.collect()
        assert [one() for one in gone] == [None, None]
        assert called == []
        assert onlooker.names() == []


class TestInABlockWhoseTransactionHasEnded:
    @pytest.mark.parametrize("how", ["commit", "rollback", "close"])
    def test_registering_is_refused(self, session: OptInSession, calls: Calls, how: str) -> None:
        with that_allows_commit_inside(session), session.begin():
            calls.watch("before")
            getattr(session, how)()
            for register in (session.on_commit, session.on_rollback):
                with pytest.raises(InvalidRequestError, match="leave the block before"):
                    register(partial(calls.note, "after"))
        outcome = "committed" if how == "commit" else "rolled back"
        assert calls == [f"before {outcome}"]


class TestAFunctionThatLeavesATransactionOpen:
    def test_has_the_others_wait_for_its_end(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.on_commit(session.begin)
            calls.watch("waiting")
        assert calls == []
        add(session, "one")
        calls.watch("another")
        session.commit()
        assert calls == ["waiting committed", "another committed"]
        assert onlooker.names() == ["one"]


class TestALostConnection:
    def test_during_commit_calls_neither(
        self, session: OptInSession, calls: Calls, wire: WireProxy
    ) -> None:
        def cut(message: Message) -> None:
            if message.is_statement and message.verb == "COMMIT":
                wire.before_forward = None
                wire.cut_all()

        with pytest.raises(CommitOutcomeUnknown):
            with session.begin():
                calls.watch("unknown")
                with pytest.raises(Undo), session.begin_nested():
                    calls.watch("undone")
                    raise Undo
                add(session, "one")
                wire.before_forward = cut
        assert calls == ["undone rolled back"]
        with session.begin():
            calls.watch("next")
        assert calls == ["undone rolled back", "next committed"]

    @pytest.mark.parametrize("how", ["flush", "commit", "bulk"])
    def test_during_commit_of_one_call(
        self, session: OptInSession, calls: Calls, wire: WireProxy, how: str
    ) -> None:
        def cut(message: Message) -> None:
            if message.is_statement and message.verb == "COMMIT":
                wire.before_forward = None
                wire.cut_all()

        event.listen(session, "before_flush", lambda *_: calls.watch("unknown"))
        event.listen(session, "do_orm_execute", lambda *_: calls.watch("unknown"))
        wire.before_forward = cut
        with pytest.raises(CommitOutcomeUnknown):
            if how == "bulk":
                session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])
            else:
                session.add(Author(name="one"))
                getattr(session, how)()
        session.rollback()
        assert calls == []

    def test_before_commit_is_a_rollback(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError):
            with session.begin():
                calls.watch("one")
                add(session, "one")
                onlooker.kill(backend_pid(session.connection()))
        assert calls == ["one rolled back"]
        assert onlooker.names() == []

    def test_inside_is_a_rollback(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with pytest.raises(DBAPIError):
            with session.begin():
                calls.watch("one")
                add(session, "one")
                onlooker.kill(backend_pid(session.connection()))
                add(session, "two")
        assert calls == ["one rolled back"]


class TestBinds:
    @pytest.fixture
    def other(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        yield other
        other.dispose()

    def test_two_phase(self, engine: OptInEngine, other: OptInEngine, onlooker: Onlooker) -> None:
        if onlooker.scalar("SHOW max_prepared_transactions") == "0":
            pytest.skip("The server takes no prepared transactions.")
        with OptInSession(engine, binds={Note: other}, twophase=True) as session:
            calls = Calls(session)
            with session.begin():
                session.on_commit(lambda: calls.extend(onlooker.names()))
                calls.watch("one")
                session.add_all([Author(name="one"), Note(text="one")])
            assert calls == ["one", "one committed"]
            calls.clear()
            with pytest.raises(IntegrityError), session.begin():
                calls.watch("two")
                session.add_all([Author(name="Ada"), Note(text="two")])
            assert calls == ["two rolled back"]
            calls.clear()
            event.listen(session, "do_orm_execute", lambda *_: calls.watch("bulk"))
            session.execute(sa.insert(Author), [{"name": "two"}, {"name": "three"}])
            assert calls == ["bulk committed"]

    def test_stock_ones(self) -> None:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        with OptInSession(stock) as session:
            calls: list[str] = []

            def watch(name: str) -> None:
                session.on_commit(lambda: calls.append(f"{name} committed"))
                session.on_rollback(lambda: calls.append(f"{name} rolled back"))

            with session.begin():
                watch("begin")
                session.add(Note(text="one"))
            # SQLAlchemy begins by itself, and it ends as with SQLAlchemy.
            assert session.scalar(sa.select(Note.text)) == "one"
            watch("read")
            assert calls == ["begin committed"]
            session.commit()
            assert session.scalar(sa.select(Note.text)) == "one"
            watch("read")
            session.rollback()
        assert calls == ["begin committed", "read committed", "read rolled back"]
        stock.dispose()

    def test_a_function_that_reads_from_a_stock_one(self, engine: OptInEngine) -> None:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        with OptInSession(engine, binds={Note: stock}) as session:
            called: list[Any] = []
            with session.begin():
                session.on_commit(lambda: called.append(session.scalar(sa.select(Note.text))))
                session.on_commit(lambda: called.append("second"))
            assert called == [None, "second"]
        stock.dispose()


def test_several_sessions_and_threads(sessions: Sessions, onlooker: Onlooker) -> None:
    together = threading.Barrier(6)

    def run(number: int) -> tuple[list[str], set[int]]:
        threads: set[int] = set()
        with sessions() as session, sessions() as other:
            calls, others = Calls(session), Calls(other)
            with suppress(Undo), session.begin(), other.begin():
                calls.watch(f"{number}")
                others.watch("other")
                session.on_commit(lambda: threads.add(threading.get_ident()))
                add(session, f"{number}")
                together.wait(30)
                if number % 2:
                    raise Undo
            threads -= {threading.get_ident()}
            return [*calls, *others], threads

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(run, range(6)))
    for number, (calls, threads) in enumerate(outcomes):
        outcome = "rolled back" if number % 2 else "committed"
        assert calls == [f"{number} {outcome}", f"other {outcome}"]
        assert threads == set()
    assert onlooker.names() == ["0", "2", "4"]


def test_while_the_engine_is_isolated(
    engine: OptInEngine, sessions: Sessions, onlooker: Onlooker
) -> None:
    with isolate(engine), sessions() as session:
        calls = Calls(session)
        with session.begin():
            calls.watch("one")
            with pytest.raises(Undo), session.begin_nested():
                calls.watch("inner")
                raise Undo
            add(session, "one")
            assert calls == []
        assert calls == ["inner rolled back", "one committed"]
        calls.clear()
        with pytest.raises(IntegrityError), session.begin():
            calls.watch("two")
            session.add_all([Seat(place=1), Seat(place=1)])
        assert calls == ["two rolled back"]
    assert onlooker.names() == []


class TestWrongUse:
    def test_what_is_no_function(self, session: OptInSession, calls: Calls) -> None:
        for register in (session.on_commit, session.on_rollback):
            name = register.__name__
            called_too_early: Any = partial(calls.append, "called too early")()
            with pytest.raises(TypeError, match=rf"{name}\(\) takes a function .*lambda"):
                register(called_too_early)

    def test_what_would_run_later(self, session: OptInSession) -> None:
        async def coroutine() -> None: ...

        def generator() -> Iterator[None]:
            yield

        for register in (session.on_commit, session.on_rollback):
            for later in (coroutine, generator, partial(coroutine)):
                with pytest.raises(TypeError, match="would not run when it is called"):
                    register(later)
