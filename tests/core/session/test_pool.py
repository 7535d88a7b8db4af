"""A session gives its connection back to the pool between statements when others may need it."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    ProgrammingError,
    ResourceClosedError,
    TimeoutError,
)
from sqlalchemy.pool import (
    AssertionPool,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import (
    Author,
    Document,
    Onlooker,
    Sessions,
    add,
    assert_at_rest,
    authors,
    checked_out,
    opened,
)
from tests.wire import WireProxy


class TestTheLoan:
    def test_a_loan_goes_back_after_any_statement_when_the_pool_has_no_other(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            statements: dict[str, Callable[[OptInSession], Any]] = {
                "get": lambda session: session.get(Author, 1),
                "scalars": lambda session: session.scalars(sa.select(Author)),
                "scalar": lambda session: session.scalar(sa.text("SELECT 1")),
                "write": lambda session: session.execute(sa.update(Author).values(age=3)),
                "flush": lambda session: add(session, "flush"),
                "many": lambda session: session.execute(
                    sa.insert(authors), [{"name": "a"}, {"name": "b"}]
                ),
                "many for the ORM": lambda session: session.execute(
                    sa.insert(Author), [{"name": "c"}, {"name": "d"}]
                ),
                "bulk": lambda session: session.bulk_save_objects([Author(name="e")]),
                "transaction": begin_and_read,
                "stream": lambda session: session.scalars(
                    sa.select(Author).execution_options(yield_per=1)
                ).all(),
                "connection": lambda session: session.connection().scalar(sa.text("SELECT 1")),
                "exec_driver_sql": lambda session: session.connection().exec_driver_sql("SELECT 1"),
            }
            for name, statement in statements.items():
                with OptInSession(engine) as session:
                    statement(session)
                    assert checked_out(engine) == 0, name

    def test_a_loan_is_kept_once_its_dbapi_connection_was_handed_out(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                cursor = session.connection().connection.cursor()
                session.get(Author, 1)
                cursor.close()
                assert checked_out(engine) == 1  # its user may have a cursor of it
                session.give_back()
                assert checked_out(engine) == 0

    def test_a_loan_goes_back_after_an_error(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                with pytest.raises(ProgrammingError):
                    session.execute(sa.text("SELECT nothing FROM nowhere"))
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(authors), [{"name": "a"}, {"name": "a"}])
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError):
                    add(session, "Ada")
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError), session.begin():
                    session.add(Author(name="Ada"))
                assert checked_out(engine) == 0

    def test_many_sessions_share_few_connections(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=2, max_overflow=0, pool_timeout=1) as engine:
            sessions = [OptInSession(engine) for _ in range(8)]
            for id in (1, 2, 3):
                for session in sessions:
                    document = session.get_one(Document, id)
                    assert document.author.id == id
                for session in sessions:
                    with session.begin():
                        session.get_one(Author, id).age = 40 + id
            for session in sessions:
                session.close()

    def test_a_stream_keeps_the_loan_until_it_is_read_to_its_end(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                stream = session.scalars(
                    sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
                )
                assert next(stream) == 1
                session.give_back()
                assert checked_out(engine) == 1
                assert list(stream) == [2, 3]
                assert checked_out(engine) == 0

    @pytest.mark.parametrize("end", ["close", "reset", "invalidate", "block"])
    @pytest.mark.parametrize("streams", [2, 3])
    def test_streams_that_are_left_half_way_are_closed_before_the_loan_goes_back(
        self, streams: int, end: str, wire_url: str, wire: WireProxy
    ) -> None:
        """What is sent afterwards would be sent in the middle of what the next borrower does."""
        rows = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
        sent_when_it_went_back: list[int] = []
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            session = OptInSession(engine)
            with wire.record() as recording:

                @event.listens_for(engine, "checkin")
                def note(*_: object) -> None:
                    wire.quiesce()
                    sent_when_it_went_back.append(len(recording.statements))

                if end == "block":
                    session.begin()
                left = [session.scalars(rows) for _ in range(streams)]
                assert [next(stream) for stream in left] == [1] * streams
                getattr(session, "close" if end == "block" else end)()
            assert len(recording.statements) == sent_when_it_went_back[0]
            if end in ("close", "reset"):
                assert recording.verbs[-streams:] == ["CLOSE"] * streams
            with OptInSession(engine) as another:
                assert another.scalars(rows).all() == [1, 2, 3]

    @pytest.mark.parametrize("what", ["next", "close"])
    def test_a_stream_that_ended_with_its_transaction_sends_nothing_more(
        self, what: str, wire_url: str, wire: WireProxy
    ) -> None:
        """It would be sent in the transaction of the next borrower, and abort that."""
        rows = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session, session.begin():
                stream = session.scalars(rows)
                assert next(stream) == 1
            with OptInSession(engine) as another, another.begin():
                another.get_one(Author, 1).name = "Grace"
                another.flush()
                with wire.record() as recording:
                    if what == "close":
                        stream.close()
                    else:
                        with pytest.raises((DBAPIError, ResourceClosedError)):
                            next(stream)
                assert recording.statements == []
            with OptInSession(engine) as one_more:
                assert one_more.get_one(Author, 1).name == "Grace"

    def test_results_that_nobody_reads_are_not_kept(self, session: OptInSession) -> None:
        """They would fill the memory of a worker that keeps its session."""
        for _ in range(100):
            session.execute(sa.text("SELECT 1"))
            session.execute(sa.select(Author))
            session.connection().execute(sa.select(authors))
        gc.collect()
        assert sum(type(found) is CursorResult for found in gc.get_objects()) <= 10

    def test_an_abandoned_stream_does_not_keep_the_loan(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                for options in ({"yield_per": 1}, {"stream_results": True}):
                    stream = one.scalars(sa.select(Author.id), execution_options=options)
                    assert next(stream)
                    stream.close()
                    assert two.get_one(Author, 1).name == "Ada"
                    two.expire_all()

    def test_objects_that_are_looped_over_may_be_loaded_from_and_written_meanwhile(
        self, wire_url: str, onlooker: Onlooker
    ) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                titles: list[str] = []
                for author in session.scalars(sa.select(Author).order_by(Author.id)):
                    titles += [document.title for document in author.documents]
                    session.give_back()
                    with session.begin():
                        author.age = 50 + author.id
                    assert checked_out(engine) == 0
        assert titles == ["Of 1", "Of 2", "Of 3"]
        assert onlooker.column("SELECT age FROM author ORDER BY id") == [51, 52, 53]

    def test_a_pool_that_has_no_connection_in_time_does_no_harm(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=0.1) as engine:
            with OptInSession(engine) as holder, OptInSession(engine) as session:
                dirty = session.get_one(Author, 1)
                dirty.age = 77
                with holder.begin():
                    holder.get(Author, 1)
                    for call in (
                        lambda: session.get(Author, 2),
                        lambda: session.bulk_insert_mappings(Author, [{"name": "a"}]),
                        lambda: session.bulk_save_objects([Author(name="c")]),
                        lambda: session.scalar(sa.text("SELECT 1")),
                    ):
                        with pytest.raises(TimeoutError):
                            call()
                        assert not session.in_transaction()
                        assert dirty.age == 77
                    with pytest.raises(TimeoutError), session.begin():
                        session.get(Author, 2)
                    assert not session.in_transaction()
                    session.add(Author(name="gone"))
                    with pytest.raises(TimeoutError):
                        session.commit()
                    assert not session.in_transaction()
                assert session.get_one(Author, 1).age == 30
                with session.begin():
                    session.get(Author, 2)

    def test_many_unread_results_stay_readable(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with OptInSession(engine) as session:
                results = [
                    session.execute(sa.text(f"SELECT n FROM generate_series({n}, {n} + 2) n"))
                    for n in range(30)
                ]
                partly = session.execute(sa.text("SELECT n FROM generate_series(1, 9) n"))
                assert partly.fetchone() == (1,)
                with session.begin():
                    session.get_one(Author, 1).age = 5
                assert [n for (n,) in partly.fetchmany(2)] == [2, 3]
                for n, result in enumerate(results):
                    assert result.scalars().all() == [n, n + 1, n + 2]
                assert partly.scalars().all() == [4, 5, 6, 7, 8, 9]

    def test_results_keep_their_ways_of_being_read(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with OptInSession(engine) as session:
                names = sa.select(Author.id, Author.name).order_by(Author.id)
                assert dict(session.execute(names).mappings().first() or {}) == {
                    "id": 1,
                    "name": "Ada",
                }
                assert session.execute(names).columns("name").fetchone() == ("Ada",)
                assert [len(part) for part in session.execute(names).partitions(2)] == [2, 1]
                assert len(list(session.execute(names).yield_per(2))) == 3
                assert session.execute(names.where(Author.id == 9)).one_or_none() is None
                frozen = session.execute(names).freeze()
                assert len(frozen().all()) == 3
                unique = session.scalars(sa.select(Author.age)).unique()
                assert unique.all() == [30]
                result = session.connection().execute(names)
                assert result.keys() == ["id", "name"]
                assert result.rowcount == 3
                written = session.connection().execute(sa.insert(authors).values(name="n"))
                assert written.inserted_primary_key == (4,)
                changed = session.connection().execute(sa.update(authors).values(age=1))
                assert changed.rowcount == 4

    POOLS: dict[str, tuple[type[Pool], dict[str, Any], int | None]] = {  # noqa: RUF012
        "QueuePool without limit": (QueuePool, {"pool_size": 0}, 1),
        "QueuePool of one": (QueuePool, {"pool_size": 1, "max_overflow": 0}, 0),
        "QueuePool of one that overflows": (QueuePool, {"pool_size": 1, "max_overflow": 5}, 0),
        "QueuePool of two": (QueuePool, {"pool_size": 2, "max_overflow": 0}, 1),
        "NullPool": (NullPool, {}, None),
        "StaticPool": (StaticPool, {}, None),
        "SingletonThreadPool": (SingletonThreadPool, {}, None),
    }

    @pytest.mark.parametrize("pool", POOLS)
    def test_sessions_work_with_pools_of_every_kind(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker, pool: str
    ) -> None:
        poolclass, options, kept = self.POOLS[pool]
        with opened(wire_url, poolclass=poolclass, **options) as engine:
            with OptInSession(engine) as session:
                author = session.get_one(Author, 1)
                if kept is not None:
                    assert checked_out(engine) == kept
                with wire.record() as recording:
                    session.get(Author, 2)
                    with session.begin():
                        author.age = 33
                        session.flush()
                    session.add(Author(name="new"))
                    session.flush()
                    with pytest.raises(ValueError, match="mine"), session.begin():
                        session.execute(sa.delete(Document))
                        raise ValueError("mine")
                    session.give_back()
                    session.get(Author, 3)
                own = [m for m in recording.messages if m.text not in ("", "SELECT 1")]
                verbs = [m.verb for m in own if m.is_statement and m.verb != "DEALLOCATE"]
                assert [verb for verb in verbs if verb not in ("SHOW", "SET")][:4] == [
                    *("SELECT", "BEGIN", "UPDATE", "COMMIT"),
                ]
                assert wire.transactions_open == 0
                session.rollback()
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT max(age) FROM author")) == 33
        assert onlooker.names() == ["new"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 3

    def test_an_assertion_pool_gets_its_connection_back_after_each_read(
        self, wire_url: str
    ) -> None:
        with opened(wire_url, poolclass=AssertionPool) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                assert one.get_one(Author, 1).name == "Ada"
                assert two.get_one(Author, 2).name == "Bob"
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT 1")) == 1

    @pytest.mark.parametrize("poolclass", [StaticPool, SingletonThreadPool])
    def test_one_connection_for_all_is_not_put_back_under_a_transaction(
        self, wire_url: str, onlooker: Onlooker, poolclass: type[Pool]
    ) -> None:
        with opened(wire_url, poolclass=poolclass) as engine:
            with OptInSession(engine) as session, session.begin():
                session.add(Author(name="one"))
                session.flush()
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT count(*) FROM author")) == 4
                with OptInSession(engine) as other:
                    other.get(Author, 1)
                assert onlooker.names() == []
                session.add(Author(name="two"))
            assert onlooker.names() == ["one", "two"]
            with pytest.raises(ValueError, match="mine"):
                with OptInSession(engine) as session, session.begin():
                    session.add(Author(name="three"))
                    session.flush()
                    with OptInSession(engine) as other:
                        other.get(Author, 1)
                        other.rollback()
                    raise ValueError("mine")
            assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("poolclass", [StaticPool, SingletonThreadPool])
    def test_one_connection_for_all_has_one_transaction_at_a_time(
        self, wire_url: str, onlooker: Onlooker, poolclass: type[Pool]
    ) -> None:
        with opened(wire_url, poolclass=poolclass) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                with one.begin():
                    one.add(Author(name="one"))
                    one.flush()
                    with pytest.raises(InvalidRequestError), two.begin():
                        two.add(Author(name="two"))
                    assert not two.in_transaction()
                    with pytest.raises(InvalidRequestError), engine.begin() as connection:
                        connection.execute(sa.insert(authors).values(name="three"))
                    assert onlooker.names() == []
                    one.add(Author(name="four"))
                assert onlooker.names() == ["four", "one"]
                with two.begin():
                    two.add(Author(name="two"))
        assert onlooker.names() == ["four", "one", "two"]

    def test_a_closed_session_can_be_used_again(
        self, session: OptInSession, engine: OptInEngine
    ) -> None:
        session.get(Author, 1)
        session.close()
        assert checked_out(engine) == 0
        session.get(Author, 1)
        assert checked_out(engine) == 1
        session.invalidate()
        assert checked_out(engine) == 0
        assert session.get_one(Author, 1).name == "Ada"

    def test_a_session_that_is_forgotten_gives_its_connection_back(
        self, sessions: Sessions, engine: OptInEngine
    ) -> None:
        session = sessions()
        session.get(Author, 1)
        session.begin()
        session.execute(sa.insert(Author).values(name="gone"))
        del session
        assert_at_rest(engine)

    @pytest.mark.parametrize("begin_on_write", [False, True])
    @pytest.mark.parametrize("way", ["read", "unread", "partly", "rows", "handed out", "commit"])
    def test_a_forgotten_session_gives_its_connection_back_without_the_collector(
        self, engine: OptInEngine, way: str, begin_on_write: bool
    ) -> None:
        def use(session: OptInSession) -> None:
            if way == "read":
                session.scalars(sa.select(Author)).all()
            elif way == "unread":
                session.scalars(sa.select(Author))
            elif way == "partly":
                session.execute(sa.select(authors)).fetchone()
            elif way == "rows":
                session.scalars(sa.select(Author)).first()
            elif way == "handed out":
                session.connection().execute(sa.select(authors))
            add(session, "new")
            session.commit()

        gc.collect()
        gc.disable()
        try:
            use(OptInSession(engine, begin_on_write=begin_on_write))
            assert checked_out(engine) == 0
        finally:
            gc.enable()

    def test_a_result_of_a_session_that_is_forgotten_can_be_read(self, engine: OptInEngine) -> None:
        stream = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
        result, rows = OptInSession(engine).scalars(stream), OptInSession(engine).scalars(stream)
        assert next(rows) == 1
        assert list(result) == [1, 2, 3]
        assert list(rows) == [2, 3]

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of the old pool
    def test_a_disposed_engine_goes_on_with_new_connections(
        self, session: OptInSession, engine: OptInEngine, wire: WireProxy
    ) -> None:
        session.get(Author, 1)
        engine.dispose()
        assert session.get_one(Author, 2).name == "Bob"
        session.close()
        assert session.get_one(Author, 2).name == "Bob"
        gc.collect()


def begin_and_read(session: OptInSession) -> None:
    with session.begin():
        session.get(Author, 1)
