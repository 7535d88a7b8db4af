"""Under ``isolate()`` the transactions of several threads take turns on one connection."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

import fictive_sqlalchemy.testing
from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, Onlooker, authors
from tests.testing.support import add_author, names, run, scalar


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads give up soon."""
    monkeypatch.setattr(fictive_sqlalchemy.testing, "PATIENCE", 0.2)


class TestThreads:
    def test_threads_have_their_transactions_one_after_the_other(self, engine: OptInEngine) -> None:
        def work(number: int) -> None:
            for turn in range(5):
                with OptInSession(engine) as session:
                    session.get(Author, 1)
                    with session.begin():
                        session.add(Author(name=f"{number} {turn}"))
                        session.flush()
                        session.get(Author, 2)
                    with suppress(exc.IntegrityError), session.begin():
                        session.add(Author(name=f"lost {number} {turn}"))
                        session.flush()
                        session.add(Author(name="Ada"))
                    assert session.scalars(sa.select(Author.name)).all()

        with isolate(engine):
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(work, range(6)))
            assert sorted(names(engine)) == [
                f"{one} {turn}" for one in range(6) for turn in range(5)
            ]

    def test_a_thread_that_waits_for_another_is_told(
        self, engine: OptInEngine, patience: None
    ) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads, engine.begin() as connection:
            connection.execute(sa.insert(authors).values(name="Eve"))
            with pytest.raises(exc.InvalidRequestError, match="Don't wait for another thread"):
                threads.submit(names, engine).result()

    def test_a_thread_waits_for_the_end_of_the_transaction_of_another(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads:
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                waiting = threads.submit(add_author, engine, "Fay")
            waiting.result()
            assert names(engine) == ["Eve", "Fay"]

    def test_a_transaction_may_go_from_one_thread_to_another(self, engine: OptInEngine) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads, OptInSession(engine) as session:
            with session.begin():
                session.add(Author(name="Eve"))
                threads.submit(session.flush).result()
                threads.submit(session.get, Author, 1).result()
            assert names(engine) == ["Eve"]

    def test_a_thread_that_goes_on_after_the_end_is_told(self, engine: OptInEngine) -> None:
        begun, ended = threading.Event(), threading.Event()

        def work() -> None:
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                begun.set()
                assert ended.wait(20)
                connection.execute(sa.insert(authors).values(name="Fay"))

        with ThreadPoolExecutor(1) as threads:
            with isolate(engine):
                working = threads.submit(work)
                assert begun.wait(20)
            ended.set()
            with pytest.raises(exc.SQLAlchemyError):
                working.result()
        assert names(engine) == []

    def test_a_thread_in_a_statement_at_the_end_is_told(
        self, engine: OptInEngine, onlooker: Onlooker, patience: None
    ) -> None:
        isolation = isolate(engine)
        isolation.__enter__()
        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(scalar, engine, "SELECT pg_sleep(1)")
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)'"
            deadline = time.monotonic() + 20
            while not onlooker.scalar(sleeping + " AND state = 'active'"):
                assert time.monotonic() < deadline
            with pytest.raises(exc.InvalidRequestError, match="wait for the threads"):
                isolation.__exit__(None, None, None)
            with pytest.raises(exc.OperationalError, match="server closed the connection"):
                working.result()
        assert names(engine) == []

    def test_a_lock_of_another_connection_is_not_waited_for_for_ever(
        self, engine: OptInEngine, stock: sa.Engine, patience: None
    ) -> None:
        with isolate(engine), stock.connect() as other:
            other.execute(sa.text("LOCK TABLE document"))
            with pytest.raises(exc.OperationalError, match="lock timeout"), engine.begin() as mine:
                mine.execute(sa.text("DELETE FROM document"))
            other.rollback()
            run(engine, "DELETE FROM document")
