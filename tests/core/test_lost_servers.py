"""A server that goes: while a connection is idle, in a transaction, during COMMIT."""

# ruff: noqa: PT012 (what is lost, and when, takes several statements)

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import (
    DBAPIError,
    InvalidRequestError,
    OperationalError,
    StatementError,
    TimeoutError,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    CommitOutcomeUnknown,
    OptInEngine,
    OptInSession,
    SessionStateWarning,
    create_engine,
)
from tests.library import ONE, Onlooker, assert_at_rest, backend_pid
from tests.postgres import PostgresServer
from tests.wire import Message, WireProxy

POOL = 3


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
def engine(wire: WireProxy, wire_url: str) -> Iterator[OptInEngine]:
    engine = create_engine(wire_url, pool_size=POOL)
    Base.metadata.create_all(engine)
    yield engine
    assert_at_rest(engine)
    engine.dispose()


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


def names(onlooker: Onlooker) -> list[str]:
    return onlooker.column("SELECT name FROM item ORDER BY id")


def fill_pool(engine: OptInEngine) -> list[int]:
    """Open all connections of the pool, and give them back; return their pids."""
    sessions = [OptInSession(engine) for _ in range(POOL)]
    pids = [backend_pid(session.connection()) for session in sessions]
    for session in sessions:
        session.close()
    return pids


def kill_all(onlooker: Onlooker, pids: list[int], wire: WireProxy) -> None:
    for pid in pids:
        onlooker.kill(pid)
    while not wire.pids.isdisjoint(pids):  # until the client can know
        time.sleep(0.001)


