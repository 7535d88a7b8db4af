"""What is set on the server's session never reaches the next borrower of the connection."""

# ruff: noqa: PT012, PT031  # what raises, or warns, has several lines

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from fictive_sqlalchemy import OptInEngine, OptInSession, SessionStateWarning
from fictive_sqlalchemy._core.server_state import left_behind
from tests.library import Onlooker, authors, opened, sent
from tests.wire import WireProxy

ddl: Any = sa.DDL
PID = sa.text("SELECT pg_backend_pid()")

LEAVES = [
    "SET statement_timeout = '7s'",
    "set /* a comment */ search_path to pg_catalog",
    "SET SESSION statement_timeout = '7s'",
    "SET ROLE pg_read_all_data",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET TIME ZONE 'UTC'",
    "RESET ALL",
    "RESET ROLE",
    "DISCARD ALL",
    "LISTEN news",
    "LOAD 'plpgsql'",
    "PREPARE mine AS SELECT 1",
    "CREATE TEMP TABLE scratch (id int)",
    "CREATE LOCAL TEMPORARY TABLE scratch AS SELECT 1 AS id",
    "CREATE OR REPLACE TEMP VIEW scratch AS SELECT 1 AS id",
    "CREATE TEMPORARY SEQUENCE scratch",
    "CREATE TABLE pg_temp.scratch (id int)",
    "SELECT 1 AS id INTO TEMP scratch",
    "WITH one AS (SELECT 1 AS id) SELECT id INTO TEMPORARY TABLE scratch FROM one",
    "SELECT set_config('app.tenant', '7', false)",
    "SELECT set_config('app.tenant', 'a, (b', 'f')",
    "SELECT set_config('app.a', '7', true), set_config('app.b', '7', false)",
    "SELECT set_config('app.a', (SELECT max(coalesce(id, 1))::text FROM author), false)",
    "SELECT \"set_config\"('app.tenant', '7', false)",
    "SELECT set_config /* (a comment) */ ('app.tenant', '7', false)",
    "SELECT set_config('app.tenant', E'it\\'s (', false)",
    "SELECT set_config('app.tenant', $$it's ($$, false)",
    "SELECT set_config('a.b', 'x', true), set_config('a.c', upper(lower(ltrim('x'))), false)",
    "UPDATE pg_catalog.pg_settings SET setting = '7s' WHERE name = 'statement_timeout'",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_try_advisory_lock_shared(7) FROM author",
    "SELECT setseed(0.5)",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "SELECT 1; SET statement_timeout = '7s'; SELECT 2",
    "DO $$ BEGIN PERFORM set_config('app.tenant', '7', false); END $$",
    "DO $$ BEGIN PERFORM set_config('app.a', upper(lower(ltrim('7'))), false); END $$",
    "DO $$ BEGIN EXECUTE 'SET app.tenant = ''7'''; END $$",
    "DO $$ BEGIN EXECUTE concat('SET app.tenant = ', 7); END $$",
    "DO $$ BEGIN IF true THEN SET statement_timeout = '7s'; END IF; END $$",
    "DO 'BEGIN CREATE TEMP TABLE scratch (id int); END'",
]

LEAVES_NOTHING = [
    "SELECT 1",
    "SET LOCAL statement_timeout = '7s'",
    "SET TRANSACTION READ ONLY",
    "SET CONSTRAINTS ALL DEFERRED",
    "DISCARD PLANS",
    "UNLISTEN *",
    "UPDATE author SET name = 'SET ROLE x' WHERE id = -1",
    "INSERT INTO author (name) VALUES ('a') ON CONFLICT (name) DO UPDATE SET age = 1",
    "SELECT 'SET ROLE x; LISTEN y; pg_advisory_lock(7)'",
    "SELECT 1 -- ; SET ROLE x",
    "SELECT set_config('app.tenant', '7', true)",
    "SELECT set_config('app.tenant', 'x', 't'::bool)",
    "SELECT set_config('app.tenant', upper(lower(ltrim('x'))), true)",
    "SELECT set_config('app.tenant', E'it\\'s (', true)",
    "SELECT 'set_config(''app.tenant'', ''7'', false)'",
    "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'",
    "DO $$ BEGIN PERFORM set_config('app.tenant', upper(lower('x')), true); END $$",
    "SELECT pg_advisory_xact_lock(7)",
    "SELECT pg_advisory_unlock(7)",
    "SELECT pg_advisory_lock(7), pg_advisory_unlock(7)",
    "CREATE TABLE temp (id int)",
    "CREATE TABLE kept (temporary int)",
    "CREATE TEMP TABLE scratch (id int) ON COMMIT DROP",
    "SHOW search_path",
    "ALTER ROLE CURRENT_USER SET work_mem = '8MB'",
    "DO $$ BEGIN PERFORM 1; UPDATE author SET age = 1; END $$",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET search_path = public AS 'SELECT 1'",
]


@pytest.mark.parametrize("sql", LEAVES)
def test_sql_that_leaves_something_is_recognised(sql: str) -> None:
    assert left_behind(sql, {}) is not None
    assert left_behind(sql.replace("\n", " ") + " ;", ()) is not None


