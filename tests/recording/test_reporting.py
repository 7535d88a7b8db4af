"""A line for each unit of work, the warning of a slow transaction, and the watchdog."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

import pytest
from sqlalchemy import exc, select, text
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, unit_of_work
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy.reporting import Report, Reporter
from tests.library import Author

READ = select(Author.name).where(Author.id == 1)
LOGGER = "fictive_sqlalchemy.requests"


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def reporter(
    engine: OptInEngine, reports: list[Report], caplog: pytest.LogCaptureFixture
) -> Iterator[Reporter]:
    caplog.set_level(logging.INFO, LOGGER)
    with Reporter(engine, slow_transaction=0.2, callback=reports.append) as reporter:
        yield reporter
    assert observing.recorder is None
    assert observing.reporters == ()


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_unit_is_one_line(
    reporter: Reporter, session: OptInSession, reports: list[Report], caplog: Any
) -> None:
    with reporter.unit("nightly") as report:
        session.execute(READ).all()
        with session.begin():
            session.execute(READ).all()
        with reporter.unit("a part of it") as part:
            assert part is None
            session.execute(READ).all()
    session.execute(READ).all()
    assert reports == [report]
    (line,) = said(caplog, logging.INFO)
    assert line.startswith("nightly: 3 statements, 5 round trips, 1 transaction ")
    assert reports[0].duration > 0
    assert reports[0].status is None


def test_a_slow_transaction_that_is_not_kept_is_a_warning(
    reporter: Reporter, session: OptInSession, caplog: Any
) -> None:
    with reporter.unit("nightly"):
        for _ in range(501):
            with session.begin():
                session.execute(READ).all()
        with session.begin():
            session.execute(text("SELECT pg_sleep(0.3)"))
    slow = [line for line in said(caplog, logging.WARNING) if line.startswith("nightly: a trans")]
    assert len(slow) == 1


def test_a_unit_that_fails_names_the_exception(
    reporter: Reporter, session: OptInSession, caplog: Any
) -> None:
    session.execute(READ).all()
    with pytest.raises(exc.DBAPIError), reporter.unit("nightly"):
        session.execute(text("SELECT 1 / 0"))
    assert said(caplog, logging.INFO)[0].startswith("nightly DataError: 1 statement")


def test_a_unit_has_what_is_sent_in_its_own_context(
    reporter: Reporter, sessions: sessionmaker[OptInSession], reports: list[Report]
) -> None:
    barrier = threading.Barrier(3)

    def read(count: int) -> None:
        with sessions() as session:
            for _ in range(count):
                session.execute(READ).all()

    def work(count: int) -> None:
        with reporter.unit(str(count)):
            barrier.wait()
            read(count)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {report.name: len(report.recording.statements) for report in reports}
    assert found == {"1": 1, "2": 2, "3": 3}
    with reporter.unit("with threads"):
        for target in (read, copy_context().run):
            args = (1,) if target is read else (read, 1)
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
    assert len(reports[-1].recording.statements) == 1


def test_a_unit_of_work_is_a_unit(
    reporter: Reporter, sessions: sessionmaker[OptInSession], reports: list[Report]
) -> None:
    @unit_of_work(sessions)
    def nightly(session: OptInSession) -> None:
        session.execute(READ).all()
        with unit_of_work(sessions) as inner:
            inner.execute(READ).all()

    nightly()
    with unit_of_work(sessions) as session:
        session.execute(READ).all()
    assert [len(report.recording.statements) for report in reports] == [2, 1]
    assert all(report.name.startswith("unit_of_work() in ") for report in reports)
    assert __file__ in reports[0].name
    assert reports[0].recording.transactions[0].outcome == "committed"


def test_a_transaction_that_was_open_for_long_is_a_warning(
    reporter: Reporter, session: OptInSession, caplog: Any
) -> None:
    with reporter.unit("nightly"), session.begin():
        session.execute(READ).all()
        time.sleep(0.6)
    warnings = said(caplog, logging.WARNING)
    assert "A transaction has been open for" in warnings[0]  # while it was
    assert "time.sleep(0.6)" in warnings[0]
    assert "begun by begin() in" in warnings[0]
    assert warnings[-1].startswith("nightly: a transaction was open for ")
    assert __file__ in warnings[-1]
    assert len(warnings) == 2


def test_a_slow_statement_is_told_apart_from_waiting(
    reporter: Reporter, session: OptInSession, reports: list[Report]
) -> None:
    with reporter.unit("nightly"), session.begin():
        session.execute(text("SELECT pg_sleep(0.4)"))
    (transaction,) = reports[0].recording.transactions
    assert transaction.waiting < 0.3 < transaction.duration


def test_short_transactions_are_no_warning(
    reporter: Reporter, session: OptInSession, caplog: Any
) -> None:
    with reporter.unit("nightly"):
        for _ in range(3):
            with session.begin():
                session.execute(READ).all()
            time.sleep(0.1)
    time.sleep(0.1)
    assert said(caplog, logging.WARNING) == []


def test_a_callback_that_fails_is_logged(
    engine: OptInEngine, session: OptInSession, caplog: Any
) -> None:
    def fail(report: Report) -> None:
        raise KeyError("mine")

    with Reporter(engine, callback=fail) as reporter, reporter.unit("nightly"):
        session.execute(READ).all()
    (failed,) = said(caplog, logging.ERROR)
    assert failed.startswith("The callback of a report has failed. See ")


def test_the_server_timing_header_has_the_numbers(
    reporter: Reporter, session: OptInSession, reports: list[Report]
) -> None:
    with reporter.unit("nightly"), session.begin():
        session.execute(READ).all()
    header = reports[0].server_timing()
    names = [part.split(";")[0] for part in header.split(", ") if ";dur=" in part]
    assert names == ["db", "transaction", "waiting", "connection", "pool"]
    assert 'desc="1 statement, 3 round trips"' in header


def test_a_reporter_that_is_off_reports_nothing(
    engine: OptInEngine, session: OptInSession, reports: list[Report]
) -> None:
    reporter = Reporter(engine, callback=reports.append)
    with reporter.unit("nightly") as report:
        session.execute(READ).all()
    assert report is None
    with reporter.start():
        reporter.start()
    reporter.stop()
    assert reports == []
    assert observing.recorder is None


def test_a_unit_keeps_a_limited_number_of_statements(
    reporter: Reporter, session: OptInSession, reports: list[Report]
) -> None:
    with reporter.unit("nightly"):
        for _ in range(700):
            session.execute(READ).all()
    recording = reports[0].recording
    assert len(recording.sent) == 500
    assert recording.statement_count == 700
    assert recording.round_trips >= 700


@pytest.mark.parametrize("limit", [0, -1, "1", True, float("nan")])
def test_what_is_no_limit_is_refused(engine: OptInEngine, limit: Any) -> None:
    with pytest.raises(exc.ArgumentError, match="slow_transaction is"):
        Reporter(engine, slow_transaction=limit)


def test_what_is_no_callback_is_refused(engine: OptInEngine) -> None:
    with pytest.raises(exc.ArgumentError, match="callback is"):
        Reporter(engine, callback=1)  # type: ignore[arg-type]  # pyright: ignore


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(exc.ArgumentError, match=r"Reporter\(\) has found no engine"):
        Reporter("engine")
    with pytest.raises(exc.ArgumentError, match=r"Reporter\(\) needs a source"):
        Reporter()
