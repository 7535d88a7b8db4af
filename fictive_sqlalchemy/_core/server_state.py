"""What a statement leaves on the server's session, and so for the next user of the connection.

With SQLAlchemy's own transactions, an uncommitted SET ends with the ROLLBACK of the pool. In
autocommit, what a SET has set stays on the connection, and another request would read with the
role, the search_path or the locks of the request before. So the pool closes the connection.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from .errors import see
from .places import warn_at_calling_place
from .sql import Word, calls, statements


class SessionStateWarning(UserWarning):
    """A statement leaves something on its connection, so the pool closes the connection.

    The pool closes the connection when it comes back, unless the transaction of the statement was
    rolled back, or the pool is a ``StaticPool`` or a ``SingletonThreadPool``.
    """


class Left(NamedTuple):
    """What a statement leaves behind."""

    what: str
    """The name of what is left, for the text of the warning."""

    instead: str
    """What to use instead, for the text of the warning."""

    rolls_back: bool
    """Whether a ROLLBACK of the transaction undoes the statement."""

    may_be_held: bool = True
    """Whether a connection of ``engine.connect()``, where this is useful, gets no warning."""


_SETTING = Left(
    "a setting of the server's session",
    "use SET LOCAL, or set_config(…, true), inside begin(), where it ends with the transaction; or "
    "a `connect` listener for what every connection needs",
    True,
    may_be_held=False,
)
_LISTENING = Left("LISTEN", "hold a connection of engine.connect() for as long as you listen", True)
_TEMPORARY = Left(
    "a temporary object",
    "create it inside begin() with ON COMMIT DROP, or hold a connection of engine.connect() for as "
    "long as it is needed",
    True,
)
_LOCK = Left(
    "an advisory lock of the server's session",
    "use pg_advisory_xact_lock() inside begin(), which ends with the transaction; or hold a "
    "connection of engine.connect() for as long as it is needed",
    False,
)
_PREPARED = Left(
    "a prepared statement",
    "leave it to the driver, or hold a connection of engine.connect() for as long as it is needed",
    False,
)
_LIBRARY = Left(
    "a loaded library",
    "load it in a `connect` listener, or name it in session_preload_libraries",
    False,
)
_EXTENSION = Left(
    "something that an extension of the server keeps for the server's session",
    "hold a connection of engine.connect() for as long as it is needed",
    False,
)
_RESET = Left(
    "other settings than a `connect` listener or the driver has made",
    "leave it out, and make settings with SET LOCAL or session.set_local(), which end by "
    "themselves",
    True,
    may_be_held=False,
)
_CURSOR = Left(
    "a cursor WITH HOLD",
    "stream with execution_options(yield_per=…), or hold a connection of engine.connect() for as "
    "long as it is needed",
    True,
)

# Functions whose effect outlives the transaction.
_FUNCTIONS = {
    "PG_ADVISORY_LOCK": _LOCK,
    "PG_ADVISORY_LOCK_SHARED": _LOCK,
    "PG_TRY_ADVISORY_LOCK": _LOCK,
    "PG_TRY_ADVISORY_LOCK_SHARED": _LOCK,
    "DBLINK_CONNECT": _EXTENSION,
    "DBLINK_CONNECT_U": _EXTENSION,
    "SET_LIMIT": _SETTING,
    "SETSEED": _SETTING,
    "PG_REPLICATION_ORIGIN_SESSION_SETUP": _EXTENSION,
}

# Functions that release a lock. A statement that takes a lock and releases it leaves nothing.
_UNLOCKS = frozenset({"PG_ADVISORY_UNLOCK", "PG_ADVISORY_UNLOCK_SHARED", "PG_ADVISORY_UNLOCK_ALL"})

_TRUE = re.compile(r"\s*'?(?:true|t|on|yes|y|1)'?\s*(?:::\s*bool(?:ean)?)?\s*", re.IGNORECASE)
_TRUTH = (True, "true", "t", "on", "yes", "1")
_POSITIONAL = re.compile(r"%%|(%s)")
_BOUND = re.compile(r"\s*%(?:\((\w+)\))?[sb]\s*(?:::\s*bool(?:ean)?)?\s*", re.IGNORECASE)

# A statement without any of these words leaves nothing. Most statements have none of them.
_ANY = re.compile(
    r"\b(?:SET|RESET|DISCARD|LISTEN|TEMP|TEMPORARY|PG_TEMP\w*|PREPARE|LOAD|HOLD|SETSEED|SET_LIMIT"
    r"|SET_CONFIG|PG_(?:TRY_)?ADVISORY_LOCK(?:_SHARED)?|DBLINK_CONNECT(?:_U)?"
    r"|PG_REPLICATION_ORIGIN_SESSION_SETUP|PG_SETTINGS)\b",
    re.IGNORECASE,
)

_BODY = re.compile(r"\$(\w*)\$(.*?)\$\1\$|'((?:[^']|'')*)'", re.DOTALL)

# Words between CREATE and the kind of the object that is created.
_BEFORE_KIND = frozenset({"OR", "REPLACE", "GLOBAL", "LOCAL", "TEMP", "TEMPORARY", "RECURSIVE"})
_TEMPORARY_WORDS = frozenset({"TEMP", "TEMPORARY"})
_IN_PG_TEMP = re.compile(r'\bpg_temp"?\s*\.', re.IGNORECASE)

# Words of PL/pgSQL after which a statement begins.
_BLOCK_WORDS = frozenset({"BEGIN", "THEN", "ELSE", "LOOP", "PERFORM"})


def left_behind(sql: str, parameters: Any) -> Left | None:
    """Tell what SQL leaves on the server's session, as far as its text shows. Sends nothing.

    The text does not show what a function of the user sets.

    :param sql: One statement or more, in the driver's form.
    :param parameters: The parameters of the SQL. Whether a ``set_config()`` is local may be one.
    """
    found = examine(sql)
    if found is None or isinstance(found, Left):
        return found
    return None if all(_is_true(parameters, one) for one in found) else _SETTING


@lru_cache(maxsize=2048)
def examine(sql: str) -> Left | tuple[str | int, ...] | None:
    """Tell what SQL leaves, or which parameters tell whether its ``set_config()`` are local.

    The answer is cached for each text, because each statement passes through here.

    :param sql: As :func:`left_behind` takes it.
    :returns: ``None`` if the SQL leaves nothing; otherwise what is left, or the parameters.
    """
    if not _ANY.search(sql):
        return None
    for words in statements(sql):
        if (left := _of_statement(words, sql)) is not None:
            return left
    parameters: list[str | int] = []
    for call in calls(sql, "SET_CONFIG"):
        if len(call.arguments) != 3:
            return _SETTING
        bound = _BOUND.fullmatch(call.arguments[2])
        if bound is None:
            if not _TRUE.fullmatch(call.arguments[2]):
                return _SETTING
        elif bound[1] is not None:
            parameters.append(bound[1])
        else:  # a parameter without a name: its position
            before = sum(map(bool, _POSITIONAL.findall(sql, 0, call.end)))
            parameters.append(before - 1)
    return tuple(parameters) or None


def _of_statement(words: list[Word], sql: str) -> Left | None:
    first = words[0].text
    names = [word.text for word in words]
    if first == "DO":
        bodies = (body[2] or body[3] or "" for body in _BODY.finditer(sql))
        return next(filter(None, map(_of_body, bodies)), None)
    if ("UPDATE", "PG_SETTINGS") in pairwise(names):  # this UPDATE does what SET does
        return _SETTING
    if first == "SET":
        is_local = names[1:2] in (["LOCAL"], ["TRANSACTION"], ["CONSTRAINTS"])
        return None if is_local else _SETTING
    if first == "RESET" or (first == "DISCARD" and names[1:2] == ["ALL"]):
        return _RESET
    if first == "LISTEN":
        return _LISTENING
    if first == "LOAD":
        return _LIBRARY
    if first == "PREPARE" and names[1:2] != ["TRANSACTION"]:
        return _PREPARED
    if first == "DECLARE" and "HOLD" in names and names[names.index("HOLD") - 1] == "WITH":
        return _CURSOR
    if _is_temporary(first, names, sql):
        return _TEMPORARY
    called = {word.text for word in words if word.is_called}
    for word in called & _FUNCTIONS.keys():
        if _FUNCTIONS[word] is not _LOCK or not called & _UNLOCKS:
            return _FUNCTIONS[word]
    return None


def _is_temporary(first: str, names: list[str], sql: str) -> bool:
    if first == "CREATE":
        before_kind = takewhile(_BEFORE_KIND.__contains__, names[1:])
        if not _TEMPORARY_WORDS & {*before_kind} and not _IN_PG_TEMP.search(sql):
            return False
        return " ON COMMIT DROP " not in f" {' '.join(names)} "
    if first not in ("SELECT", "WITH"):
        return False
    return any(
        word == "INTO" and _TEMPORARY_WORDS & {*names[at + 1 : at + 3]}
        for at, word in enumerate(names)
    )


def _of_body(body: str) -> Left | None:
    """Tell what the body of a DO leaves on the server's session."""
    for words in statements(body):
        at = max((i for i, word in enumerate(words) if word.text in _BLOCK_WORDS), default=-1)
        rest = words[at + 1 :]
        if rest and (left := _of_statement(rest, body)) is not None:
            return left
        if any(word.text == "EXECUTE" for word in words):
            made = (string[2] or string[3] or "" for string in _BODY.finditer(body))
            if left := next(filter(None, map(_of_body, made)), None):
                return left
    found = examine("SELECT " + body) if any(calls(body, "SET_CONFIG")) else None
    return found if isinstance(found, Left) else None


def _is_true(parameters: Any, name: str | int) -> bool:
    """Tell whether a parameter is true, in each of the parameter sets if there are several."""
    given: Any = parameters
    sets: list[Any] = given if isinstance(parameters, list) else [given]
    try:
        return all(one[name] in _TRUTH for one in sets)
    except (LookupError, TypeError):
        return False


def warn(left: Left) -> None:
    """Warn of what a statement leaves, at the application's line that sends the statement."""
    warn_at_calling_place(
        f"This statement leaves {left.what} on its connection, which is therefore closed after its "
        f"use, and not used again. Instead {left.instead}." + see("session-state"),
        SessionStateWarning,
    )
