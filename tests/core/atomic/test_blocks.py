"""An atomic block is a transaction where there is none, and a savepoint inside one."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError, PendingRollbackError

from fictive_sqlalchemy import OptInSession, unit_of_work
from tests.core.atomic.support import assert_usable
from tests.library import Author, Onlooker, Undo, add, sent
from tests.wire import WireProxy


class TestOutermost:
    def test_an_outermost_block_is_a_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with session.atomic():
                add(session, "one", "two")
                assert onlooker.names() == []
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert recording.round_trips <= 4
        assert onlooker.names() == ["one", "two"]

    def test_an_error_undoes_the_outermost_block(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(Undo), session.atomic():
                add(session, "one")
                raise Undo
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert_usable(session, onlooker)

    def test_an_empty_block_sends_nothing(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            with session.atomic(), session.atomic(savepoint=False), session.atomic():
                pass
        assert recording.messages == []

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
    def test_no_kind_of_error_commits_a_block(
        self, session: OptInSession, onlooker: Onlooker, kind: type[BaseException]
    ) -> None:
        with pytest.raises(kind), session.atomic():
            add(session, "one")
            with session.atomic():
                add(session, "two")
                raise kind
        assert_usable(session, onlooker)

    def test_a_block_gives_its_transaction(self, session: OptInSession) -> None:
        with session.atomic() as outer:
            assert outer is session.get_transaction()
            with session.atomic() as inner:
                assert inner is session.get_nested_transaction()
            with session.atomic(savepoint=False) as joined:
                assert joined is outer

    def test_what_was_pending_outside_is_stored(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add(Author(name="pending"))
        with session.atomic():
            pass
        assert onlooker.names() == ["pending"]

    def test_objects_loaded_before_a_block_stay_in_the_session(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        ada = session.get_one(Author, 1)
        with session.atomic():
            ada.name = "Augusta"
        assert onlooker.names() == ["Augusta"]
        assert ada in session

    def test_an_error_that_is_caught_inside_commits_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            with session.atomic():
                add(session, "one")
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(Author), {"name": "Ada"})
        assert_usable(session, onlooker)

    def test_a_flush_that_failed_and_was_caught_commits_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
            with session.atomic():
                add(session, "one")
                with pytest.raises(IntegrityError):
                    add(session, "Ada")
        assert_usable(session, onlooker)


class TestInside:
    @pytest.fixture(params=["atomic", "begin", "begin_nested", "begin + begin_nested", "unit"])
    def around(self, request: pytest.FixtureRequest, session: OptInSession) -> Callable[[], Any]:
        def unit() -> Any:
            return unit_of_work(lambda: session)

        def begun() -> Any:
            session.begin()
            return session.begin_nested()

        ways: dict[str, Callable[[], Any]] = {
            "atomic": session.atomic,
            "begin": session.begin,
            "begin_nested": session.begin_nested,
            "begin + begin_nested": begun,
            "unit": unit,
        }
        return ways[request.param]

    def test_a_block_inside_is_a_savepoint(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        wire: WireProxy,
        onlooker: Onlooker,
    ) -> None:
        with wire.record() as recording:
            with around():
                with session.atomic():
                    add(session, "one")
                assert onlooker.names() == []
            if session.in_transaction():
                session.commit()
        verbs = [verb for verb in sent(recording) if verb != "SELECT"]
        assert verbs[0] == "BEGIN"
        assert verbs[-1] == "COMMIT"
        assert verbs.count("SAVEPOINT") == verbs.count("RELEASE") > 0
        assert onlooker.names() == ["one"]

    def test_an_error_that_is_caught_undoes_just_the_inner_block(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        onlooker: Onlooker,
    ) -> None:
        with around():
            add(session, "outer")
            with pytest.raises(Undo), session.atomic():
                add(session, "inner")
                with session.atomic():
                    add(session, "innermost")
                raise Undo
            with pytest.raises(IntegrityError), session.atomic():
                add(session, "another", "Ada")
            add(session, "outer, too")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer", "outer, too"]
        assert_usable(session, onlooker)

    def test_an_error_of_the_block_around_undoes_the_inner_block(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with pytest.raises(Undo), around():
            with session.atomic():
                add(session, "inner")
            raise Undo
        if session.in_transaction():
            session.rollback()
        assert_usable(session, onlooker)

    def test_a_joined_block_sends_nothing_of_its_own(
        self,
        session: OptInSession,
        around: Callable[[], Any],
        wire: WireProxy,
        onlooker: Onlooker,
    ) -> None:
        with around():
            add(session, "outer")
            with wire.record() as recording:
                with session.atomic(savepoint=False):
                    add(session, "inner")
        if session.in_transaction():
            session.commit()
        assert sent(recording) == ["INSERT"]
        assert onlooker.names() == ["inner", "outer"]

    def test_a_joined_block_whose_error_is_caught_lets_nothing_commit(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), around():
            add(session, "outer")
            with pytest.raises(Undo), session.atomic(savepoint=False):
                add(session, "inner")
                raise Undo
            add(session, "after")
        if session.in_transaction():
            session.commit()
        assert_usable(session, onlooker)

    def test_durable_is_refused_inside(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            for savepoint in (True, False):
                with pytest.raises(InvalidRequestError, match="has to be outermost"):
                    session.atomic(durable=True, savepoint=savepoint).__enter__()
            add(session, "outer")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]

    def test_options_are_refused_inside(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            for savepoint in (True, False):
                with pytest.raises(InvalidRequestError, match="isolation_level, read_only can"):
                    session.atomic(
                        isolation_level="SERIALIZABLE", read_only=False, savepoint=savepoint
                    ).__enter__()
            add(session, "outer")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]

    def test_set_rollback_undoes_just_the_inner_block(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            add(session, "outer")
            with session.atomic():
                add(session, "inner")
                session.set_rollback()
            add(session, "after")
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["after", "outer"]
        assert_usable(session, onlooker)

    def test_a_commit_in_an_inner_block_is_refused(
        self, session: OptInSession, around: Callable[[], Any], onlooker: Onlooker
    ) -> None:
        with around():
            with pytest.raises(InvalidRequestError, match="leave commit\\(\\) out"):
                with session.atomic():
                    add(session, "inner")
                    session.commit()
            with pytest.raises(InvalidRequestError, match="leave commit\\(\\) out"):
                with session.atomic(), session.atomic():
                    with session.begin_nested():
                        add(session, "inner")
                        session.commit()
            add(session, "outer")
            assert onlooker.names() == []
        if session.in_transaction():
            session.commit()
        assert onlooker.names() == ["outer"]
        assert_usable(session, onlooker)


class TestOptionsOutermost:
    def test_options_of_the_outermost_block_go_to_its_transaction(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with session.atomic(
                isolation_level="SERIALIZABLE", read_only=True, deferrable=True, durable=True
            ):
                session.scalar(sa.text("SELECT 1"))
        assert recording.statements[0].split(maxsplit=1)[1] == (
            "ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE"
        )

    def test_a_block_inside_joins_one_that_has_options(self, session: OptInSession) -> None:
        level = sa.text("SHOW transaction_isolation")
        with session.atomic(isolation_level="REPEATABLE READ"), session.atomic():
            assert session.scalar(level) == "repeatable read"

    def test_an_unknown_isolation_level_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(ArgumentError):
            session.atomic(isolation_level="QUITE GOOD").__enter__()  # type: ignore[call-overload]  # pyright: ignore
        assert_usable(session, onlooker)

    def test_an_unknown_option_is_refused(self, session: OptInSession) -> None:
        with pytest.raises(TypeError, match="nested"):
            session.atomic(nested=True)  # type: ignore[call-overload]


class TestJoinedOutermost:
    def test_a_joined_block_that_is_outermost_is_a_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with session.atomic(savepoint=False):
                add(session, "one")
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with pytest.raises(Undo), session.atomic(savepoint=False):
            add(session, "two")
            raise Undo
        assert onlooker.names() == ["one"]

    def test_two_joined_blocks_fail_as_one(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(PendingRollbackError, match="savepoint=False"), session.atomic():
            with session.atomic(savepoint=False):
                with pytest.raises(Undo), session.atomic(savepoint=False):
                    add(session, "one")
                    raise Undo
        assert_usable(session, onlooker)

    def test_an_error_of_a_block_joined_to_a_savepoint_undoes_that_savepoint(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.atomic():
            add(session, "outer")
            with pytest.raises(PendingRollbackError, match="savepoint=False"), session.atomic():
                add(session, "middle")
                with pytest.raises(Undo), session.atomic(savepoint=False):
                    add(session, "inner")
                    raise Undo
        assert onlooker.names() == ["outer"]
        assert_usable(session, onlooker)

    def test_a_commit_by_hand_after_the_error_of_a_joined_block_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.begin()
        with pytest.raises(Undo), session.atomic(savepoint=False):
            add(session, "one")
            raise Undo
        with pytest.raises(PendingRollbackError, match="savepoint=False"):
            session.commit()
        session.rollback()
        assert_usable(session, onlooker)

    def test_a_commit_in_a_joined_block_is_refused(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="leave commit"), session.begin():
            with session.atomic(savepoint=False):
                add(session, "one")
                session.commit()
        assert_usable(session, onlooker)

    def test_a_rollback_in_a_joined_block_is_an_error(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="ended inside it"), session.begin():
            with session.atomic(savepoint=False):
                add(session, "one")
                session.rollback()
        assert_usable(session, onlooker)


class TestChangesAfterAFlushThatFailed:
    """They are of the block, too, and go with it."""

    @pytest.mark.parametrize("leaves", ["with an error", "at its end"])
    @pytest.mark.parametrize("block", ["begin", "begin_nested", "atomic"])
    def test_changes_after_a_flush_that_failed_go_with_the_block(
        self, session: OptInSession, onlooker: Onlooker, block: str, leaves: str
    ) -> None:
        ada = session.get_one(Author, 1)
        expected = ZeroDivisionError if leaves == "with an error" else PendingRollbackError
        with pytest.raises(expected):
            with getattr(session, block)():
                self.fail_and_go_on(session, ada)
                if leaves == "with an error":
                    raise ZeroDivisionError
        assert not session.new
        assert not session.dirty
        session.commit()
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30

    def test_changes_after_a_flush_that_failed_go_with_the_inner_block(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        ada = session.get_one(Author, 1)
        with session.begin():
            session.add(Author(name="outer"))
            with suppress(ZeroDivisionError), session.atomic():
                self.fail_and_go_on(session, ada)
                raise ZeroDivisionError
        assert onlooker.names() == ["outer"]
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 30

    def fail_and_go_on(self, session: OptInSession, ada: Author) -> None:
        ada.name = "Bob"
        with suppress(IntegrityError):
            session.flush()
        ada.age = 5
        session.add(Author(name="new"))
