"""Our panel for Flask-DebugToolbar, as it is sent and as a real browser shows it."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path
from threading import Thread

# Its routes can't be added any more once an application has a toolbar.
import flask_debugtoolbar.panels.sqlalchemy  # noqa: F401
import pytest
from flask import Flask
from flask_debugtoolbar import DebugToolbarExtension
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column
from werkzeug.serving import make_server

from fictive_sqlalchemy._core import observing
from tests.flask.conftest import MakeApp
from tests.flask.support import Database

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

#: Opens the panel, and says where its bars are.
LOOK = """
<script>
addEventListener("load", () => {
    const panel = document.getElementById("flDebugTransactionsPanel-content");
    document.querySelector("#flDebugPanelList a.flDebugTransactionsPanel").click();
    const rows = [...panel.querySelectorAll(".fsa-row")].map(row => ({
        sql: row.querySelector("code").textContent,
        line: row.querySelector(".fsa-line").getBoundingClientRect().toJSON(),
        bars: [...row.querySelectorAll(".fsa-line span")].map(bar => ({
            kind: bar.className, color: getComputedStyle(bar).backgroundColor,
            ...bar.getBoundingClientRect().toJSON()})),
    }));
    document.title = JSON.stringify(rows);
});
</script>
"""


@pytest.fixture
def app(make_app: MakeApp, url: str) -> Flask:
    db = Database()
    app = make_app(
        db,
        url,
        SECRET_KEY="secret",
        DEBUG_TB_ENABLED=True,
        DEBUG_TB_PANELS=["fictive_sqlalchemy.ext.debugtoolbar.TransactionsPanel"],
    )
    DebugToolbarExtension(app)

    class User(db.Model):
        __tablename__ = "users"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    # Each visit writes another name: a browser may ask for a page twice.
    visits = count()

    @app.get("/")
    def show() -> str:
        db.session.scalars(db.select(User)).all()
        with db.session.begin():
            db.session.get_one(User, 1, populate_existing=True).name = f"<Ada {next(visits)}>"
            time.sleep(0.2)
        return f"<html><head>{LOOK}</head><body>hello</body></html>"

    @app.get("/fail")
    def fail() -> str:
        db.session.add(User(id=1, name="new"))
        db.session.commit()
        return ""

    @app.errorhandler(IntegrityError)
    def taken(error: IntegrityError) -> str:
        return "<html><body>taken</body></html>"

    with app.app_context():
        db.create_all()
        db.session.add(User(name="ada"))
        db.session.commit()
    return app


def test_the_panel_has_what_was_sent_in_order(app: Flask) -> None:
    page = html.unescape(app.test_client().get("/").text)
    sent = re.findall(r"<code[^>]*>(\w+)", page)
    assert sent == ["SELECT", "BEGIN", "SELECT", "UPDATE", "COMMIT"]
    assert re.search(r"5 round trips, 1 transaction, 2\d\d\.\d ms waiting", page)
    assert "in show" in page
    assert observing.recorder is None


def test_the_panel_shows_a_statement_that_failed(app: Flask) -> None:
    page = app.test_client().get("/fail").text
    assert 'class="fsa-failed" title="failed: ' in page


def test_a_request_whose_exception_is_not_handled_leaves_no_recording_on(app: Flask) -> None:
    @app.get("/broken")
    def broken() -> str:
        raise KeyError

    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(KeyError):
        app.test_client().get("/broken")
    assert observing.recorder is None
    assert app.test_client().get("/").status_code == 200


def test_an_application_on_another_database_shows_an_empty_panel(make_app: MakeApp) -> None:
    db = Database()
    app = make_app(
        db,
        "sqlite://",
        SECRET_KEY="secret",
        DEBUG_TB_ENABLED=True,
        DEBUG_TB_PANELS=["fictive_sqlalchemy.ext.debugtoolbar.TransactionsPanel"],
    )
    DebugToolbarExtension(app)

    @app.get("/")
    def show() -> str:
        return f"<html><body>{db.session.scalar(db.text('SELECT 1'))}</body></html>"

    page = app.test_client().get("/").text
    assert "0 round trips, 0 transactions" in page


@pytest.mark.skipif(BROWSER is None, reason="no browser to look with")
def test_a_browser_shows_the_time_line(app: Flask, tmp_path: Path) -> None:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        done = subprocess.run(
            [
                str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
                f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,600",
                "--virtual-time-budget=5000", "--dump-dom",
                f"http://127.0.0.1:{server.server_port}/",
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    found = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    rows = json.loads(html.unescape(found[1]))
    assert [row["sql"].split()[0] for row in rows] == [
        "SELECT",
        "BEGIN",
        "SELECT",
        "UPDATE",
        "COMMIT",
    ]
    outside, _, read, write, commit = rows
    assert [bar["kind"] for bar in outside["bars"]] == ["fsa-outside"]
    waiting, busy = write["bars"]
    assert (waiting["kind"], busy["kind"]) == ("fsa-waiting", "fsa-busy")
    assert waiting["color"] != busy["color"]
    # Most of the line is the time for which the transaction waited, before the UPDATE.
    assert waiting["width"] > 0.5 * write["line"]["width"]
    assert waiting["right"] <= busy["left"] + 1
    for row in (read, commit):
        for bar in row["bars"]:
            assert row["line"]["left"] - 1 <= bar["left"] <= row["line"]["right"] + 1
