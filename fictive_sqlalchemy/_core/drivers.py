"""Choose an installed driver for a URL that names no driver."""

from __future__ import annotations

from sqlalchemy import exc, make_url
from sqlalchemy.engine import URL

from .autocommit import PSYCOPG
from .errors import see
from .hosts import FORMS


def with_installed_driver(url: str | URL) -> URL:
    """Return a URL whose driver is installed. SQLAlchemy's choice comes first.

    For ``postgresql://``, SQLAlchemy 2.0 chooses psycopg2, and 2.1 chooses psycopg:
    https://docs.sqlalchemy.org/en/21/changelog/migration_21.html

    :param url: The database. A URL that names a driver is returned as it is.
    :raises sqlalchemy.exc.ArgumentError: if the URL can't be parsed.
    :raises ModuleNotFoundError: if the driver that the URL names is not installed, or if a URL of
        PostgreSQL names no driver, and none is installed.
    """
    try:
        url = make_url(url)
    except ValueError:
        # The error has no cause, because the text of ValueError may show a part of the password.
        raise exc.ArgumentError(
            "The URL has a port that is no number. Write each special character of the password in "
            f"percent-encoding, such as %3A for a colon. {FORMS}"
        ) from None
    if url.drivername != "postgresql":
        driver = url.get_driver_name() if url.get_backend_name() == "postgresql" else ""
        if driver in PSYCOPG and not _is_installed(url):
            raise ModuleNotFoundError(
                f"The driver of the URL, {driver}, is not installed: install this package with the "
                f"extra [{driver}], or write postgresql://, which uses the other driver if that "
                "one is installed." + see("no-driver"),
                name=driver,
            )
        return url
    for found in (url, *(url.set(drivername=f"postgresql+{driver}") for driver in PSYCOPG)):
        if _is_installed(found):
            return found
    raise ModuleNotFoundError(
        "No driver of PostgreSQL is installed: pip install psycopg2-binary, or "
        '"psycopg[binary]" for psycopg 3.' + see("no-driver")
    )


def _is_installed(url: URL) -> bool:
    """Import the driver of a URL, and return whether it is installed. Raise any other error."""
    try:
        url.get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        if error.name != url.get_driver_name():
            raise
        return False
    return True
