"""The connection of ``engine.connect()``, closer than the contract."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    ResourceClosedError,
)

from fictive_sqlalchemy import OptInConnection, OptInEngine, OptInSession
from tests.library import (
    LEVEL,
    ONE,
    READ_ONLY,
    Base,
    NoteBase,
    Onlooker,
    assert_at_rest,
    assert_rests,
    authors,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy


@pytest.fixture
def connection(engine: OptInEngine) -> Iterator[OptInConnection]:
    connection = engine.connect()
    yield connection
    connection.close()


def insert(name: str) -> sa.Insert:
    return sa.insert(authors).values(name=name)


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
    def test_each_statement_goes_alone(
        self, connection: OptInConnection, wire: WireProxy, way: str
    ) -> None:
        with wire.record() as recording:
            self.WAYS[way](connection)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1
        assert not connection.in_transaction()
        assert connection.get_transaction() is None

    def test_a_sequence_goes_alone(self, connection: OptInConnection, wire: WireProxy) -> None:
        with wire.record() as recording:
            number = connection.scalar(sa.Sequence("author_id_seq"))
        assert sent(recording) == ["SELECT"]
        assert number == 4

    def test_ddl_is_done_when_it_returns(
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

    def test_inspecting_reads_alone(self, connection: OptInConnection, wire: WireProxy) -> None:
        with wire.record() as recording:
            assert sa.inspect(connection).has_table("author")
        assert sent(recording) == ["SELECT"]

    def test_a_lock_is_refused(self, connection: OptInConnection, wire: WireProxy) -> None:
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
    def test_many_rows_of_the_drivers_are_all_or_nothing(
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

    def test_commit_and_rollback_do_nothing(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execute(insert("one"))
        with wire.record() as recording:
            connection.rollback()
            connection.commit()
        assert recording.messages == []
        assert onlooker.names() == ["one"]

    def test_an_error_leaves_it_as_it_was(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            for _ in range(2):
                with pytest.raises(IntegrityError):
                    connection.execute(insert("Ada"))
                assert connection.scalar(ONE) == 1
        assert sent(recording) == ["INSERT", "SELECT"] * 2
        assert_rests(connection.connection.dbapi_connection)

    def test_nothing_goes_to_a_closed_one(self, engine: OptInEngine, wire: WireProxy) -> None:
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
    def test_may_follow_statements_and_each_other(
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

    def test_that_are_empty_send_nothing(
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

    def test_twice_are_an_error_and_nothing_is_sent(
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

    def test_ended_inside_their_block_refuse_to_go_on(
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

    def test_nest(self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker) -> None:
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

    def test_that_are_not_ended_roll_back_with_the_connection(
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

    def test_whose_commit_fails_store_nothing(
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

    def test_that_an_error_aborted_do_not_commit_in_silence(
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

    def test_that_an_error_aborted_can_go_back_to_a_savepoint(
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

    def test_that_go_on_after_a_savepoint_that_an_error_aborted(
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

    def test_read_their_results_afterwards(self, connection: OptInConnection) -> None:
        outside = connection.execute(sa.select(authors.c.name))
        with connection.begin():
            inside = connection.execute(sa.select(authors.c.name))
            assert outside.fetchone() is not None
        assert len(inside.all()) == 3
        assert len(outside.all()) == 2


class TestOptions:
    def test_a_level_is_that_of_its_transactions(
        self, engine: OptInEngine, connection: OptInConnection, wire: WireProxy
    ) -> None:
        assert connection.execution_options(isolation_level="SERIALIZABLE") is connection
        with wire.record() as recording:
            assert connection.scalar(LEVEL) == "read committed"
            for _ in range(3):
                with connection.begin():
                    assert connection.scalar(LEVEL) == "serializable"
        assert sent(recording) == ["SHOW", *["BEGIN", "SHOW", "COMMIT"] * 3]
        assert recording.round_trips == 10
        with engine.begin() as other:
            assert other.scalar(LEVEL) == "read committed"

    def test_a_level_goes_with_it(self, engine: OptInEngine) -> None:
        with engine.connect() as connection:
            connection.execution_options(
                isolation_level="SERIALIZABLE", postgresql_readonly=True, postgresql_deferrable=True
            )
            pid = backend_pid(connection)
            with connection.begin():
                assert connection.scalar(READ_ONLY) == "on"
                assert connection.scalar(sa.text("SHOW transaction_deferrable")) == "on"
        with engine.begin() as connection:
            assert backend_pid(connection) == pid
            assert connection.scalar(LEVEL) == "read committed"
            assert connection.scalar(READ_ONLY) == "off"

    def test_one_after_the_other_adds_up(self, connection: OptInConnection) -> None:
        connection.execution_options(isolation_level="SERIALIZABLE")
        connection.execution_options(postgresql_readonly=True)
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"
            assert connection.scalar(READ_ONLY) == "on"
        connection.execution_options(isolation_level="REPEATABLE_READ", postgresql_readonly=False)
        with connection.begin():
            assert connection.scalar(LEVEL) == "repeatable read"
            assert connection.scalar(READ_ONLY) == "off"

    def test_autocommit_by_name_begins_nothing_until_another_level(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        """As Alembic's ``autocommit_block()`` does it."""
        before = connection.get_isolation_level()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with wire.record() as recording, connection.begin():
            connection.execute(sa.text("VACUUM author"))
            connection.execute(insert("done"))
            assert onlooker.names() == ["done"]
        assert sent(recording) == ["VACUUM", "INSERT"]
        connection.execution_options(isolation_level=before)
        with wire.record() as recording, connection.begin():
            connection.execute(insert("newer"))
            assert onlooker.names() == ["done"]
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(IntegrityError), connection.begin():
            connection.execute(insert("newest"))
            connection.execute(insert("Ada"))
        assert onlooker.names() == ["done", "newer", "newest"]

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": "SNAPSHOT"},
            {"postgresql_readonly": "yes"},
            {"postgresql_deferrable": True},
        ],
    )
    def test_what_the_database_does_not_know_is_refused(
        self, connection: OptInConnection, wire: WireProxy, options: dict[str, Any]
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ArgumentError):
                connection.execution_options(**options)
        assert recording.messages == []
        with connection.begin():
            assert connection.scalar(LEVEL) == "read committed"

    def test_what_a_transaction_began_with_can_not_change(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        with connection.begin():
            connection.execute(insert("one"))
            for options in ({"isolation_level": "SERIALIZABLE"}, {"postgresql_readonly": True}):
                with pytest.raises(InvalidRequestError):
                    connection.execution_options(**options)
            connection.execution_options(logging_token="harmless")
        assert onlooker.names() == ["one"]

    def test_a_read_only_transaction_refuses_to_write(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execution_options(postgresql_readonly=True)
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="read-only"), connection.begin():
                connection.execute(insert("new"))
        assert recording.messages == []
        with pytest.raises(DBAPIError, match="read-only"), connection.begin():
            connection.execute(sa.text("DELETE FROM author"))
        connection.execute(insert("outside"))
        assert onlooker.names() == ["outside"]

    def test_others_work_as_ever(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execute(sa.text("CREATE SCHEMA tenant"))
        connection.execution_options(schema_translate_map={None: "tenant"})
        NoteBase.metadata.create_all(connection)
        notes = NoteBase.metadata.tables["note"]
        with connection.begin():
            connection.execute(sa.insert(notes).values(text="one"))
        assert onlooker.scalar("SELECT text FROM tenant.note") == "one"

    def test_its_level_can_be_asked_for(self, connection: OptInConnection) -> None:
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert connection.default_isolation_level == "READ COMMITTED"
        connection.execution_options(isolation_level="SERIALIZABLE")
        with connection.begin():
            assert connection.get_isolation_level() == "SERIALIZABLE"


class TestStreaming:
    ROWS = sa.text("SELECT n FROM generate_series(1, 1000) n")
    CURSORS = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")

    @pytest.mark.parametrize("option", [{"yield_per": 100}, {"stream_results": True}])
    @pytest.mark.parametrize("on", ["statement", "call", "connection", "engine"])
    def test_outside_opens_no_transaction(
        self, engine: OptInEngine, wire: WireProxy, on: str, option: dict[str, Any]
    ) -> None:
        options = {**option, "max_row_buffer": 100}
        if on == "engine":
            engine.update_execution_options(**options)
        with engine.connect() as connection, wire.record() as recording:
            if on == "connection":
                connection.execution_options(**options)
            rows = connection.execute(
                self.ROWS.execution_options(**options) if on == "statement" else self.ROWS,
                execution_options=options if on == "call" else None,
            )
            seen = 0
            for _ in rows:
                seen += 1
                if seen % 300 == 0:
                    assert wire.transactions_open == 0
            assert seen == 1000
        assert "WITH HOLD" in recording.statements[0]
        assert not {"BEGIN", "COMMIT", "ROLLBACK"} & set(sent(recording))
        assert recording.idle_in_transaction == 0

    def test_leaves_nothing_when_the_connection_is_closed_half_way(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        with engine.connect() as connection:
            pid = backend_pid(connection)
            stream = connection.execute(self.ROWS, execution_options={"yield_per": 10})
            stream.fetchone()
            other = connection.execute(self.ROWS, execution_options={"yield_per": 10})
        with pytest.raises(ResourceClosedError):
            stream.fetchall()
        with pytest.raises(ResourceClosedError):
            other.fetchall()
        with engine.connect() as connection:
            assert backend_pid(connection) == pid
            assert connection.scalar(self.CURSORS) == 0

    def test_goes_on_through_transactions_errors_and_give_back(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        stream = connection.execute(self.ROWS, execution_options={"yield_per": 100})
        seen = [n for (n,) in stream.fetchmany(50)]
        with connection.begin():
            connection.execute(insert("one"))
            seen += [n for (n,) in stream.fetchmany(100)]
        with pytest.raises(IntegrityError), connection.begin():
            connection.execute(insert("Ada"))
        connection.give_back()
        with pytest.raises(ProgrammingError):
            connection.execute(sa.text("SELECT nothing FROM nowhere"))
        seen += [n for (n,) in stream]
        assert seen == list(range(1, 1001))
        assert connection.scalar(self.CURSORS) == 0
        assert onlooker.names() == ["one"]

    def test_with_a_streaming_connection_other_statements_work(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        connection.execution_options(stream_results=True)
        client_side = {"stream_results": False}
        connection.execute(insert("one"), execution_options=client_side)
        connection.exec_driver_sql(
            "INSERT INTO author (name) VALUES ('two')", execution_options=client_side
        )
        assert connection.scalar(sa.select(sa.func.count()).select_from(authors)) == 5
        assert onlooker.names() == ["one", "two"]

    def test_an_error_of_the_statement_is_that_error(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        stream = {"stream_results": True}
        with pytest.raises(DBAPIError, match="nowhere"):
            connection.execute(sa.text("SELECT * FROM nowhere"), execution_options=stream)
        assert connection.scalar(ONE) == 1
        assert_rests(connection.connection.dbapi_connection)

    def test_of_an_empty_result(self, connection: OptInConnection) -> None:
        stream = {"stream_results": True}
        assert (
            connection.execute(sa.text("SELECT 1 WHERE false"), execution_options=stream).all()
            == []
        )
        assert connection.scalar(self.CURSORS) == 0

    def test_leaves_the_drivers_own_cursors_as_they_are(self, connection: OptInConnection) -> None:
        dbapi: Any = connection.connection.dbapi_connection
        before = (
            getattr(dbapi, "cursor_factory", None),
            getattr(dbapi, "server_cursor_factory", None),
        )
        connection.execute(self.ROWS, execution_options={"yield_per": 10}).all()
        with pytest.raises(DBAPIError):
            connection.execute(sa.text("SELECT 1/0"), execution_options={"yield_per": 10}).all()
        after = (
            getattr(dbapi, "cursor_factory", None),
            getattr(dbapi, "server_cursor_factory", None),
        )
        assert after == before


class TestTwoPhases:
    def test_commit(self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker) -> None:
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

    def test_roll_back(
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

    def test_fail_to_prepare(self, connection: OptInConnection, onlooker: Onlooker) -> None:
        transaction = connection.begin_twophase()
        connection.exec_driver_sql("INSERT INTO seat (place) VALUES (1), (1)")
        with pytest.raises(IntegrityError):
            transaction.prepare()
        with suppress(ProgrammingError):
            transaction.rollback()  # with psycopg it is an error, as with SQLAlchemy alone
        assert connection.scalar(ONE) == 1
        assert_rests(connection.connection.dbapi_connection)
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0

    def test_whose_commit_fails_do_no_harm_to_the_next(
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

    def test_are_recovered_from_another_connection(
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


class TestTheConnectionItself:
    def test_invalidated_in_a_transaction(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        transaction = connection.begin()
        connection.execute(insert("gone"))
        connection.invalidate()
        with pytest.raises(PendingRollbackError):
            connection.execute(ONE)
        transaction.rollback()
        assert connection.scalar(ONE) == 1
        with connection.begin():
            connection.execute(insert("after"))
        assert onlooker.names() == ["after"]

    def test_detached(self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker) -> None:
        with engine.connect() as connection:
            connection.execute(ONE)
            connection.detach()
            with wire.record() as recording:
                connection.execute(ONE)
                with connection.begin():
                    connection.execute(insert("one"))
                for row in connection.execute(
                    sa.select(authors.c.id), execution_options={"yield_per": 1}
                ):
                    assert row
            assert sent(recording)[:4] == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["one"]

    def test_killed_outside_and_inside(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        onlooker.kill(backend_pid(connection))
        assert connection.scalar(ONE) == 1
        with pytest.raises(OperationalError), connection.begin():
            connection.execute(insert("gone"))
            onlooker.kill(backend_pid(connection))
            connection.execute(ONE)
        assert connection.scalar(ONE) == 1
        with pytest.raises(OperationalError), connection.begin():
            connection.execute(insert("gone"))
            onlooker.kill(backend_pid(connection))
        with connection.begin():
            connection.execute(insert("after"))
        assert onlooker.names() == ["after"]

    def test_given_back_by_hand_takes_another_at_its_next_use(
        self, engine: OptInEngine, connection: OptInConnection, wire: WireProxy
    ) -> None:
        unread = connection.execute(sa.select(authors.c.name).order_by(authors.c.id))
        with wire.record() as recording:
            connection.give_back()
        assert recording.messages == []
        assert checked_out(engine) == 0
        assert not connection.closed
        assert unread.scalars().all() == ["Ada", "Bob", "Cid"]
        connection.execution_options(isolation_level="SERIALIZABLE")
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"
            connection.give_back()
            assert checked_out(engine) == 1
            assert connection.scalar(LEVEL) == "serializable"
        connection.give_back()
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"

    def test_is_not_given_back_by_itself(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with engine.connect() as connection:
                connection.execute(sa.text("CREATE TEMPORARY TABLE mine (id int)"))
                assert checked_out(engine) == 1
                assert connection.scalar(sa.text("SELECT count(*) FROM mine")) == 0


@pytest.mark.parametrize("of", ["connection", "session"])
def test_a_stream_whose_declare_fails_sends_nothing_more_and_logs_nothing(
    engine: OptInEngine, wire: WireProxy, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    statement = sa.text("SELECT 1 / (id - 2) FROM author").execution_options(yield_per=1)
    with OptInSession(engine) if of == "session" else engine.connect() as user:
        assert user.scalar(ONE) == 1
        with wire.record() as recording:
            with pytest.raises(DBAPIError, match="division"):
                user.execute(statement)
            assert user.scalar(ONE) == 1
            user.close()
        assert sent(recording) == ["DECLARE", "SELECT"]
    assert caplog.records == []


def test_a_stream_whose_declare_fails_beside_another_stream(
    engine: OptInEngine, wire: WireProxy
) -> None:
    fails = sa.text("SELECT 1 / (id - 2) FROM author").execution_options(yield_per=1)
    with engine.connect() as connection:
        stream = connection.execute(sa.select(authors.c.id).execution_options(yield_per=1))
        assert stream.fetchone() is not None
        with pytest.raises(DBAPIError, match="division"):
            connection.execute(fails)
        assert len(stream.all()) == 2
