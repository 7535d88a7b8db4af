"""Each attempt finds the session as the first did, and a session in a transaction is refused."""

# ruff: noqa: PT012  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.library import Author, Note, NoteBase, Onlooker, Sessions
from tests.retry.support import FAILS_TO_SERIALIZE, Account, Fails, retried
from tests.wire import WireProxy


class TestObjects:
    def test_objects_are_read_again_in_each_try(
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

    def test_new_objects_that_are_given_are_stored_once(
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
        with pytest.raises(InvalidRequestError, match="pending changes from before"):
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
    def test_a_retry_in_an_open_transaction_is_refused(
        self, session: OptInSession, onlooker: Onlooker, how: str
    ) -> None:
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

    def test_a_retry_is_refused_after_a_read_on_a_stock_bind(self, engine: OptInEngine) -> None:
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

    def test_a_commit_inside_a_retried_function_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 0)

        @retried(session)
        def function() -> None:
            fails()
            session.commit()

        with pytest.raises(InvalidRequestError, match="leave commit"):
            function()
        assert fails.tries == 1
        assert onlooker.names() == []

    def test_set_rollback_rolls_back_the_try_that_succeeds(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 1)

        @retried(session)
        def function() -> int:
            fails()
            session.set_rollback()
            return fails.tries

        assert function() == 2
        assert onlooker.names() == []


class TestAfterCommit:
    def test_on_commit_is_called_once_and_on_rollback_for_each_try_that_failed(
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

    def test_a_function_after_the_commit_may_be_retried(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        fails = Fails(session, 1)
        another = retried(session)(fails)

        @retried(session)
        def function() -> None:
            session.on_commit(another)

        function()
        assert onlooker.names() == ["try 2"]


class TestSessions:
    def test_a_scoped_session_can_be_retried(self, sessions: Sessions, onlooker: Onlooker) -> None:
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

    def test_a_sessionmaker_gives_each_try_its_own_session(
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

    def test_units_of_work_join_a_retried_transaction(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
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

    def test_what_is_no_session_is_refused(self, engine: OptInEngine, sessions: Sessions) -> None:
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
