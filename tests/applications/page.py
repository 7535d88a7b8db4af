"""Writes the results into ``docs/migrating.md``, between two markers: a line for each application.

A run of some applications replaces their lines and keeps those of the others.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .judgement import Exceptions
from .suites import Outcome
from .table import Application

BEGIN = "<!-- applications: `python -m nox -s applications -- --write` writes this table -->\n"
END = "<!-- end of applications -->\n"

HEAD = (
    "| application | run on | pass with stock | with `begin_on_write` | in the strict mode"
    " | what fails, and why |\n"
    "|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Row:
    """What the page says about one application."""

    application: Application
    outcomes: Mapping[str, Outcome]
    """What became of its tests in each mode. Empty if it could not be run."""
    exceptions: Exceptions
    reason: str = ""
    """Why it could not be run."""


def write(page: Path, rows: Sequence[Row], order: Sequence[str]) -> None:
    """Write the lines of some applications into the table of a page.

    :param page: The page, which has both markers.
    :param order: The names of all applications, in the order of their lines. The line of one that
        is not among them goes.
    :raises ValueError: If the page has not both markers.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the table: {BEGIN.strip()} … {END.strip()}")
    lines = {_name(line): line for line in old.splitlines() if line.startswith("| ")}
    lines |= {row.application.name: line(row) for row in rows}
    table = "\n".join(lines[name] for name in order if name in lines)
    page.write_text(f"{before}{begin}\n{HEAD}{table}\n\n{end}{after}", encoding="utf-8")


def line(row: Row) -> str:
    """The line of one application, in Markdown."""
    name = row.application.title
    today = datetime.datetime.now(datetime.timezone.utc).date()
    if not row.outcomes:
        return f"| {name} | {today} | not run | | | {row.reason} |"
    stock = row.outcomes["stock"]
    versions = stock.versions
    if row.application.part:
        name += f": {row.application.part}"
    ran = (
        f"{today}, SQLAlchemy {versions['sqlalchemy']},"
        f" Flask-SQLAlchemy {versions['flask-sqlalchemy']}"
    )
    counts = [
        len(stock.passed),
        *(len(stock.passed & row.outcomes[mode].passed) for mode in ("begin_on_write", "strict")),
    ]
    return f"| {name} | {ran} | {' | '.join(map(str, counts))} | {_reasons(row) or 'nothing'} |"


def _name(line: str) -> str:
    """The name of the application that a line is about."""
    return line.removeprefix("| ").split(maxsplit=1)[0]


def _reasons(row: Row) -> str:
    """What fails: each reason once, with the number of the tests that have it."""
    sentences: dict[str, list[str]] = {}
    for mode, listed in row.exceptions.items():
        failed = row.outcomes["stock"].passed - row.outcomes[mode].passed
        reasons = [reason for test, reason in listed.items() if test in failed]
        for reason in dict.fromkeys(reasons):
            count = reasons.count(reason)
            tests = "1 test" if count == 1 else f"{count} tests"
            sentences.setdefault(f"{tests}: {reason}", []).append(mode)
    titles = {"begin_on_write": "`begin_on_write`", "strict": "strict"}
    return "; ".join(
        f"{'both' if len(modes) > 1 else titles[modes[0]]}, {sentence}"
        for sentence, modes in sentences.items()
    )
