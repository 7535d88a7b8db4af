"""The contract, row by row, as it shows on the wire. The other test files look closer.

| # | situation |                                   | # | situation |
|---|-----------|                                   |---|-----------|
| 1 | a read outside |                              | 11 | `rollback()` outside |
| 2 | `begin()` after any number of reads |         | 12 | an error from the database outside |
| 3 | an exception inside |                         | 13 | `with_for_update` outside |
| 4 | `begin()` inside |                            | 14 | streaming outside |
| 5 | `begin_nested()` inside |                     | 15 | a request that waits between reads |
| 6 | `begin_nested()` outside |                    | 16 | `engine.connect()` without `begin()` |
| 7 | a read outside with changes waiting |         | 17 | `engine.begin()` |
| 8 | `flush()` or `commit()` outside |             | 18 | the log of `echo=True` |
| 9 | a call that sends several writing statements  | 19 | back in the pool |
| 10 | one Core statement that writes outside |     | 20 | a session on a `Connection` |
"""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    CompileError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    ProgrammingError,
)
from sqlalchemy.orm import joinedload, sessionmaker

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession
from tests.library import (
    Author,
    Document,
    Editor,
    Onlooker,
    Person,
    Seat,
    Sessions,
    assert_at_rest,
    authors,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy


def count(session: OptInSession) -> int | None:
    return session.scalar(sa.select(sa.func.count()).select_from(Author))


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
    def test_sends_the_statement_alone(
        self, session: OptInSession, wire: WireProxy, read: str
    ) -> None:
        with wire.record() as recording:
            READS[read](session)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1
        assert wire.transactions_open == 0

    def test_the_second_read_too_and_that_of_the_next_session(
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

    def test_lazy_loads_expired_attributes_and_refresh_too(
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

    def test_after_a_transaction_too(self, session: OptInSession, wire: WireProxy) -> None:
        with session.begin():
            session.get_one(Author, 1).age = 31
        with wire.record() as recording:
            session.get_one(Author, 2)
        assert sent(recording) == ["SELECT"]
        assert recording.round_trips == 1

    def test_is_no_transaction_for_the_session_either(self, session: OptInSession) -> None:
        session.get_one(Author, 1)
        assert not session.in_transaction()
        assert session.get_transaction() is None
        assert not session.connection().in_transaction()
        assert session.is_active

    def test_sees_what_others_have_committed_since(
        self, sessions: Sessions, session: OptInSession
    ) -> None:
        assert count(session) == 3
        with sessions.begin() as other:
            other.add(Author(name="new"))
        assert count(session) == 4


class TestRow2Begin:
    def test_after_reads_is_a_real_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        author = session.get_one(Author, 1)
        session.scalars(sa.select(Document)).all()
        with wire.record() as recording, session.begin():
            author.name = "inside"
            session.flush()
            assert onlooker.names() == []
        assert sent(recording) == ["BEGIN", "UPDATE", "COMMIT"]
        assert recording.round_trips == 3
        assert onlooker.names() == ["inside"]

    def test_of_n_statements_takes_n_plus_two_round_trips(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        for ids in ([1], [1, 2, 3]):
            with wire.record() as recording, session.begin():
                for id in ids:
                    session.get_one(Author, id, populate_existing=True)
            assert sent(recording) == ["BEGIN", *["SELECT"] * len(ids), "COMMIT"]
            assert recording.round_trips == len(ids) + 2

    def test_that_is_empty_sends_nothing(self, session: OptInSession, wire: WireProxy) -> None:
        session.get(Author, 1)
        with wire.record() as recording:
            with session.begin():
                pass
            with session.begin():
                session.begin_nested()
            with pytest.raises(ValueError, match="mine"), session.begin():
                raise ValueError("mine")
        assert recording.messages == []

    def test_sends_begin_with_the_first_statement_only(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin():
            with wire.record() as recording:
                session.add(Author(name="new"))
                assert session.in_transaction()
            assert recording.messages == []

    def test_keeps_loaded_objects_attached_and_pending_ones_pending(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        author = session.get_one(Author, 1)
        pending = Author(name="pending")
        session.add(pending)
        author.age = 99
        with wire.record() as recording, session.begin():
            assert author in session
            assert session.is_modified(author)
            assert author.age == 99
            assert sa.inspect(pending).pending
            session.add(author)  # harmless: it is attached already
        assert sorted(sent(recording)) == ["BEGIN", "COMMIT", "INSERT", "UPDATE"]
        assert sa.inspect(pending).persistent
        assert author.age == 99

    def test_one_after_the_other_works_with_the_same_objects(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        document = session.get_one(Document, 1)
        with session.begin():
            document.title = "one"
            document.author.age = 41  # a lazy load, inside
        with wire.record() as recording, session.begin():
            document.title = "two"
            document.author.age = 42
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert sent(recording).count("UPDATE") == 2
        assert onlooker.column("SELECT title FROM document WHERE id = 1") == ["two"]
        assert onlooker.column("SELECT age FROM author WHERE id = 1") == [42]

    def test_works_without_the_with_statement(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        transaction = session.begin()
        session.add(Author(name="new"))
        transaction.commit()
        session.begin()
        session.add(Author(name="gone"))
        session.flush()
        session.rollback()
        session.begin()
        session.add(Author(name="newer"))
        session.commit()
        assert onlooker.names() == ["new", "newer"]

    def test_leaves_results_from_before_readable_inside_and_after(
        self, session: OptInSession
    ) -> None:
        before = session.execute(sa.select(Author.name).order_by(Author.id))
        assert before.fetchone() == ("Ada",)
        with session.begin():
            session.execute(sa.update(Author).values(age=50))
            assert before.fetchone() == ("Bob",)
            inside = session.execute(sa.select(Author.name).order_by(Author.id))
        assert before.scalars().all() == ["Cid"]
        assert inside.scalars().all() == ["Ada", "Bob", "Cid"]


class TestRow3AnExceptionInside:
    def test_rolls_back_and_the_session_is_usable_at_once(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        author = session.get_one(Author, 1)
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                author.name = "changed"
                session.flush()
                raise ValueError("mine")
            assert author.name == "Ada"
        assert sent(recording) == ["BEGIN", "UPDATE", "ROLLBACK", "SELECT"]
        assert onlooker.names() == []
        assert author in session

    def test_that_the_database_raised_too(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(IntegrityError), session.begin():
                session.execute(sa.insert(Author).values(name="new"))
                session.execute(sa.insert(Author).values(name="Ada"))
            assert count(session) == 3
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK", "SELECT"]
        with session.begin():
            session.add(Author(name="after"))
        assert onlooker.names() == ["after"]

    def test_that_is_raised_by_the_last_flush_too(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(IntegrityError), session.begin():
                session.get_one(Author, 2).age = 77
                session.flush()
                session.add(Author(name="Ada"))
            assert session.get_one(Author, 2).age == 30
        assert sent(recording) == ["BEGIN", "SELECT", "UPDATE", "INSERT", "ROLLBACK", "SELECT"]
        assert list(session.new) == []
        assert onlooker.scalar("SELECT max(age) FROM author") == 30

    def test_that_the_commit_raises_too(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(IntegrityError), session.begin():
                session.add_all([Seat(place=1), Seat(place=1)])
            assert session.scalars(sa.select(Seat)).all() == []
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-2:] == ["COMMIT", "SELECT"]
        assert onlooker.scalar("SELECT count(*) FROM seat") == 0

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_that_is_no_exception_but_an_interruption_too(
        self,
        session: OptInSession,
        wire: WireProxy,
        onlooker: Onlooker,
        error: type[BaseException],
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(error), session.begin():
                session.add(Author(name="gone"))
                session.flush()
                raise error
            assert count(session) == 3
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK", "SELECT"]
        assert onlooker.names() == []


class TestRow4BeginInside:
    def test_is_an_error_that_points_at_begin_nested(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin(), wire.record() as recording:
            with pytest.raises(InvalidRequestError, match=r"begin_nested\(\)"):
                session.begin()
            assert session.in_transaction()
        assert recording.messages == []

    def test_leaves_the_transaction_as_it_was_if_it_is_caught(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.add(Author(name="one"))
            session.flush()
            with pytest.raises(InvalidRequestError), session.begin():
                pass
            session.add(Author(name="two"))
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert onlooker.names() == ["one", "two"]

    def test_rolls_back_if_it_is_not(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(InvalidRequestError, match=r"begin_nested\(\)"), session.begin():
            session.add(Author(name="one"))
            session.flush()
            with session.begin():
                pass
        assert onlooker.names() == []
        assert not session.in_transaction()


class TestRow5BeginNestedInside:
    def test_is_a_savepoint(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.add(Author(name="outer"))
            with session.begin_nested():
                session.add(Author(name="nested"))
        assert sent(recording) == ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        assert onlooker.names() == ["nested", "outer"]

    def test_that_fails_goes_back_to_the_savepoint(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.add(Author(name="outer"))
            with pytest.raises(IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
            session.add(Author(name="later"))
        assert sent(recording) == [
            *("BEGIN", "INSERT", "SAVEPOINT", "INSERT", "ROLLBACK TO"),
            *("INSERT", "COMMIT"),
        ]
        assert onlooker.names() == ["later", "outer"]

    def test_goes_as_deep_as_one_likes(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            with session.begin_nested():
                session.add(Author(name="one"))
                with pytest.raises(ValueError, match="mine"), session.begin_nested():
                    session.add(Author(name="two"))
                    with session.begin_nested():
                        session.add(Author(name="three"))
                    raise ValueError("mine")
                with session.begin_nested():
                    session.add(Author(name="four"))
        assert sent(recording) == [
            *("BEGIN", "SAVEPOINT", "INSERT", "SAVEPOINT", "INSERT", "SAVEPOINT", "INSERT"),
            *("RELEASE", "ROLLBACK TO", "SAVEPOINT", "INSERT", "RELEASE", "RELEASE", "COMMIT"),
        ]
        assert onlooker.names() == ["four", "one"]


class TestRow6BeginNestedOutside:
    def test_is_the_outermost_a_real_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Author, 1)
        with wire.record() as recording, session.begin_nested():
            session.add(Author(name="new"))
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["new"]
        assert not session.in_transaction()

    def test_rolls_back_as_one(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin_nested():
                session.add(Author(name="gone"))
                session.flush()
                raise ValueError("mine")
            count(session)
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK", "SELECT"]
        assert onlooker.names() == []

    def test_has_savepoints_inside(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording, session.begin_nested(), session.begin_nested():
            session.add(Author(name="new"))
        assert sent(recording) == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]

    def test_with_changes_waiting_stores_them_too(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="before"))
        with wire.record() as recording, session.begin_nested():
            session.add(Author(name="inside"))
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert onlooker.names() == ["before", "inside"]


class TestRow7AReadOutsideWithChangesWaiting:
    @pytest.mark.parametrize("read", READS)
    def test_never_writes(
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

    def test_of_a_relationship_neither(self, session: OptInSession, wire: WireProxy) -> None:
        author = session.get_one(Author, 1)
        author.age = 99
        session.add(Author(name="pending"))
        with wire.record() as recording:
            assert [document.title for document in author.documents] == ["Of 1"]
        assert sent(recording) == ["SELECT"]
        assert author.age == 99

    def test_inside_it_flushes_first_as_ever(self, session: OptInSession, wire: WireProxy) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording, session.begin():
            assert count(session) == 4
        assert sent(recording) == ["BEGIN", "INSERT", "SELECT", "COMMIT"]

    def test_leaves_the_changes_to_a_later_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        session.get_one(Author, 1).name = "changed"
        assert count(session) == 3
        session.commit()
        assert onlooker.names() == ["changed", "pending"]


@pytest.mark.parametrize("write", ["flush", "commit"])
class TestRow8FlushOrCommitOutside:
    def test_stores_all_in_one_transaction(
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

    def test_that_fails_stores_nothing_and_the_session_is_usable_at_once(
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

    def test_that_fails_at_the_commit_does_so_too(
        self, session: OptInSession, onlooker: Onlooker, write: str
    ) -> None:
        session.add_all([Seat(place=1), Seat(place=1)])
        with pytest.raises(IntegrityError):
            getattr(session, write)()
        assert session.scalars(sa.select(Seat)).all() == []
        session.add(Seat(place=1))
        getattr(session, write)()
        assert onlooker.scalar("SELECT count(*) FROM seat") == 1

    def test_with_nothing_waiting_sends_nothing(
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
    def test_is_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, call: str
    ) -> None:
        with wire.record() as recording:
            self.CALLS[call](session, self.rows())
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert set(sent(recording)[1:-1]) == {"INSERT"}
        assert len(onlooker.names()) == self.ROWS

    @pytest.mark.parametrize("call", CALLS)
    def test_that_fails_at_the_last_row_stores_nothing(
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
    def test_whose_commit_fails_stores_nothing_and_leaves_the_session_usable(
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
    def test_is_sent_alone_and_durable_when_the_call_returns(
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

    def test_delete_too(self, session: OptInSession, wire: WireProxy, onlooker: Onlooker) -> None:
        with wire.record() as recording:
            session.execute(sa.delete(Document).where(Document.id == 1))
        assert sent(recording) == ["DELETE"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 2

    def test_comes_after_what_was_waiting_and_both_are_one_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording:
            session.execute(sa.update(Document).values(title="new"))
        assert sent(recording) == ["BEGIN", "INSERT", "UPDATE", "COMMIT"]
        assert onlooker.names() == ["pending"]
        assert not session.new
        assert not session.in_transaction()

    def test_that_fails_undoes_what_was_waiting_too(
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
    def test_overtakes_no_change_that_waits(
        self, session: OptInSession, onlooker: Onlooker, synchronize: Any
    ) -> None:
        ada = session.get_one(Author, 1)
        ada.age = 40
        session.query(Author).filter_by(id=1).update({"age": 50}, synchronize_session=synchronize)
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 50

    def test_sees_the_change_that_waits(self, session: OptInSession, onlooker: Onlooker) -> None:
        document = session.get_one(Document, 1)
        document.title = "changed"
        result: Any = session.execute(sa.delete(Document).where(Document.title == "changed"))
        assert result.rowcount == 1
        assert onlooker.scalar("SELECT count(*) FROM document") == 2


class TestRow11RollbackOutside:
    @pytest.mark.parametrize("connected", [True, False])
    def test_forgets_what_is_waiting_and_sends_nothing(
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

    def test_undoes_changes_of_several_objects_a_transaction_lying_between(
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

    def test_brings_a_deleted_object_back(
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
    def test_is_the_exception_and_the_next_statement_just_works(
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

    def test_leaves_what_is_waiting(self, session: OptInSession, onlooker: Onlooker) -> None:
        session.add(Author(name="pending"))
        with pytest.raises(ProgrammingError):
            session.execute(sa.text("SELECT nothing FROM nowhere"))
        session.commit()
        assert onlooker.names() == ["pending"]

    def test_that_a_dead_server_process_is_too(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.get_one(Author, 1)
        onlooker.kill(backend_pid(session.connection()))
        assert session.get_one(Author, 2).name == "Bob"


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
    def test_is_a_clear_error_and_nothing_is_sent_or_lost(
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
    def test_works_inside(self, session: OptInSession, wire: WireProxy, spelling: str) -> None:
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
    def test_reads_every_row_with_no_transaction_open_meanwhile(
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

    def test_leaves_no_cursor_behind(self, session: OptInSession) -> None:
        cursors = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")
        for _ in session.scalars(sa.select(Author).execution_options(yield_per=100)):
            pass
        assert session.scalar(cursors) == 0

    def test_that_is_abandoned_leaves_no_cursor_in_the_pool(
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

    def test_can_write_what_it_reads_one_transaction_each(
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

    def test_survives_a_transaction_that_fails_meanwhile(
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
    def test_keeps_no_transaction_open(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        session.get_one(Author, 1).age = 99
        count(session)
        assert wire.transactions_open == 0
        assert onlooker.state(backend_pid(session.connection())) == "idle"

    def test_keeps_the_connection_while_the_pool_has_spare_ones(
        self, engine: OptInEngine, sessions: Sessions
    ) -> None:
        with sessions() as one, sessions() as two:
            one.get(Author, 1)
            two.get(Author, 1)
            assert checked_out(engine) == 2

    def test_gives_it_back_when_the_pool_has_none(self, wire_url: str, wire: WireProxy) -> None:
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

    def test_gives_it_back_when_it_is_told_to(
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

    def test_does_not_give_it_back_inside(
        self, session: OptInSession, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="new"))
            session.flush()
            session.give_back()
            assert checked_out(engine) == 1
        assert onlooker.names() == ["new"]


class TestRow16ConnectWithoutBegin:
    def test_is_autocommit(self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker) -> None:
        with wire.record() as recording, engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
            connection.execute(sa.insert(Author).values(name="done"))
            assert onlooker.names() == ["done"]
            assert not connection.in_transaction()
            with pytest.raises(IntegrityError):
                connection.execute(sa.insert(Author).values(name="done"))
            assert connection.scalar(sa.text("SELECT 2")) == 2
            connection.commit()
            connection.rollback()
        assert sent(recording) == ["SELECT", "INSERT", "INSERT", "SELECT"]
        assert recording.round_trips == 4
        assert onlooker.names() == ["done"]


class TestRow17BeginOnAnEngineOrAConnection:
    def test_is_a_real_transaction(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, engine.begin() as connection:
            connection.execute(sa.insert(Author).values(name="one"))
            assert onlooker.names() == []
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with wire.record() as recording, engine.connect() as connection:
            connection.scalar(sa.text("SELECT 1"))
            with connection.begin():
                connection.execute(sa.insert(Author).values(name="two"))
            connection.scalar(sa.text("SELECT 1"))
        assert sent(recording) == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
        assert onlooker.names() == ["one", "two"]

    def test_that_fails_half_way_leaves_the_schema_as_it_was(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ProgrammingError), engine.begin() as connection:
                connection.execute(sa.text("CREATE TABLE half (id int)"))
                connection.execute(sa.text("ALTER TABLE nowhere ADD COLUMN x int"))
            with pytest.raises(ProgrammingError), engine.connect() as connection:
                with connection.begin():
                    connection.execute(sa.text("CREATE TABLE half (id int)"))
                    connection.execute(sa.text("ALTER TABLE nowhere ADD COLUMN x int"))
        assert sent(recording) == ["BEGIN", "CREATE", "ALTER", "ROLLBACK"] * 2
        assert onlooker.scalar("SELECT to_regclass('half')") is None


SCENES: dict[str, Callable[[OptInSession], None]] = {}


def scene(play: Callable[[OptInSession], None]) -> Callable[[OptInSession], None]:
    SCENES[play.__name__.replace("_", " ")] = play
    return play


@scene
def a_read(session: OptInSession) -> None:
    session.get(Author, 1)


@scene
def a_transaction(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="new"))


@scene
def an_empty_transaction(session: OptInSession) -> None:
    with session.begin():
        pass


@scene
def an_empty_transaction_of_the_engine(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.begin():
        pass


@scene
def an_error_inside(session: OptInSession) -> None:
    with pytest.raises(IntegrityError), session.begin():
        session.execute(sa.insert(Author).values(name="Ada"))


@scene
def an_error_inside_before_anything_is_sent(session: OptInSession) -> None:
    with pytest.raises(CompileError), session.begin():
        session.execute(sa.insert(authors).values(nothing=1))


@scene
def an_error_outside(session: OptInSession) -> None:
    with pytest.raises(IntegrityError):
        session.execute(sa.insert(Author).values(name="Ada"))


@scene
def an_error_at_commit(session: OptInSession) -> None:
    session.add_all([Seat(place=1), Seat(place=1)])
    with pytest.raises(IntegrityError):
        session.commit()


@scene
def an_error_that_was_caught(session: OptInSession) -> None:
    with pytest.raises(InvalidRequestError), session.begin():
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author).values(name="Ada"))


@scene
def a_savepoint(session: OptInSession) -> None:
    with session.begin(), session.begin_nested():
        session.add(Author(name="new"))


@scene
def a_rollback_outside(session: OptInSession) -> None:
    session.add(Author(name="new"))
    session.get(Author, 1)
    session.rollback()


@scene
def a_flush_outside(session: OptInSession) -> None:
    session.add(Author(name="new"))
    session.flush()


@scene
def a_bulk_insert(session: OptInSession) -> None:
    session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])


@scene
def a_core_write(session: OptInSession) -> None:
    session.execute(sa.update(Author).values(age=1))


@scene
def a_stream(session: OptInSession) -> None:
    session.scalars(sa.select(Author).execution_options(yield_per=1)).all()


@scene
def a_level(session: OptInSession) -> None:
    with session.begin(isolation_level="SERIALIZABLE"):
        session.get(Author, 1)


@scene
def a_connection(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.connect() as connection:
        connection.scalar(sa.text("SELECT 1"))
        connection.commit()
        with connection.begin():
            connection.scalar(sa.text("SELECT 1"))
        connection.rollback()


@scene
def a_transaction_whose_connection_is_lost(session: OptInSession) -> None:
    with pytest.raises(DBAPIError), session.begin():
        session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))


@scene
def a_connection_that_is_lost_outside(session: OptInSession) -> None:
    with pytest.raises(DBAPIError):
        session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
    session.get(Author, 1)


@scene
def autocommit_by_name(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.execution_options(isolation_level="AUTOCOMMIT").begin() as connection:
        connection.scalar(sa.text("SELECT 1"))


@scene
def a_copy_of_the_engine(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
        connection.scalar(sa.text("SELECT 1"))


@scene
def tables_that_are_made(session: OptInSession) -> None:
    sa.Table("made", sa.MetaData(), sa.Column("id", sa.Integer)).create(session.connection())


@scene
def a_transaction_that_is_not_ended(session: OptInSession) -> None:
    session.begin()
    session.add(Author(name="new"))
    session.flush()


class TestRow18TheLog:
    """It names each BEGIN, COMMIT and ROLLBACK that was sent, and no other."""

    @pytest.fixture
    def engine(self, wire_url: str) -> Iterator[OptInEngine]:
        with opened(wire_url) as engine:
            engine.echo = True
            yield engine
            engine.echo = False

    @staticmethod
    def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        assert not any("no effect" in line or "should not BEGIN" in line for line in lines)
        words = [line.split(maxsplit=1)[0] for line in lines if line.strip()]
        return [word for word in words if word in ("BEGIN", "COMMIT", "ROLLBACK")]

    @pytest.mark.parametrize("scene", SCENES)
    def test_says_what_really_happened(
        self,
        sessions: Sessions,
        wire: WireProxy,
        caplog: pytest.LogCaptureFixture,
        scene: str,
    ) -> None:
        with caplog.at_level(logging.INFO, "sqlalchemy.engine"), wire.record() as recording:
            with sessions() as session:
                SCENES[scene](session)
        assert self.logged(caplog) == [
            verb for verb in sent(recording) if verb in ("BEGIN", "COMMIT", "ROLLBACK")
        ]


class TestRow19BackInThePool:
    def test_a_connection_rests_in_autocommit_after_anything(
        self, sessions: Sessions, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with sessions() as session:
            session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True)
            session.get(Author, 1)
        assert_at_rest(engine)
        with sessions() as session, pytest.raises(KeyboardInterrupt), session.begin():
            session.get(Author, 1)
            raise KeyboardInterrupt
        assert_at_rest(engine)
        with sessions() as session, pytest.raises(DBAPIError), session.begin():
            session.get(Author, 1)
            onlooker.kill(backend_pid(session.connection()))
            session.get(Author, 2)
        assert_at_rest(engine)
        with sessions() as session:
            with pytest.raises(IntegrityError):
                session.execute(sa.insert(Author).values(name="Ada"))
        assert_at_rest(engine)
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_going_in_and_out_of_autocommit_takes_no_round_trip(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        with sessions() as session:
            for _ in range(2):
                for level, read_only, deferrable in (
                    (None, None, None),
                    ("SERIALIZABLE", None, None),
                    ("REPEATABLE READ", True, None),
                    ("SERIALIZABLE", True, True),
                    (None, False, None),
                ):
                    with wire.record() as recording:
                        with session.begin(
                            isolation_level=level, read_only=read_only, deferrable=deferrable
                        ):
                            session.execute(sa.text("SELECT 1"))
                        session.execute(sa.text("SELECT 2"))
                        session.give_back()
                    assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
                    # The driver's own: psycopg prepares a statement when it comes again and again,
                    # in a round trip that does no more.
                    names = [each.name for each in recording.messages if each.sender == "frontend"]
                    prepared = list(pairwise(names)).count(("Parse", "Sync"))
                    assert recording.round_trips == 4 + prepared


class TestRow20ASessionOnAConnection:
    @pytest.mark.parametrize(
        "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
    )
    def test_joins_its_transaction_as_sqlalchemy_does(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, mode: Any
    ) -> None:
        with engine.connect() as connection:
            transaction = connection.begin()
            with wire.record() as recording:
                with OptInSession(connection, join_transaction_mode=mode) as session:
                    session.add(Author(name="new"))
                    session.commit()
                    assert session.scalar(sa.select(sa.func.count(Author.id))) == 4
            assert transaction.is_active is (mode != "control_fully")
            if transaction.is_active:
                transaction.rollback()
        verbs = {
            "conditional_savepoint": ["BEGIN", "INSERT", "SELECT"],
            "rollback_only": ["BEGIN", "INSERT", "SELECT"],
            "control_fully": ["BEGIN", "INSERT", "COMMIT", "BEGIN", "SELECT"],
            "create_savepoint": [
                *("BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SAVEPOINT", "SELECT", "ROLLBACK TO"),
            ],
        }
        assert [verb for verb in sent(recording) if verb != "ROLLBACK"] == verbs[mode]
        assert onlooker.names() == (["new"] if mode == "control_fully" else [])
