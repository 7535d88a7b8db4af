"""Which driver is used for a URL that names none."""

from __future__ import annotations

from sqlalchemy import exc, make_url
from sqlalchemy.engine import URL

from .autocommit import PSYCOPG
from .hosts import FORMS


def with_installed_driver(url: str | URL) -> URL:
    """Return a URL whose driver is installed: another one if SQLAlchemy's choice is not.

    For ``postgresql://`` that is psycopg2 with SQLAlchemy 2.0 and psycopg with 2.1:
    https://docs.sqlalchemy.org/en/21/changelog/migration_21.html

    :param url: The database. A URL that names a driver is returned as it is.
    :raises sqlalchemy.exc.ArgumentError: if it can't be parsed.
    :raises ModuleNotFoundError: if it names none, is PostgreSQL's, and no driver is installed.
    """
    try:
        url = make_url(url)
    except ValueError:
        # Not raised from it: its text may show a part of the password.
        raise exc.ArgumentError(f"The URL has a port that is no number. {FORMS}") from None
    if url.drivername != "postgresql":
        return url
    for found in (url, *(url.set(drivername=f"postgresql+{driver}") for driver in PSYCOPG)):
        try:
            found.get_dialect().import_dbapi()
        except ImportError:
            continue
        return found
    raise ModuleNotFoundError(
        "No driver of PostgreSQL is installed: pip install psycopg2-binary, or "
        '"psycopg[binary]" for psycopg 3.'
    )
