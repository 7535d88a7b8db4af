"""The suite of one application, run once, in a process of its own on a new database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..postgres import PostgresServer
from .environments import Installed
from .table import Application

MODES = ("stock", "begin_on_write", "strict")

_PLUGIN = "applications_plugin"
_REPORT = "report.json"

#: What a checkout has beside its sources.
_NOT_COPIED = (".git", ".nox", ".tox", ".venv", "__pycache__", "node_modules")

#: A suite that is not done after so many seconds waits for something that never comes.
PATIENCE = 1800

#: What waits for a lock as long as this waits for itself. It would stay until :data:`PATIENCE`.
LOCK_TIMEOUT = "20s"


class NoReport(Exception):
    """A suite did not come to its end; the text is the end of what it printed."""


@dataclass(frozen=True)
class Outcome:
    """What became of the tests of one run."""

    passed: frozenset[str]
    failed: Mapping[str, str]
    """The tests that failed, each with what pytest says about it."""
    skipped: frozenset[str]
    engines: int
    """How many engines extensions of our class made."""
    in_autocommit: int
    """How many of these rest in autocommit."""
    versions: Mapping[str, str]


def run(installed: Installed, mode: str, server: PostgresServer) -> Outcome:
    """Run the suite of an application.

    :param mode: One of :data:`MODES`.
    :raises NoReport: If it did not come to its end.
    """
    database = server.create_database()
    url = server.url("psycopg2", database)
    places = {
        "{url}": url,
        "{server}": url.rpartition("/")[0],
        "{port}": str(server.port),
        "{database}": database,
    }
    try:
        with tempfile.TemporaryDirectory(prefix="application-") as name:
            folder = Path(name)
            sources = _copy(installed, folder, places)
            command = [str(installed.python), "-m", "pytest"]
            command += _arguments(installed.application, mode, places)
            environment = _environment(installed, folder, mode, places)
            return _report(command, sources, environment, folder)
    finally:
        server.drop_database(database)


def _copy(installed: Installed, folder: Path, places: Mapping[str, str]) -> Path:
    """Copy the sources, with the edits, and the plugin; a suite may leave files behind."""
    sources = folder / "sources"
    shutil.copytree(
        installed.sources, sources, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED)
    )
    for edit in installed.application.edits:
        path = sources / edit.path
        text = path.read_text()
        if edit.old not in text:
            raise NoReport(f"{edit.path} has no {edit.old!r}")
        path.write_text(text.replace(edit.old, _filled(edit.new, places), 1))
    shutil.copy(Path(__file__).with_name("plugin.py"), folder / f"{_PLUGIN}.py")
    return sources


def _arguments(application: Application, mode: str, places: Mapping[str, str]) -> list[str]:
    # Not the suite's own options: they measure coverage and check the style.
    arguments = ["--override-ini=addopts=", "--continue-on-collection-errors", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", "-p", _PLUGIN]
    if mode == "stock":
        arguments += ["-p", "no:fictive_sqlalchemy.ext.pytest"]
    if application.deselected:
        arguments += ["-k", f"not ({' or '.join(application.deselected)})"]
    arguments += [_filled(argument, places) for argument in application.arguments]
    return [*arguments, *application.tests]


def _environment(
    installed: Installed, folder: Path, mode: str, places: Mapping[str, str]
) -> dict[str, str]:
    """The variables of this process, less those that are about its own Python and database."""
    own = ("PYTEST_", "PYTHON", "VIRTUAL_ENV", "DATABASE_URL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    given = installed.application.environment
    return {
        **environment,
        "PYTHONPATH": str(folder),
        # The programs of its environment, which some suites start.
        "PATH": f"{installed.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PGOPTIONS": f"-c lock_timeout={LOCK_TIMEOUT}",
        "APPLICATIONS_MODE": mode,
        "APPLICATIONS_REPORT": str(folder / _REPORT),
        **{name: _filled(value, places) for name, value in given.items()},
    }


def _report(
    command: Sequence[str], sources: Path, environment: Mapping[str, str], folder: Path
) -> Outcome:
    """Run pytest, and read what the plugin has written."""
    said = folder / "said"
    with said.open("w") as output:
        try:
            status = subprocess.run(
                command,
                cwd=sources,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
            ).returncode
        except subprocess.TimeoutExpired:
            raise NoReport(f"not done after {PATIENCE} seconds\n{_end(said)}") from None
    report = folder / _REPORT
    # 0 and 1 are pytest's: all passed, some failed.
    if status not in (0, 1) or not report.exists():
        raise NoReport(f"pytest ended with status {status}\n{_end(said)}")
    noted = json.loads(report.read_text())
    return Outcome(
        passed=frozenset(noted["passed"]),
        failed=noted["failed"],
        skipped=frozenset(noted["skipped"]),
        engines=noted["engines"],
        in_autocommit=noted["in autocommit"],
        versions=noted["versions"],
    )


def _filled(text: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        text = text.replace(place, value)
    return text


def _end(said: Path) -> str:
    return said.read_text(errors="replace")[-3000:]
