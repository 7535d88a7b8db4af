"""The strict report of a Flask application: a setting records it, and a command prints it.

See :mod:`fictive_sqlalchemy.strict_report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click
from flask import Flask, current_app
from flask.cli import with_appcontext
from sqlalchemy.exc import ArgumentError

from ..._core.errors import see
from ...strict_report import StrictReport, formatted, read_report

SETTING = "SQLALCHEMY_STRICT_REPORT"

_COMMAND = "db-strict-report"
_EXTENSION = "fictive_sqlalchemy.strict_report"

# The applications of a process may share a file, and then they share the report.
_by_file: dict[Path, StrictReport] = {}


def strict_report_of(app: Flask) -> StrictReport | None:
    """Start the strict report if the application's setting names a file, and add the command.

    :param app: The application.
    :returns: The report, if there is a file. :meth:`.StrictReport.stop` stops it.
    :raises sqlalchemy.exc.ArgumentError: if the setting is no name of a file.
    """
    if _COMMAND not in app.cli.commands:
        app.cli.add_command(print_report)
    file = _file_of(app)
    if not file:
        return None
    try:
        path = Path(file).absolute()
    except TypeError:
        raise ArgumentError(
            f"{SETTING} is the name of a file, and not {file!r}." + see("strict-report")
        ) from None
    report = _by_file.setdefault(path, StrictReport(path))
    app.extensions[_EXTENSION] = report
    return report.start()


def _file_of(app: Flask) -> Any:
    return cast("Mapping[str, Any]", app.config).get(SETTING)


@click.command(_COMMAND)
@click.option(
    "--file",
    type=click.Path(dir_okay=False),
    help=f"The report file to print; the file of {SETTING} if it is left out",
)
@click.option("--check", is_flag=True, help="Exit with status 1 if a place was recorded")
@click.option("--clear", is_flag=True, help="Remove the file after printing it")
@with_appcontext
def print_report(file: str | None, check: bool, clear: bool) -> None:
    """Print which places would mean something else in the strict mode.

    It prints what the application has recorded while it ran with SQLALCHEMY_STRICT_REPORT, in any
    number of processes. It runs nothing, and sends nothing.
    """
    named = file or _file_of(current_app)
    if not named:
        raise click.UsageError(
            f"There is nothing to print: set {SETTING} to the name of a file, run the application "
            "or its tests, and then print that file. Or name the file: --file …"
            + see("strict-report")
        )
    try:
        findings = read_report(named)
    except FileNotFoundError:
        click.echo(f"Nothing was recorded in {named}.")
        return
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(formatted(findings))
    if clear:
        Path(named).unlink()
    if check and any(finding.is_place for finding in findings):
        raise SystemExit(1)
