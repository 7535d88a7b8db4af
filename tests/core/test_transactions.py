"""``TRANSACTION_CONNECTIONS``, and transactions that are interrupted."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
)
from tests.library import (
    Author,
    Note,
    NoteBase,
    Onlooker,
    Seat,
    Sessions,
    assert_at_rest,
    authors,
    backend_pid,
    opened,
    sent,
)
from tests.wire import WireProxy


class TestTransactionConnections:
    def test_transaction_connections_is_empty_outside(self, session: OptInSession) -> None:
        assert len(TRANSACTION_CONNECTIONS) == 0
        session.get(Author, 1)
        session.add(Author(name="new"))
        session.execute(sa.update(Author).values(age=1))
        assert list(TRANSACTION_CONNECTIONS) == []
        assert not TRANSACTION_CONNECTIONS

    def test_transaction_connections_has_a_transaction_from_its_first_statement_on(
        self, session: OptInSession
    ) -> None:
        with session.begin() as transaction:
            assert len(TRANSACTION_CONNECTIONS) == 0
            session.get(Author, 1)
            assert dict(TRANSACTION_CONNECTIONS) == {transaction: {session.connection()}}
            with session.begin_nested():
                session.get(Author, 2)
                assert list(TRANSACTION_CONNECTIONS) == [transaction]
            assert transaction in TRANSACTION_CONNECTIONS
        assert transaction not in TRANSACTION_CONNECTIONS
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_transaction_connections_has_transactions_of_engines_and_connections(
        self, engine: OptInEngine
    ) -> None:
        with engine.begin() as connection:
            assert dict(TRANSACTION_CONNECTIONS) == {connection.get_transaction(): {connection}}
            with engine.connect() as other, other.begin() as transaction:
                assert TRANSACTION_CONNECTIONS[transaction] == {other}
                assert len(TRANSACTION_CONNECTIONS) == 2
            with engine.connect() as other, other.begin_twophase() as two_phases:
                assert TRANSACTION_CONNECTIONS[two_phases] == {other}
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_transaction_connections_has_each_bind_of_a_session(
        self, engine: OptInEngine, wire_url: str
    ) -> None:
        second = create_engine(wire_url)
        NoteBase.metadata.create_all(second)
        with OptInSession(binds={Author: engine, Note: second}) as session:
            with session.begin() as transaction:
                session.get(Author, 1)
                assert len(TRANSACTION_CONNECTIONS[transaction]) == 1
                session.get(Note, 1)
                assert {c.engine for c in TRANSACTION_CONNECTIONS[transaction]} == {engine, second}
                assert len(TRANSACTION_CONNECTIONS) == 1
        assert len(TRANSACTION_CONNECTIONS) == 0
        second.dispose()

    def test_transaction_connections_has_the_transaction_of_a_flush_while_it_lasts(
        self, session: OptInSession
    ) -> None:
        seen: list[int] = []
        event.listen(session, "after_flush", lambda *_: seen.append(len(TRANSACTION_CONNECTIONS)))
        session.add(Author(name="new"))
        session.flush()
        assert seen == [1]
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_transaction_connections_is_a_view_that_nobody_can_write(
        self, session: OptInSession
    ) -> None:
        assert isinstance(TRANSACTION_CONNECTIONS, Mapping)
        for name in ("__setitem__", "__delitem__", "pop", "clear", "update", "setdefault"):
            assert not hasattr(TRANSACTION_CONNECTIONS, name)
        with session.begin() as transaction:
            session.get(Author, 1)
            connection = session.connection()
            assert list(TRANSACTION_CONNECTIONS) == [transaction]
            assert list(TRANSACTION_CONNECTIONS.keys()) == [transaction]
            assert list(TRANSACTION_CONNECTIONS.values()) == [{connection}]
            assert list(TRANSACTION_CONNECTIONS.items()) == [(transaction, frozenset([connection]))]
            assert TRANSACTION_CONNECTIONS.get(transaction) == frozenset([connection])
            assert "SessionTransaction" in repr(TRANSACTION_CONNECTIONS)
            assert not hasattr(TRANSACTION_CONNECTIONS[transaction], "add")
        assert TRANSACTION_CONNECTIONS.get(transaction) is None
        with pytest.raises(KeyError):
            TRANSACTION_CONNECTIONS[transaction]

    def test_transaction_connections_has_those_out_of_autocommit_and_no_others(
        self, session: OptInSession, engine: OptInEngine
    ) -> None:
        with engine.connect() as resting:
            resting.execute(sa.text("SELECT 1"))
            with session.begin():
                session.get(Author, 1)
                (found,) = TRANSACTION_CONNECTIONS.values()
                for connection in found:
                    dbapi: Any = connection.connection.dbapi_connection
                    assert dbapi.autocommit is False
                assert resting not in found

    ENDS: dict[str, Callable[[OptInSession, Onlooker], Any]] = {  # noqa: RUF012
        "commit": lambda session, onlooker: session.commit(),
        "rollback": lambda session, onlooker: session.rollback(),
        "close": lambda session, onlooker: session.close(),
        "reset": lambda session, onlooker: session.reset(),
        "invalidate": lambda session, onlooker: session.invalidate(),
        "a commit that fails": lambda session, onlooker: fail_to_commit(session),
        "a kill and a rollback": lambda session, onlooker: kill_and_roll_back(session, onlooker),
        "a kill and a close": lambda session, onlooker: kill_and_close(session, onlooker),
    }

    @pytest.mark.parametrize("end", ENDS)
    def test_transaction_connections_is_empty_after_every_end(
        self, session: OptInSession, onlooker: Onlooker, end: str
    ) -> None:
        session.begin()
        session.get(Author, 1)
        assert len(TRANSACTION_CONNECTIONS) == 1
        self.ENDS[end](session, onlooker)
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_transaction_connections_keeps_neither_sessions_nor_connections_alive(
        self, sessions: Sessions, engine: OptInEngine
    ) -> None:
        session = sessions()
        session.begin()
        session.get(Author, 1)
        alive: list[weakref.ref[Any]] = [weakref.ref(session), weakref.ref(session.connection())]
        connection = engine.connect()
        connection.begin()
        alive.append(weakref.ref(connection))
        assert len(TRANSACTION_CONNECTIONS) == 2
        del session, connection
        gc.collect()
        assert [reference() for reference in alive] == [None, None, None]
        assert len(TRANSACTION_CONNECTIONS) == 0
        assert_at_rest(engine)

    def test_transaction_connections_may_be_read_by_any_thread(
        self, url: str, onlooker: Onlooker
    ) -> None:
        with opened(url, pool_size=8) as engine:
            done = threading.Event()
            failures: list[BaseException] = []
            most = [0]

            def read() -> None:
                try:
                    while not done.is_set():
                        for transaction, connections in TRANSACTION_CONNECTIONS.items():
                            assert transaction is not None
                            assert len(connections) <= 1
                        dict(TRANSACTION_CONNECTIONS.items())
                        repr(TRANSACTION_CONNECTIONS)
                        most[0] = max(most[0], len(TRANSACTION_CONNECTIONS))
                except BaseException as failure:
                    failures.append(failure)

            together = threading.Barrier(8)

            def write(number: int) -> None:
                try:
                    for n in range(20):
                        with OptInSession(engine) as session, session.begin() as transaction:
                            session.execute(sa.insert(authors).values(name=f"{number} {n}"))
                            assert TRANSACTION_CONNECTIONS[transaction] == {session.connection()}
                            if n == 10:
                                together.wait(30)
                                assert len(TRANSACTION_CONNECTIONS) >= 8
                                together.wait(30)
                except BaseException as failure:
                    failures.append(failure)
                    together.abort()

            reader = threading.Thread(target=read)
            writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
            reader.start()
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            done.set()
            reader.join()
            assert failures == []
            assert most[0] >= 1
        assert len(onlooker.names()) == 160
        assert len(TRANSACTION_CONNECTIONS) == 0


def fail_to_commit(session: OptInSession) -> None:
    session.add_all([Seat(place=1), Seat(place=1)])
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()


def kill_and_roll_back(session: OptInSession, onlooker: Onlooker) -> None:
    onlooker.kill(backend_pid(session.connection()))
    with pytest.raises(OperationalError):
        session.get(Author, 2)
    session.rollback()


def kill_and_close(session: OptInSession, onlooker: Onlooker) -> None:
    onlooker.kill(backend_pid(session.connection()))
    with suppress(OperationalError):
        session.close()  # SQLAlchemy's, too, raises here
    assert not session.in_transaction()


class Interruption(BaseException):
    """What may come at any point, as a KeyboardInterrupt or a worker's timeout does."""


