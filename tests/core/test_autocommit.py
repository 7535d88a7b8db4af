"""The way out of autocommit and back: what it costs, what it leaves, what interrupts it."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InvalidRequestError

import fictive_sqlalchemy
from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInEngine,
    OptInSession,
    create_engine,
)
from tests.library import (
    LEVEL,
    READ_ONLY,
    Author,
    Onlooker,
    assert_at_rest,
    assert_rests,
    authors,
    checked_out,
    flags_of,
    opened,
    sent,
    set_flags,
)
from tests.wire import WireProxy

OPTIONS: list[dict[str, Any]] = [
    {},
    {"isolation_level": "SERIALIZABLE"},
    {"isolation_level": "READ UNCOMMITTED"},
    {"read_only": True},
    {"read_only": False},
    {"deferrable": False},
    {"isolation_level": "REPEATABLE READ", "read_only": True},
    {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
]


class TestOnTheWire:
    @pytest.mark.parametrize("first", OPTIONS)
    @pytest.mark.parametrize("back_in_the_pool", [True, False])
    def test_nothing_is_sent_but_begin_and_its_end_in_any_transaction(
        self,
        engine: OptInEngine,
        wire: WireProxy,
        first: dict[str, Any],
        back_in_the_pool: bool,
    ) -> None:
        """psycopg2 would send a hidden SET from the second transaction on."""
        with OptInSession(engine) as session:
            for options in (first, *OPTIONS, first, first):
                with wire.record() as recording:
                    with session.begin(**options):
                        session.connection().exec_driver_sql("SELECT 1")
                    session.connection().exec_driver_sql("SELECT 2")
                assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
                if back_in_the_pool:
                    with wire.record() as recording:
                        session.close()
                    assert recording.messages == []

    @pytest.mark.parametrize("options", OPTIONS)
    def test_a_rollback_takes_no_more_round_trips_than_a_commit(
        self, engine: OptInEngine, wire: WireProxy, options: dict[str, Any]
    ) -> None:
        with OptInSession(engine) as session:
            for _ in range(3):
                with wire.record() as recording:
                    with pytest.raises(ValueError, match="mine"), session.begin(**options):
                        session.connection().exec_driver_sql("SELECT 1")
                        raise ValueError("mine")
                    session.connection().exec_driver_sql("SELECT 2")
                assert sent(recording) == ["BEGIN", "SELECT", "ROLLBACK", "SELECT"]

    def test_flags_of_a_raw_connection_are_put_back_in_one_go(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        raw = engine.raw_connection()
        set_flags(raw.dbapi_connection, read_only=True)
        raw.close()
        with wire.record() as recording:
            for _ in range(3):
                engine.raw_connection().close()
        assert recording.messages == []
        assert_at_rest(engine)


class TestTheServersDefaults:
    """They hold outside and inside, for nothing says otherwise."""

    @pytest.fixture
    def serializable(self, onlooker: Onlooker, database: str) -> None:
        sql = f'ALTER DATABASE "{database}" SET default_transaction_isolation TO serializable'
        onlooker.run(sql)

    @pytest.fixture
    def read_only(self, url: str) -> str:
        options = "-c default_transaction_read_only=on"
        return sa.make_url(url).update_query_dict({"options": options}).render_as_string(False)

    @pytest.mark.usefixtures("serializable")
    def test_the_servers_default_isolation_level_holds_outside_and_inside(self, url: str) -> None:
        with opened(url) as engine, OptInSession(engine) as session:
            for _ in range(3):
                assert session.scalar(LEVEL) == "serializable"
                with session.begin():
                    assert session.scalar(LEVEL) == "serializable"
                with session.begin(isolation_level="READ COMMITTED"):
                    assert session.scalar(LEVEL) == "read committed"

    def test_the_servers_default_of_read_only_holds_outside_and_inside(
        self, url: str, read_only: str
    ) -> None:
        with opened(url):
            engine = create_engine(read_only)
            with OptInSession(engine) as session:
                for _ in range(2):
                    with pytest.raises(DBAPIError, match="read-only"):
                        session.execute(sa.insert(Author).values(name="new"))
                    with pytest.raises(DBAPIError, match="read-only"), session.begin():
                        session.execute(sa.insert(Author).values(name="new"))
                    with session.begin(read_only=False):
                        assert session.scalar(READ_ONLY) == "off"
                    assert session.scalar(READ_ONLY) == "on"
            assert_at_rest(engine)
            engine.dispose()


class TestTheDriversOwnOptions:
    def test_cursor_factories_of_psycopg2_stay_as_the_user_set_them(
        self, wire_url: str, driver: str
    ) -> None:
        if driver != "psycopg2":
            pytest.skip("psycopg2's")
        factory = importlib.import_module("psycopg2.extras").DictCursor
        with opened(wire_url, connect_args={"cursor_factory": factory}) as engine:
            with OptInSession(engine) as session:
                dbapi: Any = session.connection().connection.dbapi_connection
                assert len(self.stream(session)) == 3
                assert dbapi.cursor_factory is factory
                with session.begin():
                    assert len(self.stream(session)) == 3

    def test_cursor_factories_of_psycopg_stay_as_the_user_set_them(
        self, wire_url: str, driver: str, wire: WireProxy
    ) -> None:
        if driver != "psycopg":
            pytest.skip("psycopg's")
        psycopg = importlib.import_module("psycopg")
        with opened(
            wire_url,
            connect_args={"cursor_factory": psycopg.ClientCursor, "prepare_threshold": None},
        ) as engine:
            with OptInSession(engine) as session:
                with wire.record() as recording:
                    for _ in range(12):
                        session.scalar(sa.text("SELECT 1"))
                assert recording.round_trips == 12
                assert len(self.stream(session)) == 3
                dbapi: Any = session.connection().connection.dbapi_connection
                assert dbapi.cursor_factory is psycopg.ClientCursor
                assert dbapi.server_cursor_factory is psycopg.ServerCursor

    @staticmethod
    def stream(session: OptInSession) -> list[int]:
        return list(session.scalars(sa.select(Author.id).execution_options(yield_per=1)))


class OtherDriver(PGDialect_psycopg2):
    """A driver that the package has no special knowledge of."""

    driver = "other"
    supports_statement_cache = True


class TestADriverItDoesNotKnow:
    """What SQLAlchemy's dialect offers is enough, at the price of its round trips."""

    @pytest.fixture
    def engine(self, wire_url: str) -> Iterator[OptInEngine]:
        registry.register("postgresql.other", __name__, "OtherDriver")
        url = sa.make_url(wire_url).set(drivername="postgresql+other")
        with opened(wire_url):
            engine = create_engine(url)
            engine.connect().close()
            yield engine
        # The level stays noted on the driver's connection: the next transaction sets its own.
        assert len(TRANSACTION_CONNECTIONS) == 0
        assert checked_out(engine) == 0
        with engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
            assert_rests(dbapi, flags_of(dbapi))
            assert not dbapi.readonly
            assert not dbapi.deferrable
        engine.dispose()

    def test_an_unknown_driver_rests_in_autocommit_and_has_real_transactions(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with OptInSession(engine) as session:
            for _ in range(2):
                with wire.record() as recording:
                    assert session.get_one(Author, 1, populate_existing=True).name == "Ada"
                assert sent(recording) == ["SELECT"]
                with pytest.raises(IntegrityError), session.begin():
                    session.execute(sa.insert(Author).values(name="new"))
                    assert onlooker.names() == []
                    session.execute(sa.insert(Author).values(name="Ada"))
            with session.begin():
                session.add(Author(name="new"))
            session.execute(sa.insert(Author).values(name="newer"))
        assert onlooker.names() == ["new", "newer"]

    def test_an_unknown_driver_leaks_no_level_and_no_flag(self, engine: OptInEngine) -> None:
        with OptInSession(engine) as session:
            for options in OPTIONS:
                with session.begin(**options):
                    session.get(Author, 1)
                with session.begin():
                    assert session.scalar(LEVEL) == "read committed"
                    assert session.scalar(READ_ONLY) == "off"
                assert session.scalar(READ_ONLY) == "off"
            with pytest.raises(ArgumentError):
                session.begin(isolation_level="SNAPSHOT")  # type: ignore[arg-type]  # pyright: ignore

    def test_an_unknown_driver_puts_back_what_was_left_in_a_transaction(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        raw = engine.raw_connection()
        dbapi: Any = raw.dbapi_connection
        dbapi.autocommit = False
        dbapi.cursor().execute("INSERT INTO author (name) VALUES ('left behind')")
        raw.close()
        assert wire.transactions_open == 0
        with engine.connect() as connection, wire.record() as recording:
            connection.scalar(sa.text("SELECT 1"))
        assert sent(recording) == ["SELECT"]
        assert onlooker.names() == []


class Interruption(BaseException):
    """As a KeyboardInterrupt, it may come between any two lines."""


class Interrupter:
    """Traces the lines of the package that a call runs, and can raise at one of them."""

    def __init__(self, at: int | None = None, function: str | None = None) -> None:
        self._function = function
        self.lines: list[tuple[str, int]] = []
        self.has_raised = False
        self._at = at
        self._package = str(Path(fictive_sqlalchemy.__file__).parent)

    def run(self, call: Callable[[], object]) -> None:
        # An error raised here at the end of an `except` leaves the one that was handled as the
        # current one: in a generator that ends with it, else all later errors would come from it.
        for _ in self._traced(call):
            pass

    def _traced(self, call: Callable[[], object]) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, what: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self._package):
            return None
        if what == "line" and self._function in (None, frame.f_code.co_name):
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self._at:
                self.has_raised = True
                raise Interruption
        return self._trace


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """What was raised, and what it was raised from: SQLAlchemy may replace an error."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def do_block(session: OptInSession) -> None:
    session.get(Author, 1)
    with session.begin(isolation_level="SERIALIZABLE"):
        session.add_all([Author(name="one"), Author(name="two")])


def do_failing_block(session: OptInSession) -> None:
    with pytest.raises(IntegrityError), session.begin():
        session.add(Author(name="one"))
        with session.begin_nested():
            session.add(Author(name="Ada"))


def do_flush(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.flush()


def do_commit(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.commit()
    session.rollback()


def do_many(session: OptInSession) -> None:
    session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])


def do_many_in_core(session: OptInSession) -> None:
    session.execute(sa.insert(authors), [{"name": "one"}, {"name": "two"}])


def do_stream(session: OptInSession) -> None:
    stream = session.scalars(sa.select(Author).execution_options(yield_per=1))
    stream.first()
    session.give_back()
    session.close()


ACTIONS = {
    action.__name__: action
    for action in (
        do_block,
        do_failing_block,
        do_flush,
        do_commit,
        do_many,
        do_many_in_core,
        do_stream,
    )
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a stream's cursor
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("spare", [True, False])
def test_an_interruption_at_any_line_leaves_nothing_behind(
    url: str, onlooker: Onlooker, action: str, spare: bool
) -> None:
    """Each line of the package that the action runs is interrupted, at its first and last turn."""
    options = {} if spare else {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    with opened(url, **options) as engine:
        interrupters: list[Interrupter] = []

        def play(at: int | None) -> list[tuple[str, int]]:
            session = OptInSession(engine)
            interrupter = Interrupter(at)
            interrupters.append(interrupter)
            try:
                interrupter.run(lambda: ACTIONS[action](session))
            except BaseException as raised:
                if at is None or Interruption not in map(type, chain(raised)):
                    raise
            finally:
                session.close()
            assert not session.in_transaction()
            if checked_out(engine):
                gc.collect()  # the interruption still keeps frames that had a connection
            # Interrupted at the entry of a block's __exit__(), SQLAlchemy believes to be inside.
            with suppress(InvalidRequestError):
                session.get(Author, 1)
                assert_rests(session.connection().connection.dbapi_connection)
                with session.begin():
                    session.get(Author, 2)
            session.close()
            return interrupter.lines

        def check(where: object) -> None:
            assert_at_rest(engine)
            names = onlooker.names()
            assert names in ([], ["one", "two"]), where
            onlooker.column("DELETE FROM author WHERE id > 3 RETURNING 1")

        play(None)
        check("at all")
        lines = play(None)
        check("at all")
        first: dict[tuple[str, int], int] = {}
        last: dict[tuple[str, int], int] = {}
        for turn, line in enumerate(lines):
            first.setdefault(line, turn)
            last[line] = turn
        for turn in sorted({*first.values(), *last.values()}):
            play(turn)
            check(lines[turn])
            with engine.connect() as connection:
                assert_rests(connection.connection.dbapi_connection)
        assert len({*first.values(), *last.values()}) > 50
        assert all(interrupter.has_raised for interrupter in interrupters[2:])


@pytest.mark.parametrize("function", ["provide_connection", "return_to_autocommit"])
def test_an_interruption_on_the_way_out_and_back_leaves_a_session_that_can_go_on(
    url: str, onlooker: Onlooker, function: str
) -> None:
    """It is not closed: what it writes next is stored, for it is in no transaction any more."""
    with opened(url, pool_size=1, max_overflow=0, pool_timeout=5) as engine:
        at, stored = 0, []
        while True:
            with OptInSession(engine) as session:
                transaction = session.begin()
                interrupter = Interrupter(at, function)
                with suppress(Interruption):
                    interrupter.run(partial(session.get, Author, 1))
                    interrupter.run(transaction.commit)
                transaction.close()
                session.execute(sa.insert(Author).values(name=f"{at:02}"))
                stored.append(f"{at:02}")
                assert onlooker.names() == stored, interrupter.lines[-1]
            if not interrupter.has_raised:
                break
            at += 1
        assert at > 3
        assert_at_rest(engine)


def test_an_interruption_while_a_connection_is_made_leaves_nothing_behind(wire_url: str) -> None:
    with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
        engine.dispose()
        interrupted: list[int] = []

        @event.listens_for(engine, "connect")
        def interrupt(dbapi: Any, record: Any) -> None:
            if len(interrupted) < 3:
                interrupted.append(1)
                raise Interruption

        for _ in range(3):
            with pytest.raises(Interruption), OptInSession(engine) as session:
                session.get(Author, 1)
            with OptInSession(engine) as session:
                if len(interrupted) < 3:
                    with pytest.raises(Interruption), session.begin():
                        session.get(Author, 1)
            if len(interrupted) == 3:
                break
        with OptInSession(engine) as session, session.begin():
            assert session.get_one(Author, 1).name == "Ada"
