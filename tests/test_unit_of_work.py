"""Units of work: a session for one block or call, which commits as a whole or not at all."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a unit, which has several lines

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from typing_extensions import assert_type

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from fictive_sqlalchemy.ext.flask.scoped_session import current_session, flask_scoped_session
from tests.core.test_autocommit import Interrupter, Interruption, chain
from tests.library import (
    Author,
    Base,
    Onlooker,
    Seat,
    assert_at_rest,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy

Factory = Callable[[], Session]


@pytest.fixture
def stock(wire_url: str, engine: OptInEngine) -> Iterator[sa.Engine]:
    stock = sa.create_engine(wire_url)
    stock.connect().close()  # SQLAlchemy asks the server for its version, and the like
    yield stock
    assert checked_out(stock) == 0
    stock.dispose()


@pytest.fixture
def maker(engine: OptInEngine) -> sessionmaker[OptInSession]:
    return sessionmaker(engine, class_=OptInSession)


@pytest.fixture
def scope(maker: sessionmaker[OptInSession]) -> Iterator[OptInScopedSession[OptInSession]]:
    scope = OptInScopedSession(maker)
    yield scope
    scope.remove()


FACTORIES = [
    "sessionmaker",
    "scoped_session",
    "a callable",
    "a stock sessionmaker",
    "a stock scoped_session",
    "a stock sessionmaker on our engine",
]


@pytest.fixture(params=FACTORIES)
def factory(request: pytest.FixtureRequest, engine: OptInEngine, stock: sa.Engine) -> Factory:
    def make() -> OptInSession:
        return OptInSession(engine)

    factories: dict[str, Factory] = {
        "sessionmaker": sessionmaker(engine, class_=OptInSession),
        "scoped_session": OptInScopedSession(sessionmaker(engine, class_=OptInSession)),
        "a callable": make,
        "a stock sessionmaker": sessionmaker(stock),
        "a stock scoped_session": scoped_session(sessionmaker(stock)),
        "a stock sessionmaker on our engine": sessionmaker(engine),
    }
    return factories[request.param]


def assert_closed(session: Session, factory: Factory) -> None:
    """Check that nothing of a session is left."""
    assert list(session) == []
    bind: Any = session.get_bind()
    assert checked_out(bind) == 0
    if isinstance(factory, scoped_session):
        assert not factory.registry.has()


def run_in_thread(function: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


class TestABlock:
    def test_commits_and_closes(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with wire.record() as recording, unit_of_work(factory) as session:
            assert session.scalar(sa.select(Author.name).where(Author.id == 1)) == "Ada"
            session.add(Author(name="new"))
            session.flush()
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]
        assert_closed(session, factory)
        ours = [one for one in recording.verbs if one != "DEALLOCATE"]
        assert [one for one in ours if one != "SELECT"] == ["BEGIN", "INSERT", "COMMIT"]

    def test_sends_nothing_when_it_is_empty(self, factory: Factory, wire: WireProxy) -> None:
        with wire.record() as recording, unit_of_work(factory):
            pass
        assert recording.messages == []

    @pytest.mark.parametrize("way", ["return", "break", "continue"])
    def test_commits_however_it_is_left(
        self, factory: Factory, onlooker: Onlooker, way: str
    ) -> None:
        def leave() -> Session | None:
            for _ in range(1):
                with unit_of_work(factory) as session:
                    session.add(Author(name="new"))
                    left.append(session)
                    if way == "return":
                        return session
                    if way == "break":
                        break
                    continue
            return None

        left: list[Session] = []
        leave()
        assert onlooker.names() == ["new"]
        assert_closed(left[0], factory)

    @pytest.mark.parametrize(
        "error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]
    )
    def test_rolls_back_on_an_exception(
        self,
        factory: Factory,
        onlooker: Onlooker,
        wire: WireProxy,
        error: type[BaseException],
    ) -> None:
        mine = error("mine")
        with wire.record() as recording:
            with pytest.raises(error) as raised, unit_of_work(factory) as session:
                session.add(Author(name="new"))
                session.flush()
                raise mine
            assert raised.value is mine
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_raises_what_the_database_says_at_its_end(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError), unit_of_work(factory) as session:
            session.add_all([Author(name="new"), Author(name="Ada")])
        assert_closed(session, factory)
        assert onlooker.names() == []
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_raises_what_the_database_says_to_commit(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError), unit_of_work(factory) as session:
            session.add_all([Seat(place=1), Seat(place=1), Author(name="new")])
            session.flush()
        assert_closed(session, factory)
        assert onlooker.names() == []

    @pytest.mark.parametrize("when", ["inside", "at commit"])
    def test_of_which_the_server_dies_is_closed_and_the_next_works(
        self, factory: Factory, onlooker: Onlooker, when: str
    ) -> None:
        with pytest.raises(DBAPIError), unit_of_work(factory) as session:
            session.add(Author(name="new"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            if when == "inside":
                session.scalar(sa.select(Author.name))
        assert_closed(session, factory)
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_says_when_an_error_was_caught_inside_for_nothing_is_stored(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, unit_of_work(factory) as session:
            session.add(Author(name="Ada"))
            with suppress(IntegrityError):
                session.flush()
        assert "begin_nested" in str(raised.value)
        assert_closed(session, factory)

    def test_goes_on_after_an_error_in_a_savepoint(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
            with suppress(IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
        assert onlooker.names() == ["new"]

    def test_works_through_the_scoped_session_too(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(scope):
            scope.add(Author(name="new"))
        assert onlooker.names() == ["new"]
        assert not scope.registry.has()

    def test_can_not_be_entered_again(self, maker: sessionmaker[OptInSession]) -> None:
        unit = unit_of_work(maker)
        with unit, pytest.raises(InvalidRequestError, match="each time"), unit:
            pass
        with pytest.raises(InvalidRequestError, match="each time"), unit:
            pass

    def test_can_be_a_generators_context_manager(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        @contextmanager
        def library() -> Iterator[Session]:
            with unit_of_work(maker) as session:
                yield session

        with library() as session, unit_of_work(maker) as inner:
            assert inner is session
            session.add(Author(name="new"))
        with pytest.raises(ValueError, match="mine"), library() as session:
            session.add(Author(name="lost"))
            session.flush()
            raise ValueError("mine")
        assert onlooker.names() == ["new"]


class TestTheSessionAfterTheEnd:
    def test_refuses_to_be_used(self, engine: OptInEngine, stock: sa.Engine) -> None:
        for maker in (sessionmaker(engine, class_=OptInSession), sessionmaker(stock)):
            with unit_of_work(maker) as session:
                pass
            for use in (session.begin, session.begin_nested):
                with pytest.raises(InvalidRequestError, match="permanently closed"):
                    use()
            with pytest.raises(InvalidRequestError, match="permanently closed"):
                session.add(Author(name="late"))
                session.commit()

    def test_leaves_objects_that_can_be_read_without_expiry(self, engine: OptInEngine) -> None:
        maker = sessionmaker(engine, class_=OptInSession, expire_on_commit=False)
        with unit_of_work(maker) as session:
            author = session.get_one(Author, 1)
        assert author.name == "Ada"


class TestABlockInABlock:
    def test_joins_as_a_savepoint(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with wire.record() as recording, unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            with unit_of_work(factory) as inner:
                assert inner is session
                inner.add(Author(name="inner"))
            assert inner.in_transaction()
            assert onlooker.names() == []
        assert onlooker.names() == ["inner", "outer"]
        verbs = ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        assert sent(recording) == verbs
        assert_closed(session, factory)

    def test_undoes_just_itself_when_its_error_is_caught_outside_of_it(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="before"))
            for error in (IntegrityError, ZeroDivisionError):
                with suppress(error), unit_of_work(factory):
                    session.add(Author(name="inner"))
                    session.flush()
                    session.add(Author(name="Ada"))
                    if error is ZeroDivisionError:
                        raise error
            session.add(Author(name="after"))
        assert onlooker.names() == ["after", "before"]

    def test_undoes_all_when_its_error_is_not_caught(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(ZeroDivisionError), unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            with unit_of_work(factory):
                session.add(Author(name="inner"))
                session.flush()
                raise ZeroDivisionError
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_is_undone_with_the_outer_one(self, factory: Factory, onlooker: Onlooker) -> None:
        with pytest.raises(ZeroDivisionError), unit_of_work(factory) as session:
            with unit_of_work(factory):
                session.add(Author(name="inner"))
            raise ZeroDivisionError
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_of_three_levels(self, factory: Factory, onlooker: Onlooker) -> None:
        with unit_of_work(factory) as session:
            with unit_of_work(factory):
                session.add(Author(name="second"))
                with suppress(ZeroDivisionError), unit_of_work(factory):
                    session.add(Author(name="third"))
                    session.flush()
                    raise ZeroDivisionError
            with unit_of_work(factory):
                session.add(Author(name="another"))
        assert onlooker.names() == ["another", "second"]

    def test_of_another_factory_is_another_unit(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        one, other = sessionmaker(engine), sessionmaker(engine, class_=OptInSession)
        with suppress(ZeroDivisionError), unit_of_work(one) as session:
            session.add(Author(name="one"))
            with unit_of_work(other) as inner:
                assert inner is not session
                inner.add(Author(name="other"))
            assert onlooker.names() == ["other"]
            raise ZeroDivisionError
        assert onlooker.names() == ["other"]

    def test_of_a_bound_method_joins(self, engine: OptInEngine) -> None:
        class Adapter:
            def session(self) -> OptInSession:
                return OptInSession(engine)

        adapter = Adapter()
        with unit_of_work(adapter.session) as session:
            with unit_of_work(adapter.session) as inner:
                assert inner is session
            with unit_of_work(Adapter().session) as other:
                assert other is not session

    def test_after_one_that_failed_is_a_unit_of_its_own(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with suppress(ZeroDivisionError), unit_of_work(factory):
            raise ZeroDivisionError
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
        assert onlooker.names() == ["new"]


class TestASessionThatSomebodyElseHasMade:
    def test_keeps_its_objects_and_gives_its_connection_back(
        self, engine: OptInEngine, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        author = scope.get_one(Author, 1)
        with unit_of_work(scope) as session:
            assert session is scope()
            author.name = "Augusta"
        assert checked_out(engine) == 0
        assert onlooker.names() == ["Augusta"]
        assert author in scope
        assert author.name == "Augusta"

    def test_and_begun_a_transaction_on_is_joined(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with scope.begin():
            with unit_of_work(scope) as session:
                session.add(Author(name="new"))
            assert session.in_transaction()
            with suppress(ZeroDivisionError), unit_of_work(scope) as session:
                session.add(Author(name="lost"))
                raise ZeroDivisionError
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]

    def test_and_begun_a_transaction_on_is_joined_on_stock_too(
        self, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        scope = scoped_session(sessionmaker(stock))
        with scope.begin():
            with unit_of_work(scope) as session:
                session.add(Author(name="new"))
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]
        scope.remove()

    def test_on_which_sqlalchemy_has_begun_by_itself_is_refused(
        self, stock: sa.Engine, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        scope = scoped_session(sessionmaker(stock))
        scope.add(Author(name="new"))
        scope.flush()
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="OptInSession"), unit_of_work(scope):
                pytest.fail("it began")
        assert recording.messages == []
        scope.commit()
        assert onlooker.names() == ["new"]
        scope.remove()

    def test_with_another_scope_inside_is_another_unit(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        here = ["one"]
        scope = OptInScopedSession(maker, scopefunc=lambda: here[0])
        with suppress(ZeroDivisionError), unit_of_work(scope) as session:
            session.add(Author(name="one"))
            here[0] = "two"
            with unit_of_work(scope) as other:
                assert other is not session
                other.add(Author(name="two"))
            assert not scope.registry.has()
            here[0] = "one"
            assert scope() is session
            raise ZeroDivisionError
        assert not scope.registry.has()
        assert onlooker.names() == ["two"]

    def test_in_a_scope_that_has_gone_is_closed(
        self, engine: OptInEngine, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        here = ["one"]

        def where() -> str:
            if not here:
                raise RuntimeError("outside of any scope")
            return here[0]

        scope = OptInScopedSession(maker, scopefunc=where)
        with unit_of_work(scope) as session:
            session.add(Author(name="new"))
            here.clear()
        assert checked_out(engine) == 0
        assert onlooker.names() == ["new"]
        with pytest.raises(RuntimeError, match="outside of any scope"), unit_of_work(scope):
            pytest.fail("it began")


class TestWhatElseASessionCanDo:
    def test_is_to_be_rolled_back_without_an_error(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(maker) as session:
            session.add(Author(name="outer"))
            with unit_of_work(maker):
                session.add(Author(name="inner"))
                session.set_rollback()
        assert onlooker.names() == ["outer"]
        with unit_of_work(maker) as session:
            session.add(Author(name="lost"))
            session.set_rollback()
        assert onlooker.names() == ["outer"]

    def test_is_atomic_inside_and_around(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(scope), suppress(ZeroDivisionError), scope.atomic():
            scope.add(Author(name="lost"))
            raise ZeroDivisionError
        with scope.atomic():
            with unit_of_work(scope):
                scope.add(Author(name="new"))
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("fails", [False, True])
    def test_calls_services_after_its_end_that_are_units_of_their_own(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker, fails: bool
    ) -> None:
        def add(session: OptInSession, name: str) -> None:
            session.add(Author(name=name))

        factories: list[Callable[[], OptInSession]] = [maker, OptInScopedSession(maker)]
        for factory in factories:
            service = unit_of_work(factory)(add)
            with suppress(ZeroDivisionError), unit_of_work(factory) as session:
                session.on_commit(partial(service, "committed"))
                session.on_rollback(partial(service, "rolled back"))
                session.add(Author(name="new"))
                session.flush()
                if fails:
                    raise ZeroDivisionError
            assert onlooker.names() == (["rolled back"] if fails else ["committed", "new"])
            onlooker.run("DELETE FROM author WHERE id > 3")

    def test_has_listeners_that_call_services_before_its_end(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        def audit(session: Session) -> None:
            with unit_of_work(maker) as joined:
                assert joined is session
                joined.add(Author(name="audited"))

        with unit_of_work(maker) as session:
            event.listen(session, "before_commit", audit, once=True)
            session.add(Author(name="new"))
        assert onlooker.names() == ["audited", "new"]


class TestInFlask:
    def test_the_proxy_of_a_scoped_session_is_a_factory(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        app = Flask(__name__)
        flask_scoped_session(maker, app)

        @unit_of_work(current_session)
        def add(session: OptInSession, name: str, outer: Session | None = None) -> None:
            assert outer is None or session is outer
            session.add(Author(name=name))

        with pytest.raises(RuntimeError, match="app_context"):
            add("new")
        with app.app_context():
            add("one")
            assert not current_session.registry.has()
            author = current_session.get_one(Author, 1)
            with unit_of_work(current_session) as session:
                add("two", session)
                with app.app_context(), suppress(ZeroDivisionError):
                    with unit_of_work(current_session) as other:
                        assert other is not session
                        add("lost", other)
                        raise ZeroDivisionError
            assert author in current_session
        assert onlooker.names() == ["one", "two"]


class TestEndingItByHand:
    @pytest.mark.parametrize("joined", [False, True])
    def test_by_commit_is_refused_and_sends_nothing(
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

    def test_by_commit_can_be_caught(self, factory: Factory, onlooker: Onlooker) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="commits at its end"):
                session.commit()
            session.add(Author(name="two"))
        assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("joined", [False, True])
    @pytest.mark.parametrize("how", ["rollback", "close"])
    def test_by_rollback_or_close_is_no_silent_loss(
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

    def test_by_remove_is_no_silent_loss(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="nothing of it"), unit_of_work(scope):
            scope.add(Author(name="new"))
            scope.remove()
        assert onlooker.names() == []

    def test_by_a_remove_that_is_caught_is_no_silent_loss(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="ended inside"), unit_of_work(scope):
            scope.add(Author(name="new"))
            with suppress(InvalidRequestError):
                scope.remove()
            with pytest.raises(InvalidRequestError, match="ended inside"), unit_of_work(scope):
                pytest.fail("it joined, or began")
        assert onlooker.names() == []

    def test_by_the_commit_of_the_transaction_around_is_refused(
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
    def test_is_refused_and_nothing_is_stored(self, factory: Factory, onlooker: Onlooker) -> None:
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

    def test_of_savepoints_undoes_those(self, factory: Factory, onlooker: Onlooker) -> None:
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

    def test_is_refused_when_the_outer_one_is_closed_first(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        outer = steps(factory, "outer")
        session = next(outer)
        with pytest.raises(InvalidRequestError, match="order"), unit_of_work(factory):
            outer.close()
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_but_is_collected_rolls_back(self, factory: Factory, onlooker: Onlooker) -> None:
        held = steps(factory, "lost")
        session = next(held)
        del held
        gc.collect()
        assert_closed(session, factory)
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
        assert onlooker.names() == ["new"]

    def test_but_in_another_thread_is_refused(
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

    def test_but_in_another_context_of_the_same_thread_is_in_order(
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


class Service:
    """Services may be methods, too."""

    def __init__(self, name: str) -> None:
        self.name = name


class TestADecoratedFunction:
    def test_gets_the_session_wherever_its_parameter_is(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        unit = unit_of_work(maker)

        @unit
        def first(session: OptInSession, one: int, two: int = 2) -> tuple[int, int]:
            assert session.in_transaction()
            return one, two

        @unit
        def second(one: int, session: OptInSession, two: int = 2) -> tuple[int, int]:
            assert session.in_transaction()
            return one, two

        def last(one: int, two: int = 2, session: OptInSession | None = None) -> tuple[int, int]:
            assert session is not None
            assert session.in_transaction()
            return one, two

        def by_name(one: int, two: int = 2, *, session: OptInSession) -> tuple[int, int]:
            assert session.in_transaction()
            return one, two

        def by_place(one: int, session: OptInSession, /, two: int = 2) -> tuple[int, int]:
            assert session.in_transaction()
            return one, two

        functions: list[Any] = [first, second, unit(last), unit(by_name), unit(by_place)]
        for function in functions:
            assert function(1) == (1, 2)
            assert function(1, 3) == (1, 3)
            assert function(1, two=3) == (1, 3)
            if function is not functions[-1]:
                assert function(two=3, one=1) == (1, 3)
            with pytest.raises(TypeError):
                function()
            with pytest.raises(TypeError):
                function(1, 2, 3)
            assert "session" not in inspect.signature(function).parameters

    def test_without_the_parameter_is_just_wrapped(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        @unit_of_work(scope)
        def add(*names: str, **more: Any) -> int:
            """Add authors."""
            assert more == {"session": 5} or not more
            scope.add_all([Author(name=name) for name in names])
            return len(names)

        assert add("one", "two") == 2
        assert add("three", session=5) == 1
        assert onlooker.names() == ["one", "three", "two"]
        assert not scope.registry.has()
        assert add.__name__ == "add"
        assert add.__doc__ == "Add authors."

    def test_rolls_back_on_an_exception(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        @unit_of_work(factory)
        def add(session: Session, name: str) -> None:
            session.add(Author(name=name))
            session.flush()
            raise ZeroDivisionError

        with wire.record() as recording, pytest.raises(ZeroDivisionError):
            add("new")
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []

    def test_joins_the_one_that_calls_it(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        @unit_of_work(factory)
        def add(session: Session, names: list[str]) -> None:
            session.add(Author(name=names[0]))
            session.flush()
            if names[1:]:
                with suppress(IntegrityError):
                    add(names[1:])

        with wire.record() as recording:
            add(["one", "two", "Ada"])
        assert onlooker.names() == ["one", "two"]
        assert recording.verbs.count("BEGIN") == recording.verbs.count("COMMIT") == 1

    def test_may_be_a_method_below_other_decorators(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        class Names:
            def __init__(self, prefix: str) -> None:
                self.prefix = prefix

            @unit_of_work(maker)
            def add(self, session: OptInSession, name: str) -> str:
                session.add(Author(name=self.prefix + name))
                return name

            @classmethod
            @unit_of_work(maker)
            def add_one(cls, session: OptInSession, name: str) -> str:
                session.add(Author(name=name))
                return name

            @staticmethod
            @unit_of_work(maker)
            def add_another(session: OptInSession, name: str) -> str:
                session.add(Author(name=name))
                return name

        names = Names("a ")
        assert_type(names.add("one"), str)
        assert names.add_one("b two") == Names.add_one("c three")[:0] + "b two"
        assert Names.add_another("d four") == "d four"
        assert onlooker.names() == ["a one", "b two", "c three", "d four"]

    def test_is_typed_without_the_session(self, maker: sessionmaker[OptInSession]) -> None:
        @unit_of_work(maker)
        def first(session: OptInSession, one: int, *, two: str = "") -> float:
            return 1.5

        @unit_of_work(maker)
        def stock(session: Session, one: int) -> float:
            return 1.5

        @unit_of_work(maker)
        def without(one: int) -> float:
            return 1.5

        assert_type(first(1, two="2"), float)
        assert_type(stock(1), float)
        assert_type(without(1), float)
        with pytest.raises(TypeError):
            first("1", three=2)  # type: ignore[call-arg, arg-type]  # pyright: ignore
        with unit_of_work(maker) as session:
            assert_type(session, OptInSession)

    def test_takes_a_session_of_its_callers(
        self, engine: OptInEngine, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        seen: list[Session] = []

        def add(session: OptInSession, name: str) -> None:
            seen.append(session)
            session.add(Author(name=name))
            inner()
            if name == "lost":
                raise ZeroDivisionError

        call: Any = unit_of_work(maker)(add)

        @unit_of_work(maker)
        def inner(session: OptInSession) -> None:
            assert session is seen[-1]

        with OptInSession(engine) as own:
            call("outside", session=own)
            assert onlooker.names() == ["outside"]
            assert checked_out(engine) == 0
            own.scalar(sa.select(Author.name))  # it is not closed
            with own.begin():
                call("inside", session=own)
                with suppress(ZeroDivisionError):
                    call("lost", session=own)
                assert onlooker.names() == ["outside"]
            with suppress(ZeroDivisionError):
                call("lost", session=own)
        call("none", session=None)
        assert set(seen[:-1]) == {own}
        assert onlooker.names() == ["inside", "none", "outside"]

    def test_inside_a_unit_may_be_given_its_session(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        def add(name: str, session: OptInSession) -> None:
            session.add(Author(name=name))

        call: Any = unit_of_work(maker)(add)
        with unit_of_work(maker) as session, OptInSession(maker().get_bind()) as other:
            call("joined", session=session)
            call("other", session=other)
            assert onlooker.names() == ["other"]
        assert onlooker.names() == ["joined", "other"]

    def test_refuses_what_is_no_session(
        self, maker: sessionmaker[OptInSession], scope: OptInScopedSession[OptInSession]
    ) -> None:
        def service(session: OptInSession) -> None:
            pytest.fail("it was called")

        call: Any = unit_of_work(maker)(service)
        for wrong in (1, scope, maker):
            with pytest.raises(TypeError, match=r"session=… is a \w+"):
                call(session=wrong)


async def coroutine() -> None: ...


async def async_generator() -> Any:
    yield 1


def generator() -> Any:
    yield 1


def with_one(one: Any) -> None: ...


class TestWrongUses:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (coroutine, "async"),
            (async_generator, "is a generator"),
            (generator, "Collect the rows inside"),
            (Service, "decorate the methods"),
            (classmethod(with_one), "below @classmethod"),
            (staticmethod(with_one), "below @classmethod"),
            (property(with_one), "below @classmethod"),
            (5, "takes the session factory"),
        ],
    )
    def test_of_the_decorator(
        self, maker: sessionmaker[OptInSession], function: Any, message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            unit_of_work(maker)(function)

    @pytest.mark.parametrize("function", [generator, coroutine, async_generator])
    def test_of_a_function_that_returns_what_would_run_after_the_block(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker, function: Callable[[], Any]
    ) -> None:
        """As a lambda does, or what another decorator has wrapped."""

        @unit_of_work(maker)
        def with_session(session: OptInSession) -> Any:
            session.add(Author(name="new"))
            return function()

        @unit_of_work(maker)
        def without() -> Any:
            with unit_of_work(maker) as session:
                session.add(Author(name="new"))
            return function()

        for decorated in (with_session, without):
            with pytest.raises(TypeError, match=r"would run after the end of unit_of_work\(\)"):
                decorated()
        assert onlooker.names() == []

    def test_of_the_decorator_without_a_factory(self) -> None:
        def service(name: str) -> None: ...

        with pytest.raises(TypeError, match=r"write @unit_of_work\(Session\)"):
            unit_of_work(service)  # type: ignore[arg-type,type-var]  # pyright: ignore
        make: Any = lambda: None  # noqa: E731
        wrong: Any = unit_of_work(make)
        with pytest.raises(TypeError, match="takes the session factory"):
            wrong("a name")

    def test_of_what_is_no_factory(self, engine: OptInEngine) -> None:
        for wrong in (OptInSession(engine), engine, None, "postgresql://"):
            with pytest.raises(TypeError, match="what makes sessions"):
                unit_of_work(wrong)  # type: ignore[arg-type]  # pyright: ignore

    def test_of_a_factory_that_makes_no_sessions(
        self, scope: OptInScopedSession[OptInSession]
    ) -> None:
        for wrong in (lambda: None, lambda: scope, lambda: OptInSession):
            with pytest.raises(TypeError, match="needs a session"), unit_of_work(wrong):  # type: ignore[type-var]  # pyright: ignore
                pytest.fail("it began")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["sessionmaker", "scoped_session"])
def test_an_interruption_at_any_line_leaves_no_unit_open(
    url: str, onlooker: Onlooker, kind: str
) -> None:
    """Each line of the package that two nested blocks run is interrupted, at its first turn."""
    with opened(url) as engine:
        maker = sessionmaker(engine, class_=OptInSession)
        factory: Factory = maker if kind == "sessionmaker" else OptInScopedSession(maker)

        def work() -> None:
            with unit_of_work(factory) as session:
                session.add(Author(name="outer"))
                with unit_of_work(factory):
                    session.add(Author(name="inner"))

        def play(at: int | None) -> list[tuple[str, int]]:
            interrupter = Interrupter(at)
            try:
                interrupter.run(work)
            except BaseException as raised:
                if at is None or Interruption not in map(type, chain(raised)):
                    raise
            gc.collect()  # the interruption still keeps frames that had a session
            if isinstance(factory, scoped_session):
                factory.remove()
            return interrupter.lines

        play(None)
        onlooker.run("DELETE FROM author WHERE id > 3")
        lines = play(None)
        onlooker.run("DELETE FROM author WHERE id > 3")
        first: dict[tuple[str, int], int] = {}
        for turn, line in enumerate(lines):
            first.setdefault(line, turn)
        assert len(first) > 100
        for line, turn in first.items():
            play(turn)
            names = onlooker.names()
            assert names in ([], ["inner", "outer"]), line
            with unit_of_work(factory) as session:
                session.add(Author(name="next"))
            assert onlooker.names() == sorted([*names, "next"]), line
            onlooker.run("DELETE FROM author WHERE id > 3")
            assert_at_rest(engine)


def test_an_error_that_was_caught_inside_is_no_silent_loss_with_sqlalchemys_own_sessions(
    url: str, onlooker: Onlooker
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and no driver says so."""
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
        with unit_of_work(sessionmaker(engine)) as session:
            session.execute(sa.insert(Author).values(name="lost"))
            with suppress(DBAPIError):
                session.execute(sa.text("SELECT 1 / 0"))
    with unit_of_work(sessionmaker(engine)) as session:
        session.execute(sa.insert(Author).values(name="kept"))
    assert onlooker.names() == ["kept"]
    engine.dispose()
