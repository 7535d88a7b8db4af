"""What differs between the modes is in the strict report.

Hypothesis writes small programs, one operation on a line. Each runs with ``begin_on_write=True``
and in the strict mode, on the same rows. If what can be seen of the two differs (values, errors,
the rows at the end), then the report of the first names a line at or before the one that first
differs.

``REPORT_EXAMPLES=5000 REPORT_SEED=7 pytest`` of this file runs more of it.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import ActiveRecordMixin, OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create, update_or_create
from fictive_sqlalchemy.strict_report import Finding, StrictReport
from tests.library import Author, Base, Document, Onlooker, Seat, authors, opened

EXAMPLES = int(os.environ.get("REPORT_EXAMPLES", "200"))
SEED = os.environ.get("REPORT_SEED")

FILE = "program"

OPERATIONS = """
session.add(Author(name='NAME', age=AGE))
session.add(Document(title='NAME', author_id=ID))
session.add(Seat(place=ID))
if one: one.age = AGE
if one: one.name = 'NAME'
if one: session.delete(one)
if one: one.documents.append(Document(title='NAME'))
session.flush()
session.flush()
session.commit()
session.commit()
session.rollback()
session.close()
session.expire_all()
if one in session: session.expire(one)
if one in session: session.refresh(one)
if one in session: session.refresh(one, with_for_update=True)
one = session.get(Author, ID) or one; see(one.age)
one = session.get(Author, ID) or one; see(one.age)
see(one.name, len(one.documents))
see([document.author.name for document in one.documents])
see(session.scalars(select(Author.name).order_by(Author.id)).all())
see([author.name for author in session.query(Author).order_by(Author.id)])
see(session.query(Author).filter_by(name='NAME').count())
see(session.scalar(text('SELECT count(*) FROM author')))
see([name for name in session.scalars(streamed)])
with session.no_autoflush: see(session.scalars(select(Author.name).order_by(Author.id)).all())
see(session.get(Author, ID, with_for_update=True) is None)
see(len(session.query(Author).with_for_update().all()))
session.execute(update(Author).where(Author.id == ID).values(age=AGE))
session.execute(update(authors).values(age=authors.c.age + 1))
session.execute(insert(Author).values(name='NAME'))
session.execute(insert(authors), [dict(name='NAME'), dict(name='Gus')])
see(session.scalars(insert(Author).returning(Author.id), [dict(name='NAME')]).all())
session.execute(delete(Document).where(Document.author_id == ID))
session.execute(text("UPDATE author SET age = ID WHERE name = 'NAME'"))
session.execute(insert(Seat).values(place=ID))
session.connection().execute(update(authors).values(age=AGE))
session.bulk_save_objects([Author(name='NAME'), Author(name='Gus')])
session.bulk_insert_mappings(Author, [dict(name='NAME')])
session.bulk_update_mappings(Author, [dict(id=ID, age=AGE)])
see(session.query(Author).filter_by(name='NAME').update(dict(age=AGE)))
see(session.query(Document).filter_by(author_id=ID).delete())
see(session.merge(Author(id=ID, name='NAME')) is one)
see(session.merge(Author(id=7, name='NAME')) is one)
see(filter_by_or_create(session, Author, dict(name='NAME'), dict(age=AGE))[1])
see(update_or_create(session, Author, dict(name='NAME'), dict(age=AGE))[1])
Writer(name='NAME').save()
other.add(Seat(place=ID)); other.flush()
other.execute(insert(Seat).values(place=ID))
other.commit()
other.rollback()
see(other.scalars(select(Author.name).order_by(Author.id)).all())
see(other.scalars(select(Seat.place).order_by(Seat.id)).all())
raise ZeroDivisionError
""".strip().splitlines()

BLOCKS = (
    *("with session.begin():", "with session.begin_nested():", "with session.atomic():"),
    "with caught(), session.begin_nested():",
    "with caught(session.rollback):",
)

# Of these, begin_on_write itself says where they come from. An application that ran without errors
# has none of them.
_NEEDS_ROLLBACK = ("PendingRollbackError", "InFailedSqlTransaction", "already begun")


class Writer(ActiveRecordMixin, Base):
    """An author that stores itself."""

    __table__ = authors


@st.composite
def operation(draw: st.DrawFn) -> list[str]:
    line: str = draw(st.sampled_from(OPERATIONS))
    line = line.replace("NAME", draw(st.sampled_from(["Ada", "Bob", "Eve"])))
    line = line.replace("ID", str(draw(st.integers(1, 3))))
    return [line.replace("AGE", str(draw(st.integers(-1, 3))))]


def joined(parts: list[list[str]]) -> list[str]:
    return [line for part in parts for line in part]


@st.composite
def block(draw: st.DrawFn, parts: st.SearchStrategy[list[str]]) -> list[str]:
    inside = joined(draw(st.lists(parts, min_size=1, max_size=3)))
    return [draw(st.sampled_from(BLOCKS)), *(f"    {line}" for line in inside)]


@st.composite
def handled(draw: st.DrawFn, parts: st.SearchStrategy[list[str]]) -> list[str]:
    inside = joined(draw(st.lists(parts, min_size=1, max_size=5)))
    undo = draw(st.sampled_from(["session.rollback()", "session.close()"]))
    return [
        "try:",
        *(f"    {line}" for line in inside),
        "except Exception as e:",
        f"    {undo}; failed(e)",
    ]


PART = st.one_of(
    *[operation()] * 6, block(operation()), block(st.one_of(operation(), block(operation())))
)
PROGRAM = st.lists(handled(PART), min_size=1, max_size=3).map(joined)


class Outcome(NamedTuple):
    length: int
    """The last line of the program."""

    seen: list[tuple[int, Any]]
    """What can be seen, each with its line."""
    rows: list[Any]
    findings: list[Finding]


class Runner:
    """Runs a program in either mode.

    :param engine: Where to run it.
    :param onlooker: Who sets the rows back, and sees what is stored.
    """

    def __init__(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        self._engine = engine
        self._onlooker = onlooker

    def run(self, lines: list[str], *, begin_on_write: bool) -> Outcome:
        self._onlooker.run(RESET)
        code = "def program(session, other, one):\n" + textwrap.indent("\n".join(lines), " ")
        seen: list[tuple[int, Any]] = []
        names = {**_names(seen), "__name__": FILE}
        exec(compile(code, FILE, "exec"), names)
        sessions = sessionmaker(self._engine, class_=OptInSession, begin_on_write=begin_on_write)
        with StrictReport(log=False) as report, sessions() as session, sessions() as other:
            names["Writer"].__scoped_session__ = lambda: session
            names["program"](session, other, Author(name="never added", age=1))
        rows = [
            self._onlooker.column(f"SELECT {table}::text FROM {table} ORDER BY id")
            for table in ("author", "document", "seat")
        ]
        return Outcome(
            len(lines) + 1, seen, rows, [one for one in report.findings() if one.filename == FILE]
        )


NAMES = {
    **{name: getattr(sa, name) for name in ("select", "insert", "update", "delete", "text")},
    **{one.__name__: one for one in (Author, Document, Seat, Writer)},
    **{one.__name__: one for one in (filter_by_or_create, update_or_create)},
    "authors": authors,
    "streamed": sa.select(Author.name).order_by(Author.id).execution_options(yield_per=2),
}

RESET = """
    DELETE FROM document; DELETE FROM author; DELETE FROM seat;
    SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S';
    INSERT INTO author (name, age) VALUES ('Ada', 30), ('Bob', 30), ('Cid', 30);
    INSERT INTO document (title, author_id) SELECT 'Of ' || id, id FROM author ORDER BY id
