"""How the suites of real applications are compared, and what becomes of a small one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.applications import environments, page
from tests.applications.__main__ import main
from tests.applications.environments import CannotInstall, install
from tests.applications.exceptions import EXCEPTIONS
from tests.applications.judgement import Exceptions, judge
from tests.applications.suites import MODES, Outcome
from tests.applications.table import APPLICATIONS, NOT_RUN, Application

SHOP = Application("shop", "1.0")

VERSIONS = {"sqlalchemy": "2.1.9", "flask-sqlalchemy": "3.1.1"}

# An application of one file, a test that fails in any case, and two that assume stock: a read has a
# transaction, which is so with stock alone, and rollback() undoes a flush(), which is not so in the
# strict mode.
APPLICATION = """
import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SHOP_DATABASE"]
db = SQLAlchemy(app)


class Order(db.Model):
    id = db.Column(db.Integer, primary_key=True)
"""

SUITE = """
import pytest
from shop import Order, app, db


@pytest.fixture(autouse=True)
def tables():
    with app.app_context():
        db.create_all()
        yield
        db.session.remove()
        db.drop_all()


def test_commit():
    db.session.add(Order())
    db.session.commit()
    assert Order.query.count() == 1


def test_rollback_after_flush():
    db.session.add(Order())
    db.session.flush()
    db.session.rollback()
    assert Order.query.count() == 0


def test_that_fails():
    assert Order.query.count() == 1


def test_a_read_begins_a_transaction():
    begun = []
    db.event.listen(db.session, "after_begin", lambda *arguments: begun.append(arguments))
    Order.query.count()
    assert begun
