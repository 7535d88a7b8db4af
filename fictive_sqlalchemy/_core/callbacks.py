"""Functions that are called after a transaction: ``on_commit()`` and ``on_rollback()``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .errors import see
from .functions import runs_later

_log = logging.getLogger("fictive_sqlalchemy.session")

#: A function that is called after the end of a transaction.
Callback = Callable[[], object]


class SessionThatCalls(Protocol):
    """The part of a session that :class:`after_end` uses."""

    @property
    def callbacks(self) -> Callbacks: ...
    def may_call_back(self) -> bool: ...


class Callbacks(list[Callback]):
    """The functions that one session calls after the end of its transaction, in their order."""

    ending = 0
    """How many nested calls that may end the transaction are under way."""


class after_end(AbstractContextManager[None]):
    """Delay ``on_commit()`` and ``on_rollback()`` callbacks until the transaction has ended.

    This context manager surrounds each call that may end the transaction. It is a class, because a
    generator function would be slower.

    :param session: The session.
    :param only_log: Whether errors of the callbacks are only logged, because another error is
        being raised, or because the caller only cleans up.
    :raises Exception: the first error of the callbacks, after all of them were called.
    """

    __slots__ = ("_callbacks", "_only_log", "_session")

    def __init__(self, session: SessionThatCalls, *, only_log: bool = False) -> None:
        self._session = session
        self._callbacks = session.callbacks
        self._only_log = only_log

    def __enter__(self) -> None:
        self._callbacks.ending += 1

    def __exit__(self, type_: object, *error: object) -> None:
        callbacks = self._callbacks
        callbacks.ending -= 1
        if callbacks and not callbacks.ending and self._session.may_call_back():
            self._call(self._only_log or type_ is not None)

    def _call(self, only_log: bool) -> None:
        callbacks = self._callbacks
        calls = callbacks.copy()
        callbacks.clear()
        first: Exception | None = None
        for index, call in enumerate(calls):
            if not self._session.may_call_back():  # a callback has left a transaction open
                callbacks[:0] = calls[index:]
                break
            try:
                call()
            except Exception as error:
                if first is None and not only_log:
                    first = error
                else:
                    _log.exception(
                        "%r raised this after the end of a transaction" + see("callback-errors"),
                        call,
                    )
            except BaseException:
                if rest := calls[index + 1 :]:
                    _log.error(
                        "Not called after the end of a transaction: %r" + see("callback-errors"),
                        rest,
                    )
                raise
        if first is not None:
            raise first


def check_callback(function: Any, taker: str) -> None:
    """Refuse an object that can't be called after the end of a transaction.

    :param function: The object.
    :param taker: The name of the method that the object was passed to, such as ``on_commit()``.
    :raises TypeError: if the object can't be called, or is an ``async`` or a generator function.
    """
    if not callable(function):
        raise TypeError(
            f"{taker} takes a function without parameters, not {function!r}: write "
            f"{taker[:-1]}lambda: …), or functools.partial(…), for a function that has "
            "parameters." + see("callback-functions")
        )
    if runs_later(function):
        raise TypeError(
            f"{taker} takes a plain function, and {function!r} would not run when it is called: "
            "pass a function that runs it, for example with asyncio.run()."
            + see("callback-functions")
        )
