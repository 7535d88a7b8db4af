"""Warn while a transaction is open for too long, and tell what its thread is executing."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import ref

from .records import Transaction

#: A function to call with a transaction that is open for too long, and the stack of its thread.
Alarm = Callable[[Transaction, str], object]


class Watchdog:
    """A thread that looks at open transactions a few times in each period.

    The thread is started with the first transaction, and again after a fork. :meth:`stop` ends it.

    :param limit: The number of seconds after which a transaction is open for too long.
    :param alarm: Called once for each such transaction, in the thread of the watchdog.
    """

    def __init__(self, limit: float, alarm: Alarm) -> None:
        self._longest = limit
        self._alarm = alarm
        self._open: dict[int, tuple[Transaction, Any]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0

    def watch(self, transaction: Transaction) -> None:
        """Look at a transaction until it has ended."""
        greenlet: Any = None
        # This imports nothing: greenlets exist only if other code has imported the module.
        if (module := sys.modules.get("greenlet")) is not None:
            greenlet = ref(module.getcurrent())
        if self._thread is None or self._pid != os.getpid():
            self._start()
        self._open[id(transaction)] = transaction, greenlet

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        thread = self._thread
        if thread is not None and self._pid == os.getpid():
            thread.join()
        self._thread = None

    def _start(self) -> None:
        with self._lock:
            if self._stopped.is_set() or (self._thread is not None and self._pid == os.getpid()):
                return
            if self._pid != os.getpid():  # the copied state belongs to the parent
                self._stopped = threading.Event()
                self._open = {}
            self._pid = os.getpid()
            self._thread = threading.Thread(
                target=self._run, name="fictive_sqlalchemy.watchdog", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        stopped = self._stopped
        said: set[int] = set()
        while not stopped.wait(max(0.01, min(1.0, self._longest / 4))):
            for key, (transaction, greenlet) in list(self._open.items()):
                if transaction.outcome != "open":
                    self._open.pop(key, None)
                    said.discard(key)
                elif key not in said and transaction.duration > self._longest:
                    said.add(key)
                    try:
                        self._alarm(transaction, _stack(transaction.thread, greenlet))
                    except Exception:  # for example of a filter of the log
                        traceback.print_exc()  # the thread has to go on


def _stack(thread: int, greenlet: Any) -> str:
    """Return the stack of a thread, or of a greenlet that has switched to another greenlet."""
    frame: FrameType | None = None
    # Public and documented. The name has an underscore because not each Python has the function.
    frames: dict[int, FrameType] = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    waiting = None if greenlet is None else greenlet()
    if waiting is not None:
        frame = waiting.gr_frame  # None for the running greenlet, and without gevent
    frame = frame or frames.get(thread)
    if frame is None:
        return "The thread has ended and left the transaction open."
    return "".join(traceback.format_stack(frame)).rstrip()
