"""The flow of control: the process, thread, greenlet and asyncio task that run the code.

A session belongs to one flow. A block notes the flow that enters it, which is :func:`here`. Later
this flow is compared with the flow of the code that uses or ends the block.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import Any, NamedTuple
from weakref import ref

from .sqlalchemy_private import is_of_asyncio_extension


class Flow(NamedTuple):
    """A flow of control. Two objects are equal if they are the same flow.

    The greenlet and the task are weak references, so that a block that nobody ends can still be
    garbage-collected together with the greenlet or task that has entered it. (Therefore a flow that
    has ended has no hash: compare flows, and do not put them into sets.)
    """

    process: int
    thread: object
    greenlet: object
    task: object

    def includes(self, other: Flow) -> bool:
        """Tell whether another flow may use a block that this flow has entered.

        The same flow may use the block. If this flow is no asyncio task, the tasks in its thread
        and greenlet may use the block, too, because ``asyncio.run()`` may be called inside it. A
        task never includes another task, although a task gets a copy of its parent's context.

        :param other: The other flow, as a rule the result of :func:`here`.
        """
        if self.task is None:
            return self[:3] == other[:3]
        return self == other


class _Thread(threading.local):
    def __init__(self) -> None:
        # The system reuses the ident of a thread that has ended. A mark is an object, which stays
        # alive as long as a Flow refers to it, and so is not reused meanwhile.
        self.mark = object()


_thread = _Thread()


def here() -> Flow:
    """Return the flow of control that calls this function. Sends nothing.

    A copied context (``contextvars``) does not make two flows the same: a new asyncio task, and the
    thread of ``asyncio.to_thread()``, are other flows than their caller. After ``os.fork()``, the
    child is another flow than its parent.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    greenlet: Any = None
    # Nothing is imported here, because greenlets exist only if other code has imported the module.
    if (module := sys.modules.get("greenlet")) is not None:
        greenlet = module.getcurrent()
        # In SQLAlchemy's asyncio extension each call has a greenlet of its own: begin() has one,
        # and the next statement has another. Their parent is the greenlet of the task.
        while is_of_asyncio_extension(greenlet):
            greenlet = greenlet.parent
        greenlet = ref(greenlet)
    return Flow(os.getpid(), _thread.mark, greenlet, task and ref(task))
