"""The house: which module may import which, and how long a module, a test file or a class is."""

from __future__ import annotations

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fictive_sqlalchemy

TESTS = Path(__file__).parent
PACKAGE = Path(fictive_sqlalchemy.__file__).parent
NAME = PACKAGE.name
CORE = f"{NAME}._core"

#: What the core may import beside the standard library and itself.
CORE_NEEDS = {"sqlalchemy", "typing_extensions"}

MOST_LINES_OF_A_MODULE = 600
MOST_LINES_OF_A_CLASS = 450


def module(path: Path) -> str:
    """The dotted name of the module in a file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that one imports, at its top, in a function or for type checkers alone."""
    name = module(path)
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of that package, or a name in that module
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found - {name}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def is_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def test_what_is_imported_is_seen() -> None:
    assert f"{CORE}.states" in IMPORTS[f"{CORE}.writing_session"]
    assert f"{CORE}.session" in IMPORTS[NAME]
    assert "sqlalchemy" in IMPORTS[f"{CORE}.session"]
    assert "typing_extensions" in IMPORTS[f"{CORE}.blocks"]  # for type checkers alone


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imported & MODULES.keys() for name, imported in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_core_needs_sqlalchemy_alone() -> None:
    may_be_imported = CORE_NEEDS | sys.stdlib_module_names
    wrong = {
        f"{name} imports {other}"
        for name, imported in IMPORTS.items()
        for other in imported
        if is_in(name, CORE)
        and not is_in(other, CORE)
        and other.partition(".")[0] not in may_be_imported
    }
    assert wrong == set()


def test_a_module_that_is_private_to_a_folder_is_used_in_that_folder_alone() -> None:
    wrong = {
        f"{name} imports {other}"
        for name, imported in IMPORTS.items()
        for other in imported & MODULES.keys()
        for folder, _, last in [other.rpartition(".")]
        if last.startswith("_") and not is_in(name, folder)
    }
    assert wrong == set()


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= MOST_LINES_OF_A_MODULE


def test_no_test_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(TESTS)): len(path.read_text().splitlines())
        for path in TESTS.rglob("*.py")
    }
    assert {name for name, length in lengths.items() if length > MOST_LINES_OF_A_MODULE} == set()


def test_no_class_is_too_long() -> None:
    lengths = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, length in lengths.items() if length > MOST_LINES_OF_A_CLASS} == set()
