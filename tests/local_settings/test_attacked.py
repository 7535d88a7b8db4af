"""What an attack on ``set_local()`` has found: each is a fault that was there."""

from __future__ import annotations

import signal
import threading
from enum import Enum
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import (
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
    unit_of_work,
)
from fictive_sqlalchemy.recording import record
from fictive_sqlalchemy.testing import isolate
from tests.interruptions import HardStop, SoftLimit
from tests.library import Author, Onlooker, Seat, Undo, authors, fill
from tests.local_settings.support import TENANT, TIMEOUT, has_none, tenant
from tests.wire import WireProxy

Sessions = sessionmaker[OptInSession]

# The function that is asked


def test_a_function_that_has_used_the_session_and_fails_is_asked_again(engine: OptInEngine) -> None:
    answers: list[Any] = [Undo(), {"app.tenant_id": 7}]

    def settings() -> Any:
        session.scalar(text("SELECT 1"))
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    with OptInSession(engine, local_settings=settings) as session:
        with pytest.raises(Undo):
            tenant(session)
        assert tenant(session) == "7"


def test_a_function_that_closes_its_session_is_an_error(engine: OptInEngine) -> None:
    def settings() -> dict[str, int]:
        session.close()
        return {"app.tenant_id": 7}

    with OptInSession(engine, local_settings=settings) as session:
        for _ in range(2):
            with pytest.raises(exc.InvalidRequestError, match="has closed or reset the session"):
                tenant(session)


def test_a_unit_of_work_leaves_what_the_function_has_said(sessions: Sessions) -> None:
    scope = OptInScopedSession(sessions)
    scope.local_settings(lambda: {"app.tenant_id": 7})
    scope()
    with unit_of_work(scope, settings={"statement_timeout": "5s"}) as session:
        assert tenant(session) == "7"
        assert session.scalar(TIMEOUT) == "5s"
    assert tenant(scope) == "7"
    assert scope.scalar(TIMEOUT) == "0"
    scope.remove()


# Binds


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_a_stock_bind_is_refused_each_time(
    url: str, engine: OptInEngine, onlooker: Onlooker, begin_on_write: bool
) -> None:
    stock = sa.create_engine(url)
    with OptInSession(stock, begin_on_write=begin_on_write) as session:
        session.set_local({"app.tenant_id": 7})
        for _ in range(3):
            with pytest.raises(exc.InvalidRequestError, match="another engine"):
                session.execute(update(Author).values(age=77))
        session.set_local({"app.tenant_id": None})
        session.execute(update(Author).values(age=5))
        session.commit()
    assert onlooker.scalar("SELECT count(*) FROM author WHERE age = 5") == 3
    stock.dispose()


def test_a_pool_with_one_connection_for_all_is_refused(wire_url: str, library: None) -> None:
    fill(wire_url)
    engine = create_engine(wire_url, poolclass=sa.StaticPool)
    with OptInSession(engine) as session:
        session.set_local({"app.tenant_id": 7})
        with pytest.raises(exc.InvalidRequestError, match="one connection for several sessions"):
            tenant(session)
    engine.dispose()


# What is in force


def test_a_statement_that_fails_before_it_is_sent_leaves_the_settings_right(
    session: OptInSession,
) -> None:
    session.set_local({"app.tenant_id": 7})
    for is_many in (False, True):
        with session.begin():
            assert tenant(session) == "7"
            session.set_local({"app.tenant_id": 8})
            bad = [{"x": object()}] * 2 if is_many else {"x": object()}
            with pytest.raises(exc.DBAPIError):
                session.execute(text("SELECT :x"), bad)
            session.set_local({"app.tenant_id": 7})
            assert tenant(session) == "7"


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "COMMIT AND CHAIN", "/* app */ COMMIT"])
def test_a_transaction_that_a_statement_ends_leaves_the_settings_right(
    sessions: Sessions, end: str
) -> None:
    with sessions(begin_on_write=True) as session:
        session.set_local({"app.tenant_id": 7})
        session.execute(update(Author).values(age=1))
        session.execute(text(end))
        assert tenant(session) == "7"
        session.execute(update(Author).values(age=2))
        assert tenant(session) == "7"
        session.commit()


