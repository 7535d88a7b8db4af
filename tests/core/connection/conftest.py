"""The fixture is a connection of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fictive_sqlalchemy import OptInConnection, OptInEngine


@pytest.fixture
def connection(engine: OptInEngine) -> Iterator[OptInConnection]:
    connection = engine.connect()
    yield connection
    connection.close()
