"""The examples of the README, the docs and the docstrings run, and send what they say."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from fictive_sqlalchemy import create_engine
from tests.wire import WireProxy

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "fictive_sqlalchemy").rglob("*.py"))

# What the pages say their database is.
DATABASE = "postgresql://postgres:secret@127.0.0.1:5432/postgres"

# What SQLAlchemy asks on the first connection of an engine, psycopg in a transaction.
FIRST_CONNECTION = re.compile(
    r"hstore|FROM pg_type|pg_catalog\.version|current_schema|isolation level$|conforming_strings"
)


def without_first_connection(statements: list[str]) -> list[str]:
    asked = [at for at, one in enumerate(statements) if FIRST_CONNECTION.search(one)]
    rest = statements[asked[-1] + 1 :] if asked else statements
    return rest[1:] if asked and rest[:1] == ["COMMIT"] else rest


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each fenced block of a page with its place and its language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        yield f"{page.name}:{line}", match[1], match[2]


def matches(said: str, sent: str) -> bool:
    """Tell whether a statement is what the page says, in which … stands for anything."""
    pattern = ".*".join(map(re.escape, said.strip().split("…")))
    return re.fullmatch(pattern, sent) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_and_sends_what_it_says(page: Path, wire: WireProxy, wire_url: str) -> None:
    namespace: dict[str, Any] = {"__name__": "example"}
    sent: list[str] = []
    context: Any = None
    try:
        for place, language, code in blocks(page):
            if language == "python":
                with wire.record() as recording:
                    code = code.replace(DATABASE, wire_url)
                    exec(compile(code, place, "exec", dont_inherit=True), namespace)
                sent = without_first_connection(recording.statements)
                if context is None and isinstance(namespace.get("app"), Flask):
                    context = namespace["app"].app_context()  # what follows runs in a view
                    context.push()
            elif language == "sql":
                said = code.splitlines()
                assert len(said) == len(sent), f"{place} says\n{code}and these were sent: {sent}"
                for one_said, one_sent in zip(said, sent, strict=True):
                    assert matches(one_said, one_sent), f"{place}: {one_said!r}, not {one_sent!r}"
    finally:
        engines = [namespace["engine"]] if "engine" in namespace else []
        if context is not None:
            engines += namespace["db"].engines.values()
            context.pop()
        for engine in engines:
            engine.dispose()


def docstring_examples() -> Iterator[Any]:
    for module in MODULES:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            for match in re.finditer(r"::\n\n((?: {4}.*\n?|\n)+)", docstring):
                name = getattr(node, "name", "module")
                code = textwrap.dedent(match[1])
                if "─" not in code:  # a diagram
                    yield pytest.param(code, id=f"{module.stem}-{name}")


# What the docstrings take for granted.
GIVEN = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column, sessionmaker

from fictive_sqlalchemy import *
from fictive_sqlalchemy.ext.flask import *

class ExampleDatabase(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy): ...

example = Flask("example")
example.config["SQLALCHEMY_DATABASE_URI"] = url
db = ExampleDatabase(example)

class User(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str | None]

app = Flask("app")
app.config["SQLALCHEMY_DATABASE_URI"] = url
"""


@pytest.mark.parametrize("code", list(docstring_examples()))
def test_a_docstrings_example_runs(code: str, url: str) -> None:
    namespace: dict[str, Any] = {"__name__": "example", "url": url}
    exec(compile(GIVEN, "given", "exec", dont_inherit=True), namespace)
    db = namespace["db"]
    with namespace["example"].app_context():
        db.create_all()
        exec(compile(code, "docstring", "exec", dont_inherit=True), namespace)
        db.session.remove()
        db.engine.dispose()


def test_the_pages_name_no_other_database() -> None:
    for page in PAGES:
        named = re.findall(r"postgresql\S*://[^\s\"`]+", page.read_text(encoding="utf-8"))
        assert set(named) <= {DATABASE}, page.name


def test_examples_are_found() -> None:
    assert len(list(blocks(ROOT / "README.md"))) > 10
    assert len(list(docstring_examples())) > 2
    assert create_engine.__doc__
