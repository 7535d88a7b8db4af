"""Tasks in real workers: processes of their own, with children or with threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from celery import chain, states
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from tests.celery.conftest import Worker, wait_for
from tests.wire import WireProxy

MakeWorker = Callable[..., Any]


@pytest.fixture(scope="module")
def workers(make_worker: MakeWorker) -> Iterator[Callable[[str], Worker]]:
    """``workers(pool)``: one for each pool, started when it is needed first."""
    running: dict[str, Worker] = {}
    with ExitStack() as stack:

        def get(pool: str) -> Worker:
            if pool not in running:
                running[pool] = stack.enter_context(make_worker(pool))
            return running[pool]

        yield get
        for worker in running.values():
            worker.process.terminate()  # it takes them seconds: all at the same time


def at_rest(worker: Worker) -> Iterator[Worker]:
    """A worker whose tables are empty, and who has no transaction open in the end."""
    worker.database.run("TRUNCATE item, seat RESTART IDENTITY")
    yield worker
    assert worker.states() <= {"idle"}


@pytest.fixture(params=["prefork", "threads", "gevent"])
def worker(request: pytest.FixtureRequest, workers: Callable[[str], Worker]) -> Iterator[Worker]:
    if request.param == "gevent":
        pytest.importorskip("gevent", reason="gevent is not installed")
    yield from at_rest(workers(request.param))


@pytest.fixture
def prefork(workers: Callable[[str], Worker]) -> Iterator[Worker]:
    yield from at_rest(workers("prefork"))


def test_a_read_is_one_statement(worker: Worker, wire: WireProxy) -> None:
    # At the same time, so that each process has made its first connection.
    for result in [worker.send("meet", name, 2) for name in ("a", "b")]:
        worker.result(result)
    with wire.record() as recording:
        assert worker.run("read", 1) in ("a", "b")
    assert recording.verbs == ["SELECT"]
    assert recording.idle_in_transaction == 0


def test_an_atomic_task_is_committed(worker: Worker, wire: WireProxy) -> None:
    assert worker.run("write_atomically", "a") == "a"
    with wire.record() as recording:
        assert worker.run("write_atomically", "b") == "b"
        assert worker.items() == ["a 0", "b 0"]  # as soon as there is a result
    assert recording.verbs[-3:] == ["BEGIN", "INSERT", "COMMIT"]


@pytest.mark.parametrize("then", ["fail", "ignore", "reject"])
def test_an_atomic_task_that_raises_is_rolled_back(worker: Worker, then: str) -> None:
    sent = worker.send("write_atomically", "a", then)
    worker.wait_until_done(sent)
    assert worker.items() == []
    if then == "fail":
        with pytest.raises(ValueError, match="a"):
            worker.result(sent)


def test_a_task_that_is_not_atomic_keeps_what_it_stored(worker: Worker) -> None:
    sent = worker.send("write", "a", "fail")
    with pytest.raises(ValueError, match="a"):
        worker.result(sent)
    assert worker.items() == ["a 0"]


def test_an_attempt_that_is_retried_is_rolled_back(worker: Worker) -> None:
    assert worker.run("write_atomically", "a", "retry") == "a"
    assert worker.items() == ["a 1"]


def test_a_task_whose_commit_fails_has_failed(worker: Worker) -> None:
    assert worker.run("sit", 1) == 1
    sent = worker.send("sit", 1)
    with pytest.raises(Exception, match="UniqueViolation"):
        worker.result(sent)
    assert sent.state == states.FAILURE
    assert worker.database.column("SELECT place FROM seat") == [1]


def test_a_task_whose_commit_fails_is_retried(worker: Worker) -> None:
    assert worker.run("sit", 1) == 1
    assert worker.run("sit_in_the_end", 1) == 2
    assert worker.database.column("SELECT place FROM seat ORDER BY place") == [1, 2]


def test_a_linked_task_sees_what_was_stored(worker: Worker) -> None:
    signature = worker.celery.signature
    linked = chain(signature("write_atomically", ("a",)), signature("count"), app=worker.celery)
    assert worker.result(linked.apply_async()) == 1


def test_tasks_at_the_same_time_share_neither_session_nor_connection(worker: Worker) -> None:
    names = ["a", "b"]
    sent = [worker.send("meet", name, 2) for name in names]
    met = [worker.result(result) for result in sent]
    assert len({(process, thread) for process, thread, *_ in met}) == 2
    assert len({backend for _, _, backend, _ in met}) == 2
    assert [new for *_, new in met] == [["a, pending"], ["b, pending"]]
    assert worker.items() == names


def test_an_idle_worker_has_no_transaction_open(worker: Worker, wire: WireProxy) -> None:
    assert worker.run("write_atomically", "a") == "a"
    assert worker.run("read", 1) == "a 0"
    wire.quiesce()
    assert wire.transactions_open == 0
    assert worker.states() == {"idle"}


def test_an_atomic_task_is_rolled_back_at_its_soft_time_limit(prefork: Worker) -> None:
    sent = prefork.send("write_atomically", "a", "sleep", soft_time_limit=1)
    with pytest.raises(SoftTimeLimitExceeded):
        prefork.result(sent)
    assert prefork.items() == []
    assert prefork.run("write_atomically", "b") == "b"


def test_an_atomic_task_is_rolled_back_at_its_hard_time_limit(prefork: Worker) -> None:
    sent = prefork.send("write_atomically", "a", "sleep", time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        prefork.result(sent)
    assert (prefork.folder / f"has-written-{sent.id}").exists()
    wait_for(lambda: prefork.states() <= {"idle"})
    assert prefork.items() == []
    assert prefork.run("write_atomically", "b") == "b"


@pytest.mark.parametrize("extension", ["ours", "stock"])
def test_a_connection_is_never_shared_across_a_fork(
    make_worker: MakeWorker, extension: str
) -> None:
    """The parent has one connection idle in its pool, and another one in a transaction."""
    environment = {"TASKS_PARENT_USES_DATABASE": "1"}
    if extension == "stock":
        environment["TASKS_STOCK"] = "1"
    with make_worker("prefork", **environment) as worker:
        before = (worker.folder / "parent-before").read_text()
        sent = [worker.send("meet", name, 2) for name in ("a", "b")]
        met = [worker.result(result) for result in sent]
        children = {process for process, *_ in met}
        assert len(children) == 2
        assert worker.process.pid not in children
        backends = {str(backend) for _, _, backend, _ in met}
        assert len(backends) == 2
        assert not backends & set(before.split())
        worker.stop()
        # Its connections are still the parent's, and what it had begun is there.
        assert (worker.folder / "parent-after").read_text() == before
        assert "of the parent" in worker.items()


def test_atomic_tasks_work_with_a_redis_broker(make_worker: MakeWorker) -> None:
    redis_url = os.environ.get("REDIS_URL")
    if not redis_url:
        pytest.skip("REDIS_URL is not set")
    redis = pytest.importorskip("redis", reason="redis is not installed")
    with redis.Redis.from_url(redis_url) as client:
        try:
            client.ping()
        except redis.exceptions.ConnectionError as error:
            pytest.skip(f"REDIS_URL is not reachable: {error}")
    with make_worker("prefork", broker=redis_url, backend=redis_url) as worker:
        assert worker.run("write_atomically", "a") == "a"
        with pytest.raises(ValueError, match="b"):
            worker.run("write_atomically", "b", "fail")
        assert worker.items() == ["a 0"]
