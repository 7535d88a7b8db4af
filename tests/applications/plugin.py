"""A pytest plugin that swaps the class and notes what becomes of each test.

It runs in the environment of the application, where nothing of this checkout can be imported: it
is copied there as a module of its own, and needs pytest and what the application needs.

The swap is what a user changes. Instead of ``from flask_sqlalchemy import SQLAlchemy`` a user
writes the class of ``docs/migrating.md``; here that class stands where the application imports the
other from, before any of its modules is imported. So it is one change for all applications, and
reaches the tests that make extensions of their own, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

MODE = os.environ.get("APPLICATIONS_MODE", "")
"""The name of the run: ``stock``, ``begin_on_write`` or ``strict``."""

REPORT = os.environ.get("APPLICATIONS_REPORT", "")
"""The file that the report is written into."""

VERSIONS = ("flask-sqlalchemy", "sqlalchemy")

_passed: set[str] = set()
_failed: dict[str, str] = {}
_skipped: set[str] = set()
_opted_in: list[bool] = []
"""For each engine of our class, whether it rests in autocommit."""


def swap(begin_on_write: bool) -> None:
    """Put our class where applications import Flask-SQLAlchemy's from.

    :param begin_on_write: The session option, for the extensions that say nothing about it.
    """
    # Not at the top, so that the run with stock is one without this package.
    import flask_sqlalchemy
    from flask_sqlalchemy import extension
    from sqlalchemy.engine import URL, Engine

    from fictive_sqlalchemy import OptInEngine
    from fictive_sqlalchemy.ext.flask import OptInTransactionMixin

    class SQLAlchemy(OptInTransactionMixin, flask_sqlalchemy.SQLAlchemy):
        def __init__(
            self, *args: Any, session_options: dict[str, Any] | None = None, **options: Any
        ) -> None:
            if begin_on_write:
                session_options = {"begin_on_write": True, **(session_options or {})}
            super().__init__(*args, session_options=session_options, **options)

        def create_engine(self, sa_url: str | URL, engine_opts: Mapping[str, Any]) -> Engine:
            engine = super().create_engine(sa_url, engine_opts)
            _opted_in.append(isinstance(engine, OptInEngine))
            return engine

    for module in (flask_sqlalchemy, extension):
        module.SQLAlchemy = SQLAlchemy  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test has passed when its set-up, its call and its tear-down all have."""
    name = report.nodeid
    if report.failed:
        _failed.setdefault(name, report.longreprtext or report.outcome)
        _passed.discard(name)
    elif report.skipped:
        _skipped.add(name)
    elif report.when == "call" and name not in _failed:
        _passed.add(name)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that can't be imported is one failed test."""
    if report.failed:
        _failed[report.nodeid] = report.longreprtext or report.outcome


def pytest_sessionfinish() -> None:
    """Write the report, for :mod:`tests.applications.suites`."""
    report = {
        "passed": sorted(_passed),
        "failed": _failed,
        "skipped": sorted(_skipped),
        "engines": len(_opted_in),
        "in autocommit": sum(_opted_in),
        "versions": {name: version(name) for name in VERSIONS},
    }
    Path(REPORT).write_text(json.dumps(report))


if MODE in ("begin_on_write", "strict"):
    swap(begin_on_write=MODE == "begin_on_write")
