"""A session may have several binds, stock ones among them, and commit in two phases."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
)
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession, create_engine
from tests.library import (
    Author,
    Document,
    Note,
    NoteBase,
    Onlooker,
    Person,
    Seat,
    Sessions,
    add,
    assert_at_rest,
    authors,
    backend_pid,
    sent,
)
from tests.wire import WireProxy


class TestSeveralBinds:
    """Two engines of ours in one session."""

    @pytest.fixture
    def second(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        second = create_engine(wire_url)
        with second.begin() as connection:
            NoteBase.metadata.create_all(connection)
        yield second
        assert_at_rest(second)
        second.dispose()

    @pytest.fixture
    def sessions(self, engine: OptInEngine, second: OptInEngine) -> Sessions:
        binds: dict[Any, Any] = {Note: second, Author: engine, Seat: engine}
        return sessionmaker(binds=binds, class_=OptInSession)

    def test_a_transaction_covers_each_bind_that_is_used(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.get(Author, 1)
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.add_all([Author(name="new"), Note(text="new")])
                session.flush()
                (connections,) = TRANSACTION_CONNECTIONS.values()
                assert len(connections) == 2
                raise ValueError("mine")
        assert sent(recording).count("BEGIN") == 2
        assert sent(recording).count("ROLLBACK") == 2
        with wire.record() as recording, session.begin():
            session.add_all([Author(name="new"), Note(text="new")])
        assert sent(recording).count("COMMIT") == 2
        assert onlooker.names() == ["new"]
        assert onlooker.column("SELECT text FROM note") == ["new"]

    def test_reads_go_alone_on_each_bind(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            session.get(Author, 1)
            session.get(Note, 1)
            session.get(Author, 2)
        assert sent(recording) == ["SELECT"] * 3
        assert recording.round_trips == 3

    @pytest.mark.parametrize("write", ["flush", "commit", "bulk_save_objects"])
    def test_one_call_outside_stores_on_both_binds_or_none(
        self, session: OptInSession, onlooker: Onlooker, write: str
    ) -> None:
        session.add_all([Author(name="old"), Note(text="old")])
        session.commit()
        for broken in (
            [Author(name="new"), Note(text="old")],
            [Author(name="old"), Note(text="new")],
        ):
            with pytest.raises(IntegrityError):
                if write == "bulk_save_objects":
                    session.bulk_save_objects(broken)
                else:
                    session.add_all(broken)
                    getattr(session, write)()
            assert onlooker.names() == ["old"]
            assert onlooker.column("SELECT text FROM note") == ["old"]
        if write == "bulk_save_objects":
            session.bulk_save_objects([Author(name="new"), Note(text="new")])
        else:
            session.add_all([Author(name="new"), Note(text="new")])
            getattr(session, write)()
        assert onlooker.names() == ["new", "old"]
        assert onlooker.column("SELECT text FROM note ORDER BY 1") == ["new", "old"]

    def test_a_level_is_that_of_each_bind(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording, session.begin(isolation_level="SERIALIZABLE"):
            session.get(Author, 1)
            session.get(Note, 1)
        assert [text for text in recording.statements if text.startswith("BEGIN")] == [
            "BEGIN ISOLATION LEVEL SERIALIZABLE"
        ] * 2

    def test_an_unknown_level_is_refused_before_anything_is_sent(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with (
                pytest.raises(ArgumentError),
                session.begin(isolation_level="SNAPSHOT"),  # type: ignore[arg-type]  # pyright: ignore
            ):
                session.get(Author, 1)
        assert recording.messages == []
        assert session.get_one(Author, 1).name == "Ada"

    @staticmethod
    def store(session: OptInSession, write: str, text: str) -> None:
        objects = [Seat(place=1), Note(text=text)]
        if write == "bulk_save_objects":
            session.bulk_save_objects(objects)
            return
        session.add_all(objects)
        if write == "block":
            with session.begin():
                pass
        else:
            getattr(session, write)()

    @pytest.mark.parametrize("write", ["block", "flush", "commit", "bulk_save_objects"])
    def test_two_phases_store_on_both_binds_or_none_even_if_a_commit_fails(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        with sessions(twophase=True) as session:
            with wire.record() as recording:
                self.store(session, write, "one")
            assert sent(recording).count("PREPARE") == 2
            assert sent(recording).count("COMMIT PREPARED") == 2
            assert onlooker.column("SELECT text FROM note") == ["one"]
            with pytest.raises(DBAPIError):
                self.store(session, write, "two")
            assert onlooker.column("SELECT text FROM note") == ["one"]
            assert onlooker.scalar("SELECT count(*) FROM seat") == 1
            assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0
            with wire.record() as recording:
                session.get(Note, 1, populate_existing=True)
                session.get(Author, 1)
            assert sent(recording) == ["SELECT", "SELECT"]
        assert wire.transactions_open == 0


class TestARoutingSession:
    """As SQLAlchemy's documentation shows it: writes go to one engine, reads to another."""

    @pytest.fixture
    def follower(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        follower = create_engine(wire_url, connect_args={"application_name": "follower"})
        follower.connect().close()
        yield follower
        assert_at_rest(follower)
        follower.dispose()

    @pytest.fixture
    def session(self, engine: OptInEngine, follower: OptInEngine) -> Iterator[OptInSession]:
        class RoutingSession(OptInSession):
            def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
                writes = self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert))
                return engine if writes else follower

        with RoutingSession() as session:
            yield session

    def test_a_routing_session_reads_from_one_engine_and_writes_to_the_other(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        name = sa.text("SHOW application_name")
        assert session.scalar(name) == "follower"
        writes: list[Callable[[], Any]] = [
            lambda: add(session, "one"),
            lambda: session.execute(sa.insert(Author).values(name="two")),
            lambda: session.bulk_insert_mappings(
                sa.inspect(Author), [{"name": "three"}, {"name": "four"}]
            ),
            lambda: session.bulk_save_objects([Author(name="five"), Author(name="six")]),
            lambda: session.execute(sa.update(Author).where(Author.id == 1).values(age=2)),
            lambda: session.execute(sa.delete(Document).where(Document.id == 1)),
        ]
        pid = backend_pid(session.connection())
        for write in writes:
            with wire.record() as recording:
                write()
            written = [m for m in recording.messages if m.verb in ("INSERT", "UPDATE", "DELETE")]
            assert written
            assert pid not in {message.pid for message in written}
        with wire.record() as recording, session.begin():
            session.scalar(name)
            session.add(Author(name="seven"))
        assert sent(recording).count("BEGIN") == sent(recording).count("COMMIT") == 2
        assert len(onlooker.names()) == 7


class TestTwoPhases:
    @pytest.fixture
    def session(self, sessions: Sessions) -> Iterator[OptInSession]:
        with sessions(twophase=True) as session:
            yield session

    def test_an_error_rolls_a_two_phase_transaction_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.add(Author(name="new"))
                session.flush()
                raise ValueError("mine")
            session.get(Author, 1)
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK", "SELECT"]
        assert onlooker.names() == []

    def test_a_two_phase_session_is_prepared_and_committed_by_hand(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.begin()
        session.add(Author(name="new"))
        session.prepare()
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 1
        assert onlooker.names() == []
        session.commit()
        assert onlooker.names() == ["new"]
        session.begin()
        session.add(Author(name="gone"))
        session.prepare()
        session.rollback()
        assert onlooker.names() == ["new"]
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0

    def test_an_error_caught_inside_two_phases_is_not_silent(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises((PendingRollbackError, DBAPIError)), session.begin():
            session.execute(sa.insert(Author).values(name="lost"))
            with pytest.raises(IntegrityError):
                session.execute(sa.insert(Author).values(name="Ada"))
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_reads_of_a_two_phase_session_outside_are_the_statement_alone(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            session.get(Author, 1)
        assert sent(recording) == ["SELECT"]

    def test_many_rows_of_a_two_phase_session_outside_are_all_or_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author), [{"name": "a"}, {"name": "Ada"}])
        with pytest.raises(IntegrityError):
            session.bulk_save_objects([Author(name="a"), Author(name="Ada")])
        assert onlooker.names() == []
        session.bulk_save_objects([Author(name="a"), Author(name="b")])
        session.execute(sa.insert(Author), [{"name": "c"}, {"name": "d"}])
        assert onlooker.names() == ["a", "b", "c", "d"]
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0


class TestAStockBindBesideOurs:
    """Row 21: SQLAlchemy's own behaviour for what runs on SQLite, ours for what runs on ours."""

    @pytest.fixture
    def stock(self) -> Iterator[sa.Engine]:
        stock = sa.create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        NoteBase.metadata.create_all(stock)
        yield stock
        stock.dispose()

    @pytest.fixture
    def sessions(self, engine: OptInEngine, stock: sa.Engine) -> Sessions:
        binds: dict[Any, Any] = {Note: stock, Author: engine, Document: engine, Person: engine}
        return sessionmaker(binds=binds, class_=OptInSession)

    @staticmethod
    def notes(stock: sa.Engine) -> list[str]:
        with stock.connect() as connection:
            return list(connection.scalars(sa.select(Note.text).order_by(Note.id)))

    def test_a_read_of_the_stock_bind_begins_as_ever(self, session: OptInSession) -> None:
        session.get(Note, 1)
        assert session.in_transaction()
        session.rollback()
        assert not session.in_transaction()

    def test_a_read_of_our_bind_stays_alone_meanwhile(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        with wire.record() as recording:
            session.get(Author, 1)
            session.execute(sa.insert(Author).values(name="new"))
            session.execute(sa.insert(authors), [{"name": "newer"}, {"name": "newest"}])
        assert sent(recording)[:4] == ["SELECT", "INSERT", "BEGIN", "INSERT"]
        assert sent(recording)[-1] == "COMMIT"
        session.rollback()
        assert onlooker.names() == ["new", "newer", "newest"]

    def test_the_stock_bind_flushes_before_it_reads_and_rolls_back_what_it_flushed(
        self, session: OptInSession, stock: sa.Engine
    ) -> None:
        session.add(Note(text="new"))
        assert session.scalars(sa.select(Note.text)).all() == ["new"]
        session.rollback()
        assert self.notes(stock) == []
        session.add(Note(text="newer"))
        session.flush()
        assert session.in_transaction()
        session.rollback()
        assert self.notes(stock) == []

    @pytest.mark.parametrize("begin", [True, False])
    def test_changes_of_the_stock_bind_and_ours_are_stored_or_none(
        self,
        session: OptInSession,
        wire: WireProxy,
        stock: sa.Engine,
        onlooker: Onlooker,
        begin: bool,
    ) -> None:
        def store(*objects: object) -> None:
            if begin:
                with session.begin():
                    session.add_all(objects)
            else:
                session.add_all(objects)
                session.commit()

        store(Note(text="one"), Author(name="one"))
        for broken in ((Note(text="one"), Author(name="x")), (Note(text="x"), Author(name="one"))):
            with pytest.raises(IntegrityError):
                store(*broken)
            session.rollback()
            assert not session.in_transaction()
        assert self.notes(stock) == ["one"]
        assert onlooker.names() == ["one"]
        assert wire.transactions_open == 0
        with wire.record() as recording:
            session.get(Author, 1)
        assert sent(recording) == ["SELECT"]

    def test_after_a_read_of_the_stock_bind_commit_stores_both(
        self, session: OptInSession, wire: WireProxy, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        session.add_all([Note(text="one"), Author(name="one")])
        with wire.record() as recording:
            session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        session.get(Note, 1)
        session.add_all([Note(text="two"), Author(name="two")])
        with wire.record() as recording:
            session.rollback()
        assert recording.messages == []
        assert self.notes(stock) == ["one"]
        assert onlooker.names() == ["one"]

    def test_an_orm_bulk_insert_of_our_bind_meanwhile_joins_or_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])
        session.bulk_save_objects([Author(name="c")])
        session.commit()
        assert onlooker.names() == ["a", "b", "c"]
        assert wire.transactions_open == 0

    def test_begin_after_a_read_of_the_stock_bind_is_an_error_that_says_why(
        self, session: OptInSession
    ) -> None:
        session.get(Note, 1)
        with pytest.raises(InvalidRequestError, match=r"commit\(\) or rollback\(\)"):
            session.begin()
        session.commit()
        with session.begin():
            session.get(Note, 1)

    def test_begin_nested_after_a_read_of_the_stock_bind_makes_our_bind_join(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        with wire.record() as recording:
            with session.begin_nested():
                session.add(Author(name="new"))
            assert onlooker.names() == []
            session.commit()
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("binds", ["both", "the stock one alone", "a default"])
    def test_begin_nested_outside_loses_nothing_that_waits(
        self, engine: OptInEngine, stock: sa.Engine, onlooker: Onlooker, binds: str
    ) -> None:
        choice: dict[str, dict[Any, Any]] = {
            "both": {"binds": {Note: stock, Author: engine}},
            "the stock one alone": {"binds": {Note: stock}},
            "a default": {"bind": engine, "binds": {Note: stock}},
        }
        kinds: list[Callable[[str], Any]] = [lambda text: Note(text=text)]
        if binds != "the stock one alone":
            kinds.append(lambda text: Author(name=text))
        for before in kinds:
            with OptInSession(**choice[binds]) as session:
                session.add(before("waiting"))
                with pytest.raises(ValueError, match="mine"), session.begin_nested():
                    session.add_all([kind("gone") for kind in kinds])
                    session.flush()
                    raise ValueError("mine")
                with session.begin_nested():
                    session.add_all([kind("nested") for kind in kinds])
                session.commit()
                assert not session.in_transaction()
            stored = {*self.notes(stock)} | {*onlooker.names()}
            assert stored == {"waiting", "nested"}
            onlooker.run("DELETE FROM author WHERE id > 3")
            with stock.begin() as connection:
                connection.execute(sa.delete(Note))

    def test_a_bulk_call_that_fails_after_a_read_of_the_stock_bind_can_be_rolled_back(
        self, session: OptInSession, wire: WireProxy, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        def save() -> None:
            session.bulk_save_objects([Author(name="a"), Author(name="Ada")])

        def insert() -> None:
            session.execute(sa.insert(Author), [{"name": "a"}, {"name": "Ada"}])

        def flush() -> None:
            session.add_all([Author(name="a"), Author(name="Ada")])
            session.flush()

        for fail in (save, insert, flush):
            session.add(Note(text=fail.__name__))
            session.scalars(sa.select(Note)).all()
            with pytest.raises(IntegrityError):
                fail()
            session.rollback()
            assert not session.in_transaction()
            assert wire.transactions_open == 0
            with wire.record() as recording:
                session.get(Author, 1)
            assert sent(recording) in (["SELECT"], [])
            session.expire_all()
        assert self.notes(stock) == []
        assert onlooker.names() == []

    def test_a_bulk_statement_of_the_stock_bind_is_as_with_sqlalchemy(
        self, session: OptInSession, stock: sa.Engine
    ) -> None:
        session.execute(sa.insert(Note), [{"text": "a"}, {"text": "b"}])
        session.bulk_save_objects([Note(text="c")])
        assert session.in_transaction()
        session.rollback()
        assert self.notes(stock) == []
        session.bulk_save_objects([Note(text="c")])
        session.commit()
        assert self.notes(stock) == ["c"]

    def test_a_lock_on_our_bind_is_refused_all_the_same(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.get(Note, 1)
        author = session.get_one(Author, 1)
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="begin"):
                session.scalars(sa.select(Author).with_for_update())
            with pytest.raises(InvalidRequestError, match="begin"):
                session.refresh(author, with_for_update=True)
        assert recording.messages == []