class TestWhileIdle:
    def test_a_read_after_a_loss_while_idle_is_answered_and_sent_once(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        kill_all(onlooker, [backend_pid(session.connection())], wire)
        with wire.record() as recording:
            assert session.scalar(ONE) == 1
        assert recording.statements.count("SELECT 1") == 1

    def test_all_connections_of_the_pool_are_replaced(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        pids = fill_pool(engine)
        kill_all(onlooker, pids, wire)
        for _ in range(POOL):
            with OptInSession(engine) as session:
                assert session.scalar(ONE) == 1
        with OptInSession(engine) as session:
            assert backend_pid(session.connection()) not in pids

    def test_a_write_after_a_loss_while_idle_is_sent_once(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        kill_all(onlooker, [backend_pid(session.connection())], wire)
        with wire.record() as recording:
            session.execute(sa.insert(Item).values(name="one"))
        assert recording.verbs.count("INSERT") == 1
        assert names(onlooker) == ["one"]

    def test_a_loss_before_the_first_statement_of_a_transaction_is_not_noticed(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.scalar(ONE)
        with session.begin(isolation_level="SERIALIZABLE"):
            kill_all(onlooker, onlooker.column(OTHERS), wire)
            session.add(Item(name="one"))
            session.flush()
            level = session.scalar(sa.text("SHOW transaction_isolation"))
        assert level == "serializable"
        assert names(onlooker) == ["one"]

    def test_a_loss_between_begin_and_the_first_statement_of_a_connection_is_not_noticed(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, engine.connect() as connection:
            connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                kill_all(onlooker, onlooker.column(OTHERS), wire)
                connection.execute(sa.insert(Item).values(name="one"))
                level = connection.scalar(sa.text("SHOW transaction_isolation"))
            assert connection.scalar(ONE) == 1
        assert level == "repeatable read"
        assert recording.verbs.count("BEGIN") == 1 + recording.statements.count("BEGIN")
        assert recording.verbs[-5:] == ["BEGIN", "INSERT", "SHOW", "COMMIT", "SELECT"]
        assert names(onlooker) == ["one"]

    def test_a_loss_before_the_first_statement_is_not_noticed_on_a_pool_of_one(
        self, wire: WireProxy, wire_url: str, onlooker: Onlooker
    ) -> None:
        one: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
        engine = create_engine(wire_url, **one)
        Base.metadata.create_all(engine)
        with OptInSession(engine) as session:
            with session.begin():
                session.connection()  # joins the transaction, and sends nothing
                kill_all(onlooker, onlooker.column(OTHERS), wire)
                session.add(Item(name="one"))
            assert names(onlooker) == ["one"]
        assert_at_rest(engine)
        engine.dispose()

    def test_a_loss_while_there_is_no_other_connection_is_an_error(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        def no_connection(*_: object) -> None:
            raise TimeoutError("none to be had")

        session.scalar(ONE)
        with pytest.raises(TimeoutError), session.begin():
            session.connection()
            kill_all(onlooker, onlooker.column(OTHERS), wire)
            event.listen(session.get_bind(), "do_connect", no_connection)
            session.add(Item(name="one"))
            session.flush()
        event.remove(session.get_bind(), "do_connect", no_connection)
        assert len(TRANSACTION_CONNECTIONS) == 0
        with session.begin():
            session.add(Item(name="two"))
        assert names(onlooker) == ["two"]

    @pytest.mark.parametrize("where", ["outside", "begin", "the first statement"])
    def test_a_new_connection_that_is_refused_is_an_error_of_sqlalchemy(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: str
    ) -> None:
        engine = session.get_bind()

        def refuse(*_: object) -> None:
            raise engine.dialect.loaded_dbapi.OperationalError("refused")

        session.scalar(ONE)
        with pytest.raises(OperationalError, match="refused"):
            if where == "begin":
                kill_all(onlooker, onlooker.column(OTHERS), wire)
                event.listen(engine, "do_connect", refuse)
            with session.begin() if where != "outside" else nullcontext():
                session.connection()
                if where != "begin":
                    kill_all(onlooker, onlooker.column(OTHERS), wire)
                    event.listen(engine, "do_connect", refuse)
                session.scalar(ONE)
        event.remove(engine, "do_connect", refuse)
        assert len(TRANSACTION_CONNECTIONS) == 0
        with session.begin():
            session.add(Item(name="after"))
        assert names(onlooker) == ["after"]

    def test_misuse_that_sent_nothing_does_not_keep_a_connection_from_being_replaced(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with session.begin():
            with pytest.raises(StatementError):
                session.execute(sa.text("SELECT :missing"))
            kill_all(onlooker, onlooker.column(OTHERS), wire)
            session.add(Item(name="one"))
        assert names(onlooker) == ["one"]
        with session.begin(read_only=True):
            with pytest.raises(InvalidRequestError, match="Nothing was sent"):
                session.execute(sa.insert(Item), {"name": "two"})
            kill_all(onlooker, onlooker.column(OTHERS), wire)
            assert session.scalar(ONE) == 1

    def test_a_connection_is_not_replaced_after_something_was_sent(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Item(name="lost"))
            session.flush()
            with pytest.raises(StatementError):
                session.execute(sa.text("SELECT :missing"))
            kill_all(onlooker, onlooker.column(OTHERS), wire)
            session.scalar(ONE)
        assert names(onlooker) == []

    @pytest.mark.parametrize("at", ["a statement", "commit"])
    def test_a_transaction_that_was_idle_for_too_long_is_an_error(
        self, session: OptInSession, onlooker: Onlooker, at: str
    ) -> None:
        with pytest.raises(DBAPIError) as caught, session.begin():
            session.add(Item(name="lost"))
            session.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
            time.sleep(0.3)
            if at == "a statement":
                session.scalar(ONE)
        assert caught.value.connection_invalidated
        assert session.scalar(ONE) == 1
        assert names(onlooker) == []
        assert len(TRANSACTION_CONNECTIONS) == 0

    @pytest.mark.parametrize("twophase", [False, True])
    def test_a_transaction_in_which_something_was_sent_past_sqlalchemy_is_not_begun_again(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, twophase: bool
    ) -> None:
        with OptInSession(engine, twophase=twophase) as session:
            with pytest.raises(OperationalError), session.begin():
                dbapi: Any = session.connection().connection
                with dbapi.cursor() as cursor:
                    cursor.execute("INSERT INTO item (name) VALUES ('by hand')")
                kill_all(onlooker, [backend_pid(session.connection())], wire)
                session.add(Item(name="two"))
            assert names(onlooker) == []
            with session.begin():
                session.add(Item(name="after"))
        assert names(onlooker) == ["after"]

    def test_a_flush_and_a_bulk_call_outside_are_sent_on_another_connection(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        kill_all(onlooker, [backend_pid(session.connection())], wire)
        session.add(Item(name="one"))
        session.flush()
        kill_all(onlooker, [backend_pid(session.connection())], wire)
        session.execute(sa.insert(Item), [{"name": "two"}, {"name": "three"}])
        assert names(onlooker) == ["one", "two", "three"]

    def test_a_stream_outside_begins_on_another_connection(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.execute(sa.insert(Item), [{"name": str(n)} for n in range(20)])
        kill_all(onlooker, [backend_pid(session.connection())], wire)
        statement = sa.select(Item.name).execution_options(yield_per=5)
        assert len(session.scalars(statement).all()) == 20

    def test_a_stream_under_way_ends_with_an_error_and_a_read_beside_it_is_answered(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.execute(sa.insert(Item), [{"name": str(n)} for n in range(20)])
        stream = session.execute(sa.select(Item.name).execution_options(yield_per=2))
        assert stream.fetchone() is not None
        kill_all(onlooker, onlooker.column(OTHERS), wire)
        assert session.scalar(ONE) == 1
        with pytest.raises(DBAPIError):
            stream.all()
        assert session.scalar(ONE) == 1
        del stream
        gc.collect()  # psycopg warns of a cursor that nobody has closed

    def test_a_connection_whose_network_was_cut_while_idle_is_replaced(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.scalar(ONE)
        wire.cut_all()
        assert session.scalar(ONE) == 1
        wire.cut_all()
        with session.begin():
            session.add(Item(name="one"))
        assert names(onlooker) == ["one"]

    def test_results_that_were_not_read_yet_stay_readable(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        result = session.execute(sa.text("SELECT generate_series(1, 3)"))
        kill_all(onlooker, onlooker.column(OTHERS), wire)
        assert session.scalar(ONE) == 1
        assert result.scalars().all() == [1, 2, 3]

    def test_a_server_that_was_restarted_is_not_noticed(
        self, server: PostgresServer, url: str
    ) -> None:
        if not server.can_restart:
            pytest.skip("The server of DATABASE_URL is not ours to restart.")
        engine = create_engine(url, pool_size=POOL)
        fill_pool(engine)
        session = OptInSession(engine)
        session.scalar(ONE)
        server.restart()
        assert session.scalar(ONE) == 1
        with session.begin():
            assert session.scalar(ONE) == 1
        session.close()
        assert_at_rest(engine)
        engine.dispose()

    def test_no_more_is_sent_where_nothing_is_lost(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.scalar(ONE)
        with wire.record() as recording:
            session.scalar(ONE)
            with session.begin():
                session.add_all([Item(name="one"), Item(name="two")])
            with session.begin():
                session.add(Item(name="three"))
        assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT", "INSERT"]

    def test_a_notice_is_not_taken_for_the_end_of_a_connection(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        pid = backend_pid(session.connection())
        with pytest.warns(SessionStateWarning):
            session.execute(sa.text("LISTEN news"))
        onlooker.scalar("SELECT pg_notify('news', 'hello')")
        for _ in range(50):
            assert backend_pid(session.connection()) == pid

    def test_many_threads_get_new_connections_after_a_loss(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        failures: list[BaseException] = []
        start = threading.Barrier(9)

        def work() -> None:
            start.wait()
            try:
                with OptInSession(engine) as session:
                    assert session.scalar(ONE) == 1
            except BaseException as failure:
                failures.append(failure)

        kill_all(onlooker, fill_pool(engine), wire)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        start.wait()
        for thread in threads:
            thread.join()
        assert failures == []


OTHERS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND backend_type = 'client backend'"
)

Where = Literal["before", "within", "after"]
WHERE: list[Where] = ["before", "within", "after"]


def cut(wire: WireProxy, word: str, where: Where) -> None:
    """Cut the connection that sends the next statement with a word, at the message it comes by."""

    def decide(message: Message) -> Where | None:
        if message.is_statement and word in message.text.upper():
            wire.cut_where = None
            return where
        return None

    wire.cut_where = decide


@pytest.mark.parametrize("where", WHERE)
class TestCutAtAMessage:
    def test_a_cut_at_a_read_outside_is_an_error_once(
        self, session: OptInSession, wire: WireProxy, where: Where
    ) -> None:
        session.scalar(ONE)
        cut(wire, "SELECT 2", where)
        with pytest.raises(OperationalError):
            session.scalar(sa.text("SELECT 2"))
        assert session.scalar(sa.text("SELECT 2")) == 2

    def test_a_write_outside_that_was_cut_is_never_sent_twice(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where
    ) -> None:
        session.scalar(ONE)
        cut(wire, "INSERT", where)
        with wire.record() as recording, pytest.raises(OperationalError):
            session.execute(sa.insert(Item).values(name="one"))
        assert recording.verbs.count("INSERT") == 1
        assert names(onlooker) == (["one"] if where == "after" else [])
        assert session.scalars(sa.select(Item.name)).all() == names(onlooker)

    @pytest.mark.parametrize("word", ["BEGIN", "INSERT", "SAVEPOINT", "SELECT"])
    def test_a_cut_in_the_middle_of_a_transaction_undoes_it(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where, word: str
    ) -> None:
        session.scalar(ONE)
        with pytest.raises(OperationalError) as raised, session.begin():
            cut(wire, word, where)
            session.add(Item(name="gone"))
            session.flush()
            with session.begin_nested():
                session.scalar(sa.text("SELECT 2"))
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert not session.in_transaction()
        assert names(onlooker) == []
        with session.begin():
            session.add(Item(name="after"))
        assert names(onlooker) == ["after"]

    def test_a_cut_at_a_commit_says_that_the_outcome_is_unknown(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where
    ) -> None:
        with pytest.raises(CommitOutcomeUnknown, match="may be stored or not"), session.begin():
            session.add(Item(name="one"))
            session.flush()
            cut(wire, "COMMIT", where)
        assert not session.in_transaction()
        assert names(onlooker) == (["one"] if where == "after" else [])
        session.add(Item(name="two"))
        session.commit()
        assert names(onlooker)[-1] == "two"

    def test_a_cut_at_the_commit_of_a_flush_outside_says_that_the_outcome_is_unknown(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where
    ) -> None:
        session.scalar(ONE)
        session.add_all([Item(name="one"), Item(name="two")])
        cut(wire, "COMMIT", where)
        with pytest.raises(CommitOutcomeUnknown):
            session.flush()
        assert session.scalars(sa.select(Item.name)).all() == names(onlooker)

    @pytest.mark.parametrize(
        "call",
        [
            lambda session, rows: session.execute(sa.insert(Item), rows),
            lambda session, rows: session.bulk_insert_mappings(sa.inspect(Item), rows),
        ],
    )
    def test_a_cut_at_the_commit_of_a_bulk_call_says_that_the_outcome_is_unknown(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where, call: Any
    ) -> None:
        session.scalar(ONE)
        cut(wire, "COMMIT", where)
        with pytest.raises(CommitOutcomeUnknown):
            call(session, [{"name": "one"}, {"name": "two"}])
        assert session.scalars(sa.select(Item.name)).all() == names(onlooker)

    def test_a_cut_at_the_commit_of_a_connection_says_that_the_outcome_is_unknown(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, where: Where
    ) -> None:
        with pytest.raises(CommitOutcomeUnknown), engine.begin() as connection:
            connection.execute(sa.insert(Item).values(name="one"))
            cut(wire, "COMMIT", where)
        with engine.connect() as connection:
            assert connection.scalars(sa.select(Item.name)).all() == names(onlooker)

    def test_a_cut_at_a_rollback_is_no_error_of_its_own(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, where: Where
    ) -> None:
        with pytest.raises(ZeroDivisionError), session.begin():
            session.add(Item(name="gone"))
            session.flush()
            cut(wire, "ROLLBACK", where)
            raise ZeroDivisionError
        assert names(onlooker) == []
        assert session.scalar(ONE) == 1

    def test_a_cut_on_a_stock_engine_is_sqlalchemys_error(
        self, wire: WireProxy, wire_url: str, where: Where
    ) -> None:
        engine = sa.create_engine(wire_url)
        with pytest.raises(DBAPIError), OptInSession(engine) as session:
            session.scalar(ONE)
            cut(wire, "COMMIT", where)
            session.commit()
        engine.dispose()


class TestBeforeTheCommit:
    def test_a_loss_before_the_commit_says_that_nothing_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        message = "nothing of the transaction is stored"
        with pytest.raises(OperationalError, match=message) as raised, session.begin():
            session.add(Item(name="gone"))
            session.flush()
            kill_all(onlooker, [backend_pid(session.connection())], wire)
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert names(onlooker) == []

    def test_an_empty_transaction_has_nothing_to_lose(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.scalar(ONE)
        with session.begin():
            kill_all(onlooker, onlooker.column(OTHERS), wire)
        assert session.scalar(ONE) == 1
