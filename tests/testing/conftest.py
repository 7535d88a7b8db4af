"""The fixtures are engines to isolate, ours and SQLAlchemy's, and a raw connection of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from fictive_sqlalchemy import OptInEngine
from fictive_sqlalchemy.testing import isolate
from tests.library import opened


@pytest.fixture
def engine(library: None, url: str) -> Iterator[OptInEngine]:
    with opened(url) as engine:
        yield engine


@pytest.fixture
def stock(url: str, engine: OptInEngine) -> Iterator[sa.Engine]:
    """An engine as SQLAlchemy makes it, on the same tables."""
    stock = sa.create_engine(url)
    yield stock
    stock.dispose()


@pytest.fixture
def raw(engine: OptInEngine) -> Iterator[Any]:
    """A raw connection of an isolated engine."""
    with isolate(engine):
        raw = engine.raw_connection()
        yield raw
        raw.close()
