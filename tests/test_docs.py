"""The examples of the README, the docs and the docstrings run, and send what they say.

Each page has a directory of its own, which is the current one and importable. From the top:

- a block with a title, as in ```python title="shop/models.py", is written to that file;
- any other ```python block runs; all of a page share one namespace. Once that has a Flask `app`,
  what follows runs in its application context;
- a ```console block has lines `$ command`, each followed by what the command prints;
- a ```sql block says what the block before it sent; `-- nothing is sent` says that.

In what is printed or sent … stands for anything; a line of its own, for any number of lines.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Its routes can't be added any more once an application has a toolbar.
import flask_debugtoolbar.panels.sqlalchemy  # noqa: F401
import pytest
from flask import Flask
from sqlalchemy import Engine, event
from sqlalchemy.orm import close_all_sessions
from sqlalchemy.pool import Pool

import fictive_sqlalchemy
from fictive_sqlalchemy import create_engine
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy._core.recorder import recorder
from tests.wire import Recording, WireProxy


@pytest.fixture(autouse=True)
def _nothing_stays_on() -> Iterator[None]:
    """Stop the reports and guards that a page has begun: other tests see what is on."""
    yield
    users: Any = set(recorder._users)  # pyright: ignore[reportPrivateUsage]
    for user in users:
        user.stop()
    assert observing.recorder is None


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "fictive_sqlalchemy").rglob("*.py"))

# What the pages say their database is.
DATABASE = "postgresql://postgres:secret@127.0.0.1:5432/postgres"

# The same with the driver, for stock SQLAlchemy, which does not look for one that is installed.
WITH_DRIVER = DATABASE.replace("postgresql://", "postgresql+psycopg2://")

# What a block says that sent nothing: an empty one looks like a fault of the page.
NOTHING = "-- nothing is sent"

# What SQLAlchemy asks on the first connection of an engine, psycopg in a transaction.
FIRST_CONNECTION = re.compile(
    r"hstore|FROM pg_type|pg_catalog\.version|current_schema|isolation level$|conforming_strings"
)


def sent_in(recording: Recording) -> list[str]:
    """Return what was sent, less what SQLAlchemy asks on the first connection.

    Older versions of psycopg 3 send DEALLOCATE as a statement, newer ones as a message.
    """
    messages = [
        message
        for message in recording.messages
        if message.is_statement and message.verb != "DEALLOCATE"
    ]
    for connection in {message.connection for message in messages}:
        own = [message for message in messages if message.connection == connection]
        asked = [at for at, one in enumerate(own) if FIRST_CONNECTION.search(one.text)]
        if asked:
            end = asked[-1] + 1
            end += [one.text for one in own[end : end + 1]] == ["COMMIT"]
            messages = [message for message in messages if message not in own[:end]]
    return [message.text for message in messages]


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str
    language: str
    title: str | None
    code: str
    before: str
    """The text between the block before it and this one."""


def blocks(page: Path) -> Iterator[Block]:
    """Yield each fenced block of a page."""
    text, end = page.read_text(encoding="utf-8"), 0
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        place = f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"
        title = re.fullmatch(r' title="([\w./-]+)"', match[2])
        assert title or not match[2], f"{place}: no block can have{match[2]}"
        yield Block(place, match[1], title and title[1], match[3], text[end : match.start()])
        end = match.end()


def matches(said: str, given: str) -> bool:
    """Tell whether lines are those that the page says, in which … stands for anything."""
    pattern = ""
    for line in said.strip().splitlines():
        any_of_it = ".*".join(map(re.escape, line.split("…")))
        pattern += r"(?:.*\n)*" if line == "…" else any_of_it + r"\n"
    return re.fullmatch(pattern, f"{given.strip()}\n" if given.strip() else "") is not None


class Commands:
    """Runs the commands of a page.

    :param directory: Where.
    :param database: The URL that stands for the one the pages name.
    """

    def __init__(self, directory: Path, database: str) -> None:
        self.directory = directory
        self.database = database
        package = Path(fictive_sqlalchemy.__file__).parents[1]
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTEST_", "FLASK_"))
        } | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(package),
            "PYTEST_PLUGINS": "fictive_sqlalchemy.ext.pytest",  # as if it were installed
            "PYTHONDONTWRITEBYTECODE": "1",  # a file may be written twice within a second
            "NO_COLOR": "1",
        }

    def run(self, block: Block) -> None:
        """Run the commands of a block and look at what they print."""
        assert block.code.startswith("$ "), f"{block.place}: begin with a line `$ command`"
        for lines in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
            command, _, said = lines.partition("\n")
            export = re.fullmatch(r"export (\w+)=(\S*)", command)
            if export:  # for the commands after it
                self.environment[export[1]] = export[2].replace(DATABASE, self.database)
                continue
            done = subprocess.run(
                command.replace(DATABASE, shlex.quote(self.database)),
                shell=True,
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            printed = done.stdout.replace(self.database, DATABASE)
            assert matches(said, printed), f"{block.place}: `{command}` printed\n{printed}"


@contextmanager
def page_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import from a directory, for a while; then forget what came from it."""
    with monkeypatch.context() as patch:
        patch.chdir(directory)
        patch.syspath_prepend(directory)
        patch.setattr(sys, "dont_write_bytecode", True)
        try:
            yield
        finally:
            for name, module in list(sys.modules.items()):
                own = getattr(module, "__dict__", {})  # lazy ones would import at getattr()
                places = [own.get("__file__") or "", *own.get("__path__", ())]
                if any(directory in Path(place).parents for place in places):
                    del sys.modules[name]


