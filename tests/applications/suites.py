"""The suite of one application, run once, in a process of its own on a new database."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..postgres import PostgresServer
from .environments import Installed

MODES = ("stock", "begin_on_write", "strict")

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
    try:
        with tempfile.TemporaryDirectory(prefix="application-") as folder:
            return _run(installed, mode, server, database, Path(folder))
    finally:
        server.drop_database(database)


def _run(
    installed: Installed, mode: str, server: PostgresServer, database: str, folder: Path
) -> Outcome:
    application = installed.application
    sources, report = folder / "sources", folder / "report.json"
    shutil.copytree(installed.sources, sources, symlinks=True)
    shutil.copy(Path(__file__).with_name("plugin.py"), folder / "applications_plugin.py")

    url = server.url("psycopg2", database)
    places = {"{url}": url, "{server}": url.rpartition("/")[0], "{database}": database}
    places["{port}"] = str(server.port)
    for edit in application.edits:
        path = sources / edit.path
        text = path.read_text()
        if edit.old not in text:
            raise NoReport(f"{edit.path} has no {edit.old!r} any more")
        path.write_text(text.replace(edit.old, _filled(edit.new, places), 1))

    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "PYTHON", "VIRTUAL_ENV", "DATABASE_URL"))
    }
    environment |= {
        "PYTHONPATH": str(folder),
        "APPLICATIONS_MODE": mode,
        "APPLICATIONS_REPORT": str(report),
        "PGOPTIONS": f"-c lock_timeout={LOCK_TIMEOUT}",
        # The programs of its environment, which some suites start.
        "PATH": f"{installed.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    environment |= {name: _filled(value, places) for name, value in application.environment.items()}
    # Not the suite's own options: they measure coverage and check the style.
    arguments = ["--override-ini=addopts=", "--continue-on-collection-errors", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", "-p", "applications_plugin"]
    if mode == "stock":
        arguments += ["-p", "no:fictive_sqlalchemy.ext.pytest"]
    if application.deselected:
        arguments += ["-k", f"not ({' or '.join(application.deselected)})"]
    arguments += [_filled(argument, places) for argument in application.arguments]
    said = folder / "said"
    with said.open("w") as output:
        try:
            status = subprocess.run(
                [str(installed.python), "-m", "pytest", *arguments, *application.tests],
                cwd=sources,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE,
            ).returncode
        except subprocess.TimeoutExpired:
            raise NoReport(f"not done after {PATIENCE} seconds\n{_end(said)}") from None
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
