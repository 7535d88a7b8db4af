"""``db.report_requests(app)``: a line and a header for each request, command and task."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import click
import pytest
from celery import Celery
from flask import Flask, Response, abort, stream_with_context
from sqlalchemy import exc, select, text, update

from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy.ext.celery import DatabaseTask
from fictive_sqlalchemy.reporting import Report
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.library import Author, fill
from tests.wire import WireProxy

LOGGER = "fictive_sqlalchemy.requests"
TIMES = re.compile(r"\d+\.\d ms")


class Shop:
    """An application whose requests are reported."""

    def __init__(self, app: Flask, db: Database, caplog: pytest.LogCaptureFixture) -> None:
        self.app, self.db, self.caplog = app, db, caplog
        self.reports: list[Report] = []
        self.client = app.test_client()

    def lines(self, level: int = logging.INFO) -> list[str]:
        records = self.caplog.records
        said = [record.getMessage() for record in records if record.levelno == level]
        self.caplog.clear()
        return [TIMES.sub("… ms", line) for line in said]


@pytest.fixture(params=[False, True], ids=["strict", "begin_on_write"])
def shop(
    request: pytest.FixtureRequest,
    make_app: MakeApp,
    url: str,
    wire_url: str,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Shop]:
    fill(url)
    caplog.set_level(logging.INFO, LOGGER)
    db = Database(session_options={"begin_on_write": request.param})
    app = make_app(db, wire_url)
    shop = Shop(app, db, caplog)
    reporter = db.report_requests(
        app, header=True, slow_transaction=0.1, callback=shop.reports.append
    )

    @app.get("/read/<int:id>")
    def read(id: int) -> str:
        return db.session.get_one(Author, id).name

    @app.post("/rename")
    def rename() -> tuple[str, int]:
        db.session.get(Author, 2)
        with db.session.begin():
            db.session.get_one(Author, 1, with_for_update=True).name = "new"
        return "", 204

    @app.get("/fail")
    def fail() -> str:
        with db.session.begin():
            db.session.execute(update(Author).values(age=1))
            raise KeyError

    @app.get("/missing")
    def missing() -> str:
        db.session.get(Author, 77)
        abort(404)

    @app.get("/stream")
    def stream() -> Response:
        def parts() -> Iterator[str]:
            for id in (1, 2, 3):
                yield db.session.get_one(Author, id).name

        return Response(stream_with_context(parts()))

    @app.get("/nothing")
    def nothing() -> str:
        return "nothing"

    yield shop
    reporter.stop()
    assert observing.recorder is None


class TestRequests:
    def test_requests_are_a_line_each(self, shop: Shop, wire: WireProxy) -> None:
        with shop.app.app_context():
            shop.db.engine.connect().close()  # SQLAlchemy asks for the server's version, and so on
        shop.client.get("/nothing")
        with wire.record() as recording:
            shop.client.get("/read/1")
            shop.client.post("/rename")
        assert shop.lines() == [
            "GET /nothing 200: 0 statements, 0 round trips",
            "GET /read/1 200: 1 statement, 1 round trip, connection … ms",
            "POST /rename 204: 3 statements, 5 round trips, 1 transaction … ms (… ms waiting), "
            "connection … ms",
        ]
        assert sum(report.recording.round_trips for report in shop.reports) == (
            recording.round_trips
        )
        assert [report.status for report in shop.reports] == [200, 200, 204]

    def test_requests_that_fail_are_a_line_each(self, shop: Shop) -> None:
        shop.client.get("/fail")
        shop.client.get("/missing")
        shop.client.get("/nowhere")
        failed, missing, nowhere = shop.lines()
        assert failed.startswith("GET /fail 500: 1 statement, 3 round trips, 1 transaction")
        assert missing.startswith("GET /missing 404: 1 statement, 1 round trip")
        assert nowhere == "GET /nowhere 404: 0 statements, 0 round trips"
        assert shop.reports[0].recording.transactions[0].outcome == "rolled back"

    def test_requests_whose_exception_is_not_handled_are_a_line_each(self, shop: Shop) -> None:
        shop.app.config["PROPAGATE_EXCEPTIONS"] = True
        with pytest.raises(KeyError):
            shop.client.get("/fail")
        assert shop.lines()[0].startswith("GET /fail KeyError: 1 statement")
        shop.client.get("/read/1")
        assert shop.lines()[0].startswith("GET /read/1 200: 1 statement, ")

    def test_requests_that_stream_end_with_the_stream(self, shop: Shop) -> None:
        with shop.client.get("/stream") as response:
            assert shop.lines() == []
            assert response.get_data(as_text=True) == "AdaBobCid"
        assert shop.lines() == ["GET /stream 200: 3 statements, 3 round trips, connection … ms"]

    def test_requests_whose_client_goes_away_end_then(self, shop: Shop) -> None:
        with shop.client.get("/stream") as response:
            next(response.iter_encoded())
            shop.app.test_client().get("/nothing")  # in the same thread meanwhile
        lines = shop.lines()
        assert lines[0] == "GET /nothing 200: 0 statements, 0 round trips"
        assert lines[1].startswith("GET /stream 200: ")

    def test_requests_at_once_are_kept_apart(self, shop: Shop) -> None:
        def work(id: int) -> None:
            for _ in range(10):
                shop.app.test_client().get(f"/read/{id}")
                shop.app.test_client().post("/rename")

        threads = [threading.Thread(target=work, args=(id,)) for id in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(shop.reports) == 60
        for report in shop.reports:
            expected = (1,) if "read" in report.name else (2, 3)  # the name is new only once
            assert report.recording.statement_count in expected

    def test_requests_that_are_a_transaction_have_its_end(self, shop: Shop) -> None:
        shop.db.atomic_requests(shop.app)

        @shop.app.post("/atomic")
        def atomic() -> str:
            shop.db.session.execute(update(Author).values(age=1))
            shop.db.session.execute(update(Author).values(age=2))
            return ""

        response = shop.client.post("/atomic")
        assert shop.lines()[0].startswith("POST /atomic 200: 2 statements, 4 round trips")
        assert "4 round trips" in response.headers["Server-Timing"]
        begun_at = shop.reports[0].recording.transactions[0].begun_at
        assert begun_at is not None
        assert (begun_at.filename, begun_at.function) == (__file__, "atomic")
        assert begun_at.call == "atomic_requests"

    def test_requests_have_a_header(self, shop: Shop) -> None:
        header = shop.client.post("/rename").headers["Server-Timing"]
        assert re.sub(r"\d+\.\d", "…", header) == (
            'db;dur=…;desc="3 statements, 5 round trips", transaction;dur=…, waiting;dur=…, '
            "connection;dur=…, pool;dur=…"
        )

    def test_what_the_end_of_a_request_rolls_back_is_part_of_it(self, shop: Shop) -> None:
        @shop.app.get("/unfinished")
        def unfinished() -> str:
            shop.db.session.begin()
            shop.db.session.execute(update(Author).values(age=1))
            return ""

        shop.client.get("/unfinished")
        assert shop.lines()[0].startswith("GET /unfinished 200: 1 statement, 3 round trips")
        assert shop.reports[0].recording.transactions[0].outcome == "rolled back"

    def test_requests_that_wait_in_a_transaction_are_a_warning(self, shop: Shop) -> None:
        @shop.app.get("/slow")
        def slow() -> str:
            with shop.db.session.begin():
                shop.db.session.execute(update(Author).values(age=1))
                time.sleep(0.3)
            return ""

        shop.client.get("/slow")
        while_open, at_the_end = shop.lines(logging.WARNING)
        assert "time.sleep(0.3)" in while_open
        assert "in slow" in while_open
        assert at_the_end.startswith("GET /slow: a transaction was open for … ms, and for … ms")


class TestCommandsAndTasks:
    def test_a_command_is_a_line(self, shop: Shop) -> None:
        @shop.app.cli.command("nightly")
        def nightly() -> None:
            shop.db.session.scalars(select(Author)).all()

        shop.app.test_cli_runner().invoke(args=["nightly"])
        (line,) = shop.lines()
        assert re.match(r".*nightly: 1 statement, 1 round trip, connection", line)

    def test_a_context_of_no_command_is_no_line(self, shop: Shop) -> None:
        with shop.app.app_context():
            shop.db.session.scalars(select(Author)).all()
        assert shop.lines() == []

    def test_a_task_is_a_line(self, shop: Shop) -> None:
        celery = Celery("shop", task_cls=DatabaseTask.of(shop.app))
        celery.conf.task_always_eager = True

        @celery.task(name="shop.mail", shared=False)
        def mail() -> None:
            shop.db.session.scalars(select(Author)).all()

        mail.delay()
        (line,) = shop.lines()
        assert line == "task shop.mail: 1 statement, 1 round trip, connection … ms"


class TestOnAndOff:
    def test_report_requests_is_refused_twice(self, shop: Shop) -> None:
        with pytest.raises(RuntimeError, match="reported already"):
            shop.db.report_requests(shop.app)

    def test_a_stopped_report_says_nothing(self, make_app: MakeApp, url: str, caplog: Any) -> None:
        caplog.set_level(logging.INFO, LOGGER)
        db = Database()
        app = make_app(db, url)
        db.report_requests(app).stop()
        app.test_client().get("/")
        assert caplog.records == []
        assert observing.recorder is None

    def test_bad_input_of_report_requests_changes_nothing(
        self, make_app: MakeApp, url: str
    ) -> None:
        db = Database()
        app = make_app(db, url)
        before = app.wsgi_app
        with pytest.raises(exc.ArgumentError, match="slow_transaction"):
            db.report_requests(app, slow_transaction="1s")  # type: ignore[arg-type]  # pyright: ignore
        assert app.wsgi_app == before
        db.report_requests(app).stop()


def test_report_requests_may_be_called_again_after_stop(
    make_app: MakeApp, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    db = Database()
    app = make_app(db, url)
    db.report_requests(app).stop()
    with pytest.raises(RuntimeError, match="already"), db.report_requests(app):
        db.report_requests(app)
    with db.report_requests(app):
        app.test_client().get("/missing")
    assert [record.getMessage() for record in caplog.records] == [
        "GET /missing 404: 0 statements, 0 round trips"
    ]


def test_a_status_may_be_any_text(make_app: MakeApp, url: str) -> None:
    db = Database()
    app = make_app(db, url)

    @app.get("/odd")
    def odd() -> Response:
        return Response("", status="really odd")

    reports: list[Report] = []
    with db.report_requests(app, callback=reports.append):
        assert app.test_client().get("/odd").status_code == 0
    assert [report.status for report in reports] == [0]


def test_an_application_without_postgresql_is_reported(make_app: MakeApp) -> None:
    db = Database()
    app = make_app(db, "sqlite://")

    @app.get("/read")
    def read() -> str:
        return str(db.session.execute(text("SELECT 1")).scalar())

    reports: list[Report] = []
    with db.report_requests(app, callback=reports.append):
        assert app.test_client().get("/read").text == "1"
    assert [str(report) for report in reports] == ["GET /read 200: 0 statements, 0 round trips"]


def test_commands_of_two_threads_are_a_line_each(
    make_app: MakeApp, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    db = Database()
    app = make_app(db, url)
    barrier = threading.Barrier(2)

    @app.cli.command("wait")
    def wait() -> None:
        barrier.wait(10)
        db.session.execute(text("SELECT 1"))
        barrier.wait(10)

    with db.report_requests(app):

        def run() -> None:
            with click.Context(click.Command("flask"), info_name="flask"), app.app_context():
                click.get_current_context().invoke(wait)

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [TIMES.sub("…", record.getMessage()) for record in caplog.records]
    assert lines == ["flask: 1 statement, 1 round trip, connection …"] * 2