@pytest.mark.parametrize("sql", LEAVES_NOTHING)
def test_sql_that_leaves_nothing_is_recognised(sql: str) -> None:
    assert left_behind(sql, {}) is None


@pytest.mark.parametrize(
    ("sql", "parameters", "leaves"),
    [
        ("SELECT set_config('a.b', %(v)s, %(local)s)", {"v": "x", "local": True}, False),
        ("SELECT set_config('a.b', %(v)s, %(local)s)", {"v": "x", "local": False}, True),
        ("SELECT set_config('a.b', %(v)s, %(local)s)", [{"v": "x", "local": False}], True),
        ("SELECT %s, set_config('a.b', %s, %s)", (1, "x", True), False),
        ("SELECT %s, set_config('a.b', %s, %s)", (1, "x", None), True),
        ("SELECT '%%s', set_config('a.b', %s, %s)", ("x", True), False),
        ("SELECT set_config('a.b', lower(upper(ltrim(%s))), %s)", ("x", False), True),
    ],
)
def test_a_parameter_of_set_config_may_say_whether_it_is_local(
    sql: str, parameters: Any, leaves: bool
) -> None:
    assert (left_behind(sql, parameters) is not None) is leaves


@pytest.mark.parametrize(
    ("sql", "what", "instead"),
    [
        ("SET ROLE pg_read_all_data", "a setting of the server's session", "SET LOCAL"),
        ("RESET ROLE", "other settings than a `connect` listener", "leave it out"),
        ("DISCARD ALL", "other settings than a `connect` listener", "leave it out"),
        ("LOAD 'plpgsql'", "a loaded library", "session_preload_libraries"),
        ("PREPARE mine AS SELECT 1", "a prepared statement", "leave it to the driver"),
        ("SELECT dblink_connect('x')", "something that an extension", "engine.connect()"),
    ],
)
def test_the_warning_says_what_is_left_and_what_to_use_instead(
    sql: str, what: str, instead: str
) -> None:
    left = left_behind(sql, {})
    assert left is not None
    assert left.what.startswith(what)
    assert instead in left.instead


def pid_of(engine: OptInEngine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(PID))


@pytest.fixture
def one(wire_url: str) -> Iterator[OptInEngine]:
    """An engine whose pool has one connection."""
    with opened(wire_url, pool_size=1, max_overflow=0) as engine:
        yield engine


class TestNextBorrower:
    @pytest.mark.parametrize("sql", LEAVES)
    def test_the_next_borrower_gets_another_connection_where_something_is_left(
        self, one: OptInEngine, sql: str
    ) -> None:
        before = pid_of(one)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SessionStateWarning)
            with one.connect() as connection:
                connection.exec_driver_sql(sql)
        assert pid_of(one) != before

    @pytest.mark.parametrize("sql", LEAVES_NOTHING)
    def test_the_next_borrower_gets_the_same_connection_where_nothing_is_left(
        self, one: OptInEngine, sql: str
    ) -> None:
        before = pid_of(one)
        with one.connect() as connection:
            connection.exec_driver_sql(sql)
        assert pid_of(one) == before

    def test_what_a_session_leaves_is_not_seen_by_the_next(self, engine: OptInEngine) -> None:
        with OptInSession(engine) as session:
            with pytest.warns(SessionStateWarning, match="SET LOCAL"):
                session.execute(sa.text("SET app.tenant = '7'"))
            # The session keeps its connection, and what is set on it.
            assert session.scalar(sa.text("SELECT current_setting('app.tenant')")) == "7"
        with OptInSession(engine) as session:
            assert not session.scalar(sa.text("SELECT current_setting('app.tenant', true)"))

    def test_what_a_session_leaves_is_not_seen_by_the_next_borrower_of_a_pool_of_one(
        self, one: OptInEngine
    ) -> None:
        with OptInSession(one) as session, pytest.warns(SessionStateWarning):
            session.execute(sa.select(sa.func.set_config("app.tenant", "7", False)))
            with one.connect() as connection:
                setting = sa.text("SELECT current_setting('app.tenant', true)")
                assert not connection.scalar(setting)

    def test_a_setting_that_was_committed_costs_the_connection(self, one: OptInEngine) -> None:
        before = pid_of(one)
        with pytest.warns(SessionStateWarning), one.begin() as connection:
            connection.execute(sa.text("SET app.tenant = '7'"))
        assert pid_of(one) != before

    def test_a_setting_that_was_rolled_back_leaves_the_connection(self, one: OptInEngine) -> None:
        before = pid_of(one)
        with pytest.warns(SessionStateWarning), one.connect() as connection:
            with connection.begin() as transaction:
                connection.execute(sa.text("SET app.tenant = '7'"))
                transaction.rollback()
            with connection.begin():
                assert not connection.scalar(sa.text("SELECT current_setting('app.tenant', true)"))
        assert pid_of(one) == before

    def test_an_advisory_lock_outlives_a_rollback_and_costs_the_connection(
        self, one: OptInEngine
    ) -> None:
        before = pid_of(one)
        with one.connect() as connection, connection.begin() as transaction:
            connection.execute(sa.select(sa.func.pg_advisory_lock(7)))
            transaction.rollback()
        assert pid_of(one) != before

    def test_a_setting_on_a_connection_that_nobody_has_closed_costs_it(
        self, one: OptInEngine
    ) -> None:
        before = pid_of(one)
        connection = one.connect()
        with pytest.warns(SessionStateWarning):
            connection.execute(sa.text("SET app.tenant = '7'"))
        del connection
        assert pid_of(one) != before

    def test_a_temporary_table_of_sqlalchemys_costs_the_connection(self, one: OptInEngine) -> None:
        before = pid_of(one)
        table = sa.Table(
            "scratch", sa.MetaData(), sa.Column("id", sa.Integer), prefixes=["TEMPORARY"]
        )
        with one.connect() as connection:
            table.create(connection)
        assert pid_of(one) != before

    def test_the_next_borrower_keeps_what_a_connect_listener_sets(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, read_only_outside=True) as engine:
            before = pid_of(engine)
            with pytest.warns(SessionStateWarning), engine.connect() as connection:
                connection.execute(sa.text("RESET ALL"))
            with engine.connect() as connection, pytest.raises(DBAPIError):
                connection.execute(sa.insert(authors).values(name="a"))
            assert pid_of(engine) != before


