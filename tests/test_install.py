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


def test_the_ways_to_install_are_found_in_readme() -> None:
    assert [len(way) for way in commands()] == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="The shell is another one.")
@pytest.mark.parametrize("number", range(2))
def test_what_readme_says_installs_this_package(number: int, tmp_path: Path) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT, checkout, ignore=_LEFT_OUT)
    elsewhere.mkdir()
    venv.create(tmp_path / "venv", with_pip=True)
    environment = {**os.environ, "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.defpath}"}
    for command in commands()[number]:
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [
            "python",
            "-c",
            "import fictive_sqlalchemy as it, fictive_sqlalchemy.ext.flask.shared, psycopg2; "
            "print(it.__version__, it.__file__)",
        ],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    version, file = shown.stdout.split()
    assert version == fictive_sqlalchemy.__version__
    assert Path(file).is_relative_to(tmp_path / "venv")


@pytest.mark.skipif(os.name == "nt", reason="The shell is another one.")
def test_who_chooses_psycopg_3_gets_no_other_driver(tmp_path: Path) -> None:
    checkout, python = tmp_path / "checkout", tmp_path / "venv" / "bin" / "python"
    shutil.copytree(ROOT, checkout, ignore=_LEFT_OUT)
    venv.create(tmp_path / "venv", with_pip=True)
    install = [str(python), "-m", "pip", "install", ".[flask-psycopg]"]
    subprocess.run(install, cwd=checkout, check=True, capture_output=True)
    names = "psycopg", "flask_sqlalchemy", "psycopg2"
    find = f"import importlib.util as it; print(*[it.find_spec(name) for name in {names}], sep=';')"
    shown = subprocess.run(
        [python, "-c", find], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    psycopg, flask_sqlalchemy, psycopg2 = shown.stdout.strip().split(";")
    assert psycopg != "None"
    assert flask_sqlalchemy != "None"
    assert psycopg2 == "None"


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
