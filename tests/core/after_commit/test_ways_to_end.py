"""The functions are called after a transaction or a savepoint, whatever begins and ends it."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError

from fictive_sqlalchemy import OptInSession
from tests.core.after_commit.support import (
    WAYS,
    Calls,
    by_atomic,
    by_begin_nested,
    by_block,
    by_unit,
    fail,
    that_allows_commit_inside,
)
from tests.library import Onlooker, Seat, Undo, add, sent
from tests.wire import WireProxy


@pytest.mark.parametrize("way", WAYS)
class TestEachWay:
    def test_each_way_to_commit_calls_the_functions_after_the_commit(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        wire: WireProxy,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with wire.record() as recording:
            with way(session):
                session.on_commit(lambda: calls.extend(onlooker.names()))
                calls.watch("first")
                add(session, "one")
                calls.watch("second")
                assert calls == []
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        assert calls == ["one", "first committed", "second committed"]

    def test_each_way_to_roll_back_calls_the_functions_in_order(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with suppress(Undo), way(session):
            calls.watch("first")
            add(session, "one")
            calls.watch("second")
            raise Undo
        assert calls == ["first rolled back", "second rolled back"]

    def test_functions_are_called_for_a_transaction_without_a_statement(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with way(session):
            calls.watch("empty")
        with suppress(Undo), way(session):
            calls.watch("empty")
            raise Undo
        assert calls == ["empty committed", "empty rolled back"]

    def test_a_function_may_begin_another_transaction_and_register_more(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        way: Callable[[OptInSession], Any],
    ) -> None:
        def another() -> None:
            with way(session):
                add(session, "another")
                calls.watch("another")
            session.on_commit(partial(calls.note, "at once"))

        with way(session):
            add(session, "one")
            session.on_commit(another)
            session.on_commit(partial(calls.note, "last"))
        assert calls == ["another committed", "at once", "last"]
        assert onlooker.names() == ["another", "one"]

    def test_a_commit_that_fails_is_a_rollback_for_the_functions(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with pytest.raises(IntegrityError):
            with way(session):
                calls.watch("one")
                session.add_all([Seat(place=1), Seat(place=1)])
        session.rollback()  # which begin() and commit() by hand ask for
        assert calls == ["one rolled back"]

    def test_a_function_that_raises_keeps_no_other_from_being_called(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        caplog: pytest.LogCaptureFixture,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with pytest.raises(Undo, match="first"), way(session):
            add(session, "one")
            session.on_commit(partial(fail, Undo("first")))
            calls.watch("between")
            session.on_commit(partial(fail, Undo("second")))
            calls.watch("last")
        assert calls == ["between committed", "last committed"]
        assert onlooker.names() == ["one"]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None
        assert str(record.exc_info[1]) == "second"
        assert not session.in_transaction()
        with way(session):
            add(session, "two")
        assert onlooker.names() == ["one", "two"]

    def test_an_interrupted_function_leaves_the_others_out(
        self,
        session: OptInSession,
        calls: Calls,
        onlooker: Onlooker,
        caplog: pytest.LogCaptureFixture,
        way: Callable[[OptInSession], Any],
    ) -> None:
        with pytest.raises(KeyboardInterrupt), way(session):
            add(session, "one")
            calls.watch("first")
            session.on_commit(partial(fail, KeyboardInterrupt()))
            session.on_commit(partial(calls.note, "left out"))
        assert calls == ["first committed"]
        assert "left out" in caplog.text
        with way(session):
            add(session, "two")
            calls.watch("next")
        assert calls == ["first committed", "next committed"]
        assert onlooker.names() == ["one", "two"]


@pytest.mark.parametrize("way", [by_block, by_atomic, by_unit, by_begin_nested])
def test_an_error_that_ends_a_block_comes_first(
    session: OptInSession,
    calls: Calls,
    caplog: pytest.LogCaptureFixture,
    way: Callable[[OptInSession], Any],
) -> None:
    with pytest.raises(Undo, match="the block's"), way(session):
        session.on_rollback(partial(fail, Undo("first")))
        session.on_rollback(partial(fail, Undo("second")))
        calls.watch("last")
        raise Undo("the block's")
    assert calls == ["last rolled back"]
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records] == [
        "first",
        "second",
    ]


def test_an_error_after_a_commit_inside_comes_first(
    session: OptInSession, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    with that_allows_commit_inside(session):
        with pytest.raises(Undo, match="the block's"), session.begin():
            session.on_commit(partial(fail, Undo("logged")))
            calls.watch("one")
            session.commit()
            raise Undo("the block's")
    assert calls == ["one committed"]
    assert "logged" in caplog.text


class TestSavepoints:
    @pytest.mark.parametrize("way", [by_begin_nested, by_atomic, by_unit])
    def test_functions_of_a_savepoint_follow_its_release_or_rollback(
        self, session: OptInSession, calls: Calls, way: Callable[[OptInSession], Any]
    ) -> None:
        with session.begin() if way is not by_unit else by_unit(session):
            calls.watch("outer")
            with way(session):
                calls.watch("released")
                with pytest.raises(Undo), way(session):
                    calls.watch("undone")
                    with way(session):
                        calls.watch("released in undone")
                    raise Undo
            calls.watch("last")
            assert calls == []
        assert calls == [
            *("undone rolled back", "released in undone rolled back"),
            *("outer committed", "released committed", "last committed"),
        ]

    def test_functions_of_a_released_savepoint_go_with_its_transaction(
        self, session: OptInSession, calls: Calls
    ) -> None:
        with pytest.raises(Undo), session.begin():
            calls.watch("outer")
            with session.begin_nested():
                calls.watch("released")
            with pytest.raises(IntegrityError), session.begin_nested():
                calls.watch("undone")
                add(session, "Ada")
            raise Undo
        assert calls == ["undone rolled back", "outer rolled back", "released rolled back"]

    def test_set_rollback_in_a_savepoint_calls_its_functions_for_rollback(
        self, session: OptInSession, calls: Calls
    ) -> None:
        with session.atomic():
            with session.atomic():
                calls.watch("inner")
                session.set_rollback()
            calls.watch("outer")
        with session.atomic():
            calls.watch("all")
            session.set_rollback()
        assert calls == ["inner rolled back", "outer committed", "all rolled back"]

    def test_savepoints_by_hand_call_their_functions(
        self, session: OptInSession, calls: Calls
    ) -> None:
        session.begin()
        savepoint = session.begin_nested()
        calls.watch("released")
        savepoint.commit()
        savepoint = session.begin_nested()
        calls.watch("undone")
        savepoint.rollback()
        session.begin_nested()
        calls.watch("open")
        session.commit()
        assert calls == ["undone rolled back", "released committed", "open committed"]

    def test_functions_of_a_joined_atomic_are_of_the_block_around(
        self, session: OptInSession, calls: Calls
    ) -> None:
        with pytest.raises(PendingRollbackError), session.begin():
            calls.watch("outer")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                calls.watch("joined")
                raise Undo
        assert calls == ["outer rolled back", "joined rolled back"]


class TestInABlockWhoseTransactionHasEnded:
    @pytest.mark.parametrize("how", ["commit", "rollback", "close"])
    def test_registering_is_refused_in_a_block_whose_transaction_has_ended(
        self, session: OptInSession, calls: Calls, how: str
    ) -> None:
        closed = pytest.raises(PendingRollbackError) if how == "close" else nullcontext()
        with that_allows_commit_inside(session), closed, session.begin():
            calls.watch("before")
            getattr(session, how)()
            for register in (session.on_commit, session.on_rollback):
                with pytest.raises(InvalidRequestError, match="leave the block before"):
                    register(partial(calls.note, "after"))
        outcome = "committed" if how == "commit" else "rolled back"
        assert calls == [f"before {outcome}"]


class TestAFunctionThatLeavesATransactionOpen:
    def test_a_function_that_leaves_a_transaction_open_has_the_others_wait(
        self, session: OptInSession, calls: Calls, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.on_commit(session.begin)
            calls.watch("waiting")
        assert calls == []
        add(session, "one")
        calls.watch("another")
        session.commit()
        assert calls == ["waiting committed", "another committed"]
        assert onlooker.names() == ["one"]
