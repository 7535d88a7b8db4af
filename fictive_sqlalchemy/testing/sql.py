"""Recognize the statements that isolation has to treat in a special way, without a full parser."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""
      --[^\n]* | /\*.*?\*/
    | [eE]'(?:[^'\\]|\\.)*' | '[^']*' | "[^"]*" | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    | (?P<word>[^\W\d][\w$]*) | (?P<mark>[();])
    """,
    re.VERBOSE | re.DOTALL,
)

# The effect of these statements ends with the transaction, although they write no row.
_BOUND_TO_TRANSACTION = re.compile(r"\b(?:SAVEPOINT|SET|set_config)\b", re.IGNORECASE)


def first_words(query: str) -> list[list[str]]:
    """Return the first words of each statement in a string of SQL.

    Comments, quoted strings and everything in parentheses are skipped where they could be mistaken
    for the end of a statement.

    :param query: One statement, or several that are separated by semicolons.
    :returns: For each statement a list of up to three words, in capitals.
    """
    statements: list[list[str]] = []
    words: list[str] = []
    depth = 0
    for token in _TOKEN.finditer(query):
        if token["word"]:
            words.append(token["word"].upper())
            if words[0] == "CREATE" and words[-2:] == ["BEGIN", "ATOMIC"]:
                break  # the body of an SQL function: its statements end in END, which is no COMMIT
        elif token["mark"] == "(":
            depth += 1
        elif token["mark"] == ")":
            depth -= 1
        elif token["mark"] and not depth and words:
            statements.append(words[:3])
            words = []
    if words:
        statements.append(words[:3])
    return statements


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
