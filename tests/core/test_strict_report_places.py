"""Which line of an application the strict report names."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from sqlalchemy import update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy._core import places
from fictive_sqlalchemy.strict_report import StrictReport
from tests.library import Author, Document, Sessions


@pytest.fixture
def writing(engine: OptInEngine) -> Sessions:
    return sessionmaker(engine, class_=OptInSession, begin_on_write=True)


@pytest.fixture
def report() -> Iterator[StrictReport]:
    with StrictReport() as report:
        yield report


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of an installed package, which flushes."""
    file = tmp_path / "helper.py"
    file.write_text("def store(session, one):\n    session.add(one)\n    session.flush()\n")
    monkeypatch.setattr(places, "_INSTALLED", (*places._INSTALLED, tmp_path))
    spec = importlib.util.spec_from_file_location("helper", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    places._is_installed.cache_clear()
    yield module
    places._is_installed.cache_clear()


def test_a_line_of_an_installed_package_is_named_with_the_line_that_called_it(
    writing: Sessions,
    report: StrictReport,
    helper: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    with writing() as session:
        helper.store(session, Author(name="one"))
        helper.store(session, Author(name="two"))
    findings = report.findings()
    assert [finding.kind for finding in findings] == ["flush", "flush"]
    for finding in findings:
        assert Path(finding.filename).name == "helper.py"
        assert finding.called_from is not None
        # Whatever the directory that a process runs in, it is the same place.
        assert Path(finding.called_from.rpartition(":")[0]) == Path(__file__)
        assert "(called from test_strict_report_places.py:" in str(finding)
    assert findings[0].called_from != findings[1].called_from


@pytest.mark.parametrize(
    ("filename", "is_installed"),
    [
        ("/home/me/.local/lib/python3.12/site-packages/helper.py", True),
        ("/usr/lib/python3/dist-packages/helper.py", True),
        (threading.__file__, True),
        (str(Path(sys.executable).with_name("gunicorn")), True),
        ("<string>", False),
        ("<ipython-input-1-abc>", False),
        (__file__, False),
    ],
)
def test_code_that_is_installed_is_recognised(filename: str, is_installed: bool) -> None:
    assert places._is_installed(filename) is is_installed


@pytest.mark.parametrize("name", [{}, {"__name__": None}])
def test_code_without_a_module_is_named_by_its_file_and_line(
    writing: Sessions, report: StrictReport, name: dict[str, Any]
) -> None:
    with writing() as session:
        code = compile("session.execute(statement)", "<generated>", "exec")
        exec(code, {**name, "session": session, "statement": update(Author).values(age=8)})
    (finding,) = report.findings()
    assert str(finding).startswith("<generated>:1 in <module>: execute()")


def test_a_template_is_named_with_its_line(
    writing: Sessions, report: StrictReport, tmp_path: Path
) -> None:
    (tmp_path / "author.html").write_text("\n\n{{ author.name }}\n{{ author.documents }}\n")
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(tmp_path), autoescape=True)
    with writing() as session:
        ada = session.get(Author, 1)
        session.add(Document(title="Waits", author_id=1))
        templates.get_template("author.html").render(author=ada)
    (finding,) = report.findings()
    assert finding.call == "Author.documents"
    assert finding.called_from is not None
    assert finding.called_from.endswith("author.html:4 in root")


def test_rollback_says_what_it_would_not_undo(
    writing: Sessions, report: StrictReport, helper: ModuleType
) -> None:
    with writing() as session:
        session.execute(update(Author).values(age=8))
        session.rollback()
        helper.store(session, Author(name="one"))
        session.rollback()
    first, second = (one for one in report.findings() if one.kind == "rollback")
    assert first.detail == f"execute() in line {first.line - 1}"
    assert second.detail.endswith("helper.py, line 3")
