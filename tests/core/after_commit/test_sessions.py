"""The functions belong to one session, and are called outside a transaction or at its end."""

# ruff: noqa: PT012  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import ref

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.core.after_commit.support import Calls, fail
from tests.library import Author, Onlooker, Seat, Sessions, Undo, add
from tests.wire import WireProxy


class TestOutside:
    def test_outside_on_commit_is_called_at_once_and_on_rollback_never(
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

    def test_an_error_of_on_commit_outside_is_the_callers(self, session: OptInSession) -> None:
        with pytest.raises(Undo):
            session.on_commit(partial(fail, Undo()))

    @pytest.mark.parametrize("how", ["flush", "commit"])
    def test_what_a_listener_registers_during_a_flush_or_commit_is_called_after_it(
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

    def test_what_a_listener_registers_during_a_bulk_call_is_called_after_it(
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
    def test_listeners_to_the_end_may_register(self, session: OptInSession, calls: Calls) -> None:
        event.listen(session, "after_commit", lambda _: calls.watch("after_commit"))
        with session.begin():
            calls.watch("one")
            with session.begin_nested():
                pass
        assert calls == ["one committed", *["after_commit committed"] * 2]

    def test_listeners_may_register_after_a_rollback(
        self, session: OptInSession, calls: Calls
    ) -> None:
        event.listen(session, "after_rollback", lambda _: calls.watch("after_rollback"))
        with pytest.raises(Undo), session.begin():
            calls.watch("one")
            raise Undo
        assert calls == ["one rolled back", "after_rollback rolled back"]

    @pytest.mark.parametrize("how", ["commit", "flush", "begin", "atomic"])
    def test_listeners_that_raise_keep_nothing_from_being_called(
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
    def test_the_end_of_the_session_rolls_back(
        self, session: OptInSession, calls: Calls, how: str
    ) -> None:
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
    def test_the_end_of_the_session_in_a_block_is_told_after_the_block(
        self, session: OptInSession, calls: Calls, how: str
    ) -> None:
        with pytest.raises(PendingRollbackError, match="closed inside"), session.begin():
            calls.watch("one")
            getattr(session, how)()
            assert calls == []
        assert calls == ["one rolled back"]

    @pytest.mark.parametrize("how", ["close", "reset", "invalidate"])
    def test_the_end_of_the_session_only_logs_errors_of_functions(
        self, session: OptInSession, calls: Calls, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        """It tidies up: who calls it, at the end of a context, goes on to tidy up."""
        session.begin()
        session.on_rollback(partial(fail, Undo("logged")))
        calls.watch("one")
        getattr(session, how)()
        assert calls == ["one rolled back"]
        assert "logged" in caplog.text

    def test_an_error_at_the_end_of_the_sessions_block_is_logged_alone(
        self, sessions: Sessions, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(Undo, match="the block's"), sessions() as session:
            session.begin()
            session.on_rollback(partial(fail, Undo("logged")))
            raise Undo("the block's")
        assert "logged" in caplog.text

    def test_closing_the_transaction_itself_is_a_rollback(
        self, session: OptInSession, calls: Calls
    ) -> None:
        transaction = session.begin()
        calls.watch("one")
        transaction.close()
        assert calls == ["one rolled back"]

    def test_when_the_session_is_collected_nothing_is_called_or_kept(
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


def test_each_session_in_each_thread_calls_its_own_functions(
    sessions: Sessions, onlooker: Onlooker
) -> None:
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


def test_functions_are_called_while_the_engine_is_isolated(
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
    def test_what_is_no_function_is_refused(self, session: OptInSession, calls: Calls) -> None:
        for register in (session.on_commit, session.on_rollback):
            name = register.__name__
            called_too_early: Any = partial(calls.append, "called too early")()
            with pytest.raises(TypeError, match=rf"{name}\(\) takes a function .*lambda"):
                register(called_too_early)

    def test_what_would_run_later_is_refused(self, session: OptInSession) -> None:
        async def coroutine() -> None: ...

        def generator() -> Iterator[None]:
            yield

        for register in (session.on_commit, session.on_rollback):
            for later in (coroutine, generator, partial(coroutine)):
                with pytest.raises(TypeError, match="would not run when it is called"):
                    register(later)
