"""A real gunicorn whose clients go away half way through a stream: nothing is left in use."""

from __future__ import annotations

import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import pytest

from tests.deploy.running import (
    KINDS,
    PATIENCE,
    Serve,
    Served,
    needs_gunicorn,
    skip_what_blocks,
    wait_for,
)
from tests.library import Onlooker

pytestmark = [needs_gunicorn, pytest.mark.slow]

CLIENTS = 200
AT_ONCE = 20

# Fewer than the pool has connections.
LEFT = 10

AT_REST = {"open": 0, "checked_out": 0, "transactions": 0, "sessions": 0}

# Closing then sends a reset, and does not wait for what was not read.
NO_LINGER = struct.pack("ii", 1, 0)

IDLE_IN_TRANSACTION = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND state LIKE 'idle in transaction%'"
)

STREAMS = ["events", "events_given_back", "query", "query_in_block", "block"]

# Where the stream gets its application context.
PLACES = ["with-context", "own-context", "begun-in-view"]


@pytest.fixture
def lines(onlooker: Onlooker) -> Onlooker:
    """The tables of :mod:`.streamed`, and its lines."""
    onlooker.run("CREATE TABLE line (id integer PRIMARY KEY, text text NOT NULL)")
    onlooker.run("CREATE TABLE visit (id serial PRIMARY KEY)")
    onlooker.run("SELECT setval('visit_id_seq', 100000)")
    onlooker.run("INSERT INTO line SELECT n, 'line ' || n FROM generate_series(1, 1000) n")
    return onlooker


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest, driver: str) -> dict[str, Any]:
    """What is served by threads, and by greenlets."""
    settings: dict[str, Any] = request.param
    skip_what_blocks(settings, driver)
    return {**settings, "threads": AT_ONCE, "app": "tests.deploy.streamed:app"}


def leave_half_way(served: Served, path: str) -> None:
    """Read the beginning of an answer, and go away."""
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        client.connect(("127.0.0.1", served.port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while b"data: " not in received:
            part = client.recv(4096)
            assert part, served.log.read_text()
            received += part
        assert b" 200 OK" in received, received[:1000]


def all_leave_half_way(served: Served, paths: list[str], clients: int = CLIENTS) -> None:
    """Have clients take turns at the paths, and go away."""
    with ThreadPoolExecutor(AT_ONCE) as executor:
        asked = islice(cycle(paths), clients)
        for _ in executor.map(lambda path: leave_half_way(served, path), asked):
            pass


def state(served: Served) -> dict[str, int]:
    said: dict[str, int] = served.ask("/state")
    return said


def assert_nothing_is_in_use(
    served: Served, lines: Onlooker, opened: int = CLIENTS, quiet: bool = True
) -> None:
    """Wait until all streams have ended, and check that they have left nothing.

    :param opened: How many streams there were.
    :param quiet: Whether nothing was logged as an error.
    """
    wait_for(lambda: state(served)["open"] == 0)
    # The counter is the innermost block of the stream; its session is removed after it.
    wait_for(lambda: state(served)["sessions"] == 0)
    assert state(served) == {"opened": opened, **AT_REST}
    assert lines.scalar(IDLE_IN_TRANSACTION) == 0
    if quiet:
        assert "Traceback" not in served.log.read_text()


def assert_own_data(served: Served, lines: Onlooker) -> None:
    """Check that each request gets its own data, and stores its own."""
    numbers = range(1, CLIENTS + 1)
    with ThreadPoolExecutor(AT_ONCE) as executor:
        answers = list(executor.map(lambda number: served.ask(f"/own/{number}"), numbers))
    for number, answer in zip(numbers, answers, strict=True):
        right = {"text": f"line {number}", "is_new": True, "is_clean": True, "same": True}
        assert answer == right, number
    assert lines.column("SELECT id FROM visit ORDER BY id") == list(numbers)
    assert lines.scalar("SELECT count(*) FROM line WHERE text <> 'line ' || id") == 0
    lines.run("DELETE FROM visit")


def assert_the_next_are_right(served: Served, lines: Onlooker) -> None:
    assert_own_data(served, lines)
    wait_for(lambda: state(served)["sessions"] == 0)
    assert {**state(served), "opened": 0} == {"opened": 0, **AT_REST}


@pytest.mark.parametrize("stream", STREAMS)
def test_clients_that_leave_half_way_leave_nothing_in_use(
    stream: str, settings: dict[str, Any], serve: Serve, lines: Onlooker
) -> None:
    served = serve(**settings)
    all_leave_half_way(served, [f"/{place}/{stream}" for place in PLACES])
    assert_nothing_is_in_use(served, lines)
    assert_the_next_are_right(served, lines)


def test_a_stream_that_waits_for_a_service_holds_nothing(
    settings: dict[str, Any], serve: Serve, lines: Onlooker
) -> None:
    served = serve(**{**settings, "threads": AT_ONCE + 1})
    all_leave_half_way(served, ["/with-context/service"], AT_ONCE)
    # Nobody has told the generators that their clients are gone.
    said = state(served)
    assert (said["open"], said["checked_out"], said["transactions"]) == (AT_ONCE, 0, 0)
    served.ask("/go-on")
    assert_nothing_is_in_use(served, lines, AT_ONCE)


@pytest.mark.parametrize("stream", ["query", "block"])
def test_a_context_that_a_stream_leaves_behind_is_not_that_of_the_next_request(
    stream: str, settings: dict[str, Any], serve: Serve, lines: Onlooker
) -> None:
    """Nobody closes these streams, until the garbage collector does: see docs/streaming.md."""
    served = serve(**{**settings, "app": "tests.deploy.streamed:separated"})
    all_leave_half_way(served, [f"/left/{stream}"], LEFT)
    wait_for(lambda: state(served)["opened"] == LEFT)
    assert_own_data(served, lines)
    served.ask("/collect")
    assert_nothing_is_in_use(served, lines, LEFT, quiet=False)
    assert_the_next_are_right(served, lines)