@contextmanager
def disposed_engines() -> Iterator[None]:
    """Dispose of all engines that were made in the block, wherever they are.

    A page may also let go of an app whose engine has connections, as processes do at their end.
    """
    opened: list[Any] = []

    def note(connection: Any, record: object) -> None:
        opened.append(connection)

    before = set(map(id, engines()))
    event.listen(Pool, "connect", note)
    try:
        yield
    finally:
        event.remove(Pool, "connect", note)
        close_all_sessions()
        for engine in engines():
            if id(engine) not in before:
                engine.dispose()
        for connection in opened:
            connection.close()


def engines() -> list[Engine]:
    return [one for one in gc.get_objects() if issubclass(type(one), Engine)]


def run_page(page: Path, directory: Path, wire: WireProxy, url: str) -> None:
    """Run all blocks of a page, in a directory that is the current one."""
    namespace: dict[str, Any] = {"__name__": "example"}
    commands = Commands(directory, url)
    sent: list[str] = []
    context: Any = None
    try:
        for block in blocks(page):
            code = block.code.replace(DATABASE, url).replace(WITH_DRIVER, url)
            if block.title is not None:
                file = directory / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(code, encoding="utf-8")
                importlib.invalidate_caches()
            elif block.language == "python":
                with wire.record() as recording:
                    exec(compile(code, block.place, "exec", dont_inherit=True), namespace)
                sent = sent_in(recording)
                if context is None and isinstance(namespace.get("app"), Flask):
                    context = namespace["app"].app_context()  # what follows runs in a view
                    context.push()
            elif block.language == "console":
                with wire.record() as recording:
                    commands.run(block)
                sent = sent_in(recording)
            elif block.language == "sql":
                said = [line for line in block.code.splitlines() if line != NOTHING]
                assert len(said) == len(sent), f"{block.place} says\n{block.code}but sent: {sent}"
                for one_said, one_sent in zip(said, sent, strict=True):
                    assert matches(one_said, one_sent), f"{block.place}: {one_said!r}: {one_sent!r}"
    finally:
        if context is not None:
            context.pop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_and_sends_what_it_says(
    page: Path, wire: WireProxy, wire_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with page_directory(tmp_path, monkeypatch), disposed_engines():
        run_page(page, tmp_path, wire, wire_url)


PAGE = """
```python title="shop/app.py"
from flask import Flask
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = "URL"
db = SQLAlchemy(app)

@app.cli.command()
def one() -> None:
    print(db.session.scalar(db.text("SELECT 1")))
```
```python
from flask import current_app
from shop.app import app
```
```python
current_app.config["TITLE"] = "a page"
```
```console
$ flask --app shop.app one
1
$ export GREETING=hello
$ echo $GREETING; ls *
hello
…
app.py
$ true
```
```console
$ flask --app shop.app one
…
```
```sql
SELECT …
```
""".replace("URL", DATABASE)


def test_a_page_may_have_files_and_commands(
    wire: WireProxy, wire_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    directory = tmp_path / "directory"
    directory.mkdir()
    with page_directory(directory, monkeypatch), disposed_engines():
        run_page(page, directory, wire, wire_url)
        assert sys.modules["shop.app"].app.config["TITLE"] == "a page"
    assert "shop" not in sys.modules
    assert "shop.app" not in sys.modules
    assert Path.cwd() != directory


@pytest.mark.parametrize(
    "wrong",
    [
        "```console\n$ echo yes\nno\n```\n",
        "```console\n$ echo yes\n```\n",
        "```console\n$ true\nyes\n```\n",
        "```console\n$ no-such-command\n```\n",
        "```console\necho yes\n```\n",
        "```python titel='app.py'\n```\n",
        "```python\n1 / 0\n```\n",
        "```python\npass\n```\n```sql\nSELECT 1\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(
    wrong: str, wire: WireProxy, wire_url: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(wrong, encoding="utf-8")
    with pytest.raises((AssertionError, ZeroDivisionError)):
        run_page(page, tmp_path, wire, wire_url)


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
                    yield pytest.param(module, code, id=f"{module.stem}-{name}")


# What the docstrings take for granted.
GIVEN = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
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

engine = create_engine(url)
session = OptInSession(engine)
"""


@pytest.mark.parametrize(("module", "code"), list(docstring_examples()))
def test_a_docstrings_example_runs(module: Path, code: str, url: str) -> None:
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = vars(importlib.import_module(name))
    namespace = {key: value for key, value in own.items() if not key.startswith("_")}
    namespace |= {"__name__": "example", "url": url}
    with disposed_engines():
        exec(compile(GIVEN, "given", "exec", dont_inherit=True), namespace)
        with namespace["example"].app_context():
            namespace["db"].create_all()
            if ".get(User, 1)" in code:
                namespace["db"].session.add(namespace["User"](email="first@example.com"))
                namespace["db"].session.commit()
            exec(compile(code, "docstring", "exec", dont_inherit=True), namespace)


def test_the_pages_name_no_other_database() -> None:
    for page in PAGES:
        named = re.findall(r"postgresql\S*://[^\s\"`]+", page.read_text(encoding="utf-8"))
        # The example of several hosts makes an engine that connects to none of them.
        named = [one for one in named if "{hosts}" not in one]
        assert set(named) <= {DATABASE, WITH_DRIVER}, page.name


def test_examples_of_pages_and_docstrings_are_found() -> None:
    assert len(list(blocks(ROOT / "README.md"))) > 8
    assert len(list(docstring_examples())) > 2
    assert create_engine.__doc__


def links(page: Path) -> Iterator[str]:
    """Yield the relative links of a page, images included."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)|^\[[^]]+\]: +(\S+)", text, re.MULTILINE):
        link = "".join(target)
        if not re.match(r"[a-z]+:", link):
            yield link


def headings(page: Path) -> set[str]:
    """Return the anchors of a page: its own, and those that GitHub makes of its headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    found = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}
    return made | set(re.findall(r'^<a id="([\w-]+)"></a>$', text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_file_is_named_before_its_block(page: Path) -> None:
    """GitHub does not show the title of a block."""
    for block in blocks(page):
        assert block.title is None or f"`{block.title}`" in block.before, block.place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in headings(target), f"{page.name}: {link}"


def test_the_index_links_all_pages() -> None:
    index = ROOT / "docs" / "index.md"
    if index.exists():
        linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
        assert {page for page in PAGES if page.parent == index.parent} - {index} <= linked
