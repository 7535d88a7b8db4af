"""``atomic()`` works with sessions that have several binds and with scoped sessions."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import scoped_session, sessionmaker

from fictive_sqlalchemy import (
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
    unit_of_work,
)
from tests.core.atomic.support import assert_usable
from tests.library import Author, Note, NoteBase, Onlooker, Sessions, Undo, add, sent
from tests.wire import WireProxy


class TestBinds:
    @pytest.fixture
    def stock(self) -> Iterator[sa.Engine]:
        stock = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool)
        NoteBase.metadata.create_all(stock)
        yield stock
        stock.dispose()

    @pytest.fixture
    def both(self, engine: OptInEngine, stock: sa.Engine) -> Iterator[OptInSession]:
        with OptInSession(engine, binds={Note: stock}) as session:
            yield session

    @staticmethod
    def texts(stock: sa.Engine) -> list[str]:
        with stock.connect() as connection:
            return list(connection.scalars(sa.select(Note.text).order_by(Note.text)))

    def test_all_binds_are_in_the_block(
        self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        with both.atomic():
            both.add_all([Author(name="one"), Note(text="one")])
        with pytest.raises(Undo), both.atomic():
            both.add_all([Author(name="two"), Note(text="two")])
            both.flush()
            raise Undo
        with both.atomic():
            both.add_all([Author(name="three"), Note(text="three")])
            both.flush()
            both.set_rollback()
        assert (onlooker.names(), self.texts(stock)) == (["one"], ["one"])

    def test_atomic_is_refused_after_a_read_on_a_stock_bind(
        self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        assert both.scalar(sa.select(Note)) is None
        with pytest.raises(InvalidRequestError, match="by SQLAlchemy itself"):
            both.atomic().__enter__()
        both.commit()
        with both.atomic():
            both.add(Note(text="one"))
        assert self.texts(stock) == ["one"]
        assert_usable(both, onlooker)

    def test_atomic_works_in_a_savepoint_after_a_read_on_a_stock_bind(
        self, both: OptInSession, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        assert both.scalar(sa.select(Note)) is None
        with both.begin_nested():
            with both.atomic():
                both.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="durable"):
                both.atomic(durable=True).__enter__()
        with pytest.raises(InvalidRequestError, match="already begun"):
            both.atomic().__enter__()  # nobody would commit it
        assert onlooker.names() == []
        both.commit()
        assert onlooker.names() == ["one"]

    def test_one_block_covers_two_of_our_binds(
        self, engine: OptInEngine, wire_url: str, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        other = create_engine(wire_url)
        NoteBase.metadata.create_all(other)
        with OptInSession(engine, binds={Note: other}) as session:
            with wire.record() as recording:
                with pytest.raises(Undo), session.atomic():
                    session.add_all([Author(name="two"), Note(text="two")])
                    session.flush()
                    raise Undo
            assert sent(recording).count("ROLLBACK") == 2
            with session.atomic():
                session.add(Author(name="outer"))
                with session.atomic():
                    session.add(Note(text="inner"))
            assert onlooker.names() == ["outer"]
            assert onlooker.column("SELECT text FROM note") == ["inner"]
        other.dispose()

    def test_atomic_joins_the_transaction_of_a_connection_of_the_users_own(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            outer = connection.begin()
            with OptInSession(connection) as session:
                with session.atomic():
                    add(session, "one")
            outer.rollback()
        assert onlooker.names() == []


class TestScopedSessions:
    def test_a_scoped_session_is_asked_for_its_session_at_each_call(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        scoped = OptInScopedSession(sessions)

        @scoped.atomic
        def store(name: str) -> None:
            add(scoped(), name)

        assert not scoped.registry.has()
        store("one")
        scoped.remove()
        with scoped.atomic(isolation_level="SERIALIZABLE"):
            store("two")
            assert scoped().in_nested_transaction() is False
            scoped.set_rollback()
        scoped.remove()
        assert onlooker.names() == ["one"]

    def test_a_scope_of_stock_sessions_is_refused(self, engine: OptInEngine) -> None:
        scoped = OptInScopedSession(sessionmaker(engine))
        for call in (
            lambda: scoped.atomic().__enter__(),
            scoped.set_rollback,
            lambda: scoped.on_commit(print),
            lambda: scoped.on_rollback(print),
        ):
            with pytest.raises(TypeError, match="class_=OptInSession"):
                call()
        scoped.remove()

    def test_a_unit_of_work_joins_atomic_of_a_scoped_session(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        scoped: scoped_session[OptInSession] = OptInScopedSession(sessions)
        assert isinstance(scoped, OptInScopedSession)

        @unit_of_work(scoped)
        def service(session: OptInSession, name: str) -> None:
            session.add(Author(name=name))

        with scoped.atomic():
            service("one")
            with pytest.raises(IntegrityError):
                service("Ada")
        with scoped.atomic():
            service("two")
            scoped.set_rollback()
        scoped.remove()
        assert onlooker.names() == ["one"]
