"""Exceptions from a signal handler at any line of the package: nothing is lost without a word."""

# ruff: noqa: PT012  # what raises has two lines

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ResourceClosedError, StatementError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import SingletonThreadPool

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInConnection,
    OptInEngine,
    OptInSession,
    create_engine,
)
from tests.interruptions import HardStop, Interruption, SoftLimit
from tests.library import Author, Onlooker, Seat, assert_at_rest, authors
from tests.wire import WireProxy

BOTH = [{"name": "one"}, {"name": "two"}]


def _add(session: OptInSession) -> None:
    session.add(Author(name="one"))
    session.flush()
    session.add(Author(name="two"))


def _block(session: OptInSession) -> None:
    with session.begin():
        _add(session)


def _nested(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="one"))
        with session.begin_nested():
            session.add(Author(name="two"))


def _atomic(session: OptInSession) -> None:
    with session.atomic():
        session.add(Author(name="one"))
        with session.atomic():
            session.add(Author(name="two"))


def _begin_commit(session: OptInSession) -> None:
    session.begin()
    _add(session)
    session.commit()


def _begin_rollback(session: OptInSession) -> None:
    session.begin()
    _add(session)
    session.rollback()


def _error(session: OptInSession) -> None:
    with suppress(ZeroDivisionError), session.begin():
        _add(session)
        raise ZeroDivisionError


def _begin_close(session: OptInSession) -> None:
    session.begin()
    _add(session)
    session.close()


def _flush(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.flush()


def _commit(session: OptInSession) -> None:
    session.add_all([Author(name="one"), Author(name="two")])
    session.commit()


def _block_of_one(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="one"))


def _atomic_of_one(session: OptInSession) -> None:
    with session.atomic():
        session.add(Author(name="one"))


def _flush_one(session: OptInSession) -> None:
    session.add(Author(name="one"))
    session.flush()


def _commit_one(session: OptInSession) -> None:
    session.add(Author(name="one"))
    session.commit()


def _stream(session: OptInSession) -> None:
    rows = session.execute(sa.select(authors.c.id).execution_options(yield_per=1))
    rows.fetchone()
    rows.close()


def _handed_out(session: OptInSession) -> None:
    connection = session.connection()
    with session.begin():
        connection.execute(sa.insert(authors).values(name="one"))
        session.add(Author(name="two"))


def _give_back(session: OptInSession) -> None:
    session.scalar(sa.text("SELECT 1"))
    session.give_back()


def _options(session: OptInSession) -> None:
    with session.begin():
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        session.connection(execution_options={"postgresql_deferrable": False})
        _add(session)


#: The transaction is one statement.
OF_ONE_OBJECT: dict[str, Callable[[OptInSession], Any]] = {
    "a block with one object": _block_of_one,
    "atomic with one object": _atomic_of_one,
    "one object flushed": _flush_one,
    "one object committed": _commit_one,
}

OF_SESSION: dict[str, Callable[[OptInSession], Any]] = {
    **OF_ONE_OBJECT,
    "begin": lambda session: session.begin(),
    "a block": _block,
    "begin_nested": _nested,
    "atomic": _atomic,
    "begin, commit": _begin_commit,
    "begin, rollback": _begin_rollback,
    "begin, close": _begin_close,
    "a block with an error": _error,
    "flush": _flush,
    "commit": _commit,
    "one statement": lambda session: session.execute(sa.insert(authors).values(name="one")),
    "many rows": lambda session: session.execute(sa.insert(Author), BOTH),
    "bulk": lambda session: session.bulk_insert_mappings(sa.inspect(Author), BOTH),
    "a stream": _stream,
    "a connection handed out": _handed_out,
    "give_back": _give_back,
    "options": _options,
}


def _connection_block(connection: OptInConnection) -> None:
    with connection.begin():
        for row in BOTH:
            connection.execute(sa.insert(authors), row)


def _connection_nested(connection: OptInConnection) -> None:
    with connection.begin():
        connection.execute(sa.insert(authors), BOTH[0])
        with connection.begin_nested():
            connection.execute(sa.insert(authors), BOTH[1])


