"""The pytest plugin: a test that requests ``db_isolation`` leaves nothing in the database.

pytest loads it by itself; it does nothing until one of its fixtures is requested.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from flask import Flask
    from sqlalchemy import Engine


@pytest.fixture
def db_isolation_of(request: pytest.FixtureRequest) -> Flask | Engine | Iterable[Engine]:
    """What ``db_isolation`` isolates: a Flask application, or engines.

    It is your ``app`` fixture. Where you have none, define this fixture yourself::

        import pytest

        @pytest.fixture
        def db_isolation_of():
            return engine
    """
    try:
        app: Flask = request.getfixturevalue("app")
    except pytest.FixtureLookupError as error:
        if error.argname != "app":
            raise
        raise pytest.UsageError(
            "db_isolation isolates the application of your `app` fixture, and there is none: "
            "define a fixture `app`, or a fixture `db_isolation_of` that returns an application "
            "or engines."
        ) from None
    return app


@pytest.fixture
def db_isolation(db_isolation_of: Any) -> Generator[None]:
    """Undo at the end of the test all that it did to the database.

    See ``db.test_isolation()`` and :func:`fictive_sqlalchemy.testing.isolate`.

    :raises pytest.UsageError: if the application has no extension with ``test_isolation()``.
    """
    from sqlalchemy import Engine

    from ..testing import isolate

    if isinstance(db_isolation_of, Engine):
        isolation: Any = isolate(db_isolation_of)
    elif hasattr(db_isolation_of, "extensions"):
        extension = db_isolation_of.extensions.get("sqlalchemy")
        if not hasattr(extension, "test_isolation"):
            raise pytest.UsageError(
                "The application has no extension with OptInTransactionMixin: define a fixture "
                "`db_isolation_of` that returns the engines to isolate."
            )
        isolation = extension.test_isolation(db_isolation_of)
    elif isinstance(db_isolation_of, Iterable):
        isolation = isolate(*cast("Iterable[Engine]", db_isolation_of))
    else:
        raise pytest.UsageError(
            "The fixture `db_isolation_of` has to return an application or engines, not "
            f"{db_isolation_of!r}."
        )
    with isolation:
        yield
