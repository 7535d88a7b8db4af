"""The engine: its options, its copies, and what comes back to its pool."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
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
    assert_rests,
    authors,
    backend_pid,
    fill,
    flags_of,
    opened,
    sent,
    set_flags,
)
from tests.wire import WireProxy


class TestCreateEngine:
    def test_sends_nothing(self, wire_url: str, wire: WireProxy) -> None:
        with wire.record() as recording:
            create_engine(wire_url, isolation_level="SERIALIZABLE").dispose()
        assert recording.messages == []

    def test_works_while_the_server_is_down_and_the_first_statement_says_so(
        self, driver: str
    ) -> None:
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

    def test_takes_the_level_of_its_transactions(self, wire_url: str, wire: WireProxy) -> None:
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

    def test_takes_it_among_the_execution_options_too(self, wire_url: str) -> None:
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
    def test_refuses_what_makes_no_sense(self, url: str, options: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError):
            create_engine(url, **options)

    def test_refuses_a_dialect_that_can_not_rest_in_autocommit(self) -> None:
        registry.register("plain", __name__, "PlainDialect")
        with pytest.raises(ArgumentError, match="AUTOCOMMIT"):
            create_engine("plain://")

    def test_reads_a_configuration_of_strings(self, wire_url: str, wire: WireProxy) -> None:
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
    def test_with_any_reset_on_return_a_return_sends_nothing(
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

    def test_takes_a_pool_and_a_creator(self, wire_url: str, wire: WireProxy) -> None:
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
    def test_shares_the_pool_and_rests_in_autocommit(
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

    def test_of_a_copy_keeps_what_it_does_not_change(self, engine: OptInEngine) -> None:
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

    def test_with_other_schemas_reads_writes_and_begins_there(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE SCHEMA tenant"))
        copy = engine.execution_options(schema_translate_map={None: "tenant"})
        NoteBase.metadata.create_all(copy)
        with OptInSession(copy) as session, wire.record() as recording:
            session.add(Note(text="one"))
            session.flush()
            assert session.scalars(sa.select(Note.text)).all() == ["one"]
            session.execute(sa.insert(Note), [{"text": "two"}, {"text": "three"}])
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.execute(sa.delete(Note))
                raise ValueError("mine")
        assert [verb for verb in sent(recording) if verb in ("BEGIN", "COMMIT", "ROLLBACK")] == [
            *("BEGIN", "COMMIT", "BEGIN", "COMMIT", "BEGIN", "ROLLBACK"),
        ]
        assert onlooker.scalar("SELECT count(*) FROM tenant.note") == 3

    def test_in_autocommit_by_name_begins_nothing_as_with_sqlalchemy(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        copy = engine.execution_options(isolation_level="AUTOCOMMIT")
        with wire.record() as recording, copy.begin() as connection:
            connection.execute(sa.text("VACUUM author"))
        assert sent(recording) == ["VACUUM"]
        with wire.record() as recording, engine.begin() as connection:
            connection.execute(sa.text("SELECT 1"))
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]

    def test_in_autocommit_by_name_can_be_told_a_level_again(self, engine: OptInEngine) -> None:
        copy = engine.execution_options(isolation_level="AUTOCOMMIT")
        with copy.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
            assert connection.scalar(LEVEL) == "serializable"
        with OptInSession(copy) as session:
            with session.begin(isolation_level="SERIALIZABLE"):
                assert session.scalar(LEVEL) == "serializable"

    def test_both_in_one_session_are_two_binds(
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
    def test_of_the_class_and_of_the_engine_come_as_ever(self, engine: OptInEngine) -> None:
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

    def test_of_transactions_come_for_transactions_only(self, engine: OptInEngine) -> None:
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

    def test_engine_connect_may_run_statements_and_transactions(
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
    def test_begin_may_run_statements_in_the_transaction(
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

    def test_connect_may_run_statements(self, wire_url: str, wire: WireProxy) -> None:
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

    def test_connect_may_leave_autocommit_and_it_is_put_back(
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


FLAGS: list[dict[str, Any]] = [
    {"isolation_level": "SERIALIZABLE"},
    {"read_only": True},
    {"isolation_level": "REPEATABLE READ", "read_only": True},
    {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
]


@pytest.mark.parametrize("flags", FLAGS)
class TestFlagsThatTheUserSetsOnConnect:
    """They are the user's: whatever transactions do, they are there afterwards."""

    @pytest.fixture
    def engine(self, wire_url: str, flags: dict[str, Any]) -> Iterator[OptInEngine]:
        fill(wire_url)
        engine = create_engine(wire_url)

        @event.listens_for(engine, "connect")
        def set_them(dbapi: Any, record: Any) -> None:
            set_flags(dbapi, **flags)

        yield engine
        expected = self.expected(engine)
        assert expected != (None, None, None)
        assert_at_rest(engine, expected)
        engine.dispose()

    @staticmethod
    def expected(engine: OptInEngine) -> tuple[Any, Any, Any]:
        pool = engine.pool.recreate()
        fresh = pool.connect()
        flags = flags_of(fresh.dbapi_connection)
        fresh.close()
        pool.dispose()
        return flags

    @staticmethod
    def assert_in_force(session: OptInSession, flags: dict[str, Any]) -> None:
        level = flags.get("isolation_level", "READ COMMITTED").lower()
        read_only = "on" if flags.get("read_only") else "off"
        with session.begin():
            assert session.scalar(LEVEL) == level
            assert session.scalar(READ_ONLY) == read_only

    def test_survive_transactions(self, engine: OptInEngine, flags: dict[str, Any]) -> None:
        with OptInSession(engine) as session:
            dbapi: Any = session.connection().connection.dbapi_connection
            before = flags_of(dbapi)
            for _ in range(3):
                self.assert_in_force(session, flags)
                assert_rests(dbapi, before)
            session.give_back()
            self.assert_in_force(session, flags)

    def test_survive_transactions_with_options_of_their_own(
        self, engine: OptInEngine, flags: dict[str, Any]
    ) -> None:
        with OptInSession(engine) as session:
            dbapi: Any = session.connection().connection.dbapi_connection
            before = flags_of(dbapi)
            choices: list[dict[str, Any]] = [
                {"isolation_level": "READ COMMITTED"},
                {"read_only": False},
                {"read_only": True},
                {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
            ]
            for options in choices:
                with session.begin(**options):
                    if "isolation_level" in options:
                        assert session.scalar(LEVEL) == str(options["isolation_level"]).lower()
                    if "read_only" in options:
                        read_only = "on" if options["read_only"] else "off"
                        assert session.scalar(READ_ONLY) == read_only
                assert_rests(dbapi, before)
                self.assert_in_force(session, flags)

    def test_survive_an_error_and_a_kill(
        self, engine: OptInEngine, onlooker: Onlooker, flags: dict[str, Any]
    ) -> None:
        with OptInSession(engine) as session:
            with pytest.raises(ProgrammingError), session.begin(isolation_level="SERIALIZABLE"):
                session.execute(sa.text("SELECT nothing FROM nowhere"))
            self.assert_in_force(session, flags)
            onlooker.kill(backend_pid(session.connection()))
            session.execute(sa.text("SELECT 1"))
            self.assert_in_force(session, flags)

    def test_survive_mischief_on_a_raw_connection(
        self, engine: OptInEngine, flags: dict[str, Any]
    ) -> None:
        raw = engine.raw_connection()
        dbapi: Any = raw.dbapi_connection
        before = flags_of(dbapi)
        dbapi.autocommit = False
        set_flags(dbapi, "READ COMMITTED", False, False)
        raw.cursor().execute("SELECT 1")
        raw.close()
        raw = engine.raw_connection()
        assert raw.dbapi_connection is dbapi
        assert_rests(dbapi, before)
        raw.close()
        with OptInSession(engine) as session:
            self.assert_in_force(session, flags)


class Interruption(BaseException):
    pass


def leave_in_a_transaction(dbapi: Any) -> None:
    dbapi.autocommit = False
    dbapi.cursor().execute("INSERT INTO author (name) VALUES ('left behind')")


def leave_a_begin_typed_by_hand(dbapi: Any) -> None:
    dbapi.cursor().execute("BEGIN")
    dbapi.cursor().execute("INSERT INTO author (name) VALUES ('left behind')")


def leave_in_error(dbapi: Any) -> None:
    dbapi.autocommit = False
    with pytest.raises(Exception, match="nowhere"):
        dbapi.cursor().execute("SELECT nothing FROM nowhere")


def leave_a_begin_typed_by_hand_in_error(dbapi: Any) -> None:
    dbapi.cursor().execute("BEGIN")
    with pytest.raises(Exception, match="nowhere"):
        dbapi.cursor().execute("SELECT nothing FROM nowhere")


def leave_out_of_autocommit(dbapi: Any) -> None:
    dbapi.autocommit = False


def leave_flags(dbapi: Any) -> None:
    set_flags(dbapi, "SERIALIZABLE", True, True)


def leave_read_only(dbapi: Any) -> None:
    set_flags(dbapi, read_only=True)


def leave_flags_out_of_autocommit(dbapi: Any) -> None:
    dbapi.autocommit = False
    set_flags(dbapi, "SERIALIZABLE", True, True)


def leave_flags_in_a_transaction(dbapi: Any) -> None:
    dbapi.autocommit = False
    set_flags(dbapi, "SERIALIZABLE", True, True)
    dbapi.cursor().execute("SELECT 1")


def leave_a_cursor(dbapi: Any) -> None:
    dbapi.autocommit = False
    cursor = dbapi.cursor("left_behind")
    cursor.execute("SELECT * FROM author")
    cursor.fetchone()


def leave_in_copy(dbapi: Any) -> None:
    if hasattr(dbapi, "pipeline"):
        dbapi.cursor().copy("COPY author (name) FROM STDIN").__enter__()
    else:

        class File:
            def read(self, size: int) -> str:
                raise Interruption

        with suppress(BaseException):
            dbapi.cursor().copy_expert("COPY author (name) FROM STDIN", File())


def leave_in_a_pipeline(dbapi: Any) -> None:
    if hasattr(dbapi, "pipeline"):
        dbapi.pipeline().__enter__()
        dbapi.execute("SELECT 1")


def leave_prepared(dbapi: Any) -> None:
    dbapi.autocommit = False
    dbapi.tpc_begin(dbapi.xid(1, "left behind", "branch"))
    dbapi.cursor().execute("INSERT INTO author (name) VALUES ('left behind')")


def leave_closed(dbapi: Any) -> None:
    dbapi.close()


MISCHIEF: dict[str, Callable[[Any], None]] = {
    mischief.__name__.replace("_", " "): mischief
    for mischief in (
        leave_in_a_transaction,
        leave_a_begin_typed_by_hand,
        leave_in_error,
        leave_a_begin_typed_by_hand_in_error,
        leave_out_of_autocommit,
        leave_flags,
        leave_read_only,
        leave_flags_out_of_autocommit,
        leave_flags_in_a_transaction,
        leave_a_cursor,
        leave_in_copy,
        leave_in_a_pipeline,
        leave_prepared,
        leave_closed,
    )
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a cursor
@pytest.mark.parametrize("mischief", MISCHIEF)
@pytest.mark.parametrize("through", ["raw connection", "connection", "session"])
def test_what_is_done_to_a_drivers_connection_is_undone_before_the_next_user(
    wire_url: str,
    wire: WireProxy,
    onlooker: Onlooker,
    caplog: pytest.LogCaptureFixture,
    mischief: str,
    through: str,
) -> None:
    with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        if through == "raw connection":
            raw = engine.raw_connection()
            MISCHIEF[mischief](raw.dbapi_connection)
            raw.close()
        elif through == "connection":
            with engine.connect() as connection:
                MISCHIEF[mischief](connection.connection.dbapi_connection)
        else:
            with OptInSession(engine) as session:
                connection = session.connection()
                MISCHIEF[mischief](connection.connection.dbapi_connection)
        assert_at_rest(engine)
        wire.quiesce()
        assert wire.transactions_open == 0
        engine.connect().close()
        with OptInSession(engine) as session:
            for _ in range(2):
                with wire.record() as recording:
                    assert session.scalar(sa.text("SELECT 1")) == 1
                assert sent(recording) == ["SELECT"]
                with session.begin():
                    assert session.scalar(LEVEL) == "read committed"
                    assert session.scalar(READ_ONLY) == "off"
            session.execute(sa.insert(authors).values(name="new"))
    assert onlooker.names() == ["new"]


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

    def test_rests_in_autocommit(self, sqlite: OptInEngine, session: OptInSession) -> None:
        session.execute(sa.insert(Note).values(text="done"))
        assert self.notes(sqlite) == ["done"]
        assert not session.in_transaction()
        raw: Any = session.connection().connection.dbapi_connection
        assert raw.isolation_level is None
        assert not raw.in_transaction

    def test_has_real_transactions(self, sqlite: OptInEngine, session: OptInSession) -> None:
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

    def test_writes_of_one_call_are_all_or_nothing(
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

    def test_reads_never_write(self, sqlite: OptInEngine, session: OptInSession) -> None:
        session.add(Note(text="pending"))
        assert session.scalars(sa.select(Note)).all() == []
        assert self.notes(sqlite) == []
        session.rollback()
        assert list(session.new) == []

    def test_in_memory_too(self) -> None:
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

    def test_refuses_what_only_postgresql_has(self, session: OptInSession) -> None:
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
