"""The driver's own connection works under ``isolate()`` as it does without it."""

from __future__ import annotations

import importlib
import io
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import exc

from fictive_sqlalchemy import OptInEngine
from tests.library import Onlooker
from tests.testing.support import names


class TestTheDriversConnection:
    def test_the_drivers_connection_has_autocommit_and_transactions(
        self, engine: OptInEngine, raw: Any
    ) -> None:
        dbapi = raw.dbapi_connection
        cursor = raw.cursor()
        cursor.execute("INSERT INTO author (name) VALUES ('Eve')")
        assert dbapi.info.transaction_status == 0
        assert names(engine) == ["Eve"]
        dbapi.autocommit = False
        cursor.execute("INSERT INTO author (name) VALUES ('Fay')")
        assert dbapi.info.transaction_status == 2
        with pytest.raises(engine.dialect.loaded_dbapi.ProgrammingError):
            dbapi.autocommit = True
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            cursor.execute("SELECT nothing")
        assert dbapi.info.transaction_status == 3
        raw.rollback()
        assert dbapi.info.transaction_status == 0
        with dbapi.cursor() as cursor:
            cursor.execute("INSERT INTO author (name) VALUES ('Gus')")
        raw.commit()
        assert names(engine) == ["Eve", "Gus"]
        assert not dbapi.closed
        dbapi.close()
        dbapi.close()
        assert dbapi.closed

    def test_the_connection_of_a_cursor_is_no_way_out(
        self, engine: OptInEngine, raw: Any, onlooker: Onlooker
    ) -> None:
        raw.dbapi_connection.autocommit = False
        cursor = raw.cursor()
        cursor.execute("INSERT INTO author (name) VALUES ('Eve')")
        cursor.connection.commit()
        assert onlooker.names() == []
        assert names(engine) == ["Eve"]

    def test_the_drivers_cursor_takes_bytes_and_sql_objects(
        self, engine: OptInEngine, raw: Any
    ) -> None:
        sql = importlib.import_module(f"{engine.dialect.driver}.sql")
        cursor = raw.cursor()
        insert = sql.SQL("INSERT INTO {} (name) VALUES ({})")
        cursor.execute(insert.format(sql.Identifier("author"), sql.Literal("Eve's")))
        cursor.execute(b"INSERT INTO author (name) VALUES ('Fay')")
        assert names(engine) == ["Eve's", "Fay"]
        for commit in (sql.SQL("COMMIT"), b"COMMIT"):
            with pytest.raises(exc.InvalidRequestError, match="COMMIT as a statement"):
                cursor.execute(commit)

    def test_executemany_of_the_drivers_cursor_is_all_or_nothing(
        self, engine: OptInEngine, raw: Any
    ) -> None:
        cursor = raw.cursor()
        insert = "INSERT INTO author (name) VALUES (%s)"
        cursor.executemany(insert, [("Eve",), ("Fay",)])
        with pytest.raises(engine.dialect.loaded_dbapi.IntegrityError):
            cursor.executemany(insert, [("Gus",), ("Ada",)])
        assert names(engine) == ["Eve", "Fay"]

    def test_the_drivers_server_side_cursor_works_in_a_transaction(
        self, engine: OptInEngine, raw: Any
    ) -> None:
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            raw.cursor("mine").execute("SELECT 1")
        raw.dbapi_connection.autocommit = False
        cursor = raw.cursor("mine")
        cursor.execute("SELECT name FROM author ORDER BY id")
        assert cursor.fetchone() == ("Ada",)
        assert cursor.fetchmany(1) == [("Bob",)]
        cursor.scroll(-1)
        assert list(cursor) == [("Bob",), ("Cid",)]
        cursor.close()
        with pytest.raises(engine.dialect.loaded_dbapi.Error), raw.cursor("mine") as cursor:
            cursor.execute("SELECT nothing")
        raw.rollback()

    def test_what_can_not_be_isolated_says_so(self, raw: Any) -> None:
        for name in ("tpc_begin", "lobject", "reset", "transaction", "pipeline", "xid"):
            with pytest.raises((exc.InvalidRequestError, AttributeError)):
                getattr(raw.dbapi_connection, name)
        with pytest.raises(AttributeError):
            raw.dbapi_connection.no_such_thing  # noqa: B018


