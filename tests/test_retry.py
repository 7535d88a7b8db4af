"""``retry_transaction()``: what PostgreSQL asks to run again, and nothing else. Real conflicts."""

# ruff: noqa: PT012  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import csv
import io
import random
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from tenacity import stop_after_attempt, wait_none
from werkzeug.local import LocalProxy

from fictive_sqlalchemy import (
    CommitOutcomeUnknown,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
    unit_of_work,
)
from fictive_sqlalchemy.ext.tenacity import is_serialization_failure, retry_transaction
from tests.library import (
    Author,
    Note,
    NoteBase,
    Onlooker,
    Seat,
    Sessions,
    backend_pid,
    opened,
    sent,
)
from tests.wire import Message, WireProxy

FAILS_TO_SERIALIZE = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
DEADLOCKS = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40P01'; END $$"


async def async_names() -> AsyncGenerator[str, None]:
    yield "one"


class BankBase(DeclarativeBase):
    pass


class Account(BankBase):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    with opened(wire_url, pool_size=20) as engine:
        with engine.begin() as connection:
            BankBase.metadata.create_all(connection, checkfirst=False)
            rows = [{"id": id, "balance": 100} for id in range(1, 5)]
            connection.execute(sa.insert(Account), rows)
        yield engine


def retried(session: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Retry without waiting."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        decorator: Any = retry_transaction(session, **options)
        call = decorator(function)
        call.retry.wait = wait_none()
        decorated: Callable[..., Any] = call
        return decorated

    return decorate


class Fails:
    """Run a statement that fails, so many times."""

    def __init__(self, session: Session, times: int, sql: str = FAILS_TO_SERIALIZE) -> None:
        self.session = session
        self.times = times
        self.sql = sql
        self.tries = 0

    def __call__(self) -> int:
        self.tries += 1
        self.session.add(Author(name=f"try {self.tries}"))
        self.session.flush()
        if self.tries <= self.times:
            self.session.execute(sa.text(self.sql))
        return self.tries


class TestWhatIsRunAgain:
    @pytest.mark.parametrize("sql", [FAILS_TO_SERIALIZE, DEADLOCKS])
    def test_the_whole_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, sql: str
    ) -> None:
        with wire.record() as recording:
            assert retried(session)(Fails(session, 2, sql))() == 3
        undone = ["BEGIN", "INSERT", "DO", "ROLLBACK"]
        assert sent(recording) == [*undone, *undone, "BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["try 3"]
        assert not session.in_transaction()

    def test_with_the_options_of_begin_each_time(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        options = {"isolation_level": "SERIALIZABLE", "read_only": False}
        with wire.record() as recording:
            retried(session, **options)(Fails(session, 1))()
        begun = [one for one in recording.statements if one.startswith("BEGIN")]
        assert begun == ["BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE"] * 2

    def test_a_conflict_that_commit_finds(
        self, session: OptInSession, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        """Write skew: each reads what the other writes; PostgreSQL refuses the second COMMIT."""
        tries = 0
        total = sa.select(sa.func.sum(Account.balance))

        @retried(session, isolation_level="SERIALIZABLE")
        def withdraw() -> None:
            nonlocal tries
            tries += 1
            if session.scalar(total) == 400:
                session.get_one(Account, 1).balance -= 400
            if tries == 1:
                with sessions() as other, other.begin(isolation_level="SERIALIZABLE"):
                    assert other.scalar(total) == 400
                    other.get_one(Account, 2).balance -= 400

        withdraw()
        assert tries == 2
        assert onlooker.scalar("SELECT sum(balance) FROM account") == 0

    def test_a_real_deadlock(self, sessions: Sessions, onlooker: Onlooker) -> None:
        together = threading.Barrier(2)
        tries: list[int] = []

        def run(first: int, second: int) -> None:
            @retried(sessions)
            def transfer(session: OptInSession) -> None:
                tries.append(first)
                session.get_one(Account, first, with_for_update=True).balance -= 10
                session.flush()
                if tries.count(first) == 1:
                    together.wait(30)
                session.get_one(Account, second, with_for_update=True).balance += 10

            transfer()

        with ThreadPoolExecutor(2) as threads:
            for future in [threads.submit(run, 1, 2), threads.submit(run, 2, 1)]:
                future.result()
        assert len(tries) >= 3
        assert onlooker.column("SELECT balance FROM account ORDER BY id") == [100] * 4

    def test_in_a_savepoint_of_it(self, session: OptInSession, onlooker: Onlooker) -> None:
        fails = Fails(session, 1)
        assert retried(session)(session.atomic(fails))() == 2
        assert onlooker.names() == ["try 2"]


class TestWhatIsNot:
    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT nothing FROM nowhere",
            "INSERT INTO author (name) VALUES ('Ada')",
            "DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40002'; END $$",
            "DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '55P03'; END $$",
        ],
    )
    def test_other_errors_of_the_database(
        self, session: OptInSession, onlooker: Onlooker, sql: str
    ) -> None:
        fails = Fails(session, 1, sql)
        with pytest.raises(DBAPIError) as caught:
            retried(session)(fails)()
        assert fails.tries == 1
        assert "tried" not in str(caught.value)
        assert onlooker.names() == []

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
    def test_errors_of_the_function(self, session: OptInSession, kind: type[BaseException]) -> None:
        tries = 0

        def function() -> None:
            nonlocal tries
            tries += 1
            raise kind

        with pytest.raises(kind):
            retried(session)(function)()
        assert tries == 1
        assert not session.in_transaction()

    def test_a_failure_that_was_caught_inside(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 1)

        def function() -> None:
            with suppress(OperationalError):
                fails()

        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            retried(session)(function)()
        assert fails.tries == 1

    def test_a_commit_whose_outcome_is_unknown(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        def cut(message: Message) -> None:
            if message.is_statement and message.verb == "COMMIT":
                wire.before_forward = None
                wire.cut_all()

        fails = Fails(session, 0)
        wire.before_forward = cut
        with pytest.raises(CommitOutcomeUnknown):
            retried(session)(fails)()
        assert fails.tries == 1

    def test_a_lost_connection(self, session: OptInSession, onlooker: Onlooker) -> None:
        fails = Fails(session, 0)

        def function() -> None:
            fails()
            onlooker.kill(backend_pid(session.connection()))
            session.execute(sa.text("SELECT 1"))

        with pytest.raises(DBAPIError):
            retried(session)(function)()
        assert fails.tries == 1

    def test_what_comes_after_the_commit(self, session: OptInSession, onlooker: Onlooker) -> None:
        """The function of on_commit() has a transaction of its own, which fails to serialize."""
        fails = Fails(session, 0)

        def after() -> None:
            with session.begin():
                session.execute(sa.text(FAILS_TO_SERIALIZE))

        def function() -> None:
            fails()
            session.on_commit(after)

        with pytest.raises(OperationalError, match="again"):
            retried(session)(function)()
        assert fails.tries == 1
        assert onlooker.names() == ["try 1"]

    def test_a_listener_that_fails_after_the_commit(
        self, session: OptInSession, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 0)

        def after(_: Session) -> None:
            with sessions() as other, other.begin():
                other.execute(sa.text(FAILS_TO_SERIALIZE))

        event.listen(session, "after_commit", after)
        with pytest.raises(OperationalError, match="again"):
            retried(session)(fails)()
        assert fails.tries == 1
        assert onlooker.names() == ["try 1"]

    def test_the_second_of_two_commits(
        self, engine: OptInEngine, wire_url: str, onlooker: Onlooker
    ) -> None:
        """The first is done, and the other one fails to serialize."""
        onlooker.run(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"
        )
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        for table in ("seat", "note"):
            onlooker.run(
                f"CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON {table} "
                "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        tries = 0
        with OptInSession(engine, binds={Note: other}) as session:

            @retried(session, tries=3)
            def on_both() -> None:
                nonlocal tries
                tries += 1
                session.add_all([Author(name=f"try {tries}"), Note(text="refused")])

            with pytest.raises(OperationalError, match="again"):
                on_both()
            assert tries == 1

            @retried(session, tries=3)
            def on_one() -> None:
                nonlocal tries
                tries += 1
                session.add(Seat(place=1))

            with pytest.raises(OperationalError, match="tried 3 times"):
                on_one()
            assert tries == 4
        other.dispose()

    def test_two_binds_whose_statements_fail_are_run_again(
        self, engine: OptInEngine, wire_url: str, onlooker: Onlooker
    ) -> None:
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        with OptInSession(engine, binds={Note: other}) as session:
            fails = Fails(session, 2)

            def on_both() -> None:
                session.add(Note(text="one"))
                fails()

            retried(session)(on_both)()
        assert onlooker.names() == ["try 3"]
        assert onlooker.column("SELECT text FROM note") == ["one"]
        other.dispose()


class TestTheLimit:
    def test_the_last_error_tells_the_tries(self, session: OptInSession) -> None:
        fails = Fails(session, 99)
        with pytest.raises(OperationalError, match="The transaction was tried 4 times") as caught:
            retried(session, tries=4)(fails)()
        assert fails.tries == 4
        assert is_serialization_failure(caught.value)
        assert "try 4" not in session.scalars(sa.select(Author.name)).all()

    def test_one_try(self, session: OptInSession) -> None:
        with pytest.raises(OperationalError, match="again"):
            retried(session, tries=1)(Fails(session, 1))()

    def test_is_ten(self, session: OptInSession) -> None:
        fails = Fails(session, 99)
        with pytest.raises(OperationalError, match="tried 10 times"):
            retried(session)(fails)()

    def test_each_call_has_its_own(self, session: OptInSession) -> None:
        fails = Fails(session, 1)
        function = retried(session, tries=2)(fails)
        for _ in range(3):
            fails.tries = 0
            session.execute(sa.delete(Author).where(Author.name.like("try %")))
            assert function() == 2

    def test_waits_are_tenacitys(self, session: OptInSession) -> None:
        slept: list[float] = []
        function: Any = retry_transaction(session)(Fails(session, 99))
        function.retry.sleep = slept.append
        with pytest.raises(OperationalError, match="tried 10 times"):
            function()
        assert len(slept) == 9
        for number, seconds in enumerate(slept):
            assert 0 <= seconds <= min(0.01 * 2**number, 1)
        function.retry.stop = stop_after_attempt(2)
        with pytest.raises(OperationalError, match="tried 2 times"):
            function()

    def test_while_it_waits_no_transaction_is_open(self, session: OptInSession) -> None:
        seen: list[bool] = []
        function: Any = retry_transaction(session)(Fails(session, 2))
        function.retry.sleep = lambda _: seen.append(session.in_transaction())
        function()
        assert seen == [False, False]


class TestObjects:
    def test_are_read_again_in_each_try(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        account = session.get_one(Account, 1)
        assert account.balance == 100
        onlooker.run("UPDATE account SET balance = 50 WHERE id = 1")
        seen: list[int] = []

        @retried(session, isolation_level="SERIALIZABLE")
        def withdraw(account: Account, amount: int) -> None:
            seen.append(account.balance)
            account.balance -= amount
            session.flush()
            if len(seen) < 3:
                session.execute(sa.text(FAILS_TO_SERIALIZE))

        withdraw(account, 10)
        assert seen == [50, 50, 50]
        assert onlooker.scalar("SELECT balance FROM account WHERE id = 1") == 40
        assert account in session

    def test_new_ones_that_are_given_are_stored_once(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 2)

        @retried(session)
        def store(author: Author) -> None:
            session.add(author)
            fails()

        author = Author(name="given")
        store(author)
        assert onlooker.names() == ["given", "try 3"]
        assert author.name == "given"

    @pytest.mark.parametrize("change", ["new", "dirty", "deleted"])
    def test_changes_that_wait_are_refused(
        self, session: OptInSession, onlooker: Onlooker, change: str
    ) -> None:
        account = session.get_one(Account, 1)
        fails = Fails(session, 0)
        if change == "new":
            session.add(Author(name="waiting"))
        elif change == "dirty":
            account.balance = 0
        else:
            session.delete(account)
        with pytest.raises(InvalidRequestError, match="changes waiting"):
            retried(session)(fails)()
        assert fails.tries == 0
        session.commit()
        assert retried(session)(fails)() == 1

    def test_an_attribute_set_to_what_it_was_is_no_change(self, session: OptInSession) -> None:
        account = session.get_one(Account, 1)
        account.balance = account.balance
        assert account in session.dirty
        assert retried(session)(Fails(session, 0))() == 1


class TestOpenTransactions:
    @pytest.mark.parametrize("how", ["begin", "begin_nested", "atomic", "unit", "itself"])
    def test_are_refused(self, session: OptInSession, onlooker: Onlooker, how: str) -> None:
        fails = Fails(session, 0)
        inner = retried(session)(fails)
        with pytest.raises(InvalidRequestError, match="has to be outermost"):
            if how == "itself":
                retried(session)(inner)()
            elif how == "unit":
                with unit_of_work(lambda: session):
                    inner()
            else:
                with getattr(session, how)():
                    inner()
        assert fails.tries == 0
        assert onlooker.names() == []
        assert inner() == 1

    def test_of_a_stock_bind(self, engine: OptInEngine) -> None:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        with OptInSession(engine, binds={Note: stock}) as session:
            fails = Fails(session, 0)
            assert session.scalar(sa.select(Note)) is None
            with pytest.raises(InvalidRequestError, match="by SQLAlchemy itself"):
                retried(session)(fails)()
            session.commit()
            assert retried(session)(fails)() == 1
        stock.dispose()

    def test_a_commit_inside_is_refused(self, session: OptInSession, onlooker: Onlooker) -> None:
        fails = Fails(session, 0)

        @retried(session)
        def function() -> None:
            fails()
            session.commit()

        with pytest.raises(InvalidRequestError, match="leave commit"):
            function()
        assert fails.tries == 1
        assert onlooker.names() == []

    def test_set_rollback(self, session: OptInSession, onlooker: Onlooker) -> None:
        fails = Fails(session, 1)

        @retried(session)
        def function() -> int:
            fails()
            session.set_rollback()
            return fails.tries

        assert function() == 2
        assert onlooker.names() == []


class TestAfterCommit:
    def test_is_called_once_and_on_rollback_for_each_that_failed(
        self, session: OptInSession
    ) -> None:
        called: list[str] = []
        fails = Fails(session, 2)

        @retried(session)
        def function() -> None:
            number = fails.tries + 1
            session.on_commit(lambda: called.append(f"committed {number}"))
            session.on_rollback(lambda: called.append(f"rolled back {number}"))
            fails()

        function()
        assert called == ["rolled back 1", "rolled back 2", "committed 3"]

    def test_may_retry_another(self, session: OptInSession, onlooker: Onlooker) -> None:
        fails = Fails(session, 1)
        another = retried(session)(fails)

        @retried(session)
        def function() -> None:
            session.on_commit(another)

        function()
        assert onlooker.names() == ["try 2"]


class TestSessions:
    def test_a_scoped_session(self, sessions: Sessions, onlooker: Onlooker) -> None:
        scoped = OptInScopedSession(sessions)
        tries = 0

        @retried(scoped)
        def store(name: str) -> str:
            nonlocal tries
            tries += 1
            scoped.add(Author(name=name))
            if tries == 1:
                scoped.execute(sa.text(FAILS_TO_SERIALIZE))
            return name

        assert not scoped.registry.has()
        assert store("one") == "one"
        scoped.remove()
        assert store(name="two") == "two"
        scoped.remove()
        assert onlooker.names() == ["one", "two"]

    def test_a_sessionmaker_gives_each_try_its_own(
        self, sessions: Sessions, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        given: list[OptInSession] = []

        @retry_transaction(sessions, isolation_level="SERIALIZABLE")
        def store(session: OptInSession, name: str, *, fail: int) -> int:
            given.append(session)
            session.add(Author(name=name))
            if len(given) <= fail:
                session.execute(sa.text(FAILS_TO_SERIALIZE))
            return len(given)

        assert store("one", fail=2) == 3
        assert len(set(given)) == 3
        assert onlooker.names() == ["one"]

    def test_services_join(self, sessions: Sessions, onlooker: Onlooker) -> None:
        @unit_of_work(sessions)
        def service(session: OptInSession, name: str) -> None:
            session.add(Author(name=name))

        join: Any = service
        tries = 0

        @retried(sessions)
        def both(session: OptInSession) -> None:
            nonlocal tries
            tries += 1
            join("one", session=session)
            join("two", session=session)
            if tries == 1:
                session.execute(sa.text(FAILS_TO_SERIALIZE))

        both()
        assert onlooker.names() == ["one", "two"]

    def test_what_is_none(self, engine: OptInEngine, sessions: Sessions) -> None:
        retry: Any = retry_transaction
        for wrong in (engine, None, "session"):
            with pytest.raises(TypeError, match=r"takes a session, .* such as db\.session"):
                retry(wrong)
        with pytest.raises(TypeError, match="needs the session first"):
            retry(sessions.__call__)
        scoped = OptInScopedSession(sessionmaker(engine))
        with Session(engine) as stock:
            ours: tuple[Any, ...] = (stock, sessionmaker(engine), scoped)
            for wrong in ours:
                with pytest.raises(TypeError, match="class_=OptInSession"):
                    retry(wrong)(print)()
        scoped.remove()


class TestFunctions:
    def test_methods(self, session: OptInSession, onlooker: Onlooker) -> None:
        class Service:
            @retry_transaction(session)
            def store(self, name: str) -> str:
                """Store one."""
                session.add(Author(name=name))
                return name

        assert Service().store("one") == "one"
        assert Service.store.__doc__ == "Store one."
        assert onlooker.names() == ["one"]

    def test_what_is_refused(self, session: OptInSession) -> None:
        async def coroutine() -> None: ...

        async def async_generator() -> AsyncGenerator[int, None]:
            yield 1

        def generator() -> Iterator[int]:
            yield 1

        refused: list[tuple[Any, str]] = [
            (coroutine, "does not decorate async functions"),
            (async_generator, "is a generator"),
            (generator, "is a generator"),
            (staticmethod(print), "below @classmethod"),
            (Account, "does not decorate classes"),
            (5, "decorates a function"),
        ]
        for wrong, message in refused:
            with pytest.raises(TypeError, match=message):
                retry_transaction(session)(wrong)
        with pytest.raises(TypeError, match="would run after the end"):
            retry_transaction(session)(lambda: (n for n in range(3)))()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: iter(["one", "two"]),
            lambda: (name for name in ["one", "two"]),
            lambda: map(str, ["one"]),
            lambda: zip(["one"], ["two"], strict=True),
            lambda: csv.reader(["one"]),
            lambda: io.StringIO("one"),
            lambda: io.BytesIO(b"one"),
            lambda: async_names(),
            lambda: LocalProxy(lambda: iter(["one"])),
        ],
    )
    @pytest.mark.parametrize("by_name", [False, True])
    def test_arguments_that_can_be_read_once_are_refused(
        self, session: OptInSession, wire: WireProxy, make: Callable[[], Any], by_name: bool
    ) -> None:
        """The first try would use it up, and the second one store nothing and succeed."""
        called: list[Any] = []

        @retry_transaction(session)
        def store(first: Any, names: Any = ()) -> None:
            called.append(names)

        with wire.record() as recording:
            if by_name:
                with pytest.raises(TypeError, match=r"argument names= is a .* read once: give it"):
                    store(1, names=make())
            else:
                with pytest.raises(TypeError, match=r"argument number 2 is a .* read once: give"):
                    store(1, make())
        assert not called
        assert recording.verbs == []
        assert not session.in_transaction()

    def test_arguments_that_can_be_read_again_are_not(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        """To ask a query for its iterator would send it; a proxy has the methods of everything."""
        query = session.query(Author)
        proxy: Any = LocalProxy(lambda: query)
        arguments = [["one"], {"a": 1}, {"a": 1}.keys(), "text", range(3), {1}, query, proxy, None]
        seen: list[Any] = []

        @retry_transaction(session)
        def store(*given: Any, **named: Any) -> None:
            seen.append((given, named))

        with wire.record() as recording:
            for argument in arguments:
                store(argument, named=argument)
        assert len(seen) == len(arguments)
        assert recording.verbs == []

    def test_wrong_options(self, session: OptInSession) -> None:
        with pytest.raises(ValueError, match="at most, and not 0"):
            retry_transaction(session, tries=0)
        with pytest.raises(TypeError, match="savepoint"):
            retry_transaction(session, savepoint=False)  # type: ignore[call-overload]


class TestConflicts:
    """16 threads that transfer money at SERIALIZABLE between 4 accounts."""

    @staticmethod
    def transfer(session: OptInSession, together: threading.Barrier | None, seed: int) -> None:
        sender, receiver = random.Random(seed).sample(range(1, 5), 2)
        paid_by, paid_to = session.get_one(Account, sender), session.get_one(Account, receiver)
        if together is not None:
            together.wait(60)  # all have read before anyone writes
        paid_by.balance -= 10
        paid_to.balance += 10

    def test_without_retry_some_fail(self, sessions: Sessions, onlooker: Onlooker) -> None:
        together = threading.Barrier(16)

        def run(seed: int) -> bool:
            try:
                with sessions() as session, session.begin(isolation_level="SERIALIZABLE"):
                    self.transfer(session, together, seed)
            except OperationalError as error:
                assert is_serialization_failure(error)
                return False
            return True

        with ThreadPoolExecutor(16) as threads:
            succeeded = list(threads.map(run, range(16)))
        # Each wants two of the four rows, so that no more than two have none in common.
        assert 1 <= succeeded.count(True) <= 2
        assert onlooker.scalar("SELECT sum(balance) FROM account") == 400

    def test_with_it_all_succeed_and_no_money_is_lost(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        together = threading.Barrier(16)
        tries: list[int] = []

        def run(seed: int) -> None:
            first = True

            @retry_transaction(sessions, isolation_level="SERIALIZABLE", tries=200)
            def transfer(session: OptInSession) -> None:
                nonlocal first
                tries.append(seed)
                barrier, first = together if first else None, False
                self.transfer(session, barrier, seed)

            transfer()

        expected = dict.fromkeys(range(1, 5), 100)
        for seed in range(16):
            sender, receiver = random.Random(seed).sample(range(1, 5), 2)
            expected[sender] -= 10
            expected[receiver] += 10
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(run, range(16)))
        assert len(tries) >= 16 + 14
        balances = onlooker.column("SELECT balance FROM account ORDER BY id")
        assert balances == list(expected.values())
        assert sum(balances) == 400


def test_an_integrity_error_is_no_serialization_failure(session: OptInSession) -> None:
    session.add(Author(name="Ada"))
    with pytest.raises(IntegrityError) as caught:
        session.commit()
    assert not is_serialization_failure(caught.value)
    assert not is_serialization_failure(ValueError())


def test_it_needs_the_session_first() -> None:
    wrong: Any = retry_transaction
    with pytest.raises(TypeError, match=r"write @retry_transaction\(db\.session\)"):

        @wrong  # type: ignore[untyped-decorator]
        def transfer() -> None: ...
