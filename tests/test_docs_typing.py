"""The files of ``docs/typing.md`` pass the type checkers; ``python -m nox -s lint`` runs this."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "typing.md"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files of the page, in a directory."""
    blocks = re.findall(
        r'^```python title="([\w./-]+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) > 3
    for name, code in blocks:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return tmp_path


@pytest.mark.parametrize(
    "checker",
    [
        pytest.param(["mypy", "--strict", "--explicit-package-bases", "."], id="mypy"),
        pytest.param(["pyright", "--pythonpath", sys.executable], id="pyright"),
    ],
)
def test_the_files_of_the_page_pass_the_type_checker(checker: list[str], files: Path) -> None:
    if importlib.util.find_spec(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed here: python -m nox -s lint runs this.")
    done = subprocess.run(
        [sys.executable, "-m", *checker], cwd=files, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_type_would_be_found(files: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed here: python -m nox -s lint runs this.")
    use = files / "shop" / "use.py"
    use.write_text(use.read_text().replace('"REPEATABLE READ"', '"REPEATABLE"'))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--explicit-package-bases", "."],
        cwd=files,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "IsolationLevel" in done.stdout or "Literal" in done.stdout
