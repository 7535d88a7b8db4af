"""How to find, in the code, the private names of other libraries: those that begin with ``_``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fictive_sqlalchemy

PACKAGE = Path(fictive_sqlalchemy.__file__).parent


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def names_with_a_test(*tests: type[Any]) -> set[str]:
    names = {name for each in tests for name in vars(each) if name.startswith("test__")}
    return {name.removeprefix("test_") for name in names}


def is_private(name: str) -> bool:
    is_of_python = name.endswith("__") and not name.startswith("__sqlalchemy_")
    return name.startswith("_") and not is_of_python


def _assigned_in(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets = [statement.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def used_in(*paths: Path) -> set[str]:
    """Every name with a leading underscore that modules read, write, define, import or spell."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.ClassDef):  # what is defined as an alias
                names.update(_assigned_in(node))
            elif isinstance(node, ast.alias):
                names.add(node.name.rpartition(".")[2])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.update(node.value.split("."))  # what attrgetter() takes may have dots
    return set(filter(is_private, names))
