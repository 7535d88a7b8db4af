"""The report of what would mean something else in the strict mode: each kind, and what is none.

The table in ``docs/migrating.md`` is what the cases come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import ActiveRecordMixin, OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.strict_report import StrictReport
from tests.library import (
    SESSION_KINDS,
    Author,
    Base,
    Document,
    Onlooker,
    Sessions,
    authors,
    sent,
    session_of,
)
from tests.wire import WireProxy

Steps = Callable[[Any], Any]


def saving(session: Any) -> Any:
    """Return a model that stores itself with a session."""
    real = session if isinstance(session, OptInSession) else session()
    model: Any = Writer
    model.__scoped_session__ = lambda: real
    return model


class Writer(ActiveRecordMixin, Base):
    """An author that stores itself."""

    __table__ = authors


@pytest.fixture
def sessions(engine: OptInEngine) -> Sessions:
    return sessionmaker(engine, class_=OptInSession, begin_on_write=True)


@pytest.fixture(params=SESSION_KINDS)
def any_session(request: pytest.FixtureRequest, sessions: Sessions) -> Iterator[Any]:
    """A session, and scoped sessions, with ``begin_on_write=True``."""
    with session_of(request.param, sessions) as session:
        yield session


@pytest.fixture
def strict(engine: OptInEngine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


@pytest.fixture
def report() -> Iterator[StrictReport]:
    with StrictReport() as report:
        yield report


def found(report: StrictReport) -> list[tuple[str, str]]:
    """Return the kind and the call of each place that was recorded, in the order of lines."""
    return [(finding.kind, finding.call) for finding in report.findings()]


def new(name: str = "new") -> Author:
    return Author(name=name, age=1)


# What has to be recorded


def read_what_waits(session: Any) -> None:
    session.add(new())
    session.scalars(select(Author)).all()
    session.commit()


def query_what_waits(session: Any) -> None:
    session.add(new())
    session.query(Author).filter_by(name="new").one()
    session.commit()


def get_while_something_waits(session: Any) -> None:
    session.add(new())
    session.get(Author, 1)
    session.commit()


def load_while_something_waits(session: Any) -> None:
    ada = session.get(Author, 1)
    session.add(Document(title="Waits", author_id=1))
    assert len(ada.documents) == 2
    session.commit()


def flush_between(session: Any) -> None:
    author = new()
    session.add(author)
    session.flush()
    session.add(Document(title="One", author_id=author.id))
    session.commit()


def flush_with_a_call_before_commit(session: Any) -> None:
    session.add(new())
    session.flush()
    len("something that may fail")
    session.commit()


def flush_and_close(session: Any) -> None:
    session.add(new())
    session.flush()
    session.close()


def flush_and_rollback(session: Any) -> None:
    session.add(new())
    session.flush()
    session.rollback()


def update_twice(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    session.execute(update(Document).values(title="Same"))
    session.commit()


def update_in_a_loop(session: Any) -> None:
    for age in (1, 2):
        session.execute(update(Author).values(age=age))
    session.commit()


def update_and_wait(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    session.add(new())
    session.commit()


def update_and_read_what_waits(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    session.add(new())
    session.scalars(select(Author)).all()
    session.commit()


def insert_and_rollback(session: Any) -> None:
    session.execute(insert(authors), [{"name": "new"}, {"name": "newer"}])
    session.rollback()


def text_and_close(session: Any) -> None:
    session.execute(text("UPDATE author SET age = 9"))
    session.close()


def bulk_and_close(session: Any) -> None:
    session.bulk_insert_mappings(sa.inspect(Author), [{"name": "new"}])
    session.close()


def query_delete_and_close(session: Any) -> None:
    session.query(Document).delete(synchronize_session=False)
    session.close()


def connection_and_close(session: Any) -> None:
    session.connection().execute(update(authors).values(age=9))
    session.close()


def function_and_close(session: Any) -> None:
    session.scalar(select(sa.func.pg_advisory_xact_lock(1)))
    session.close()


def lock(session: Any) -> None:
    session.get(Author, 1, with_for_update=True)
    session.commit()


def lock_by_refresh(session: Any) -> None:
    ada = session.get(Author, 1)
    session.refresh(ada, with_for_update=True)
    session.commit()


def lock_by_query(session: Any) -> None:
    session.query(Author).with_for_update().first()
    session.rollback()


def savepoint_and_more(session: Any) -> None:
    with session.begin_nested():
        session.add(new())
    session.add(new("newer"))
    session.commit()


def savepoint_and_rollback(session: Any) -> None:
    with session.begin_nested():
        session.execute(update(Author).values(age=9))
    session.rollback()


def waits_before_savepoint(session: Any) -> None:
    session.add(new())
    with suppress(exc.IntegrityError), session.begin_nested():
        session.execute(insert(authors).values(name="Ada"))
    session.commit()


def commit_inside(session: Any) -> None:
    with session.begin():
        session.add(new())
        session.commit()


def save_and_more(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    session.add(new())
    session.flush()
    session.commit()


def read_whose_flush_fails(session: Any) -> None:
    session.add(new("Ada"))
    with suppress(exc.IntegrityError):
        session.scalars(select(Author)).all()
    session.rollback()


def read_and_then_write_on_one_line(session: Any) -> None:
    session.add(new())
    for statement in (select(Author), insert(authors).values(name="Ada")):
        with suppress(exc.IntegrityError):
            session.execute(statement)
    session.rollback()


def commit_inside_with_nothing_sent(session: Any) -> None:
    with session.begin():
        session.commit()


def commit_inside_that_fails(session: Any) -> None:
    session.add(new("Ada"))
    with suppress(exc.IntegrityError), session.begin():
        session.commit()


def lock_in_a_savepoint_and_more(session: Any) -> None:
    with session.begin_nested():
        session.get(Author, 1, with_for_update=True)
    session.add(new())
    session.commit()


def flush_and_maybe_call(session: Any) -> None:
    session.add(new())
    session.flush()
    if not session:
        print("something that may fail")
    session.commit()


def save_after_a_write(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    saving(session)(name="new").save()


def create_and_close(session: Any) -> None:
    real = session if isinstance(session, OptInSession) else session()
    filter_by_or_create(real, Author, {"name": "new"}, {})
    session.close()


RECORDED: list[tuple[Steps, list[tuple[str, str]]]] = [
    (read_what_waits, [("read", "scalars()")]),
    (query_what_waits, [("read", "one()")]),
    (get_while_something_waits, [("read", "get()")]),
    (load_while_something_waits, [("read", "Author.documents")]),
    (flush_between, [("flush", "flush()")]),
    (flush_with_a_call_before_commit, [("flush", "flush()")]),
    (flush_and_close, [("flush", "flush()")]),
    (flush_and_rollback, [("flush", "flush()"), ("rollback", "rollback()")]),
    (update_twice, [("write", "execute()"), ("write", "execute()")]),
    (update_in_a_loop, [("write", "execute()")]),
    (update_and_wait, [("write", "execute()")]),
    (update_and_read_what_waits, [("write", "execute()"), ("read", "scalars()")]),
    (insert_and_rollback, [("write", "execute()"), ("rollback", "rollback()")]),
    (text_and_close, [("write", "execute()")]),
    (bulk_and_close, [("write", "bulk_insert_mappings()")]),
    (query_delete_and_close, [("write", "delete()")]),
    (connection_and_close, [("write", "execute()")]),
    (function_and_close, [("write", "scalar()")]),
    (lock, [("lock", "get()")]),
    (lock_by_refresh, [("lock", "refresh()")]),
    (lock_by_query, [("lock", "first()")]),
    (savepoint_and_more, [("savepoint", "begin_nested()")]),
    (savepoint_and_rollback, [("savepoint", "begin_nested()"), ("rollback", "rollback()")]),
    (waits_before_savepoint, [("flush", "begin_nested()")]),
    (commit_inside, [("commit", "commit()")]),
    (save_and_more, [("write", "execute()"), ("flush", "flush()")]),
    (create_and_close, [("write", "filter_by_or_create()")]),
    (read_whose_flush_fails, [("read", "scalars()")]),
    (read_and_then_write_on_one_line, [("read", "execute()")]),
    (commit_inside_with_nothing_sent, [("commit", "commit()")]),
    (commit_inside_that_fails, [("commit", "commit()")]),
    (lock_in_a_savepoint_and_more, [("savepoint", "begin_nested()")]),
    (flush_and_maybe_call, [("flush", "flush()")]),
    (save_after_a_write, [("write", "execute()")]),
]


# What must not be recorded


def only_read(session: Any) -> None:
    session.get(Author, 1)
    session.scalars(select(Author)).all()
    session.commit()
    session.rollback()


def commit_alone(session: Any) -> None:
    session.add_all([new(), new("newer")])
    session.commit()


def change_and_commit(session: Any) -> None:
    session.get(Author, 1).age += 1
    session.commit()


def rollback_of_what_waits(session: Any) -> None:
    session.add(new())
    session.rollback()


def rollback_after_commit(session: Any) -> None:
    session.add(new())
    session.commit()
    session.rollback()


def rollback_after_reading(session: Any) -> None:
    session.get(Author, 1)
    session.rollback()


def flush_of_nothing(session: Any) -> None:
    session.flush()
    session.commit()


def flush_and_commit(session: Any) -> None:
    session.add(new())
    session.flush()
    session.commit()


def update_and_commit(session: Any) -> None:
    session.execute(update(Author).values(age=8))
    session.commit()


def insert_returning_and_commit(session: Any) -> None:
    session.scalars(insert(Author).returning(Author.id), [{"name": "new"}]).all()
    session.commit()


def bulk_and_commit(session: Any) -> None:
    session.bulk_save_objects([new(), new("newer")])
    session.commit()


def update_and_what_waits(session: Any) -> None:
    session.add(new())
    session.execute(update(Author).values(age=8))
    session.commit()


def a_block(session: Any) -> None:
    with session.begin():
        session.add(new())
        session.flush()
        session.scalars(select(Author).with_for_update()).all()
        session.execute(update(Author).values(age=8))
        with session.begin_nested():
            session.execute(update(Author).values(age=9))
        session.add(new("newer"))
        session.query(Author).count()


def a_block_that_rolls_back(session: Any) -> None:
    with session.begin() as transaction:
        session.execute(update(Author).values(age=8))
        transaction.rollback()


def a_savepoint_that_is_all(session: Any) -> None:
    with session.begin_nested():
        session.add(new())
        session.flush()
        session.execute(update(Author).values(age=8))
        session.get(Author, 1, with_for_update=True)
    session.commit()


def a_savepoint_that_fails(session: Any) -> None:
    with suppress(exc.IntegrityError), session.begin_nested():
        session.add(new("Ada"))
    session.commit()


def a_savepoint_that_reads(session: Any) -> None:
    with session.begin_nested():
        session.scalars(select(Author)).all()
    session.rollback()


def a_flush_that_fails(session: Any) -> None:
    session.add(new("Ada"))
    with pytest.raises(exc.IntegrityError):
        session.flush()
    session.rollback()


def an_insert_that_fails(session: Any) -> None:
    with pytest.raises(exc.IntegrityError):
        session.execute(insert(authors).values(name="Ada"))
    session.rollback()


def an_insert_that_fails_with_what_waits(session: Any) -> None:
    session.add(new())
    with pytest.raises(exc.IntegrityError):
        session.execute(insert(Author).values(name="Ada"))
    session.rollback()


def without_autoflush(session: Any) -> None:
    session.add(new())
    with session.no_autoflush:
        session.scalars(select(Author)).all()
    session.commit()


def a_record_that_saves_itself(session: Any) -> None:
    model = saving(session)
    session.add(model(name="new"))
    model(name="newer").save()
    model(name="newest").save()


def flush_in_try_and_commit_after_it(session: Any) -> None:
    session.add(new())
    try:
        session.flush()
    except exc.IntegrityError:
        session.rollback()
        return
    session.commit()


def flush_and_maybe_leave(session: Any) -> None:
    session.add(new())
    session.flush()
    if not session:
        print("something that may fail")
        return
    session.commit()


def read_with_no_net_change(session: Any) -> None:
    ada = session.get(Author, 1)
    ada.age = ada.age
    session.scalars(select(Author)).all()
    session.commit()


def write_whose_flush_fails(session: Any) -> None:
    session.add(new("Ada"))
    with suppress(exc.IntegrityError):
        session.execute(update(Author).values(age=8))
    session.rollback()


def atomic(session: Any) -> None:
    real = session if isinstance(session, OptInSession) else session()
    with real.atomic():
        real.execute(update(Author).values(age=8))
        with suppress(exc.IntegrityError), real.atomic():
            real.execute(insert(authors).values(name="Ada"))


NOT_RECORDED: list[Steps] = [
    *(only_read, commit_alone, change_and_commit),
    *(rollback_of_what_waits, rollback_after_commit, rollback_after_reading),
    *(flush_of_nothing, flush_and_commit, update_and_commit, insert_returning_and_commit),
    *(bulk_and_commit, update_and_what_waits),
    *(a_block, a_block_that_rolls_back),
    *(a_savepoint_that_is_all, a_savepoint_that_fails, a_savepoint_that_reads),
    *(a_flush_that_fails, an_insert_that_fails, an_insert_that_fails_with_what_waits),
    *(without_autoflush, a_record_that_saves_itself, atomic),
    *(flush_in_try_and_commit_after_it, flush_and_maybe_leave),
    *(read_with_no_net_change, write_whose_flush_fails),
]


class TestWithBeginOnWrite:
    @pytest.mark.parametrize(
        ("steps", "expected"), RECORDED, ids=[steps.__name__ for steps, _ in RECORDED]
    )
    def test_a_difference_is_recorded_with_its_place(
        self,
        any_session: Any,
        report: StrictReport,
        steps: Steps,
        expected: list[tuple[str, str]],
    ) -> None:
        steps(any_session)
        any_session.close()
        assert found(report) == expected
        for finding in report.findings():
            assert finding.filename == __file__
            assert finding.function == steps.__name__
            assert finding.called_from is None

    def test_a_flush_before_a_yield_is_recorded_since_what_runs_there_may_fail(
        self, any_session: Any, report: StrictReport
    ) -> None:
        def generator() -> Iterator[None]:
            any_session.add(new())
            any_session.flush()
            yield
            any_session.commit()

        list(generator())
        assert found(report) == [("flush", "flush()")]

    @pytest.mark.parametrize("steps", NOT_RECORDED, ids=lambda steps: steps.__name__)
    def test_what_means_the_same_is_not_recorded(
        self, any_session: Any, report: StrictReport, steps: Steps
    ) -> None:
        steps(any_session)
        any_session.close()
        assert found(report) == []

    @pytest.mark.parametrize(
        "steps", [*(steps for steps, _ in RECORDED), *NOT_RECORDED], ids=lambda one: one.__name__
    )
    def test_the_same_is_sent_with_and_without_a_report(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker, steps: Steps
    ) -> None:
        came_to = []
        for report in (None, StrictReport()):
            onlooker.run("DELETE FROM author WHERE name LIKE 'new%'")
            if report is not None:
                report.start()
            try:
                with wire.record() as recording, sessions() as session:
                    steps(session)
            finally:
                if report is not None:
                    report.stop()
            came_to.append(sent(recording))
            onlooker.run("DELETE FROM document WHERE title IN ('Waits', 'One')")
        assert came_to[0] == came_to[1]
