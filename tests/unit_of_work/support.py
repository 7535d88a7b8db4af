"""The tests of units of work check that a session is closed, and run some in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy.orm import Session, scoped_session

from tests.library import checked_out

Factory = Callable[[], Session]


def assert_closed(session: Session, factory: Factory) -> None:
    """Check that nothing of a session is left."""
    assert list(session) == []
    bind: Any = session.get_bind()
    assert checked_out(bind) == 0
    if isinstance(factory, scoped_session):
        assert not factory.registry.has()


def run_in_thread(function: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()