"""


def outcome(passed: str, failed: str = "", engines: int = 1) -> Outcome:
    return Outcome(
        passed=frozenset(passed.split()),
        failed=dict.fromkeys(failed.split(), "E   assert 1 == 2"),
        skipped=frozenset(),
        engines=engines,
        in_autocommit=engines,
        versions=VERSIONS,
    )


def outcomes(stock: Outcome, begin_on_write: Outcome, strict: Outcome) -> dict[str, Outcome]:
    return dict(zip(MODES, (stock, begin_on_write, strict), strict=True))


def test_what_passes_with_ours_as_with_stock_is_no_difference() -> None:
    stock = outcome("a b", "c", engines=0)
    verdict = judge(outcomes(stock, outcome("a b", "c"), outcome("a b", "c")), {})
    assert verdict.differences == ()
    assert verdict.errors == ()


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_test_that_passes_with_stock_alone_is_an_error(mode: str) -> None:
    runs = dict.fromkeys(MODES, outcome("a b")) | {mode: outcome("a", "b")}
    verdict = judge(runs, {})
    assert verdict.differences == (f"{mode}: b fails\nE   assert 1 == 2",)
    assert verdict.errors == (f"{mode}: b passes with stock and fails with ours",)


def test_a_test_that_was_not_run_is_an_error() -> None:
    verdict = judge(outcomes(outcome("a b"), outcome("a"), outcome("a b")), {})
    assert verdict.errors == ("begin_on_write: b passes with stock and fails with ours",)
    assert "was not run" in verdict.differences[0]


def test_an_exception_is_a_difference_and_no_error() -> None:
    exceptions = {"strict": {"b": "it rolls back what a flush stored"}}
    verdict = judge(outcomes(outcome("a b"), outcome("a b"), outcome("a", "b")), exceptions)
    assert verdict.differences == ("strict: b fails, as listed: it rolls back what a flush stored",)
    assert verdict.errors == ()


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("a", "it passes"),
        ("c", "it fails with stock, too"),
        ("no_such_test", "it was not run"),
    ],
)
def test_an_exception_that_is_listed_in_vain_is_an_error(test: str, why: str) -> None:
    exceptions: Exceptions = {"strict": {test: "a reason"}}
    verdict = judge(dict.fromkeys(MODES, outcome("a b", "c")), exceptions)
    assert verdict.errors == (f"strict: {test} is listed in vain: {why}",)


def test_a_test_that_passes_with_ours_alone_is_a_difference() -> None:
    verdict = judge(outcomes(outcome("a", "b"), outcome("a b"), outcome("a", "b")), {})
    assert verdict.differences == ("begin_on_write: b passes, and does not with stock",)
    assert verdict.errors == ()


def test_in_an_application_that_nobody_looked_at_the_strict_mode_may_differ() -> None:
    runs = outcomes(outcome("a b"), outcome("a b"), outcome("a", "b"))
    verdict = judge(runs, {}, strict_may_differ=True)
    assert len(verdict.differences) == 1
    assert verdict.errors == ()
    runs = outcomes(outcome("a b"), outcome("a", "b"), outcome("a b"))
    assert judge(runs, {}, strict_may_differ=True).errors != ()


def test_a_run_in_which_our_class_was_not_used_is_an_error() -> None:
    verdict = judge(outcomes(outcome("a"), outcome("a", engines=0), outcome("a")), {})
    assert [error.partition(":")[0] for error in verdict.errors] == ["begin_on_write"]


def test_a_suite_of_which_nothing_passes_with_stock_is_an_error() -> None:
    verdict = judge(dict.fromkeys(MODES, outcome("", "a")), {})
    assert verdict.errors == ("nothing passes with stock: is it set up?",)


def test_the_table_keeps_the_lines_of_applications_that_were_not_run(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    old = f"{page.HEAD}| bank 1.0 | … |\n| gone 1.0 | … |\n| shop 0.9 | … |\n"
    path.write_text(f"before\n{page.BEGIN}\n{old}\n{page.END}after\n")
    reason = "it rolls back what a flush stored"
    runs = outcomes(outcome("a b"), outcome("a b"), outcome("a", "b"))
    row = page.Row(SHOP, runs, {"strict": {"b": reason}})
    page.write(path, [row], ["shop", "bank"])
    before, begin, rest = path.read_text().partition(page.BEGIN)
    table, end, after = rest.partition(page.END)
    assert (before, begin, end, after) == ("before\n", page.BEGIN, page.END, "after\n")
    shop, bank = table.removeprefix(f"\n{page.HEAD}").strip().splitlines()
    assert shop.startswith("| shop 1.0 | 2")
    assert shop.endswith(f"| 2 | 2 | 1 | strict, 1 test: {reason} |")
    assert bank == "| bank 1.0 | … |"


def test_the_table_says_why_an_application_was_not_run() -> None:
    line = page.line(page.Row(SHOP, {}, {}, "can't be installed: it needs Python 3.99"))
    assert line.endswith("| can't be installed: it needs Python 3.99 |")


def test_a_page_without_a_place_for_the_table_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="no place for the table"):
        page.write(path, [], [])


def test_the_page_has_a_place_for_the_table(tmp_path: Path) -> None:
    copy = tmp_path / "migrating.md"
    copy.write_text((Path(__file__).parent.parent / "docs" / "migrating.md").read_text())
    page.write(copy, [], [])


def test_each_exception_is_one_of_an_application_in_the_table() -> None:
    names = [application.name for application in APPLICATIONS]
    assert len(names) == len(set(names))
    assert EXCEPTIONS.keys() <= set(names)
    assert {mode for listed in EXCEPTIONS.values() for mode in listed} <= set(MODES[1:])
    assert all(reason for _, reason in NOT_RUN)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-application"], "no application is called 'no-such-application'"),
        (["--source", ".", "one", "two"], "one application"),
        (["--source", ".", "--write"], "--write is for"),
        (["--python", "python"], "--python is for --source"),
        (["--source", ".", "--environment", "URL"], "NAME=VALUE, and not 'URL'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_an_application_that_needs_a_newer_python_is_not_installed(tmp_path: Path) -> None:
    application = Application("shop", "1.0", python="3.99")
    with pytest.raises(CannotInstall, match=r"needs Python 3\.99"):
        install(application, tmp_path / "our.whl", tmp_path / "shop", None)


def test_an_application_that_is_not_on_the_index_is_not_installed() -> None:
    said = (
        "ERROR: Ignored the following yanked versions: 0.9\n"
        "ERROR: Could not find a version that satisfies the requirement shop==1.0\n"
        "ERROR: No matching distribution found for shop==1.0\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.exit({said!r})"]
    with pytest.raises(CannotInstall, match=r"^ERROR: Could not find .* shop==1\.0$"):
        environments._call(*command)


@pytest.mark.slow
def test_a_checkout_is_run_in_each_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shop.py").write_text(APPLICATION)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_shop.py").write_text(SUITE)
    options = ["--source", str(tmp_path), "--python", sys.executable]
    status = main(["shop", *options, "--environment", "SHOP_DATABASE={url}"])
    said = capsys.readouterr().out
    assert status == 1
    assert "stock:          3 passed, 1 failed" in said
    assert "begin_on_write: 2 passed, 2 failed" in said
    assert "strict:         1 passed, 3 failed" in said
    assert "strict: tests/test_shop.py::test_rollback_after_flush fails" in said
    assert "test_that_fails fails" not in said
    assert "1 error, see above" in said
