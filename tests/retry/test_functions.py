"""A decorated function may take any arguments that can be read again, and is refused otherwise."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from werkzeug.local import LocalProxy

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.library import Author, Onlooker
from tests.retry.support import Account
from tests.wire import WireProxy


async def async_names() -> AsyncGenerator[str, None]:
    yield "one"


class TestFunctions:
    def test_retry_transaction_decorates_methods(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        class Service:
            @retry_transaction(session)
            def store(self, name: str) -> str:
                """Store one."""
                session.add(Author(name=name))
                return name

        assert Service().store("one") == "one"
        assert Service.store.__doc__ == "Store one."
        assert onlooker.names() == ["one"]

    def test_what_can_not_be_run_again_is_refused(self, session: OptInSession) -> None:
        async def coroutine() -> None: ...

        async def async_generator() -> AsyncGenerator[int, None]:
            yield 1

        def generator() -> Iterator[int]:
            yield 1

        refused: list[tuple[Any, str]] = [
            (coroutine, "does not decorate async functions"),
            (async_generator, "is a generator"),
            (generator, "is a generator"),
            (staticmethod(print), "below @classmethod"),
            (Account, "does not decorate classes"),
            (5, "decorates a function"),
        ]
        for wrong, message in refused:
            with pytest.raises(TypeError, match=message):
                retry_transaction(session)(wrong)
        with pytest.raises(TypeError, match="would run after the end"):
            retry_transaction(session)(lambda: (n for n in range(3)))()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: iter(["one", "two"]),
            lambda: (name for name in ["one", "two"]),
            lambda: map(str, ["one"]),
            lambda: zip(["one"], ["two"], strict=True),
            lambda: csv.reader(["one"]),
            lambda: io.StringIO("one"),
            lambda: io.BytesIO(b"one"),
            lambda: async_names(),
            lambda: LocalProxy(lambda: iter(["one"])),
        ],
    )
    @pytest.mark.parametrize("by_name", [False, True])
    def test_arguments_that_can_be_read_once_are_refused(
        self, session: OptInSession, wire: WireProxy, make: Callable[[], Any], by_name: bool
    ) -> None:
        """The first try would use it up, and the second one store nothing and succeed."""
        called: list[Any] = []

        @retry_transaction(session)
        def store(first: Any, names: Any = ()) -> None:
            called.append(names)

        with wire.record() as recording:
            if by_name:
                with pytest.raises(TypeError, match=r"argument names= is a .* read once: give it"):
                    store(1, names=make())
            else:
                with pytest.raises(TypeError, match=r"argument number 2 is a .* read once: give"):
                    store(1, make())
        assert not called
        assert recording.verbs == []
        assert not session.in_transaction()

    def test_arguments_that_can_be_read_again_are_not_refused(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        """To ask a query for its iterator would send it; a proxy has the methods of everything."""
        query = session.query(Author)
        proxy: Any = LocalProxy(lambda: query)
        arguments = [["one"], {"a": 1}, {"a": 1}.keys(), "text", range(3), {1}, query, proxy, None]
        seen: list[Any] = []

        @retry_transaction(session)
        def store(*given: Any, **named: Any) -> None:
            seen.append((given, named))

        with wire.record() as recording:
            for argument in arguments:
                store(argument, named=argument)
        assert len(seen) == len(arguments)
        assert recording.verbs == []

    def test_wrong_options_of_retry_transaction_are_refused(self, session: OptInSession) -> None:
        with pytest.raises(ValueError, match="at least 1, and not 0"):
            retry_transaction(session, tries=0)
        with pytest.raises(TypeError, match="savepoint"):
            retry_transaction(session, savepoint=False)  # type: ignore[call-overload]


def test_retry_transaction_needs_the_session_first() -> None:
    wrong: Any = retry_transaction
    with pytest.raises(TypeError, match=r"write @retry_transaction\(db\.session\)"):

        @wrong  # type: ignore[untyped-decorator]
        def transfer() -> None: ...
