"""What the benchmarks compare does on each peer what it says, and so is the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from benchmarks import behind, contention, growth, quiet, summary, waiting
from benchmarks.behind import times
from benchmarks.figures import Figure
from benchmarks.peers import (
    BLOCK_OF_TWO,
    CREATED,
    CREATED_INSIDE,
    INSERT,
    LAZY_LOADS,
    OPERATIONS,
    PAGINATE,
    PEERS,
    READ,
    READ_THEN_UPDATE,
    STORE,
    TEN_READS,
    TEN_READS_AND_UPDATE,
    UPDATE_BY_KEY,
    Operation,
    load_peer,
)
from benchmarks.places import fill as write_places
from benchmarks.setting import fill
from benchmarks.worker import Worker
from tests.postgres import PostgresServer
from tests.wire import WireProxy

ROWS = 2500

# What one time of an operation adds.
ADDED: dict[Operation, dict[str, int]] = {
    STORE: {"notes": 1},
    BLOCK_OF_TWO: {"notes": 1},
    CREATED: {"tags": 1},
    CREATED_INSIDE: {"tags": 1},
    INSERT: {"notes": 5000},
}

# How many statements it reads documents or books with.
READS: dict[Operation, int] = {
    READ: 1,
    TEN_READS: 10,
    LAZY_LOADS: 1,
    PAGINATE: 1,
    READ_THEN_UPDATE: 1,
    BLOCK_OF_TWO: 1,
    TEN_READS_AND_UPDATE: 10,
}

# The update of what need not be read, which the hot row is about.
UPDATE_KNOWN = Operation("update alone", "update_known")

# What it sends beside reads; and on which peers without BEGIN and COMMIT, one of which is never
# atomic.
WRITES: dict[Operation, list[str]] = {
    STORE: ["INSERT"],
    READ_THEN_UPDATE: ["UPDATE"],
    TEN_READS_AND_UPDATE: ["UPDATE"],
    UPDATE_KNOWN: ["UPDATE"],
    UPDATE_BY_KEY: ["UPDATE"],
    BLOCK_OF_TWO: ["UPDATE", "INSERT"],
}
ALONE: dict[str, set[Operation]] = {
    "ours": {STORE, READ_THEN_UPDATE, TEN_READS_AND_UPDATE, UPDATE_KNOWN},
    "autocommit": set(WRITES),
    "django": {STORE},
    "peewee": {STORE},
    "by_hand_alone": set(WRITES),
}

STORED = """
SELECT
    (SELECT count(*) FROM document) AS documents,
    (SELECT count(*) FROM tag) AS tags,
    (SELECT count(*) FROM note) AS notes
