"""Flask-SQLAlchemy's own tests, with this package's class in place of its own.

``python -m tests.upstream`` downloads the sdist of Flask-SQLAlchemy, which carries its tests, and
runs them three times, each time in a process of its own and with the same options:

- ``stock``: as they are;
- ``ours``: with our class as ``flask_sqlalchemy.SQLAlchemy``. What passes with stock has to pass,
  and every test of a ``MappedAsDataclass`` base too, which stock can't build on SQLAlchemy 2.1;
- ``opted in``: the same with ``AUTOCOMMIT_DRIVERS = ["sqlite"]``, so that the suite's databases,
  all of them sqlite, go the way that PostgreSQL goes. What passes with ours has to pass, except
  the tests in :data:`ASSUMES_STOCK`.

It ends with status 1 when a test fails that had to pass, or an exception is listed in vain.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flask_sqlalchemy
import pytest
from flask_sqlalchemy import extension
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import MappedAsDataclass

VERSION = "3.1.1"

RUNS = ("stock", "ours", "opted in")

WARNINGS = (
    # What a Python or Flask newer than the suite deprecates in it says nothing about either class.
    "ignore::DeprecationWarning",
    "error::sqlalchemy.exc.SADeprecationWarning",
    # In which test a database that nobody closed is collected is chance.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
"""What is different in every run from the suite's own configuration: each warning is an error."""

REFUSED_BY_SQLALCHEMY = {
    f"tests/test_model_bind.py::test_explicit_table[{db}]": (
        "the model has a __table__ of its own, which SQLAlchemy allows no MappedAsDataclass"
    )
    for db in ("db2", "db4")
}
"""Tests of ``MappedAsDataclass`` bases that fail with any extension, and why."""

ASSUMES_STOCK: dict[str, str] = {}
"""Tests that fail where sqlite is opted in, and which assumption of theirs does not hold there."""


def main() -> int:
    """Run the suite three times and judge. The exit status: 0 when everything holds."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.upstream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sdist", type=Path, help="the sdist, when it need not be downloaded")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--suite", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return _run_here(options.run, options.suite, options.report)

    installed = importlib.metadata.version("flask-sqlalchemy")
    if installed != VERSION:
        print(f"Flask-SQLAlchemy {installed} is installed; install {VERSION} to run its tests.")
        return 2
    print(
        f"Flask-SQLAlchemy {VERSION}'s own tests on"
        f" SQLAlchemy {importlib.metadata.version('sqlalchemy')}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        suite = _unpacked(options.sdist or _downloaded(Path(folder)), Path(folder))
        results = {run: _run(run, suite, Path(folder)) for run in RUNS}
    return _judge(results)


class Outcomes:
    """A pytest plugin that notes what became of each test."""

    def __init__(self) -> None:
        self.dataclasses: list[str] = []
        """The tests that are about a ``MappedAsDataclass`` base."""
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}
        """The tests that failed, were skipped or left an error behind, with what pytest says."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note which tests are about dataclasses: their parameters say so, or their code."""
        for item in items:
            if not isinstance(item, pytest.Function):
                continue
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            base = parameters.get("db", parameters.get("model_class"))
            if isinstance(base, tuple):
                _, bases, _ = base
                named = MappedAsDataclass in bases
            else:
                named = base is None and "MappedAsDataclass" in item.function.__code__.co_names
            if named:
                self.dataclasses.append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has passed when its set-up, its call and its tear-down all have."""
        if not report.passed:
            self.failed.setdefault(report.nodeid, report.longreprtext or report.outcome)
            self.passed.discard(report.nodeid)
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that can't be imported is one failed test."""
        if not report.passed:
            self.failed[report.nodeid] = report.longreprtext or report.outcome


def _swap(run: str, made: list[bool]) -> None:
    """Put our class where the suite imports Flask-SQLAlchemy's, under its name for the reprs.

    For each engine that it creates, ``made`` is told whether the engine rests in autocommit.
    """
    # Not at the top of the module, so that the stock run is a run without this package.
    from fictive_sqlalchemy import OptInEngine
    from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin

    class SQLAlchemy(OptInTransactionMixin, FilterByOrCreateMixin, flask_sqlalchemy.SQLAlchemy):
        if run == "opted in":
            AUTOCOMMIT_DRIVERS = ["sqlite"]

        def create_engine(self, sa_url: str | URL, engine_opts: Mapping[str, Any]) -> Engine:
            engine = super().create_engine(sa_url, engine_opts)
            made.append(isinstance(engine, OptInEngine))
            return engine

    for module in (flask_sqlalchemy, extension):
        module.SQLAlchemy = SQLAlchemy  # type: ignore[attr-defined]


