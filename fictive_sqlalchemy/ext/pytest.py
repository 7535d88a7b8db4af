"""The pytest plugin: a test that requests ``db_isolation`` leaves nothing in the database.

pytest loads the plugin by itself. The plugin does nothing until a test requests one of its
fixtures, or the option ``--strict-report`` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from .._core.errors import see
from .._extras import installed_by

with installed_by("this package with the extra [pytest]"):
    import pytest

if TYPE_CHECKING:
    from flask import Flask
    from sqlalchemy import Engine

    from ..recording import Recording
    from ..strict_report import StrictReport

    Budget = Callable[..., AbstractContextManager[Recording]]

# The keys of the report in pytest's configuration, and in the output of a pytest-xdist worker.
_REPORT: pytest.StashKey[StrictReport] = pytest.StashKey()
_OF_WORKER = "fictive_sqlalchemy.strict_report"


@pytest.fixture
def db_isolation_of(request: pytest.FixtureRequest) -> Flask | Engine | Iterable[Engine]:
    """Return what ``db_isolation`` isolates: a Flask application, or engines.

    By default, this is the application of your ``app`` fixture. If you have no such fixture,
    define ``db_isolation_of`` yourself::

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
            "or engines." + see("nothing-to-isolate")
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
                "`db_isolation_of` that returns the engines to isolate." + see("nothing-to-isolate")
            )
        isolation = extension.test_isolation(db_isolation_of)
    elif isinstance(db_isolation_of, Iterable):
        isolation = isolate(*cast("Iterable[Engine]", db_isolation_of))
    else:
        raise pytest.UsageError(
            "The fixture `db_isolation_of` has to return an application or engines, not "
            f"{db_isolation_of!r}." + see("nothing-to-isolate")
        )
    with isolation:
        yield


@pytest.fixture
def db_record(db_isolation_of: Any) -> Generator[Recording]:
    """Record what the test sends to the database: see :func:`fictive_sqlalchemy.recording.record`.

    The fixture records the engines that ``db_isolation_of`` returns, or those of the application
    that ``db_isolation_of`` returns, in all threads. Sends nothing.

    :returns: The :class:`.Recording`, which may be read at any time.
    :raises pytest.UsageError: if neither the application nor ``db_isolation_of`` has an engine of
        :func:`fictive_sqlalchemy.create_engine`.
    """
    from ..recording import record

    with record(*_engines_of(db_isolation_of)) as seen:
        yield seen


@pytest.fixture
def db_budget(db_isolation_of: Any) -> Budget:
    """Limit what a part of a test may send, with a block::

        def test_transfer(client, db_budget):
            with db_budget(transactions=1, round_trips=5, waiting=0.0):
                client.post("/transfer")

    If the block sends more, the test fails, and shows what was sent, in order, with BEGIN and
    COMMIT. There is no limit for a number that is left out.

    - ``transactions``, ``statements`` and ``round_trips`` are numbers. A statement outside a
      transaction does not count as a transaction. BEGIN and COMMIT count as round trips, but not as
      statements.
    - ``waiting`` is how many seconds transactions may be open while the database is not busy for
      them. A tenth of a second more is allowed, which Python itself may need.

    The block gives a :class:`.Recording`.

    :raises pytest.UsageError: if there is no engine to record, as for ``db_record``, or if a limit
        is no number.
    """
    engines = _engines_of(db_isolation_of)
    return partial(_budget, engines)


@contextmanager
def _budget(
    engines: list[Any],
    *,
    transactions: int | None = None,
    statements: int | None = None,
    round_trips: int | None = None,
    waiting: float | None = None,
) -> Generator[Recording]:
    from ..recording import counted, record

    limits = {
        "transactions": transactions,
        "statements": statements,
        "round_trips": round_trips,
        "waiting": waiting,
    }
    for name, limit in limits.items():
        given: Any = limit
        if given is not None and (
            isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0
        ):
            raise pytest.UsageError(
                f"db_budget({name}=…) is a number, 0 or more, not {limit!r}."
                + see("recording-arguments")
            )
    with record(*engines) as seen:
        yield seen
    used = {
        "transactions": seen.transaction_count,
        "statements": seen.statement_count,
        "round_trips": seen.round_trips,
    }
    said = [
        f"{counted(number, name.replace('_', ' ')[:-1])}, and not {limits[name]}"
        for name, number in used.items()
        if limits[name] is not None and number > cast(int, limits[name])
    ]
    if waiting is not None and seen.waiting > waiting + _OF_PYTHON:
        said.append(
            f"transactions that waited for {seen.waiting:.2f} s for something else than the "
            f"database, and not {waiting} s"
        )
    if said:
        more = f"More was sent than db_budget() allows: {'; '.join(said)}." + see("budget")
        pytest.fail(f"{more}\n{seen}", False)


#: How many seconds Python may need between the statements of a test's transactions.
_OF_PYTHON = 0.1


def _engines_of(source: Any) -> list[Any]:
    """Return the engines that ``db_isolation_of`` has returned, or those of its application."""
    from .._core.engine import OptInEngine

    if hasattr(source, "extensions"):
        extension = source.extensions.get("sqlalchemy")
        engines: Iterable[Any] = ()
        if extension is not None:
            with source.app_context():
                engines = list(extension.engines.values())
    else:
        given: Any = source
        engines = given if isinstance(source, Iterable) else [given]
    found = [engine for engine in engines if isinstance(engine, OptInEngine)]
    if not found:
        raise pytest.UsageError(
            "There is no engine to record: the application needs an extension with "
            "OptInTransactionMixin, or the fixture `db_isolation_of` has to return engines of "
            "fictive_sqlalchemy.create_engine()." + see("nothing-to-record")
        )
    return found


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
    """Start the strict report before the application is imported."""
    if config.getoption("strict_report", False):
        from ..strict_report import StrictReport

        config.stash[_REPORT] = StrictReport(log=False).start()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the strict report."""
    if (report := config.stash.get(_REPORT, None)) is not None:
        report.stop()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over the findings of a worker of pytest-xdist."""
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    report = session.config.stash.get(_REPORT, None)
    if told is not None and report is not None:
        told[_OF_WORKER] = [asdict(finding) for finding in report.findings()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the findings of a worker of pytest-xdist."""
    report = node.config.stash.get(_REPORT, None)
    told: dict[str, Any] = getattr(node, "workeroutput", None) or {}
    if report is not None:
        from ..strict_report import Finding

        for finding in told.get(_OF_WORKER, ()):
            report.add(Finding(**finding))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the strict report, with a line for each place."""
    if (report := config.stash.get(_REPORT, None)) is not None:
        terminalreporter.section("strict report")
        terminalreporter.write_line(str(report))
