"""The driver of a URL that names none, in processes in which some driver is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

# None in sys.modules is what makes an import fail as if it were not installed.
PROGRAM = """
import sys
missing, url = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing.split()))
from fictive_sqlalchemy import create_engine
print(create_engine(url).dialect.driver)
"""

# What SQLAlchemy would choose.
DEFAULT = make_url("postgresql://").get_dialect().driver


def run(missing: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, missing, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("missing", "driver"),
    [("psycopg", "psycopg2"), ("psycopg2", "psycopg"), ("", DEFAULT)],
)
def test_a_url_without_a_driver_means_one_that_is_installed(missing: str, driver: str) -> None:
    assert run(missing, "postgresql://localhost/shop").stdout.strip() == driver


def test_without_any_driver_the_error_says_what_to_install() -> None:
    ended = run("psycopg psycopg2", "postgresql://localhost/shop")
    assert ended.returncode
    assert (
        "No driver of PostgreSQL is installed: pip install psycopg2-binary, or "
        '"psycopg[binary]" for psycopg 3. See '
    ) in ended.stderr


@pytest.mark.parametrize("named", ["psycopg", "psycopg2"])
def test_a_driver_that_is_named_is_the_one_that_is_used(named: str) -> None:
    url = f"postgresql+{named}://localhost/shop"
    assert run("", url).stdout.strip() == named
    assert (
        f"The driver of the URL, {named}, is not installed: install this package with the extra "
        f"[{named}], or write postgresql://"
    ) in run(named, url).stderr


BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
from fictive_sqlalchemy import create_engine
create_engine("postgresql://localhost/shop")
"""


def test_a_driver_that_is_broken_is_not_passed_over(tmp_path: Path) -> None:
    for driver in ("psycopg", "psycopg2"):
        (tmp_path / f"{driver}.py").write_text("raise ImportError('libpq.so.5: cannot open')")
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "ImportError: libpq.so.5: cannot open" in ended.stderr
