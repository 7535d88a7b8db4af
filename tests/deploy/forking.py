"""Programs that fork, each run by a test in a process of its own: ``NAME URL``."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInSession, create_engine
from tests.library import Author, Onlooker

PID = sa.text("SELECT pg_backend_pid()")


def in_child(work: Callable[[], Any], *, leave: Callable[[int], None] = os._exit) -> Any:
    """Fork, and return what a function returned in the child, which has ended then."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(readable)
            os.write(writable, json.dumps(work()).encode())
            gc.collect()
            status = 0
        except BaseException:
            traceback.print_exc()
        leave(status)
    os.close(writable)
    with os.fdopen(readable) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, said
    return json.loads(said)


def pid(bind: Any) -> int:
    """Return the server process that a session or a connection reads with."""
    return int(bind.scalar(PID))


def pool_is_the_parents(url: str) -> None:
    engine = create_engine(url, pool_size=1, max_overflow=1)
    with engine.connect() as one, engine.connect() as other:
        parents = {pid(one), pid(other)}
        assert len(parents) == 2
    with engine.connect() as connection:
        idle = pid(connection)

    def child() -> list[int]:
        assert engine.pool.checkedin() == 0  # type: ignore[attr-defined]
        with engine.connect() as one, engine.connect() as other:
            pids = [pid(one), pid(other)]
        engine.dispose()
        return pids

    for _ in range(2):
        assert not {*in_child(child)} & parents
        with engine.connect() as connection:
            assert pid(connection) == idle


def pool_of_a_grandchild(url: str) -> None:
    engine = create_engine(url)

    def read() -> int:
        with engine.connect() as connection:
            return pid(connection)

    def child() -> list[int]:
        first = read()
        grandchild = in_child(read)
        assert read() == first
        return [first, grandchild]

    first = read()
    assert len({first, *in_child(child)}) == 3
    assert read() == first


def session_outside(url: str) -> None:
    engine = create_engine(url)
    session = OptInSession(engine)
    author = session.get(Author, 1)
    assert author is not None
    parents = pid(session)
    assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]

    def child() -> int:
        childs = pid(session)
        with session.begin():
            author.name = "Child"
        session.close()
        return childs

    assert in_child(child) != parents
    assert pid(session) == parents
    session.refresh(author)
    assert author.name == "Child"


def session_inside(url: str) -> None:
    session = OptInSession(create_engine(url, pool_size=1, max_overflow=0))
    session.begin()
    session.add(Author(name="Parent"))
    session.flush()
    parents = pid(session)

    def child(end: str) -> str:
        assert not TRANSACTION_CONNECTIONS
        try:
            pid(session)
        except exc.PendingRollbackError as error:
            getattr(session, end)()
            assert not session.scalars(sa.select(Author).filter_by(name="Parent")).all()
            with session.begin():
                session.add(Author(name=end))
            return str(error)
        raise AssertionError("The child is in the parent's transaction.")

    for end in ("rollback", "close"):
        assert "roll" in in_child(partial(child, end))
    assert pid(session) == parents
    assert len(TRANSACTION_CONNECTIONS) == 1
    session.commit()
    names = session.scalars(sa.select(Author.name)).all()
    assert {"Parent", "rollback", "close"} <= {*names}


def block_is_left_in_the_child(url: str) -> None:
    """A child that comes to the end of the block must not commit for the parent."""
    session = OptInSession(create_engine(url))

    def child() -> str:
        try:
            transaction.__exit__(None, None, None)
        except exc.PendingRollbackError:
            session.rollback()
            return str(session.scalar(sa.select(sa.func.count(Author.id))))
        raise AssertionError("The child has committed.")

    with session.begin() as transaction:
        session.add(Author(name="Parent"))
        session.flush()
        assert in_child(child) == "3"
        other = Onlooker(url)
        assert other.names() == []
        session.add(Author(name="Parent's second"))
    assert other.names() == ["Parent", "Parent's second"]
    other.close()


def stream(url: str) -> None:
    session = OptInSession(create_engine(url))
    numbers = sa.select(sa.func.generate_series(1, 1000)).execution_options(yield_per=10)
    result = session.scalars(numbers)
    assert next(result) == 1

    def child() -> int:
        session.close()
        return len(session.scalars(numbers).all())

    assert in_child(child) == 1000
    assert result.all() == list(range(2, 1001))


def connections_in_use(url: str) -> None:
    """Closed by the child: those of the drivers, of a pool that keeps none, and past a pool."""
    engine = create_engine(url, poolclass=sa.NullPool)
    stock = engine.raw_connection()
    cursor: Any = stock.cursor()
    with engine.connect() as connection, Session(engine) as session:
        parents = [pid(connection), pid(session)]
        cursor.execute("SELECT pg_backend_pid()")
        parents += cursor.fetchone()

        def child() -> list[int]:
            cursor.close()
            stock.close()
            connection.close()
            session.close()
            with engine.connect() as own:
                return [pid(own)]

        assert not {*in_child(child)} & {*parents}
        cursor.execute("SELECT pg_backend_pid()")
        assert [pid(connection), pid(session), *cursor.fetchone()] == parents
    stock.close()


def another_thread_waits_for_the_server(url: str) -> None:
    """psycopg2 holds a lock of its connection meanwhile, which no thread of the child frees."""
    engine = create_engine(url, pool_size=2, max_overflow=0)
    answers: list[int] = []

    def wait() -> None:
        with engine.connect() as connection:
            answers.append(pid(connection))
            connection.execute(sa.text("SELECT pg_advisory_lock(1)")).all()
            answers.append(pid(connection))
            connection.execute(sa.text("SELECT pg_advisory_unlock(1)")).all()

    other = Onlooker(url)
    other.scalar("SELECT pg_advisory_lock(1)")
    thread = threading.Thread(target=wait)
    thread.start()
    while not other.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
        time.sleep(0.01)

    def child() -> list[int]:
        with engine.connect() as one, engine.connect() as another:
            pids = [pid(one), pid(another)]
        engine.dispose()
        return pids

    childs = in_child(child, leave=sys.exit)
    other.scalar("SELECT pg_advisory_unlock(1)")
    thread.join()
    assert len({*answers}) == 1
    assert len({*answers, *childs}) == 3
    other.close()


def child_outlives_the_parent(url: str) -> None:
    """The server must see that the parent has ended, and free its locks."""
    engine = create_engine(url)
    connection = engine.connect()
    connection.begin()
    connection.execute(sa.text("LOCK TABLE author"))
    parent = os.getpid()
    if os.fork():
        os.kill(parent, signal.SIGKILL)
    with engine.begin() as own:
        own.execute(sa.text("SET LOCAL lock_timeout = '30s'"))
        own.execute(sa.text("LOCK TABLE author"))
    print("The lock was free.", flush=True)
    os._exit(0)


def sqlite_in_memory(url: str) -> None:
    """It is the child's own copy, which is all there is."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE one AS SELECT 1 AS number"))

    def child() -> int:
        with engine.connect() as connection:
            return int(connection.scalar(sa.text("SELECT number FROM one")))

    assert in_child(child) == 1


def sqlite_inside(url: str) -> None:
    """The open transaction is part of the child's copy."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE one AS SELECT 1 AS number"))

        def child() -> list[int]:
            assert len(TRANSACTION_CONNECTIONS) == 1
            connection.execute(sa.text("INSERT INTO one VALUES (2)"))
            return list(connection.scalars(sa.text("SELECT number FROM one ORDER BY 1")))

        assert in_child(child) == [1, 2]
        assert connection.scalars(sa.text("SELECT number FROM one")).all() == [1]


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
