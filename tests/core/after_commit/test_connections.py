"""The right functions are called when a connection is lost, and with several binds."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, create_engine
from tests.core.after_commit.support import Calls
from tests.library import Author, Note, NoteBase, Onlooker, Undo, add, backend_pid
from tests.wire import Message, WireProxy


class TestALostConnection:
    def test_a_loss_during_commit_calls_neither_function(
        self, session: OptInSession, calls: Calls, wire: WireProxy
    ) -> None:
        def cut(message: Message) -> None:
            if message.is_statement and message.verb == "COMMIT":
                wire.before_forward = None
                wire.cut_all()

        with pytest.raises(CommitOutcomeUnknown):
            with session.begin():
                calls.watch("unknown")
                with pytest.raises(Undo), session.begin_nested():
                    calls.watch("undone")
                    raise Undo
                add(session, "one")
                wire.before_forward = cut
        assert calls == ["undone rolled back"]
        with session.begin():
            calls.watch("next")
        assert calls == ["undone rolled back", "next committed"]

    @pytest.mark.parametrize("how", ["flush", "commit", "bulk"])
    def test_a_loss_during_the_commit_of_one_call_calls_neither_function(
        self, session: OptInSession, calls: Calls, wire: WireProxy, how: str
    ) -> None:
        def cut(message: Message) -> None:
            if message.is_statement and message.verb == "COMMIT":
                wire.before_forward = None
                wire.cut_all()

        event.listen(session, "before_flush", lambda *_: calls.watch("unknown"))
        event.listen(session, "do_orm_execute", lambda *_: calls.watch("unknown"))
        wire.before_forward = cut
        with pytest.raises(CommitOutcomeUnknown):
            if how == "bulk":
                session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])
            else:
                session.add(Author(name="one"))
                getattr(session, how)()
        session.rollback()
        assert calls == []

    def test_a_loss_before_commit_is_a_rollback(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError):
            with session.begin():
                calls.watch("one")
                add(session, "one")
                onlooker.kill(backend_pid(session.connection()))
        assert calls == ["one rolled back"]
        assert onlooker.names() == []

    def test_a_loss_inside_a_block_is_a_rollback(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with pytest.raises(DBAPIError):
            with session.begin():
                calls.watch("one")
                add(session, "one")
                onlooker.kill(backend_pid(session.connection()))
                add(session, "two")
        assert calls == ["one rolled back"]


class TestBinds:
    @pytest.fixture
    def other(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        yield other
        other.dispose()

    def test_functions_are_called_after_a_two_phase_commit(
        self, engine: OptInEngine, other: OptInEngine, onlooker: Onlooker
    ) -> None:
        if onlooker.scalar("SHOW max_prepared_transactions") == "0":
            pytest.skip("The server takes no prepared transactions.")
        with OptInSession(engine, binds={Note: other}, twophase=True) as session:
            calls = Calls(session)
            with session.begin():
                session.on_commit(lambda: calls.extend(onlooker.names()))
                calls.watch("one")
                session.add_all([Author(name="one"), Note(text="one")])
            assert calls == ["one", "one committed"]
            calls.clear()
            with pytest.raises(IntegrityError), session.begin():
                calls.watch("two")
                session.add_all([Author(name="Ada"), Note(text="two")])
            assert calls == ["two rolled back"]
            calls.clear()
            event.listen(session, "do_orm_execute", lambda *_: calls.watch("bulk"))
            session.execute(sa.insert(Author), [{"name": "two"}, {"name": "three"}])
            assert calls == ["bulk committed"]

    def test_functions_are_called_on_a_stock_bind(self) -> None:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        with OptInSession(stock) as session:
            calls: list[str] = []

            def watch(name: str) -> None:
                session.on_commit(lambda: calls.append(f"{name} committed"))
                session.on_rollback(lambda: calls.append(f"{name} rolled back"))

            with session.begin():
                watch("begin")
                session.add(Note(text="one"))
            # SQLAlchemy begins by itself, and it ends as with SQLAlchemy.
            assert session.scalar(sa.select(Note.text)) == "one"
            watch("read")
            assert calls == ["begin committed"]
            session.commit()
            assert session.scalar(sa.select(Note.text)) == "one"
            watch("read")
            session.rollback()
        assert calls == ["begin committed", "read committed", "read rolled back"]
        stock.dispose()

    def test_a_function_may_read_from_a_stock_bind(self, engine: OptInEngine) -> None:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        with OptInSession(engine, binds={Note: stock}) as session:
            called: list[Any] = []
            with session.begin():
                session.on_commit(lambda: called.append(session.scalar(sa.select(Note.text))))
                session.on_commit(lambda: called.append("second"))
            assert called == [None, "second"]
        stock.dispose()
