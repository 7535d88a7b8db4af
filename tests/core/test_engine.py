"""An engine takes its options, is copied with others, fires its events, and works with SQLite."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from fictive_sqlalchemy import (
    OptInConnection,
    OptInEngine,
    OptInSession,
    create_engine,
    engine_from_config,
)
from tests.library import (
    LEVEL,
    READ_ONLY,
    Author,
    Base,
    Note,
    NoteBase,
    Onlooker,
    assert_at_rest,
    authors,
    opened,
    sent,
)
from tests.wire import WireProxy


class TestCreateEngine:
    def test_create_engine_sends_nothing(self, wire_url: str, wire: WireProxy) -> None:
        with wire.record() as recording:
            create_engine(wire_url, isolation_level="SERIALIZABLE").dispose()
        assert recording.messages == []

    def test_create_engine_works_while_the_server_is_down(self, driver: str) -> None:
        engine = create_engine(f"postgresql+{driver}://postgres@127.0.0.1:1/none")
        with OptInSession(engine) as session:
            for _ in range(2):
                with pytest.raises(OperationalError):
                    session.execute(sa.text("SELECT 1"))
                with pytest.raises(OperationalError), session.begin():
                    session.execute(sa.text("SELECT 1"))
                assert not session.in_transaction()
            session.add(Author(name="new"))
            with pytest.raises(OperationalError):
                session.flush()
        with pytest.raises(OperationalError), engine.begin():
            pass
        engine.dispose()

    def test_create_engine_takes_the_level_of_its_transactions(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with opened(wire_url, isolation_level="REPEATABLE READ") as engine:
            with OptInSession(engine) as session, wire.record() as recording:
                assert session.scalar(LEVEL) == "read committed"
                with session.begin():
                    assert session.scalar(LEVEL) == "repeatable read"
                with session.begin(isolation_level="SERIALIZABLE"):
                    assert session.scalar(LEVEL) == "serializable"
                with session.begin():
                    assert session.scalar(LEVEL) == "repeatable read"
                assert session.scalar(LEVEL) == "read committed"
        assert recording.statements.count("BEGIN ISOLATION LEVEL REPEATABLE READ") == 2
        assert set(sent(recording)) == {"SHOW", "BEGIN", "COMMIT"}

    def test_create_engine_takes_a_level_among_the_execution_options(self, wire_url: str) -> None:
        options = {"isolation_level": "SERIALIZABLE", "postgresql_readonly": True}
        with opened(wire_url, execution_options=options) as engine:
            with engine.connect() as connection:
                assert connection.scalar(READ_ONLY) == "off"
                with connection.begin():
                    assert connection.scalar(LEVEL) == "serializable"
                    assert connection.scalar(READ_ONLY) == "on"
            with OptInSession(engine) as session:
                with session.begin(read_only=False):
                    session.add(Author(name="new"))
                with session.begin(deferrable=True):
                    assert session.scalar(sa.text("SHOW transaction_deferrable")) == "on"

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": "SNAPSHOT"},
            {"isolation_level": "AUTOCOMMIT"},
            {"execution_options": {"isolation_level": "SNAPSHOT"}},
            {"execution_options": {"postgresql_readonly": "yes"}},
            {"execution_options": {"postgresql_deferrable": True}},
            {"server_side_cursors": True},
        ],
    )
    def test_create_engine_refuses_what_makes_no_sense(
        self, url: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ArgumentError):
            create_engine(url, **options)

    def test_create_engine_refuses_a_dialect_that_can_not_rest_in_autocommit(self) -> None:
        registry.register("plain", __name__, "PlainDialect")
        with pytest.raises(ArgumentError, match="AUTOCOMMIT"):
            create_engine("plain://")

    def test_engine_from_config_reads_a_configuration_of_strings(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        engine = engine_from_config(
            {
                "db.url": wire_url,
                "db.pool_size": "1",
                "db.max_overflow": "0",
                "db.echo": "false",
                "db.isolation_level": "SERIALIZABLE",
                "other": "left alone",
            },
            prefix="db.",
            pool_timeout=1,
        )
        assert isinstance(engine, OptInEngine)
        assert isinstance(engine.pool, QueuePool)
        assert engine.pool.size() == 1
        engine.connect().close()
        with wire.record() as recording, engine.begin() as connection:
            assert connection.scalar(LEVEL) == "serializable"
        assert sent(recording) == ["BEGIN", "SHOW", "COMMIT"]
        engine.dispose()

    @pytest.mark.parametrize("reset", [None, "rollback", "commit", True, False])
    def test_a_return_to_the_pool_sends_nothing_with_any_reset_on_return(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker, reset: Any
    ) -> None:
        with opened(wire_url, pool_reset_on_return=reset) as engine:
            with wire.record() as recording:
                with engine.connect() as connection:
                    connection.scalar(sa.text("SELECT 1"))
                with OptInSession(engine) as session, session.begin():
                    session.scalar(sa.text("SELECT 1"))
            assert sent(recording) == ["SELECT", "BEGIN", "SELECT", "COMMIT"]
            raw = engine.raw_connection()
            assert raw.dbapi_connection is not None
            raw.dbapi_connection.autocommit = False
            raw.cursor().execute("INSERT INTO author (name) VALUES ('left behind')")
            raw.close()
        assert onlooker.names() == ([] if reset != "commit" else onlooker.names())

    def test_create_engine_takes_a_pool_and_a_creator(self, wire_url: str, wire: WireProxy) -> None:
        stock = sa.create_engine(wire_url)

        def create() -> Any:
            connection = stock.raw_connection()
            connection.detach()
            return connection.dbapi_connection

        for options in ({"creator": create}, {"pool": QueuePool(create, pool_size=1)}):
            engine = create_engine(wire_url, **options)
            engine.connect().close()
            with OptInSession(engine) as session, wire.record() as recording:
                session.scalar(sa.text("SELECT 1"))
                with session.begin():
                    session.scalar(sa.text("SELECT 1"))
            assert sent(recording) == ["SELECT", "BEGIN", "SELECT", "COMMIT"]
            assert_at_rest(engine)
            engine.dispose()
        stock.dispose()

    def test_tables_that_can_not_all_be_made_are_none(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        metadata = sa.MetaData()
        sa.Table("fine", metadata, sa.Column("id", sa.Integer))
        sa.Table("wrong", metadata, sa.Column("id", sa.Integer, server_default=sa.text("nothing")))
        with wire.record() as recording, pytest.raises(DBAPIError):
            metadata.create_all(engine)
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.scalar("SELECT to_regclass('fine')") is None

    def test_dropping_and_reflecting_work_as_ever(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            assert "author" in sa.inspect(engine).get_table_names()
        assert "BEGIN" not in sent(recording)
        found = sa.MetaData()
        found.reflect(engine)
        assert set(found.tables) == set(Base.metadata.tables)
        with wire.record() as recording:
            Base.metadata.drop_all(engine)
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert sa.inspect(engine).get_table_names() == []


class PlainDialect(SQLiteDialect_pysqlite):
    """A dialect that offers no isolation levels."""

    supports_statement_cache = True

    def get_isolation_level_values(self, dbapi_connection: Any) -> Any:
        raise NotImplementedError


class TestACopyWithOptions:
    def test_a_copy_with_options_shares_the_pool_and_rests_in_autocommit(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        copy = engine.execution_options(isolation_level="SERIALIZABLE")
        assert isinstance(copy, OptInEngine)
        assert copy.pool is engine.pool
        with wire.record() as recording:
            with copy.connect() as connection:
                assert isinstance(connection, OptInConnection)
                assert connection.scalar(LEVEL) == "read committed"
                with connection.begin():
                    assert connection.scalar(LEVEL) == "serializable"
            with engine.begin() as connection:
                assert connection.scalar(LEVEL) == "read committed"
            with OptInSession(copy) as session:
                session.scalar(LEVEL)
                with session.begin():
                    assert session.scalar(LEVEL) == "serializable"
        assert [verb for verb in sent(recording) if verb != "SHOW"] == ["BEGIN", "COMMIT"] * 3

    def test_a_copy_of_a_copy_keeps_what_it_does_not_change(self, engine: OptInEngine) -> None:
        copy = engine.execution_options(isolation_level="SERIALIZABLE", logging_token="one")
        copy = copy.execution_options(postgresql_readonly=True)
        assert copy.get_execution_options()["logging_token"] == "one"
        with copy.begin() as connection:
            assert connection.scalar(LEVEL) == "serializable"
            assert connection.scalar(READ_ONLY) == "on"
        copy.update_execution_options(postgresql_readonly=False)
        with copy.begin() as connection:
            assert connection.scalar(LEVEL) == "serializable"
            assert connection.scalar(READ_ONLY) == "off"
        with engine.begin() as connection:
            assert connection.scalar(LEVEL) == "read committed"
        with pytest.raises(ArgumentError):
            engine.execution_options(isolation_level="SNAPSHOT")
        with pytest.raises(ArgumentError):
            engine.update_execution_options(isolation_level="SNAPSHOT")

    def test_a_copy_with_other_schemas_reads_writes_and_begins_there(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE SCHEMA tenant"))
        copy = engine.execution_options(schema_translate_map={None: "tenant"})
        NoteBase.metadata.create_all(copy)
        with OptInSession(copy) as session, wire.record() as recording:
            session.add(Note(text="one"))  # one statement, which needs no BEGIN
            session.flush()
            assert session.scalars(sa.select(Note.text)).all() == ["one"]
            session.execute(sa.insert(Note), [{"text": "two"}, {"text": "three"}])
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.execute(sa.delete(Note))
                raise ValueError("mine")
        assert [verb for verb in sent(recording) if verb in ("BEGIN", "COMMIT", "ROLLBACK")] == [
            *("BEGIN", "COMMIT", "BEGIN", "ROLLBACK"),
        ]
        assert onlooker.scalar("SELECT count(*) FROM tenant.note") == 3

    def test_a_copy_in_autocommit_by_name_begins_nothing_as_with_sqlalchemy(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        copy = engine.execution_options(isolation_level="AUTOCOMMIT")
        with wire.record() as recording, copy.begin() as connection:
            connection.execute(sa.text("VACUUM author"))
        assert sent(recording) == ["VACUUM"]
        with wire.record() as recording, engine.begin() as connection:
            connection.execute(sa.text("SELECT 1"))
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]

    def test_a_copy_in_autocommit_by_name_can_be_told_a_level_again(
        self, engine: OptInEngine
    ) -> None:
        copy = engine.execution_options(isolation_level="AUTOCOMMIT")
        with copy.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
            assert connection.scalar(LEVEL) == "serializable"
        with OptInSession(copy) as session:
            with session.begin(isolation_level="SERIALIZABLE"):
                assert session.scalar(LEVEL) == "serializable"

    def test_an_engine_and_its_copy_in_one_session_are_two_binds(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        copy = engine.execution_options(logging_token="copy")
        NoteBase.metadata.create_all(engine)
        binds: dict[Any, Any] = {Author: engine, Note: copy}
        with OptInSession(binds=binds) as session, wire.record() as recording, session.begin():
            session.add_all([Author(name="new"), Note(text="new")])
        assert sent(recording).count("BEGIN") == sent(recording).count("COMMIT") == 2
        assert onlooker.names() == ["new"]


class TestEvents:
    def test_events_of_the_class_and_of_the_engine_come_as_ever(self, engine: OptInEngine) -> None:
        seen: list[str] = []

        def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            seen.append(statement)

        event.listen(sa.Engine, "before_cursor_execute", note)
        event.listen(engine, "before_cursor_execute", note)
        copy = engine.execution_options(logging_token="copy")
        try:
            with copy.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
            assert seen == ["SELECT 1", "SELECT 1"]
        finally:
            event.remove(sa.Engine, "before_cursor_execute", note)
            event.remove(engine, "before_cursor_execute", note)

    def test_events_of_transactions_come_for_transactions_only(self, engine: OptInEngine) -> None:
        seen: list[str] = []
        for name in ("begin", "commit", "rollback", "savepoint", "release_savepoint"):
            event.listen(engine, name, lambda *_, name=name: seen.append(name))
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            with pytest.raises(ProgrammingError):
                connection.execute(sa.text("SELECT nothing FROM nowhere"))
            connection.commit()
            connection.rollback()
            assert seen == []
            with connection.begin(), connection.begin_nested():
                connection.execute(sa.text("SELECT 1"))
        assert seen == ["begin", "savepoint", "release_savepoint", "commit"]

    def test_a_listener_to_engine_connect_may_run_statements_and_transactions(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        seen: list[Any] = []

        @event.listens_for(engine, "engine_connect")
        def use(connection: OptInConnection) -> None:
            seen.append(connection.scalar(sa.text("SELECT 1")))
            with connection.begin():
                seen.append(connection.scalar(sa.text("SELECT 2")))

        with OptInSession(engine) as session:
            with wire.record() as recording:
                session.get(Author, 1)
            assert sent(recording) == ["SELECT", "BEGIN", "SELECT", "COMMIT", "SELECT"]
            with session.begin():
                session.get(Author, 2)
        assert seen == [1, 2]

    @pytest.mark.parametrize("spare", [True, False])
    @pytest.mark.parametrize("of", ["engine", "session"])
    def test_a_listener_to_begin_may_run_statements_in_the_transaction(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker, of: str, spare: bool
    ) -> None:
        """As for a timeout, or for row level security."""
        options = {} if spare else {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
        with opened(wire_url, **options) as engine, OptInSession(engine) as session:

            def limit(*arguments: Any) -> None:
                connection: OptInConnection = arguments[-1]
                connection.exec_driver_sql("SET LOCAL statement_timeout = 5000")
                connection.execute(sa.select(authors).with_for_update())

            if of == "engine":
                event.listen(engine, "begin", limit)
            else:
                event.listen(session, "after_begin", limit)
            session.get(Author, 1)
            with wire.record() as recording:
                with pytest.raises(ValueError, match="mine"), session.begin():
                    session.execute(sa.insert(Author).values(name="gone"))
                    raise ValueError("mine")
            assert sent(recording) == ["BEGIN", "SET", "SELECT", "INSERT", "ROLLBACK"]
            with wire.record() as recording:
                session.add(Author(name="flushed"))
                session.flush()
            assert sent(recording) == ["BEGIN", "SET", "SELECT", "INSERT", "COMMIT"]
            with wire.record() as recording:
                session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])
            assert sent(recording)[:4] == ["BEGIN", "SET", "SELECT", "INSERT"]
            session.close()
            with wire.record() as recording, engine.begin() as connection:
                connection.execute(sa.text("SELECT 1"))
            expected = ["BEGIN", "SET", "SELECT"] if of == "engine" else ["BEGIN"]
            assert sent(recording) == [*expected, "SELECT", "COMMIT"]
        assert onlooker.names() == ["flushed", "one", "two"]

    def test_a_listener_to_connect_may_run_statements(self, wire_url: str, wire: WireProxy) -> None:
        engine = create_engine(wire_url)

        @event.listens_for(engine, "connect")
        def set_time_zone(dbapi: Any, record: Any) -> None:
            cursor = dbapi.cursor()
            cursor.execute("SET timezone = 'Pacific/Easter'")
            cursor.close()
            dbapi.commit()

        with OptInSession(engine) as session:
            assert session.scalar(sa.text("SHOW timezone")) == "Pacific/Easter"
            with pytest.raises(ValueError, match="mine"), session.begin():
                assert session.scalar(sa.text("SHOW timezone")) == "Pacific/Easter"
                raise ValueError("mine")
            assert session.scalar(sa.text("SHOW timezone")) == "Pacific/Easter"
        assert_at_rest(engine)
        engine.dispose()

    def test_autocommit_is_put_back_if_a_listener_to_connect_leaves_it(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        engine = create_engine(wire_url)

        @event.listens_for(engine, "connect")
        def leave_autocommit(dbapi: Any, record: Any) -> None:
            dbapi.autocommit = False

        with engine.connect() as connection:
            with wire.record() as recording:
                connection.execute(sa.text("SELECT 1"))
            assert sent(recording) == ["SELECT"]
        assert_at_rest(engine)
        engine.dispose()


class TestSQLite:
    """A backend without a server, whose dialect offers AUTOCOMMIT."""

    @pytest.fixture
    def sqlite(self, tmp_path: Any) -> Iterator[OptInEngine]:
        engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
        NoteBase.metadata.create_all(engine)
        yield engine
        engine.dispose()

    @pytest.fixture
    def session(self, sqlite: OptInEngine) -> Iterator[OptInSession]:
        with sessionmaker(sqlite, class_=OptInSession)() as session:
            yield session

    @staticmethod
    def notes(engine: sa.Engine) -> list[str]:
        other = sa.create_engine(engine.url, poolclass=NullPool)
        with other.connect() as connection:
            return list(connection.scalars(sa.select(Note.text).order_by(Note.text)))

    def test_sqlite_rests_in_autocommit(self, sqlite: OptInEngine, session: OptInSession) -> None:
        session.execute(sa.insert(Note).values(text="done"))
        assert self.notes(sqlite) == ["done"]
        assert not session.in_transaction()
        raw: Any = session.connection().connection.dbapi_connection
        assert raw.isolation_level is None
        assert not raw.in_transaction

    def test_sqlite_has_real_transactions(self, sqlite: OptInEngine, session: OptInSession) -> None:
        with pytest.raises(IntegrityError), session.begin():
            session.add(Note(text="one"))
            session.flush()
            session.execute(sa.text("CREATE TABLE half (id int)"))
            with session.begin_nested():
                session.add(Note(text="nested"))
            assert self.notes(sqlite) == []
            session.add(Note(text="one"))
        assert self.notes(sqlite) == []
        assert sa.inspect(sqlite).get_table_names() == ["note"]
        with session.begin():
            session.add(Note(text="two"))
        assert self.notes(sqlite) == ["two"]
        raw: Any = session.connection().connection.dbapi_connection
        assert not raw.in_transaction

    def test_writes_of_one_call_to_sqlite_are_all_or_nothing(
        self, sqlite: OptInEngine, session: OptInSession
    ) -> None:
        rows = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
        for statement in (sa.insert(Note), sa.insert(NoteBase.metadata.tables["note"])):
            with pytest.raises(IntegrityError):
                session.execute(statement, rows)
        session.add_all([Note(**row) for row in rows])
        with pytest.raises(IntegrityError):
            session.flush()
        assert self.notes(sqlite) == []
        session.add_all([Note(**row) for row in rows[:2]])
        session.flush()
        assert self.notes(sqlite) == ["a", "b"]

    def test_reads_of_sqlite_never_write(self, sqlite: OptInEngine, session: OptInSession) -> None:
        session.add(Note(text="pending"))
        assert session.scalars(sa.select(Note)).all() == []
        assert self.notes(sqlite) == []
        session.rollback()
        assert list(session.new) == []

    def test_sqlite_in_memory_has_real_transactions(self) -> None:
        for options in ({}, {"poolclass": StaticPool}):
            engine = create_engine("sqlite://", **options)
            NoteBase.metadata.create_all(engine)
            with OptInSession(engine) as session:
                with pytest.raises(ValueError, match="mine"), session.begin():
                    session.add(Note(text="gone"))
                    session.flush()
                    raise ValueError("mine")
                session.execute(sa.insert(Note).values(text="done"))
                assert session.scalars(sa.select(Note.text)).all() == ["done"]
            with engine.begin() as connection:
                assert connection.scalar(sa.select(Note.text)) == "done"
            engine.dispose()

    def test_sqlite_refuses_what_only_postgresql_has(self, session: OptInSession) -> None:
        with pytest.raises(ArgumentError):
            session.begin(read_only=True)
        with pytest.raises(ArgumentError):
            session.begin(isolation_level="REPEATABLE READ")
        with session.begin(isolation_level="READ UNCOMMITTED"):
            assert session.scalar(sa.text("PRAGMA read_uncommitted")) == 1
        with session.begin():
            assert session.scalar(sa.text("PRAGMA read_uncommitted")) == 0


def test_a_stock_session_on_our_engine_is_a_stock_session_that_does_not_begin(
    engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
) -> None:
    """It asks for a transaction with each first statement, so it gets one."""
    with Session(engine) as session, wire.record() as recording:
        session.add(Author(name="new"))
        session.flush()
        assert onlooker.names() == []
        session.commit()
    assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
    assert onlooker.names() == ["new"]
