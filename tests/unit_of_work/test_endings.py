"""A unit of work ends in the order and in the thread or task in which it began."""

# ruff: noqa: PT012  # what raises is the block of a unit, which has several lines

from __future__ import annotations

import asyncio
import contextvars
import gc
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from tests.library import Author, Onlooker, checked_out
from tests.unit_of_work.support import Factory, assert_closed, run_in_thread


class TestEndingItByHand:
    @pytest.mark.parametrize("joined", [False, True])
    def test_ending_a_block_by_commit_is_refused_and_sends_nothing(
        self, factory: Factory, onlooker: Onlooker, joined: bool
    ) -> None:
        def old_service() -> None:
            with unit_of_work(factory) as session:
                session.add(Author(name="inner"))
                session.commit()

        with pytest.raises(InvalidRequestError, match="commits at its end"):
            if joined:
                with unit_of_work(factory) as session:
                    session.add(Author(name="outer"))
                    old_service()
            else:
                old_service()
        assert onlooker.names() == []
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_the_error_of_a_commit_in_a_block_can_be_caught(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="commits at its end"):
                session.commit()
            session.add(Author(name="two"))
        assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("joined", [False, True])
    @pytest.mark.parametrize("how", ["rollback", "close"])
    def test_ending_a_block_by_rollback_or_close_is_no_silent_loss(
        self, factory: Factory, onlooker: Onlooker, how: str, joined: bool
    ) -> None:
        def old_service() -> None:
            with unit_of_work(factory) as session:
                session.add(Author(name="inner"))
                session.flush()
                getattr(session, how)()

        with pytest.raises(InvalidRequestError, match="ended inside"):
            if joined:
                with unit_of_work(factory) as session:
                    session.add(Author(name="outer"))
                    with suppress(InvalidRequestError):
                        old_service()
            else:
                old_service()
        assert onlooker.names() == []

    def test_ending_a_block_by_remove_is_no_silent_loss(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="nothing of it"), unit_of_work(scope):
            scope.add(Author(name="new"))
            scope.remove()
        assert onlooker.names() == []

    def test_ending_a_block_by_a_remove_that_is_caught_is_no_silent_loss(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="ended inside"), unit_of_work(scope):
            scope.add(Author(name="new"))
            with suppress(InvalidRequestError):
                scope.remove()
            with pytest.raises(InvalidRequestError, match="ended inside"), unit_of_work(scope):
                pytest.fail("it joined, or began")
        assert onlooker.names() == []

    def test_ending_a_block_by_the_commit_of_the_transaction_around_is_refused(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with suppress(InvalidRequestError), scope.begin(), unit_of_work(scope) as session:
            session.add(Author(name="new"))
            session.commit()
        assert onlooker.names() == []
        scope.add(Author(name="next"))
        scope.commit()  # no longer inside
        assert onlooker.names() == ["next"]


def steps(factory: Factory, name: str) -> Generator[Session, None, None]:
    """Hold a block open, as a newcomer's generator does."""
    with unit_of_work(factory) as session:
        session.add(Author(name=name))
        session.flush()
        yield session


class TestABlockThatDoesNotEndInOrder:
    def test_a_block_that_does_not_end_in_order_is_refused_and_stores_nothing(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        outer, inner = steps(factory, "outer"), steps(factory, "inner")
        session = next(outer)
        assert next(inner) is session
        with pytest.raises(InvalidRequestError, match="order"):
            next(outer)
        with pytest.raises(InvalidRequestError, match="order"):
            next(inner)
        assert_closed(session, factory)
        assert onlooker.names() == []
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_savepoint_blocks_that_do_not_end_in_order_undo_those_savepoints(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            one, two = steps(factory, "one"), steps(factory, "two")
            next(one)
            next(two)
            with pytest.raises(InvalidRequestError, match="order"):
                next(one)
            with pytest.raises(InvalidRequestError, match="ended inside"):
                next(two)
            names = sa.select(Author.name).where(Author.id > 3)
            if isinstance(session, OptInSession):
                assert session.scalars(names).all() == ["outer"]
            else:
                with pytest.raises(InvalidRequestError, match="closed transaction"):
                    session.scalars(names)
        assert_closed(session, factory)
        assert onlooker.names() == ["outer"]

    def test_a_block_is_refused_when_the_outer_one_is_closed_first(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        outer = steps(factory, "outer")
        session = next(outer)
        with pytest.raises(InvalidRequestError, match="order"), unit_of_work(factory):
            outer.close()
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_a_block_that_is_collected_rolls_back(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        held = steps(factory, "lost")
        session = next(held)
        del held
        gc.collect()
        assert_closed(session, factory)
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
        assert onlooker.names() == ["new"]

    def test_a_block_that_ends_in_another_thread_is_refused(
        self, engine: OptInEngine, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        for factory in (maker, OptInScopedSession(maker)):
            held = steps(factory, "new")
            session = next(held)

            def end(held: Generator[Session, None, None] = held) -> None:
                with pytest.raises(InvalidRequestError, match="thread"):
                    next(held)

            run_in_thread(end)
            assert list(session) == []
            assert checked_out(engine) == 0
        assert onlooker.names() == []

    def test_a_block_that_ends_in_another_context_of_its_thread_is_in_order(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        held = steps(maker, "new")
        contextvars.copy_context().run(next, held)
        with suppress(StopIteration):
            next(held)
        with unit_of_work(maker) as session:
            assert list(session) == []
        assert onlooker.names() == ["new"]


class TestFlowsOfControl:
    def test_a_thread_never_joins(self, factory: Factory, onlooker: Onlooker) -> None:
        def work() -> None:
            with unit_of_work(factory) as other:
                assert other is not session
                other.add(Author(name="thread"))

        with suppress(ZeroDivisionError), unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            run_in_thread(work)
            raise ZeroDivisionError
        assert onlooker.names() == ["thread"]

    def test_a_thread_with_a_copy_of_the_context_never_joins(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        def work() -> None:
            with unit_of_work(factory) as other:
                assert other is not session
                other.add(Author(name="thread"))

        with suppress(ZeroDivisionError), unit_of_work(factory) as session:
            context = contextvars.copy_context()
            run_in_thread(lambda: context.run(work))
            raise ZeroDivisionError
        assert onlooker.names() == ["thread"]

    def test_asyncio_tasks_never_join(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        @unit_of_work(maker)
        def nested(session: Session, outer: Session) -> None:
            assert session is outer

        async def task(name: str, barrier: list[str], others: list[Session]) -> None:
            with unit_of_work(maker) as session:
                assert session not in others
                others.append(session)
                session.add(Author(name=name))
                barrier.append(name)
                while len(barrier) < 3:
                    await asyncio.sleep(0)
                nested(session)
                if name == "two":
                    raise ZeroDivisionError
                await asyncio.to_thread(in_thread, name, others)

        def in_thread(name: str, others: list[Session]) -> None:
            with unit_of_work(maker) as session:
                assert session not in others
                session.add(Author(name=f"{name} in a thread"))

        async def main() -> None:
            barrier: list[str] = []
            with unit_of_work(maker) as session:
                names = ["one", "two", "three"]
                others: list[Session] = [session]
                done = await asyncio.gather(
                    *(task(name, barrier, others) for name in names), return_exceptions=True
                )
            assert [type(one) for one in done] == [type(None), ZeroDivisionError, type(None)]

        asyncio.run(main())
        names = ["one", "one in a thread", "three", "three in a thread"]
        assert onlooker.names() == names

    def test_an_event_loop_inside_never_joins(self, maker: sessionmaker[OptInSession]) -> None:
        async def main() -> None:
            with unit_of_work(maker) as inner:
                assert inner is not session

        with unit_of_work(maker) as session:
            asyncio.run(main())

    def test_greenlets_never_join(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        def work() -> None:
            with unit_of_work(maker) as inner:
                assert inner is not session
                inner.add(Author(name="greenlet"))
                greenlet.getcurrent().parent.switch()

        greenlet = pytest.importorskip("greenlet")

        with suppress(ZeroDivisionError), unit_of_work(maker) as session:
            other = greenlet.greenlet(work)
            other.gr_context = contextvars.copy_context()
            other.switch()
            with unit_of_work(maker) as joined:
                assert joined is session
            other.switch()
            raise ZeroDivisionError
        assert onlooker.names() == ["greenlet"]

    def test_many_threads_share_a_decorated_function(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        seen: list[Session] = []

        @unit_of_work(factory)
        def add(session: Session, number: int) -> None:
            seen.append(session)
            session.add(Author(name=f"{number:02}"))
            session.flush()
            if number % 3 == 0:
                raise ZeroDivisionError

        def call(number: int) -> None:
            with suppress(ZeroDivisionError):
                add(number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, range(60)))
        assert len(set(map(id, seen))) == 60
        assert onlooker.names() == [f"{number:02}" for number in range(60) if number % 3]
