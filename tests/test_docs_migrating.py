"""The searches of ``docs/migrating.md`` find what its tables say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text("utf-8")

_STEP_1 = "### Look for these before you deploy"
_STEP_4 = "## Step 4"


def section(heading: str) -> str:
    """Return what follows a heading, up to the next."""
    return re.split(r"^#", PAGE[PAGE.index(heading) + len(heading) :], flags=re.MULTILINE)[0]


def searches(heading: str) -> list[str]:
    """Return the regular expressions of the ``grep`` commands in a section."""
    return re.findall(r'^    grep -rnE "(.*)" \w+/$', section(heading), re.MULTILINE)


def terms(heading: str) -> list[str]:
    """Return each piece of code in the first column of a section's table."""
    found: list[str] = []
    for line in section(heading).splitlines():
        if line.startswith("| ") and not line.startswith("| search for"):
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


@pytest.mark.parametrize(("heading", "at_least"), [(_STEP_1, 8), (_STEP_4, 20)])
def test_each_term_of_the_table_is_found_by_the_search(heading: str, at_least: int) -> None:
    patterns = searches(heading)
    assert patterns
    assert len(terms(heading)) >= at_least
    for term in terms(heading):
        # `begin()` is what the line with commit() was for, and needs no search.
        if term != "begin()":
            assert any(re.search(pattern, term) for pattern in patterns), term


@pytest.mark.parametrize(
    "line",
    [
        "db.session.query(Order).delete(synchronize_session='fetch')",
        "Order.query.filter_by(id=1).delete()",
        "db.session.scalars(insert(Order).returning(Order), rows)",
        "db.session.scalar(update(Order).returning(Order.id))",
        "with db.engine.connect() as connection:",
        "db.session.refresh(order, with_for_update=True)",
        "CREATE TEMP TABLE chosen (id int)",
        "SELECT pg_try_advisory_lock(1)",
        "event.listen(Session, 'after_commit', notify)",
    ],
)
def test_lines_of_real_code_are_found_by_the_search(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in searches(_STEP_4))


def test_the_search_finds_no_object_that_is_deleted() -> None:
    for pattern in searches(_STEP_4):
        assert not re.search(pattern, "db.session.delete(order)")