def do_block(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="one"))
        session.flush()
        session.add(Author(name="two"))


def do_nested(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="one"))
        with session.begin_nested():
            session.add(Author(name="two"))


def do_flush(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.flush()


def do_commit(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.commit()


def do_bulk(session: OptInSession) -> None:
    session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])


def do_many(session: OptInSession) -> None:
    session.execute(sa.insert(authors), [{"name": "one"}, {"name": "two"}])


def do_fail(session: OptInSession) -> None:
    with pytest.raises(IntegrityError), session.begin():
        session.add(Author(name="one"))
        session.flush()
        session.add(Author(name="Ada"))


def do_read(session: OptInSession) -> None:
    session.get(Author, 1)
    session.scalars(sa.select(Author).execution_options(yield_per=1)).all()


def do_options(session: OptInSession) -> None:
    with session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True):
        session.get(Author, 1)


ACTIONS = {
    action.__name__: action
    for action in (
        do_block,
        do_nested,
        do_flush,
        do_commit,
        do_bulk,
        do_many,
        do_fail,
        do_read,
        do_options,
    )
}

ENGINE_EVENTS = [
    *("begin", "commit", "rollback", "savepoint", "release_savepoint", "rollback_savepoint"),
    *("before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute"),
    *("checkout", "reset"),
]
# SQLAlchemy itself replaces these: the pool logs them, a closed transaction is not rolled back.
REPLACED = ("checkout", "reset", "after_transaction_end")
SESSION_EVENTS = [
    *("before_flush", "after_flush", "after_flush_postexec", "before_commit", "after_commit"),
    *("after_begin", "after_rollback", "after_soft_rollback", "after_transaction_create"),
    *("after_transaction_end", "pending_to_persistent", "loaded_as_persistent"),
    *("do_orm_execute", "before_attach"),
]


