"""Which flow of control this is: the process, thread, greenlet and asyncio task.

A session belongs to one flow. Code that opens a block notes :func:`here`, and later compares it
with the flow of whoever wants to use or end that block.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import Any, NamedTuple
from weakref import ref


class Flow(NamedTuple):
    """A flow of control. Two are equal if they are the same flow.

    The greenlet and the task are weak references, so that a block that nobody ends can still be
    collected together with the greenlet or task that has opened it. (Therefore a flow that has
    ended has no hash: compare flows, and do not put them into sets.)
    """

    process: int
    thread: object
    greenlet: object
    task: object

    def includes(self, other: Flow) -> bool:
        """Tell whether another flow may go on with what was begun in this one.

        It may if it is the same flow, or if it is an asyncio task that runs inside: a block that
        was entered outside any task is still open while ``asyncio.run()`` is called in it. A task
        never includes another task, though a task gets a copy of its parent's context.

        :param other: The other flow, as a rule :func:`here`.
        """
        if self.task is None:
            return self[:3] == other[:3]
        return self == other


class _Thread(threading.local):
    def __init__(self) -> None:
        # The system gives the ident of a thread that has ended to a new one. The mark is the
        # object itself, which stays alive as long as a Flow refers to it, so it is never reused.
        self.mark = object()


_thread = _Thread()


def here() -> Flow:
    """Return the flow of control that calls this. Sends nothing.

    A copied context (``contextvars``) does not make it the same flow: neither a new asyncio task
    nor ``asyncio.to_thread()`` is the one that called it. After ``os.fork()`` the child is another
    flow than its parent.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    greenlet: Any = None
    # Without an import, because greenlets exist only if something else has imported them.
    if (module := sys.modules.get("greenlet")) is not None:
        greenlet = module.getcurrent()
        # In SQLAlchemy's asyncio extension each call is a greenlet of its own: begin() is one,
        # and the next statement is another. The one that waits for it is the task's.
        while getattr(greenlet, "__sqlalchemy_greenlet_provider__", False):
            greenlet = greenlet.parent
        greenlet = ref(greenlet)
    return Flow(os.getpid(), _thread.mark, greenlet, task and ref(task))
