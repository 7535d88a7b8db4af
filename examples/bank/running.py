"""Context managers that start and remove what the demo needs: a database, a schema, a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from tests.postgres import PostgresServer

ROOT = Path(__file__).resolve().parents[2]

#: The signals that ask a program to end: Ctrl-C, kill, the terminal's closing.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """An error of the demo, which says what went wrong and what to do."""


@contextmanager
def database(given: str | None) -> Iterator[tuple[PostgresServer, str]]:
    """Give a PostgreSQL server, and the URL of a database on this server.

    :param given: ``DATABASE_URL``. If it is empty, a server of the demo's own is started.
    """
    if given:
        yield database_of(given)
        return
    try:
        server = PostgresServer.start()
    except RuntimeError as error:
        raise DemoError(str(error)) from None
    with server:
        yield server, server.url(installed_driver())


def database_of(given: str) -> tuple[PostgresServer, str]:
    """Return the server that a URL names, and the URL with its driver and its database filled in.

    :param given: ``DATABASE_URL``.
    :raises DemoError: If the demo can't use the server.
    """
    example = "postgresql://user:password@127.0.0.1:5432/database"
    otherwise = "Without DATABASE_URL the demo starts a PostgreSQL of its own."
    try:
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise DemoError(f"DATABASE_URL should be like {example}.\n{otherwise}") from None
    backend, _, driver = url.drivername.partition("+")
    if backend not in ("postgresql", "postgres"):
        raise DemoError(f"DATABASE_URL is of {backend}, not of PostgreSQL.\n{otherwise}")
    if not url.host or "host" in url.query:
        raise DemoError(
            "The demo puts a proxy before the server, so DATABASE_URL has to name a host, as in\n"
            f"{example}.\n{otherwise}"
        )
    server = PostgresServer(given)
    name = url.database or url.username or "postgres"
    return server, server.url(driver or installed_driver(), name)


def installed_driver() -> str:
    """Return the driver to use if the URL names none."""
    return "psycopg2" if find_spec("psycopg2") else "psycopg"


@contextmanager
def schema(url: str, name: str) -> Iterator[str]:
    """Create a schema for the demo, and drop the schema with all that is in it at the end.

    :param url: The database.
    :param name: The schema's name, which nobody else uses.
    :returns: A context manager that gives the URL of the database, with only this schema to search.
    """
    parsed = make_url(url)
    options = [str(parsed.query["options"])] if "options" in parsed.query else []
    within = parsed.update_query_dict({"options": " ".join([*options, f"-csearch_path={name}"])})
    try:
        execute(url, f"CREATE SCHEMA {name}")
        yield within.render_as_string(hide_password=False)
    finally:
        try:
            execute(url, f"DROP SCHEMA IF EXISTS {name} CASCADE")
        except DemoError as error:
            raise DemoError(f"{error}\nThis is left to do: DROP SCHEMA {name} CASCADE") from None


def execute(url: str, statement: str) -> str:
    """Execute a statement and return the first column of its first row as text.

    :param url: The database.
    :param statement: The SQL.
    :raises DemoError: If the statement can't be executed.
    """
    try:
        engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 10},
        )
        with engine.connect() as connection:
            # With a timeout, nothing waits for ever, least of all at the end.
            connection.execute(text("SET statement_timeout = '30s'"))
            result = connection.execute(text(statement))
            return str(result.scalar()) if result.returns_rows else ""
    except (ImportError, NoSuchModuleError) as error:
        raise DemoError(f"{error}: install that driver, or name another in DATABASE_URL.") from None
    except DBAPIError as error:
        raise DemoError(
            f"PostgreSQL does not do `{statement}`:\n{str(error.orig).strip()}\n"
            "Check DATABASE_URL. Its user needs the right to create schemas, and the server has to"
            " let it in\nwithout TLS, since the demo reads the wire. Without DATABASE_URL the demo"
            " starts a PostgreSQL of its own."
        ) from None


@contextmanager
def app_server(url: str, *arguments: str) -> Iterator[str]:
    """Serve the app in a process of its own.

    :param url: The URL of the database, through the proxy.
    :param arguments: The arguments of :mod:`.server`.
    :returns: A context manager that gives the server's URL.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.bank.server", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        start_new_session=True,  # Ctrl-C ends only the demo; the server ends when stdin is closed
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip().decode()
        if not port:
            raise DemoError("The app's server did not start: what it says stands above.")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def end_on_signals() -> None:
    """Let signals end this process as an error does, so that everything is cleaned up."""

    def end(number: int, frame: object) -> None:
        ignore_signals()
        raise SystemExit(128 + number)

    for number in SIGNALS:
        # nohup has SIGHUP ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def ignore_signals() -> None:
    """Ignore the signals that end a program, while the demo cleans up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