class Listener:
    """A listener to an event that raises at one of its calls."""

    def __init__(self, turn: int, error: type[BaseException]) -> None:
        self.calls = 0
        self._turn = turn
        self._error = error

    def listen(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls == self._turn:
            raise self._error("interrupted")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a stream's cursor
@pytest.mark.parametrize("error", [Interruption, ValueError])
@pytest.mark.parametrize("name", [*ENGINE_EVENTS, *SESSION_EVENTS])
def test_an_error_in_a_listener_reaches_the_caller_and_nothing_stays_half_done(
    wire_url: str,
    wire: WireProxy,
    onlooker: Onlooker,
    name: str,
    error: type[BaseException],
) -> None:
    """The listener raises at its first call, then at its second, until an action needs no more."""
    with opened(wire_url) as engine:
        for action in ACTIONS:
            for turn in range(1, 9):
                listener = Listener(turn, error)
                session = OptInSession(engine)
                target: Any = engine if name in ENGINE_EVENTS else session
                event.listen(target, name, listener.listen)
                raised: BaseException | None = None
                try:
                    ACTIONS[action](session)
                    session.close()
                except BaseException as caught:
                    raised = caught
                finally:
                    event.remove(target, name, listener.listen)
                session.close()
                where = f"{action}, call {turn}"
                if listener.calls < turn:
                    assert raised is None, where
                    onlooker.column("DELETE FROM author WHERE id > 3 RETURNING 1")
                    break
                if name not in REPLACED:
                    assert isinstance(raised, error), f"{where}: the error was replaced"
                assert_at_rest(engine)
                wire.quiesce()
                assert wire.transactions_open == 0, where
                assert onlooker.names() in ([], ["one", "two"]), where
                onlooker.column("DELETE FROM author WHERE id > 3 RETURNING 1")
        with OptInSession(engine) as session:
            with session.begin():
                session.add(Author(name="after"))
            with wire.record() as recording:
                session.get(Author, 1)
            assert sent(recording) == ["SELECT"]


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals go there"
)
@pytest.mark.parametrize("outside", [True, False])
def test_a_keyboard_interrupt_while_the_server_works_leaves_a_usable_session(
    url: str, onlooker: Onlooker, outside: bool
) -> None:
    """Straight to the server: psycopg before 3.2 keeps the interpreter while it asks for a cancel,
    and a proxy of the same process could not pass that on."""
    holder = Onlooker(url)
    holder.scalar("SELECT pg_advisory_lock(1)")
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    def interrupt() -> None:
        while not holder.scalar(waiting):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        holder.scalar("SELECT pg_advisory_unlock(1)")  # psycopg2 waits for the answer

    lock = sa.text("SELECT pg_advisory_xact_lock(1)")
    with opened(url) as engine, OptInSession(engine) as session:
        session.get(Author, 1)
        thread = threading.Thread(target=interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                if outside:
                    session.execute(lock)
                else:
                    with session.begin():
                        session.execute(sa.insert(Author).values(name="gone"))
                        session.execute(lock)
        finally:
            signal.signal(signal.SIGINT, before)
        thread.join()
        assert not session.in_transaction()
        with session.begin():
            session.add(Author(name="after"))
        assert session.get_one(Author, 1).name == "Ada"
    assert onlooker.names() == ["after"]
    holder.close()


def test_a_session_that_ends_with_its_thread_leaves_nothing(
    engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
) -> None:
    def work() -> None:
        session = OptInSession(engine)
        session.begin()
        session.add(Author(name="gone"))
        session.flush()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_at_rest(engine)
    wire.quiesce()
    assert wire.transactions_open == 0
    assert onlooker.names() == []


def test_a_generator_that_is_dropped_half_way_rolls_back(
    engine: OptInEngine, session: OptInSession, onlooker: Onlooker
) -> None:
    def work() -> Iterator[int]:
        with session.begin():
            for n in range(3):
                session.execute(sa.insert(Author).values(name=f"n{n}"))
                yield n

    generator = work()
    next(generator)
    assert session.in_transaction()
    del generator
    gc.collect()
    assert not session.in_transaction()
    assert onlooker.names() == []


def test_two_sessions_in_one_thread_do_not_mix(
    sessions: Sessions, wire: WireProxy, onlooker: Onlooker
) -> None:
    with sessions() as one, sessions() as two:
        with one.begin():
            one.add(Author(name="one"))
            one.flush()
            assert two.scalar(sa.select(sa.func.count(Author.id))) == 3
            with pytest.raises(ValueError, match="mine"), two.begin():
                two.add(Author(name="two"))
                two.flush()
                assert len(TRANSACTION_CONNECTIONS) == 2
                raise ValueError("mine")
            assert one.in_transaction()
            assert not two.in_transaction()
            two.add(Author(name="three"))
            two.commit()
            assert onlooker.names() == ["three"]
        assert onlooker.names() == ["one", "three"]


def test_a_deadlock_is_the_error_of_one_and_the_other_stores(url: str, onlooker: Onlooker) -> None:
    with opened(url) as engine:
        together = threading.Barrier(2)
        errors: list[BaseException] = []

        def work(first: int, second: int) -> None:
            try:
                with OptInSession(engine) as session, session.begin():
                    session.execute(sa.text("SET LOCAL deadlock_timeout = '50ms'"))
                    session.execute(sa.update(Author).where(Author.id == first).values(age=first))
                    together.wait(30)
                    session.execute(sa.update(Author).where(Author.id == second).values(age=first))
            except DBAPIError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=pair) for pair in ((1, 2), (2, 1))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 1
        assert "deadlock" in str(errors[0])
        (age,) = onlooker.column("SELECT DISTINCT age FROM author WHERE id < 3")
        assert age in (1, 2)


