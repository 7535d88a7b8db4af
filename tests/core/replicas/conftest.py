"""The fixtures are engines with one replica and with two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.core.replicas.support import opened_with
from tests.postgres import ReplicaServer
from tests.wire import WireProxy


@pytest.fixture
def replica_wires(replica: ReplicaServer) -> Iterator[list[WireProxy]]:
    """Two ways to the replica, which stand for two replicas."""
    with ExitStack() as stack:
        yield [stack.enter_context(WireProxy(replica.host, replica.port)) for _ in range(2)]


@pytest.fixture
def replica_urls(
    replica: ReplicaServer, replica_wires: list[WireProxy], driver: str, database: str
) -> list[str]:
    return [wire.url(replica.url(driver, database)) for wire in replica_wires]


@pytest.fixture
def engine(wire_url: str, replica_urls: list[str], replica: ReplicaServer) -> Iterator[OptInEngine]:
    """An engine with one replica, which has what the primary has."""
    with opened_with(wire_url, replica_urls[:1], replica) as engine:
        yield engine


@pytest.fixture
def two(wire_url: str, replica_urls: list[str], replica: ReplicaServer) -> Iterator[OptInEngine]:
    """An engine with two replicas."""
    with opened_with(wire_url, replica_urls, replica) as engine:
        yield engine


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session
