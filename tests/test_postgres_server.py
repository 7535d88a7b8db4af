"""The embedded server: what it gives to the tests, and that nothing of it stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from tests.postgres import PostgresServer, server_from_environment

pytestmark = pytest.mark.slow

#: Starts a server and says where; then it waits to be ended, by this or that.
_SCRIPT = """
import signal, sys, time
from tests.postgres import PostgresServer
# What runs in the background of a shell is started without it.
signal.signal(signal.SIGINT, signal.default_int_handler)
server = PostgresServer.start(18)
print(server.log.parent, server.port, flush=True)
{then}
"""


def scalar(url: str, sql: str) -> object:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            result = connection.execute(text(sql))
            return result.scalar() if result.returns_rows else None
    finally:
        engine.dispose()


@pytest.mark.parametrize("version", [16, 18])
def test_a_server_of_the_wanted_version_starts(version: int, driver: str) -> None:
    with PostgresServer.start(version) as server:
        assert server.version == version
        number = scalar(server.url(driver), "SELECT current_setting('server_version_num')::int")
        assert isinstance(number, int)
        assert number // 10000 == version
        for name, value in {
            "fsync": "off",
            "max_connections": "300",
            "max_prepared_transactions": "20",
        }.items():
            assert scalar(server.url(driver), f"SHOW {name}") == value
    with pytest.raises(OperationalError):
        scalar(server.url(driver), "SELECT 1")


def test_a_version_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="choose 16 or 18"):
        PostgresServer.start(9)


def test_several_servers_run_side_by_side(driver: str) -> None:
    with PostgresServer.start() as first, PostgresServer.start() as second:
        assert first.port != second.port
        name = first.create_database()
        with pytest.raises(OperationalError, match="does not exist"):
            scalar(second.url(driver, name), "SELECT 1")


def test_a_restarted_server_keeps_its_address_and_data(driver: str) -> None:
    with PostgresServer.start() as server:
        assert server.can_restart
        url = server.url(driver, server.create_database())
        scalar(url, "CREATE TABLE t AS SELECT 1")
        for mode in ("fast", "immediate"):
            server.restart(mode)
            assert scalar(url, "SELECT count(*) FROM t") == 1


@pytest.mark.parametrize("version", [16, 18])
def test_a_replica_follows_stands_still_and_comes_back(version: int, driver: str) -> None:
    with PostgresServer.start(version) as primary, primary.start_replica() as replica:
        name = primary.create_database()
        url, copy = primary.url(driver, name), replica.url(driver, name)
        scalar(url, "CREATE TABLE t AS SELECT 1 AS x")
        replica.catch_up()
        assert scalar(copy, "SELECT pg_is_in_recovery()") is True
        assert scalar(copy, "SELECT count(*) FROM t") == 1
        replica.pause_replay()
        scalar(url, "INSERT INTO t VALUES (2)")
        assert scalar(copy, "SELECT count(*) FROM t") == 1
        replica.resume_replay()
        replica.catch_up()
        assert scalar(copy, "SELECT count(*) FROM t") == 2
        replica.shut_down("immediate")
        assert not replica.is_running
        with pytest.raises(OperationalError):
            scalar(copy, "SELECT 1")
        scalar(url, "INSERT INTO t VALUES (3)")
        replica.restart()
        assert replica.is_running
        replica.catch_up()
        assert scalar(copy, "SELECT count(*) FROM t") == 3


def test_a_new_database_is_empty_and_gone_when_dropped(server: PostgresServer, driver: str) -> None:
    name = server.create_database()
    url = server.url(driver, name)
    engine = create_engine(url)
    with engine.connect() as connection:  # A transaction that is open does not keep it.
        assert (
            connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))
            == 0
        )
        server.drop_database(name)
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
    engine.dispose()
    with pytest.raises(OperationalError, match="does not exist"):
        scalar(url, "SELECT 1")
    server.drop_database(name)  # It is gone already, as it is when a test has dropped it.


def test_a_reset_database_is_as_empty_as_a_new_one(server: PostgresServer, driver: str) -> None:
    name = server.create_database()
    url = server.url(driver, name)
    scalar(url, "CREATE SCHEMA other")
    scalar(url, "CREATE TABLE t (x int)")
    scalar(url, "CREATE TABLE other.t (x int)")
    scalar(url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'")
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(text("LOCK TABLE t"))
        server.reset_database(name)
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
    engine.dispose()
    schemas = (
        "SELECT string_agg(nspname, ' ') FROM pg_namespace WHERE nspname !~ '^pg_|^information'"
    )
    assert scalar(url, schemas) == "public"
    assert scalar(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
    assert scalar(url, "SHOW default_transaction_isolation") == "read committed"
    scalar(url, "CREATE TABLE t (x int)")
    server.drop_database(name)


def test_prepared_transactions_do_not_outlive_a_reset(server: PostgresServer, driver: str) -> None:
    name = server.create_database()
    url = server.url(driver, name)
    if scalar(url, "SHOW max_prepared_transactions") == "0":
        server.drop_database(name)
        pytest.skip("the server of DATABASE_URL allows no prepared transactions")
    for clean_up in (server.reset_database, server.drop_database):
        engine = create_engine(url)
        with engine.connect() as connection:
            connection.execute(text("CREATE TABLE t (x int)"))
            connection.execute(text(f"PREPARE TRANSACTION 'of {name}'"))
        engine.dispose()
        clean_up(name)


def test_a_url_names_driver_and_database() -> None:
    server = PostgresServer("postgresql://me:secr%40t@db.example:5433/main?sslmode=require")
    url = make_url(server.url("psycopg", "bank"))
    assert url.drivername == "postgresql+psycopg"
    assert (url.username, url.password, url.database) == ("me", "secr@t", "bank")
    assert (server.host, server.port) == (url.host, url.port) == ("db.example", 5433)
    assert url.query["sslmode"] == "require"


def test_the_server_of_the_environment_is_used_and_left_alone(
    server: PostgresServer, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", server.url(driver))
    with server_from_environment() as same:
        assert (same.host, same.port, same.version) == (server.host, server.port, server.version)
        assert not same.can_restart
        with pytest.raises(NotImplementedError, match="unset DATABASE_URL"):
            same.restart()
        with pytest.raises(NotImplementedError, match="unset DATABASE_URL"):
            same.shut_down()
        with pytest.raises(NotImplementedError, match="unset DATABASE_URL"):
            same.start_replica()
        name = same.create_database()
        assert scalar(same.url(driver, name), "SELECT 1") == 1
        same.drop_database(name)
    assert scalar(server.url(driver), "SELECT 1") == 1


@pytest.mark.parametrize("end", ["exit", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_stays_behind_however_the_process_ends(end: str) -> None:
    then = "" if end == "exit" else "time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(then=then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    directory, port = process.stdout.readline().split()
    if end != "exit":
        process.send_signal(signal.Signals[end])
    process.communicate()
    assert (process.returncode == 0) is (end == "exit")
    if end == "exit":
        assert not Path(directory).exists()  # An orderly end waits for the cleaning.
    while Path(directory).exists():
        time.sleep(0.01)
    with pytest.raises(OperationalError):
        scalar(f"postgresql://postgres@127.0.0.1:{port}/postgres", "SELECT 1")
