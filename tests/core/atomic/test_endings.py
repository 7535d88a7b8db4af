"""An atomic block is rolled back on request, and may be ended by hand or out of order."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from typing import Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError

from fictive_sqlalchemy import OptInSession
from tests.core.atomic.support import assert_usable
from tests.library import Author, Onlooker, Undo, add, backend_pid, sent
from tests.wire import WireProxy


class TestSetRollback:
    @pytest.mark.parametrize("how", ["begin", "begin_nested", "atomic"])
    def test_set_rollback_undoes_a_block(
        self,
        session: OptInSession,
        wire: WireProxy,
        onlooker: Onlooker,
        how: Literal["begin", "begin_nested", "atomic"],
    ) -> None:
        with wire.record() as recording:
            with getattr(session, how)():
                add(session, "one")
                session.set_rollback()
                add(session, "two")
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
        assert_usable(session, onlooker)

    def test_set_rollback_undoes_a_savepoint_alone(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with session.begin():
            add(session, "outer")
            with wire.record() as recording:
                with session.begin_nested():
                    add(session, "inner")
                    session.set_rollback()
        assert sent(recording) == ["SAVEPOINT", "INSERT", "ROLLBACK TO"]
        assert onlooker.names() == ["outer"]

    def test_a_decorated_function_that_calls_set_rollback_returns_its_result(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        @session.atomic
        def dry_run() -> int:
            add(session, "one")
            session.set_rollback()
            return 1

        assert dry_run() == 1
        assert_usable(session, onlooker)

    def test_set_rollback_in_a_joined_block_is_an_error_of_the_block_around(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="inside it called set_rollback"):
            with session.atomic():
                add(session, "outer")
                with session.atomic(savepoint=False):
                    session.set_rollback()
        assert_usable(session, onlooker)

    def test_set_rollback_in_a_joined_block_is_no_error_where_the_outer_block_called_it(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            session.set_rollback()
            with session.atomic(savepoint=False):
                session.set_rollback()
                add(session, "one")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                raise Undo
        assert_usable(session, onlooker)

    def test_an_error_after_set_rollback_is_raised(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(Undo), session.atomic():
            add(session, "one")
            session.set_rollback()
            raise Undo
        assert_usable(session, onlooker)

    def test_set_rollback_undoes_a_block_in_which_an_error_was_caught(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            with pytest.raises(DBAPIError):
                session.execute(sa.text("SELECT nothing FROM nowhere"))
            session.set_rollback()
        assert_usable(session, onlooker)

    def test_a_commit_by_hand_after_set_rollback_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.begin()
        add(session, "one")
        session.set_rollback()
        with pytest.raises(PendingRollbackError, match="call rollback\\(\\), and not commit"):
            session.commit()
        session.rollback()
        assert_usable(session, onlooker)

    def test_set_rollback_outside_is_an_error(self, session: OptInSession) -> None:
        with pytest.raises(InvalidRequestError, match="none is open"):
            session.set_rollback()

    def test_set_rollback_does_not_mind_a_lost_connection(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "one")
            session.set_rollback()
            onlooker.kill(backend_pid(session.connection()))
        assert_usable(session, onlooker)

    def test_objects_go_back_to_what_they_were_after_set_rollback(
        self, session: OptInSession
    ) -> None:
        ada, new = session.get_one(Author, 1), Author(name="new")
        with session.atomic():
            ada.name = "Augusta"
            session.add(new)
            session.set_rollback()
        assert ada.name == "Ada"
        assert new not in session


class TestEndedInside:
    @pytest.mark.parametrize("how", ["rollback", "close", "reset", "invalidate"])
    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_a_transaction_ended_inside_is_an_error_of_each_block(
        self, session: OptInSession, onlooker: Onlooker, how: str, depth: int
    ) -> None:
        def block(depth: int) -> None:
            with pytest.raises(InvalidRequestError, match="ended inside it, by rollback"):
                with session.atomic():
                    add(session, f"{depth}")
                    if depth > 1:
                        block(depth - 1)
                    else:
                        getattr(session, how)()

        block(depth)
        assert_usable(session, onlooker)

    def test_statements_are_refused_until_the_block_that_was_ended_inside_is_left(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="closed transaction"), session.atomic():
            session.rollback()
            add(session, "one")
        assert_usable(session, onlooker)

    def test_a_savepoint_ended_by_its_own_rollback_is_an_error_of_its_block(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "outer")
            with pytest.raises(InvalidRequestError, match="ended inside it"):
                with session.atomic() as savepoint:
                    add(session, "inner")
                    savepoint.rollback()
        assert onlooker.names() == ["outer"]

    def test_a_commit_by_the_transaction_itself_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="leave commit"), session.atomic() as block:
            add(session, "one")
            block.commit()
        assert_usable(session, onlooker)

    def test_a_begin_inside_points_to_begin_nested(self, session: OptInSession) -> None:
        with session.atomic():
            with pytest.raises(InvalidRequestError, match="begin_nested"):
                session.begin()


class TestOutOfOrder:
    def test_blocks_left_out_of_order_store_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        outer, inner = session.atomic(), session.atomic()
        outer.__enter__()
        add(session, "outer")
        inner.__enter__()
        add(session, "inner")
        with pytest.raises(InvalidRequestError, match="still open"):
            outer.__exit__(None, None, None)
        with pytest.raises(InvalidRequestError, match="ended inside"):
            inner.__exit__(None, None, None)
        assert onlooker.names() == []
        assert_usable(session, onlooker)

    def test_savepoints_left_out_of_order_leave_the_transaction_usable(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "before")
            outer, inner = session.atomic(), session.atomic()
            outer.__enter__()
            add(session, "outer")
            inner.__enter__()
            with pytest.raises(InvalidRequestError, match="still open"):
                outer.__exit__(None, None, None)
            with pytest.raises(InvalidRequestError, match="ended inside"):
                inner.__exit__(None, None, None)
            add(session, "after")
        assert onlooker.names() == ["after", "before"]
        assert_usable(session, onlooker)

    def test_a_savepoint_by_hand_that_is_left_open_is_an_error(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        for savepoint in (True, False):
            with pytest.raises((InvalidRequestError, PendingRollbackError), match="still open"):
                with session.begin():
                    with session.atomic(savepoint=savepoint):
                        session.begin_nested()
                        add(session, "one")
            assert onlooker.names() == []
        assert_usable(session, onlooker)

    def test_a_joined_block_left_with_a_savepoint_open_lets_nothing_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), session.begin():
            with pytest.raises(InvalidRequestError, match="still open"):
                with session.atomic(savepoint=False):
                    session.begin_nested()
                    add(session, "one")
        assert_usable(session, onlooker)