"""


@dataclass(frozen=True)
class Bench:
    """A peer at work on a database of its own, to which only the proxy leads."""

    peer: str
    worker: Worker
    tables: sa.Connection

    def fails(self, method: str) -> bool:
        """Tell whether a method is known to fail."""
        return method in load_peer(self.peer).fails

    def stored(self) -> dict[str, int]:
        """Return how many rows are stored."""
        return dict(self.tables.execute(sa.text(STORED)).one()._mapping)

    def titles(self) -> str:
        """Return the titles of the documents that an operation may update, in one text."""
        select = "SELECT string_agg(title, ',' ORDER BY id) FROM document WHERE id <= 10"
        titles: str = self.tables.scalars(sa.text(select)).one()
        return titles


@pytest.fixture(scope="module", params=list(PEERS))
def bench(
    request: pytest.FixtureRequest, server: PostgresServer, wire: WireProxy, driver: str
) -> Iterator[Bench]:
    """One of the peers; its process is there for all tests."""
    database = server.create_database()
    url = server.url(driver, database)
    fill(url, ROWS)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with Worker(request.param, wire.url(url)) as worker, engine.connect() as connection:
        yield Bench(request.param, worker, connection)
    server.drop_database(database)


@pytest.mark.parametrize(
    "operation", [*OPERATIONS, TEN_READS_AND_UPDATE, UPDATE_KNOWN], ids=lambda one: one.title
)
def test_an_operation_stores_what_it_says(
    bench: Bench, operation: Operation, wire: WireProxy
) -> None:
    if bench.fails(operation.method):
        pytest.skip("it fails: see the last test")
    bench.worker.do("repeat", operation, 1)  # what a connection begins with is not looked at
    before, titles = bench.stored(), bench.titles()
    with wire.record() as recording:
        bench.worker.do("repeat", operation, 1)
    after = bench.stored()
    added = {name: count - before[name] for name, count in after.items() if count != before[name]}
    assert added == ADDED.get(operation, {})
    writes = WRITES.get(operation, [])
    assert (bench.titles() != titles) == ("UPDATE" in writes)
    assert wire.transactions_open == 0
    selects = [one for one in recording.statements if one.startswith("SELECT")]
    reads = [one for one in selects if "title" in one and "count(" not in one.lower()]
    assert len(reads) == READS.get(operation, 0)
    if writes:
        alone = operation in ALONE.get(bench.peer, ())
        stored = writes if alone else ["BEGIN", *writes, "COMMIT"]
        assert [one for one in recording.verbs if one != "SELECT"] == stored


def test_the_benchmark_reads_the_author_of_ten_books_each_with_a_statement(
    bench: Bench, wire: WireProxy
) -> None:
    bench.worker.do("repeat", LAZY_LOADS, 1)
    with wire.record() as recording:
        bench.worker.do("repeat", LAZY_LOADS, 1)
    loads = [one for one in recording.statements if one.startswith("SELECT") and "name" in one]
    assert len(loads) == 10
    assert all("author" in one for one in loads)


def test_the_benchmark_holds_and_streams_all_objects(bench: Bench) -> None:
    bench.worker.do("hold", ROWS)  # which asserts that it has them all, and fails without
    if not bench.fails("stream_objects"):
        rows, _ = bench.worker.do("stream", "stream_objects")
        assert rows == ROWS


def test_the_benchmark_serves_in_more_threads_than_the_pool_has_connections(
    bench: Bench, wire: WireProxy
) -> None:
    before = bench.stored()
    served, start, end, p99 = bench.worker.do("serve", 20, 0.01, 0.2)
    assert served >= 20
    assert end > start
    assert p99 >= 0.01
    assert bench.stored() == before
    wire.quiesce()
    assert wire.connections == 0  # all that it opened are closed


def test_the_benchmark_updates_one_row_in_many_threads(bench: Bench, wire: WireProxy) -> None:
    before, titles = bench.stored(), bench.titles()
    assert bench.worker.do("contend", 5, 0.1) > 0
    assert bench.stored() == before
    assert bench.titles() != titles
    wire.quiesce()
    assert wire.connections == 0


def test_the_benchmark_updates_among_objects_that_were_read(bench: Bench) -> None:
    titles = bench.titles()
    read, update = bench.worker.do("among", 100, 2)
    assert read > 0
    assert update > 0
    assert bench.titles() != titles


@pytest.mark.parametrize(
    ("peer", "method"), [(peer, method) for peer in PEERS for method in load_peer(peer).fails]
)
def test_what_is_said_to_fail_fails(
    peer: str, method: str, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(url, ROWS)
    task: tuple[Any, ...] = ("repeat", Operation("", method), 1)
    if method == "stream_objects":
        task = ("stream", method)
    with Worker(peer, url) as worker, pytest.raises(RuntimeError, match="has ended"):
        worker.do(*task)
    why = "paginate" if method == "paginate" else "transaction"
    assert why in capfd.readouterr().err


def figure(value: float | None, low: float | None = None, high: float | None = None) -> Figure:
    return Figure("client CPU", "read by key", "psycopg2", "ours", value, low, high)


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        (figure(4), figure(2), 2.0),
        (figure(4, 3, 5), figure(2, 1, 2.5), 2.0),
        (figure(4, 2, 5), figure(2, 1, 2.5), None),  # it may be the spread
        (figure(2.05), figure(2), None),
        (figure(2), figure(4), None),
        (figure(None), figure(4), None),
        (figure(2), figure(None), None),
    ],
)
def test_where_we_are_behind_is_found_in_the_figures(
    ours: Figure, other: Figure, expected: float | None
) -> None:
    assert times(ours, other) == expected


@pytest.mark.parametrize("kind", [waiting.SHARE, contention.RATIO])
def test_less_is_behind_where_more_is_better(kind: str) -> None:
    less, more = (replace(figure(value), kind=kind) for value in (0.4, 0.8))
    assert times(less, more) == 2.0
    assert times(more, less) is None


def test_the_list_of_where_we_are_behind_says_with_how_many_threads() -> None:
    ours = replace(figure(2.5), kind=contention.RATIO, at=contention.THREADS)
    text = behind.text([ours, replace(ours, peer="by_hand_alone", value=7.5)])
    assert "psycopg by hand, one statement in 1 of 1 figures, by up to 3.00 times" in text
    assert "with 20 threads, psycopg2" in text


def test_what_was_measured_is_written_into_its_places(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("a\n<!-- measured: one -->\nold\n<!-- end -->\nb\n", encoding="utf-8")
    for part in ("new", "", "newer"):
        write_places(file, {"one": part})
        filled = f"\n{part}\n\n" if part else ""
        assert file.read_text(encoding="utf-8") == (
            f"a\n<!-- measured: one -->\n{filled}<!-- end -->\nb\n"
        )
    with pytest.raises(ValueError, match="no place for 'other'"):
        write_places(file, {"other": "part"})


def test_readme_has_ours_and_stocks_figures_for_both_drivers() -> None:
    ours = [
        replace(figure(value), kind=kind, driver=driver, peer=peer)
        for kind, values in (("client CPU", (0.9, 1.0)), ("round trips", (1.0, 3.0)))
        for driver in ("psycopg2", "psycopg")
        for peer, value in zip(("ours", "stock"), values, strict=True)
    ]
    table = summary.table(ours, summary.ROWS).splitlines()
    assert table[0] == "|  | psycopg2 | psycopg 3 |"
    assert "| round trips, read by key | 1 (stock 3) | 1 (stock 3) |" in table
    assert "| client CPU, read by key (stock = 1) | 0.90 | 0.90 |" in table


def test_readme_has_the_largest_ratio_of_the_cpu_time_of_each_driver() -> None:
    ratios = {
        ("psycopg2", CREATED_INSIDE): 1.3,
        ("psycopg2", UPDATE_BY_KEY): 1.2,
        ("psycopg2", STORE): 1.1,
        ("psycopg", CREATED_INSIDE): 1.1,
        ("psycopg", STORE): 1.2,
    }
    figures = [
        replace(figure(value), what=one.title, driver=driver)
        for (driver, one), value in ratios.items()
    ]
    titles = [row.title for row in summary.rows_of_readme(figures)]
    added = "client CPU, get or create, created in a block (stock = 1)"
    assert (
        titles.index(added) == titles.index("client CPU, a block of two statements (stock = 1)") + 1
    )
    titles.remove(added)
    assert titles == [row.title for row in summary.ROWS]  # which has the largest of psycopg 3
    assert summary.rows_of_readme([]) == list(summary.ROWS)


def test_the_page_says_nothing_about_instructions_that_were_not_counted() -> None:
    page = pytest.importorskip("benchmarks.page", reason="the plots need matplotlib")
    assert page.parts([], [])["instructions"] == ""
    counted = replace(figure(5000), kind="client instructions")
    text = page.parts([], [counted])["instructions"]
    assert text.startswith("These are the instructions that the client executes")
    assert "| fictive-sqlalchemy | 5,000 |" in text


def test_each_picture_of_the_page_says_by_itself_what_it_shows() -> None:
    page = Path(__file__).parent.parent / "docs" / "benchmarks.md"
    texts = re.findall(r"!\[([^]]+)\]", page.read_text(encoding="utf-8"))
    assert len(texts) == len(set(texts)) == 9
    assert all(text.startswith(("Bars for ", "Lines for ")) for text in texts)


class SlowMachine:
    """A machine that becomes slower, several times; its workers tell how long their tasks take.

    :param costs: How long a task takes at first, by the name of the peer.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.tasks = 0
        self.workers = {peer: WorkerOfSlowMachine(self, peer, cost) for peer, cost in costs.items()}

    def slowness(self) -> float:
        """Return how much slower the machine is now; once for each task."""
        self.tasks += 1
        return 1.0 + self.tasks // 40


