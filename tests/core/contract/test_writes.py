"""Rows 8 to 12 of the contract are about writes, rollbacks and errors outside a transaction."""

# ruff: noqa: SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, ProgrammingError

from fictive_sqlalchemy import OptInSession
from tests.core.contract.support import count
from tests.library import (
    Author,
    Document,
    Editor,
    Onlooker,
    Person,
    Seat,
    Sessions,
    authors,
    backend_pid,
    sent,
)
from tests.wire import WireProxy


@pytest.mark.parametrize("write", ["flush", "commit"])
class TestRow8FlushOrCommitOutside:
    def test_flush_or_commit_outside_stores_all_in_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        session.get_one(Author, 1).name = "changed"
        session.delete(session.get_one(Document, 2))
        session.add(Author(name="added"))
        with wire.record() as recording:
            getattr(session, write)()
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert sorted(sent(recording)[1:-1]) == ["DELETE", "INSERT", "UPDATE"]
        assert recording.round_trips == 5
        assert onlooker.names() == ["added", "changed"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 2
        assert not session.in_transaction()

    def test_a_flush_or_commit_that_fails_stores_nothing_and_the_session_is_usable(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        session.get_one(Author, 2).name = "changed"
        session.add(Author(name="Ada"))
        with wire.record() as recording:
            with pytest.raises(IntegrityError):
                getattr(session, write)()
            assert session.get_one(Author, 2).name == "Bob"
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-2:] == ["ROLLBACK", "SELECT"]
        assert onlooker.names() == []
        session.add(Author(name="after"))
        getattr(session, write)()
        assert onlooker.names() == ["after"]

    def test_a_flush_or_commit_that_fails_at_the_commit_stores_nothing(
        self, session: OptInSession, onlooker: Onlooker, write: str
    ) -> None:
        session.add_all([Seat(place=1), Seat(place=1)])
        with pytest.raises(IntegrityError):
            getattr(session, write)()
        assert session.scalars(sa.select(Seat)).all() == []
        session.add(Seat(place=1))
        getattr(session, write)()
        assert onlooker.scalar("SELECT count(*) FROM seat") == 1

    def test_flush_or_commit_with_nothing_waiting_sends_nothing(
        self, session: OptInSession, wire: WireProxy, write: str
    ) -> None:
        session.get_one(Author, 1)
        with wire.record() as recording:
            getattr(session, write)()
        assert recording.messages == []


def add_and_flush(session: OptInSession, rows: list[dict[str, Any]]) -> None:
    session.add_all([Author(**row) for row in rows])
    session.flush()


class TestRow9OneCallThatWritesManyRowsOutside:
    ROWS = 2501

    def rows(self, last: str = "last") -> list[dict[str, Any]]:
        return [{"name": f"n{n}"} for n in range(self.ROWS - 1)] + [{"name": last}]

    CALLS: dict[str, Callable[[OptInSession, list[dict[str, Any]]], Any]] = {  # noqa: RUF012
        "a statement with many parameter sets": lambda session, rows: session.execute(
            sa.insert(authors), rows
        ),
        "text with many parameter sets": lambda session, rows: session.execute(
            sa.text("INSERT INTO author (name) VALUES (:name)"), rows
        ),
        "an ORM bulk insert": lambda session, rows: session.execute(sa.insert(Author), rows),
        "an ORM bulk insert that returns": lambda session, rows: session.scalars(
            sa.insert(Author).returning(Author), rows
        ).all(),
        "bulk_insert_mappings": lambda session, rows: session.bulk_insert_mappings(
            sa.inspect(Author), rows
        ),
        "bulk_save_objects": lambda session, rows: session.bulk_save_objects(
            [Author(**row) for row in rows]
        ),
        "the session's connection": lambda session, rows: session.connection().execute(
            sa.insert(authors), rows
        ),
        "flush": add_and_flush,
    }

    @pytest.mark.parametrize("call", CALLS)
    def test_one_call_that_writes_many_rows_is_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, call: str
    ) -> None:
        with wire.record() as recording:
            self.CALLS[call](session, self.rows())
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert set(sent(recording)[1:-1]) == {"INSERT"}
        assert len(onlooker.names()) == self.ROWS

    @pytest.mark.parametrize("call", CALLS)
    def test_a_call_that_fails_at_the_last_row_stores_nothing(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, call: str
    ) -> None:
        with wire.record() as recording, pytest.raises(IntegrityError):
            self.CALLS[call](session, self.rows("Ada"))
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []
        assert count(session) == 3
        self.CALLS[call](session, self.rows()[:2])
        assert onlooker.names() == ["n0", "n1"]

    def test_updates_that_fail_at_the_last_row_change_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        rows = [{"id": 1, "age": 40}, {"id": 2, "age": -1}]
        with pytest.raises(IntegrityError):
            session.execute(sa.update(Author), rows)
        with pytest.raises(IntegrityError):
            session.bulk_update_mappings(sa.inspect(Author), rows)
        with pytest.raises(IntegrityError):
            session.execute(
                sa.update(authors)
                .where(authors.c.id == sa.bindparam("b"))
                .values(age=sa.bindparam("a")),
                [{"b": row["id"], "a": row["age"]} for row in rows],
            )
        assert onlooker.column("SELECT DISTINCT age FROM author") == [30]
        assert count(session) == 3

    def test_one_row_in_two_tables_is_stored_in_both_or_none(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            session.execute(sa.insert(Editor), [{"name": "E", "rank": 1}])
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Editor), [{"name": "F", "rank": 0}])
        with pytest.raises(IntegrityError):
            session.bulk_insert_mappings(sa.inspect(Editor), [{"name": "G", "rank": 0}])
        with pytest.raises(IntegrityError):
            session.bulk_save_objects([Editor(name="H", rank=0)])
        assert onlooker.column("SELECT name FROM person") == ["E"]
        assert session.scalars(sa.select(Person)).one().name == "E"

    @pytest.mark.parametrize(
        "call",
        [
            lambda session, rows: session.execute(sa.insert(Seat), rows),
            lambda session, rows: session.bulk_insert_mappings(sa.inspect(Seat), rows),
            lambda session, rows: session.bulk_save_objects([Seat(**row) for row in rows]),
        ],
        ids=["execute", "bulk_insert_mappings", "bulk_save_objects"],
    )
    def test_a_call_whose_commit_fails_stores_nothing_and_the_session_is_usable(
        self, session: OptInSession, onlooker: Onlooker, call: Callable[..., Any]
    ) -> None:
        with pytest.raises(IntegrityError):
            call(session, [{"place": 1}, {"place": 1}])
        assert session.scalars(sa.select(Seat)).all() == []
        with session.begin():
            session.add(Author(name="after"))
        call(session, [{"place": 1}, {"place": 2}])
        assert onlooker.names() == ["after"]
        assert onlooker.column("SELECT place FROM seat ORDER BY 1") == [1, 2]

    def test_a_bulk_call_leaves_what_is_waiting_in_the_session_to_wait(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        dirty, pending = session.get_one(Author, 1), Author(name="pending")
        dirty.age = 99
        session.add(pending)
        session.bulk_insert_mappings(Author, self.rows())
        with pytest.raises(IntegrityError):
            session.bulk_insert_mappings(Author, [{"name": "a"}, {"name": "Bob"}])
        assert pending in session.new
        assert dirty in session.dirty
        assert dirty.age == 99
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30
        assert onlooker.scalar("SELECT count(*) FROM author WHERE name = 'pending'") == 0
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 99
        assert onlooker.scalar("SELECT count(*) FROM author WHERE name = 'pending'") == 1


class TestRow10OneCoreStatementThatWritesOutside:
    WRITES: dict[str, tuple[str, Callable[[], Any]]] = {  # noqa: RUF012
        "insert": ("INSERT", lambda: sa.insert(Author).values(name="done")),
        "insert returning": (
            "INSERT",
            lambda: sa.insert(Author).values(name="done").returning(Author),
        ),
        "insert into a table": (
            "INSERT",
            lambda: sa.insert(authors).values(name="done"),
        ),
        "several rows of values": (
            "INSERT",
            lambda: sa.insert(Author).values([{"name": "done"}, {"name": "done too"}]),
        ),
        "update": ("UPDATE", lambda: sa.update(Author).where(Author.id == 1).values(name="done")),
        "text": ("UPDATE", lambda: sa.text("UPDATE author SET name = 'done' WHERE id = 1")),
        "a write in a CTE": (
            "WITH",
            lambda: sa.select(
                sa.insert(Author).values(name="done").returning(Author.id).cte().c.id
            ),
        ),
    }

    @pytest.mark.parametrize("write", WRITES)
    def test_a_core_statement_is_sent_alone_and_durable_when_the_call_returns(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        verb, statement = self.WRITES[write]
        with wire.record() as recording:
            session.execute(statement())
        assert sent(recording) == [verb]
        assert recording.round_trips == 1
        assert onlooker.names()[:1] == ["done"]
        session.rollback()
        assert onlooker.names()[:1] == ["done"]

    def test_a_core_delete_is_sent_alone_and_durable_when_the_call_returns(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            session.execute(sa.delete(Document).where(Document.id == 1))
        assert sent(recording) == ["DELETE"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 2

    def test_a_core_statement_comes_after_what_was_waiting_in_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording:
            session.execute(sa.update(Document).values(title="new"))
        assert sent(recording) == ["BEGIN", "INSERT", "UPDATE", "COMMIT"]
        assert onlooker.names() == ["pending"]
        assert not session.new
        assert not session.in_transaction()

    def test_a_core_statement_that_fails_undoes_what_was_waiting(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        ada = session.get_one(Author, 1)
        ada.age = 99
        with wire.record() as recording:
            with pytest.raises(IntegrityError):
                session.execute(sa.update(Author).where(Author.id == 2).values(name="Ada"))
        assert sent(recording) == ["BEGIN", "UPDATE", "UPDATE", "ROLLBACK"]
        assert not session.in_transaction()
        assert ada.age == 30
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30

    @pytest.mark.parametrize("synchronize", [False, "auto", "fetch", "evaluate"])
    def test_an_update_outside_overtakes_no_change_that_waits(
        self, session: OptInSession, onlooker: Onlooker, synchronize: Any
    ) -> None:
        ada = session.get_one(Author, 1)
        ada.age = 40
        session.query(Author).filter_by(id=1).update({"age": 50}, synchronize_session=synchronize)
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 50

    def test_a_delete_outside_sees_the_change_that_waits(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        document = session.get_one(Document, 1)
        document.title = "changed"
        result: Any = session.execute(sa.delete(Document).where(Document.title == "changed"))
        assert result.rowcount == 1
        assert onlooker.scalar("SELECT count(*) FROM document") == 2


class TestRow11RollbackOutside:
    @pytest.mark.parametrize("connected", [True, False])
    def test_rollback_outside_forgets_what_is_waiting_and_sends_nothing(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker, connected: bool
    ) -> None:
        with sessions() as session:
            if connected:
                session.get(Author, 1)
            pending = Author(name="pending")
            session.add(pending)
            with wire.record() as recording:
                session.rollback()
            assert recording.messages == []
            assert pending not in session
            assert sa.inspect(pending).transient
            session.commit()
        assert onlooker.names() == []

    def test_rollback_outside_undoes_changes_from_before_and_after_a_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        ada, bob, cid = session.scalars(sa.select(Author).order_by(Author.id))
        ada.age = 91
        session.bulk_insert_mappings(Document, [{"title": t, "author_id": 1} for t in "ab"])
        bob.age = 92  # SQLAlchemy notes nothing here: an object was dirty before
        cid.age = 93
        with wire.record() as recording:
            session.rollback()
        assert recording.messages == []
        assert (ada.age, bob.age, cid.age) == (30, 30, 30)
        session.commit()
        assert onlooker.column("SELECT DISTINCT age FROM author") == [30]

    def test_rollback_outside_brings_a_deleted_object_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        document = session.get_one(Document, 1)
        session.delete(document)
        with wire.record() as recording:
            session.rollback()
        assert recording.messages == []
        assert document in session
        assert document not in session.deleted
        assert document.title == "Of 1"
        session.commit()
        assert onlooker.scalar("SELECT count(*) FROM document") == 3


class TestRow12AnErrorFromTheDatabaseOutside:
    def test_an_error_outside_is_the_exception_and_the_next_statement_just_works(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ProgrammingError):
                session.execute(sa.text("SELECT nothing FROM nowhere"))
            assert session.get_one(Author, 1).name == "Ada"
            with pytest.raises(IntegrityError):
                session.execute(sa.insert(Author).values(name="Ada"))
            assert session.get_one(Author, 2).name == "Bob"
        assert sent(recording) == ["SELECT", "SELECT", "INSERT", "SELECT"]
        assert recording.round_trips == 4

    def test_an_error_outside_leaves_what_is_waiting(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        with pytest.raises(ProgrammingError):
            session.execute(sa.text("SELECT nothing FROM nowhere"))
        session.commit()
        assert onlooker.names() == ["pending"]

    def test_a_read_outside_after_the_server_process_has_died_just_works(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.get_one(Author, 1)
        onlooker.kill(backend_pid(session.connection()))
        assert session.get_one(Author, 2).name == "Bob"
