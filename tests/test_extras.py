"""Where a library is not installed, the error names the extra that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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

FLASK = (
    "this package with the extra [flask] or [flask-psycopg], or Flask-SQLAlchemy and a driver of "
    "your own"
)
MIXIN = "from fictive_sqlalchemy.ext.flask import OptInTransactionMixin"


def printed_without(library: str, statement: str) -> str:
    """Return what a process prints that executes a statement while a library is missing."""
    program = WITHOUT.format(library=library, statement=statement)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("library", "statement", "what"),
    [
        ("flask", MIXIN, FLASK),
        ("flask_sqlalchemy", MIXIN, FLASK),
        ("flask_sqlalchemy", "import fictive_sqlalchemy.ext.flask.shared", FLASK),
        (
            "celery",
            "import fictive_sqlalchemy.ext.celery",
            "this package with the extra [celery]",
        ),
        ("flask", "import fictive_sqlalchemy.ext.celery", FLASK),
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
        ("pytest", "import fictive_sqlalchemy.ext.pytest", "this package with the extra [pytest]"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    library: str, statement: str, what: str
) -> None:
    said = f"{library} The module {library} is not installed: install {what}. See "
    assert printed_without(library, statement).startswith(said)


@pytest.mark.parametrize("library", ["flask", "flask_sqlalchemy", "celery", "tenacity", "pytest"])
def test_plain_sqlalchemy_needs_no_extra(library: str) -> None:
    assert printed_without(library, "import fictive_sqlalchemy.testing") == ""


def test_flask_does_without_flask_sqlalchemy() -> None:
    statement = "from fictive_sqlalchemy.ext.flask import flask_scoped_session"
    assert printed_without("flask_sqlalchemy", statement) == ""


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("celery.py", "Task = object", "'celery' is not a package"),
        ("tenacity.py", "raise ModuleNotFoundError('needs libfoo')", "needs libfoo"),
        ("tenacity.py", "raise ImportError('is broken')", "is broken"),
    ],
)
def test_a_library_that_is_hidden_or_broken_is_not_called_missing(
    file: str, text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(text)
    program = f"import fictive_sqlalchemy.ext.{file.removesuffix('.py')}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert said in done.stderr.splitlines()[-1]
