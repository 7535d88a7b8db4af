"""Fixtures: a filled database, and a session of each kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.active_record.support import KINDS, Store, open_store
from tests.wire import WireProxy


@pytest.fixture(params=KINDS)
def any_store(
    request: pytest.FixtureRequest, wire: WireProxy, wire_url: str, url: str
) -> Iterator[Store]:
    """Each kind of session."""
    yield from open_store(request.param, wire, wire_url, url)


@pytest.fixture
def store(wire: WireProxy, wire_url: str, url: str) -> Iterator[Store]:
    """Opt-in transactions."""
    yield from open_store("opt-in", wire, wire_url, url)
