"""The places in the pages into which a run writes what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def fill(page: Path, written: Mapping[str, str]) -> None:
    """Replace the measured text in a page.

    :param page: The page.
    :param written: The new texts, by the names of their places. A place may become empty.
    :raises ValueError: if the page has no place of that name.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in written.items():
        before, begin, rest = text.partition(f"<!-- measured: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        if not (begin and end):
            raise ValueError(f"{page} has no place for {name!r}.")
        filled = f"\n{part}\n\n" if part else ""
        text = f"{before}{begin}{filled}{end}{after}"
    page.write_text(text, encoding="utf-8")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    :param head: The cells of the head.
    :param rows: The cells of each line below the head.
    """
    return "\n".join([_line(head), "|---" * len(head) + "|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
