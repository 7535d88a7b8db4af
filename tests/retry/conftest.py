"""The fixture is an engine with accounts beside the other tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from fictive_sqlalchemy import OptInEngine
from tests.library import opened
from tests.retry.support import Account, BankBase


@pytest.fixture
def engine(library: None, wire_url: str) -> Iterator[OptInEngine]:
    with opened(wire_url, pool_size=20) as engine:
        with engine.begin() as connection:
            BankBase.metadata.create_all(connection, checkfirst=False)
            rows = [{"id": id, "balance": 100} for id in range(1, 5)]
            connection.execute(sa.insert(Account), rows)
        yield engine
