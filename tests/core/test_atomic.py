"""``atomic()``: a transaction where there is none, a savepoint inside one. Checked on the wire."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
)
from sqlalchemy.orm import scoped_session, sessionmaker

from fictive_sqlalchemy import (
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
    unit_of_work,
)
from tests.library import Author, Note, NoteBase, Onlooker, Sessions, Undo, add, backend_pid, sent
from tests.wire import WireProxy


def assert_usable(session: OptInSession, onlooker: Onlooker) -> None:
    """Check that nothing is left over: the session reads outside, and the next block is stored."""
    assert not session.in_transaction()
    before = onlooker.names()
    with session.atomic():
        add(session, "usable")
    assert onlooker.names() == sorted([*before, "usable"])
    assert session.scalar(sa.select(Author.name).where(Author.name == "usable")) == "usable"


class TestOutermost:
    def test_it_is_a_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with session.atomic():
                add(session, "one", "two")
                assert onlooker.names() == []
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert recording.round_trips <= 4
        assert onlooker.names() == ["one", "two"]

    def test_an_error_undoes_it(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(Undo), session.atomic():
                add(session, "one")
                raise Undo
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert_usable(session, onlooker)

    def test_an_empty_one_sends_nothing(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            with session.atomic(), session.atomic(savepoint=False), session.atomic():
                pass
        assert recording.messages == []

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
    def test_no_error_commits(
        self, session: OptInSession, onlooker: Onlooker, kind: type[BaseException]
    ) -> None:
        with pytest.raises(kind), session.atomic():
            add(session, "one")
            with session.atomic():
                add(session, "two")
                raise kind
        assert_usable(session, onlooker)

    def test_gives_the_transaction(self, session: OptInSession) -> None:
        with session.atomic() as outer:
            assert outer is session.get_transaction()
            with session.atomic() as inner:
                assert inner is session.get_nested_transaction()
            with session.atomic(savepoint=False) as joined:
                assert joined is outer

    def test_what_was_pending_outside_is_stored(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        with session.atomic():
            pass
        assert onlooker.names() == ["pending"]

    def test_objects_loaded_before_stay(self, session: OptInSession, onlooker: Onlooker) -> None:
        ada = session.get_one(Author, 1)
        with session.atomic():
            ada.name = "Augusta"
        assert onlooker.names() == ["Augusta"]
        assert ada in session

    def test_an_error_that_is_caught_inside_commits_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            with session.atomic():
                add(session, "one")
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(Author), {"name": "Ada"})
        assert_usable(session, onlooker)

    def test_a_flush_that_failed_and_was_caught_commits_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            with session.atomic():
                add(session, "one")
                with pytest.raises(IntegrityError):
                    add(session, "Ada")
        assert_usable(session, onlooker)


class TestInside:
    @pytest.fixture(params=["atomic", "begin", "begin_nested", "begin + begin_nested", "unit"])
    def around(self, request: pytest.FixtureRequest, session: OptInSession) -> Callable[[], Any]:
        def unit() -> Any:
            return unit_of_work(lambda: session)

        def begun() -> Any:
            session.begin()
            return session.begin_nested()

        ways: dict[str, Callable[[], Any]] = {
            "atomic": session.atomic,
            "begin": session.begin,
            "begin_nested": session.begin_nested,
            "begin + begin_nested": begun,
            "unit": unit,
        }
        return ways[request.param]

    def test_it_is_a_savepoint(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        wire: WireProxy,
        onlooker: Onlooker,
    ) -> None:
        with wire.record() as recording:
            with around():
                with session.atomic():
                    add(session, "one")
                assert onlooker.names() == []
            if session.in_transaction():
                session.commit()
        verbs = [verb for verb in sent(recording) if verb != "SELECT"]
        assert verbs[0] == "BEGIN"
        assert verbs[-1] == "COMMIT"
        assert verbs.count("SAVEPOINT") == verbs.count("RELEASE") > 0
        assert onlooker.names() == ["one"]

    def test_an_error_that_is_caught_undoes_just_the_inner_one(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        onlooker: Onlooker,
    ) -> None:
        with around():
            add(session, "outer")
            with pytest.raises(Undo), session.atomic():
                add(session, "inner")
                with session.atomic():
                    add(session, "innermost")
                raise Undo
            with pytest.raises(IntegrityError), session.atomic():
                add(session, "another", "Ada")
            add(session, "outer, too")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer", "outer, too"]
        assert_usable(session, onlooker)

    def test_an_error_further_out_undoes_all(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with pytest.raises(Undo), around():
            with session.atomic():
                add(session, "inner")
            raise Undo
        if session.in_transaction():
            session.rollback()
        assert_usable(session, onlooker)

    def test_joined_it_sends_nothing_of_its_own(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        wire: WireProxy,
        onlooker: Onlooker,
    ) -> None:
        with around():
            add(session, "outer")
            with wire.record() as recording:
                with session.atomic(savepoint=False):
                    add(session, "inner")
        if session.in_transaction():
            session.commit()
        assert sent(recording) == ["INSERT"]
        assert onlooker.names() == ["inner", "outer"]

    def test_a_joined_one_whose_error_is_caught_lets_nothing_commit(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), around():
            add(session, "outer")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                add(session, "inner")
                raise Undo
            add(session, "after")
        if session.in_transaction():
            session.commit()
        assert_usable(session, onlooker)

    def test_durable_is_refused(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            for savepoint in (True, False):
                with pytest.raises(InvalidRequestError, match="has to be outermost"):
                    session.atomic(durable=True, savepoint=savepoint).__enter__()
            add(session, "outer")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]

    def test_options_are_refused(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            for savepoint in (True, False):
                with pytest.raises(InvalidRequestError, match="isolation_level, read_only can"):
                    session.atomic(
                        isolation_level="SERIALIZABLE", read_only=False, savepoint=savepoint
                    ).__enter__()
            add(session, "outer")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]

    def test_set_rollback_undoes_just_the_inner_one(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            add(session, "outer")
            with session.atomic():
                add(session, "inner")
                session.set_rollback()
            add(session, "after")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["after", "outer"]
        assert_usable(session, onlooker)

    def test_a_commit_in_it_is_refused(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            with pytest.raises(InvalidRequestError, match="leave commit\\(\\) out"):
                with session.atomic():
                    add(session, "inner")
                    session.commit()
            with pytest.raises(InvalidRequestError, match="leave commit\\(\\) out"):
                with session.atomic(), session.atomic():
                    with session.begin_nested():
                        add(session, "inner")
                        session.commit()
            add(session, "outer")
            assert onlooker.names() == []
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]
        assert_usable(session, onlooker)


class TestOptionsOutermost:
    def test_go_to_the_transaction(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            with session.atomic(
                isolation_level="SERIALIZABLE", read_only=True, deferrable=True, durable=True
            ):
                session.scalar(sa.text("SELECT 1"))
        assert recording.statements[0].split(maxsplit=1)[1] == (
            "ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE"
        )

    def test_joins_what_has_options(self, session: OptInSession) -> None:
        level = sa.text("SHOW transaction_isolation")
        with session.atomic(isolation_level="REPEATABLE READ"), session.atomic():
            assert session.scalar(level) == "repeatable read"

    def test_an_unknown_level(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(ArgumentError):
            session.atomic(isolation_level="QUITE GOOD").__enter__()
        assert_usable(session, onlooker)

    def test_an_unknown_option(self, session: OptInSession) -> None:
        with pytest.raises(TypeError, match="nested"):
            session.atomic(nested=True)  # type: ignore[call-overload]


class TestJoinedOutermost:
    def test_is_a_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with session.atomic(savepoint=False):
                add(session, "one")
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with pytest.raises(Undo), session.atomic(savepoint=False):
            add(session, "two")
            raise Undo
        assert onlooker.names() == ["one"]

    def test_two_that_are_joined_fail_as_one(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), session.atomic():
            with session.atomic(savepoint=False):
                with pytest.raises(Undo), session.atomic(savepoint=False):
                    add(session, "one")
                    raise Undo
        assert_usable(session, onlooker)

    def test_an_error_joined_to_a_savepoint_undoes_that_one(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "outer")
            with pytest.raises(PendingRollbackError, match="savepoint=False"), session.atomic():
                add(session, "middle")
                with pytest.raises(Undo), session.atomic(savepoint=False):
                    add(session, "inner")
                    raise Undo
        assert onlooker.names() == ["outer"]
        assert_usable(session, onlooker)

    def test_a_commit_by_hand_after_its_error_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.begin()
        with pytest.raises(Undo), session.atomic(savepoint=False):
            add(session, "one")
            raise Undo
        with pytest.raises(PendingRollbackError, match="savepoint=False"):
            session.commit()
        session.rollback()
        assert_usable(session, onlooker)

    def test_a_commit_in_one_is_refused(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(InvalidRequestError, match="leave commit"), session.begin():
            with session.atomic(savepoint=False):
                add(session, "one")
                session.commit()
        assert_usable(session, onlooker)

    def test_a_rollback_in_one_is_an_error(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(InvalidRequestError, match="ended inside it"), session.begin():
            with session.atomic(savepoint=False):
                add(session, "one")
                session.rollback()
        assert_usable(session, onlooker)


class TestSetRollback:
    @pytest.mark.parametrize("how", ["begin", "begin_nested", "atomic"])
    def test_of_a_block(
        self,
        session: OptInSession,
        wire: WireProxy,
        onlooker: Onlooker,
        how: Literal["begin", "begin_nested", "atomic"],
    ) -> None:
        with wire.record() as recording:
            with getattr(session, how)():
                add(session, "one")
                session.set_rollback()
                add(session, "two")
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
        assert_usable(session, onlooker)

    def test_of_a_savepoint(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with session.begin():
            add(session, "outer")
            with wire.record() as recording:
                with session.begin_nested():
                    add(session, "inner")
                    session.set_rollback()
        assert sent(recording) == ["SAVEPOINT", "INSERT", "ROLLBACK TO"]
        assert onlooker.names() == ["outer"]

    def test_in_a_decorated_function_its_result_is_returned(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        @session.atomic
        def dry_run() -> int:
            add(session, "one")
            session.set_rollback()
            return 1

        assert dry_run() == 1
        assert_usable(session, onlooker)

    def test_in_a_joined_one_is_an_error_of_the_block_around(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="asked for that with set_rollback"):
            with session.atomic():
                add(session, "outer")
                with session.atomic(savepoint=False):
                    session.set_rollback()
        assert_usable(session, onlooker)

    def test_that_the_block_around_has_asked_for_is_none(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            session.set_rollback()
            with session.atomic(savepoint=False):
                session.set_rollback()
                add(session, "one")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                raise Undo
        assert_usable(session, onlooker)

    def test_then_an_error(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(Undo), session.atomic():
            add(session, "one")
            session.set_rollback()
            raise Undo
        assert_usable(session, onlooker)

    def test_after_an_error_that_was_caught(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            with pytest.raises(DBAPIError):
                session.execute(sa.text("SELECT nothing FROM nowhere"))
            session.set_rollback()
        assert_usable(session, onlooker)

    def test_then_a_commit_by_hand(self, session: OptInSession, onlooker: Onlooker) -> None:
        session.begin()
        add(session, "one")
        session.set_rollback()
        with pytest.raises(PendingRollbackError, match="call rollback\\(\\), and not commit"):
            session.commit()
        session.rollback()
        assert_usable(session, onlooker)

    def test_outside(self, session: OptInSession) -> None:
        with pytest.raises(InvalidRequestError, match="none is open"):
            session.set_rollback()

    def test_of_a_lost_connection(self, session: OptInSession, onlooker: Onlooker) -> None:
        with session.atomic():
            add(session, "one")
            session.set_rollback()
            onlooker.kill(backend_pid(session.connection()))
        assert_usable(session, onlooker)

    def test_objects_go_back(self, session: OptInSession) -> None:
        ada, new = session.get_one(Author, 1), Author(name="new")
        with session.atomic():
            ada.name = "Augusta"
            session.add(new)
            session.set_rollback()
        assert ada.name == "Ada"
        assert new not in session


class TestADecorator:
    def test_without_and_with_arguments(self, session: OptInSession, onlooker: Onlooker) -> None:
        @session.atomic
        def plain(name: str, *, fail: bool = False) -> str:
            """Add one."""
            add(session, name)
            if fail:
                raise Undo
            return name

        @session.atomic()
        def called(name: str) -> str:
            return plain(name)

        @session.atomic(durable=True, isolation_level="SERIALIZABLE")
        def durable(name: str) -> str:
            assert session.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
            return called(name)

        assert (plain("a"), called("b"), durable("c")) == ("a", "b", "c")
        with pytest.raises(Undo):
            plain("d", fail=True)
        assert (plain.__name__, plain.__doc__) == ("plain", "Add one.")
        assert onlooker.names() == ["a", "b", "c"]
        with session.atomic():
            plain("e")
            with pytest.raises(Undo):
                plain("f", fail=True)
            with pytest.raises(InvalidRequestError, match="has to be outermost"):
                durable("g")
        assert onlooker.names() == ["a", "b", "c", "e"]

    def test_on_methods(self, session: OptInSession, onlooker: Onlooker) -> None:
        class Service:
            prefix = "class"

            def __init__(self) -> None:
                self.prefix = "instance"

            @session.atomic
            def method(self, name: str) -> None:
                add(session, f"{self.prefix} {name}")

            @classmethod
            @session.atomic
            def of_class(cls, name: str) -> None:
                add(session, f"{cls.prefix} {name}")

            @staticmethod
            @session.atomic(savepoint=False)
            def static(name: str) -> None:
                add(session, name)

            @property
            @session.atomic
            def value(self) -> str | None:
                return session.scalar(sa.select(Author.name).where(Author.id == 1))

        service = Service()
        service.method("a")
        service.of_class("b")
        Service.of_class("c")
        service.static("d")
        assert service.value == "Ada"
        assert onlooker.names() == ["class b", "class c", "d", "instance a"]

    def test_recursion(self, session: OptInSession, wire: WireProxy, onlooker: Onlooker) -> None:
        @session.atomic
        def count_down(depth: int) -> None:
            add(session, f"{depth}")
            if depth == 0:
                raise Undo
            try:
                count_down(depth - 1)
            except Undo:
                if depth == 1:
                    raise

        with wire.record() as recording:
            count_down(3)
        assert onlooker.names() == ["2", "3"]
        assert sent(recording).count("SAVEPOINT") == 3
        assert sent(recording).count("ROLLBACK TO") == 2

    def test_threads_share_a_function(self, sessions: Sessions, onlooker: Onlooker) -> None:
        scoped = OptInScopedSession(sessions)
        together = threading.Barrier(5)

        @scoped.atomic
        def add_two(name: str) -> None:
            add(scoped(), f"{name}1")
            together.wait(30)
            add(scoped(), f"{name}2")
            if name == "c":
                raise Undo

        def run(name: str) -> None:
            try:
                add_two(name)
            finally:
                scoped.remove()

        with ThreadPoolExecutor(5) as threads:
            futures = {name: threads.submit(run, name) for name in "abcde"}
        errors = [name for name, future in futures.items() if future.exception() is not None]
        assert errors == ["c"]
        assert onlooker.names() == ["a1", "a2", "b1", "b2", "d1", "d2", "e1", "e2"]

    def test_is_for_functions(self, session: OptInSession) -> None:
        class View:
            pass

        def generator() -> Iterator[int]:
            yield 1

        async def async_generator() -> AsyncGenerator[int, None]:
            yield 1

        plain: Any = print

        refused: list[tuple[Any, str]] = [
            (View, "decorate the methods that need it"),
            (generator, r"generator\(\) is a generator.*yield outside"),
            (partial(generator), "is a generator"),
            (async_generator, "is a generator"),
            (staticmethod(plain), "below @classmethod, @staticmethod"),
            (classmethod(plain), "below @classmethod, @staticmethod"),
            (property(plain), "@property"),
            (True, "takes options by their names, not True"),
        ]
        for wrong, message in refused:
            with pytest.raises(TypeError, match=message):
                session.atomic(wrong)
            with pytest.raises(TypeError, match=message):
                session.atomic(durable=True)(wrong)

    def test_what_would_run_later_is_refused_and_undone(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        async def body() -> None:
            add(session, "late")

        async def rows() -> AsyncGenerator[int, None]:
            yield 1

        def make(what: Callable[[], Any]) -> Any:
            add(session, "early")
            return what()

        atomic = session.atomic(make)
        later: list[Callable[[], Any]] = [body, rows, lambda: (n for n in range(3))]
        for what in later:
            with pytest.raises(TypeError, match="would run after the end of atomic"):
                atomic(what)
        assert atomic(lambda: [1]) == [1]
        assert onlooker.names() == ["early"]


class TestOneObject:
    def test_is_good_for_one_block(self, session: OptInSession, onlooker: Onlooker) -> None:
        atomic = session.atomic()
        with atomic:
            add(session, "one")
            with pytest.raises(InvalidRequestError, match="good for one block"), atomic:
                add(session, "two")
        with pytest.raises(InvalidRequestError, match="good for one block"), atomic:
            add(session, "three")
        assert onlooker.names() == ["one"]

    def test_decorates_as_often_as_you_like(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        atomic = session.atomic(durable=True)
        one = atomic(partial(add, session, "one"))
        two = atomic(partial(add, session, "two"))
        one()
        two()
        with pytest.raises(IntegrityError):
            one()
        assert onlooker.names() == ["one", "two"]


class TestEndedInside:
    @pytest.mark.parametrize("how", ["rollback", "close", "reset", "invalidate"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_is_an_error_of_each_block(
        self, session: OptInSession, onlooker: Onlooker, how: str, depth: int
    ) -> None:
        def block(depth: int) -> None:
            with pytest.raises(InvalidRequestError, match="ended inside it, by rollback"):
                with session.atomic():
                    add(session, f"{depth}")
                    if depth > 1:
                        block(depth - 1)
                    else:
                        getattr(session, how)()

        block(depth)
        assert_usable(session, onlooker)

    def test_statements_are_refused_until_it_is_left(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="closed transaction"), session.atomic():
            session.rollback()
            add(session, "one")
        assert_usable(session, onlooker)

    def test_a_savepoint_by_its_own_rollback(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "outer")
            with pytest.raises(InvalidRequestError, match="ended inside it"):
                with session.atomic() as savepoint:
                    add(session, "inner")
                    savepoint.rollback()
        assert onlooker.names() == ["outer"]

    def test_a_commit_by_the_transaction_itself_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="leave commit"), session.atomic() as block:
            add(session, "one")
            block.commit()
        assert_usable(session, onlooker)

    def test_a_begin_inside_points_to_begin_nested(self, session: OptInSession) -> None:
        with session.atomic():
            with pytest.raises(InvalidRequestError, match="begin_nested"):
                session.begin()


class TestOutOfOrder:
    def test_outermost(self, session: OptInSession, onlooker: Onlooker) -> None:
        outer, inner = session.atomic(), session.atomic()
        outer.__enter__()
        add(session, "outer")
        inner.__enter__()
        add(session, "inner")
        with pytest.raises(InvalidRequestError, match="still open"):
            outer.__exit__(None, None, None)
        with pytest.raises(InvalidRequestError, match="ended inside"):
            inner.__exit__(None, None, None)
        assert onlooker.names() == []
        assert_usable(session, onlooker)

    def test_savepoints_leave_the_transaction_usable(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "before")
            outer, inner = session.atomic(), session.atomic()
            outer.__enter__()
            add(session, "outer")
            inner.__enter__()
            with pytest.raises(InvalidRequestError, match="still open"):
                outer.__exit__(None, None, None)
            with pytest.raises(InvalidRequestError, match="ended inside"):
                inner.__exit__(None, None, None)
            add(session, "after")
        assert onlooker.names() == ["after", "before"]
        assert_usable(session, onlooker)

    def test_a_savepoint_by_hand_that_is_left_open(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        for savepoint in (True, False):
            with pytest.raises((InvalidRequestError, PendingRollbackError), match="still open"):
                with session.begin():
                    with session.atomic(savepoint=savepoint):
                        session.begin_nested()
                        add(session, "one")
            assert onlooker.names() == []
        assert_usable(session, onlooker)

    def test_a_joined_one_left_with_a_savepoint_open_lets_nothing_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), session.begin():
            with pytest.raises(InvalidRequestError, match="still open"):
                with session.atomic(savepoint=False):
                    session.begin_nested()
                    add(session, "one")
        assert_usable(session, onlooker)


class TestGenerators:
    @staticmethod
    def hold(session: OptInSession) -> Generator[None, None, None]:
        with session.atomic():
            add(session, "held")
            yield

    def test_closed_rolls_back(self, session: OptInSession, onlooker: Onlooker) -> None:
        held = self.hold(session)
        next(held)
        held.close()
        assert_usable(session, onlooker)

    def test_collected_rolls_back(self, session: OptInSession, onlooker: Onlooker) -> None:
        held = self.hold(session)
        next(held)
        assert session.in_transaction()
        del held
        gc.collect()
        assert_usable(session, onlooker)

    def test_the_end_of_the_session_rolls_back(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        held = self.hold(session)
        next(held)
        session.close()
        with pytest.raises(InvalidRequestError, match="ended inside"):
            next(held)
        assert_usable(session, onlooker)


class TestAsync:
    def test_a_coroutine_is_a_block(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @session.atomic
        async def inner(name: str, *, fail: bool = False) -> str:
            add(session, name)
            await asyncio.sleep(0)
            if fail:
                raise Undo
            return name

        @session.atomic(durable=True)
        async def outer() -> str:
            with pytest.raises(Undo):
                await inner("undone", fail=True)
            return await inner("one")

        with wire.record() as recording:
            assert asyncio.run(outer()) == "one"
        assert sent(recording) == [
            *("BEGIN", "SAVEPOINT", "INSERT", "ROLLBACK TO"),
            *("SAVEPOINT", "INSERT", "RELEASE", "COMMIT"),
        ]
        assert onlooker.names() == ["one"]

    def test_a_second_task_is_refused(self, session: OptInSession, onlooker: Onlooker) -> None:
        @session.atomic
        async def store(name: str) -> None:
            add(session, name)
            await asyncio.sleep(0)

        async def both() -> list[BaseException | None]:
            stored = asyncio.gather(store("one"), store("two"), return_exceptions=True)
            return list(await stored)

        first, second = asyncio.run(both())
        assert first is None
        with pytest.raises(InvalidRequestError, match="belongs to another thread or asyncio task"):
            raise second or AssertionError
        assert onlooker.names() == ["one"]
        assert_usable(session, onlooker)

    @pytest.mark.parametrize("kind", ["begin_nested", "atomic", "unit_of_work"])
    def test_a_second_thread_of_one_context_is_refused(
        self, engine: OptInEngine, onlooker: Onlooker, kind: str
    ) -> None:
        """asyncio.to_thread() hands the context on, and so a session that is scoped to it."""
        scope = OptInScopedSession(sessionmaker(engine, class_=OptInSession), lambda: None)
        inside, tried = threading.Event(), threading.Event()
        block: Any = {
            "begin_nested": scope.begin_nested,
            "atomic": scope.atomic,
            "unit_of_work": partial(unit_of_work, scope),
        }[kind]

        def first() -> None:
            with block():
                scope.add(Author(name="one"))
                scope.flush()
                inside.set()
                tried.wait(30)

        def second() -> None:
            inside.wait(30)
            try:
                with block():
                    scope.add(Author(name="two"))
            finally:
                tried.set()

        async def both() -> list[BaseException | None]:
            threads = asyncio.to_thread(first), asyncio.to_thread(second)
            return list(await asyncio.gather(*threads, return_exceptions=True))

        one, two = asyncio.run(both())
        assert one is None
        with pytest.raises(InvalidRequestError, match="belongs to another thread"):
            raise two or AssertionError
        assert onlooker.names() == ["one"]
        scope.remove()

    @pytest.mark.parametrize("kind", ["begin_nested", "unit_of_work"])
    def test_a_second_task_is_refused_whatever_its_block_is(
        self, engine: OptInEngine, onlooker: Onlooker, kind: str
    ) -> None:
        scope = OptInScopedSession(sessionmaker(engine, class_=OptInSession), lambda: None)

        async def store(name: str) -> None:
            with scope.begin_nested() if kind == "begin_nested" else unit_of_work(scope):
                scope.add(Author(name=name))
                await asyncio.sleep(0)
                if name == "one":
                    raise ZeroDivisionError

        async def both() -> list[BaseException | None]:
            stored = asyncio.gather(store("one"), store("two"), return_exceptions=True)
            return list(await stored)

        first, second = asyncio.run(both())
        assert isinstance(first, ZeroDivisionError)
        with pytest.raises(InvalidRequestError, match="belongs to another thread or asyncio task"):
            raise second or AssertionError
        assert onlooker.names() == []
        scope.remove()

    @pytest.mark.parametrize("savepoint", [True, False])
    def test_in_a_transaction_that_began_before_the_loop(
        self, session: OptInSession, onlooker: Onlooker, savepoint: bool
    ) -> None:
        """As in an async view, whose request began its transaction."""

        @session.atomic(savepoint=savepoint)
        async def store(name: str) -> None:
            add(session, name)
            await asyncio.sleep(0)

        async def both() -> list[BaseException | None]:
            stored = asyncio.gather(store("one"), store("two"), return_exceptions=True)
            return list(await stored)

        with session.begin():
            outcomes = asyncio.run(both())
        if savepoint:  # the second would be part of the first
            assert [type(outcome) for outcome in outcomes] == [type(None), InvalidRequestError]
            assert onlooker.names() == ["one"]
        else:
            assert outcomes == [None, None]
            assert onlooker.names() == ["one", "two"]

    def test_a_task_in_the_begin_of_another_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        @session.atomic
        async def store() -> None:
            add(session, "inner")

        async def outer() -> None:
            with session.begin():
                add(session, "outer")
                with pytest.raises(
                    InvalidRequestError, match="belongs to another thread or asyncio task"
                ):
                    await asyncio.create_task(store())

        asyncio.run(outer())
        assert onlooker.names() == ["outer"]

    def test_a_thread_of_a_task_is_refused(self, session: OptInSession, onlooker: Onlooker) -> None:
        @session.atomic
        def store() -> None:
            add(session, "inner")

        async def outer() -> None:
            with session.atomic():
                add(session, "outer")
                with pytest.raises(InvalidRequestError, match="another thread"):
                    await asyncio.to_thread(store)

        asyncio.run(outer())
        assert onlooker.names() == ["outer"]

    def test_cancelled_rolls_back(self, session: OptInSession, onlooker: Onlooker) -> None:
        @session.atomic
        async def store() -> None:
            add(session, "one")
            await asyncio.sleep(60)

        async def run() -> None:
            task = asyncio.create_task(store())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        assert_usable(session, onlooker)


class TestBinds:
    @pytest.fixture
    def stock(self) -> Iterator[sa.Engine]:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        yield stock
        stock.dispose()

    @pytest.fixture
    def both(self, engine: OptInEngine, stock: sa.Engine) -> Iterator[OptInSession]:
        with OptInSession(engine, binds={Note: stock}) as session:
            yield session

    @staticmethod
    def texts(stock: sa.Engine) -> list[str]:
        with stock.connect() as connection:
            return list(connection.scalars(sa.select(Note.text).order_by(Note.text)))

    def test_all_are_in_it(self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker) -> None:
        with both.atomic():
            both.add_all([Author(name="one"), Note(text="one")])
        with pytest.raises(Undo), both.atomic():
            both.add_all([Author(name="two"), Note(text="two")])
            both.flush()
            raise Undo
        with both.atomic():
            both.add_all([Author(name="three"), Note(text="three")])
            both.flush()
            both.set_rollback()
        assert (onlooker.names(), self.texts(stock)) == (["one"], ["one"])

    def test_after_a_read_on_a_stock_bind_it_is_refused(
        self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        assert both.scalar(sa.select(Note)) is None
        with pytest.raises(InvalidRequestError, match="by SQLAlchemy itself"):
            both.atomic().__enter__()
        both.commit()
        with both.atomic():
            both.add(Note(text="one"))
        assert self.texts(stock) == ["one"]
        assert_usable(both, onlooker)

    def test_in_a_savepoint_after_a_read_on_a_stock_bind(
        self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        assert both.scalar(sa.select(Note)) is None
        with both.begin_nested():
            with both.atomic():
                both.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="durable"):
                both.atomic(durable=True).__enter__()
        with pytest.raises(InvalidRequestError, match="already begun"):
            both.atomic().__enter__()  # nobody would commit it
        assert onlooker.names() == []
        both.commit()
        assert onlooker.names() == ["one"]

    def test_two_of_ours(
        self, engine: OptInEngine, wire_url: str, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        with OptInSession(engine, binds={Note: other}) as session:
            with wire.record() as recording:
                with pytest.raises(Undo), session.atomic():
                    session.add_all([Author(name="two"), Note(text="two")])
                    session.flush()
                    raise Undo
            assert sent(recording).count("ROLLBACK") == 2
            with session.atomic():
                session.add(Author(name="outer"))
                with session.atomic():
                    session.add(Note(text="inner"))
            assert onlooker.names() == ["outer"]
            assert onlooker.column("SELECT text FROM note") == ["inner"]
        other.dispose()

    def test_a_session_on_a_connection_of_the_users_own(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            outer = connection.begin()
            with OptInSession(connection) as session:
                with session.atomic():
                    add(session, "one")
            outer.rollback()
        assert onlooker.names() == []


class TestScopedSessions:
    def test_ask_for_the_session_at_each_call(self, sessions: Sessions, onlooker: Onlooker) -> None:
        scoped = OptInScopedSession(sessions)

        @scoped.atomic
        def store(name: str) -> None:
            add(scoped(), name)

        assert not scoped.registry.has()
        store("one")
        scoped.remove()
        with scoped.atomic(isolation_level="SERIALIZABLE"):
            store("two")
            assert scoped().in_nested_transaction() is False
            scoped.set_rollback()
        scoped.remove()
        assert onlooker.names() == ["one"]

    def test_of_stock_sessions_are_refused(self, engine: OptInEngine) -> None:
        scoped = OptInScopedSession(sessionmaker(engine))
        for call in (
            lambda: scoped.atomic().__enter__(),
            scoped.set_rollback,
            lambda: scoped.on_commit(print),
            lambda: scoped.on_rollback(print),
        ):
            with pytest.raises(TypeError, match="class_=OptInSession"):
                call()
        scoped.remove()

    def test_a_unit_of_work_inside(self, sessions: Sessions, onlooker: Onlooker) -> None:
        scoped: scoped_session[OptInSession] = OptInScopedSession(sessions)
        assert isinstance(scoped, OptInScopedSession)

        @unit_of_work(scoped)
        def service(session: OptInSession, name: str) -> None:
            session.add(Author(name=name))

        with scoped.atomic():
            service("one")
            with pytest.raises(IntegrityError):
                service("Ada")
        with scoped.atomic():
            service("two")
            scoped.set_rollback()
        scoped.remove()
        assert onlooker.names() == ["one"]


class TestChangesAfterAFlushThatFailed:
    """They are of the block, too, and go with it."""

    @pytest.mark.parametrize("leaves", ["with an error", "at its end"])
    @pytest.mark.parametrize("block", ["begin", "begin_nested", "atomic"])
    def test_in_a_block(
        self, session: OptInSession, onlooker: Onlooker, block: str, leaves: str
    ) -> None:
        ada = session.get_one(Author, 1)
        expected = ZeroDivisionError if leaves == "with an error" else PendingRollbackError
        with pytest.raises(expected):
            with getattr(session, block)():
                self.fail_and_go_on(session, ada)
                if leaves == "with an error":
                    raise ZeroDivisionError
        assert not session.new
        assert not session.dirty
        session.commit()
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30

    def test_in_a_block_inside(self, session: OptInSession, onlooker: Onlooker) -> None:
        ada = session.get_one(Author, 1)
        with session.begin():
            session.add(Author(name="outer"))
            with suppress(ZeroDivisionError), session.atomic():
                self.fail_and_go_on(session, ada)
                raise ZeroDivisionError
        assert onlooker.names() == ["outer"]
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30

    def fail_and_go_on(self, session: OptInSession, ada: Author) -> None:
        ada.name = "Bob"
        with suppress(IntegrityError):
            session.flush()
        ada.age = 5
        session.add(Author(name="new"))