class WorkerOfSlowMachine:
    """What :class:`SlowMachine` has instead of a process."""

    def __init__(self, machine: SlowMachine, peer: str, cost: float) -> None:
        self.machine, self.peer, self.cost = machine, peer, cost

    def do(self, task: str, *_: Any) -> float | list[float]:
        """Return the time that the task takes now."""
        seconds = self.cost * self.machine.slowness()
        return seconds if task == "cpu" else [seconds, 2 * seconds]


def test_a_machine_that_becomes_slower_does_not_change_how_the_cost_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = SlowMachine({"ours": 0.5, "by_hand": 0.1})
    unit = WorkerOfSlowMachine(machine, "by_hand", 0.1)
    monkeypatch.setattr(growth, "workers", lambda *_: nullcontext(machine.workers))
    monkeypatch.setattr(growth, "Worker", lambda *_: nullcontext(unit))
    figures = list(growth.measure("psycopg2", "", list(machine.workers), "by_hand", 2))
    assert machine.slowness() > 5
    for one in figures:
        expected = {"ours": 5.0, "by_hand": 1.0}[one.peer]
        expected *= 2.0 if one.kind == growth.UPDATE_AMONG else 1.0
        assert one.value == pytest.approx(expected)
    assert {one.kind for one in figures} == set(growth.SIZES)


