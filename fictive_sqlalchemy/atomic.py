"""``atomic()``: a transaction where there is none, a savepoint inside one."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin

from .session_transaction import Block

if TYPE_CHECKING:
    from .session import OptInSession

F = TypeVar("F", bound=Callable[..., Any])

_JOINED_FAILED = (
    "Nothing of this block was stored: an atomic(savepoint=False) inside it had failed, and the "
    "error was caught. Let the error leave this block, too, or leave savepoint=False out."
)


class Atomic:
    """A block that is stored as a whole or not at all; functions that have one compose.

    Outermost it is :meth:`.OptInSession.begin`, inside a transaction it is a savepoint. Get one
    from :meth:`.OptInSession.atomic`, for ``with`` or as a decorator.

    :param session: What returns the session, asked at each begin.
    :param options: As :meth:`.OptInSession.atomic` takes them.
    """

    def __init__(
        self,
        session: Callable[[], OptInSession],
        *,
        savepoint: bool = True,
        durable: bool = False,
        **options: Any,
    ) -> None:
        self._session = session
        self._savepoint = savepoint
        self._durable = durable
        self._options = {name: value for name, value in options.items() if value is not None}
        self._begun: Block | None = None
        self._joined: Block | None = None

    def __call__(self, function: F) -> F:
        """Make each call of a function such a block.

        :param function: A function, or an ``async def`` function.
        :raises TypeError: for a generator, whose block would have ended before its body runs.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__name__}() is a generator, and atomic() would have ended before its "
                "body runs. Collect the rows inside a function that is atomic, and yield outside."
            )
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def atomic_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._anew():
                    return await function(*args, **kwargs)

            return atomic_coroutine  # type: ignore[return-value]  # pyright: ignore

        @wraps(function)
        def atomic_function(*args: Any, **kwargs: Any) -> Any:
            with self._anew():
                return function(*args, **kwargs)

        return atomic_function  # type: ignore[return-value]  # pyright: ignore

    def _anew(self) -> Atomic:
        return Atomic(
            self._session, savepoint=self._savepoint, durable=self._durable, **self._options
        )

    def __enter__(self) -> SessionTransaction:
        if self._begun is not None or self._joined is not None:
            raise exc.InvalidRequestError("This atomic() is in use: make a new one for each block.")
        session = self._session()
        around = session.get_nested_transaction() or session.get_transaction()
        outermost = session.get_transaction()
        if outermost is None or outermost.origin is not SessionTransactionOrigin.BEGIN:
            begun = session.begin(**self._options)
            assert isinstance(begun, Block)
            begun.task = _current_task()
            begun.__enter__()
            self._begun = begun
            return begun
        assert isinstance(outermost, Block)
        assert isinstance(around, Block)
        self._refuse_inside(outermost)
        if not self._savepoint:
            self._joined = around
            return around
        savepoint = session.begin_nested()
        assert isinstance(savepoint, Block)
        savepoint.__enter__()
        self._begun = savepoint
        return savepoint

    def _refuse_inside(self, outermost: Block) -> None:
        if self._durable:
            raise exc.InvalidRequestError(
                "atomic(durable=True) has to be outermost, so that what it does is stored when it "
                "ends, and a transaction is open: call it outside, or leave durable out."
            )
        if self._options:
            raise exc.InvalidRequestError(
                f"{', '.join(self._options)} can only be given to the outermost atomic(), and a "
                "transaction is open: it has begun with options of its own."
            )
        if outermost.task is not None and outermost.task != _current_task():
            raise exc.InvalidRequestError(
                "Another asyncio task is in a transaction of this session: give each task a "
                "session of its own, or don't await it in the block."
            )

    def __exit__(self, type_: type[BaseException] | None, *error: object) -> None:
        begun, self._begun = self._begun, None
        joined, self._joined = self._joined, None
        if joined is not None:
            if type_ is not None and joined.roll_back_only is None:
                joined.roll_back_only = _JOINED_FAILED
            return
        assert begun is not None
        session = begun.session
        current = session and (session.get_nested_transaction() or session.get_transaction())
        if type_ is None and session and current is not begun:
            # SQLAlchemy would commit what is still open inside along with this one.
            misplaced = exc.InvalidRequestError(
                "A savepoint that was begun inside this atomic() is still open, or was begun by "
                "another generator or task: end it before. Nothing was stored."
            )
            begun.__exit__(type(misplaced), misplaced, None)
            raise misplaced
        begun.__exit__(type_, *error)


def _current_task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
