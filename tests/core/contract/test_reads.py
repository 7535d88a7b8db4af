"""Rows 1, 7, 13, 14 and 15 of the contract are about reads outside a transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError, ProgrammingError
from sqlalchemy.orm import joinedload, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.core.contract.support import count
from tests.library import (
    Author,
    Document,
    Onlooker,
    Sessions,
    authors,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy

READS: dict[str, Callable[[OptInSession], Any]] = {
    "get": lambda session: session.get(Author, 1),
    "get of nothing": lambda session: session.get(Author, 99),
    "execute": lambda session: session.execute(sa.select(Author)).all(),
    "scalars": lambda session: session.scalars(sa.select(Author).limit(1)).one(),
    "scalar": count,
    "columns": lambda session: session.execute(sa.select(Author.id, Author.name)).all(),
    "text": lambda session: session.execute(sa.text("SELECT 1")).scalar_one(),
    "query": lambda session: session.query(Author).filter_by(name="Ada").one(),
    "query count": lambda session: session.query(Author).count(),
    "joined load": lambda session: (
        session.scalars(sa.select(Author).options(joinedload(Author.documents))).unique().all()
    ),
    "connection": lambda session: session.connection().execute(sa.select(Author)).all(),
    "the first row of several": lambda session: session.execute(sa.select(Author)).first(),
    "no row looked at": lambda session: session.execute(sa.select(Author)),
}


class TestRow1AReadOutside:
    @pytest.mark.parametrize("read", READS)
    def test_a_read_outside_sends_the_statement_alone(
        self, session: OptInSession, wire: WireProxy, read: str
    ) -> None:
        with wire.record() as recording:
            READS[read](session)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1
        assert wire.transactions_open == 0

    def test_the_second_read_and_that_of_the_next_session_send_the_statement_alone(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            for _ in range(2):
                with sessions() as session:
                    session.get(Author, 1)
                    session.get(Author, 2)
        assert sent(recording) == ["SELECT"] * 4
        assert recording.round_trips == 4
        assert recording.idle_in_transaction == 0

    def test_lazy_loads_expired_attributes_and_refresh_send_the_statement_alone(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        document = session.get_one(Document, 1)
        with wire.record() as recording:
            author = document.author
            session.expire(document)
            assert document.title == "Of 1"
            session.refresh(author)
        assert sent(recording) == ["SELECT"] * 3
        assert recording.round_trips == 3

    def test_a_read_after_a_transaction_sends_the_statement_alone(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin():
            session.get_one(Author, 1).age = 31
        with wire.record() as recording:
            session.get_one(Author, 2)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1

    def test_a_read_outside_is_no_transaction_for_the_session(self, session: OptInSession) -> None:
        session.get_one(Author, 1)
        assert not session.in_transaction()
        assert session.get_transaction() is None
        assert not session.connection().in_transaction()
        assert session.is_active

    def test_a_read_outside_sees_what_others_have_committed_since(
        self, sessions: Sessions, session: OptInSession
    ) -> None:
        assert count(session) == 3
        with sessions.begin() as other:
            other.add(Author(name="new"))
        assert count(session) == 4


class TestRow7AReadOutsideWithChangesWaiting:
    @pytest.mark.parametrize("read", READS)
    def test_a_read_outside_never_writes_the_changes_that_wait(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, read: str
    ) -> None:
        document = session.get_one(Document, 1)
        doomed = session.get_one(Document, 2)
        pending = Author(name="pending")
        session.add(pending)
        document.title = "dirty"
        session.delete(doomed)
        with wire.record() as recording:
            READS[read](session)
        assert sent(recording) == ["SELECT"]
        assert pending in session.new
        assert document in session.dirty
        assert document.title == "dirty"
        assert doomed in session.deleted
        assert onlooker.names() == []
        assert onlooker.column("SELECT title FROM document ORDER BY id") == [
            *("Of 1", "Of 2", "Of 3"),
        ]

    def test_a_lazy_load_outside_never_writes_the_changes_that_wait(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        author = session.get_one(Author, 1)
        author.age = 99
        session.add(Author(name="pending"))
        with wire.record() as recording:
            assert [document.title for document in author.documents] == ["Of 1"]
        assert sent(recording) == ["SELECT"]
        assert author.age == 99

    def test_a_read_inside_flushes_first_as_ever(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording, session.begin():
            assert count(session) == 4
        assert sent(recording) == ["BEGIN", "INSERT", "SELECT", "COMMIT"]

    def test_a_read_outside_leaves_the_changes_that_wait_to_a_later_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        session.get_one(Author, 1).name = "changed"
        assert count(session) == 3
        session.commit()
        assert onlooker.names() == ["changed", "pending"]


class TestRow13WithForUpdateOutside:
    SPELLINGS: dict[str, Callable[[OptInSession], Any]] = {  # noqa: RUF012
        "select": lambda session: session.execute(sa.select(Author).with_for_update()),
        "select of columns": lambda session: session.execute(
            sa.select(Author.id).with_for_update(skip_locked=True)
        ),
        "for share": lambda session: session.scalars(sa.select(Author).with_for_update(read=True)),
        "scalar": lambda session: session.scalar(sa.select(Author).with_for_update(nowait=True)),
        "query": lambda session: session.query(Author).with_for_update().all(),
        "get": lambda session: session.get(Author, 1, with_for_update=True),
        "get of one that is not loaded": lambda session: session.get(
            Author, 3, with_for_update={"of": Author}
        ),
        "refresh": lambda session: session.refresh(
            session.get_one(Author, 1), with_for_update=True
        ),
        "refresh of an attribute": lambda session: session.refresh(
            session.get_one(Author, 1), ["age"], with_for_update={"nowait": True}
        ),
        "the session's connection": lambda session: session.connection().execute(
            sa.select(Author).with_for_update()
        ),
        "from_statement": lambda session: session.scalars(
            sa.select(Author).from_statement(sa.select(Author).with_for_update())
        ).all(),
        "a subquery": lambda session: session.execute(
            sa.select(sa.select(Author).with_for_update().subquery())
        ),
        "a CTE": lambda session: session.execute(
            sa.select(sa.select(Author).with_for_update().cte())
        ),
        "streaming": lambda session: session.scalars(
            sa.select(Author).with_for_update().execution_options(yield_per=1)
        ).all(),
    }

    @pytest.mark.parametrize("spelling", SPELLINGS)
    def test_a_lock_outside_is_a_clear_error_and_nothing_is_sent_or_lost(
        self, session: OptInSession, wire: WireProxy, spelling: str
    ) -> None:
        author = session.get_one(Author, 1)
        author.age = 99
        with wire.record() as recording, pytest.raises(InvalidRequestError, match="begin"):
            self.SPELLINGS[spelling](session)
        assert recording.messages == []
        assert author in session.dirty
        assert author.age == 99
        assert session.get_one(Author, 2).name == "Bob"

    @pytest.mark.parametrize("spelling", sorted(set(SPELLINGS) - {"streaming"}))
    def test_a_lock_inside_works(
        self, session: OptInSession, wire: WireProxy, spelling: str
    ) -> None:
        session.get_one(Author, 1)
        with wire.record() as recording, session.begin():
            self.SPELLINGS[spelling](session)
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert any(" FOR " in statement for statement in recording.statements)


class TestRow14StreamingOutside:
    STREAMS: dict[str, Callable[[OptInSession], Iterator[int]]] = {  # noqa: RUF012
        "objects": lambda session: iter(
            author.id
            for author in session.scalars(sa.select(Author).execution_options(yield_per=100))
        ),
        "an option of the call": lambda session: iter(
            session.scalars(sa.select(Author.id), execution_options={"yield_per": 100})
        ),
        "query": lambda session: iter(author.id for author in session.query(Author).yield_per(100)),
        "stream_results": lambda session: iter(
            session.scalars(
                sa.select(authors.c.id).execution_options(stream_results=True, max_row_buffer=100)
            )
        ),
        "text": lambda session: iter(
            session.scalars(sa.text("SELECT id FROM author").execution_options(stream_results=True))
        ),
        "the session's connection": lambda session: iter(
            session.connection()
            .execute(sa.select(Author.id), execution_options={"yield_per": 100})
            .scalars()
        ),
    }

    @pytest.fixture(autouse=True)
    def many(self, engine: OptInEngine) -> None:
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO author (name) SELECT 'n' || n FROM generate_series(4, 1000) n")
            )

    @pytest.mark.parametrize("stream", STREAMS)
    def test_a_stream_outside_reads_every_row_with_no_transaction_open_meanwhile(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, stream: str
    ) -> None:
        seen = []
        with wire.record() as recording:
            for id in self.STREAMS[stream](session):
                seen.append(id)
                if len(seen) in (1, 500, 900):
                    assert wire.transactions_open == 0
                    assert onlooker.state(backend_pid(session.connection())) == "idle"
        assert sorted(seen) == list(range(1, 1001))
        assert sent(recording)[0] == "DECLARE"
        assert "WITH HOLD" in recording.statements[0]
        assert sent(recording).count("FETCH") >= 3
        assert not {"BEGIN", "COMMIT", "ROLLBACK"} & set(sent(recording))
        assert recording.idle_in_transaction == 0

    def test_a_stream_outside_leaves_no_cursor_behind(self, session: OptInSession) -> None:
        cursors = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")
        for _ in session.scalars(sa.select(Author).execution_options(yield_per=100)):
            pass
        assert session.scalar(cursors) == 0

    def test_a_stream_that_is_abandoned_leaves_no_cursor_in_the_pool(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        cursors = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")
        with sessions() as session:
            stream = session.scalars(sa.select(Author).execution_options(yield_per=100))
            assert next(stream).id == 1
            pid = backend_pid(session.connection())
        with sessions() as session:
            assert backend_pid(session.connection()) == pid
            assert session.scalar(cursors) == 0

    def test_what_a_stream_outside_reads_can_be_written_one_transaction_each(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        stream = session.scalars(
            sa.select(Author).order_by(Author.id).execution_options(yield_per=100)
        )
        for author in stream:
            if author.id % 100 == 0:
                with session.begin():
                    author.age = author.id
        assert onlooker.column("SELECT age FROM author WHERE age > 30 ORDER BY 1") == [
            *range(100, 1001, 100),
        ]

    def test_a_stream_outside_survives_a_transaction_that_fails_meanwhile(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        stream = session.execute(
            sa.select(Author.id).order_by(Author.id).execution_options(yield_per=100)
        )
        rows = [*stream.fetchmany(100)]
        with pytest.raises(IntegrityError), session.begin():
            session.execute(sa.insert(Author).values(name="Ada"))
        rows += stream.fetchmany(500)
        with pytest.raises(ProgrammingError):
            session.execute(sa.text("SELECT nothing FROM nowhere"))
        rows += stream.all()
        assert [id for (id,) in rows] == list(range(1, 1001))


class TestRow15WaitingBetweenReads:
    def test_a_session_that_waits_between_reads_keeps_no_transaction_open(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        session.get_one(Author, 1).age = 99
        count(session)
        assert wire.transactions_open == 0
        assert onlooker.state(backend_pid(session.connection())) == "idle"

    def test_a_session_keeps_its_connection_while_the_pool_has_spare_ones(
        self, engine: OptInEngine, sessions: Sessions
    ) -> None:
        with sessions() as one, sessions() as two:
            one.get(Author, 1)
            two.get(Author, 1)
            assert checked_out(engine) == 2

    def test_a_session_gives_its_connection_back_when_the_pool_has_no_other(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            sessions = sessionmaker(engine, class_=OptInSession)
            with sessions() as one, sessions() as two, wire.record() as recording:
                unread = one.scalars(sa.select(Author).order_by(Author.id))
                assert checked_out(engine) == 0
                assert two.get_one(Author, 1).name == "Ada"
                assert unread.first() is one.get_one(Author, 1)
                two.expire_all()
                with two.begin():
                    two.get_one(Author, 1).age = 31
                    two.flush()
                    assert checked_out(engine) == 1
                assert checked_out(engine) == 0
                assert one.get_one(Author, 2).name == "Bob"
        assert sent(recording) == [
            *("SELECT", "SELECT", "BEGIN", "SELECT", "UPDATE", "COMMIT", "SELECT"),
        ]

    def test_a_session_gives_its_connection_back_when_it_is_told_to(
        self, session: OptInSession, engine: OptInEngine, wire: WireProxy
    ) -> None:
        author = session.get_one(Author, 1)
        unread = session.scalars(sa.select(Author.name).order_by(Author.id))
        session.add(Author(name="pending"))
        with wire.record() as recording:
            session.give_back()
            session.give_back()
            assert checked_out(engine) == 0
        assert recording.messages == []
        assert unread.all() == ["Ada", "Bob", "Cid"]
        assert len(session.new) == 1
        with wire.record() as recording:
            assert [document.id for document in author.documents] == [1]
        assert sent(recording) == ["SELECT"]

    def test_a_session_does_not_give_its_connection_back_inside(
        self, session: OptInSession, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="new"))
            session.flush()
            session.give_back()
            assert checked_out(engine) == 1
        assert onlooker.names() == ["new"]
