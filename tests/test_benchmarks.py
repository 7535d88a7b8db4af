"""What the benchmarks compare does on each peer what it says, and so is the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks.behind import WHY
from benchmarks.figures import Figure
from benchmarks.peers import (
    CREATED,
    FOUND,
    INSERT,
    OPERATIONS,
    PEERS,
    READ,
    READ_THEN_UPDATE,
    TEN_READS,
    Operation,
    load_peer,
)
from benchmarks.setting import fill
from benchmarks.worker import Worker
from tests.wire import WireProxy

ROWS = 2500

WRITES = ("INSERT", "UPDATE", "COPY")


@pytest.fixture(params=list(PEERS))
def peer(request: pytest.FixtureRequest) -> str:
    """The name of a peer."""
    name: str = request.param
    return name


@pytest.fixture
def tables(url: str) -> Iterator[sa.Connection]:
    """A connection to a database with the tables."""
    fill(url, ROWS)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        yield connection


@pytest.fixture
def worker(peer: str, wire_url: str, tables: sa.Connection) -> Iterator[Worker]:
    """A process for the peer."""
    with Worker(peer, wire_url) as worker:
        yield worker


def stored(tables: sa.Connection) -> dict[str, Any]:
    """Return what is stored."""
    return {
        "first": tables.scalar(sa.text("SELECT title FROM document WHERE id = 1")),
        "documents": tables.scalar(sa.text("SELECT count(*) FROM document")),
        "tags": tables.scalar(sa.text("SELECT count(*) FROM tag")),
        "notes": tables.scalar(sa.text("SELECT count(DISTINCT title) FROM note")),
    }


BEFORE = {"first": "title 1", "documents": ROWS, "tags": 1, "notes": 0}
AFTER = {
    READ: BEFORE,
    TEN_READS: BEFORE,
    READ_THEN_UPDATE: {**BEFORE, "first": "title 2"},
    FOUND: BEFORE,
    CREATED: {**BEFORE, "tags": 3},
    INSERT: {**BEFORE, "notes": 5000},
}


def test_each_operation_stores_what_it_says(
    peer: str, worker: Worker, wire: WireProxy, tables: sa.Connection
) -> None:
    assert set(AFTER) == set(OPERATIONS)
    state = dict(BEFORE)
    for operation, after in AFTER.items():
        if operation.method in load_peer(peer).fails:
            continue
        worker.do("repeat", operation, 1)  # what a connection begins with is not looked at
        with wire.record() as recording:
            worker.do("repeat", operation, 1)
        state |= {name: value for name, value in after.items() if value != BEFORE[name]}
        assert stored(tables) == state
        assert_atomic(peer, recording.verbs)
        assert wire.transactions_open == 0


def assert_atomic(peer: str, verbs: list[str]) -> None:
    """Check that what writes is in a transaction, or one statement."""
    writes = [verb for verb in verbs if verb in WRITES]
    if peer != "autocommit" and len(writes) > 1:
        assert verbs.index("BEGIN") < verbs.index(writes[0])
        assert "COMMIT" in verbs[-verbs[::-1].index(writes[0]) :]


def test_each_reads_as_many_as_it_says(peer: str, worker: Worker, wire: WireProxy) -> None:
    for count in (1, 10):
        worker.do("repeat", READ, 1)
        with wire.record() as recording:
            worker.do("repeat", Operation("", "reads", (count,)), 1)
        reads = [one for one in recording.statements if "document" in one and "title" in one]
        assert len(reads) == count


def test_each_holds_and_streams_all_objects(peer: str, worker: Worker) -> None:
    assert worker.do("hold", ROWS) > 0  # it asserts itself that it has them
    if "stream_objects" not in load_peer(peer).fails:
        rows, _ = worker.do("stream", "stream_objects")
        assert rows == ROWS


def test_each_serves_in_threads(peer: str, worker: Worker) -> None:
    served, start, end, p99 = worker.do("serve", 20, 0.01, 0.2)
    assert served >= 20
    assert end > start
    assert p99 >= 0.01


def test_each_works_among_objects(peer: str, worker: Worker, tables: sa.Connection) -> None:
    worker.do("among", 100, 2)
    assert stored(tables)["documents"] == ROWS
    changed = tables.scalar(sa.text("SELECT count(*) FROM document WHERE title = 'title 2'"))
    assert changed == 2  # the one that always has it and one of those read before


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in PEERS for method in load_peer(name).fails],
)
def test_what_fails_fails(
    name: str, method: str, wire_url: str, tables: sa.Connection, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(RuntimeError, match="has ended"),
        Worker(name, wire_url) as worker,
    ):
        task = ("stream", method) if "stream" in method else ("repeat", Operation("", method), 1)
        worker.do(*task)
    assert "transaction" in capfd.readouterr().err