def _connection_rollback(connection: OptInConnection) -> None:
    transaction = connection.begin()
    connection.execute(sa.insert(authors), BOTH)
    transaction.rollback()


def _connection_close(connection: OptInConnection) -> None:
    connection.begin()
    connection.execute(sa.insert(authors), BOTH)
    connection.close()


def _level(connection: OptInConnection) -> None:
    with connection.execution_options(isolation_level="SERIALIZABLE").begin():
        connection.execute(sa.insert(authors), BOTH)


OF_CONNECTION: dict[str, Callable[[OptInConnection], Any]] = {
    "begin": lambda connection: connection.begin(),
    "a block": _connection_block,
    "begin_nested": _connection_nested,
    "rollback": _connection_rollback,
    "close": _connection_close,
    "one statement": lambda connection: connection.execute(sa.insert(authors), BOTH[0]),
    "many rows": lambda connection: connection.execute(sa.insert(authors), BOTH),
    "a level": _level,
}


def _comes_from_interruption(error: BaseException | None) -> bool:
    """Tell whether it is the interruption, or what SQLAlchemy raises because of it.

    SQLAlchemy puts a StatementError around an exception while it prepares a statement, and raises
    ResourceClosedError after one in a listener to the end of a flush.
    """
    while error is not None and not isinstance(error, (SoftLimit, HardStop)):
        if not isinstance(error, (StatementError, ResourceClosedError)):
            return False
        error = error.__context__
    return error is not None


class Tries:
    """Interrupts a call at each of its lines, one after the other, and checks what holds then."""

    def __init__(self, engine: OptInEngine, onlooker: Onlooker, wire: WireProxy) -> None:
        self.engine = engine
        self.onlooker = onlooker
        self.wire = wire
        self.failures: list[str] = []

    def run(self, make: Callable[[], Any], call: Callable[[Any], Any], exception: Any) -> None:
        number = 0
        while True:
            number += 1 if exception is SoftLimit else 5  # the others differ little
            interruption = Interruption(number, exception)
            self._try(interruption, make, call)
            if interruption.place is None:
                break
        assert number > 5
        assert not self.failures, "\n".join(self.failures)

    def _try(self, interruption: Interruption, make: Any, call: Any) -> None:
        user = make()
        with self.wire.record() as recording:
            error = interruption.run(lambda: call(user))  # noqa: F821  # it is deleted at the end
        found: list[str] = []
        if interruption.place is None:
            if error is not None:
                found.append(f"raised {error!r} by itself")
        elif not _comes_from_interruption(error) and not interruption.in_reset:
            found.append(f"raised {error!r}")
        del error

        ended = [verb for verb in recording.verbs if verb in ("BEGIN", "COMMIT")]
        names = self.onlooker.names()
        if names not in ([], ["one", "two"] if "BEGIN" in ended else ["one"]):
            found.append(f"a part is stored: {names}")
        if "BEGIN" not in ended and recording.verbs.count("INSERT") > 1:
            found.append(f"sent more than one statement without a BEGIN: {recording.verbs}")
        if "BEGIN" in ended and names and "COMMIT" not in ended:
            found.append(f"stored without a COMMIT: {recording.verbs}")
        stored = self._store_after(user)
        try:
            user.close()
        except BaseException as failure:
            found.append(f"close() raised {failure!r}")
        del user
        names = self.onlooker.names()
        if stored and "after" not in names:
            found.append("what was stored afterwards is lost")
        try:
            assert_at_rest(self.engine)
        except AssertionError as failure:
            found.append(f"not at rest: {str(failure)[:200]}")
            TRANSACTION_CONNECTIONS._transactions._joined.clear()
            self.engine.dispose()
            self.engine.connect().close()
        self.onlooker.run("DELETE FROM author WHERE id > 3")
        self.failures += [f"{interruption.place}: {one}" for one in found]

    def _store_after(self, user: Any) -> bool:
        if user.closed if isinstance(user, sa.Connection) else False:
            return False
        try:
            user.execute(sa.insert(authors).values(name="after"))
            if user.in_transaction():
                user.commit()
        except Exception:
            return False
        return True


