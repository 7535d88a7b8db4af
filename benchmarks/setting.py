"""What all measurements of a run share: a server, a database with the rows, and a proxy."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

import psycopg
from sqlalchemy import make_url

import fictive_sqlalchemy
from benchmarks.peers import DRIVERS, TABLES
from tests.postgres import server_from_environment
from tests.wire import WireProxy


@dataclass(frozen=True)
class Setting:
    """Where a run measures."""

    urls: dict[str, str]
    """The URL of the database, by the name of the driver."""
    proxy: WireProxy
    """A proxy in front of the server."""
    proxied: dict[str, str]
    """The URL of the database through the proxy, by the name of the driver."""
    server: int
    """The server's version."""

    def versions(self, *others: str) -> str:
        """Say with which versions, and on which system, the figures are measured.

        :param others: The names of further distributions.
        """
        distributions = ("Flask-SQLAlchemy", *others, "SQLAlchemy", "Flask")
        # The driver itself is asked, because the user chooses which of its distributions is there.
        drivers = (f"{name} {import_module(name).__version__.split()[0]}" for name in DRIVERS)
        return (
            f"fictive-sqlalchemy {fictive_sqlalchemy.__version__}, "
            f"{', '.join(f'{name} {version(name)}' for name in distributions)}, "
            f"{', '.join(drivers)}, "
            f"PostgreSQL {self.server}, "
            f"{platform.python_implementation()} {platform.python_version()}, "
            f"{platform.system()} on {platform.machine()} with {os.cpu_count()} CPUs."
        )


@contextmanager
def setting(rows: int) -> Iterator[Setting]:
    """Make a database for a run.

    :param rows: How many documents the database has.
    """
    with server_from_environment() as server, WireProxy(server.host, server.port) as proxy:
        database = server.create_database()
        try:
            urls = {driver: server.url(driver, database) for driver in DRIVERS}
            fill(urls["psycopg"], rows)
            proxied = {driver: proxy.url(url) for driver, url in urls.items()}
            yield Setting(urls, proxy, proxied, server.version)
        finally:
            server.drop_database(database)


def fill(url: str, rows: int) -> None:
    """Make the tables in an empty database.

    :param url: The database.
    :param rows: How many documents.
    """
    dsn = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(TABLES.format(rows=rows).encode())
