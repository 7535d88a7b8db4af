"""Connections that a session hands out before a block are part of the block (row 23)."""

# pytest.raises() ends the block around the one that it names:
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    TimeoutError,
)

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Onlooker, Sessions, authors, opened, sent
from tests.wire import WireProxy


def by_statement(connection: sa.Connection) -> None:
    connection.execute(sa.insert(authors).values(name="new"))


def by_many(connection: sa.Connection) -> None:
    connection.execute(sa.insert(authors), [{"name": "new"}, {"name": "newer"}])


def by_driver_sql(connection: sa.Connection) -> None:
    connection.exec_driver_sql("INSERT INTO author (name) VALUES ('new')")


def by_raw_cursor(connection: sa.Connection) -> None:
    cursor = connection.connection.cursor()
    cursor.execute("INSERT INTO author (name) VALUES ('new')")
    cursor.close()


def by_savepoint(connection: sa.Connection) -> None:
    with connection.begin_nested():
        by_statement(connection)


WAYS = [by_statement, by_many, by_driver_sql, by_raw_cursor, by_savepoint]
Way = Callable[[sa.Connection], None]


@pytest.fixture(params=["fresh", "used before", "given back before"])
def connection(session: OptInSession, request: pytest.FixtureRequest) -> sa.Connection:
    connection = session.connection()
    if request.param != "fresh":
        connection.scalar(sa.text("SELECT 1"))
    if request.param == "given back before":
        session.give_back()
    return connection


@pytest.mark.parametrize("way", WAYS)
class TestInABlock:
    def test_what_the_connection_writes_in_a_block_is_undone_with_it(
        self,
        session: OptInSession,
        connection: sa.Connection,
        wire: WireProxy,
        onlooker: Onlooker,
        way: Way,
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ZeroDivisionError), session.begin():
                way(connection)
                raise ZeroDivisionError
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []

    def test_what_the_connection_writes_in_a_block_is_stored_with_it(
        self,
        session: OptInSession,
        connection: sa.Connection,
        wire: WireProxy,
        onlooker: Onlooker,
        way: Way,
    ) -> None:
        with wire.record() as recording, session.begin():
            way(connection)
            session.get_one(Author, 1).age = 40
            assert onlooker.names() == []
        assert sent(recording).count("BEGIN") == sent(recording).count("COMMIT") == 1
        assert "new" in onlooker.names()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 40

    def test_what_the_connection_writes_in_atomic_is_undone_with_it(
        self, session: OptInSession, connection: sa.Connection, onlooker: Onlooker, way: Way
    ) -> None:
        with pytest.raises(ZeroDivisionError), session.atomic():
            way(connection)
            raise ZeroDivisionError
        assert onlooker.names() == []

    def test_a_savepoint_undoes_what_the_connection_wrote_in_it(
        self, session: OptInSession, connection: sa.Connection, onlooker: Onlooker, way: Way
    ) -> None:
        with session.begin():
            session.add(Author(name="kept"))
            with pytest.raises(ZeroDivisionError), session.begin_nested():
                way(connection)
                raise ZeroDivisionError
        assert onlooker.names() == ["kept"]

    def test_a_read_only_block_is_read_only_for_the_connection(
        self, session: OptInSession, connection: sa.Connection, onlooker: Onlooker, way: Way
    ) -> None:
        with pytest.raises(Exception, match="read-only"), session.begin(read_only=True):
            way(connection)
        assert onlooker.names() == []

    def test_after_the_block_the_connection_stands_alone_again(
        self,
        session: OptInSession,
        connection: sa.Connection,
        wire: WireProxy,
        onlooker: Onlooker,
        way: Way,
    ) -> None:
        with session.begin():
            connection.scalar(sa.text("SELECT 1"))
        way(connection)
        assert "new" in onlooker.names()
        with wire.record() as recording:
            connection.scalar(sa.text("SELECT 1"))
        assert sent(recording) == ["SELECT"]


def test_the_connection_has_the_isolation_level_of_the_block(
    session: OptInSession, connection: sa.Connection
) -> None:
    with session.begin(isolation_level="SERIALIZABLE"):
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
        cursor = connection.connection.cursor()
        cursor.execute("SHOW transaction_isolation")
        assert cursor.fetchone() == ("serializable",)
    assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


def test_the_connection_takes_options_in_the_block_before_its_first_statement(
    session: OptInSession, connection: sa.Connection
) -> None:
    with session.begin():
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "repeatable read"
    with session.begin():
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


def test_an_empty_block_sends_nothing_after_the_connection_was_handed_out(
    session: OptInSession, connection: sa.Connection, wire: WireProxy
) -> None:
    with wire.record() as recording:
        with session.begin():
            pass
        with pytest.raises(ZeroDivisionError), session.begin():
            raise ZeroDivisionError
    assert recording.messages == []


def test_a_flush_outside_and_a_connection_share_one_transaction(
    session: OptInSession, connection: sa.Connection, wire: WireProxy, onlooker: Onlooker
) -> None:
    session.add(Author(name="new"))
    with wire.record() as recording:
        session.flush()
    assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
    with wire.record() as recording:
        connection.execute(sa.update(authors).values(age=3))
    assert sent(recording) == ["UPDATE"]
    assert onlooker.names() == ["new"]


def test_an_error_on_the_connection_that_is_caught_is_not_silent(
    session: OptInSession, connection: sa.Connection, onlooker: Onlooker
) -> None:
    with pytest.raises(InvalidRequestError) as raised, session.begin():
        session.execute(sa.insert(authors).values(name="new"))
        with pytest.raises(IntegrityError) as caught:
            connection.execute(sa.insert(authors).values(name="Ada"))
    assert raised.value.__cause__ is caught.value
    assert onlooker.names() == []


