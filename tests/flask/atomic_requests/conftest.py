"""The fixtures are applications, one for each kind of session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flask.atomic_requests.support import House, open_house
from tests.library import Onlooker, fill


@pytest.fixture
def filled(url: str) -> str:
    fill(url)
    return url


@pytest.fixture
def onlooker(filled: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(filled)
    yield onlooker
    onlooker.close()


@pytest.fixture(params=["db", "scoped", "stock"])
def plain(request: pytest.FixtureRequest, filled: str, wire_url: str) -> Iterator[House]:
    """A house that has not opted in."""
    yield from open_house(request.param, wire_url)


@pytest.fixture
def house(plain: House) -> House:
    plain.owner.atomic_requests(plain.web)
    return plain


@pytest.fixture(params=["db", "scoped"])
def opt_in(request: pytest.FixtureRequest, filled: str, wire_url: str) -> Iterator[House]:
    """A house whose reads are untransacted; it has opted in."""
    for house in open_house(request.param, wire_url):
        house.owner.atomic_requests(house.web)
        yield house
