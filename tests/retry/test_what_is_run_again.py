"""Serialization failures and deadlocks are run again, up to a limit, and other errors are not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, PendingRollbackError
from sqlalchemy.orm import Session
from tenacity import stop_after_attempt

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.tenacity import is_serialization_failure, retry_transaction
from tests.library import Author, Note, NoteBase, Onlooker, Seat, Sessions, backend_pid, sent
from tests.retry.support import FAILS_TO_SERIALIZE, Account, Fails, retried
from tests.wire import Message, WireProxy

DEADLOCKS = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40P01'; END $$"


class TestWhatIsRunAgain:
    @pytest.mark.parametrize("sql", [FAILS_TO_SERIALIZE, DEADLOCKS])
    def test_the_whole_transaction_is_run_again(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, sql: str
    ) -> None:
        with wire.record() as recording:
            assert retried(session)(Fails(session, 2, sql))() == 3
        undone = ["BEGIN", "INSERT", "DO", "ROLLBACK"]
        assert sent(recording) == [*undone, *undone, "BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["try 3"]
        assert not session.in_transaction()

    def test_the_transaction_is_run_again_with_the_options_of_begin(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        options = {"isolation_level": "SERIALIZABLE", "read_only": False}
        with wire.record() as recording:
            retried(session, **options)(Fails(session, 1))()
        begun = [one for one in recording.statements if one.startswith("BEGIN")]
        assert begun == ["BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE"] * 2

    def test_a_transaction_with_a_conflict_that_commit_finds_is_run_again(
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

    def test_a_transaction_that_a_deadlock_has_stopped_is_run_again(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
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

    def test_a_transaction_that_fails_in_a_savepoint_is_run_again(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
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
    def test_other_errors_of_the_database_are_raised_at_once(
        self, session: OptInSession, onlooker: Onlooker, sql: str
    ) -> None:
        fails = Fails(session, 1, sql)
        with pytest.raises(DBAPIError) as caught:
            retried(session)(fails)()
        assert fails.tries == 1
        assert "tried" not in str(caught.value)
        assert onlooker.names() == []

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit])
    def test_errors_of_the_function_are_raised_at_once(
        self, session: OptInSession, kind: type[BaseException]
    ) -> None:
        tries = 0

        def function() -> None:
            nonlocal tries
            tries += 1
            raise kind

        with pytest.raises(kind):
            retried(session)(function)()
        assert tries == 1
        assert not session.in_transaction()

    def test_a_transaction_whose_failure_was_caught_inside_is_not_run_again(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 1)

        def function() -> None:
            with suppress(OperationalError):
                fails()

        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            retried(session)(function)()
        assert fails.tries == 1

    def test_a_commit_whose_outcome_is_unknown_is_not_run_again(
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

    def test_a_transaction_that_lost_its_connection_is_not_run_again(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 0)

        def function() -> None:
            fails()
            onlooker.kill(backend_pid(session.connection()))
            session.execute(sa.text("SELECT 1"))

        with pytest.raises(DBAPIError):
            retried(session)(function)()
        assert fails.tries == 1

    def test_a_transaction_is_not_run_again_for_what_fails_after_its_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
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

    def test_a_transaction_is_not_run_again_for_a_listener_that_fails_after_its_commit(
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

    def test_a_transaction_is_not_run_again_after_the_first_of_two_commits(
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

    def test_one_try_raises_the_error_as_it_is(self, session: OptInSession) -> None:
        with pytest.raises(OperationalError, match="again"):
            retried(session, tries=1)(Fails(session, 1))()

    def test_the_limit_is_ten_tries(self, session: OptInSession) -> None:
        fails = Fails(session, 99)
        with pytest.raises(OperationalError, match="tried 10 times"):
            retried(session)(fails)()

    def test_each_call_has_its_own_limit(self, session: OptInSession) -> None:
        fails = Fails(session, 1)
        function = retried(session, tries=2)(fails)
        for _ in range(3):
            fails.tries = 0
            session.execute(sa.delete(Author).where(Author.name.like("try %")))
            assert function() == 2

    def test_waits_and_limit_are_those_of_tenacity(self, session: OptInSession) -> None:
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

    def test_no_transaction_is_open_while_the_next_try_waits(self, session: OptInSession) -> None:
        seen: list[bool] = []
        function: Any = retry_transaction(session)(Fails(session, 2))
        function.retry.sleep = lambda _: seen.append(session.in_transaction())
        function()
        assert seen == [False, False]


def test_an_integrity_error_is_no_serialization_failure(session: OptInSession) -> None:
    session.add(Author(name="Ada"))
    with pytest.raises(IntegrityError) as caught:
        session.commit()
    assert not is_serialization_failure(caught.value)
    assert not is_serialization_failure(ValueError())
