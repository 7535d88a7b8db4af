"""A block goes on after an error, such as a lost connection: the error at its end says why."""

# ruff: noqa: PT012 (what is lost, and when, takes several statements)

from __future__ import annotations

from contextlib import ExitStack
from itertools import count
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Onlooker
from tests.wire import Message, WireProxy


def cut_at(wire: WireProxy, verb: str) -> None:
    """Cut the connection when a statement with this first word is sent."""

    def cut_where(message: Message) -> Literal["before"] | None:
        return "before" if message.verb == verb else None

    wire.cut_where = cut_where


def test_a_loss_at_the_rollback_of_a_savepoint_is_the_cause_of_the_error_at_the_end(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    with pytest.raises(PendingRollbackError) as caught, session.begin():
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            session.execute(sa.insert(Author).values(name="one"))
            cut_at(wire, "ROLLBACK TO")
            raise ZeroDivisionError
        session.execute(sa.insert(Author).values(name="two"))
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert onlooker.names() == []


def test_a_loss_at_the_rollback_of_an_aborted_savepoint_is_the_cause_of_the_error_at_the_end(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    with pytest.raises(PendingRollbackError) as caught, session.begin():
        with pytest.raises(IntegrityError), session.begin_nested():
            cut_at(wire, "ROLLBACK TO")
            session.execute(sa.insert(Author).values(name="Ada"))
        session.execute(sa.insert(Author).values(name="two"))
    cause = caught.value.__cause__
    assert isinstance(cause, DBAPIError)
    assert cause.connection_invalidated
    assert onlooker.names() == []


@pytest.mark.parametrize("goes_on", [True, False], ids=["before another", "before the end"])
def test_a_loss_that_was_caught_is_the_cause_of_the_error_at_the_end(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker, goes_on: bool
) -> None:
    with pytest.raises(PendingRollbackError) as caught, session.begin():
        session.execute(sa.insert(Author).values(name="one"))
        cut_at(wire, "SELECT")
        with pytest.raises(DBAPIError):
            session.execute(sa.text("SELECT 1"))
        if goes_on:
            session.execute(sa.insert(Author).values(name="two"))
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert onlooker.names() == []


def test_an_error_is_the_cause_even_if_a_library_closes_its_exit_stack_after_it(
    engine: OptInEngine, onlooker: Onlooker
) -> None:
    """As pandas' to_sql() does: the block is not told of the error, and is to commit."""
    stack = ExitStack()
    connection = stack.enter_context(engine.connect())
    stack.enter_context(connection.begin())
    connection.execute(sa.insert(Author).values(name="one"))
    with pytest.raises(PendingRollbackError) as caught:
        try:
            connection.execute(sa.insert(Author).values(name="Ada"))
        finally:
            stack.close()
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert "author_name_key" in str(caught.value.__cause__)
    assert onlooker.names() == []


class TestALossWhileTheDriverLeavesAutocommit:
    """The server goes between the look at the socket and the driver's own."""

    @pytest.fixture(params=[1, 2], ids=["once", "and again"])
    def closings(self, request: pytest.FixtureRequest, engine: OptInEngine) -> int:
        closings = count(request.param, -1)
        leave = engine.switch.leave_autocommit

        def close_first(connection: Any, options: Any) -> None:
            if next(closings) > 0:
                connection.close()
            leave(connection, options)
            connection.isolation_level  # noqa: B018  # what the driver looks at where it is set

        engine.switch.leave_autocommit = close_first  # type: ignore[method-assign]
        return int(request.param)

    def test_a_loss_while_the_driver_leaves_autocommit_is_unnoticed_or_an_error(
        self, session: OptInSession, onlooker: Onlooker, closings: int
    ) -> None:
        if closings == 1:
            with session.begin(isolation_level="SERIALIZABLE"):
                session.execute(sa.insert(Author).values(name="one"))
        else:
            with pytest.raises(DBAPIError), session.begin(isolation_level="SERIALIZABLE"):
                session.execute(sa.insert(Author).values(name="one"))
            assert not session.in_transaction()
        with session.begin():
            session.execute(sa.insert(Author).values(name="two"))
        assert onlooker.names() == (["one", "two"] if closings == 1 else ["two"])


@pytest.mark.parametrize("begin_on_write", [False, True], ids=["begin", "begin on write"])
def test_a_cursor_after_a_flush_lost_its_connection_sends_nothing(
    engine: OptInEngine, onlooker: Onlooker, begin_on_write: bool
) -> None:
    # SQLAlchemy takes another connection here, on which the cursor's INSERT would be stored.
    with OptInSession(engine, begin_on_write=begin_on_write) as session:
        if not begin_on_write:
            session.begin()
        connection = session.connection()
        session.execute(sa.insert(Author).values(name="one"))
        session.add(Author(name="two"))
        pid: Any = connection.scalar(sa.select(sa.func.pg_backend_pid()))
        onlooker.kill(pid)
        with pytest.raises(DBAPIError) as lost:
            session.flush()
        with pytest.raises(PendingRollbackError) as caught:
            connection.connection.cursor().execute("INSERT INTO author (name) VALUES ('raw')")
        assert caught.value.__cause__ is lost.value
        session.rollback()
    assert onlooker.names() == []
