"""Which flow of control this is: threads, asyncio tasks, greenlets and processes."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from contextvars import copy_context
from itertools import combinations
from typing import Any
from weakref import ref

import pytest

from fictive_sqlalchemy._core.flow import Flow, here


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Call a function in a thread of its own; return what it returned."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def greenlets() -> Any:
    return pytest.importorskip("greenlet")


def test_two_calls_in_one_flow_are_equal() -> None:
    assert here() == here()
    assert here().includes(here())


def test_another_thread_is_another_flow() -> None:
    flow = here()
    other: Flow = in_a_thread(here)
    assert other != flow
    assert not flow.includes(other)
    assert not other.includes(flow)


def test_a_thread_that_gets_the_ident_of_one_that_has_ended_is_another_flow() -> None:
    """The system reuses idents at once: the second of two threads as a rule has the first's."""
    by_ident: dict[int, list[Flow]] = {}
    for _ in range(100):
        ident, flow = in_a_thread(lambda: (threading.get_ident(), here()))
        by_ident.setdefault(ident, []).append(flow)
    assert max(map(len, by_ident.values())) > 1
    flows = [flow for flows in by_ident.values() for flow in flows]
    for one, other in combinations(flows, 2):
        assert one != other
        assert not one.includes(other)
        assert not other.includes(one)


def test_a_copied_context_in_another_thread_is_another_flow() -> None:
    flow = here()
    context = copy_context()
    assert not flow.includes(in_a_thread(lambda: context.run(here)))
    assert flow.includes(context.run(here))

    async def run() -> tuple[Flow, Flow]:
        return here(), await asyncio.to_thread(here)

    task, thread = asyncio.run(run())
    assert not task.includes(thread)


def test_a_task_is_another_flow_than_the_task_that_made_it() -> None:
    async def child() -> Flow:
        return here()

    async def run() -> None:
        flow = here()
        assert flow == await child()
        others = await asyncio.gather(child(), child())
        assert others[0] != others[1]
        assert not any(flow.includes(other) or other.includes(flow) for other in others)
        await asyncio.sleep(0)
        assert flow == here()

    asyncio.run(run())


def test_a_flow_outside_any_task_includes_the_tasks_that_run_inside_it() -> None:
    async def run() -> Flow:
        return here()

    flow = here()
    task = asyncio.run(run())
    assert flow != task
    assert flow.includes(task)
    assert not task.includes(flow)
    assert not flow.includes(in_a_thread(lambda: asyncio.run(run())))


def test_a_callback_of_the_event_loop_is_another_flow_than_its_task() -> None:
    async def run() -> None:
        flow = here()
        called: asyncio.Future[Flow] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: called.set_result(here()))
        assert not flow.includes(await called)

    asyncio.run(run())


def test_another_greenlet_is_another_flow() -> None:
    flow = here()
    other: Flow = greenlets().greenlet(here).switch()
    assert other != flow
    assert not flow.includes(other)
    assert not other.includes(flow)


def test_calls_of_an_async_session_are_in_the_flow_of_their_task() -> None:
    """SQLAlchemy makes a greenlet for each; that a later one has its address means nothing."""
    greenlets()
    from sqlalchemy.util import await_only, greenlet_spawn

    async def wait() -> Flow:
        await asyncio.sleep(0)
        return here()

    def call() -> list[Flow]:
        return [here(), await_only(wait()), here()]

    async def run() -> None:
        flow = here()
        assert await greenlet_spawn(call) == [flow, flow, flow] == await greenlet_spawn(call)
        one, two = await asyncio.gather(greenlet_spawn(here), greenlet_spawn(here))
        assert flow != one != two != flow

    asyncio.run(run())


def test_a_flow_keeps_neither_its_greenlet_nor_its_task_alive() -> None:
    greenlet = greenlets().greenlet(here)
    of_greenlet = greenlet.switch()
    seen = ref(greenlet)
    del greenlet
    gc.collect()
    assert seen() is None

    async def run() -> tuple[Flow, Any]:
        task = asyncio.current_task()
        assert task is not None
        return here(), ref(task)

    of_task, task = asyncio.run(run())
    gc.collect()
    assert task() is None
    # And they are still what they were, each equal to itself alone.
    assert of_greenlet == of_greenlet
    assert of_task == of_task
    assert of_greenlet != greenlets().greenlet(here).switch()
    assert of_task != asyncio.run(run())[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
def test_a_forked_child_is_another_flow() -> None:
    flow = here()
    pid = os.fork()
    if not pid:
        os._exit(0 if not flow.includes(here()) and not here().includes(flow) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
