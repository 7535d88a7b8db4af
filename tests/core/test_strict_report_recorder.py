"""The recorder of the strict report: its file, its limits, threads, the strict mode, what it costs.

The kinds of differences are in ``test_strict_report.py``.
"""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, select, update
from sqlalchemy.orm import Mapped, Session, column_property, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy._core.differences import Kind
from fictive_sqlalchemy._core.errors import see
from fictive_sqlalchemy.strict_report import Finding, StrictReport, formatted, read_report
from fictive_sqlalchemy.testing import isolate
from tests.calls import calls_of
from tests.library import (
    SESSION_KINDS,
    Author,
    Base,
    Document,
    Note,
    NoteBase,
    Sessions,
    authors,
    opened,
    session_of,
)

LOGGER = "fictive_sqlalchemy.strict_report"
ELSE = "something else in the strict mode than with begin_on_write=True."


class Counting(Base):
    """An author with the number of its documents."""

    __table__ = authors
    count: Mapped[int] = column_property(
        select(sa.func.count(Document.id))
        .where(Document.author_id == authors.c.id)
        .correlate_except(Document)
        .scalar_subquery()
    )


@pytest.fixture
def writing(engine: OptInEngine) -> Sessions:
    return sessionmaker(engine, class_=OptInSession, begin_on_write=True)


@pytest.fixture
def report() -> Iterator[StrictReport]:
    with StrictReport() as report:
        yield report


def kinds(report: StrictReport) -> list[str]:
    return [finding.kind for finding in report.findings()]


def update_and_close(sessions: Sessions) -> None:
    with sessions() as session:
        session.execute(update(Author).values(age=8))


class TestInTheStrictMode:
    @pytest.fixture(params=SESSION_KINDS)
    def strict(self, request: pytest.FixtureRequest, sessions: Sessions) -> Iterator[Any]:
        with session_of(request.param, sessions) as session:
            yield session

    def test_a_read_that_passes_over_what_waits_is_recorded(
        self, strict: Any, report: StrictReport
    ) -> None:
        strict.add(Author(name="new"))
        assert strict.scalars(select(Author).filter_by(name="new")).all() == []
        (finding,) = report.findings()
        assert (finding.kind, finding.call, finding.detail) == (
            "passed over",
            "scalars()",
            "Author",
        )

    def test_each_way_to_read_past_what_waits_is_recorded(
        self, strict: Any, report: StrictReport
    ) -> None:
        ada = strict.get(Author, 1)
        strict.add(Document(title="Waits", author_id=1))
        strict.query(Document).count()
        strict.get(Document, 2)
        strict.refresh(ada)
        strict.merge(Author(id=2, name="Bob"))
        assert len(ada.documents) == 1
        assert [finding.call for finding in report.findings()] == [
            *("count()", "get()", "refresh()", "merge()", "Author.documents"),
        ]

    def test_reads_and_writes_that_pass_over_nothing_are_not_recorded(
        self, strict: Any, report: StrictReport
    ) -> None:
        ada, bob = strict.get(Author, 1), strict.get(Author, 2)
        strict.scalars(select(Author)).all()
        strict.expire(bob)
        ada.age = 31
        assert bob.name == "Bob"  # the row of one object, which nothing that waits changes
        with strict.no_autoflush:
            strict.scalars(select(Author)).all()
        assert strict.autoflush is None
        strict.scalars(select(Author).execution_options(autoflush=False)).all()
        strict.flush()
        strict.execute(update(Author).values(age=9))
        with strict.begin():
            strict.add(Author(name="new"))
            strict.scalars(select(Author)).all()
        strict.add(Author(name="newer"))
        strict.execute(update(Author).values(age=8))
        strict.rollback()
        with strict.begin_nested():
            strict.execute(update(Author).values(age=9))
        assert kinds(report) == []

    def test_a_change_to_the_same_value_is_not_recorded(
        self, strict: Any, report: StrictReport
    ) -> None:
        ada = strict.get(Author, 1)
        ada.age = ada.age
        strict.scalars(select(Author)).all()
        assert kinds(report) == []
        strict.delete(ada)
        strict.add(Document(title="Waits", author_id=2))
        strict.scalars(select(Author)).all()
        (finding,) = report.findings()
        assert finding.detail == "Author, Document"

    def test_a_column_that_is_a_query_is_recorded_as_its_row_is_loaded(
        self, strict: Any, report: StrictReport
    ) -> None:
        """It is loaded together with the row, whichever column is asked for."""
        ada = strict.get(Counting, 1)
        strict.expire(ada)
        strict.add(Document(title="Waits", author_id=1))
        assert (ada.name, ada.count) == ("Ada", 1)
        (finding,) = report.findings()
        assert (finding.kind, finding.call) == ("passed over", "Counting.name")

    def test_text_is_recorded_where_stock_flushes_before_it(
        self, engine: OptInEngine, strict: Any, report: StrictReport
    ) -> None:
        with Session(engine) as stock:
            stock.add(Author(name="new"))
            stock.scalar(sa.text("SELECT 1"))
            has_flushed = not stock.new
        strict.add(Author(name="new"))
        strict.scalar(sa.text("SELECT 1"))
        assert kinds(report) == ["passed over"] * has_flushed

    def test_a_session_without_autoflush_is_not_recorded(
        self, engine: OptInEngine, report: StrictReport
    ) -> None:
        with OptInSession(engine, autoflush=False) as session:
            session.add(Author(name="new"))
            session.scalars(select(Author)).all()
        assert kinds(report) == []

    def test_what_waits_for_a_stock_bind_is_not_recorded(self, report: StrictReport) -> None:
        """SQLAlchemy flushes that, in both modes."""
        stock = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        NoteBase.metadata.create_all(stock)
        for begin_on_write in (False, True):
            with OptInSession(stock, begin_on_write=begin_on_write) as session:
                session.add(Note(text="new"))
                assert session.scalars(select(Note)).all()
                session.execute(update(Note).where(Note.id == 1).values(text="newer"))
                session.rollback()
                with suppress(exc.InvalidRequestError), session.begin():
                    session.add(Note(text=f"newest {begin_on_write}"))
                    session.commit()
        stock.dispose()
        assert kinds(report) == []


