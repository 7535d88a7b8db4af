"""What a recording tells of transactions, places, connections, and whose statements it has."""

# ruff: noqa: PT012 (what is lost, and when, takes several statements)

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import (
    CommitOutcomeUnknown,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
    unit_of_work,
)
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy.recording import Recording, record
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, authors, fill, opened
from tests.postgres import PostgresServer
from tests.wire import Message, WireProxy

READ = select(Author.name).where(Author.id == 1)


def line_of(function: Callable[..., Any], code: str) -> int:
    """The number of the line with some code in a function."""
    lines, first = inspect.getsourcelines(function)
    return next(first + number for number, line in enumerate(lines) if code in line)


class TestTransactions:
    @pytest.mark.parametrize("how", ["begin", "atomic", "begin_nested", "unit_of_work"])
    def test_transactions_tell_where_they_were_begun(
        self, session: OptInSession, sessions: sessionmaker[OptInSession], how: str
    ) -> None:
        def work() -> None:
            begin = getattr(session, how, lambda: unit_of_work(sessions))
            with begin() as begun:
                one = session if how != "unit_of_work" else begun
                one.execute(READ).all()
                one.add(Author(name="new"))

        with record(session.get_bind()) as seen:
            work()
        (transaction,) = seen.transactions
        assert transaction.begun_at is not None
        assert transaction.begun_at.filename == __file__
        assert transaction.begun_at.line == line_of(work, "with begin()")
        assert transaction.begun_at.function == "work"
        assert transaction.outcome == "committed"
        assert transaction.isolation_level is None
        assert [each.verb for each in transaction.sent] == ["BEGIN", "SELECT", "INSERT", "COMMIT"]
        assert [each.verb for each in transaction.statements] == ["SELECT", "INSERT"]
        assert transaction.round_trips == 4

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (lambda s: s.flush(), "flush"),
            (lambda s: s.commit(), "commit"),
            (lambda s: s.execute(insert(authors), [{"name": "a"}, {"name": "b"}]), "execute"),
            (lambda s: s.bulk_save_objects([Author(name="a"), Author(name="b")]), "bulk_save"),
        ],
    )
    def test_the_transaction_of_a_write_outside_tells_the_call(
        self, session: OptInSession, call: Callable[[OptInSession], object], name: str
    ) -> None:
        if name in ("flush", "commit"):
            session.add_all([Author(name="a"), Author(name="b", age=1)])
        with record(session) as seen:
            call(session)
        (transaction,) = seen.transactions
        assert transaction.begun_at is not None
        assert transaction.begun_at.call.startswith(name)
        assert transaction.outcome == "committed"

    def test_a_transaction_of_begin_on_write_tells_the_write(self, engine: OptInEngine) -> None:
        with OptInSession(engine, begin_on_write=True) as session, record(session) as seen:
            session.execute(READ).all()
            session.execute(update(authors).values(age=1))
            assert seen.transactions[0].outcome == "open"
            session.rollback()
        (transaction,) = seen.transactions
        assert transaction.begun_at is not None
        assert transaction.begun_at.call == "execute"
        assert transaction.outcome == "rolled back"
        assert seen.statements[0].transaction is None
        assert seen.statements[1].transaction is transaction

    def test_one_statement_alone_is_recorded_as_a_transaction(self, session: OptInSession) -> None:
        with record(session) as seen, session.begin():
            session.add(Author(name="new"))
        (transaction,) = seen.transactions
        assert transaction.is_one_statement
        assert transaction.outcome == "committed"
        assert [each.verb for each in seen.sent] == ["INSERT"]
        assert transaction.waiting < transaction.duration

    def test_one_statement_alone_that_fails_is_recorded_as_rolled_back(
        self, session: OptInSession
    ) -> None:
        with record(session) as seen, pytest.raises(exc.IntegrityError), session.begin():
            session.add(Author(id=1, name="new"))
        assert [transaction.outcome for transaction in seen.transactions] == ["rolled back"]
        assert seen.statements[0].error is not None

    @pytest.mark.parametrize("alone", [False, True])
    def test_transactions_that_are_lost_at_their_end_are_unknown(
        self, session: OptInSession, wire: WireProxy, alone: bool
    ) -> None:
        verb = "INSERT" if alone else "COMMIT"

        def cut(message: Message) -> Any:
            return "after" if message.is_statement and message.verb == verb else None

        session.execute(READ).all()
        with record(session) as seen, pytest.raises(CommitOutcomeUnknown), session.begin():
            session.add(Author(name="new"))
            if not alone:
                session.execute(READ).all()
            wire.cut_where = cut
        assert [transaction.outcome for transaction in seen.transactions] == ["unknown"]

    def test_transactions_that_are_lost_before_their_end_are_rolled_back(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with record(session) as seen, suppress(exc.DBAPIError), session.begin():
            session.execute(READ).all()
            wire.cut_all()
            session.execute(READ).all()
        assert [transaction.outcome for transaction in seen.transactions] == ["rolled back"]
        assert seen.statements[1].error is not None

    def test_transactions_that_abort_at_commit_are_rolled_back(self, session: OptInSession) -> None:
        with record(session) as seen, pytest.raises(exc.PendingRollbackError), session.begin():
            session.execute(READ).all()
            with suppress(exc.DBAPIError):
                session.execute(text("SELECT 1 / 0"))
        assert [transaction.outcome for transaction in seen.transactions] == ["rolled back"]

    def test_transactions_tell_their_isolation_level(self, session: OptInSession) -> None:
        with record(session) as seen, session.begin(isolation_level="SERIALIZABLE"):
            session.execute(READ).all()
        assert seen.transactions[0].isolation_level == "SERIALIZABLE"
        assert seen.sent[0].sql == "BEGIN ISOLATION LEVEL SERIALIZABLE"

    def test_transactions_that_send_nothing_take_no_time(self, session: OptInSession) -> None:
        with record(session) as seen, session.begin():
            time.sleep(0.02)
        assert sum(transaction.duration for transaction in seen.transactions) == 0
        assert seen.sent == []


class TestWaiting:
    def test_waiting_is_the_time_that_the_database_was_not_busy_for(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with record(session) as seen, wire.record() as recording, session.begin():
            time.sleep(0.4)  # no transaction is open yet
            session.execute(text("SELECT pg_sleep(0.4)"))
            time.sleep(0.4)
            session.execute(READ).all()
        (transaction,) = seen.transactions
        assert 0.4 <= transaction.waiting < 0.7
        assert transaction.waiting + 0.4 <= transaction.duration
        assert abs(transaction.waiting - recording.idle_in_transaction) < 0.2
        assert seen.waiting == transaction.waiting

    def test_reading_a_stream_is_no_waiting(self, session: OptInSession, wire: WireProxy) -> None:
        wire.delay = 0.03
        with record(session) as seen, session.begin():
            for _ in session.scalars(select(Author).execution_options(yield_per=1)):
                pass
        wire.delay = 0.0
        (transaction,) = seen.transactions
        assert transaction.waiting < 0.5 * transaction.duration

    def test_waiting_goes_on_while_the_transaction_is_open(self, session: OptInSession) -> None:
        with record(session) as seen, session.begin():
            session.execute(READ).all()
            before = seen.transactions[0].waiting
            time.sleep(0.02)
            assert seen.transactions[0].waiting >= before + 0.02


class TestStatements:
    def test_statements_tell_the_line_the_rows_and_the_time(self, session: OptInSession) -> None:
        def work() -> None:
            session.execute(select(Author)).all()
            session.get(Author, 77)
            session.execute(update(authors).values(age=1))

        with record(session) as seen:
            work()
        first, second, third = seen.statements
        assert [each.rows for each in seen.statements] == [3, 0, 3]
        assert (first.place and first.place.line) == line_of(work, "select(Author)")
        assert (second.place and second.place.call) == "get"
        assert third.sql == "UPDATE author SET age=%(age)s" or "INTEGER" in third.sql
        assert all(0 < each.duration < 5 for each in seen.statements)

    def test_statements_have_the_right_line_when_the_way_to_it_differs(
        self, session: OptInSession
    ) -> None:
        def deep(depth: int) -> None:
            if depth:
                deep(depth - 1)
            else:
                session.execute(READ).all()

        def listener(*args: Any) -> None:
            session.connection().execute(READ).all()

        def first() -> None:
            session.execute(READ).all()

        def second() -> None:
            session.execute(READ).all()

        event.listen(session, "before_flush", listener)
        with record(session) as seen:
            for depth in (0, 3, 1, 3, 0):
                deep(depth)
            first()
            second()
            first()
            session.add(Author(name="new"))
            session.flush()
            first()
        names = [each.place.function for each in seen.statements if each.place is not None]
        names.remove("test_statements_have_the_right_line_when_the_way_to_it_differs")
        assert names == ["deep"] * 5 + ["first", "second", "first", "listener", "first"]

    def test_statements_keep_their_parameters_only_when_asked(self, session: OptInSession) -> None:
        with record(session) as seen, record(session, parameters=True) as told:
            session.execute(select(Author.id).where(Author.name == "secret"))
        assert "secret" in str(told.statements[0].parameters)
        with record(session) as seen:
            session.execute(select(Author.id).where(Author.name == "secret"))
        assert seen.statements[0].parameters is None
        assert "secret" not in str(seen)

    def test_statements_beyond_keep_are_only_counted(self, session: OptInSession) -> None:
        with record(session, keep=3) as seen:
            for _ in range(5):
                session.execute(READ).all()
            for _ in range(5):
                session.execute(update(authors).values(age=1))
        assert len(seen.sent) == 3
        assert seen.round_trips >= 10
        assert "10 statements" in seen.summary()
        assert "7 more" in str(seen)

    def test_statements_that_are_long_are_cut(self, session: OptInSession) -> None:
        with record(session) as seen:
            session.execute(text(f"SELECT '{'x' * 100_000}'"))
        assert len(seen.statements[0].sql) < 11_000


class TestConnections:
    def test_connections_tell_how_long_they_were_held(
        self, sessions: sessionmaker[OptInSession]
    ) -> None:
        with sessions() as session, record(session) as seen:
            session.execute(READ).all()
            time.sleep(0.02)
            assert seen.connections[0].is_held
            session.give_back()
            assert not seen.connections[0].is_held
            time.sleep(0.02)
            session.execute(READ).all()
        first, second = seen.connections
        assert 0.02 <= first.held < 1
        assert second.held < 0.02 + first.held

    def test_connections_tell_how_long_the_pool_was_waited_for(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            holder = engine.connect()
            timer = threading.Timer(0.1, holder.close)
            with record(engine) as seen, OptInSession(engine) as session:
                timer.start()
                session.execute(READ).all()
            timer.join()
        assert 0.05 < seen.connections[0].waited < 5

    def test_connections_that_are_invalidated_are_not_held(self, engine: OptInEngine) -> None:
        with record(engine) as seen, engine.connect() as connection:
            connection.execute(READ).all()
            connection.invalidate()
            assert not seen.connections[0].is_held


class TestWhose:
    def test_the_recording_of_a_session_has_its_own_statements_alone(
        self, sessions: sessionmaker[OptInSession]
    ) -> None:
        with sessions() as one, sessions() as other:
            other.execute(READ).all()
            with record(one) as seen:
                one.execute(READ).all()
                other.execute(READ).all()
                with one.begin(), other.begin():
                    other.execute(READ).all()
        assert len(seen.statements) == 1
        assert seen.transactions == [] or all(not t.sent for t in seen.transactions)

    def test_the_recording_of_a_scoped_session_has_those_of_its_session_now(
        self, sessions: sessionmaker[OptInSession]
    ) -> None:
        scoped = OptInScopedSession(sessions)
        with record(scoped) as seen:
            scoped.execute(READ).all()
        scoped.remove()
        assert len(seen.statements) == 1

    def test_the_recording_of_an_engine_has_the_statements_of_all_threads(
        self, engine: OptInEngine, sessions: sessionmaker[OptInSession]
    ) -> None:
        def work() -> None:
            with sessions() as session:
                for _ in range(50):
                    with session.begin():
                        session.execute(READ).all()

        with record(engine) as seen:
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(seen.transactions) == 200
        assert len({transaction.thread for transaction in seen.transactions}) == 4
        assert all(len(transaction.sent) == 3 for transaction in seen.transactions)
        assert seen.round_trips >= 600

    def test_the_recording_of_several_engines_has_the_statements_of_each(
        self, engine: OptInEngine, url: str
    ) -> None:
        other = create_engine(url)
        third = create_engine(url)
        with record(engine, other) as seen:
            for one in (engine, other, third, other.execution_options(logging_token="x")):
                with one.connect() as connection:
                    connection.execute(READ).all()
        other.dispose()
        third.dispose()
        assert len(seen.statements) == 3

    def test_a_transaction_that_was_open_before_the_recording_is_recorded(
        self, session: OptInSession
    ) -> None:
        with session.begin():
            session.execute(READ).all()
            with record(session) as seen:
                session.execute(READ).all()
        (transaction,) = seen.transactions
        assert transaction.begun_at is None
        assert transaction.outcome == "committed"
        assert [each.verb for each in seen.sent] == ["SELECT", "COMMIT"]

    def test_two_recordings_have_the_same_transactions(self, session: OptInSession) -> None:
        with record(session) as outer, session.begin():
            session.execute(READ).all()
            with record(session) as inner:
                session.execute(READ).all()
        assert [each.verb for each in outer.sent] == ["BEGIN", "SELECT", "SELECT", "COMMIT"]
        assert inner.transactions == outer.transactions
        assert [each.verb for each in inner.sent][:1] == ["SELECT"]

    def test_under_isolation_the_transactions_of_the_code_are_recorded(
        self, engine: OptInEngine
    ) -> None:
        with isolate(engine), OptInSession(engine) as session:
            with record(engine) as seen, session.begin():
                session.execute(READ).all()
                session.add(Author(name="new"))
            session.execute(READ).all()
        assert [each.verb for each in seen.sent] == ["BEGIN", "SELECT", "INSERT", "COMMIT"]
        assert seen.round_trips == 4
        assert seen.transactions[0].outcome == "committed"


class TestOnAndOff:
    def test_a_recording_that_is_off_leaves_nothing_behind(self, engine: OptInEngine) -> None:
        before = {name: vars(engine.dialect).get(name) for name in vars(engine.dialect)}
        with record(engine), record(engine), suppress(KeyError), record(engine):
            with engine.begin() as connection:
                connection.execute(READ).all()
            assert observing.recorder is not None
            raise KeyError
        assert observing.recorder is None
        now = vars(engine.dialect)
        for name in ("do_execute", "do_execute_no_params", "do_executemany"):
            assert now.get(name) == before.get(name)

    def test_a_recording_can_be_read_while_it_is_on(self, session: OptInSession) -> None:
        with record(session) as seen:
            session.execute(READ).all()
            assert seen.round_trips == 1
            assert "1 statement, 1 round trip, connection" in str(seen)

    def test_a_recording_shows_what_was_sent_in_order(self, session: OptInSession) -> None:
        with record(session) as seen:
            session.execute(READ).all()
            with session.begin():
                session.execute(READ).all()
                session.execute(update(authors).values(age=1))
        lines = str(seen).splitlines()
        assert lines[0].startswith("3 statements, 5 round trips, 1 transaction ")
        assert [line.split()[0] for line in lines[1:]] == [
            "SELECT",
            "BEGIN",
            "SELECT",
            "UPDATE",
            "COMMIT",
        ]
        assert "1 row)" in lines[1]
        assert __file__ in lines[1]

    @pytest.mark.parametrize(
        "source", [None, "db", object(), Author, sa.create_engine("sqlite://")]
    )
    def test_what_can_not_be_recorded_is_refused(self, source: Any) -> None:
        with (
            pytest.raises(exc.ArgumentError, match=r"record\(\) has found no engine"),
            record(source),
        ):
            pass

    def test_a_recording_without_a_source_is_refused(self) -> None:
        with pytest.raises(exc.ArgumentError, match=r"record\(\) needs a source"), record():
            pass

    @pytest.mark.parametrize("keep", [0, -1, "all", None, True, 1.5])
    def test_keep_is_a_number(self, engine: OptInEngine, keep: Any) -> None:
        with pytest.raises(exc.ArgumentError, match="keep is"), record(engine, keep=keep):
            pass

    def test_a_recording_says_what_it_is(self, session: OptInSession) -> None:
        with record(session) as seen, session.begin():
            session.execute(READ).all()
        assert isinstance(seen, Recording)
        assert repr(seen).startswith("<Recording: 1 statement, 3 round trips")
        assert "committed" in repr(seen.transactions[0])
        assert "SELECT" in repr(seen.statements[0])


def test_an_engine_of_another_database_is_recorded(server: PostgresServer, driver: str) -> None:
    fill(url := server.url(driver, server.create_database()))
    engine = create_engine(url)
    with record(engine) as seen, engine.begin() as connection:
        connection.execute(READ).all()
    engine.dispose()
    assert seen.round_trips == 3


def test_a_loaded_attribute_is_named_as_an_attribute(session: OptInSession) -> None:
    author = session.get_one(Author, 1)
    session.expire_all()
    with record(session) as seen:
        assert author.name
        session.expire_all()
        assert author.documents
    calls = [each.place.call for each in seen.statements if each.place is not None]
    assert calls[0] == "Author.name"
    assert "Author.documents" in calls
    assert "Author.name in " in str(seen)
    assert "Author.name()" not in str(seen)


def test_the_end_of_a_transaction_has_its_own_line(engine: OptInEngine) -> None:
    def work(session: OptInSession) -> None:
        session.execute(update(authors).values(age=1))
        session.commit()

    with OptInSession(engine, begin_on_write=True) as session, record(session) as seen:
        work(session)
    commit = seen.sent[-1]
    assert commit.verb == "COMMIT"
    assert commit.place is not None
    assert (commit.place.call, commit.place.line) == ("commit", line_of(work, "session.commit()"))
