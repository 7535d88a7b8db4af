"""Several binds in one transaction, and greenlets, each of which has its own unit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import select

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.recording import record
from tests.library import Author, Note, NoteBase, fill
from tests.postgres import PostgresServer
from tests.wire import WireProxy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other(server: PostgresServer, driver: str, wire: WireProxy) -> Iterator[OptInEngine]:
    name = server.create_database()
    engine = create_engine(wire.url(server.url(driver, name)))
    NoteBase.metadata.create_all(engine)
    yield engine
    engine.dispose()
    server.drop_database(name)


def test_the_transaction_of_each_bind_is_recorded(
    engine: OptInEngine, other: OptInEngine, wire: WireProxy
) -> None:
    binds: dict[Any, Any] = {Note: other, Author: engine}
    with (
        OptInSession(binds=binds) as session,
        record(engine, other) as seen,
        record(engine) as of_one,
        wire.record() as recording,
    ):
        with session.begin():
            session.add_all([Author(name="one"), Note(text="one")])
        session.execute(select(Note)).all()
    assert seen.round_trips == recording.round_trips
    assert [transaction.outcome for transaction in seen.transactions] == ["committed"] * 2
    assert len({str(transaction.begun_at) for transaction in seen.transactions}) == 1
    assert [each.verb for each in of_one.sent] == ["BEGIN", "INSERT", "COMMIT"]


def test_a_bind_of_sqlalchemys_own_is_not_recorded(engine: OptInEngine) -> None:
    lite = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    NoteBase.metadata.create_all(lite)
    binds: dict[Any, Any] = {Note: lite, Author: engine}
    with OptInSession(binds=binds) as session, record(session) as seen:
        with session.begin():
            session.add_all([Author(name="one"), Note(text="one")])
        assert session.scalars(select(Note.text)).all() == ["one"]
    lite.dispose()
    assert [each.verb for each in seen.sent] == ["BEGIN", "INSERT", "COMMIT"]


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import json, sys
import gevent
from sqlalchemy import create_engine as _, select, text
from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.reporting import Reporter

DRIVER = sys.argv[2]
if DRIVER == "psycopg2":
    from psycogreen.gevent import patch_psycopg
    patch_psycopg()
reports, warnings = [], []
engine = create_engine(sys.argv[1], pool_size=20)
reporter = Reporter(engine, callback=reports.append, slow_transaction=0.1)
reporter._warn_of_open = lambda transaction, stack: warnings.append(stack)

def work(count):
    with reporter.unit(str(count)), OptInSession(engine) as session:
        for _ in range(count):
            session.execute(text("SELECT pg_sleep(0.005)"))
        with session.begin():
            session.execute(text("SELECT 1"))
            gevent.sleep(0.4 if count == 3 else 0)

with reporter:
    gevent.joinall([gevent.spawn(work, count) for count in range(1, 8)], raise_error=True)
print(json.dumps({
    "counts": {report.name: report.recording.statement_count for report in reports},
    "outcomes": [t.outcome for report in reports for t in report.recording.transactions],
    "stacks": warnings,
}))
"""


@pytest.mark.skipif(
    find_spec("gevent") is None or find_spec("psycogreen") is None, reason="no gevent"
)
def test_each_greenlet_has_its_own_unit(url: str, driver: str) -> None:
    fill(url)
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, url, driver],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["counts"] == {str(count): count + 1 for count in range(1, 8)}
    assert told["outcomes"] == ["committed"] * 7
    (stack,) = told["stacks"]  # of the greenlet that holds it, though it is switched away
    assert "gevent.sleep" in stack or "in work" in stack
