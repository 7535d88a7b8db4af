"""Reads go elsewhere while a replica is down, and come back when it is up again."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import exc, func, select

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy._core import health
from tests.core.replicas.support import is_on_replica, wait_until
from tests.library import Author, Onlooker, sent
from tests.postgres import ReplicaServer
from tests.wire import WireProxy


def test_reads_go_to_the_next_replica_and_at_last_to_the_primary(
    two: OptInEngine, replica_wires: list[WireProxy], wire: WireProxy
) -> None:
    for one in two.replicas:
        one.dispose(close=True)
    replica_wires[0].close()
    for _ in range(8):
        with OptInSession(two) as session:
            assert is_on_replica(session)
    assert [one.health.is_up for one in two.replicas] == [False, True]
    with OptInSession(two) as session:
        assert is_on_replica(session)
        replica_wires[1].close()
        assert not is_on_replica(session)  # the next one might be behind what it has seen
        with wire.record() as recording:
            assert not is_on_replica(session)
        assert sent(recording) == ["SELECT"]
    assert [one.health.is_up for one in two.replicas] == [False, False]


def test_a_session_keeps_to_the_replica_that_has_stood_in_for_another(
    two: OptInEngine, replica_wires: list[WireProxy]
) -> None:
    """The primary may show later what a synchronous standby shows already."""
    while not all(one.pool.checkedin() for one in two.replicas):  # type: ignore[attr-defined]
        with OptInSession(two) as session:
            assert is_on_replica(session)
    replica_wires[0].close()
    for _ in range(6):
        with OptInSession(two) as session:
            assert [is_on_replica(session) for _ in range(3)] == [True] * 3
    assert [one.health.is_up for one in two.replicas] == [False, True]


def test_a_replica_is_tried_again_after_a_while(
    engine: OptInEngine, replica: ReplicaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RETRY_AFTER", 3600.0)  # longer than a restart can take
    replica.shut_down("immediate")
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    replica.restart()
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    monkeypatch.setattr(health, "RETRY_AFTER", 0.01)
    engine.replicas[0].health.note(up=True)
    engine.replicas[0].health.note(up=False)
    deadline = time.monotonic() + 30
    found = False
    while not found and time.monotonic() < deadline:
        with OptInSession(engine) as session:
            found = is_on_replica(session)
    assert found
    assert engine.replicas[0].health.is_up


def test_only_one_at_a_time_finds_out_whether_a_replica_is_back() -> None:
    one = health.Health()
    one.note(up=False)
    assert not one.may_be_tried()
    one._down_until = time.monotonic()
    assert [one.may_be_tried() for _ in range(3)] == [True, False, False]
    one.note(up=True)
    assert [one.may_be_tried() for _ in range(3)] == [True, True, True]


def test_a_replica_that_dies_between_two_reads_is_no_error(
    session: OptInSession, engine: OptInEngine, replica: ReplicaServer
) -> None:
    assert is_on_replica(session)
    replica.shut_down("immediate")
    assert not is_on_replica(session)
    assert not engine.replicas[0].health.is_up


def test_a_connection_that_is_killed_while_idle_is_replaced(
    session: OptInSession, replica: ReplicaServer, driver: str, database: str
) -> None:
    pid = session.scalars(select(func.pg_backend_pid())).one()
    onlooker = Onlooker(replica.url(driver, database))
    onlooker.kill(pid)
    onlooker.close()
    assert is_on_replica(session)


def test_a_read_that_is_cut_off_raises_and_the_next_one_goes_elsewhere(
    session: OptInSession,
    engine: OptInEngine,
    wire: WireProxy,
    replica_wires: list[WireProxy],
) -> None:
    assert is_on_replica(session)
    replica_wires[0].before_forward = lambda message: (
        replica_wires[0].cut_all() if message.is_statement else None
    )
    with wire.record() as recording, pytest.raises(exc.DBAPIError) as caught:
        session.scalars(select(Author)).all()
    assert caught.value.connection_invalidated
    assert sent(recording) == []  # it is not sent twice
    assert not engine.replicas[0].health.is_up
    assert not is_on_replica(session)


def test_threads_go_on_while_a_replica_dies_and_comes_back(
    two: OptInEngine, replica: ReplicaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "RETRY_AFTER", 0.05)
    stop = threading.Event()
    places: list[bool] = []
    errors: list[Exception] = []

    def work() -> None:
        while not stop.is_set():
            try:
                with OptInSession(two) as session:
                    places.append(is_on_replica(session))
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: places[-50:].count(True) == 50)
        replica.shut_down("immediate")
        wait_until(lambda: places[-50:].count(False) == 50)
        replica.restart()
        wait_until(lambda: places[-50:].count(True) == 50)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # Those whose SELECT was under way when the server died, or about to be sent: its place to go is
    # known by then, and a new connection to there is refused.
    assert [one for one in errors if not isinstance(one, exc.OperationalError)] == []
    assert len(errors) <= len(threads) * len(two.replicas)
