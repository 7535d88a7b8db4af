"""A connection comes back to its pool with the flags it started with, whatever was done to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ProgrammingError

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.library import (
    LEVEL,
    READ_ONLY,
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
    def engine(self, library: None, wire_url: str, flags: dict[str, Any]) -> Iterator[OptInEngine]:
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

    def test_flags_that_the_user_sets_on_connect_survive_transactions(
        self, engine: OptInEngine, flags: dict[str, Any]
    ) -> None:
        with OptInSession(engine) as session:
            dbapi: Any = session.connection().connection.dbapi_connection
            before = flags_of(dbapi)
            for _ in range(3):
                self.assert_in_force(session, flags)
                assert_rests(dbapi, before)
            session.give_back()
            self.assert_in_force(session, flags)

    def test_flags_that_the_user_sets_survive_transactions_with_options_of_their_own(
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

    def test_flags_that_the_user_sets_on_connect_survive_an_error_and_a_kill(
        self, engine: OptInEngine, onlooker: Onlooker, flags: dict[str, Any]
    ) -> None:
        with OptInSession(engine) as session:
            with pytest.raises(ProgrammingError), session.begin(isolation_level="SERIALIZABLE"):
                session.execute(sa.text("SELECT nothing FROM nowhere"))
            self.assert_in_force(session, flags)
            onlooker.kill(backend_pid(session.connection()))
            session.execute(sa.text("SELECT 1"))
            self.assert_in_force(session, flags)

    def test_flags_that_the_user_sets_survive_mischief_on_a_raw_connection(
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
