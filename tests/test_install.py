"""The commands of README that install the package, word for word, each in a new environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

import fictive_sqlalchemy

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow

#: What is left out of the copy: nothing that is built from a checkout needs it.
_LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "__pycache__")


def commands() -> list[list[str]]:
    """Return the ways to install it, each of which is some commands, in README's order."""
    section = re.search(r"^## Install\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert section is not None
    blocks = re.findall(r"(?:^    .+\n)+", section[1], re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def installed(way: list[str], program: str, directory: Path) -> str:
    """Install the package in a new environment, and return what a program prints there.

    :param way: The commands that install it, in a copy of the checkout.
    :param program: The program, which runs outside of the copy.
    :param directory: Where the copy and the environment are made.
    """
    checkout, elsewhere = directory / "checkout", directory / "elsewhere"
    shutil.copytree(ROOT, checkout, ignore=_LEFT_OUT)
    elsewhere.mkdir()
    venv.create(directory / "venv", with_pip=True)
    environment = {**os.environ, "PATH": f"{directory / 'venv' / 'bin'}{os.pathsep}{os.defpath}"}
    for command in way:
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["python", "-c", program], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_the_ways_to_install_are_found_in_readme() -> None:
    assert [len(way) for way in commands()] == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="The shell is another one.")
@pytest.mark.parametrize("number", range(2))
def test_what_readme_says_installs_this_package(number: int, tmp_path: Path) -> None:
    version, file = installed(
        commands()[number],
        "import fictive_sqlalchemy as it, fictive_sqlalchemy.ext.flask.shared, psycopg2; "
        "print(it.__version__, it.__file__)",
        tmp_path,
    ).split()
    assert version == fictive_sqlalchemy.__version__
    assert Path(file).is_relative_to(tmp_path / "venv")


@pytest.mark.skipif(os.name == "nt", reason="The shell is another one.")
def test_who_chooses_psycopg_3_gets_no_other_driver(tmp_path: Path) -> None:
    names = "psycopg", "flask_sqlalchemy", "psycopg2"
    find = f"from importlib.util import find_spec; print(*[find_spec(n) is None for n in {names}])"
    missing = installed(['python -m pip install ".[flask-psycopg]"'], find, tmp_path).split()
    assert missing == ["False", "False", "True"]


def test_no_page_installs_the_package_by_its_name() -> None:
    """On the package index the name belongs to another owner."""
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("fictive_sqlalchemy/**/*.py"),
    ]
    for page in pages:
        named = re.findall(r"pip install[^\n`]*fictive-sqlalchemy.*", page.read_text("utf-8"))
        assert named == [], page.name
