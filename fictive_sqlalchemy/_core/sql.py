"""What SQL does, as far as its text shows. Nothing here sends anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
      --[^\n]* | /\*.*?\*/
    | [eE]'(?:[^'\\]|\\.)*' | '[^']*' | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$
    | %\(\w+\)s | :\w+
    | (?P<qualifier>(?:(?:[^\W\d][\w$]*|"[^"]*")\s*\.\s*)+)?
      (?:(?P<word>[^\W\d][\w$]*)|"(?P<quoted>[^"]*)")
      (?P<call>(?:\s|--[^\n]*\n|/\*(?:(?!\*/).)*\*/)*\()?
    | (?P<mark>[();])
    """,
    re.VERBOSE | re.DOTALL,
)

# A statement that only reads begins with one of these words.
_READING = frozenset({"SELECT", "VALUES", "TABLE", "SHOW", "EXPLAIN", "WITH"})

# A statement that contains one of these words writes or locks, unless the word is a name.
_WRITING = frozenset(
    {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "SHARE", "TRUNCATE", "CALL", "DO", "ANALYZE"}
)

# Functions of PostgreSQL that write, or that change the session or the transaction:
# https://www.postgresql.org/docs/current/functions.html
_WRITING_FUNCTIONS = re.compile(
    r"NEXTVAL|SETVAL|SET_CONFIG|PG_NOTIFY|PG_(TRY_)?ADVISORY_\w+|LO_\w+|LOWRITE|DBLINK\w*"
    r"|TXID_CURRENT|PG_CURRENT_XACT_ID|PG_LOGICAL_\w+|PG_REPLICATION_\w+|PG_CREATE_\w+|SETSEED"
)

# Functions that only read, and keywords that a parenthesis may follow. Another function may be the
# user's own and may write, if a SELECT without FROM calls it, or if it is the source of the rows.
_READING_NAMES = """
    ABS AGE ANY ARRAY ARRAY_AGG AVG BOOL_AND BOOL_OR CARDINALITY CAST CEIL CLOCK_TIMESTAMP COALESCE
    CONCAT COUNT CURRENT_DATABASE CURRENT_SCHEMA CURRENT_SCHEMAS CURRENT_SETTING CURRENT_TIMESTAMP
    DATE_PART DATE_TRUNC EXISTS EXTRACT FLOOR FORMAT GENERATE_SERIES GENERATE_SUBSCRIPTS GREATEST
    HAS_TABLE_PRIVILEGE JSONB_AGG JSONB_ARRAY_ELEMENTS JSONB_ARRAY_ELEMENTS_TEXT JSONB_BUILD_OBJECT
    JSONB_EACH JSONB_EACH_TEXT JSONB_OBJECT_KEYS JSONB_PATH_QUERY JSONB_TO_RECORD
    JSONB_TO_RECORDSET JSON_AGG JSON_ARRAY_ELEMENTS JSON_ARRAY_ELEMENTS_TEXT JSON_BUILD_OBJECT
    JSON_EACH JSON_EACH_TEXT JSON_OBJECT_KEYS JSON_TABLE JSON_TO_RECORD JSON_TO_RECORDSET LEAST
    LENGTH LOCALTIMESTAMP LOWER MAX MD5 MIN NOW NULLIF PG_BACKEND_PID PG_DATABASE_SIZE
    PG_IS_IN_RECOVERY PG_LAST_WAL_REPLAY_LSN PG_SLEEP PG_TYPEOF PLAINTO_TSQUERY RANDOM
    REGEXP_MATCHES REGEXP_SPLIT_TO_TABLE ROUND STATEMENT_TIMESTAMP STRING_AGG STRING_TO_TABLE
    SUBSTRING SUM TO_CHAR TO_DATE TO_REGCLASS TO_TIMESTAMP TO_TSQUERY TRANSACTION_TIMESTAMP TRIM
    UNNEST UPPER VERSION WEBSEARCH_TO_TSQUERY
    ALL AND AS BETWEEN BY CASE ELSE EXCEPT FILTER FROM ILIKE IN INTERSECT JOIN LATERAL LIKE
    MATERIALIZED NOT ON OR OVER ROW SELECT SOME THEN UNION USING VALUES WHEN WHERE WITHIN
"""
_READING_FUNCTIONS = frozenset(_READING_NAMES.split())

# Words that precede a function which is the source of rows.
_SOURCES = frozenset({"FROM", "JOIN", "LATERAL"})

# The word after one of these is a name, even if it looks like a keyword; not after "FROM (".
_BEFORE_A_NAME = frozenset({"AS", "FROM", "JOIN"})

# Words that begin a statement which changes rows.
_CHANGES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE", "TRUNCATE", "CALL", "DO", "COPY"})


