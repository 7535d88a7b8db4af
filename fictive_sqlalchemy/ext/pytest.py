"""The pytest plugin: a test that requests ``db_isolation`` leaves nothing in the database.

pytest loads it by itself; it does nothing until one of its fixtures is requested, or
``--strict-report`` is given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from flask import Flask
    from sqlalchemy import Engine

    from ..strict_report import StrictReport

# In the configuration of pytest, and in what a worker of pytest-xdist tells at its end.
_REPORT: pytest.StashKey[StrictReport] = pytest.StashKey()
_OF_WORKER = "fictive_sqlalchemy.strict_report"


@pytest.fixture
def db_isolation_of(request: pytest.FixtureRequest) -> Flask | Engine | Iterable[Engine]:
    """What ``db_isolation`` isolates: a Flask application, or engines.

    It is your ``app`` fixture. Where you have none, define this fixture yourself::

        import pytest

        @pytest.fixture
        def db_isolation_of():
            return engine
    """
    try:
        app: Flask = request.getfixturevalue("app")
    except pytest.FixtureLookupError as error:
        if error.argname != "app":
            raise
        raise pytest.UsageError(
            "db_isolation isolates the application of your `app` fixture, and there is none: "
            "define a fixture `app`, or a fixture `db_isolation_of` that returns an application "
            "or engines."
        ) from None
    return app


@pytest.fixture
def db_isolation(db_isolation_of: Any) -> Generator[None]:
    """Undo at the end of the test all that it did to the database.

    See ``db.test_isolation()`` and :func:`fictive_sqlalchemy.testing.isolate`.

    :raises pytest.UsageError: if the application has no extension with ``test_isolation()``.
    """
    from sqlalchemy import Engine

    from ..testing import isolate

    if isinstance(db_isolation_of, Engine):
        isolation: Any = isolate(db_isolation_of)
    elif hasattr(db_isolation_of, "extensions"):
        extension = db_isolation_of.extensions.get("sqlalchemy")
        if not hasattr(extension, "test_isolation"):
            raise pytest.UsageError(
                "The application has no extension with OptInTransactionMixin: define a fixture "
                "`db_isolation_of` that returns the engines to isolate."
            )
        isolation = extension.test_isolation(db_isolation_of)
    elif isinstance(db_isolation_of, Iterable):
        isolation = isolate(*cast("Iterable[Engine]", db_isolation_of))
    else:
        raise pytest.UsageError(
            "The fixture `db_isolation_of` has to return an application or engines, not "
            f"{db_isolation_of!r}."
        )
    with isolation:
        yield


# --strict-report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--strict-report``."""
    parser.getgroup("fictive_sqlalchemy").addoption(
        "--strict-report",
        action="store_true",
        help="show which places of the application and its tests would mean something else in the "
        "strict mode, without begin_on_write",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin to record, before the application is imported."""
    if config.getoption("strict_report", False):
        from ..strict_report import StrictReport

        config.stash[_REPORT] = StrictReport(log=False).start()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Record no more."""
    if (report := config.stash.get(_REPORT, None)) is not None:
        report.stop()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: hand over what it has recorded."""
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    report = session.config.stash.get(_REPORT, None)
    if told is not None and report is not None:
        told[_OF_WORKER] = [asdict(finding) for finding in report.findings()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist has recorded."""
    report = node.config.stash.get(_REPORT, None)
    told: dict[str, Any] = getattr(node, "workeroutput", None) or {}
    if report is not None:
        from ..strict_report import Finding

        for finding in told.get(_OF_WORKER, ()):
            report.add(Finding(**finding))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print a line for each place."""
    if (report := config.stash.get(_REPORT, None)) is not None:
        terminalreporter.section("strict report")
        terminalreporter.write_line(str(report))
