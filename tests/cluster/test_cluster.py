"""The parts of the cluster's run that need no cluster: see :mod:`tests.cluster`."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cluster import report
from tests.cluster.__main__ import parse
from tests.cluster.judge import judge_moment, judge_rest, judge_stored
from tests.cluster.model import Counted, Work, compared, read_work
from tests.cluster.records import BALANCE, Answer, Change, Moment, Rest, Row, Seen, Stored
from tests.cluster.stage import Scissors, Wanted
from tests.wire import Message

PORTS = {1: "one", 2: "two", 3: "three"}

STORED = Answer("transfer", 10.0, 10.1, 201, "a", 1, 2, 5, "stored", serial=7)
FAILED = replace(STORED, id="b", status=503, outcome="not stored", error="OperationalError")
UNKNOWN = replace(FAILED, id="c", outcome="unknown", error="CommitOutcomeUnknown")
READ = Answer("read", 10.0, 10.1, 200, reads=(Seen(3, "replica 1", 2, True, 10.1),))


def stored(*ids: str, tenant: str | None = None) -> Stored:
    """What a database has in which each of these transfers has moved 5."""
    moved = 5 * len(ids)
    balances = {1: Decimal(BALANCE - moved), 2: Decimal(BALANCE + moved), 3: Decimal(BALANCE)}
    return Stored(balances, [Row(id, 1, 2, 5, tenant) for id in ids])


def moment(*answers: Answer, changes: tuple[Change, ...] = ()) -> Moment:
    """A moment at the second 12, in which two and not one may become the primary."""
    return Moment(
        "primary killed", 10.0, 12.0, 20.0, "killed", "one", "one",
        answers=list(answers), changes=list(changes),
    )  # fmt: skip


@pytest.mark.parametrize("ids", [("a",), ("a", "c")])
def test_what_was_answered_rightly_is_no_failure(ids: tuple[str, ...]) -> None:
    answers = [STORED, FAILED, UNKNOWN, READ]
    assert judge_stored(stored(*ids), answers, settings=False) == ([], [])
    assert judge_moment(moment(*answers), PORTS) == []


def test_a_transfer_that_is_not_there_is_lost() -> None:
    assert judge_stored(stored(), [STORED], settings=False) == ([], ["a"])


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (stored("a", "b"), "transfer b was answered with 'not stored'"),
        (stored("a", "c", "c"), "and it is stored 2 times"),
        (stored("a", "d"), "nobody has asked for it"),
        (Stored(stored("a").balances, []), "account 1 has 99995, and by the ledger 100000"),
        (Stored({1: Decimal(1)}, []), "there is 1 in all instead of 100000"),
        (Stored(stored("a").balances, [Row("a", 1, 2, 6, None)]), "not as it was asked for"),
        (stored("a", tenant="8"), "was stored for tenant '8'"),
    ],
)
def test_what_is_stored_wrongly_is_a_failure(there: Stored, said: str) -> None:
    failures, _ = judge_stored(there, [STORED, FAILED, UNKNOWN], settings=said.endswith("'8'"))
    assert any(said in failure for failure in failures), failures


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (replace(READ, status=0, error="no answer: TimeoutError"), "got no answer of the app"),
        (replace(READ, reads=(*READ.reads, Seen(2, "primary", 1, False))), "went back in time"),
        (replace(STORED, reads=READ.reads), "did not see its own write 7"),
        (replace(FAILED, text="cannot execute UPDATE in a read-only transaction"), "does not say"),
    ],
)
def test_what_is_answered_wrongly_is_a_failure(answer: Answer, said: str) -> None:
    failures = judge_moment(moment(STORED, answer), PORTS)
    assert len(failures) == 1
    assert said in failures[0]


def test_a_promoted_server_is_not_a_replica_any_more() -> None:
    changes = (Change(12.5, "two", "primary"),)
    soon = replace(READ, started=13.0, reads=(Seen(3, "replica 2", 2, False, 13.1),))
    late = replace(READ, started=16.0, reads=(Seen(3, "replica 2", 2, False, 16.1),))
    as_primary = replace(READ, started=16.0, reads=(Seen(3, "primary", 2, False, 16.1),))
    first = replace(STORED, ended=13.0)
    assert judge_moment(moment(first, soon, as_primary, changes=changes), PORTS) == []
    (failure,) = judge_moment(moment(first, late, changes=changes), PORTS)
    assert "two was read from as replica 2, 3.6 s after it became the primary" in failure


def test_the_first_transfer_comes_soon_after_a_new_primary_takes_writes() -> None:
    changes = (Change(12.5, "two", "primary"),)
    (failure,) = judge_moment(moment(replace(STORED, ended=15.0), changes=changes), PORTS)
    assert failure == "the first transfer came 2.50 s after a new primary took writes"
    (failure,) = judge_moment(moment(STORED, changes=changes), PORTS)
    assert failure == "no transfer was stored after a new primary took writes"


def test_what_does_not_rest_is_a_failure() -> None:
    pool = {"in_use": 1, "idle": 2, "wrong": ["not in autocommit"]}
    rest = Rest([{"process": 9, "engines": {"primary": pool}}], ["one: (7, 'idle in transaction')"])
    failures = judge_rest(rest, workers=2)
    assert failures == [
        "1 of 2 processes have told of their pools",
        "process 9, primary: 1 connections are in use",
        "process 9, primary: a connection is not in autocommit",
        "a server process is in a transaction: one: (7, 'idle in transaction')",
    ]


def test_scissors_cut_as_often_as_they_are_told() -> None:
    scissors = Scissors()
    commit = Message(0.0, 1, 1, "frontend", "Query", "COMMIT", True)
    assert scissors(commit) is None
    scissors.cut(2)
    assert scissors(replace(commit, text="SELECT 1")) is None
    assert [scissors(commit) for _ in range(3)] == ["within", "after", None]
    assert scissors.cuts == 2


def test_the_picture_is_whole_and_has_its_labels() -> None:
    changes = (
        Change(1.0, "one", "primary"),
        Change(12.0, "one", "down"),
        Change(13.5, "two", "primary"),
    )
    killed = moment(STORED, replace(FAILED, ended=12.3), changes=changes)
    picture = report.svg([killed, replace(killed, name="a < b & c")], ["one", "two", "three"])
    words = {element.text for element in ElementTree.fromstring(picture).iter()}
    assert {"primary killed", "a < b & c", "one", "two", "a new primary after 1.5 s"} <= words


def test_the_table_takes_its_place_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    page = tmp_path / "more-than-one-server.md"
    page.write_text("Before.\n<!-- cluster -->\nold\n<!-- /cluster -->\nAfter.\n")
    report.write([moment(STORED)], tmp_path, ["one"], Wanted())
    text = page.read_text()
    assert text.startswith("Before.\n<!-- cluster -->\n\n![Requests per second")
    assert "(images/cluster.svg)\n\n| moment |" in text
    assert text.endswith("is answered.\n\n<!-- /cluster -->\nAfter.\n")
    assert "old" not in text
    assert (tmp_path / "images" / "cluster.svg").exists()
    assert all(len(line) <= 120 or line.startswith("|") for line in text.splitlines())


def test_a_run_without_a_synchronous_standby_has_a_place_of_its_own(tmp_path: Path) -> None:
    page = tmp_path / "more-than-one-server.md"
    name = "cluster without a synchronous standby"
    page.write_text(
        f"<!-- cluster -->\nkept\n<!-- /cluster -->\n<!-- {name} -->\n<!-- /{name} -->\n"
    )
    report.write([moment(STORED)], tmp_path, ["one"], Wanted(asynchronous=True))
    kept, _, written = page.read_text().partition(f"<!-- {name} -->")
    assert "kept" in kept
    assert "| moment |" in written
    assert "images" not in written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--moments", "lunch"], "There is no moment 'lunch', only primary killed"),
        (["--seconds", "0"], "--seconds is at least 1."),
        (["--driver", "asyncpg"], "invalid choice: 'asyncpg'"),
    ],
)
def test_a_wrong_argument_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err


def test_pgbouncer_is_restarted_only_where_it_is_used() -> None:
    assert "PgBouncer restarted" not in parse([]).moments
    assert "PgBouncer restarted" in parse(["--through", "pgbouncer"]).moments


def test_the_model_is_compared_with_what_the_servers_count(tmp_path: Path) -> None:
    file = tmp_path / "work"
    work = [Work(at, 0.25, 0.5, 3) for at in (1.0, 2.0, 3.0, 9.0)]
    file.write_text("".join(one.line() for one in work))
    assert read_work(file, 1.0, 4.0) == work[:3]
    assert read_work(tmp_path / "none", 1.0, 4.0) == []
    counted = [Counted(1.0, 4, 1), Counted(1.0, 2, 0), Counted(2.0, 4, 1), Counted(2.0, 2, 0)]
    assert compared(work[:3], counted, 3.0, 2) == (
        "1 requests/s with 3.0 round trips each kept 0.2 connections at work, calculated from the "
        "application's times; the servers counted 1.0. The requests held 0.5 connections, and the "
        "pools had 6 open"
    )
    assert compared([], counted, 3.0, 2) == ""
