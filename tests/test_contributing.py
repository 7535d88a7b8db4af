"""What CONTRIBUTING tells a first-time contributor is there, and its example passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fictive_sqlalchemy import OptInSession
from tests.wire import WireProxy

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_of_the_page_passes(session: OptInSession, wire: WireProxy) -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    namespace["test_a_block_with_one_read_is_three_round_trips"](session, wire)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"nox -s (\w+)", PAGE))))
def test_each_session_that_the_page_names_is_one_of_nox(name: str) -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert re.search(rf"^@nox\.session.*\n(?:@nox.*\n)*def {name}\(", noxfile, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:/|\.(?:py|md|toml)))`", PAGE))))
def test_each_file_that_the_page_names_is_there(name: str) -> None:
    places = (ROOT, ROOT / "fictive_sqlalchemy")
    assert any((place / name).exists() for place in places)
