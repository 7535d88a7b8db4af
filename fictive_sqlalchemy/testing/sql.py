"""Recognize the statements that isolation has to treat in a special way, without a full parser."""

from __future__ import annotations

import re
from itertools import pairwise

from .._core.sql import statements

# The effect of these statements ends with the transaction, although they write no row.
_BOUND_TO_TRANSACTION = re.compile(r"\b(?:SAVEPOINT|SET|set_config)\b", re.IGNORECASE)


def first_words(query: str) -> list[list[str]]:
    """Return the first words of each statement in a string of SQL.

    :param query: One statement, or several that are separated by semicolons.
    :returns: For each statement a list of up to three words, in capitals.
    """
    found: list[list[str]] = []
    for statement in statements(query):
        words = [word.text for word in statement]
        found.append(words[:3])
        if words[0] == "CREATE" and ("BEGIN", "ATOMIC") in pairwise(words):
            break  # the body of an SQL function: its statements end in END, which is no COMMIT
    return found


def begins_or_ends_transaction(words: list[str]) -> bool:
    """Tell whether a statement would begin or end the transaction of the connection.

    :param words: The statement's first words, from :func:`first_words`.
    """
    first, *others = words
    if first in ("START", "PREPARE"):
        return others[:1] == ["TRANSACTION"]
    if first == "ROLLBACK":
        return "TO" not in others
    return first in ("BEGIN", "COMMIT", "END", "ABORT")


def is_bound_to_transaction(query: str) -> bool:
    """Tell whether a rollback undoes something of a statement even if it writes no row.

    :param query: The SQL. A string that only looks like such a statement counts as one.
    """
    return _BOUND_TO_TRANSACTION.search(query) is not None
