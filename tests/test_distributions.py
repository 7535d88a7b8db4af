"""The wheel and the sdist as they are built: what is in them, and what they say of themselves.

It looks at the directory that DISTRIBUTIONS names; ``python -m nox -s release`` makes it, runs
this, and then all the tests from the sdist.
"""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import fictive_sqlalchemy

pytestmark = pytest.mark.skipif(
    "DISTRIBUTIONS" not in os.environ,
    reason="DISTRIBUTIONS names no directory: python -m nox -s release makes one",
)
ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = Path(os.environ.get("DISTRIBUTIONS", ""))
NAME = f"fictive_sqlalchemy-{fictive_sqlalchemy.__version__}"
WHEEL = DISTRIBUTIONS / f"{NAME}-py3-none-any.whl"
SDIST = DISTRIBUTIONS / f"{NAME}.tar.gz"


def tracked(*paths: str) -> set[str]:
    """Return the files that git has, of the whole checkout or of some paths."""
    if not (ROOT / ".git").exists():
        pytest.skip("This is no checkout, and nothing else says what belongs to the project.")
    listed = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(filter(None, listed.stdout.split("\0")))


def metadata() -> Message:
    with zipfile.ZipFile(WHEEL) as wheel:
        return message_from_string(wheel.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_wheel_has_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        names = set(wheel.namelist())
    package = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    assert "fictive_sqlalchemy/py.typed" in package
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert package == tracked("fictive_sqlalchemy")


def test_the_sdist_has_all_that_the_tests_and_the_docs_need() -> None:
    with tarfile.open(SDIST) as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist if member.isfile()}
    belongs = {name for name in tracked() if not name.startswith(".ci/")}
    assert names == belongs | {"PKG-INFO"}


def test_what_an_index_shows_is_complete() -> None:
    said = metadata()
    assert said["Name"] == "fictive-sqlalchemy"
    assert said["Version"] == fictive_sqlalchemy.__version__
    assert said["License-Expression"] == "MIT"
    assert said["Requires-Python"] == ">=3.10"
    assert said["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in said.get_all("Classifier", [])


def test_an_index_shows_readme_with_the_paths_of_files_in_place_of_links() -> None:
    """An index would look for these files on its own site."""
    shown = str(metadata().get_payload())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "The page Why (`docs/why.md`) explains" in shown
    assert shown.count("\n") == readme.count("\n")
    assert re.findall(r"\]\((?!https?:)", shown) == []
    assert re.findall(r"\]\((?!https?:)", readme) != []


def test_the_extra_for_flask_brings_a_driver_for_the_url_of_the_readme() -> None:
    """It is installed here, and no other extra is."""
    url = "postgresql://postgres:secret@127.0.0.1:5432/postgres"
    assert f'"{url}"' in (ROOT / "README.md").read_text(encoding="utf-8")
    assert fictive_sqlalchemy.create_engine(url).dialect.driver == "psycopg2"


def test_each_requirement_has_a_lowest_version() -> None:
    """``python -m nox -s lowest`` tests with it."""
    for requirement in metadata().get_all("Requires-Dist", []):
        assert ">=" in requirement, requirement
