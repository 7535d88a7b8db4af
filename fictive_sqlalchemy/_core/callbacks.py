"""What is called after a transaction has ended: ``on_commit()`` and ``on_rollback()``."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

_log = logging.getLogger("fictive_sqlalchemy.session")

#: What is called after the end of a transaction.
Callback = Callable[[], object]


class Callbacks:
    """The functions that one session calls after the end of its transaction, in their order.

    :param may_call: Tells whether no transaction is open, so that they may be called now.
    """

    __slots__ = ("_may_call", "_waiting", "ending")

    def __init__(self, may_call: Callable[[], bool]) -> None:
        self._may_call = may_call
        self._waiting: list[Callback] = []
        self.ending = 0
        """How many calls that may end the transaction are under way, one inside the other."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, callbacks: Iterable[Callback]) -> None:
        """Call these, too, once the transaction has ended."""
        self._waiting.extend(callbacks)

    def after_end(self, *, only_log: bool = False) -> AbstractContextManager[None]:
        """Delay ``on_commit()`` and ``on_rollback()`` callbacks until the transaction has ended.

        It surrounds what may end the transaction.

        :param only_log: Whether errors of the callbacks are only logged, because another error is
            being raised, or because the caller only tidies up.
        """
        return _AfterEnd(self, only_log)

    def call(self, only_log: bool) -> None:
        """Call them, if no transaction is open any more.

        :raises Exception: the first error of them, once all were called.
        """
        if not self._may_call():
            return
        calls, self._waiting = self._waiting, []
        first: Exception | None = None
        for index, call in enumerate(calls):
            if not self._may_call():  # one has begun a transaction, and left it open
                self._waiting[:0] = calls[index:]
                break
            try:
                call()
            except Exception as error:
                if first is None and not only_log:
                    first = error
                else:
                    _log.exception("%r raised this after the end of a transaction", call)
            except BaseException:
                if rest := calls[index + 1 :]:
                    _log.error("Not called after the end of a transaction: %r", rest)
                raise
        if first is not None:
            raise first


class _AfterEnd(AbstractContextManager[None]):
    """See :meth:`Callbacks.after_end`. A class, for each end of a transaction goes by it."""

    __slots__ = ("_callbacks", "_only_log")

    def __init__(self, callbacks: Callbacks, only_log: bool) -> None:
        self._callbacks = callbacks
        self._only_log = only_log

    def __enter__(self) -> None:
        self._callbacks.ending += 1

    def __exit__(self, type_: object, *error: object) -> None:
        callbacks = self._callbacks
        callbacks.ending -= 1
        if callbacks and not callbacks.ending:
            callbacks.call(self._only_log or type_ is not None)


def check_callback(function: Any, taker: str) -> None:
    """Refuse what can't be called after the end of a transaction.

    :param function: The function.
    :param taker: What it was given to.
    :raises TypeError: if it can't be called, or what it does would come later.
    """
    if not callable(function):
        raise TypeError(
            f"{taker} takes a function without parameters, not {function!r}: write "
            f"{taker[:-1]}lambda: …), or functools.partial(…), for one that has some."
        )
    if runs_later(function):
        raise TypeError(
            f"{taker} takes a plain function, and {function!r} would not run when it is called: "
            "call one that hands it to what runs it, such as asyncio.run()."
        )


def runs_later(function: Any) -> bool:
    """Tell whether a call only makes what is to be awaited, or read, later."""
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )
