"""A real gunicorn: threads, greenlets, and an app that was loaded before the fork."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.deploy.running import (
    KINDS,
    PATIENCE,
    Serve,
    needs_gunicorn,
    skip_what_blocks,
    wait_for,
)
from tests.library import Onlooker

pytestmark = needs_gunicorn

REQUESTS = 10


def waiting(onlooker: Onlooker) -> int:
    return int(onlooker.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"))


@pytest.mark.parametrize("worker_class", ["gthread", "gevent"])
def test_no_connection_crosses_the_fork(
    worker_class: str, serve: Serve, onlooker: Onlooker
) -> None:
    served = serve(uses_database=True, worker_class=worker_class, workers=2, preload=True)
    by_process: dict[int, set[int]] = {}
    parents: set[int] = set()

    def both_have_answered() -> bool:
        with ThreadPoolExecutor(REQUESTS) as clients:
            for answer in clients.map(lambda _: served.ask("/pids"), range(REQUESTS)):
                by_process.setdefault(answer["process"], set()).update(answer["own"])
                parents.update(answer["parents"])
        return len(by_process) == 2

    wait_for(both_have_answered)
    one, other = by_process.values()
    assert not one & other
    assert not (one | other) & parents
    assert served.process.pid not in by_process
    # Nobody has ended the parent's own connections, which it keeps as they were.
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids) AND state = 'idle'"
    assert onlooker.scalar(alive, pids=list(parents)) == len(parents) > 0


@pytest.mark.parametrize("settings", KINDS)
def test_requests_wait_without_a_transaction_and_without_each_other(
    settings: dict[str, Any], serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    onlooker.run("SELECT pg_advisory_lock(1)")
    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = [clients.submit(served.ask, "/wait-outside") for _ in range(REQUESTS)]
        wait_for(lambda: waiting(onlooker) == REQUESTS)
        assert served.ask("/pids")["own"]  # while all of them wait
        inside = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        assert onlooker.scalar(inside) == 0
        onlooker.run("SELECT pg_advisory_unlock(1)")
        for answer in answers:
            assert answer.result(PATIENCE) == {"before": 7, "transactions": 0}


@pytest.mark.parametrize("settings", KINDS)
def test_transactions_at_the_same_time_do_not_mix(
    settings: dict[str, Any], serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    numbers = range(100, 100 + REQUESTS)
    onlooker.run("SELECT pg_advisory_lock(1)")
    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = [
            clients.submit(served.ask, f"/wait-inside/{number}", "POST") for number in numbers
        ]
        wait_for(lambda: waiting(onlooker) == REQUESTS)
        assert onlooker.scalar("SELECT count(*) FROM counted") == 1
        onlooker.run("SELECT pg_advisory_unlock(1)")
        said = [answer.result(PATIENCE) for answer in answers]
    for number, one in zip(numbers, said, strict=True):
        assert number in one["own"]
        assert one["pids"][0] == one["pids"][1]
    assert len({one["pids"][0] for one in said}) == REQUESTS
    assert len({one["session"] for one in said}) == REQUESTS
    assert max(one["transactions"] for one in said) == REQUESTS
    stored = onlooker.column("SELECT id FROM counted WHERE id >= 100 ORDER BY id")
    assert stored == [number for number in numbers if number % 2 == 0]


def test_a_greenlet_that_gives_up_leaves_no_transaction(
    serve: Serve, onlooker: Onlooker, driver: str
) -> None:
    settings = {"worker_class": "gevent"}
    skip_what_blocks(settings, driver)
    served = serve(**settings)
    onlooker.run("SELECT pg_advisory_lock(1)")
    assert served.ask("/timeout") == {"given_up": 2, "number": 7}
    onlooker.run("SELECT pg_advisory_unlock(1)")
    wait_for(
        lambda: (
            onlooker.scalar(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND state <> 'idle'"
            )
            == 0
        )
    )
    assert served.ask("/pids")["own"]
