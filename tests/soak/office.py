"""One process of the bank: an engine, its threads, and how its pool is at the end."""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool, QueuePool

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInEngine,
    OptInSession,
    create_engine,
)
from tests.library import assert_rests
from tests.soak.records import Record, Report
from tests.soak.tables import Entry
from tests.soak.teller import LOST, Teller

#: More seconds than any round takes: a thread that is not done by then waits for ever.
PATIENCE = 180.0

POOLS: dict[str, dict[str, Any]] = {
    "one": {"pool_size": 1, "max_overflow": 0, "pool_timeout": PATIENCE},
    "two": {"pool_size": 2, "max_overflow": 1, "pool_timeout": PATIENCE},
    "five": {"pool_size": 5, "max_overflow": 0, "pool_timeout": PATIENCE},
    "none": {"poolclass": NullPool},
}


@dataclass(frozen=True)
class Work:
    """What a process does in a round."""

    url: str
    """The database, through the proxy."""
    seed: int
    name: str
    threads: int
    visits: int
    pool: str
    """A key of :data:`POOLS`."""
    begin_on_write: bool


class _Counting(logging.Handler):
    """Count what is logged, for cut connections are logged often.

    :param counts: Where to count.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__(logging.WARNING)
        self._counts = counts

    def emit(self, record: logging.LogRecord) -> None:
        self._counts[f"{record.levelname} {record.name}: {str(record.msg)[:60]}"] += 1


class Office:
    """One process of the bank.

    :param work: What it does.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._engine: OptInEngine = create_engine(work.url, **POOLS[work.pool])
        self._report = Report()
        self._logged = _Counting(self._report.logged)

    def open(self) -> None:
        """Let the threads do their visits, and wait for their end."""
        work = self._work
        logs = [logging.getLogger(name) for name in ("sqlalchemy", "psycopg")]
        for log in logs:
            log.addHandler(self._logged)
            log.propagate = False
        try:
            self._let_work(work)
        finally:
            for log in logs:
                log.removeHandler(self._logged)
                log.propagate = True

    def _let_work(self, work: Work) -> None:
        tellers = [
            Teller(
                self._engine, work.seed, f"{work.name}.{number}", work.visits, work.begin_on_write
            )
            for number in range(work.threads)
        ]
        deadline = time.monotonic() + PATIENCE
        for teller in tellers:
            teller.start()
        for teller in tellers:
            teller.join(max(0.0, deadline - time.monotonic()))
            if teller.is_alive():
                frame = sys._current_frames().get(teller.ident or 0)
                where = "".join(traceback.format_stack(frame))
                self._report.violations.append(f"{teller.name} waits for ever:\n{where}")
            self._report.add(teller.report)

    def close(self) -> Report:
        """Look how everything is, now that nothing is cut any more.

        :returns: What the process has done and seen.
        """
        gc.collect()  # errors keep sessions alive
        try:
            self._check_pool()
            self._check_health()
        except Exception:
            said = f"{self._work.name}, at the end:\n{traceback.format_exc()}"
            self._report.violations.append(said)
        self._engine.dispose()
        return self._report

    def _check_pool(self) -> None:
        """Check row 19 of the contract: each connection rests."""
        pool = self._engine.pool
        open_transactions = len(TRANSACTION_CONNECTIONS)
        assert open_transactions == 0, f"{open_transactions} transactions are open"
        if not isinstance(pool, QueuePool):
            self._report.pool = "no pool"
            return
        assert pool.checkedout() == 0, f"{pool.checkedout()} connections were not returned"
        pooled = [self._engine.raw_connection() for _ in range(pool.checkedin())]
        living = 0
        try:
            for connection in pooled:
                dbapi: Any = connection.dbapi_connection
                if not dbapi.closed and dbapi.info.transaction_status != LOST:
                    living += 1
                    assert_rests(dbapi)
        finally:
            for connection in pooled:
                connection.close()
        self._report.pool = f"{living} of {len(pooled)} alive, at rest"

    def _check_health(self) -> None:
        """Check that each connection is answered, the first time, though some were cut."""
        size = POOLS[self._work.pool].get("pool_size", 1)
        sessions = [OptInSession(self._engine) for _ in range(size)]
        for session in sessions:
            assert session.scalar(sa.text("SELECT 1")) == 1
        for session in sessions:
            session.close()
        token = f"{self._work.name} is healthy"
        with OptInSession(self._engine) as session, session.begin():
            session.add_all([Entry(token=token, part=part) for part in range(2)])
        self._report.records.append(Record(token, "health", "stored", 2))


def serve(work: Work, pipe: Connection) -> None:
    """Be a process of the bank, which another process tells when it is to close.

    :param work: What it does.
    :param pipe: Sent: anything when the threads are done, and the report at the end. Received:
        anything when the faults have ended.
    """
    office = Office(work)
    office.open()
    pipe.send("done")
    pipe.recv()
    pipe.send(office.close())
