"""What the tests of replicas share: engines with replicas, and which server a read goes to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fictive_sqlalchemy import OptInEngine
from tests.library import assert_at_rest, opened
from tests.postgres import ReplicaServer
from tests.wire import Recording, WireProxy

IN_RECOVERY = select(func.pg_is_in_recovery())


@contextmanager
def opened_with(
    url: str, urls: list[Any], replica: ReplicaServer, **options: Any
) -> Iterator[OptInEngine]:
    with opened(url, replicas=urls, **options) as engine:
        replica.catch_up()
        for one in engine.replicas:
            one.connect().close()
        yield engine
        for one in engine.replicas:
            if replica.is_running and one.health.is_up:
                assert_at_rest(one)


@contextmanager
def recorded(*wires: WireProxy) -> Iterator[list[Recording]]:
    with ExitStack() as stack:
        yield [stack.enter_context(wire.record()) for wire in wires]


def is_on_replica(session: Session) -> bool:
    return bool(session.scalar(IN_RECOVERY))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