class TestSessionsOnAConnection:
    def test_a_session_on_a_connection_is_recorded_once(
        self, engine: OptInEngine, report: StrictReport, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            for begin_on_write in (False, True):
                with engine.connect() as connection:
                    outer = connection.begin()
                    with OptInSession(connection, begin_on_write=begin_on_write) as session:
                        session.scalars(select(Author)).all()
                        session.add(Author(name="new"))
                        session.flush()
                        session.rollback()
                    outer.rollback()
        assert kinds(report) == ["connection"]
        assert len(caplog.records) == 1
        assert "test_isolation()" in str(report)
        assert "No place that was met" in str(report)

    def test_a_connection_from_an_overridden_get_bind_is_recorded(
        self, engine: OptInEngine, report: StrictReport
    ) -> None:
        connection = engine.connect()

        class OnConnection(OptInSession):
            def get_bind(self, *args: Any, **kwargs: Any) -> Any:
                return connection

        with connection, OnConnection(engine) as session:
            session.scalars(select(Author)).all()
        assert kinds(report) == ["connection"]

    def test_isolation_is_not_recorded_as_a_session_on_a_connection(
        self, engine: OptInEngine, writing: Sessions, report: StrictReport
    ) -> None:
        with isolate(engine):
            update_and_close(writing)
            with OptInSession(engine) as session, session.begin():
                session.scalars(select(Author)).all()
        assert kinds(report) == ["write"]


class TestTheReport:
    def test_a_place_is_one_line_however_often_it_is_met(
        self, writing: Sessions, report: StrictReport, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            update_and_close(writing)
        (finding,) = report.findings()
        assert report.times(finding) == 3
        assert [record.name for record in caplog.records] == [LOGGER]
        assert caplog.records[0].levelno == logging.WARNING
        text = str(finding)
        assert caplog.messages == [text + see("strict-report")]
        assert f":{finding.line} in update_and_close: execute() would be stored at once" in text
        assert "`with session.begin():`" in finding.remedy
        assert str(report) == f"{text}\n1 place means {ELSE}"

    def test_an_empty_report_says_that_nothing_was_met(self, report: StrictReport) -> None:
        assert str(report) == f"No place that was met means {ELSE}"

    def test_a_report_can_be_cleared_and_stopped(self, writing: Sessions) -> None:
        report = StrictReport(log=False).start()
        assert report.start() is report
        update_and_close(writing)
        report.clear()
        assert report.findings() == []
        update_and_close(writing)
        report.stop()
        report.stop()
        assert kinds(report) == ["write"]
        report.clear()
        update_and_close(writing)
        assert report.findings() == []
        assert observing.observer is None

    def test_two_reports_at_once_find_the_same(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with StrictReport() as other:
            update_and_close(writing)
        assert other.findings() == report.findings()
        update_and_close(writing)
        (finding,) = report.findings()
        assert (report.times(finding), other.times(finding)) == (2, 1)

    def test_a_report_keeps_a_limited_number_of_places(self, writing: Sessions) -> None:
        with StrictReport(limit=2, log=False) as report:
            for number in range(5):
                namespace: dict[str, Any] = {"session": writing(), "update": update}
                namespace["Author"] = Author
                code = "session.execute(update(Author).values(age=8)); session.close()"
                exec(compile(code, f"code {number}", "exec"), namespace)
        assert len(report.findings()) == 2
        assert report.left_out == 3
        assert "The report is full: places that are not in it were met 3 times." in str(report)

    def test_a_long_transaction_keeps_a_limited_number_of_places(self, writing: Sessions) -> None:
        with StrictReport(limit=5000, log=False) as report, writing() as session:
            session.execute(update(Author).values(age=8))
            namespace = {"session": session, "lock": select(Author.id).with_for_update()}
            for number in range(1200):
                exec(compile("session.execute(lock)", f"code {number}", "exec"), namespace)
            session.close()
        assert len(report.findings()) == 1000

    def test_a_report_does_not_keep_sessions_alive(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        session = writing()
        session.execute(update(Author).values(age=8))
        session.close()
        del session
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is OptInSession]

    def test_threads_are_counted_in_one_report(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        code = "def work(sessions):\n" + "".join(
            f"  session = sessions(); session.execute(lock); session.close()  # {line}\n"
            for line in range(10)
        )
        namespace: dict[str, Any] = {"lock": select(Author.id).with_for_update(read=True)}
        exec(compile(code, "threads", "exec"), namespace)
        threads = [threading.Thread(target=namespace["work"], args=(writing,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(one.kind, one.line) for one in report.findings()] == [
            ("lock", line) for line in range(2, 12)
        ]
        assert {report.times(one) for one in report.findings()} == {4}

    def test_writes_of_listeners_to_a_flush_are_a_part_of_the_flush(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            @event.listens_for(session, "before_flush")
            def archive(session: Session, *_: Any) -> None:
                session.execute(update(Document).values(title="Old"))

            session.add(Author(name="new"))
            session.commit()
        assert kinds(report) == []

    def test_a_flush_of_nothing_in_which_a_listener_writes_is_recorded(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            @event.listens_for(session, "before_flush")
            def archive(session: Session, *_: Any) -> None:
                session.execute(update(Document).values(title="Old"))

            ada = session.get(Author, 1)
            assert ada is not None
            ada.age = ada.age
            session.flush()
        assert kinds(report) == ["flush"]

    def test_writes_of_listeners_to_a_commit_are_a_part_of_the_commit(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            @event.listens_for(session, "before_commit")
            def archive(session: Session) -> None:
                if session.in_nested_transaction():
                    return
                session.add(Author(name="newer"))
                session.flush()
                session.execute(update(Document).values(title="Old"))
                with session.begin_nested():
                    session.execute(update(Document).values(title="Older"))

            session.add(Author(name="new"))
            session.commit()
        assert kinds(report) == []

    def test_callbacks_after_a_commit_are_no_part_of_the_commit(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            def later() -> None:
                session.execute(update(Document).values(title="Old"))
                session.add(Author(name="newer"))
                session.flush()

            session.add(Author(name="new"))
            session.flush()
            session.on_commit(later)
            session.commit()
        assert kinds(report) == ["write", "flush", "flush"]

    def test_another_session_of_a_listener_is_no_part_of_the_flush(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            @event.listens_for(session, "after_flush")
            def archive(*_: Any) -> None:
                update_and_close(writing)

            session.add(Author(name="new"))
            session.commit()
        assert kinds(report) == ["write"]

    def test_a_flush_for_a_read_that_a_listener_refuses_is_recorded(
        self, writing: Sessions, report: StrictReport
    ) -> None:
        with writing() as session:

            @event.listens_for(session, "before_flush")
            def refuse(*_: Any) -> None:
                raise ZeroDivisionError

            session.add(Author(name="new"))
            with pytest.raises(ZeroDivisionError):
                session.scalars(select(Author)).all()
            session.rollback()
        (finding,) = report.findings()
        assert "scalars() flushes the pending changes (and the flush fails) before" in str(finding)


class TestTheFile:
    def test_each_place_is_added_to_the_file(self, writing: Sessions, tmp_path: Path) -> None:
        file = tmp_path / "deeper" / "strict.jsonl"
        with StrictReport(file) as report:
            assert not file.exists()
            update_and_close(writing)
            update_and_close(writing)
            assert read_report(file) == report.findings()
        with StrictReport(file) as another:  # as of another process
            update_and_close(writing)
            with writing() as session:
                session.get(Author, 1, with_for_update=True)
        assert len(file.read_text().splitlines()) == 3
        assert read_report(file) == another.findings()

    def test_a_broken_line_of_the_file_is_left_out(self, writing: Sessions, tmp_path: Path) -> None:
        file = tmp_path / "strict.jsonl"
        file.write_bytes(b'{"kind": "lo\n\xff\n')
        with StrictReport(file) as report:
            update_and_close(writing)
            assert read_report(file) == report.findings()

    def test_a_file_that_cannot_be_written_does_not_stop_the_application(
        self, writing: Sessions, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        with StrictReport(tmp_path / "file" / "strict.jsonl", log=False) as report:
            for _ in range(2):
                update_and_close(writing)
            with writing() as session:
                session.get(Author, 1, with_for_update=True)
        assert sorted(kinds(report)) == ["lock", "write"]
        (message,) = caplog.messages
        assert message.startswith("Places of the strict report are not in its file: ")

    def test_processes_that_write_at_once_lose_no_line_of_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "strict.jsonl"
        work = (
            "import sys; from fictive_sqlalchemy.strict_report import Finding, StrictReport\n"
            "report = StrictReport(sys.argv[1], log=False)\n"
            "for line in range(500): report.add(Finding('lock', 'a' * 3000, line, sys.argv[2], ''))"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", work, str(file), name]) for name in "abc"
        ]
        assert [process.wait(60) for process in processes] == [0, 0, 0]
        assert len(file.read_bytes().splitlines()) == len(read_report(file)) == 1500

    def test_what_is_no_file_of_a_report_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_report(tmp_path / "none")
        for text in ("one", "[1]", "{}", json.dumps({"kind": "other"})):
            (tmp_path / "other").write_text(text)
            with pytest.raises(ValueError, match="no file of a StrictReport"):
                read_report(tmp_path / "other")


def test_findings_are_in_the_order_of_files_and_lines() -> None:
    findings = [
        Finding("lock", str(Path.cwd() / name), line, "work", "get()")
        for name, line in (("b.py", 1), ("a.py", 10), ("a.py", 9))
    ]
    report = StrictReport(log=False)
    for finding in findings:
        report.add(finding)
    lines = str(report).splitlines()
    assert [line.partition(" ")[0] for line in lines[:3]] == ["a.py:9", "a.py:10", "b.py:1"]
    assert formatted(findings[:1]).endswith(f"1 place means {ELSE}")


def test_each_kind_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
    for kind in Kind:
        assert f"`{kind.value}`" in page


class TestWhatItCosts:
    @pytest.mark.parametrize("begin_on_write", [False, True])
    def test_a_read_makes_as_many_calls_before_during_and_after_a_report(
        self, url: str, begin_on_write: bool
    ) -> None:
        with opened(url) as engine, OptInSession(engine, begin_on_write=begin_on_write) as session:
            before = calls_of(lambda: read(session))
            with StrictReport():
                assert calls_of(lambda: read(session)) == before
            assert calls_of(lambda: read(session)) == before
            session.rollback()
            with session.begin():
                inside = calls_of(lambda: read(session))
            with StrictReport(), session.begin():
                assert calls_of(lambda: read(session)) == inside

    def test_a_report_leaves_nothing_behind(self) -> None:
        with StrictReport():
            assert observing.observer is not None
        assert observing.observer is None
        for name in ("after_flush", "after_begin", "after_transaction_end"):
            for listener in getattr(OptInSession().dispatch, name):
                assert "differences" not in str(listener)


def read(session: OptInSession) -> None:
    """Read by key, by a query, and an attribute that has expired."""
    session.expire_all()
    ada = session.get(Author, 1)
    assert ada is not None
    assert session.scalars(select(Author)).all()
    session.expire(ada)
    assert ada.name == "Ada"
    session.execute(sa.text("SELECT 1")).all()
