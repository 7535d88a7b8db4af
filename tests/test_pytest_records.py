"""``db_record`` and ``db_budget`` of the pytest plugin, in a real pytest of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_pytest_plugin import Project

pytestmark = pytest.mark.slow

MORE = """
import time
import pytest
from shop import User, db
from sqlalchemy import text


@pytest.fixture
def work(app):
    @app.get("/work")
    def work():
        return ""
    return app


def rename(name):
    with db.session.begin():
        db.session.execute(db.update(User).values(name=name))
        db.session.scalars(db.select(User)).all()
"""


@pytest.fixture
def project(tmp_path: Path, url: str) -> Project:
    return Project(tmp_path, url)


def test_db_record_has_what_the_test_sends(project: Project) -> None:
    project.write(
        "test_shop.py",
        MORE
        + """
def test_requests(app, db_isolation, db_record):
    app.test_client().post("/users/ada")
    assert [each.verb for each in db_record.sent] == ["INSERT"]
    assert db_record.transactions[0].is_one_statement
    with app.app_context():
        rename("bob")
    assert [each.verb for each in db_record.sent[1:]] == ["BEGIN", "UPDATE", "SELECT", "COMMIT"]

def test_another(app, db_record):
    assert db_record.sent == []
""",
    )
    assert project.run() == "2 passed"


def test_db_budget_passes_within_and_fails_beyond(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(
        "test_shop.py",
        MORE
        + """
def test_within(app, db_isolation, db_budget):
    with app.app_context():
        with db_budget(transactions=1, statements=2, round_trips=4, waiting=0.0) as seen:
            rename("bob")
        assert seen.round_trips == 4
        with db_budget():
            rename("bob")
        with db_budget(transactions=0):
            db.session.scalars(db.select(User)).all()
            with db.session.begin():
                pass

@pytest.mark.parametrize("what", [
    dict(transactions=0), dict(statements=1), dict(round_trips=3),
    dict(transactions=0, round_trips=0),
])
def test_beyond(app, db_isolation, db_budget, what):
    with app.app_context(), db_budget(**what):
        rename("bob")

def test_waiting(app, db_isolation, db_budget):
    with app.app_context(), db_budget(waiting=0.0):
        with db.session.begin():
            db.session.scalars(db.select(User)).all()
            time.sleep(0.3)

def test_error(app, db_budget):
    with db_budget(round_trips=0), app.app_context():
        db.session.scalars(db.select(User)).all()
        raise KeyError("mine")

def test_bad_input(app, db_budget):
    with db_budget(round_trips="few"):
        pass
""",
    )
    assert project.run() == "7 failed, 1 passed"
    said = capsys.readouterr().out
    assert (
        "More was sent than db_budget() allows: 1 transaction, and not 0; 4 round trips, and not 0"
        in said
    )
    assert "2 statements, 4 round trips, 1 transaction" in said
    lines = [line.split("  (")[0].strip() for line in said.splitlines()]
    begin = lines.index("BEGIN")
    verbs = [line.split()[0] for line in lines[begin : begin + 4]]
    assert verbs == ["BEGIN", "UPDATE", "SELECT", "COMMIT"]
    assert "transactions that waited for 0.3" in said
    assert "KeyError: 'mine'" in said
    assert "db_budget(round_trips=…) is a number, 0 or more, not 'few'" in said


def test_db_record_and_db_budget_without_an_engine_say_so(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(
        "test_shop.py",
        """
        import pytest
        from flask import Flask

        @pytest.fixture
        def db_isolation_of():
            return Flask(__name__)

        def test_record(db_record):
            pass

        def test_budget(db_budget):
            pass
        """,
    )
    assert project.run() == "2 errors"
    assert "There is no engine to record" in capsys.readouterr().out


def test_an_engine_of_sqlalchemy_can_not_be_recorded(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(
        "test_shop.py",
        """
        import pytest
        from sqlalchemy import create_engine

        @pytest.fixture
        def db_isolation_of():
            return create_engine("postgresql+psycopg2://")

        def test_record(db_record):
            pass
        """,
    )
    assert project.run() == "1 error"
    assert "There is no engine to record" in capsys.readouterr().out