def test_an_error_of_a_raw_cursor_that_is_caught_is_not_silent(
    session: OptInSession, connection: sa.Connection, onlooker: Onlooker, driver: str
) -> None:
    with pytest.raises((InvalidRequestError, DBAPIError)), session.begin():
        cursor = connection.connection.cursor()
        cursor.execute("INSERT INTO author (name) VALUES ('new')")
        with pytest.raises(Exception, match="author_name_key"):
            cursor.execute("INSERT INTO author (name) VALUES ('Ada')")
    assert onlooker.names() == []


def test_with_begin_on_write_a_raw_cursor_begins_the_transaction(
    sessions: Sessions, wire: WireProxy, onlooker: Onlooker
) -> None:
    with sessions(begin_on_write=True) as session:
        connection = session.connection()
        with wire.record() as recording:
            by_raw_cursor(connection)
            assert onlooker.names() == []
            session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["new"]
        with wire.record() as recording:
            connection.execute(sa.insert(authors).values(name="newer"))
            session.rollback()
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == ["new"]


def test_the_connection_of_each_bind_joins_the_block(wire_url: str, onlooker: Onlooker) -> None:
    with opened(wire_url) as engine:
        copy = engine.execution_options(logging_token="copy")
        with OptInSession(engine) as session:
            one, two = session.connection(), session.connection({"bind": copy})
            with pytest.raises(ZeroDivisionError), session.begin():
                one.execute(sa.insert(authors).values(name="one"))
                two.execute(sa.insert(authors).values(name="two"))
                raise ZeroDivisionError
    assert onlooker.names() == []


def test_the_connection_of_a_session_that_is_gone_goes_on_alone(
    engine: OptInEngine, onlooker: Onlooker
) -> None:
    connection = OptInSession(engine).connection()
    connection.execute(sa.insert(authors).values(name="new"))
    assert onlooker.names() == ["new"]
    connection.close()


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_a_raw_cursor_after_a_flush_that_failed_is_undone_with_the_block(
    sessions: Sessions, onlooker: Onlooker, begin_on_write: bool
) -> None:
    with sessions(begin_on_write=begin_on_write) as session:
        if begin_on_write:
            session.commit()
        connection = session.connection()
        if begin_on_write:
            session.rollback()
        with pytest.raises(InvalidRequestError) as raised, session.begin():
            session.add(Author(name="Ada"))
            with pytest.raises(IntegrityError) as caught:
                session.flush()
            by_raw_cursor(connection)
            with pytest.raises(InvalidRequestError):
                by_statement(connection)
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        connection.execute(sa.insert(authors).values(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]


def test_a_raw_cursor_is_never_that_of_another_session(wire_url: str, onlooker: Onlooker) -> None:
    with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=0.2) as engine:
        with OptInSession(engine) as one, OptInSession(engine) as other:
            cursor = one.connection().connection.cursor()
            one.scalar(sa.text("SELECT 1"))
            with pytest.raises(TimeoutError):
                other.scalar(sa.text("SELECT 1"))
            cursor.execute("INSERT INTO author (name) VALUES ('new')")
            assert onlooker.names() == ["new"]
            cursor.close()
            one.close()
            with other.begin():
                other.scalar(sa.text("SELECT 1"))


@pytest.mark.parametrize("sql", ["COMMIT", "ROLLBACK", "commit; SELECT 1", "END", "ABORT"])
@pytest.mark.parametrize("how", ["session", "connection"])
def test_a_statement_that_would_end_the_block_is_refused(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker, sql: str, how: str
) -> None:
    with wire.record() as recording:
        with pytest.raises(InvalidRequestError, match=r"call commit\(\) or rollback\(\)"):
            with session.begin():
                session.add(Author(name="one"))
                session.flush()
                if how == "session":
                    session.execute(sa.text(sql))
                else:
                    session.connection().exec_driver_sql(sql)
    assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
    assert onlooker.names() == []


def test_rollback_to_savepoint_by_hand_does_not_end_the_block(
    session: OptInSession, onlooker: Onlooker
) -> None:
    with session.begin():
        session.execute(sa.text("SAVEPOINT mine"))
        session.execute(sa.insert(authors).values(name="gone"))
        session.execute(sa.text("ROLLBACK TO SAVEPOINT mine"))
        session.execute(sa.insert(authors).values(name="kept"))
    assert onlooker.names() == ["kept"]


def test_commit_of_the_connection_in_the_block_is_refused(
    session: OptInSession, onlooker: Onlooker
) -> None:
    with pytest.raises(InvalidRequestError, match="would store a part"), session.begin():
        session.execute(sa.insert(authors).values(name="one"))
        session.connection().commit()
    assert onlooker.names() == []


def test_a_connection_of_the_engine_may_commit_by_a_statement(
    engine: OptInEngine, onlooker: Onlooker
) -> None:
    with engine.begin() as connection:  # as in a migration
        connection.execute(sa.insert(authors).values(name="one"))
        connection.execute(sa.text("COMMIT"))
    assert onlooker.names() == ["one"]


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_a_connection_handed_out_rests_after_a_refused_statement_and_a_rollback(
    sessions: Sessions, begin_on_write: bool
) -> None:
    with sessions(begin_on_write=begin_on_write) as session:
        if not begin_on_write:
            session.begin()
        connection = session.connection()
        connection.execute(sa.insert(authors).values(name="one"))
        session.add(Author(name="Ada"))
        with pytest.raises(IntegrityError):
            session.flush()
        with pytest.raises(PendingRollbackError):
            session.execute(sa.text("SELECT 1"))
        session.rollback()
        dbapi: Any = connection.connection.dbapi_connection
        assert dbapi.autocommit is True
        assert not session.in_transaction()