class Call(NamedTuple):
    """One call of a function."""

    arguments: list[str]
    """The SQL of each argument."""

    end: int
    """The position in the SQL at which the last argument ends."""


class Word(NamedTuple):
    """A word of a statement, in capitals."""

    text: str

    is_called: bool
    """Whether a parenthesis follows the word."""

    is_name: bool
    """Whether the word is a name and not a keyword, such as ``share`` in ``paper.share``."""


def statements(sql: str) -> Iterator[list[Word]]:
    """Yield the words of each statement.

    Comments, strings and quoted names are left out. A quoted name of a called function is yielded.

    :param sql: One statement or more.
    """
    words: list[Word] = []
    depth = 0
    for token in _TOKEN.finditer(sql):
        if token["word"] or token["quoted"] is not None:
            is_called = token["call"] is not None
            depth += is_called
            is_name = bool(
                token["qualifier"]
                or not token["word"]
                or (words and words[-1].text in _BEFORE_A_NAME and not words[-1].is_called)
            )
            if token["word"] or is_called:
                words.append(Word((token["word"] or token["quoted"]).upper(), is_called, is_name))
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


def calls(sql: str, function: str) -> Iterator[Call]:
    """Yield each call of a function that is not in a comment or a string.

    :param sql: One statement or more.
    :param function: The name of the function, in capitals.
    """
    tokens = list(_TOKEN.finditer(sql))
    for at, token in enumerate(tokens):
        if token["call"] is None or (token["word"] or token["quoted"]).upper() != function:
            continue
        arguments: list[str] = []
        depth, start, position = 1, token.end(), token.end()
        for after in tokens[at + 1 :]:
            while depth == 1 and (comma := sql.find(",", position, after.start())) >= 0:
                arguments.append(sql[start:comma])
                start = position = comma + 1
            position = after.end()
            if after["call"] is not None or after["mark"] == "(":
                depth += 1
            elif after["mark"] == ")":
                depth -= 1
                if not depth:
                    arguments.append(sql[start : after.start()])
                    break
        yield Call(arguments, position)


@lru_cache(maxsize=2048)
def evidently_reads(sql: str) -> bool:
    """Tell whether SQL only reads and locks nothing, as far as its text shows.

    In case of doubt the answer is ``False``. But if a SELECT with a FROM calls a function of the
    user that writes, among its columns or in its criteria, the answer is ``True``.

    :param sql: One statement or more.
    """
    return all(map(_reads, statements(sql)))


def is_reading_function(name: str) -> bool:
    """Tell whether a function is known to be one of PostgreSQL that only reads.

    :param name: The name of the function.
    """
    return name.upper() in _READING_FUNCTIONS


def _reads(words: list[Word]) -> bool:
    first = words[0].text
    if first not in _READING:
        return False
    keywords = {word.text for word in words if not word.is_name}
    if keywords & _WRITING:
        return False
    called = {word.text for word in words if word.is_called}
    if any(map(_WRITING_FUNCTIONS.fullmatch, called)):
        return False
    if "FROM" in keywords:
        called = {
            word.text
            for before, word in pairwise(words)
            if word.is_called and before.text in _SOURCES
        }
    return first == "SHOW" or called <= _READING_FUNCTIONS


@lru_cache(maxsize=2048)
def evidently_writes(sql: str) -> bool:
    """Tell whether SQL changes rows, as far as its text shows; in case of doubt, return ``False``.

    :param sql: One statement or more.
    """
    return any(
        words[0].text in _CHANGES or (words[0].text == "WITH" and _changes_in_cte(words))
        for words in statements(sql)
    )


def _changes_in_cte(words: list[Word]) -> bool:
    return any(
        word.text in _CHANGES and not word.is_name and before.text not in ("FOR", "KEY")
        for before, word in pairwise(words)
    )


def first_words(sql: str) -> list[list[str]]:
    """Return the first words of each statement, three at most, in capitals.

    :param sql: One statement or more.
    """
    found: list[list[str]] = []
    for statement in statements(sql):
        words = [word.text for word in statement]
        found.append(words[:3])
        if words[0] == "CREATE" and ("BEGIN", "ATOMIC") in pairwise(words):
            break  # the body of an SQL function follows: its END is no COMMIT
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


# A statement without any of these words ends no transaction. Most statements have none of them.
_ENDS = re.compile(r"\b(?:COMMIT|ROLLBACK|END|ABORT|PREPARE)\b", re.IGNORECASE)


def ends_transaction(sql: str) -> bool:
    """Tell whether SQL commits or rolls back the transaction of the connection.

    :param sql: One statement or more.
    """
    return _ENDS.search(sql) is not None and any(
        begins_or_ends_transaction(words) and words[0] not in ("BEGIN", "START")
        for words in first_words(sql)
    )