def _run_here(run: str, suite: Path, report: Path) -> int:
    """In the process of one run: swap before a test module is imported, then run pytest."""
    made: list[bool] = []
    if run != "stock":
        _swap(run, made)
    outcomes = Outcomes()
    os.chdir(suite)
    status = pytest.main(
        ["tests", "--rootdir=.", "--tb=short", "-p", "no:cacheprovider"]
        + [argument for warning in WARNINGS for argument in ("-W", warning)],
        plugins=[outcomes],
    )
    noted = {
        "dataclasses": outcomes.dataclasses,
        "passed": sorted(outcomes.passed),
        "failed": outcomes.failed,
        "engines": len(made),
        "in autocommit": sum(made),
    }
    report.write_text(json.dumps(noted))
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else 1


def _run(run: str, suite: Path, folder: Path) -> dict[str, Any]:
    """Run the suite in a process of its own; returns what :class:`Outcomes` noted."""
    report = folder / f"{run}.json"
    arguments = ["--run", run, "--suite", str(suite), "--report", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.upstream", *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nThe run with {run!r} did not come to its end; see above.")
    noted: dict[str, Any] = json.loads(report.read_text())
    line = f"  {run + ':':10} {len(noted['passed'])} passed, {len(noted['failed'])} did not"
    if run != "stock":
        line += f"; {noted['in autocommit']} of our {noted['engines']} engines rest in autocommit"
    print(line, flush=True)
    return noted


def _judge(results: dict[str, dict[str, Any]]) -> int:
    stock, ours, opted_in = (set(results[run]["passed"]) for run in RUNS)
    dataclasses = set(results["ours"]["dataclasses"])
    has_to_pass = (stock | dataclasses) - set(REFUSED_BY_SQLALCHEMY)
    wrong = [
        *_lost("ours", has_to_pass - ours, results),
        *_in_vain(REFUSED_BY_SQLALCHEMY, results["ours"]["failed"]),
        *_lost("opted in", ours - opted_in - set(ASSUMES_STOCK), results),
        *_in_vain(ASSUMES_STOCK, ours - opted_in),
    ]
    engines = {run: (results[run]["in autocommit"], results[run]["engines"]) for run in RUNS}
    if not (stock and dataclasses and engines["ours"][1] and engines["opted in"][0]):
        wrong.append("NOTHING was tested where something has to be: is our class still put in?")
    for line in wrong:
        print(line)
    for name, reason in {**REFUSED_BY_SQLALCHEMY, **ASSUMES_STOCK}.items():
        print(f"  exception: {name}: {reason}")
    print(
        f"{len(ours & stock)} of the {len(stock)} that pass with stock pass with ours,"
        f" and {len(ours - stock)} more; opted in on sqlite, {len(ours & opted_in)} of these"
        f" {len(ours)}: {'NOT as it has to be' if wrong else 'as it has to be'}"
    )
    return 1 if wrong else 0


def _lost(run: str, names: Iterable[str], results: dict[str, dict[str, Any]]) -> list[str]:
    failed = results[run]["failed"]
    return [f"FAILED {run}: {name}\n{failed.get(name, 'was not run')}" for name in sorted(names)]


def _in_vain(exceptions: dict[str, str], failed: Iterable[str]) -> list[str]:
    return [
        f"LISTED IN VAIN: {name} did not fail; take it out of {Path(__file__).name}"
        for name in sorted(set(exceptions).difference(failed))
    ]


def _downloaded(folder: Path) -> Path:
    """Fetch the sdist with pip, from the index that pip is set up for; nothing is built of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-binary", "flask-sqlalchemy", f"flask-sqlalchemy=={VERSION}"],
        cwd=folder,
        check=True,
    )
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def _unpacked(sdist: Path, folder: Path) -> Path:
    shutil.unpack_archive(sdist, folder / "sdist", filter="data")
    (suite,) = (folder / "sdist").iterdir()
    # The package itself is the installed one: two of it would be two of each class.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(suite / "src")
    return suite


if __name__ == "__main__":
    sys.exit(main())
