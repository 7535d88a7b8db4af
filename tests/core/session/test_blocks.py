"""The block of ``session.begin()`` begins one transaction, and its end commits or rolls back."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    PendingRollbackError,
    ProgrammingError,
)
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession
from tests.library import Author, Onlooker, Seat, Sessions, sent
from tests.wire import WireProxy


class TestTheEndOfABlock:
    @pytest.mark.parametrize("commit", ["session", "transaction", "in a savepoint"])
    def test_commit_inside_is_refused_and_the_whole_block_is_rolled_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, commit: str
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="stored at its end, as a whole"):
                with session.begin() as transaction:
                    session.add(Author(name="one"))
                    session.flush()
                    if commit == "session":
                        session.commit()
                    elif commit == "transaction":
                        transaction.commit()
                    else:
                        with session.begin_nested():
                            session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []
        session.add(Author(name="two"))
        session.commit()
        assert onlooker.names() == ["two"]

    def test_commit_inside_that_is_refused_and_caught_leaves_the_block_as_it_was(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="Nothing was committed"):
                session.commit()
            assert onlooker.names() == []
            session.add(Author(name="two"))
        assert onlooker.names() == ["one", "two"]

    def test_a_savepoint_that_was_not_entered_may_be_committed_inside(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            savepoint = session.begin_nested()
            session.add(Author(name="one"))
            savepoint.commit()
        assert onlooker.names() == ["one"]

    def test_a_block_that_was_rolled_back_inside_refuses_more_statements(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="one"))
            session.flush()
            session.rollback()
            session.rollback()
            with pytest.raises(InvalidRequestError, match="context manager"):
                session.execute(sa.insert(Author).values(name="two"))
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    @pytest.mark.parametrize("how", ["close", "reset", "invalidate"])
    @pytest.mark.parametrize("nests", [False, True])
    def test_a_block_that_was_closed_inside_rolls_back_and_says_so(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, how: str, nests: bool
    ) -> None:
        # Without an error, what was written would be lost without a word.
        with wire.record() as recording:
            with pytest.raises(PendingRollbackError, match="closed inside"), session.begin():
                session.add(Author(name="one"))
                session.flush()
                with session.begin_nested() if nests else nullcontext():
                    getattr(session, how)()
        if how != "invalidate":
            assert sent(recording)[:2] == ["BEGIN", "INSERT"]
            assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []
        session.add(Author(name="two"))
        session.commit()
        assert onlooker.names() == ["two"]

    def test_a_block_that_was_closed_inside_with_changes_waiting_says_so(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="closed inside"), session.begin():
            session.add(Author(name="one"))
            session.close()
        assert onlooker.names() == []

    def test_a_block_that_was_closed_inside_raises_its_own_error(
        self, session: OptInSession
    ) -> None:
        with pytest.raises(KeyError), session.begin():
            session.add(Author(name="one"))
            session.close()
            raise KeyError("mine")

    @pytest.mark.parametrize("after", ["rollback", None])
    def test_a_block_that_loses_nothing_may_be_closed_inside(
        self, session: OptInSession, onlooker: Onlooker, after: str | None
    ) -> None:
        with session.begin():
            if after is not None:  # to undo the block was asked for
                session.add(Author(name="one"))
                session.flush()
                session.rollback()
            session.close()
        session.add(Author(name="two"))
        session.commit()
        assert onlooker.names() == ["two"]

    @pytest.mark.parametrize("how", ["execute", "flush"])
    def test_a_block_with_an_error_caught_inside_says_that_nothing_was_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, how: str
    ) -> None:
        with pytest.raises(PendingRollbackError, match=r"begin_nested\(\)"):
            with session.begin():
                session.add(Author(name="lost"))
                session.flush()
                with pytest.raises(IntegrityError):
                    if how == "execute":
                        session.execute(sa.insert(Author).values(name="Ada"))
                    else:
                        session.add(Author(name="Ada"))
                        session.flush()
        assert onlooker.names() == []
        assert wire.transactions_open == 0
        with session.begin():
            session.add(Author(name="after"))
        assert onlooker.names() == ["after"]

    def test_a_block_with_an_error_caught_around_a_savepoint_can_go_on(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="kept"))
            for _ in range(3):
                with pytest.raises(IntegrityError), session.begin_nested():
                    session.execute(sa.insert(Author).values(name="Ada"))
            with pytest.raises(IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 4
        assert onlooker.names() == ["kept"]

    def test_a_savepoint_with_an_error_caught_inside_is_not_released_in_silence(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="kept"))
            with pytest.raises((PendingRollbackError, DBAPIError)), session.begin_nested():
                session.add(Author(name="lost"))
                session.flush()
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(Author).values(name="Ada"))
        assert onlooker.names() == ["kept"]

    def test_a_commit_that_fails_leaves_objects_as_after_a_rollback(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        author, seat = session.get_one(Author, 1), Seat(place=1)
        with pytest.raises(IntegrityError), session.begin():
            author.age = 99
            session.add_all([seat, Seat(place=1)])
        assert author.age == 30
        assert sa.inspect(seat).transient
        session.add(seat)
        session.commit()
        assert onlooker.scalar("SELECT count(*) FROM seat") == 1


class TestBegin:
    @pytest.mark.parametrize(
        ("options", "begin"),
        [
            ({}, "BEGIN"),
            ({"isolation_level": "SERIALIZABLE"}, "BEGIN ISOLATION LEVEL SERIALIZABLE"),
            ({"isolation_level": "READ COMMITTED"}, "BEGIN ISOLATION LEVEL READ COMMITTED"),
            ({"read_only": True}, "BEGIN READ ONLY"),
            ({"read_only": False}, "BEGIN READ WRITE"),
            (
                {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
                "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE",
            ),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_begin_sends_its_options_in_the_one_begin(
        self,
        session: OptInSession,
        wire: WireProxy,
        options: dict[str, Any],
        begin: str,
        nested: bool,
    ) -> None:
        with wire.record() as recording, session.begin(nested, **options):
            session.get_one(Author, 1)
        assert recording.statements[0] == begin
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]
        assert recording.round_trips == 3
        with wire.record() as recording, session.begin():
            session.get_one(Author, 2)
        assert recording.statements[0] == "BEGIN"

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": "SNAPSHOT"},
            {"isolation_level": ""},
            {"isolation_level": "AUTOCOMMIT"},
            {"isolation_level": 3},
            {"read_only": "yes"},
            {"read_only": "False"},
            {"deferrable": "yes"},
            {"deferrable": True},
            {"deferrable": True, "isolation_level": "SERIALIZABLE"},
            {"deferrable": True, "read_only": True},
            {"deferrable": True, "read_only": True, "isolation_level": "REPEATABLE READ"},
        ],
    )
    def test_begin_refuses_what_the_database_does_not_know_and_sends_nothing(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, options: dict[str, Any]
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording, pytest.raises(ArgumentError):
            session.begin(**options)
        assert recording.messages == []
        assert not session.in_transaction()
        assert len(session.new) == 1
        session.commit()
        assert onlooker.names() == ["pending"]

    def test_begin_reads_a_level_as_sqlalchemy_does(self, session: OptInSession) -> None:
        levels: list[Any] = ["REPEATABLE_READ", "repeatable read"]
        for level in levels:
            with session.begin(isolation_level=level):
                shown = session.scalar(sa.text("SHOW transaction_isolation"))
                assert shown == "repeatable read"

    def test_begin_of_a_savepoint_takes_no_options(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with session.begin(), wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="savepoint"):
                session.begin(nested=True, isolation_level="SERIALIZABLE")
        assert recording.messages == []

    def test_begin_does_not_leak_its_level_after_an_error(self, session: OptInSession) -> None:
        level = sa.text("SHOW transaction_isolation")
        with pytest.raises(ProgrammingError), session.begin(isolation_level="SERIALIZABLE"):
            session.execute(sa.text("SELECT nothing FROM nowhere"))
        assert session.scalar(level) == "read committed"
        with session.begin():
            assert session.scalar(level) == "read committed"
            assert session.scalar(sa.text("SHOW transaction_read_only")) == "off"

    WRITES: dict[str, Callable[[OptInSession], Any]] = {  # noqa: RUF012
        "flush": lambda session: session.add(Author(name="new")),
        "insert": lambda session: session.execute(sa.insert(Author).values(name="new")),
        "many": lambda session: session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}]),
        "update": lambda session: session.execute(sa.update(Author).values(age=1)),
        "query": lambda session: session.query(Author).update({"age": 1}),
        "text": lambda session: session.execute(sa.text("UPDATE author SET age = 1")),
        "bulk": lambda session: session.bulk_save_objects([Author(name="new")]),
    }

    @pytest.mark.parametrize("write", WRITES)
    def test_a_read_only_transaction_refuses_to_write(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        with pytest.raises((InvalidRequestError, DBAPIError), match="read-only"):
            with session.begin(read_only=True):
                self.WRITES[write](session)
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT max(age) FROM author") == 30
        assert wire.transactions_open == 0
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_begin_of_a_scoped_session_takes_the_same_options(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        scoped: OptInScopedSession[OptInSession] = OptInScopedSession(sessions)
        with wire.record() as recording:
            with scoped.begin(isolation_level="SERIALIZABLE", read_only=True):
                scoped.get(Author, 1)
            scoped.get(Author, 2)
            scoped.give_back()
        assert recording.statements[0] == "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY"
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
        with pytest.raises(ArgumentError):
            scoped.begin(isolation_level="SNAPSHOT")  # type: ignore[arg-type]  # pyright: ignore
        scoped.remove()


class TestBeginTakesABoolForNested:
    @pytest.mark.parametrize("nested", ["SERIALIZABLE", 1, 0, None, {"isolation_level": "x"}])
    def test_begin_takes_a_bool_for_nested_and_refuses_anything_else(
        self, session: OptInSession, wire: WireProxy, nested: Any
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ArgumentError, match=r"begin\(isolation_level=…\)"):
                session.begin(nested)
        assert recording.messages == []
        assert not session.in_transaction()


def test_eighty_thousand_callbacks_take_time_in_proportion(session: OptInSession) -> None:
    calls: list[int] = []
    with session.begin(), session.begin_nested():
        for number in range(80_000):
            session.on_commit(lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == list(range(80_000))


@pytest.mark.parametrize("class_", [OptInSession, Session])
def test_a_scoped_session_tells_which_transaction_is_open(
    engine: OptInEngine, class_: type[Session]
) -> None:
    scoped = OptInScopedSession(sessionmaker(engine, class_=class_))
    assert not scoped.in_transaction()
    assert scoped.get_transaction() is None
    if class_ is OptInSession:
        assert scoped.get(Author, 1) is not None
        assert not scoped.in_transaction()
    with scoped.begin() as outer:
        assert (scoped.in_transaction(), scoped.in_nested_transaction()) == (True, False)
        assert scoped.get_transaction() is scoped().get_transaction() is outer
        assert scoped.get_nested_transaction() is None
        with scoped.begin_nested() as inner:
            assert scoped.in_nested_transaction()
            assert scoped.get_transaction() is outer
            assert scoped.get_nested_transaction() is inner
    assert not scoped.in_transaction()
    scoped.remove()
