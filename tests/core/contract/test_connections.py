"""Rows 16, 17, 19 and 20 of the contract are about connections, of the engine and in the pool."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, IsolationLevel, OptInEngine, OptInSession
from tests.library import Author, Onlooker, Sessions, assert_at_rest, backend_pid, sent
from tests.wire import WireProxy


class TestRow16ConnectWithoutBegin:
    def test_connect_without_begin_is_autocommit(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
            connection.execute(sa.insert(Author).values(name="done"))
            assert onlooker.names() == ["done"]
            assert not connection.in_transaction()
            with pytest.raises(IntegrityError):
                connection.execute(sa.insert(Author).values(name="done"))
            assert connection.scalar(sa.text("SELECT 2")) == 2
            connection.commit()
            connection.rollback()
        assert sent(recording) == ["SELECT", "INSERT", "INSERT", "SELECT"]
        assert recording.round_trips == 4
        assert onlooker.names() == ["done"]


class TestRow17BeginOnAnEngineOrAConnection:
    def test_begin_on_an_engine_or_a_connection_is_a_real_transaction(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, engine.begin() as connection:
            connection.execute(sa.insert(Author).values(name="one"))
            assert onlooker.names() == []
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with wire.record() as recording, engine.connect() as connection:
            connection.scalar(sa.text("SELECT 1"))
            with connection.begin():
                connection.execute(sa.insert(Author).values(name="two"))
            connection.scalar(sa.text("SELECT 1"))
        assert sent(recording) == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
        assert onlooker.names() == ["one", "two"]

    def test_a_transaction_that_fails_half_way_leaves_the_schema_as_it_was(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ProgrammingError), engine.begin() as connection:
                connection.execute(sa.text("CREATE TABLE half (id int)"))
                connection.execute(sa.text("ALTER TABLE nowhere ADD COLUMN x int"))
            with pytest.raises(ProgrammingError), engine.connect() as connection:
                with connection.begin():
                    connection.execute(sa.text("CREATE TABLE half (id int)"))
                    connection.execute(sa.text("ALTER TABLE nowhere ADD COLUMN x int"))
        assert sent(recording) == ["BEGIN", "CREATE", "ALTER", "ROLLBACK"] * 2
        assert onlooker.scalar("SELECT to_regclass('half')") is None


class TestRow19BackInThePool:
    def test_a_connection_rests_in_autocommit_after_anything(
        self, sessions: Sessions, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with sessions() as session:
            session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True)
            session.get(Author, 1)
        assert_at_rest(engine)
        with sessions() as session, pytest.raises(KeyboardInterrupt), session.begin():
            session.get(Author, 1)
            raise KeyboardInterrupt
        assert_at_rest(engine)
        with sessions() as session, pytest.raises(DBAPIError), session.begin():
            session.get(Author, 1)
            onlooker.kill(backend_pid(session.connection()))
            session.get(Author, 2)
        assert_at_rest(engine)
        with sessions() as session:
            with pytest.raises(IntegrityError):
                session.execute(sa.insert(Author).values(name="Ada"))
        assert_at_rest(engine)
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_going_in_and_out_of_autocommit_takes_no_round_trip(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        begins: list[tuple[IsolationLevel | None, bool | None, bool | None]] = [
            (None, None, None),
            ("SERIALIZABLE", None, None),
            ("REPEATABLE READ", True, None),
            ("SERIALIZABLE", True, True),
            (None, False, None),
        ]
        with sessions() as session:
            for _ in range(2):
                for level, read_only, deferrable in begins:
                    with wire.record() as recording:
                        with session.begin(
                            isolation_level=level, read_only=read_only, deferrable=deferrable
                        ):
                            session.execute(sa.text("SELECT 1"))
                        session.execute(sa.text("SELECT 2"))
                        session.give_back()
                    assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
                    # The driver's own: psycopg prepares a statement when it comes again and again,
                    # in a round trip that does no more.
                    names = [each.name for each in recording.messages if each.sender == "frontend"]
                    prepared = list(pairwise(names)).count(("Parse", "Sync"))
                    assert recording.round_trips == 4 + prepared


class TestRow20ASessionOnAConnection:
    @pytest.mark.parametrize(
        "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
    )
    def test_a_session_on_a_connection_joins_its_transaction_as_sqlalchemy_does(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, mode: Any
    ) -> None:
        with engine.connect() as connection:
            transaction = connection.begin()
            with wire.record() as recording:
                with OptInSession(connection, join_transaction_mode=mode) as session:
                    session.add(Author(name="new"))
                    session.commit()
                    assert session.scalar(sa.select(sa.func.count(Author.id))) == 4
            assert transaction.is_active is (mode != "control_fully")
            if transaction.is_active:
                transaction.rollback()
        verbs = {
            "conditional_savepoint": ["BEGIN", "INSERT", "SELECT"],
            "rollback_only": ["BEGIN", "INSERT", "SELECT"],
            "control_fully": ["BEGIN", "INSERT", "COMMIT", "BEGIN", "SELECT"],
            "create_savepoint": [
                *("BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SAVEPOINT", "SELECT", "ROLLBACK TO"),
            ],
        }
        assert [verb for verb in sent(recording) if verb != "ROLLBACK"] == verbs[mode]
        assert onlooker.names() == (["new"] if mode == "control_fully" else [])
