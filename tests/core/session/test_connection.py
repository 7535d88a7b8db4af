"""A session hands out its connection, is bound to one, or has one that the server has closed."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
    ResourceClosedError,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from fictive_sqlalchemy import OptInConnection, OptInSession
from tests.library import Author, Onlooker, Sessions, authors, backend_pid, opened, sent
from tests.wire import WireProxy


class TestTheSessionsConnection:
    def test_the_sessions_connection_is_the_same_outside_and_inside(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        outside = session.connection()
        assert isinstance(outside, OptInConnection)
        with wire.record() as recording:
            outside.execute(sa.insert(authors).values(name="outside"))
            assert onlooker.names() == ["outside"]
            with session.begin():
                inside = session.connection()
                assert inside.in_transaction()
                inside.execute(sa.insert(authors).values(name="inside"))
                assert onlooker.names() == ["outside"]
        assert sent(recording) == ["INSERT", "BEGIN", "INSERT", "COMMIT"]
        assert inside is outside
        assert not inside.in_transaction()

    def test_the_sessions_connection_begins_by_hand_and_the_session_joins(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.connection().begin():
                session.execute(sa.insert(Author).values(name="one"))
                session.add(Author(name="two"))
                session.flush()
                with session.begin():
                    session.add(Author(name="three"))
                raise ValueError("mine")
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert "COMMIT" not in sent(recording)
        assert onlooker.names() == []
        session.close()

    def test_the_sessions_connection_takes_an_isolation_level_inside_at_its_first_use(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        level = sa.text("SHOW transaction_isolation")
        with wire.record() as recording, session.begin():
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            assert session.scalar(level) == "serializable"
        assert sent(recording) == ["BEGIN", "SHOW", "COMMIT"]
        with session.begin():
            assert session.scalar(level) == "read committed"
        with session.connection().begin():
            assert session.scalar(level) == "read committed"

    def test_the_sessions_connection_refuses_an_isolation_level_outside(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="begin"):
                session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            with pytest.raises(InvalidRequestError, match="begin"):
                session.connection(execution_options={"postgresql_readonly": True})
        assert recording.messages == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_a_level_does_not_leak_into_a_transaction_that_is_begun_by_hand(
        self, session: OptInSession
    ) -> None:
        level = sa.text("SHOW transaction_isolation")
        with session.begin(isolation_level="SERIALIZABLE"):
            assert session.scalar(level) == "serializable"
        connection = session.connection()
        with connection.begin():
            assert connection.scalar(level) == "read committed"

    def test_a_level_that_was_set_on_the_sessions_connection_is_not_dropped(
        self, session: OptInSession
    ) -> None:
        level = sa.text("SHOW transaction_isolation")
        session.connection().execution_options(isolation_level="REPEATABLE READ")
        with session.connection().begin():
            assert session.scalar(level) == "repeatable read"

    @pytest.mark.parametrize("is_stored", [True, False])
    @pytest.mark.parametrize(
        "give",
        [
            lambda session, **options: session.connection(execution_options=options),
            lambda session, **options: session.connection().execution_options(**options),
        ],
        ids=["to the session", "to the connection"],
    )
    def test_execution_options_of_the_connection_end_with_the_transaction(
        self, session: OptInSession, onlooker: Onlooker, give: Any, is_stored: bool
    ) -> None:
        onlooker.run("CREATE SCHEMA other CREATE TABLE author (id int, name text, age int)")
        onlooker.run("INSERT INTO other.author VALUES (1, 'of the other')")
        name = sa.select(authors.c.name).where(authors.c.id == 1)
        session.connection(execution_options={"logging_token": "outside"})
        with suppress(ZeroDivisionError), session.begin():
            give(session, schema_translate_map={None: "other"}, logging_token="inside")
            assert session.scalar(name) == "of the other"
            if not is_stored:
                raise ZeroDivisionError
        assert session.scalar(name) == "Ada"
        assert session.connection().get_execution_options() == {"logging_token": "outside"}
        with session.begin():
            assert session.scalar(name) == "Ada"

    @pytest.mark.skipif(sa.__version__ < "2.1", reason="new in SQLAlchemy 2.1")
    def test_the_sessions_connection_has_the_sessions_execution_options(
        self, sessions: Sessions
    ) -> None:
        options = {"isolation_level": "REPEATABLE READ"}
        with sessions(execution_options=options) as session, session.begin():
            shown = session.scalar(sa.text("SHOW transaction_isolation"))
        with Session(
            sa.create_engine(sessions.kw["bind"].url, poolclass=NullPool),
            execution_options=options,  # type: ignore[call-arg, unused-ignore]
        ) as stock:
            assert shown == stock.scalar(sa.text("SHOW transaction_isolation"))

    @pytest.mark.skipif(sa.__version__ < "2.1", reason="new in SQLAlchemy 2.1")
    @pytest.mark.parametrize("call", ["bulk_insert_mappings", "bulk_save_objects"])
    def test_a_bulk_call_takes_a_connection_with_the_sessions_execution_options(
        self, sessions: Sessions, onlooker: Onlooker, call: str
    ) -> None:
        onlooker.run("CREATE SCHEMA other")
        onlooker.run("CREATE TABLE other.author (LIKE author INCLUDING ALL)")
        options = {"schema_translate_map": {None: "other"}}
        with sessions(execution_options=options) as session:
            if call == "bulk_insert_mappings":
                session.bulk_insert_mappings(sa.inspect(Author), [{"name": "new"}])
            else:
                session.bulk_save_objects([Author(name="new")])
        assert onlooker.column("SELECT name FROM other.author") == ["new"]
        assert onlooker.names() == []

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_a_connection_ended_by_hand_inside_a_block_writes_nothing_more(
        self, session: OptInSession, onlooker: Onlooker, end: str
    ) -> None:
        with pytest.raises(InvalidRequestError), session.begin():
            session.execute(sa.insert(Author).values(name="one"))
            getattr(session.connection(), end)()  # commit() is refused
            session.execute(sa.insert(Author).values(name="two"))
        assert onlooker.names() == []
        assert not session.in_transaction()
        session.add(Author(name="three"))
        session.commit()
        assert "three" in onlooker.names()

    def test_a_connection_closed_by_hand_is_replaced(self, session: OptInSession) -> None:
        session.connection().close()
        assert session.get_one(Author, 1).name == "Ada"
        with pytest.raises((InvalidRequestError, ResourceClosedError)), session.begin():
            session.get(Author, 2)
            session.connection().close()
            session.get(Author, 3)
        assert session.get_one(Author, 3).name == "Cid"
        assert not session.in_transaction()

    def test_text_that_begins_by_hand_is_refused(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="begin"):
            session.execute(sa.text("BEGIN"))
        assert wire.transactions_open == 0
        session.execute(sa.insert(Author).values(name="after"))
        session.close()
        assert onlooker.names() == ["after"]


def do_commit(session: Session) -> None:
    session.add(Author(name="new"))
    session.commit()


def do_flush(session: Session) -> None:
    session.add(Author(name="new"))
    session.flush()


def do_rollback(session: Session) -> None:
    session.add(Author(name="new"))
    session.flush()
    session.rollback()
    session.add(Author(name="newer"))
    session.commit()


def do_read(session: Session) -> None:
    session.get(Author, 1)


def do_write(session: Session) -> None:
    session.execute(sa.insert(authors).values(name="new"))


def do_block(session: Session) -> None:
    with session.begin():
        session.add(Author(name="new"))


def do_block_that_fails(session: Session) -> None:
    with pytest.raises(ValueError, match="mine"), session.begin():
        session.add(Author(name="new"))
        session.flush()
        raise ValueError("mine")


def do_savepoint(session: Session) -> None:
    session.add(Author(name="outer"))
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(Author(name="Ada"))
    session.commit()


def do_bulk(session: Session) -> None:
    session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])
    session.commit()


def do_autoflush(session: Session) -> None:
    session.add(Author(name="new"))
    assert session.scalar(sa.select(sa.func.count(Author.id))) == 4


ACTIONS = {
    action.__name__: action
    for action in (
        do_commit,
        do_flush,
        do_rollback,
        do_read,
        do_write,
        do_block,
        do_block_that_fails,
        do_savepoint,
        do_bulk,
        do_autoflush,
    )
}


@pytest.mark.parametrize("outer", ["nothing", "transaction", "savepoint"])
@pytest.mark.parametrize(
    "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
)
def test_a_session_on_a_connection_does_what_sqlalchemys_does(
    wire_url: str, wire: WireProxy, onlooker: Onlooker, mode: Any, outer: str
) -> None:
    """Row 20, in each ``join_transaction_mode``: the same statements, the same outcome."""

    def play(
        engine: sa.Engine, session_class: type[Session], action: str
    ) -> tuple[list[str], bool, list[str]]:
        with engine.connect() as connection:
            transaction = connection.begin() if outer != "nothing" else None
            savepoint = connection.begin_nested() if outer == "savepoint" else None
            if transaction is not None:
                connection.execute(sa.text("SELECT 'outer'"))
            with wire.record() as recording:
                with session_class(connection, join_transaction_mode=mode) as session:
                    ACTIONS[action](session)
            if savepoint is not None and savepoint.is_active:
                savepoint.commit()
            stands = transaction is not None and transaction.is_active
            if transaction is not None and stands:
                transaction.commit()
        names = onlooker.names()
        onlooker.run("DELETE FROM author WHERE id > 3")
        return sent(recording), stands, names

    with opened(wire_url) as engine:
        stock_engine = sa.create_engine(wire_url)
        stock_engine.connect().close()
        for action in ACTIONS:
            stock = play(stock_engine, Session, action)
            assert play(stock_engine, OptInSession, action) == stock, action
            assert play(engine, OptInSession, action) == stock, action
        stock_engine.dispose()


class TestAKilledServerProcess:
    def test_a_server_process_killed_while_idle_outside_is_replaced(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        author = session.get_one(Author, 1)
        author.age = 44
        onlooker.kill(backend_pid(session.connection()))
        assert session.get_one(Author, 2).name == "Bob"
        assert author.age == 44
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 44

    def test_a_server_process_killed_inside_is_an_error_and_nothing_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            session.get(Author, 1)
        assert not session.in_transaction()
        with wire.record() as recording:
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 3
        assert recording.verbs[-1] == "SELECT"
        assert onlooker.names() == []

    def test_a_server_process_killed_before_the_commit_is_an_error(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
        assert not session.in_transaction()
        assert onlooker.names() == []
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_a_server_process_killed_before_a_flush_outside_is_replaced(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.get(Author, 1)
        session.add(Author(name="waiting"))
        onlooker.kill(backend_pid(session.connection()))
        session.flush()
        assert onlooker.names() == ["waiting"]

    def test_a_server_process_killed_while_idle_in_the_pool_is_replaced(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        with sessions() as session:
            pid = backend_pid(session.connection())
        onlooker.kill(pid)
        with sessions() as session:
            with session.begin():
                assert session.get_one(Author, 1).name == "Ada"
                session.add(Author(name="after"))
        assert onlooker.names() == ["after"]

    def test_a_server_process_killed_in_a_savepoint_undoes_the_transaction(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(DBAPIError), session.begin():
            session.add(Author(name="gone"))
            with session.begin_nested():
                session.flush()
                onlooker.kill(backend_pid(session.connection()))
                session.get(Author, 1)
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_a_killed_server_process_that_is_caught_inside_the_block_is_not_silent(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises((PendingRollbackError, DBAPIError)), session.begin():
            session.execute(sa.insert(Author).values(name="lost"))
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(OperationalError):
                session.execute(sa.insert(Author).values(name="lost too"))
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_with_pre_ping_nobody_notices_a_killed_server_process(
        self, wire_url: str, onlooker: Onlooker
    ) -> None:
        with opened(wire_url, pool_pre_ping=True) as engine:
            with OptInSession(engine) as session:
                pid = backend_pid(session.connection())
            onlooker.kill(pid)
            with OptInSession(engine) as session, session.begin():
                assert session.get_one(Author, 1).name == "Ada"

    def test_a_broken_network_inside_is_an_error_and_nothing_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            wire.cut_all()
        assert session.get_one(Author, 1).name == "Ada"
        assert onlooker.names() == []
