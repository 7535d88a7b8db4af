"""The files of ``docs/typing.md`` pass the type checkers; ``python -m nox -s lint`` runs this."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import blocks

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "typing.md"

MYPY = ["mypy", "--strict", "--explicit-package-bases", "."]
PYRIGHT = ["pyright", "--pythonpath", sys.executable]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files of the page, in a directory."""
    written = [block for block in blocks(PAGE) if block.title is not None]
    assert len(written) > 3
    for block in written:
        file = tmp_path / str(block.title)
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.code)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return tmp_path


def check(checker: list[str], files: Path) -> subprocess.CompletedProcess[str]:
    """Run a type checker in a directory, if it is installed."""
    if importlib.util.find_spec(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed here: python -m nox -s lint runs this.")
    command = [sys.executable, "-m", *checker]
    return subprocess.run(command, cwd=files, capture_output=True, text=True)


@pytest.mark.parametrize("checker", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_the_files_of_the_page_pass(checker: list[str], files: Path) -> None:
    done = check(checker, files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_type_would_be_found(files: Path) -> None:
    use = files / "shop" / "use.py"
    use.write_text(use.read_text().replace('"REPEATABLE READ"', '"REPEATABLE"'))
    done = check(MYPY, files)
    assert done.returncode == 1
    assert "IsolationLevel" in done.stdout or "Literal" in done.stdout
