"""``python -m tests.applications``: run the suites, print what differs, and judge."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..postgres import PostgresServer, server_from_environment
from . import __doc__ as explanation
from . import page
from .environments import ROOT, CannotInstall, Installed, build_wheel, install
from .exceptions import EXCEPTIONS
from .judgement import judge
from .suites import MODES, NoReport, Outcome, run
from .table import APPLICATIONS, NOT_RUN, Application

PAGE = ROOT / "docs" / "migrating.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for. The exit status: 0 if all is well."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        applications = _chosen(options)
    except ValueError as error:
        parser.error(str(error))
    if options.write and options.source:
        parser.error("--write is for the applications of the table, and not for --source")

    good: list[page.Row] = []
    rows: list[page.Row] = []
    wrong = 0
    with server_from_environment() as server, tempfile.TemporaryDirectory() as folder:
        wheel = None if options.python else build_wheel(Path(folder))
        for application in applications:
            row, errors = _run(application, options, wheel, server)
            rows.append(row)
            wrong += len(errors)
            if not errors:
                good.append(row)
    if not (options.names or options.source):
        others = [page.Row(application, {}, {}, reason) for application, reason in NOT_RUN]
        rows += others
        good += others
    print(f"\n{page.HEAD}" + "\n".join(map(page.line, rows)))
    if options.write:
        known = [*APPLICATIONS, *(application for application, _ in NOT_RUN)]
        page.write(PAGE, good, [application.name for application in known])
    errors_said = "1 error" if wrong == 1 else f"{wrong} errors"
    print(f"\n{errors_said}, see above." if wrong else "\nAll is as it has to be.")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.applications",
        description=explanation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(application.name for application in APPLICATIONS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {known}; default: all")
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write the results into docs/{PAGE.name}, but none of an application with an error",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "applications",
        help="where the virtual environments are kept; default: build/applications",
    )
    source = parser.add_argument_group(
        "an application that you have",
        "With the NAME of one in the table, it is set up as that; else say how.",
    )
    source.add_argument("--source", type=Path, help="its checkout, of which each run gets a copy")
    source.add_argument(
        "--python", type=Path, help="the Python of an environment where all is installed already"
    )
    source.add_argument(
        "--tests", action="append", metavar="PATH", help="what pytest runs; default: tests"
    )
    source.add_argument(
        "--environment",
        action="append",
        metavar="NAME=VALUE",
        help="a variable, in which {url} is the database's URL, {server} the URL without the"
        " database, {database} its name; default: SQLALCHEMY_DATABASE_URI={url}",
    )
    source.add_argument(
        "--require", action="append", metavar="REQUIREMENT", help="what is installed with it"
    )
    source.add_argument("--extra", action="append", metavar="EXTRA", help="an extra of it")
    source.add_argument(
        "--deselect",
        action="append",
        metavar="WORD",
        help="tests with it in their names are not run",
    )
    return parser


def _chosen(options: argparse.Namespace) -> list[Application]:
    """The applications that the arguments name.

    :raises ValueError: If they contradict each other; the text says how.
    """
    by_name = {application.name: application for application in APPLICATIONS}
    if options.source is None:
        if options.python:
            raise ValueError("--python is for --source")
        if unknown := [name for name in options.names if name not in by_name]:
            raise ValueError(
                f"no application is called {unknown[0]!r}: choose {', '.join(by_name)}"
            )
        return [by_name[name] for name in options.names] or list(APPLICATIONS)
    if len(options.names) > 1:
        raise ValueError("--source is one application: give one name or none")
    options.source = options.source.resolve()
    if options.names and options.names[0] in by_name:
        return [replace(by_name[options.names[0]], version="")]
    return [
        Application(
            name=options.names[0] if options.names else options.source.name,
            version="",
            requires=tuple(options.require or ("pytest",)),
            extras=tuple(options.extra or ()),
            environment=_variables(options.environment or ["SQLALCHEMY_DATABASE_URI={url}"]),
            tests=tuple(options.tests or ("tests",)),
            deselected=dict.fromkeys(options.deselect or (), "asked for"),
        )
    ]


def _variables(given: Sequence[str]) -> Mapping[str, str]:
    pairs = [variable.partition("=") for variable in given]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise ValueError(f"--environment is NAME=VALUE, and not {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def _run(
    application: Application,
    options: argparse.Namespace,
    wheel: Path | None,
    server: PostgresServer,
) -> tuple[page.Row, Sequence[str]]:
    """Install one application, run it in each mode and judge; returns the errors, too."""
    print(f"\n{application.title}", flush=True)
    exceptions = {} if options.source else EXCEPTIONS.get(application.name, {})
    try:
        if wheel is None:
            installed = Installed(application, options.python.absolute(), options.source)
        else:
            folder = options.folder.resolve() / application.name
            installed = install(application, wheel, folder, options.source)
        outcomes: dict[str, Outcome] = {}
        for mode in MODES:
            outcomes[mode] = outcome = run(installed, mode, server)
            counts = f"{len(outcome.passed)} passed, {len(outcome.failed)} failed"
            print(f"  {mode + ':':16}{counts}, {len(outcome.skipped)} skipped", flush=True)
    except (CannotInstall, NoReport) as error:
        kind = "can't be installed" if isinstance(error, CannotInstall) else "did not end"
        print(f"  ERROR {kind}: {error}", flush=True)
        reason = f"{kind}: {str(error).splitlines()[0]}"
        return page.Row(application, {}, {}, reason), [str(error)]
    verdict = judge(outcomes, exceptions, strict_may_differ=options.source is not None)
    for line in verdict.differences:
        print(f"  {line}")
    for line in verdict.errors:
        print(f"  ERROR {line}", flush=True)
    return page.Row(application, outcomes, exceptions), verdict.errors


if __name__ == "__main__":
    sys.exit(main())
