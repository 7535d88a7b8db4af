"""A transaction on two databases tells what is stored when one of them fails."""

# pytest.raises() ends the block around the one that it names:
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, create_engine
from tests.library import Author, Document, Note, NoteBase, Onlooker, backend_pid
from tests.wire import Message, WireProxy


class TestTwoBinds:
    @pytest.fixture
    def other(self, server: Any, driver: str, wire: WireProxy) -> Iterator[OptInEngine]:
        name = server.create_database()
        engine = create_engine(wire.url(server.url(driver, name)))
        NoteBase.metadata.create_all(engine)
        yield engine
        engine.dispose()
        server.drop_database(name)

    @pytest.fixture
    def session(self, engine: OptInEngine, other: OptInEngine) -> Iterator[OptInSession]:
        binds: dict[Any, Any] = {Note: other, Author: engine, Document: engine}
        with OptInSession(binds=binds) as session:
            yield session

    def test_a_loss_after_the_first_commit_says_that_half_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, other: OptInEngine
    ) -> None:
        calls: list[str] = []
        committed = 0

        def cut(message: Message) -> None:
            nonlocal committed
            if message.is_statement and message.verb == "COMMIT":
                committed += 1
                if committed == 2:
                    wire.before_forward = None
                    wire.cut_all()

        wire.before_forward = cut
        with pytest.raises(OperationalError, match="stored in part") as raised:
            with session.begin():
                session.on_commit(lambda: calls.append("committed"))
                session.on_rollback(lambda: calls.append("rolled back"))
                session.add_all([Author(name="one"), Note(text="one")])
        assert "nothing of the transaction is stored" not in str(raised.value)
        with other.connect() as connection:
            stored = [*onlooker.names(), *connection.scalars(sa.select(Note.text))]
        assert stored == ["one"]
        assert calls == []
        assert not session.in_transaction()

    def test_a_server_lost_before_the_second_commit_says_that_half_is_stored(
        self, session: OptInSession, onlooker: Onlooker, other: OptInEngine
    ) -> None:
        calls: list[str] = []
        committed: list[sa.Connection] = []

        def kill_the_other(connection: sa.Connection) -> None:
            committed.append(connection)
            if len(committed) == 1:
                [victim] = {one, two} - {connection}
                onlooker.kill(backend_pid(victim))

        event.listen(session.get_bind(Author.__mapper__), "commit", kill_the_other)
        event.listen(other, "commit", kill_the_other)
        with pytest.raises(OperationalError) as raised, session.begin():
            session.on_rollback(lambda: calls.append("rolled back"))
            session.add_all([Author(name="one"), Note(text="one")])
            session.flush()
            one = session.connection({"mapper": Author.__mapper__})
            two = session.connection({"mapper": Note.__mapper__})
        assert "stored in part" in str(raised.value)
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert calls == []


class TestTwoBindsBeforeTheFirstCommit(TestTwoBinds):
    """Tried several times, since SQLAlchemy commits the binds in no order."""

    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_a_bind_that_is_aborted_keeps_the_other_from_being_stored(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            session.add_all([Author(name="one"), Note(text="one")])
            session.flush()
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_a_bind_that_is_aborted_keeps_one_that_joins_at_the_end_from_being_stored(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
            session.add(Note(text="one") if aborted is Author else Author(name="one"))
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_a_bind_that_a_listener_aborts_keeps_the_other_from_being_stored(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        caught: list[DBAPIError] = []

        @event.listens_for(session, "after_flush_postexec")
        def fail(*_: Any) -> None:
            try:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": Author})
            except DBAPIError as error:
                caught.append(error)

        with pytest.raises(PendingRollbackError) as raised, session.begin():
            session.get(Author, 1)
            session.get(Note, 1)
            session.add(Note(text="one"))
        assert raised.value.__cause__ is caught[0]
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_a_bind_that_is_lost_keeps_the_other_from_being_stored(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        with pytest.raises(OperationalError, match="nothing of the transaction is stored"):
            with session.begin():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                onlooker.kill(backend_pid(session.connection({"mapper": Author.__mapper__})))
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []


class TestTwoBindsInASavepoint(TestTwoBinds):
    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_a_bind_aborted_in_a_savepoint_takes_the_part_of_the_other_back(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with session.begin():
            with pytest.raises(PendingRollbackError), session.begin_nested():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                with pytest.raises(DBAPIError):
                    session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_a_bind_lost_in_a_savepoint_is_the_error_even_if_the_other_is_released(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(OperationalError) as caught, session.begin_nested():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                onlooker.kill(backend_pid(session.connection({"mapper": Author.__mapper__})))
            assert caught.value.connection_invalidated
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []
