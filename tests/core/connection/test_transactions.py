"""A connection is in autocommit outside, and has transactions, savepoints and two-phase commits."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    ProgrammingError,
    ResourceClosedError,
)

from fictive_sqlalchemy import OptInConnection, OptInEngine
from tests.core.connection.support import insert
from tests.library import ONE, Base, Onlooker, assert_at_rest, assert_rests, authors, sent
from tests.wire import WireProxy


class TestOutside:
    WAYS: dict[str, Callable[[OptInConnection], Any]] = {  # noqa: RUF012
        "execute": lambda connection: connection.execute(sa.select(authors)).all(),
        "scalar": lambda connection: connection.scalar(sa.select(authors.c.id)),
        "scalars": lambda connection: connection.scalars(sa.select(authors.c.id)).all(),
        "text": lambda connection: connection.execute(ONE).scalar_one(),
        "exec_driver_sql": lambda connection: connection.exec_driver_sql("SELECT 1").all(),
        "parameters": lambda connection: connection.execute(
            sa.text("SELECT CAST(:n AS int)"), {"n": 1}
        ).scalar_one(),
        "a list of one": lambda connection: connection.execute(
            sa.text("SELECT CAST(:n AS int)"), [{"n": 1}]
        ),
        "a tuple for the driver": lambda connection: connection.exec_driver_sql(
            "SELECT %s::int, %s::int", (1, 2)
        ),
        "a function": lambda connection: connection.execute(sa.func.now()),
    }

    @pytest.mark.parametrize("way", WAYS)
    def test_each_statement_outside_goes_alone(
        self, connection: OptInConnection, wire: WireProxy, way: str
    ) -> None:
        with wire.record() as recording:
            self.WAYS[way](connection)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1
        assert not connection.in_transaction()
        assert connection.get_transaction() is None

    def test_a_sequence_outside_goes_alone(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            number = connection.scalar(sa.Sequence("author_id_seq"))
        assert sent(recording) == ["SELECT"]
        assert number == 4

    def test_ddl_outside_is_done_when_it_returns(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        connection.execute(sa.text("CREATE TABLE made (id int)"))
        assert onlooker.scalar("SELECT to_regclass('made')") == "made"
        connection.execute(sa.text("VACUUM author"))

    @pytest.mark.parametrize("way", ["create_all", "create"])
    def test_tables_that_can_not_all_be_made_are_none(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker, way: str
    ) -> None:
        metadata = sa.MetaData()
        first = sa.Table("first", metadata, sa.Column("id", sa.Integer))
        sa.Index("broken", sa.text("nothing")) if way == "create_all" else None
        wrong = sa.Column("id", sa.Integer, server_default=sa.text("nothing"))
        if way == "create_all":
            sa.Table("second", metadata, wrong)
        else:
            sa.Index("broken", first.c.id, postgresql_using="nothing")
        with wire.record() as recording, pytest.raises(DBAPIError):
            if way == "create_all":
                metadata.create_all(connection)
            else:
                first.create(connection)
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.scalar("SELECT to_regclass('first')") is None
        assert connection.scalar(ONE) == 1

    def test_tables_are_dropped_all_or_none(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execute(sa.text("CREATE VIEW needs AS SELECT * FROM document"))
        with pytest.raises(DBAPIError):
            Base.metadata.drop_all(connection)
        assert onlooker.scalar("SELECT count(*) FROM author") == 3
        assert onlooker.scalar("SELECT to_regclass('seat')") == "seat"
        connection.execute(sa.text("DROP VIEW needs"))
        Base.metadata.drop_all(connection)
        assert onlooker.scalar("SELECT to_regclass('author')") is None

    def test_inspecting_sends_its_reads_alone(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            assert sa.inspect(connection).has_table("author")
        assert sent(recording) == ["SELECT"]

    def test_a_lock_outside_is_refused(self, connection: OptInConnection, wire: WireProxy) -> None:
        lock = sa.select(authors).with_for_update()
        with wire.record() as recording:
            for statement in (lock, sa.select(lock.subquery()), sa.select(lock.cte())):
                with pytest.raises(InvalidRequestError, match="begin"):
                    connection.execute(statement)
                with pytest.raises(InvalidRequestError, match="begin"):
                    connection.scalar(statement)
        assert recording.messages == []
        with connection.begin():
            assert len(connection.execute(lock).all()) == 3

    @pytest.mark.parametrize("rows", [[("a",), ("b",)], (("a",), ("b",))])
    def test_many_rows_for_the_drivers_executemany_are_all_or_nothing(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker, rows: Any
    ) -> None:
        sql = "INSERT INTO author (name) VALUES (%s)"
        if isinstance(rows, tuple):
            rows = list(rows)
        connection.exec_driver_sql(sql, rows)
        with wire.record() as recording, pytest.raises(IntegrityError):
            connection.exec_driver_sql(sql, [("c",), ("b",)])
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == ["a", "b"]

    def test_many_rows_are_all_or_nothing_and_readable(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        rows = [{"name": f"n{n}"} for n in range(2501)]
        returning = sa.insert(authors).returning(authors.c.id)
        assert len(connection.execute(returning, rows).all()) == 2501
        broken = [{"name": f"m{n}"} for n in range(2500)] + [{"name": "Ada"}]
        for statement in (sa.insert(authors), returning):
            with pytest.raises(IntegrityError):
                connection.execute(statement, broken)
        assert len(onlooker.names()) == 2501

    def test_commit_and_rollback_outside_do_nothing(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execute(insert("one"))
        with wire.record() as recording:
            connection.rollback()
            connection.commit()
        assert recording.messages == []
        assert onlooker.names() == ["one"]

    def test_an_error_outside_leaves_the_connection_as_it_was(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            for _ in range(2):
                with pytest.raises(IntegrityError):
                    connection.execute(insert("Ada"))
                assert connection.scalar(ONE) == 1
        assert sent(recording) == ["INSERT", "SELECT"] * 2
        assert_rests(connection.connection.dbapi_connection)

    def test_nothing_is_sent_on_a_closed_connection(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        connection = engine.connect()
        connection.close()
        connection.close()
        connection.give_back()
        with wire.record() as recording:
            with pytest.raises(ResourceClosedError):
                connection.execute(ONE)
            with pytest.raises(ResourceClosedError):
                connection.begin()
            with pytest.raises(ResourceClosedError):
                connection.exec_driver_sql("SELECT 1")
        assert recording.messages == []


class TestTransactions:
    def test_transactions_may_follow_statements_and_each_other(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            connection.execute(ONE)
            for name in ("one", "two"):
                with connection.begin():
                    connection.execute(insert(name))
            transaction = connection.begin()
            connection.execute(insert("gone"))
            transaction.rollback()
            connection.begin()
            connection.execute(insert("three"))
            connection.commit()
            connection.begin()
            connection.execute(insert("gone"))
            connection.rollback()
        assert sent(recording) == [
            *("SELECT", "BEGIN", "INSERT", "COMMIT", "BEGIN", "INSERT", "COMMIT"),
            *("BEGIN", "INSERT", "ROLLBACK", "BEGIN", "INSERT", "COMMIT"),
            *("BEGIN", "INSERT", "ROLLBACK"),
        ]
        assert onlooker.names() == ["one", "three", "two"]

    def test_empty_transactions_send_nothing(
        self, engine: OptInEngine, connection: OptInConnection, wire: WireProxy
    ) -> None:
        with engine.begin():
            pass
        with wire.record() as recording:
            with connection.begin():
                pass
            with engine.begin():
                pass
            connection.begin().rollback()
            connection.begin().close()
            connection.begin_nested().commit()
        assert recording.messages == []
        assert_rests(connection.connection.dbapi_connection)

    def test_a_second_begin_is_an_error_and_nothing_is_sent(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with connection.begin():
            connection.execute(insert("one"))
            with wire.record() as recording:
                with pytest.raises(InvalidRequestError):
                    connection.begin()
                with pytest.raises(InvalidRequestError):
                    connection.begin_twophase()
            assert recording.messages == []
            connection.execute(insert("two"))
        assert onlooker.names() == ["one", "two"]

    def test_a_transaction_ended_inside_its_block_refuses_to_go_on(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        for end in (connection.commit, connection.rollback):
            with connection.begin():
                connection.execute(insert(end.__name__))
                end()
                with wire.record() as recording:
                    with pytest.raises(InvalidRequestError, match="context manager"):
                        connection.execute(insert("more"))
                    with pytest.raises(InvalidRequestError, match="context manager"):
                        connection.execute(sa.insert(authors), [{"name": "a"}, {"name": "b"}])
                    with pytest.raises(InvalidRequestError, match="context manager"):
                        connection.begin()
                assert recording.messages == []
            connection.execute(insert(f"after {end.__name__}"))
        assert onlooker.names() == ["after commit", "after rollback", "commit"]

    def test_transactions_nest_as_savepoints(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, connection.begin_nested():
            connection.execute(insert("outer"))
            with pytest.raises(IntegrityError), connection.begin_nested():
                connection.execute(insert("gone"))
                with connection.begin_nested():
                    connection.execute(insert("Ada"))
            with connection.begin_nested():
                connection.execute(insert("inner"))
        assert [verb for verb in sent(recording) if verb != "INSERT"] == [
            *("BEGIN", "SAVEPOINT", "SAVEPOINT", "ROLLBACK TO", "ROLLBACK TO"),
            *("SAVEPOINT", "RELEASE", "COMMIT"),
        ]
        assert onlooker.names() == ["inner", "outer"]

    def test_transactions_that_are_not_ended_roll_back_with_the_connection(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with engine.connect() as connection:
                connection.begin()
                connection.execute(insert("one"))
                connection.begin_nested()
                connection.execute(insert("two"))
        assert sent(recording)[-1] == "ROLLBACK"
        assert sent(recording).count("ROLLBACK") == 1
        assert_at_rest(engine)
        connection = engine.connect()
        connection.begin()
        connection.execute(insert("three"))
        del connection
        assert_at_rest(engine)
        assert onlooker.names() == []

    def test_transactions_whose_commit_fails_store_nothing(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        sql = "INSERT INTO seat (place) VALUES (1), (1)"
        with wire.record() as recording:
            with pytest.raises(IntegrityError), connection.begin():
                connection.exec_driver_sql(sql)
            assert connection.scalar(ONE) == 1
            transaction = connection.begin()
            connection.exec_driver_sql(sql)
            with pytest.raises(IntegrityError):
                transaction.commit()
            transaction.rollback()
            assert connection.scalar(ONE) == 1
        assert [verb for verb in sent(recording) if verb != "ROLLBACK"] == [
            *("BEGIN", "INSERT", "COMMIT", "SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"),
        ]
        assert onlooker.scalar("SELECT count(*) FROM seat") == 0
        with connection.begin():
            connection.execute(insert("after"))
        assert onlooker.names() == ["after"]

    def test_transactions_that_an_error_aborted_do_not_commit_in_silence(
        self, connection: OptInConnection, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError), connection.begin():
            connection.execute(insert("lost"))
            with pytest.raises(IntegrityError):
                connection.execute(insert("Ada"))
        assert connection.scalar(ONE) == 1
        connection.begin()
        connection.execute(insert("lost"))
        with pytest.raises(IntegrityError):
            connection.execute(insert("Ada"))
        with pytest.raises(PendingRollbackError):
            connection.commit()
        connection.rollback()
        assert connection.scalar(ONE) == 1
        with pytest.raises(PendingRollbackError), engine.begin() as other:
            other.execute(insert("lost"))
            with pytest.raises(IntegrityError):
                other.execute(insert("Ada"))
        assert onlooker.names() == []

    def test_transactions_that_an_error_aborted_can_go_back_to_a_savepoint(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        with connection.begin():
            connection.execute(insert("kept"))
            savepoint = connection.begin_nested()
            with pytest.raises(IntegrityError):
                connection.execute(insert("Ada"))
            savepoint.rollback()
            connection.execute(insert("kept too"))
        assert onlooker.names() == ["kept", "kept too"]

    def test_transactions_can_go_on_after_a_savepoint_that_an_error_aborted(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        with connection.begin():
            connection.execute(insert("kept"))
            with pytest.raises(PendingRollbackError), connection.begin_nested():
                connection.execute(insert("gone"))
                with pytest.raises(IntegrityError):
                    connection.execute(insert("Ada"))
            connection.execute(insert("later"))
        assert onlooker.names() == ["kept", "later"]

    def test_results_of_a_transaction_can_be_read_after_it(
        self, connection: OptInConnection
    ) -> None:
        outside = connection.execute(sa.select(authors.c.name))
        with connection.begin():
            inside = connection.execute(sa.select(authors.c.name))
            assert outside.fetchone() is not None
        assert len(inside.all()) == 3
        assert len(outside.all()) == 2


class TestTwoPhases:
    def test_two_phase_transactions_commit(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with connection.begin_twophase():
                connection.execute(insert("one"))
            transaction = connection.begin_twophase()
            connection.execute(insert("two"))
            transaction.prepare()
            assert onlooker.names() == ["one"]
            transaction.commit()
            connection.execute(ONE)
        assert sent(recording) == [
            *("BEGIN", "INSERT", "COMMIT", "BEGIN", "INSERT", "PREPARE", "COMMIT PREPARED"),
            "SELECT",
        ]
        assert onlooker.names() == ["one", "two"]
        assert_rests(connection.connection.dbapi_connection)

    def test_two_phase_transactions_roll_back(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), connection.begin_twophase("by name"):
                connection.execute(insert("one"))
                raise ValueError("mine")
            transaction = connection.begin_twophase("by another name")
            connection.execute(insert("two"))
            transaction.prepare()
            transaction.rollback()
        assert sent(recording) == [
            *("BEGIN", "INSERT", "ROLLBACK", "BEGIN", "INSERT", "PREPARE", "ROLLBACK PREPARED"),
        ]
        assert onlooker.names() == []
        assert_rests(connection.connection.dbapi_connection)

    def test_a_two_phase_transaction_that_fails_to_prepare_leaves_nothing(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        transaction = connection.begin_twophase()
        connection.exec_driver_sql("INSERT INTO seat (place) VALUES (1), (1)")
        with pytest.raises(IntegrityError):
            transaction.prepare()
        with suppress(ProgrammingError):
            transaction.rollback()  # with psycopg it is an error, as with SQLAlchemy alone
        assert connection.scalar(ONE) == 1
        assert_rests(connection.connection.dbapi_connection)
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0

    def test_a_two_phase_commit_that_fails_does_no_harm_to_the_next(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            transaction = connection.begin_twophase()
            connection.exec_driver_sql("INSERT INTO seat (place) VALUES (1), (1)")
            with pytest.raises(IntegrityError):
                transaction.commit()
        for _ in range(2):
            with engine.begin() as connection:
                connection.exec_driver_sql("INSERT INTO seat (place) SELECT count(*) FROM seat")
        assert onlooker.scalar("SELECT count(*) FROM seat") == 2

    def test_two_phase_transactions_are_recovered_from_another_connection(
        self, engine: OptInEngine, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        transaction = connection.begin_twophase("to be recovered")
        connection.execute(insert("one"))
        transaction.prepare()
        connection.invalidate()
        with engine.connect() as other:
            assert "to be recovered" in other.recover_twophase()
            other.commit_prepared("to be recovered", recover=True)
        assert onlooker.names() == ["one"]
