"""An error of the database that is caught inside a transaction is raised at its end."""

# pytest.raises() ends the block around the one that it names:
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Onlooker, authors, sent
from tests.wire import WireProxy


def store(session: OptInSession, author: Author) -> None:
    session.add(author)
    session.flush()


def read_after(session: OptInSession, author: Author) -> None:
    session.add(author)
    session.scalars(sa.select(Author)).all()


CAUGHT: dict[str, Callable[[OptInSession], Any]] = {
    "execute": lambda session: session.execute(sa.insert(Author).values(name="Ada")),
    "flush": lambda session: store(session, Author(name="Ada")),
    "autoflush": lambda session: read_after(session, Author(name="Ada")),
    "many": lambda session: session.execute(sa.insert(authors), [{"name": "x"}, {"name": "Ada"}]),
    "text": lambda session: session.execute(sa.text("INSERT INTO author (name) VALUES ('Ada')")),
    "connection": lambda session: session.connection().execute(
        sa.insert(Author).values(name="Ada")
    ),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Author, [{"name": "Ada"}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Author(name="Ada")]),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(
        Author, [{"id": 2, "name": "Ada"}]
    ),
}


class TestTheCauseOfAPendingRollback:
    @pytest.mark.parametrize("how", CAUGHT)
    def test_the_cause_is_the_databases_error_at_the_end_of_a_block(
        self, session: OptInSession, how: str
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError) as caught:
                CAUGHT[how](session)
        assert raised.value.__cause__ is caught.value
        assert "author_name_key" in str(raised.value.__cause__)

    def test_the_cause_is_the_first_error_if_there_are_several(self, session: OptInSession) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError) as caught:
                CAUGHT["execute"](session)
            with pytest.raises(DBAPIError, match="author_name_key") as later:
                session.execute(sa.select(Author))
            assert "An earlier statement of this transaction failed" in str(later.value)
        assert raised.value.__cause__ is caught.value

    def test_the_cause_is_not_an_error_that_a_savepoint_has_undone(
        self, session: OptInSession
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError), session.begin_nested():
                CAUGHT["execute"](session)
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"))
        assert raised.value.__cause__ is caught.value

    def test_the_cause_is_the_databases_error_on_a_connection(self, engine: OptInEngine) -> None:
        with pytest.raises(PendingRollbackError) as raised, engine.begin() as connection:
            with pytest.raises(IntegrityError) as caught:
                connection.execute(sa.insert(Author).values(name="Ada"))
        assert raised.value.__cause__ is caught.value

    def test_the_cause_is_the_error_of_an_atomic_block_that_has_joined(
        self, session: OptInSession
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.atomic():
            with pytest.raises(ZeroDivisionError) as caught, session.atomic(savepoint=False):
                raise ZeroDivisionError
        assert raised.value.__cause__ is caught.value

    def test_the_cause_is_the_databases_error_at_a_commit_by_hand(
        self, session: OptInSession
    ) -> None:
        session.begin()
        with pytest.raises(IntegrityError) as caught:
            CAUGHT["execute"](session)
        with pytest.raises(PendingRollbackError) as raised:
            session.commit()
        assert raised.value.__cause__ is caught.value
        session.rollback()


def test_begin_nested_that_fails_expires_what_it_has_changed_alone(
    session: OptInSession, wire: WireProxy
) -> None:
    loaded = session.scalars(sa.select(Author).order_by(Author.id)).all()
    with session.begin():
        with pytest.raises(IntegrityError), session.begin_nested():
            loaded[0].age = 7
            session.flush()
            session.execute(sa.insert(Author).values(name="Ada"))
        with wire.record() as recording:
            assert [author.age for author in loaded] == [30, 30, 30]
    assert sent(recording) == ["SELECT"]


def test_a_savepoint_that_cannot_be_set_is_not_left_open(
    session: OptInSession, onlooker: Onlooker
) -> None:
    session.connection()
    with pytest.raises(PendingRollbackError), session.begin():
        session.execute(sa.insert(authors).values(name="one"))
        with pytest.raises(DBAPIError):
            session.execute(sa.text("SELECT 1/0"))
        with pytest.raises(DBAPIError), session.begin_nested():
            pass
        assert not session.in_nested_transaction()
    assert onlooker.names() == []
