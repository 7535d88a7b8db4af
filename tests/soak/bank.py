"""The bank: threads and processes that move money, and a proxy that cuts their connections.

A *round* has a seed. The seed decides how many threads there are, which pool they share, how often
the proxy cuts, what each thread does, and what is done to which message of a connection. After a
round it is checked that

* the money is conserved, and explained by the ledger;
* what was answered with success is stored, once and as a whole;
* what was answered with an error is not stored. Excepted are ``CommitOutcomeUnknown``, and a lost
  connection during a single statement in autocommit, whose outcome nobody can know either: of
  these all or nothing is stored;
* no two tokens were written by one transaction, and no token by two;
* no transaction is open, in the processes or on the server;
* each connection of a pool rests in autocommit, and the next statement of each is answered.

Threads are not repeated to the last detail by a seed. A round of few threads often is, and one
thread (``--threads 1 --processes 0``) nearly always.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from random import Random

import sqlalchemy as sa

from tests.postgres import PostgresServer
from tests.soak.faults import Faults
from tests.soak.judge import judge, wait_until_idle
from tests.soak.office import PATIENCE, POOLS, Office, Work, serve
from tests.soak.records import Report
from tests.soak.tables import fill
from tests.wire import WireProxy


@dataclass(frozen=True)
class Settings:
    """What the seed of a round decides, where the command line does not."""

    threads: int | None = None
    """The threads of each process."""
    processes: int = 2
    """The processes beside the one that runs the proxy."""
    visits: int = 25
    """How many sessions each thread opens, one after the other."""


@dataclass
class Round:
    """What came of a round."""

    seed: int
    said: str
    """What it was like, in one line."""
    report: Report
    faults: dict[str, int] = field(default_factory=dict[str, int])


def run_round(
    server: PostgresServer,
    driver: str,
    seed: int,
    *,
    begin_on_write: bool = False,
    settings: Settings | None = None,
) -> Round:
    """Run one round, on a database of its own.

    :param server: The server.
    :param driver: ``"psycopg2"`` or ``"psycopg"``.
    :param seed: The seed.
    :param begin_on_write: Whether the sessions have this option.
    :param settings: What the seed does not decide.
    :returns: What came of it. It has failed if its report has violations.
    """
    settings = settings or Settings()
    random = Random(seed)
    threads = random.choice((1, 2, 4, 6))
    rate = random.choice((0.002, 0.01, 0.02, 0.05))
    pools = [random.choice(sorted(POOLS)) for _ in range(1 + settings.processes)]
    threads = settings.threads or threads
    database = server.create_database()
    url = server.url(driver, database)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1)
    try:
        fill(engine)
        with WireProxy(server.host, server.port) as proxy:
            faults = Faults(proxy, url, seed, rate)
            works = [
                Work(proxy.url(url), seed, f"{n}", threads, settings.visits, pool, begin_on_write)
                for n, pool in enumerate(pools)
            ]
            report = _run(works, proxy, faults, engine)
        report.violations += judge(engine, report)
    finally:
        engine.dispose()
        server.drop_database(database)
    mode = "begin_on_write" if begin_on_write else "strict"
    said = f"{mode}, {threads} threads on each of the pools {', '.join(pools)}, rate {rate}"
    return Round(seed, said, report, dict(faults.done))


def _run(works: list[Work], proxy: WireProxy, faults: Faults, engine: sa.Engine) -> Report:
    """Let all processes work through the proxy; the first one of them is this one."""
    office = Office(works[0])
    others = [_Other(work) for work in works[1:]]
    faults.start()
    try:
        office.open()
        for other in others:
            other.wait()
    finally:
        faults.stop()
    proxy.quiesce()
    busy = wait_until_idle(engine)
    report = office.close()
    pools = [report.pool]
    for other in others:
        of_other = other.close()
        report.add(of_other)
        pools.append(of_other.pool)
    report.pool = "; ".join(pools)
    report.violations += busy
    return report


class _Other:
    """Another process of the bank, seen from this one.

    It is spawned and not forked: this process has threads.
    """

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        self._work = work
        self._pipe: Connection
        self._pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=serve, args=(work, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._has_failed = False

    def wait(self) -> None:
        """Wait until its threads are done."""
        self._has_failed = self._receive() is None

    def close(self) -> Report:
        """Let it look at its pool, and return what it has done and seen."""
        answer: object = None
        if not self._has_failed:
            self._pipe.send("close")
            answer = self._receive()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        if isinstance(answer, Report):
            return answer
        said = f"process {self._work.name} has ended with exit code {self._process.exitcode}"
        return Report(violations=[said])

    def _receive(self) -> object:
        try:
            return self._pipe.recv() if self._pipe.poll(PATIENCE + 30) else None
        except EOFError:
            return None