"""


def _names(seen: list[tuple[int, Any]]) -> dict[str, Any]:
    def see(*values: Any) -> None:
        seen.append((_line(), values))

    def failed(error: Exception) -> None:
        original = getattr(error, "orig", error)
        is_begun = "with begin_on_write=True it was begun" in str(error)
        name = "already begun" if is_begun else type(original).__name__
        traceback, line = error.__traceback__, 0
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == FILE:
                line = traceback.tb_lineno
            traceback = traceback.tb_next
        seen.append((line, name))

    @contextmanager
    def caught(undo: Callable[[], object] = bool) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            undo()
            failed(error)

    return {**NAMES, "see": see, "failed": failed, "caught": caught}


def _line() -> int:
    """Return the line of the program that is being executed."""
    frame: Any = inspect.currentframe()
    while frame.f_code.co_filename != FILE:
        frame = frame.f_back
    return int(frame.f_lineno)


def end_of_block(lines: list[str], line: int) -> int:
    """Return the last line of the block that a line begins; if it begins none, that line."""

    def depth(at: int) -> int:
        text = lines[at - 2]  # the first line is that of the function
        return len(text) - len(text.lstrip())

    end = line
    while end < len(lines) + 1 and depth(end + 1) > depth(line):
        end += 1
    return end


def first_difference(first: Outcome, second: Outcome) -> tuple[int, Any] | None:
    """Return the line, and what is seen there with ``begin_on_write=True``."""
    for at in range(max(len(first.seen), len(second.seen))):
        pair = [one.seen[at] for one in (first, second) if at < len(one.seen)]
        if len(pair) < 2 or pair[0] != pair[1]:
            return min(line for line, _ in pair), pair[0][1]
    return None if first.rows == second.rows else (first.length, None)


@pytest.fixture
def runner(library: None, url: str, onlooker: Onlooker) -> Iterator[Runner]:
    with opened(url, connect_args={"options": "-c lock_timeout=100"}) as engine:
        yield Runner(engine, onlooker)


def test_what_differs_is_in_the_report(runner: Runner) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(lines=PROGRAM)
    def check(lines: list[str]) -> None:
        outcome = runner.run(lines, begin_on_write=True)
        difference = first_difference(outcome, runner.run(lines, begin_on_write=False))
        if difference is None or difference[1] in _NEEDS_ROLLBACK:
            return
        program = "\n".join(f"{at:3} {line}" for at, line in enumerate(lines, 2))
        end = end_of_block(lines, difference[0])
        assert any(one.line <= end for one in outcome.findings), (
            f"{program}\n{difference}: only {[str(one) for one in outcome.findings]}"
        )

    (check if SEED is None else seed(int(SEED))(check))()
