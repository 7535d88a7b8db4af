"""``atomic()`` decorates functions, and its blocks may be in generators and coroutines."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from tests.core.atomic.support import assert_usable
from tests.library import Author, Onlooker, Sessions, Undo, add, sent
from tests.wire import WireProxy


class TestADecorator:
    def test_atomic_decorates_without_and_with_arguments(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
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

    def test_atomic_decorates_methods(self, session: OptInSession, onlooker: Onlooker) -> None:
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

    def test_a_decorated_function_may_call_itself(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
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

    def test_threads_may_share_a_decorated_function(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
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

    def test_atomic_refuses_to_decorate_classes_and_generators(self, session: OptInSession) -> None:
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
        later: list[tuple[Callable[[], Any], str]] = [
            (body, r"run it inside the function, with asyncio\.run\(\)"),
            (rows, "return the list"),
            (lambda: (n for n in range(3)), "return the list"),
        ]
        for what, instead in later:
            with pytest.raises(TypeError, match=rf"would run after the end of atomic.*{instead}"):
                atomic(what)
        assert atomic(lambda: [1]) == [1]
        assert onlooker.names() == ["early"]


class TestOneObject:
    def test_one_atomic_object_is_good_for_one_block(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        atomic = session.atomic()
        with atomic:
            add(session, "one")
            with pytest.raises(InvalidRequestError, match="for one block only"), atomic:
                add(session, "two")
        with pytest.raises(InvalidRequestError, match="for one block only"), atomic:
            add(session, "three")
        assert onlooker.names() == ["one"]

    def test_one_atomic_object_decorates_as_often_as_you_like(
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


class TestGenerators:
    @staticmethod
    def hold(session: OptInSession) -> Generator[None, None, None]:
        with session.atomic():
            add(session, "held")
            yield

    def test_a_generator_that_is_closed_rolls_its_block_back(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        held = self.hold(session)
        next(held)
        held.close()
        assert_usable(session, onlooker)

    def test_a_generator_that_is_collected_rolls_its_block_back(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        held = self.hold(session)
        next(held)
        assert session.in_transaction()
        del held
        gc.collect()
        assert_usable(session, onlooker)

    def test_the_end_of_the_session_rolls_the_block_of_a_generator_back(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        held = self.hold(session)
        next(held)
        session.close()
        with pytest.raises(InvalidRequestError, match="ended inside"):
            next(held)
        assert_usable(session, onlooker)


class TestAsync:
    def test_a_decorated_coroutine_function_is_a_block(
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
    def test_two_tasks_in_a_transaction_from_before_the_loop_may_only_join_it(
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

    def test_a_cancelled_coroutine_rolls_its_block_back(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
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