def test_a_serialization_failure_can_be_tried_again(sessions: Sessions, onlooker: Onlooker) -> None:
    def increase(session: OptInSession, meanwhile: Callable[[], None]) -> None:
        with session.begin(isolation_level="REPEATABLE READ"):
            author = session.get_one(Author, 1, populate_existing=True)
            meanwhile()
            author.age = (author.age or 0) + 1

    def change() -> None:
        with sessions.begin() as other:
            other.get_one(Author, 1).age = 40

    with sessions() as session:
        with pytest.raises(OperationalError, match="serialize"):
            increase(session, change)
        increase(session, lambda: None)
    assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 41


def test_transaction_connections_has_no_transactions_of_stock_sessions(
    engine: OptInEngine, url: str
) -> None:
    stock = sa.create_engine(url)
    with Session(stock) as session:
        session.get(Author, 1)
        assert isinstance(session.get_transaction(), SessionTransaction)
        assert len(TRANSACTION_CONNECTIONS) == 0
    stock.dispose()


class TestRemoveInsideATransaction:
    """Of a scoped session: what came next would be stored on its own, by a new session."""

    @pytest.mark.parametrize("block", ["begin", "begin_nested", "atomic"])
    def test_remove_inside_a_transaction_rolls_back_and_is_an_error(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, block: str
    ) -> None:
        scope = OptInScopedSession(sessionmaker(engine, class_=OptInSession))
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="nothing of it is stored"):
                with getattr(scope, block)():
                    scope.add(Author(name="gone"))
                    scope.flush()
                    scope.remove()
        assert sent(recording)[-1] == "ROLLBACK"
        assert "COMMIT" not in sent(recording)
        assert onlooker.names() == []
        with scope.begin():
            scope.add(Author(name="after"))
        scope.remove()
        assert onlooker.names() == ["after"]

    def test_remove_outside_a_block_is_as_ever(self, engine: OptInEngine) -> None:
        scope = OptInScopedSession(sessionmaker(engine, class_=OptInSession))
        scope.remove()
        scope.begin()
        scope.execute(sa.select(1))
        scope.remove()
        assert not scope.registry.has()
