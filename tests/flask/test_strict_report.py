"""The strict report of an application: requests, the setting, the command."""

# mypy: disable-error-code="name-defined,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import insert, select, update
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from fictive_sqlalchemy.strict_report import Finding, StrictReport, read_report
from tests.flask.support import WritingApp
from tests.library import Author, authors, fill

SETTING = "SQLALCHEMY_STRICT_REPORT"


class Shop(WritingApp):
    """An application on the tables of the library."""

    def request(self, view: Callable[[], object], method: str = "GET") -> int:
        """Add a view, and return the status that it answers with."""

        def answer() -> str:
            view()
            return ""

        path = f"/{len(self.web.view_functions)}"
        self.web.add_url_rule(path, path, answer, methods=[method])
        return self.web.test_client().open(path, method=method).status_code


@pytest.fixture
def make_shop(url: str) -> Iterator[Callable[..., Shop]]:
    fill(url)
    shops: list[Shop] = []

    def make(kind: str = "db", **config: Any) -> Shop:
        shops.append(Shop(kind, url, **config))
        return shops[-1]

    yield make
    for shop in shops:
        if (report := shop.web.extensions.get("fictive_sqlalchemy.strict_report")) is not None:
            report.stop()
        shop.engine.dispose()


@pytest.fixture(params=["db", "scoped"])
def shop(request: pytest.FixtureRequest, make_shop: Callable[..., Shop]) -> Shop:
    return make_shop(request.param)


@pytest.fixture
def report() -> Iterator[StrictReport]:
    with StrictReport() as report:
        yield report


def found(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kind, finding.function) for finding in findings]


def test_a_view_that_fails_after_a_flush_is_recorded(shop: Shop, report: StrictReport) -> None:
    def view() -> None:
        shop.session.add(Author(name="new"))
        shop.session.flush()
        raise ZeroDivisionError

    assert shop.request(view) == 500
    assert found(report.findings()) == [("flush", "view")]
    assert report.findings()[0].filename == __file__


def test_a_request_without_commit_is_recorded(shop: Shop, report: StrictReport) -> None:
    def view() -> None:
        shop.session.execute(update(Author).values(age=9))
        with shop.session.begin_nested():
            shop.session.execute(insert(authors).values(name="new"))

    assert shop.request(view) == 200
    assert found(report.findings()) == [("write", "view"), ("savepoint", "view")]


def test_what_means_the_same_in_a_request_is_not_recorded(shop: Shop, report: StrictReport) -> None:
    def view() -> None:
        shop.session.scalars(select(Author)).all()
        shop.session.add(Author(name="new"))
        shop.session.commit()
        with shop.owner.atomic():
            shop.session.execute(update(Author).values(age=9))
            shop.session.flush()

    assert shop.request(view) == 200
    assert report.findings() == []


def test_a_request_that_is_a_transaction_is_not_recorded(shop: Shop, report: StrictReport) -> None:
    shop.owner.atomic_requests(shop.web)

    def view() -> None:
        shop.session.add(Author(name="new"))
        shop.session.flush()
        shop.session.execute(update(Author).values(age=9))
        shop.session.get(Author, 1, with_for_update=True)

    assert shop.request(view, "POST") == 200
    assert report.findings() == []


@pytest.mark.parametrize("kind", ["db", "scoped"])
def test_the_setting_records_and_the_command_prints(
    make_shop: Callable[..., Shop], kind: str, tmp_path: Path
) -> None:
    file = tmp_path / "strict.jsonl"
    shop = make_shop(kind, **{SETTING: str(file)})
    command = shop.web.test_cli_runner().invoke

    empty = command(args=["db-strict-report", "--check"])
    assert (empty.exit_code, empty.output) == (0, f"Nothing was recorded in {file}.\n")

    def view() -> None:
        shop.session.execute(update(Author).values(age=9))

    shop.request(view)
    assert found(read_report(file)) == [("write", "view")]

    printed = command(args=["db-strict-report"])
    assert printed.exit_code == 0
    assert "in view: execute() would be stored at once" in printed.output
    assert "1 place means something else" in printed.output

    checked = command(args=["db-strict-report", "--check", "--file", str(file)])
    assert (checked.exit_code, checked.output) == (1, printed.output)

    cleared = command(args=["db-strict-report", "--clear"])
    assert (cleared.exit_code, cleared.output) == (0, printed.output)
    assert not file.exists()


def test_applications_share_a_file(make_shop: Callable[..., Shop], tmp_path: Path) -> None:
    file = tmp_path / "strict.jsonl"
    shops = [make_shop(kind, **{SETTING: file}) for kind in ("db", "scoped")]
    for shop in shops:

        def view(shop: Shop = shop) -> None:
            shop.session.execute(update(Author).values(age=9))

        shop.request(view)
    assert len(file.read_text().splitlines()) == 1


def test_the_command_says_what_is_missing(make_shop: Callable[..., Shop], tmp_path: Path) -> None:
    command = make_shop().web.test_cli_runner().invoke
    without = command(args=["db-strict-report"])
    assert without.exit_code == 2
    assert f"set {SETTING} to the name of a file" in " ".join(without.output.split())
    (tmp_path / "other").write_text("other")
    other = command(args=["db-strict-report", "--file", str(tmp_path / "other")])
    assert other.exit_code == 1
    assert "no file of a StrictReport" in other.output


def test_a_file_that_cannot_be_read_is_an_error_of_the_command(
    make_shop: Callable[..., Shop], tmp_path: Path
) -> None:
    shop = make_shop(**{SETTING: tmp_path})
    result = shop.web.test_cli_runner().invoke(args=["db-strict-report"])
    assert result.exit_code == 1
    assert str(tmp_path) in result.output


def test_the_setting_is_the_name_of_a_file(make_shop: Callable[..., Shop]) -> None:
    with pytest.raises(ArgumentError, match="is the name of a file, and not True"):
        make_shop(**{SETTING: True})


def test_without_the_setting_nothing_records(shop: Shop) -> None:
    from fictive_sqlalchemy._core import observing

    assert shop.request(lambda: shop.session.execute(update(Author).values(age=9))) == 200
    assert observing.observer is None


def test_an_application_may_have_a_command_of_that_name(url: str) -> None:
    web = Flask(__name__)

    @web.cli.command("db-strict-report")
    def own() -> None:
        print("own")

    factory = sessionmaker(create_engine(url), class_=OptInSession)
    flask_scoped_session(factory, web)
    assert web.test_cli_runner().invoke(args=["db-strict-report"]).output == "own\n"
