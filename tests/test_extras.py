"""Where a library is not installed, the error names the extra that installs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules[{library!r}] = None
import fictive_sqlalchemy
try:
    {statement}
except ModuleNotFoundError as error:
    print(error.name, error)
"""

FLASK = "this package with the extra [flask] or [flask-psycopg]"
MIXIN = "from fictive_sqlalchemy.ext.flask import OptInTransactionMixin"


@pytest.mark.parametrize(
    ("library", "statement", "what"),
    [
        ("flask", MIXIN, FLASK),
        ("flask_sqlalchemy", MIXIN, FLASK),
        ("flask_sqlalchemy", "import fictive_sqlalchemy.ext.flask.shared", FLASK),
        (
            "celery",
            "import fictive_sqlalchemy.ext.celery",
            "this package with the extras [celery] and [flask]",
        ),
        (
            "tenacity",
            "import fictive_sqlalchemy.ext.tenacity",
            "this package with the extra [retry]",
        ),
        (
            "flask_debugtoolbar.panels",
            "import fictive_sqlalchemy.ext.debugtoolbar",
            "flask-debugtoolbar",
        ),
        ("opentelemetry", "import fictive_sqlalchemy.ext.opentelemetry", "opentelemetry-api"),
        ("sentry_sdk", "import fictive_sqlalchemy.ext.sentry", "sentry-sdk"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    library: str, statement: str, what: str
) -> None:
    program = WITHOUT.format(library=library, statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    said = f"{library} The module {library} is not installed: install {what}. (See "
    assert done.stdout.startswith(said)


@pytest.mark.parametrize("library", ["flask", "flask_sqlalchemy", "celery", "tenacity", "pytest"])
def test_plain_sqlalchemy_needs_no_extra(library: str) -> None:
    program = WITHOUT.format(library=library, statement="import fictive_sqlalchemy.testing")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_flask_does_without_flask_sqlalchemy() -> None:
    statement = "from fictive_sqlalchemy.ext.flask import flask_scoped_session"
    program = WITHOUT.format(library="flask_sqlalchemy", statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
