"""The page on error messages lists each message of the package, and none that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fictive_sqlalchemy"
PAGE = ROOT / "docs" / "troubleshooting.md"

OF_OTHERS = "## What SQLAlchemy and PostgreSQL say"


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each string that is not part of another, or a docstring."""
    passed: set[int] = set()
    for node in ast.walk(tree):
        if id(node) in passed:
            continue
        if isinstance(node, ast.Expr | ast.FormattedValue):
            passed.add(id(node.value))  # a docstring, or what an f-string formats
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            passed.update(id(part) for part in ast.walk(node))
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield node.lineno, "".join(map(str, parts))


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each message, with … for what is formatted into it.

    That is what is raised or logged, and each other string that is a sentence.
    """
    for module in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        said: set[tuple[int, str]] = set()
        for node in ast.walk(tree):
            is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_log.")
            if isinstance(node, ast.Raise) or is_log:
                said.update(texts(node))
        said.update(one for one in texts(tree) if one[1].endswith("."))
        for line, text in sorted(said):
            if text.count(" ") >= 3:
                yield f"{module.relative_to(ROOT)}:{line}", text


def listed() -> list[str]:
    """Return what the page lists as ours."""
    ours = PAGE.read_text(encoding="utf-8").partition(OF_OTHERS)[0]
    found = re.findall(r"^- (?:``(.+?) ?``|`([^`]+)`)$", ours, re.MULTILINE)
    return ["".join(one) for one in found]


def says(beginning: str, message: str) -> bool:
    """Tell whether a message begins as the page says, where … stands for anything."""
    pattern = ".*".join(map(re.escape, beginning.split("…")))
    return re.match(pattern, message, re.DOTALL) is not None


def test_each_message_is_listed() -> None:
    beginnings = listed()
    for place, message in messages():
        found = any(says(beginning, message) for beginning in beginnings)
        assert found, f"{PAGE.name} does not list the message of {place}: {message}"


def test_no_message_is_listed_that_is_gone() -> None:
    said = [message for _, message in messages()]
    for beginning in listed():
        assert any(says(beginning, message) for message in said), beginning


def test_no_beginning_is_so_short_that_it_says_nothing() -> None:
    for beginning in listed():
        assert len(re.sub(r"[^a-z]", "", beginning)) >= 10, beginning


def test_messages_are_found() -> None:
    found = [message for _, message in messages()]
    assert len(found) > 80
    assert any(message.startswith("A transaction is already begun") for message in found)
    assert any("…" in message for message in found)