class TestPsycopg2:
    @pytest.fixture(autouse=True)
    def only(self, driver: str) -> None:
        if driver != "psycopg2":
            pytest.skip("for psycopg2")

    def test_copy_works_in_isolation(self, engine: OptInEngine, raw: Any) -> None:
        cursor = raw.cursor()
        cursor.copy_expert("COPY author (name) FROM STDIN", io.StringIO("Eve\nFay\n"))
        with pytest.raises(engine.dialect.loaded_dbapi.IntegrityError):
            cursor.copy_from(io.StringIO("Gus\nAda\n"), "author", columns=["name"])
        assert names(engine) == ["Eve", "Fay"]
        out = io.StringIO()
        cursor.copy_to(out, "author", columns=["name"])
        assert out.getvalue() == "Ada\nBob\nCid\nEve\nFay\n"
        with pytest.raises(exc.InvalidRequestError, match="COMMIT as a statement"):
            cursor.copy_expert("COMMIT", io.StringIO())

    def test_callproc_and_mogrify_work_in_isolation(self, raw: Any) -> None:
        cursor = raw.cursor()
        cursor.callproc("abs", [-1])
        assert cursor.fetchone() == (1,)
        assert cursor.mogrify("SELECT %s", (1,)) == b"SELECT 1"

    def test_cursor_classes_and_extras_work_in_isolation(self, raw: Any) -> None:
        extras = importlib.import_module("psycopg2.extras")
        cursor = raw.cursor(cursor_factory=extras.RealDictCursor)
        assert isinstance(cursor, extras.RealDictCursor)
        cursor.execute("SELECT id, name FROM author WHERE id = %s", (1,))
        assert cursor.fetchall() == [{"id": 1, "name": "Ada"}]
        with raw.cursor(cursor_factory=extras.NamedTupleCursor) as cursor:
            extras.execute_values(
                cursor, "INSERT INTO author (name) VALUES %s", [("Eve",), ("Fay",)], page_size=1
            )
            cursor.execute("SELECT name FROM author")
            assert [row.name for row in cursor] == ["Ada", "Bob", "Cid", "Eve", "Fay"]
        raw.dbapi_connection.cursor_factory = extras.DictCursor
        with raw.cursor() as cursor:
            cursor.execute("SELECT name FROM author")
            assert cursor.fetchone()["name"] == "Ada"

    def test_session_settings_work_in_isolation(self, raw: Any) -> None:
        dbapi = raw.dbapi_connection
        assert (dbapi.status, dbapi.get_transaction_status()) == (1, 0)
        dbapi.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=False)
        assert (dbapi.isolation_level, dbapi.readonly, dbapi.autocommit) == (
            *("SERIALIZABLE", True),
            False,
        )
        dbapi.cursor().execute("SELECT 1")
        assert (dbapi.status, dbapi.get_transaction_status()) == (2, 2)
        with pytest.raises(exc.InvalidRequestError, match="set_client_encoding"):
            dbapi.set_client_encoding("LATIN1")
        dbapi.set_isolation_level(0)
        assert dbapi.autocommit
        assert dbapi.encoding == "UTF8"
        with dbapi:
            dbapi.readonly = None
            dbapi.cursor().execute("SELECT 1")
        assert not dbapi.closed


class TestPsycopg3:
    @pytest.fixture(autouse=True)
    def only(self, driver: str) -> None:
        if driver != "psycopg":
            pytest.skip("for psycopg 3")

    def test_copy_works_in_isolation(self, engine: OptInEngine, raw: Any) -> None:
        cursor = raw.cursor()
        with cursor.copy("COPY author (name) FROM STDIN") as copy:
            copy.write_row(["Eve"])
            with pytest.raises(exc.InvalidRequestError, match="in the middle of another one"):
                names(engine)
        refused = pytest.raises(engine.dialect.loaded_dbapi.IntegrityError)
        with refused, cursor.copy("COPY author (name) FROM STDIN") as copy:
            copy.write_row(["Ada"])
        assert names(engine) == ["Eve"]
        with cursor.copy("COPY (SELECT name FROM author WHERE id > %s) TO STDOUT", (3,)) as copy:
            assert b"".join(copy) == b"Eve\n"
        sql = "COPY (SELECT generate_series(1, 99999)) TO STDOUT"
        with suppress(KeyError), cursor.copy(sql) as copy:
            assert copy.read_row() == ("1",)
            raise KeyError  # the rest is cancelled
        assert names(engine) == ["Eve"]

    def test_stream_and_row_factories_work_in_isolation(
        self, engine: OptInEngine, raw: Any
    ) -> None:
        rows = importlib.import_module("psycopg.rows")
        cursor = raw.cursor(row_factory=rows.dict_row)
        stream = cursor.stream("SELECT name FROM author WHERE id < %s ORDER BY id", (3,))
        assert next(stream) == {"name": "Ada"}
        assert names(engine) == []
        assert list(stream) == [{"name": "Bob"}]
        raw.dbapi_connection.row_factory = rows.dict_row
        assert raw.dbapi_connection.execute("SELECT 7 AS n").fetchone() == {"n": 7}
        assert raw.dbapi_connection.execute("SELECT 7 AS n", binary=True).fetchall() == [{"n": 7}]
        assert raw.cursor(binary=True).execute("SELECT 7 AS n").fetchone() == {"n": 7}

    def test_cursor_classes_work_in_isolation(self, raw: Any) -> None:
        psycopg = importlib.import_module("psycopg")
        raw.dbapi_connection.cursor_factory = psycopg.ClientCursor
        cursor = raw.cursor()
        assert isinstance(cursor, psycopg.ClientCursor)
        assert cursor.mogrify("SELECT %s", (1,)) == "SELECT 1"
        assert psycopg.sql.Literal("a'b").as_string(cursor) == "'a''b'"
        assert psycopg.sql.Literal("a'b").as_string(raw.dbapi_connection) == "'a''b'"

    def test_settings_of_the_connection_work_in_isolation(self, raw: Any) -> None:
        dbapi = raw.dbapi_connection
        dbapi.set_autocommit(False)
        dbapi.set_read_only(True)
        dbapi.set_deferrable(True)
        dbapi.set_isolation_level(None)
        with pytest.raises(Exception, match="read-only"):
            dbapi.execute("DELETE FROM document")
        assert dbapi.pgconn.transaction_status == 3
        assert not dbapi.broken
        with pytest.raises(KeyError), dbapi:
            raise KeyError
        assert dbapi.closed
        raw.invalidate()