@pytest.mark.parametrize(
    ("began_quiet", "checks", "stolen", "expected"),
    [
        (True, [0.0, quiet.CPUS], [0.0, quiet.STOLEN], []),
        (True, [None], [], []),
        (False, [0.0], [0.0], ["when the run began"]),
        (True, [0.0, 0.94, 0.5], [], ["up to 0.9 CPUs during the run, in 2 of 3 checks"]),
        (True, [0.0], [0.0, 0.06, 0.12], ["took up to 0.12 CPUs from this one while 2 of 3 kinds"]),
        (False, [1.0], [0.3], ["when the run began", "up to 1.0 CPUs", "up to 0.30 CPUs"]),
    ],
)
def test_the_page_says_where_the_machine_was_not_quiet(
    began_quiet: bool, checks: list[float | None], stolen: list[float], expected: list[str]
) -> None:
    found = list(quiet.disturbances(began_quiet, checks, stolen))
    assert len(found) == len(expected)
    assert all(part in sentence for part, sentence in zip(expected, found, strict=True))


def test_a_run_waits_until_the_machine_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [2.0, 1.0, 0.0]
    pauses: list[float] = []
    monkeypatch.setattr("os.getloadavg", lambda: (loads.pop(0), 0.0, 0.0))
    monkeypatch.setattr("time.sleep", pauses.append)
    assert quiet.wait(60.0)
    assert len(pauses) == 2


def test_a_run_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 0.0, 0.0))
    assert not quiet.wait(0.0)


def test_a_machine_may_not_tell_how_busy_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quiet, "_STAT", tmp_path / "stat")
    assert quiet.cpus_in_use() is None
    (tmp_path / "stat").write_text("cpu  100 0 100 900 9 0 0 7 0 0\ncpu0 100 0 100 900 9\n")
    monkeypatch.setattr(quiet, "_CHECK", 0.01)
    assert quiet.cpus_in_use() == 0.0


def test_the_machine_is_checked_before_the_first_kind_of_figures_and_after_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stat = tmp_path / "stat"
    clock = [0, 0, 0]  # the seconds, and the ticks that are busy and stolen
    monkeypatch.setattr(quiet, "_STAT", stat)
    monkeypatch.setattr("time.monotonic", lambda: float(clock[0]))
    monkeypatch.setattr("time.sleep", lambda _: happen(busy=0, stolen=50, seconds=2))
    monkeypatch.setattr("os.sysconf", lambda _: 100)

    def happen(busy: int, stolen: int, seconds: int) -> None:
        for place, more in enumerate((seconds, busy, stolen)):
            clock[place] += more
        stat.write_text(f"cpu  {clock[1]} 0 0 900 9 0 0 {clock[2]} 0 0\n")

    def kind(stolen: int) -> Iterator[Figure]:
        happen(busy=1000, stolen=stolen, seconds=10)
        yield figure(1.0)

    happen(0, 0, 0)
    watch = quiet.Watch()
    assert len(list(watch.over([kind(0), kind(200)]))) == 2
    assert watch.checks == [0.25, 0.25, 0.25]  # what is stolen meanwhile is not ours
    assert watch.stolen == [0.0, 0.2]
