"""Rows 2 to 6 of the contract are about transactions, savepoints, and exceptions inside them."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, InvalidRequestError

from fictive_sqlalchemy import OptInSession
from tests.core.contract.support import count
from tests.library import Author, Document, Onlooker, Seat, sent
from tests.wire import WireProxy


class TestRow2Begin:
    def test_begin_after_reads_is_a_real_transaction(
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

    def test_a_block_of_n_statements_takes_n_plus_two_round_trips(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        for ids in ([1], [1, 2, 3]):
            with wire.record() as recording, session.begin():
                for id in ids:
                    session.get_one(Author, id, populate_existing=True)
            assert sent(recording) == ["BEGIN", *["SELECT"] * len(ids), "COMMIT"]
            assert recording.round_trips == len(ids) + 2

    def test_an_empty_block_sends_nothing(self, session: OptInSession, wire: WireProxy) -> None:
        session.get(Author, 1)
        with wire.record() as recording:
            with session.begin():
                pass
            with session.begin():
                session.begin_nested()
            with pytest.raises(ValueError, match="mine"), session.begin():
                raise ValueError("mine")
        assert recording.messages == []

    def test_begin_is_sent_with_the_first_statement_only(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin():
            with wire.record() as recording:
                session.add(Author(name="new"))
                assert session.in_transaction()
            assert recording.messages == []

    def test_begin_keeps_loaded_objects_attached_and_pending_ones_pending(
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

    def test_one_block_after_the_other_works_with_the_same_objects(
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

    def test_begin_works_without_the_with_statement(
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

    def test_begin_leaves_results_from_before_readable_inside_and_after(
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
    def test_an_exception_inside_rolls_back_and_the_session_is_usable_at_once(
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

    def test_an_exception_that_the_database_raised_rolls_back(
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

    def test_an_exception_that_is_raised_by_the_last_flush_rolls_back(
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

    def test_an_exception_that_the_commit_raises_rolls_back(
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
    def test_an_interruption_inside_rolls_back(
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
    def test_begin_inside_is_an_error_that_points_at_begin_nested(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin(), wire.record() as recording:
            with pytest.raises(InvalidRequestError, match=r"begin_nested\(\)"):
                session.begin()
            assert session.in_transaction()
        assert recording.messages == []

    def test_begin_inside_leaves_the_transaction_as_it_was_if_its_error_is_caught(
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

    def test_begin_inside_rolls_back_if_its_error_is_not_caught(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match=r"begin_nested\(\)"), session.begin():
            session.add(Author(name="one"))
            session.flush()
            with session.begin():
                pass
        assert onlooker.names() == []
        assert not session.in_transaction()


class TestRow5BeginNestedInside:
    def test_begin_nested_inside_is_a_savepoint(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.add(Author(name="outer"))
            with session.begin_nested():
                session.add(Author(name="nested"))
        assert sent(recording) == ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        assert onlooker.names() == ["nested", "outer"]

    def test_begin_nested_that_fails_goes_back_to_the_savepoint(
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

    def test_begin_nested_goes_as_deep_as_one_likes(
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
    def test_begin_nested_outside_is_a_real_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Author, 1)
        with wire.record() as recording, session.begin_nested():
            session.add_all([Author(name="new"), Author(name="newer")])
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["new", "newer"]
        assert not session.in_transaction()

    def test_begin_nested_outside_rolls_back_as_a_transaction(
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

    def test_begin_nested_outside_has_savepoints_inside(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording, session.begin_nested(), session.begin_nested():
            session.add(Author(name="new"))
        assert sent(recording) == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]

    def test_begin_nested_outside_stores_changes_that_were_waiting(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="before"))
        with wire.record() as recording, session.begin_nested():
            session.add(Author(name="inside"))
        assert sent(recording) == ["INSERT", "INSERT"]  # what was waiting is no part of the block
        assert onlooker.names() == ["before", "inside"]