def test_a_transaction_that_a_cursor_ends_leaves_the_settings_right(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    with session.begin():
        assert tenant(session) == "7"
        raw: Any = session.connection().connection.dbapi_connection
        raw.rollback()
        assert tenant(session) == "7"


@pytest.mark.parametrize("isolated", [False, True])
def test_savepoints_and_settings_by_hand_leave_the_settings_right(
    engine: OptInEngine, sessions: Sessions, isolated: bool
) -> None:
    def work() -> None:
        with sessions() as session, session.begin():
            session.set_local({"app.tenant_id": 7})
            assert tenant(session) == "7"
            session.execute(text("SAVEPOINT a"))
            session.set_local({"app.tenant_id": 8})
            assert tenant(session) == "8"
            session.execute(text("ROLLBACK TO SAVEPOINT a"))
            assert tenant(session) == "8"
            session.execute(text("SET LOCAL app.tenant_id = 9"))
            assert tenant(session) == "8"
            session.execute(text("SELECT set_config('app.tenant_id', '9', true)"))
            assert tenant(session) == "8"

    if isolated:
        with isolate(engine):
            work()
    else:
        work()


def test_a_comment_before_the_rollback_of_a_savepoint_changes_nothing(
    session: OptInSession, engine: OptInEngine
) -> None:
    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def comment(*args: Any) -> tuple[str, Any]:
        return f"/* app */ {args[2]}", args[3]

    session.set_local({"app.tenant_id": 7})
    with session.begin():
        savepoint = session.begin_nested()
        session.scalar(TENANT)
        session.set_local({"app.tenant_id": 8})
        with pytest.raises(exc.DataError):
            session.execute(text("SELECT 1 / 0"))
        savepoint.rollback()
        assert tenant(session) == "8"


def test_a_change_by_another_thread_during_a_statement_is_sent_with_the_next(
    session: OptInSession,
) -> None:
    session.set_local({"app.tenant_id": 7})
    with session.begin():
        change = threading.Timer(0.1, session.set_local, [{"app.tenant_id": 8}])
        change.start()
        session.execute(text("SELECT pg_sleep(0.3)"))
        change.join()
        assert tenant(session) == "8"


def test_isolation_gives_back_the_setting_that_was_there_before(
    engine: OptInEngine, sessions: Sessions
) -> None:
    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SET app.tenant_id = 'of the connection'")
        cursor.close()

    engine.dispose()
    with isolate(engine):
        with sessions() as session:
            session.set_local({"app.tenant_id": 7, "lock_timeout": "2s"})
            with session.begin():
                assert tenant(session) == "7"
                session.execute(update(Author).values(age=1))
        with sessions() as session:
            assert tenant(session) == "of the connection"
            assert session.scalar(text("SHOW lock_timeout")) != "0"


def test_executemany_on_a_connection_with_the_level_autocommit_has_the_settings(
    session: OptInSession, onlooker: Onlooker
) -> None:
    onlooker.run("CREATE TABLE seen (tenant text)")
    session.set_local({"app.tenant_id": 7})
    connection = session.connection()
    connection.execution_options(isolation_level="AUTOCOMMIT")
    seen = sa.table("seen", sa.column("tenant"))
    with connection.begin():
        connection.exec_driver_sql(
            "INSERT INTO seen SELECT current_setting('app.tenant_id', true) WHERE %(x)s",
            [{"x": True}, {"x": True}],
        )
    assert onlooker.column(str(select(seen))) == ["7", "7"]


# Errors


def test_a_stream_whose_settings_are_refused_leaves_no_transaction_open(
    session: OptInSession,
) -> None:
    session.set_local({"statement_timeout": "soon"})
    stream = select(Author).execution_options(yield_per=1)
    with pytest.raises(exc.DBAPIError, match=r"set_local\(\)"):
        session.scalars(stream).all()
    session.set_local({"statement_timeout": None})
    assert len(session.scalars(stream).all()) == 3
    raw: Any = session.connection().connection.dbapi_connection
    assert raw.info.transaction_status == 0


@pytest.mark.parametrize("is_one_statement", [False, True])
def test_a_constraint_that_is_checked_at_the_end_raises_its_own_error(
    session: OptInSession, is_one_statement: bool
) -> None:
    again = insert(Seat).values(place=1)
    session.execute(again)
    session.set_local({"app.tenant_id": 7})
    for _ in range(2):
        if is_one_statement:
            session.add(Seat(place=1))
        with pytest.raises(exc.IntegrityError):
            session.commit() if is_one_statement else session.execute(again)
        assert tenant(session) == "7"


@pytest.mark.parametrize("stop", [SoftLimit, HardStop])
def test_an_exception_of_a_signal_handler_comes_through(
    session: OptInSession, stop: type[BaseException]
) -> None:
    def interrupt(*_: object) -> None:
        raise stop

    session.set_local({"app.tenant_id": 7})
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(stop):
            session.execute(text("SELECT pg_sleep(1)"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert tenant(session) == "7"


def test_a_prepared_statement_works_after_a_setting_that_was_refused(session: OptInSession) -> None:
    every = select(authors).where(authors.c.id == sa.bindparam("id"))
    session.set_local({"app.tenant_id": 7})
    for _ in range(5):
        session.execute(every, {"id": 1}).all()
    session.set_local({"statement_timeout": "soon"})
    with pytest.raises(exc.DBAPIError):
        session.execute(every, {"id": 1})
    session.set_local({"statement_timeout": None})
    with session.begin():
        assert len(session.execute(every, {"id": 1}).all()) == 1


def test_several_statements_at_once_work_or_say_what_to_do(
    session: OptInSession, driver: str
) -> None:
    session.set_local({"app.tenant_id": 7})
    two = text("SET LOCAL work_mem = '8MB'; SELECT 1")
    if driver == "psycopg":
        with pytest.raises(exc.ProgrammingError, match="send the statements one by one"):
            session.execute(two)
    else:
        assert session.scalar(two) == 1
    with session.begin():
        session.execute(two)
        assert session.scalar(text("SHOW work_mem")) == "8MB"


def test_an_error_that_has_nothing_to_do_with_settings_names_none(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    for sql in ("SELECT 'x'::nothing", "DO $$ BEGIN RAISE SQLSTATE '42501'; END $$"):
        with pytest.raises(exc.DBAPIError) as caught:
            session.execute(text(sql))
        assert "set_local" not in str(caught.value)


# What must not change with settings


def test_the_settings_take_no_snapshot(session: OptInSession, onlooker: Onlooker) -> None:
    session.set_local({"app.tenant_id": 7})
    with session.begin(isolation_level="REPEATABLE READ"):
        session.execute(text("LOCK TABLE document"))
        onlooker.run("UPDATE author SET age = 50 WHERE id = 1")
        session.execute(update(Author).where(Author.id == 1).values(age=51))
    with session.begin():
        session.execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        assert tenant(session) == "7"


def test_an_empty_statement_returns_no_row(session: OptInSession, driver: str) -> None:
    session.set_local({"app.tenant_id": 7})
    if driver == "psycopg2":
        with pytest.raises(exc.ResourceClosedError):
            session.execute(text("-- nothing")).all()


def test_a_setting_that_is_a_list_stays_a_list(session: OptInSession) -> None:
    session.set_local({"search_path": "pg_catalog, public"})
    shown = text("SHOW search_path")
    assert session.scalar(shown) == "pg_catalog, public"
    with session.begin():
        assert session.scalar(shown) == "pg_catalog, public"


def test_names_of_settings_may_be_keywords(session: OptInSession) -> None:
    session.set_local({"app.user": "ada", "app.select$": 1})
    both = text("SELECT current_setting('app.user'), current_setting('app.select$')")
    assert tuple(session.execute(both).one()) == ("ada", "1")
    with session.begin():
        assert tuple(session.execute(both).one()) == ("ada", "1")


def test_the_value_of_an_enum_is_sent(session: OptInSession) -> None:
    class Kind(str, Enum):
        A = "a"

    session.set_local({"app.tenant_id": Kind.A})
    assert tenant(session) == "a"


def test_what_the_driver_reads_values_by_is_refused(session: OptInSession) -> None:
    for name in ("DateStyle", "IntervalStyle"):
        with pytest.raises(exc.ArgumentError, match="the driver has to know it"):
            session.set_local({name: "iso"})
    assert has_none(session)


def test_a_failed_stream_is_counted_as_the_wire(session: OptInSession, wire: WireProxy) -> None:
    session.set_local({"app.tenant_id": 7})
    with record(session) as seen, wire.record() as recording, pytest.raises(exc.DBAPIError):
        session.execute(text("SELECT nothing"), execution_options={"yield_per": 1})
    assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"


def test_threads_that_only_read_under_isolation_do_not_fail(
    engine: OptInEngine, sessions: Sessions
) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with sessions() as session:
                for _ in range(40):
                    with session.begin():
                        session.scalar(text("SELECT 1"))
        except BaseException as error:
            errors.append(error)

    with isolate(engine):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