@pytest.fixture
def tries(engine: OptInEngine, onlooker: Onlooker, wire: WireProxy) -> Tries:
    return Tries(engine, onlooker, wire)


# psycopg warns of the cursor of a stream that was interrupted before anybody had it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("exception", [SoftLimit, HardStop])
class TestInterruption:
    @pytest.mark.parametrize("call", OF_SESSION)
    def test_an_interruption_at_any_line_of_a_session_stores_no_part(
        self, tries: Tries, call: str, exception: type[BaseException]
    ) -> None:
        sessions = sessionmaker(tries.engine, class_=OptInSession)
        tries.run(sessions, OF_SESSION[call], exception)

    @pytest.mark.parametrize(
        "call", ["a block", "flush", "commit", "one statement", "many rows", *OF_ONE_OBJECT]
    )
    def test_an_interruption_of_a_session_that_begins_on_write_stores_no_part(
        self, tries: Tries, call: str, exception: type[BaseException]
    ) -> None:
        sessions = sessionmaker(tries.engine, class_=OptInSession, begin_on_write=True)
        tries.run(sessions, OF_SESSION[call], exception)

    @pytest.mark.parametrize("call", OF_CONNECTION)
    def test_an_interruption_at_any_line_of_a_connection_stores_no_part(
        self, tries: Tries, call: str, exception: type[BaseException]
    ) -> None:
        tries.run(tries.engine.connect, OF_CONNECTION[call], exception)


@pytest.mark.parametrize("call", ["a block", "atomic", "begin, commit", *OF_ONE_OBJECT])
@pytest.mark.parametrize("begin_on_write", [False, True])
def test_no_line_that_is_interrupted_makes_callbacks_say_what_is_wrong(
    engine: OptInEngine, onlooker: Onlooker, call: str, begin_on_write: bool
) -> None:
    wrong: list[str] = []
    number = 0
    while True:
        number += 1
        called: list[str] = []
        session = OptInSession(engine, begin_on_write=begin_on_write)

        # No listener to the flush, because of which BEGIN would be sent.
        @event.listens_for(session, "after_transaction_create")
        def register(session: Any, transaction: Any, called: list[str] = called) -> None:
            if transaction.parent is not None and not transaction.nested:  # that of a flush
                session.on_commit(lambda: called.append("commit"))
                session.on_rollback(lambda: called.append("rollback"))

        interruption = Interruption(number, SoftLimit)
        interruption.run(lambda: OF_SESSION[call](session))  # noqa: B023
        session.close()
        stored = bool(onlooker.names())
        if ("rollback" if stored else "commit") in called:
            wrong.append(f"{interruption.place}: {called}, and stored is {stored}")
        onlooker.run("DELETE FROM author WHERE id > 3")
        if interruption.place is None:
            break
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a socket that is looked at
@pytest.mark.parametrize("call", ["a block with an error", "begin, commit", "many rows"])
@pytest.mark.parametrize("begin_on_write", [False, True])
def test_no_line_that_is_interrupted_leaves_a_transaction_after_the_session_is_closed(
    engine: OptInEngine, onlooker: Onlooker, call: str, begin_on_write: bool
) -> None:
    left: list[str] = []
    number = 0
    while True:
        number += 1
        session = OptInSession(engine, begin_on_write=begin_on_write)
        interruption = Interruption(number, SoftLimit)
        # The error keeps the connection, which would leave when it is forgotten.
        error = interruption.run(lambda: OF_SESSION[call](session))  # noqa: B023
        session.close()
        if len(TRANSACTION_CONNECTIONS):
            left.append(f"{interruption.place}: {error!r}")
        onlooker.run("DELETE FROM author WHERE id > 3")
        if interruption.place is None:
            break
    assert not left, "\n".join(left)


SLEEP = "SELECT pg_sleep(5)"


def _in_block(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="lost"))
        session.flush()
        session.execute(sa.text(SLEEP))


def _with(session: OptInSession, instance: object) -> OptInSession:
    session.add(instance)
    return session


def _in_savepoint(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="lost"))
        with session.begin_nested():
            session.execute(sa.text(SLEEP))


