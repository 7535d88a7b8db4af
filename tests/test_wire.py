"""The proxy itself: it records what the drivers send, and changes nothing that they get."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.postgres import PostgresServer
from tests.wire import Message, Recording, WireProxy

Connect = Callable[[], Any]


@pytest.fixture
def connect(driver: str, wire_url: str) -> Iterator[Connect]:
    """Open a connection of the plain driver through the proxy, in autocommit."""
    module = import_module(driver)
    target = make_url(wire_url)
    options = {**target.translate_connect_args(username="user", database="dbname"), **target.query}
    made: list[Any] = []

    def connect() -> Any:
        connection = module.connect(**options)
        connection.autocommit = True
        made.append(connection)
        return connection

    yield connect
    for connection in made:
        connection.close()


def rows(connection: Any, sql: str, *parameters: object) -> list[Any]:
    cursor = connection.cursor()
    cursor.execute(sql, parameters or None)
    return list(cursor.fetchall()) if cursor.description else []


def error_class(driver: str) -> type[Exception]:
    found: type[Exception] = import_module(driver).Error
    return found


def needs(driver: str, wanted: str) -> None:
    if driver != wanted:
        pytest.skip(f"only {wanted} does this")


def test_a_statement_is_recorded_once_and_is_one_round_trip(
    wire: WireProxy, connect: Connect
) -> None:
    connection = connect()
    with wire.record() as recording:
        assert rows(connection, "SELECT 1\n  AS   one") == [(1,)]
    assert recording.statements == ["SELECT 1 AS one"]
    assert recording.verbs == ["SELECT"]
    assert recording.round_trips == 1


def test_a_statement_with_parameters_is_one_round_trip(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    connection = connect()
    with wire.record() as recording:
        assert rows(connection, "SELECT %s + 1", 41) == [(42,)]
    # psycopg2 writes the parameters into the text, psycopg 3 sends them beside it.
    assert recording.statements == ["SELECT 41 + 1" if driver == "psycopg2" else "SELECT $1 + 1"]
    assert recording.round_trips == 1


def test_a_prepared_statement_shows_the_text_it_was_prepared_from(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    needs(driver, "psycopg")
    connection = connect()
    recordings: list[Recording] = []
    for number in range(8):
        with wire.record() as recording:
            assert rows(connection, "SELECT %s::int", number) == [(number,)]
        recordings.append(recording)
    assert [recording.statements for recording in recordings] == [["SELECT $1::int"]] * 8
    # The sixth execution prepares it first.
    assert [recording.round_trips for recording in recordings] == [1, 1, 1, 1, 1, 2, 1, 1]
    assert "Parse" not in [message.name for message in recordings[-1].messages]


def test_a_pipeline_is_one_round_trip(wire: WireProxy, connect: Connect, driver: str) -> None:
    needs(driver, "psycopg")
    connection = connect()
    with wire.record() as recording, connection.pipeline():
        for number in range(10):
            connection.execute("SELECT %s::int", (number,))
    assert recording.verbs == ["SELECT"] * 10
    assert recording.round_trips == 1


def test_a_flush_in_a_pipeline_is_a_round_trip(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    needs(driver, "psycopg")
    connection = connect()
    with wire.record() as recording, connection.pipeline():
        assert connection.execute("SELECT %s::int", (1,)).fetchone() == (1,)
    assert [m.name for m in recording.messages if m.waits] == ["Flush", "Sync"]
    wire.quiesce()


def test_a_transaction_shows_its_begin_and_its_end(wire: WireProxy, wire_url: str) -> None:
    engine = create_engine(wire_url)
    with engine.connect():
        pass  # SQLAlchemy asks the server about itself once.
    with wire.record() as recording:
        with engine.begin() as connection:
            connection.execute(text("SELECT 1"))
            with connection.begin_nested():
                connection.execute(text("SELECT 2"))
            savepoint = connection.begin_nested()
            savepoint.rollback()
        with engine.connect() as connection:
            connection.execute(text("SELECT 3"))
    engine.dispose()
    assert recording.verbs == [
        "BEGIN", "SELECT", "SAVEPOINT", "SELECT", "RELEASE", "SAVEPOINT", "ROLLBACK TO", "COMMIT",
        "BEGIN", "SELECT", "ROLLBACK",
    ]  # fmt: skip
    assert recording.round_trips == len(recording.verbs)


@pytest.mark.parametrize(
    ("sql", "verb"),
    [
        ("select 1", "SELECT"),
        ("  ( SELECT 1 ) UNION SELECT 2", "SELECT"),
        ("-- a comment\nSELECT 1", "SELECT"),
        ("/* a\ncomment */ UPDATE t SET x = 1", "UPDATE"),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY", "BEGIN"),
        ("BEGIN;", "BEGIN"),
        ("ROLLBACK", "ROLLBACK"),
        ("ROLLBACK TO SAVEPOINT s", "ROLLBACK TO"),
        ("rollback work to s", "ROLLBACK TO"),
        ("COMMIT PREPARED 'x'", "COMMIT PREPARED"),
        ("SET TRANSACTION READ ONLY", "SET"),
        ("", ""),
    ],
)
def test_the_verb_is_the_first_word(sql: str, verb: str) -> None:
    assert Message(0.0, 1, 1, "frontend", "Query", sql, True).verb == verb


def test_only_the_block_is_recorded(wire: WireProxy, connect: Connect) -> None:
    connection = connect()
    rows(connection, "SELECT 'before'")
    with wire.record() as outer:
        rows(connection, "SELECT 'outer'")
        with wire.record() as inner:
            rows(connection, "SELECT 'inner'")
        rows(connection, "SELECT 'outer again'")
    rows(connection, "SELECT 'after'")
    assert inner.statements == ["SELECT 'inner'"]
    assert outer.statements == ["SELECT 'outer'", "SELECT 'inner'", "SELECT 'outer again'"]


def test_the_start_and_the_end_of_a_connection_are_no_round_trips(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    with wire.record() as recording:
        connect().close()
    names = [message.name for message in recording.messages if message.sender == "frontend"]
    assert names[0] == "StartupMessage"
    assert names[-1] == "Terminate"
    assert recording.statements == []
    assert recording.round_trips == 0


def test_messages_tell_the_connection_and_its_backend(wire: WireProxy, connect: Connect) -> None:
    first, second = connect(), connect()
    with wire.record() as recording:
        [(pid_of_first,)] = rows(first, "SELECT pg_backend_pid()")
        [(pid_of_second,)] = rows(second, "SELECT pg_backend_pid()")
    statements = [message for message in recording.messages if message.is_statement]
    assert [message.pid for message in statements] == [pid_of_first, pid_of_second]
    assert statements[0].connection < statements[1].connection


def test_answers_are_recorded(wire: WireProxy, connect: Connect, driver: str) -> None:
    connection = connect()
    with wire.record() as recording:
        rows(connection, "BEGIN")
        with pytest.raises(error_class(driver)):
            rows(connection, "SELECT 1 / 0")
        rows(connection, "ROLLBACK")
    answers = [(m.name, m.text) for m in recording.messages if m.sender == "backend"]
    assert answers == [
        ("CommandComplete", "BEGIN"),
        ("ReadyForQuery", "T"),
        ("ErrorResponse", "22012 division by zero"),
        ("ReadyForQuery", "E"),
        ("CommandComplete", "ROLLBACK"),
        ("ReadyForQuery", "I"),
    ]


def test_open_transactions_are_counted(wire: WireProxy, connect: Connect, driver: str) -> None:
    connection, other = connect(), connect()
    assert wire.transactions_open == 0
    rows(connection, "BEGIN")
    assert wire.transactions_open == 1
    rows(other, "BEGIN")
    with pytest.raises(error_class(driver)):
        rows(other, "SELECT 1 / 0")
    assert wire.transactions_open == 2
    rows(connection, "COMMIT")
    rows(other, "ROLLBACK")
    assert wire.transactions_open == 0


def test_time_between_statements_of_a_transaction_is_idle_in_transaction(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    connection = connect()
    with wire.record() as recording:
        rows(connection, "BEGIN")
        time.sleep(0.05)
        with pytest.raises(error_class(driver)):
            rows(connection, "SELECT 1 / 0")
        time.sleep(0.05)
        rows(connection, "ROLLBACK")
    assert recording.idle_in_transaction >= 0.1


def test_time_outside_a_transaction_is_not_idle_in_transaction(
    wire: WireProxy, connect: Connect
) -> None:
    connection = connect()
    with wire.record() as recording:
        rows(connection, "SELECT 1")
        time.sleep(0.01)
        rows(connection, "SELECT 2")
    assert recording.idle_in_transaction == 0.0


def test_time_in_which_the_server_works_is_not_idle_in_transaction(
    wire: WireProxy, connect: Connect
) -> None:
    connection = connect()
    with wire.record() as recording:
        rows(connection, "BEGIN; SELECT pg_sleep(0.5); COMMIT")
    assert recording.idle_in_transaction == 0.0


def test_only_idle_time_of_the_block_counts(wire: WireProxy, connect: Connect) -> None:
    connection = connect()
    rows(connection, "BEGIN")
    before = time.monotonic()
    time.sleep(0.05)
    with wire.record() as recording:
        started = time.monotonic()
        time.sleep(0.05)
    ended = time.monotonic()
    rows(connection, "COMMIT")
    assert 0.05 <= recording.idle_in_transaction <= ended - before - 0.05
    assert recording.started <= started


def test_a_closed_connection_is_no_longer_counted(wire: WireProxy, connect: Connect) -> None:
    before = wire.connections
    connections = [connect() for _ in range(5)]
    assert wire.connections == before + 5
    for connection in connections:
        connection.close()
    wire.quiesce()
    assert wire.connections == before


def test_a_client_that_vanishes_takes_its_backend_with_it(
    wire: WireProxy, connect: Connect, server: PostgresServer, url: str
) -> None:
    connection = connect()
    before = wire.connections
    rows(connection, "BEGIN")
    [(pid,)] = rows(connection, "SELECT pg_backend_pid()")
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    wire.quiesce()
    assert wire.connections == before - 1
    assert wire.transactions_open == 0
    wait_for_end(url, pid)


def test_a_killed_backend_is_seen_by_the_client(
    wire: WireProxy, connect: Connect, driver: str, url: str
) -> None:
    connection = connect()
    before = wire.connections
    [(pid,)] = rows(connection, "SELECT pg_backend_pid()")
    with wire.record() as recording:
        engine = create_engine(url)
        with engine.begin() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        engine.dispose()
        wire.quiesce()
        with pytest.raises(error_class(driver)):
            rows(connection, "SELECT 1")
    assert [m.text[:5] for m in recording.messages if m.name == "ErrorResponse"] == ["57P01"]
    assert wire.connections == before - 1


def test_named_cursors_work(wire: WireProxy, connect: Connect, driver: str) -> None:
    connection = connect()
    connection.autocommit = False
    with wire.record() as recording:
        cursor = connection.cursor("a_name")
        cursor.itersize = 400
        cursor.execute("SELECT generate_series(1, 1000)")
        assert sum(row[0] for row in cursor) == 500500
        cursor.close()
    connection.rollback()
    # psycopg2 fetches once more after the last row; psycopg 3 looks for the cursor to close it.
    fetches = recording.verbs[2:-1]
    assert recording.verbs == ["BEGIN", "DECLARE", *fetches, "CLOSE"]
    assert fetches.count("FETCH") in (3, 4)


def test_copy_passes_both_ways(wire: WireProxy, connect: Connect, driver: str) -> None:
    connection = connect()
    rows(connection, "CREATE TABLE t (x int, y text)")
    data = "".join(f"{number}\t{'y' * 100}\n" for number in range(20_000))
    with wire.record() as copy_in:
        copy_from(connection, driver, "COPY t FROM STDIN", data)
    assert copy_in.statements == ["COPY t FROM STDIN"]
    assert copy_in.round_trips == 2  # One until the server asks for the data, one at its end.
    with wire.record() as copy_out:
        assert copy_to(connection, driver, "COPY t TO STDOUT") == data
    assert copy_out.round_trips == 1
    wire.quiesce()


def test_big_values_pass_both_ways(wire: WireProxy, connect: Connect) -> None:
    value = "å" * 5_000_000
    with wire.record() as recording:
        assert rows(connect(), "SELECT %s::text", value) == [(value,)]
    assert recording.round_trips == 1


def test_many_rows_pass(wire: WireProxy, connect: Connect) -> None:
    with wire.record() as recording:
        sql = "SELECT n, repeat('x', mod(n, 300)) FROM generate_series(1, 100000) n"
        result = rows(connect(), sql)
    assert sum(len(value) for _, value in result) == sum(n % 300 for n in range(1, 100_001))
    assert recording.round_trips == 1


def test_many_connections_at_once_are_all_recorded(wire: WireProxy, connect: Connect) -> None:
    connections = [connect() for _ in range(60)]

    def ask(number: int) -> list[Any]:
        return [rows(connections[number], f"SELECT {number}, {turn}") for turn in range(10)]

    with wire.record() as recording, ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(ask, range(60)))
    assert answers == [[[(number, turn)] for turn in range(10)] for number in range(60)]
    assert sorted(recording.statements) == sorted(
        f"SELECT {number}, {turn}" for number in range(60) for turn in range(10)
    )
    assert recording.round_trips == 600
    assert len({message.connection for message in recording.messages}) == 60


def test_recording_does_not_wait_for_a_busy_server(wire: WireProxy, connect: Connect) -> None:
    connection, other = connect(), connect()
    rows(connection, "SELECT pg_advisory_lock(1)")
    sent = threading.Event()

    def notice(message: Message) -> None:
        if "lock" in message.text:
            sent.set()

    wire.before_forward = notice
    thread = threading.Thread(target=rows, args=(other, "SELECT pg_advisory_lock(1)"))
    with wire.record() as recording:
        thread.start()
        sent.wait()
    with pytest.raises(TimeoutError, match="not quiet"):
        wire.quiesce(timeout=0.01)
    rows(connection, "SELECT pg_advisory_unlock(1)")
    thread.join()
    wire.quiesce()
    assert recording.verbs == ["SELECT"]


def test_cut_all_closes_every_connection(wire: WireProxy, connect: Connect, driver: str) -> None:
    first, second = connect(), connect()
    wire.cut_all()
    assert wire.connections == 0
    for connection in (first, second):
        with pytest.raises(error_class(driver)):
            rows(connection, "SELECT 1")
    assert rows(connect(), "SELECT 1") == [(1,)]


def test_a_connection_cut_before_its_commit_has_not_committed(
    wire: WireProxy, connect: Connect, driver: str
) -> None:
    connection = connect()
    rows(connection, "CREATE TABLE t (x int)")
    rows(connection, "BEGIN")
    rows(connection, "INSERT INTO t VALUES (1)")

    def cut(message: Message) -> None:
        if message.verb == "COMMIT":
            wire.cut_all()

    wire.before_forward = cut
    with wire.record() as recording, pytest.raises(error_class(driver)):
        rows(connection, "COMMIT")
    wire.before_forward = None
    assert recording.verbs == ["COMMIT"]
    assert rows(connect(), "SELECT count(*) FROM t") == [(0,)]


def test_delay_is_added_each_way(wire: WireProxy, connect: Connect) -> None:
    connection = connect()
    wire.delay = 0.02
    started = time.monotonic()
    rows(connection, "SELECT 1")
    assert time.monotonic() - started >= 0.04


def test_a_cancel_request_is_passed_on(wire: WireProxy, connect: Connect, driver: str) -> None:
    needs(driver, "psycopg")  # psycopg2's cancel() does not let the proxy's threads run.
    connection = connect()
    if not hasattr(connection, "cancel_safe"):
        pytest.skip("new in psycopg 3.2: before, cancel() does not let them run either")
    running = threading.Event()

    def notice(message: Message) -> None:
        if message.is_statement:
            running.set()

    def cancel() -> None:
        running.wait()
        deadline = time.monotonic() + 30
        # A cancel request that is there before its statement cancels nothing.
        while thread.is_alive() and time.monotonic() < deadline:
            connection.cancel_safe()
            time.sleep(0.01)

    def sleep() -> None:
        with pytest.raises(error_class(driver), match="user request"):
            rows(connection, "SELECT pg_sleep(60)")

    wire.before_forward = notice
    thread = threading.Thread(target=sleep)
    thread.start()
    cancel()
    thread.join()
    assert rows(connection, "SELECT 1") == [(1,)]


def test_a_request_for_encryption_is_declined(wire: WireProxy, url: str) -> None:
    plain = make_url(url).set(host=wire.host, port=wire.port)
    for mode in ("prefer", "allow"):
        engine = create_engine(plain.update_query_dict({"sslmode": mode}))
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1
        engine.dispose()


def test_the_url_differs_only_in_its_address(wire: WireProxy) -> None:
    url = make_url(wire.url("postgresql+psycopg://me:secr%40t@db.example/bank?application_name=x"))
    assert url.drivername == "postgresql+psycopg"
    assert (url.username, url.password, url.database) == ("me", "secr@t", "bank")
    assert (url.host, url.port) == (wire.host, wire.port)
    assert url.query["application_name"] == "x"


def test_a_server_that_is_down_closes_the_client(driver: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with WireProxy("127.0.0.1", unused.getsockname()[1]) as proxy:
            with pytest.raises(error_class(driver)):
                import_module(driver).connect(host=proxy.host, port=proxy.port, user="postgres")
            assert proxy.connections == 0


def test_a_closed_proxy_leaves_no_thread(server: PostgresServer, driver: str) -> None:
    before = set(threading.enumerate())
    with WireProxy(server.host, server.port) as proxy:
        engine = create_engine(proxy.url(server.url(driver)))
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            connection.detach()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    proxy.close()
    engine.dispose()


def wait_for_end(url: str, pid: int) -> None:
    """Wait until a backend has ended; the test's own time limit is the only one."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        alive = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        while connection.scalar(alive, {"pid": pid}):
            time.sleep(0.005)
    engine.dispose()


def copy_from(connection: Any, driver: str, sql: str, data: str) -> None:
    cursor = connection.cursor()
    if driver == "psycopg2":
        cursor.copy_expert(sql, io.StringIO(data))
    else:
        with cursor.copy(sql) as copy:
            copy.write(data)


def copy_to(connection: Any, driver: str, sql: str) -> str:
    cursor = connection.cursor()
    if driver == "psycopg2":
        target = io.StringIO()
        cursor.copy_expert(sql, target)
        return target.getvalue()
    with cursor.copy(sql) as copy:
        return b"".join(copy).decode()
