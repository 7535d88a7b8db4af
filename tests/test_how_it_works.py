"""The picture of the core in ``docs/how-it-works.md`` is that of the imports."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import fictive_sqlalchemy

CORE = Path(fictive_sqlalchemy.__file__).parent / "_core"
PAGE = Path(__file__).parent.parent / "docs" / "how-it-works.md"


def imports(module: str) -> set[str]:
    """Return the modules of the core that one of them imports, for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((CORE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


@cache
def floor(module: str) -> int:
    """Return how high a module stands: one above the highest that it imports."""
    return max((floor(other) + 1 for other in imports(module)), default=0)


def test_each_module_stands_one_line_above_the_highest_that_it_imports() -> None:
    modules = {path.stem for path in CORE.glob("*.py")} - {"__init__"}
    highest = max(map(floor, modules))
    lines = [
        " ".join(sorted(module for module in modules if floor(module) == height))
        for height in range(highest, -1, -1)
    ]
    picture = re.search(r"## The floors.*?```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert picture is not None
    assert picture[1].splitlines() == lines
