"""What SQL does, as far as its text tells. Nothing is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

_TOKEN = re.compile(
    r"""
      --[^\n]* | /\*.*?\*/
    | [eE]'(?:[^'\\]|\\.)*' | '[^']*' | "[^"]*" | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    | %\(\w+\)s | :\w+
    | (?P<word>[^\W\d][\w$]*) (?P<call>\s*\()? | (?P<mark>[();])
    """,
    re.VERBOSE | re.DOTALL,
)

# What a statement that only reads begins with.
_READING = frozenset({"SELECT", "VALUES", "TABLE", "SHOW", "EXPLAIN", "WITH"})

# A word that a statement which only reads does not have: it writes, or it locks.
_WRITING = frozenset(
    {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "SHARE", "TRUNCATE", "CALL", "DO", "ANALYZE"}
)

# Functions of PostgreSQL that write, or that change the session or the transaction:
# https://www.postgresql.org/docs/current/functions.html
_WRITING_FUNCTIONS = re.compile(
    r"NEXTVAL|SETVAL|SET_CONFIG|PG_NOTIFY|PG_(TRY_)?ADVISORY_\w+|LO_\w+|LOWRITE|DBLINK\w*"
    r"|TXID_CURRENT|PG_CURRENT_XACT_ID|PG_LOGICAL_\w+|PG_REPLICATION_\w+|PG_CREATE_\w+|SETSEED"
)

# Functions that only read. A SELECT without FROM that calls another one calls it for what it does.
_READING_NAMES = """
    ABS AGE ANY ARRAY ARRAY_AGG AVG BOOL_AND BOOL_OR CARDINALITY CAST CEIL CLOCK_TIMESTAMP COALESCE
    CONCAT COUNT CURRENT_DATABASE CURRENT_SCHEMA CURRENT_SCHEMAS CURRENT_SETTING CURRENT_TIMESTAMP
    DATE_PART DATE_TRUNC EXISTS EXTRACT FLOOR FORMAT GENERATE_SERIES GREATEST HAS_TABLE_PRIVILEGE
    JSONB_AGG JSONB_BUILD_OBJECT JSON_AGG JSON_BUILD_OBJECT LEAST LENGTH LOCALTIMESTAMP LOWER MAX
    MD5 MIN NOW NULLIF PG_BACKEND_PID PG_DATABASE_SIZE PG_IS_IN_RECOVERY PG_LAST_WAL_REPLAY_LSN
    PG_SLEEP PG_TYPEOF RANDOM ROUND STATEMENT_TIMESTAMP STRING_AGG SUBSTRING SUM TO_CHAR TO_DATE
    TO_REGCLASS TO_TIMESTAMP TRANSACTION_TIMESTAMP TRIM UNNEST UPPER VERSION
    ALL AND AS ELSE FILTER IN NOT OR OVER ROW SELECT SOME THEN VALUES WHEN WHERE WITHIN
"""
_READING_FUNCTIONS = frozenset(_READING_NAMES.split())

# Words that begin a statement which changes rows.
_CHANGES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "CALL", "DO", "COPY"})


def statements(sql: str) -> Iterator[list[tuple[str, bool]]]:
    """Yield the words of each statement, in capitals, each with whether a parenthesis follows.

    Comments, strings and quoted names are left out.

    :param sql: One statement or more.
    """
    words: list[tuple[str, bool]] = []
    depth = 0
    for token in _TOKEN.finditer(sql):
        if token["word"]:
            words.append((token["word"].upper(), token["call"] is not None))
            depth += token["call"] is not None
        elif token["mark"] == "(":
            depth += 1
        elif token["mark"] == ")":
            depth -= 1
        elif token["mark"] and depth <= 0:
            if words:
                yield words
            words = []
            depth = 0
    if words:
        yield words


@lru_cache(maxsize=2048)
def evidently_reads(sql: str) -> bool:
    """Tell whether SQL only reads, and locks nothing, as far as its text tells.

    ``False`` where there is doubt. A function of the user's own that writes, in a SELECT that has
    a FROM, is not seen.

    :param sql: One statement or more.
    """
    return all(map(_reads, statements(sql)))


def _reads(words: list[tuple[str, bool]]) -> bool:
    if words[0][0] not in _READING:
        return False
    names = {word for word, _ in words}
    if names & _WRITING:
        return False
    called = {word for word, is_called in words if is_called}
    if any(map(_WRITING_FUNCTIONS.fullmatch, called)):
        return False
    return "FROM" in names or words[0][0] == "SHOW" or called <= _READING_FUNCTIONS


@lru_cache(maxsize=2048)
def evidently_writes(sql: str) -> bool:
    """Tell whether SQL changes rows, as far as its text tells; ``False`` where there is doubt.

    :param sql: One statement or more.
    """
    return any(
        words[0][0] in _CHANGES or (words[0][0] == "WITH" and _changes_in_cte(words))
        for words in statements(sql)
    )


def _changes_in_cte(words: list[tuple[str, bool]]) -> bool:
    names = [word for word, _ in words]
    return any(
        name in _CHANGES and names[at - 1] not in ("FOR", "KEY") for at, name in enumerate(names)
    )
