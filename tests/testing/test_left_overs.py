"""Nothing is left after ``isolate()``, however its block ends."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session

import fictive_sqlalchemy.testing
from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.testing import isolate
from tests.core.test_autocommit import Interrupter, Interruption, chain
from tests.library import (
    Author,
    Onlooker,
    assert_rests,
    authors,
    backend_pid,
    checked_out,
    flags_of,
    opened,
    set_flags,
)
from tests.testing.support import add_author, names, scalar


class TestLeftOvers:
    def test_a_session_works_after_the_end_of_the_isolation(self, engine: OptInEngine) -> None:
        session = OptInSession(engine)
        for _ in range(2):
            with isolate(engine):
                session.add(Author(name="Eve"))
                session.commit()
                assert session.scalars(sa.select(Author)).all()[3].name == "Eve"
            assert len(session.scalars(sa.select(Author)).all()) == 3
            session.give_back()
        session.close()

    def test_a_session_left_in_a_transaction_says_so(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        session = OptInSession(engine)
        with isolate(engine):
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
        with pytest.raises(exc.PendingRollbackError):
            session.scalars(sa.select(Author)).all()
        session.rollback()
        assert len(session.scalars(sa.select(Author)).all()) == 3
        session.close()
        assert onlooker.names() == []

    def test_a_stock_session_left_in_a_transaction_says_so(
        self, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        session = Session(stock)
        with isolate(stock):
            session.add(Author(name="Eve"))
            session.flush()
        with pytest.raises(exc.PendingRollbackError):
            session.commit()
        session.rollback()
        assert len(session.scalars(sa.select(Author)).all()) == 3
        session.close()
        assert onlooker.names() == []

    def test_connections_and_cursors_of_the_driver_are_closed(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine):
            raw = engine.raw_connection()
            cursor = raw.cursor()
            stream = engine.connect().execution_options(stream_results=True)
            result = stream.execute(sa.select(authors))
            assert result.fetchone()
        for use in (
            lambda: cursor.execute("INSERT INTO author (name) VALUES ('Eve')"),
            raw.cursor,
            raw.commit,
            lambda: result.fetchall(),
        ):
            with pytest.raises((exc.DBAPIError, engine.dialect.loaded_dbapi.Error)):
                use()
        result.close()
        stream.close()
        raw.close()
        assert onlooker.names() == []

    def test_a_lost_session_is_rolled_back(self, engine: OptInEngine) -> None:
        with isolate(engine):
            for _ in range(3):
                session = OptInSession(engine)
                session.begin()
                session.add(Author(name="Eve"))
                session.flush()
                del session
                gc.collect()
            assert names(engine) == []

    def test_a_disposed_engine_has_no_connection(
        self, url: str, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        mine = create_engine(url)
        with isolate(mine):
            add_author(mine, "Eve")
            mine.dispose()
            assert names(mine) == ["Eve"]
            pid = scalar(mine, "SELECT pg_backend_pid()")
            mine.dispose()
        assert checked_out(mine) == 0
        assert mine.pool.checkedin() == 0  # type: ignore[attr-defined]
        onlooker.wait_until_gone(pid)
        assert onlooker.names() == []

    @pytest.mark.parametrize("pool", [sa.NullPool, sa.StaticPool, sa.pool.AssertionPool])
    def test_engines_with_other_pools_are_undone(
        self, url: str, onlooker: Onlooker, pool: type[sa.Pool]
    ) -> None:
        with opened(url, poolclass=pool) as engine:
            with isolate(engine):
                add_author(engine, "Eve")
                assert names(engine) == ["Eve"]
            assert names(engine) == onlooker.names() == []

    def test_flags_that_connections_start_with_hold_in_isolation(
        self, url: str, onlooker: Onlooker
    ) -> None:
        with opened(url) as other:
            engine = create_engine(url)

            @event.listens_for(engine, "connect")
            def start(dbapi: Any, record: Any) -> None:
                set_flags(dbapi, "SERIALIZABLE", read_only=True)

            before = flags_of(engine.raw_connection().dbapi_connection)
            gc.collect()
            with isolate(engine):
                with OptInSession(engine) as session:
                    with pytest.raises(exc.DBAPIError, match="read-only"), session.begin():
                        session.execute(sa.text("DELETE FROM document"))
                    with session.begin(read_only=False):
                        session.add(Author(name="Eve"))
                    raw = session.connection().connection.dbapi_connection
                    assert flags_of(raw) == before
                assert names(engine) == ["Eve"]
            raw = engine.raw_connection()
            assert_rests(raw.dbapi_connection, before)
            raw.close()
            assert names(other) == onlooker.names() == []
            engine.dispose()

    def test_an_engine_that_is_read_only_outside_stays_so_in_isolation(self, url: str) -> None:
        with opened(url, read_only_outside=True) as engine:
            with isolate(engine), OptInSession(engine) as session:
                for _ in range(2):
                    with pytest.raises(exc.InternalError, match="read-only transaction"):
                        session.execute(sa.delete(Author))
                    with session.begin():
                        session.add(Author(name="Eve"))
                        session.flush()
                        session.rollback()
                    session.add(Author(name="Fay"))
                    session.commit()
                    session.execute(sa.insert(Author), [{"name": "Gus"}, {"name": "Hal"}])
                    with session.begin():
                        session.execute(sa.delete(Author).where(Author.id > 3))
                read_only = pytest.raises(exc.InternalError, match="read-only transaction")
                with read_only, session.begin(read_only=True):
                    session.execute(sa.text("DELETE FROM author"))
            read_only = pytest.raises(exc.InternalError, match="read-only transaction")
            with engine.connect() as connection, read_only:
                connection.execute(sa.delete(authors))

    def test_listeners_of_the_pool_are_called(self, engine: OptInEngine, stock: sa.Engine) -> None:
        called: list[str] = []

        def checkout(dbapi: Any, record: Any, proxy: Any) -> None:
            called.append("out")
            dbapi.cursor().execute("SET application_name = 'mine'")

        def checkin(dbapi: Any, record: Any) -> None:
            called.append("in")

        def of_all_pools(dbapi: Any, record: Any) -> None:
            called.append("in any")

        event.listen(sa.Pool, "checkin", of_all_pools)
        for one in (engine, stock):
            event.listen(one, "checkout", checkout)
            event.listen(one, "checkin", checkin)
        try:
            with isolate(engine, stock):
                for one in (engine, stock):
                    called.clear()
                    assert scalar(one, "SHOW application_name") == "mine"
                    assert called == ["out", "in any", "in"]
        finally:
            event.remove(sa.Pool, "checkin", of_all_pools)


def do_all(engine: OptInEngine) -> None:
    with OptInSession(engine) as session:
        session.add(Author(name="Eve"))
        session.commit()
        with suppress(exc.IntegrityError), session.begin():
            session.add(Author(name="Ada"))
        with session.begin():
            session.get(Author, 1)
            names(engine)
            with suppress(exc.IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
        for _ in session.scalars(sa.select(Author).execution_options(yield_per=2)):
            pass
        session.execute(sa.delete(Author).where(Author.id > 3))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a stream's cursor
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_line_leaves_nothing_behind(url: str, onlooker: Onlooker) -> None:
    with opened(url) as engine:
        lost: list[int | None] = []

        def play(at: int | None) -> list[tuple[str, int]]:
            interrupter = Interrupter(at)
            with isolate(engine):
                try:
                    interrupter.run(lambda: do_all(engine))
                except BaseException as raised:
                    if at is None or Interruption not in map(type, chain(raised)):
                        raise
                    raised.__traceback__ = None  # it would keep what had the connection
                gc.collect()
                try:
                    assert set(names(engine)) <= {"Eve"}
                except exc.InvalidRequestError:
                    lost.append(at)
            return interrupter.lines

        play(None)
        lines = play(None)
        ours = str(Path(fictive_sqlalchemy.testing.__file__).parent)
        last = {line: turn for turn, line in enumerate(lines) if line[0].startswith(ours)}
        assert len(last) > 100
        for line, turn in last.items():
            play(turn)
            assert checked_out(engine) == 0, line
            assert onlooker.names() == names(engine) == [], line
        assert len(lost) < 6, lost  # where nobody knows, who goes on is told


class TestLostConnections:
    def test_the_code_under_test_is_told_of_a_lost_connection(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.add(Author(name="Eve"))
            session.commit()
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(exc.OperationalError):
                session.execute(sa.select(authors))
            with pytest.raises(exc.InvalidRequestError, match="lost or at its end"):
                session.execute(sa.select(authors))
            with pytest.raises(exc.InvalidRequestError, match="lost or at its end"):
                names(engine)
        assert names(engine) == onlooker.names() == []

    def test_a_connection_lost_in_a_transaction_stores_nothing(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.get(Author, 1)
            pid = backend_pid(session.connection())
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
            onlooker.kill(pid)
            with pytest.raises(exc.OperationalError):
                session.execute(sa.select(authors))
            session.rollback()
            assert not session.in_transaction()
        assert names(engine) == onlooker.names() == []

    def test_a_connection_lost_at_the_commit_stores_nothing(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(exc.OperationalError):
                session.commit()
            session.rollback()
        assert names(engine) == onlooker.names() == []

    def test_a_connection_lost_just_before_the_end_stores_nothing(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            onlooker.kill(scalar(engine, "SELECT pg_backend_pid()"))
        assert names(engine) == onlooker.names() == []
