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

#: What has no address at its end: the words of Python and of the drivers, what commands print, and
#: what another message follows that has one.
WITHOUT_ADDRESS = {
    "module … has no attribute …",
    "… can only be used in transaction blocks",
    "the connection is closed",
    "autocommit can't be changed in a transaction",
    "current transaction is aborted, commands ignored until end of transaction block",
    "can't use a named cursor outside of transactions",
    "The thread has ended and left the transaction open.",
    "No transaction is open.",
    "Nothing was recorded in ….",
    "The report is full: places that are not in it were met … times.",
    "… something else in the strict mode than with begin_on_write=True.",
    "The URL has a port that is no number. Write each special character of the password in "
    "percent-encoding, such as %3A for a colon. …",
    "… mixes two ways to name several hosts. …",
    "… has a host with a port in a list. …",
    "… has a host with a space or an @ in it. …",
    "… has an empty host among several. …",
    "… has an IPv6 address in brackets. …",
    "… has hosts and ports that do not belong together. …",
}


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


def addresses(tree: ast.AST) -> Iterator[tuple[tuple[int, str], str]]:
    """Yield the line and the text of each string that ``see()`` follows, and the address."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and ast.unparse(node.right).startswith("see("):
            assert isinstance(node.right, ast.Call)
            [address] = node.right.args
            assert isinstance(address, ast.Constant)
            [text] = texts(node.left)
            yield text, str(address.value)


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


def beginnings(page: str) -> list[str]:
    """Return the beginnings of messages that a part of the page lists."""
    found = re.findall(r"^- (?:``(.+?) ?``|`([^`]+)`)$", page, re.MULTILINE)
    return ["".join(one) for one in found]


def listed() -> list[str]:
    """Return what the page lists as ours."""
    return beginnings(PAGE.read_text(encoding="utf-8").partition(OF_OTHERS)[0])


def says(beginning: str, message: str) -> bool:
    """Tell whether a message begins as the page says, where … stands for anything."""
    pattern = ".*".join(map(re.escape, beginning.split("…")))
    return re.match(pattern, message, re.DOTALL) is not None


def entries() -> dict[str, list[str]]:
    """Return the messages that the page lists, by their addresses."""
    found = re.findall(r'^<a id="([\w-]+)"></a>\n\n((?:- `.+\n)+)', PAGE.read_text(), re.MULTILINE)
    assert len({address for address, _ in found}) == len(found)
    return {address: beginnings(lines) for address, lines in found}


def test_each_entry_of_the_page_has_an_address() -> None:
    listed = [line for line in PAGE.read_text().splitlines() if line.startswith("- `")]
    assert sum(map(len, entries().values())) == len(listed)


def test_each_message_ends_with_the_address_that_explains_it() -> None:
    found = entries()
    followed = {
        (f"{module.relative_to(ROOT)}:{line}", text): address
        for module in sorted(PACKAGE.rglob("*.py"))
        for (line, text), address in addresses(ast.parse(module.read_text(encoding="utf-8")))
    }
    for (place, text), address in followed.items():
        assert any(says(one, text) for one in found.get(address, [])), f"{place}: {address}"
    without = {text for place, text in messages() if (place, text) not in followed}
    assert without == WITHOUT_ADDRESS


def test_each_message_is_listed() -> None:
    ours = listed()
    for place, message in messages():
        found = any(says(beginning, message) for beginning in ours)
        assert found, f"{PAGE.name} does not list the message of {place}: {message}"


def test_no_message_is_listed_that_is_gone() -> None:
    said = [message for _, message in messages()]
    for beginning in listed():
        assert any(says(beginning, message) for message in said), beginning


def test_no_beginning_is_so_short_that_it_says_nothing() -> None:
    for beginning in listed():
        assert len(re.sub(r"[^a-z]", "", beginning)) >= 10, beginning


def test_messages_of_the_package_are_found() -> None:
    found = [message for _, message in messages()]
    assert len(found) > 80
    assert any(message.startswith("A transaction is already begun") for message in found)
    assert any("…" in message for message in found)
