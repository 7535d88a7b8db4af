"""A decorated function is a unit of work, and what can not be one is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import assert_type

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from tests.library import Author, Onlooker, checked_out, sent
from tests.unit_of_work.support import Factory
from tests.wire import WireProxy


class Service:
    """Services may be methods, too."""

    def __init__(self, name: str) -> None:
        self.name = name


class TestADecoratedFunction:
    def test_a_function_gets_the_session_wherever_its_parameter_is(
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

    def test_a_function_without_the_parameter_is_just_wrapped(
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

    def test_a_function_rolls_back_on_an_exception(
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

    def test_a_function_joins_the_one_that_calls_it(
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

    def test_a_method_may_be_decorated_below_other_decorators(
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

    def test_a_function_is_typed_without_the_session(
        self, maker: sessionmaker[OptInSession]
    ) -> None:
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

    def test_a_function_takes_a_session_of_its_callers(
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

    def test_a_function_inside_a_unit_may_be_given_its_session(
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

    def test_a_function_refuses_what_is_no_session(
        self, maker: sessionmaker[OptInSession], scope: OptInScopedSession[OptInSession]
    ) -> None:
        def service(session: OptInSession) -> None:
            pytest.fail("it was called")

        call: Any = unit_of_work(maker)(service)
        for wrong in (1, scope, maker):
            with pytest.raises(TypeError, match=r"session=… is an object of the type \w+"):
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
    def test_the_decorator_refuses_what_it_can_not_decorate(
        self, maker: sessionmaker[OptInSession], function: Any, message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            unit_of_work(maker)(function)

    @pytest.mark.parametrize("function", [generator, coroutine, async_generator])
    def test_a_function_that_returns_what_would_run_after_the_block_is_an_error(
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

    def test_the_decorator_without_a_factory_is_an_error(self) -> None:
        def service(name: str) -> None: ...

        with pytest.raises(TypeError, match=r"write @unit_of_work\(Session\)"):
            unit_of_work(service)  # type: ignore[arg-type,type-var]  # pyright: ignore
        make: Any = lambda: None  # noqa: E731
        wrong: Any = unit_of_work(make)
        with pytest.raises(TypeError, match="takes the session factory"):
            wrong("a name")

    def test_what_is_no_factory_is_refused(self, engine: OptInEngine) -> None:
        for wrong in (OptInSession(engine), engine, None, "postgresql://"):
            with pytest.raises(TypeError, match="takes a session factory"):
                unit_of_work(wrong)  # type: ignore[arg-type]  # pyright: ignore

    def test_a_factory_that_makes_no_sessions_is_refused(
        self, scope: OptInScopedSession[OptInSession]
    ) -> None:
        for wrong in (lambda: None, lambda: scope, lambda: OptInSession):
            with pytest.raises(TypeError, match="needs a session"), unit_of_work(wrong):  # type: ignore[type-var]  # pyright: ignore
                pytest.fail("it began")
