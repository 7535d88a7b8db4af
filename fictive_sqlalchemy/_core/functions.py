"""Checks that a function to decorate or to call back has done its work when it returns."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, cast

from .errors import see


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function for an error message: ``transfer()``.

    :param function: The function.
    """
    return f"{getattr(function, '__name__', repr(function))}()"


def runs_later(function: Any) -> bool:
    """Tell whether a call of a function only makes a coroutine or a generator, which runs later.

    :param function: The function.
    """
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )


def check_function(function: Any, decorator: str, takes: str = "options by their names") -> None:
    """Refuse to decorate an object that is not a function, or that is a generator function.

    The body of a generator function runs after its call. An ``async def`` function is not refused
    here: the decorator has to await or refuse it.

    :param function: The object to decorate.
    :param decorator: The name of the decorator, for the error.
    :param takes: The decorator's own arguments, for the error.
    :raises TypeError: if the object can't be decorated.
    """
    if inspect.isclass(function):
        raise TypeError(
            f"{decorator} does not decorate classes: decorate the methods that need it."
            + see("decorated-functions")
        )
    if isinstance(function, (classmethod, staticmethod, property)):
        raise TypeError(
            f"Put {decorator} next to the function, below @classmethod, @staticmethod and "
            "@property." + see("decorated-functions")
        )
    if not callable(function):
        raise TypeError(
            f"{decorator} decorates a function, and takes {takes}, not {function!r}."
            + see("decorated-functions")
        )
    if runs_later(function) and not inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{name_of(function)} is a generator, and {decorator} would have ended before its body "
            "runs. Collect the rows inside a function that is decorated, and yield outside."
            + see("decorated-functions")
        )


def finished(result: Any, function: Callable[..., Any], decorator: str) -> Any:
    """Return the result of a decorated function, unless it has code that still has to run.

    :param result: The result of the function.
    :param function: The function.
    :param decorator: The name of the decorator, for the error.
    :raises TypeError: if the result is a generator or coroutine, which would run after the block.
    """
    if isinstance(result, (Generator, Coroutine, AsyncGenerator)):
        kind = type(cast(object, result)).__name__
        instead = "collect the rows in a list inside the function, and return the list"
        if isinstance(result, Coroutine):
            instead = "run it inside the function, with asyncio.run()"
        if not isinstance(result, AsyncGenerator):  # an async one has not begun yet
            result.close()
        raise TypeError(
            f"{name_of(function)} returned a {kind}, whose code would run after the end of "
            f"{decorator}: {instead}. Nothing of this block was stored."
            + see("decorated-functions")
        )
    return result