WAITING: dict[str, Callable[[OptInSession], Any]] = {
    "outside": lambda session: session.execute(sa.text(SLEEP)),
    "a stream": lambda session: session.execute(
        sa.text(SLEEP).execution_options(stream_results=True)
    ),
    "the rows of a stream": lambda session: session.execute(
        sa.text("SELECT n, pg_sleep(0.05) FROM generate_series(1, 90) n").execution_options(
            yield_per=1
        )
    ).all(),
    "a block": _in_block,
    "a savepoint": _in_savepoint,
    "a connection handed out": lambda session: session.connection().execute(sa.text(SLEEP)),
    "a flush": lambda session: _with(session, Author(name="slow")).flush(),
    "a commit": lambda session: _with(session, Author(name="slow")).commit(),
    "COMMIT": lambda session: _with(session, Seat(place=1)).commit(),
    "atomic": lambda session: session.atomic(lambda: session.execute(sa.text(SLEEP)))(),
}

SLOW = """
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_sleep(5); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT ON author FOR EACH ROW WHEN (NEW.name = 'slow')
EXECUTE FUNCTION wait();
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON seat DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION wait()
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such signal")
@pytest.mark.parametrize("exception", [SoftLimit, HardStop])
@pytest.mark.parametrize("way", WAITING)
class TestWhileTheDriverWaits:
    """psycopg2 notices a signal once the server has answered, and psycopg 3 at once."""

    def test_an_interruption_while_the_driver_waits_is_raised_and_the_session_goes_on(
        self,
        engine: OptInEngine,
        onlooker: Onlooker,
        driver: str,
        way: str,
        exception: type[BaseException],
    ) -> None:
        if driver == "psycopg2":
            pytest.skip("psycopg2 is never interrupted while it waits")
        onlooker.run(SLOW)

        def interrupt(*_: object) -> None:
            raise exception("too slow")

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with OptInSession(engine) as session:
                with pytest.raises(exception, match="too slow"):
                    signal.setitimer(signal.ITIMER_REAL, 0.15)
                    WAITING[way](session)
                assert not session.in_transaction()
                session.rollback()
                assert session.scalar(sa.text("SELECT 1")) == 1
                with session.begin():
                    session.add(Author(name="after"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert onlooker.names() == ["after"]
        assert len(TRANSACTION_CONNECTIONS) == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such signal")
@pytest.mark.parametrize("begin_on_write", [False, True])
@pytest.mark.parametrize("is_one_statement", [False, True])
def test_an_interrupted_commit_calls_neither_on_commit_nor_on_rollback(
    engine: OptInEngine,
    onlooker: Onlooker,
    wire: WireProxy,
    begin_on_write: bool,
    is_one_statement: bool,
) -> None:
    def interrupt(*_: object) -> None:
        raise SoftLimit("too slow")

    called: list[str] = []
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with OptInSession(engine, begin_on_write=begin_on_write) as session:
            with pytest.raises(SoftLimit), session.begin():
                session.add(Author(name="new"))
                if not is_one_statement:
                    session.flush()
                session.on_commit(lambda: called.append("commit"))
                session.on_rollback(lambda: called.append("rollback"))
                wire.delay = 0.4
                signal.setitimer(signal.ITIMER_REAL, 0.2)
            wire.delay = 0
            assert session.scalar(sa.text("SELECT pg_sleep(0.6)")) is not None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert onlooker.names() == ["new"]
    assert not called


def test_a_connection_whose_first_use_is_interrupted_goes_back_to_its_pool(url: str) -> None:
    # SingletonThreadPool counts who has the connection of a thread, and returns it at zero.
    number, failures = 0, []
    while True:
        number += 1
        engine = create_engine(url, poolclass=SingletonThreadPool)
        out: list[str] = []
        event.listen(engine, "checkout", lambda *_, out=out: out.append("out"))
        event.listen(engine, "checkin", lambda *_, out=out: out.remove("out"))
        interruption = Interruption(number, SoftLimit)
        # The traceback keeps all local variables alive meanwhile.
        error = interruption.run(engine.connect)
        engine.connect().close()
        if out:
            failures.append(interruption.place)
        del error
        engine.dispose()
        if interruption.place is None:
            break
    assert number > 5
    assert not failures