class TestWarning:
    def test_the_warning_is_given_once_for_each_line_and_names_it(
        self, engine: OptInEngine
    ) -> None:
        with warnings.catch_warnings(record=True) as caught, engine.connect() as connection:
            warnings.simplefilter("default")
            for _ in range(3):
                connection.execute(sa.text("SET app.tenant = '7'"))
            connection.execute(sa.text("SET app.tenant = '7'"))
        assert [one.category for one in caught] == [SessionStateWarning] * 2
        assert {one.filename for one in caught} == {__file__}

    def test_nothing_is_sent_where_the_warning_is_an_error(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.scalar(PID)
        with wire.record() as recording, pytest.raises(SessionStateWarning):
            session.execute(sa.text("LISTEN news"))
        assert recording.messages == []

    @pytest.mark.parametrize("sql", ["LISTEN news", "SELECT pg_advisory_lock(7)"])
    def test_the_warning_is_not_given_on_a_connection_that_is_held(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with engine.connect() as connection:
            connection.execute(sa.text(sql))


class TestBegin:
    """BEGIN in a text outside a transaction."""

    BEGINS = ("BEGIN", "start transaction", "BEGIN; INSERT INTO author (name) VALUES ('lost')")

    @pytest.mark.parametrize("sql", BEGINS)
    @pytest.mark.parametrize("way", ["session", "text", "driver", "ddl"])
    def test_begin_in_a_text_is_refused_and_rolled_back(
        self, engine: OptInEngine, onlooker: Onlooker, wire: WireProxy, sql: str, way: str
    ) -> None:
        with OptInSession(engine) as session:
            connection: Any = session if way == "session" else session.connection()
            session.scalar(PID)
            with wire.record() as recording, pytest.raises(InvalidRequestError, match="begin"):
                if way == "driver":
                    connection.exec_driver_sql(sql)
                else:
                    connection.execute(ddl(sql) if way == "ddl" else sa.text(sql))
            assert sent(recording)[0] in ("BEGIN", "START")
            assert sent(recording)[-1] == "ROLLBACK"
            session.execute(sa.insert(authors).values(name="after"))
            session.commit()
        assert onlooker.names() == ["after"]

    def test_a_statement_that_fails_after_begin_in_its_text_raises_its_own_error(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            with pytest.raises(DBAPIError):
                connection.exec_driver_sql("BEGIN; INSERT INTO author (name) VALUES (NULL)")
            connection.execute(sa.insert(authors).values(name="after"))
        assert onlooker.names() == ["after"]

    def test_begin_in_a_text_is_refused_while_another_error_is_handled(
        self, engine: OptInEngine
    ) -> None:
        with engine.connect() as connection:
            try:
                connection.execute(sa.text("SELECT 1/0"))
            except DBAPIError:
                with pytest.raises(InvalidRequestError):
                    connection.execute(sa.text("BEGIN"))

    def test_begin_and_its_commit_in_one_text_are_stored(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN; INSERT INTO author (name) VALUES ('kept'); COMMIT")
        assert onlooker.names() == ["kept"]

    def test_a_savepoint_in_a_text_outside_gives_the_error_of_the_server(
        self, engine: OptInEngine
    ) -> None:
        with engine.connect() as connection:
            with pytest.raises(DBAPIError):
                connection.execute(sa.text("SAVEPOINT one"))
            connection.execute(sa.text("COMMIT"))  # of which the server only warns
            assert connection.scalar(sa.text("SELECT 1")) == 1

    def test_begin_on_a_cursor_of_the_users_own_is_left_to_the_user(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            cursor: Any = connection.connection.cursor()
            cursor.execute("BEGIN")
            connection.execute(sa.insert(authors).values(name="kept"))
            cursor.execute("COMMIT")
            cursor.close()
        assert onlooker.names() == ["kept"]
