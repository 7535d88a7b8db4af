"""A transaction that its owner alone may commit, on our session and on SQLAlchemy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.owned import Owned
from tests.library import Author, Onlooker, fill, sent
from tests.wire import WireProxy


@pytest.fixture(params=["opt-in", "stock", "opt-in on a stock bind"])
def session(request: pytest.FixtureRequest, url: str, wire_url: str) -> Iterator[Session]:
    fill(url)
    ours = request.param == "opt-in"
    engine = create_engine(wire_url) if ours else sa.create_engine(wire_url)
    engine.connect().close()
    class_ = Session if request.param == "stock" else OptInSession
    with class_(engine) as session:
        yield session
    engine.dispose()


def test_nobody_else_commits(session: Session, wire: WireProxy, onlooker: Onlooker) -> None:
    with wire.record() as recording, session.begin() as transaction:
        with Owned(session, transaction, "It is mine."):
            session.add(Author(name="one"))
            for commit in (session.commit, transaction.commit):
                with pytest.raises(InvalidRequestError, match=r"It is mine\."):
                    commit()
            session.add(Author(name="two"))
            session.flush()
        assert onlooker.names() == []
    assert sent(recording)[-1] == "COMMIT"
    assert sent(recording).count("BEGIN") == 1
    assert onlooker.names() == ["one", "two"]


def test_savepoints_of_others_are_released(session: Session, onlooker: Onlooker) -> None:
    with session.begin() as transaction, Owned(session, transaction, "It is mine."):
        with session.begin_nested():
            session.add(Author(name="one"))
        savepoint = session.begin_nested()
        session.add(Author(name="two"))
        savepoint.commit()
        with pytest.raises(InvalidRequestError, match="mine"), session.begin_nested():
            session.commit()  # which commits the outermost, too
    assert onlooker.names() == ["one", "two"]


def test_each_owner_refuses_for_its_own(session: Session, onlooker: Onlooker) -> None:
    with session.begin() as outer, Owned(session, outer, "It is the outer one's."):
        with session.begin_nested() as inner, Owned(session, inner, "It is the inner one's."):
            session.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="the inner one's"):
                session.commit()
            with pytest.raises(InvalidRequestError, match="the inner one's"):
                outer.commit()
        with pytest.raises(InvalidRequestError, match="the outer one's"):
            session.commit()
    assert onlooker.names() == ["one"]
    session.add(Author(name="two"))
    session.commit()  # nobody owns it any more
    assert onlooker.names() == ["one", "two"]


def test_another_transaction_in_place_of_the_owned_one_is_refused(
    session: Session, onlooker: Onlooker
) -> None:
    transaction = session.begin()
    with Owned(session, transaction, "It is mine.") as owned:
        session.rollback()
        session.add(Author(name="on its own"))
        with pytest.raises(InvalidRequestError, match="mine"):
            session.commit()
        session.rollback()
        owned.go_on_in(session.begin())
        owned.refusal = "It is still mine."
        session.add(Author(name="one"))
        with pytest.raises(InvalidRequestError, match="still mine"):
            session.commit()
        owned.leave()
        owned.leave()
        session.commit()
    assert onlooker.names() == ["one"]


def test_what_postgresql_would_roll_back_without_a_word_is_noticed(session: Session) -> None:
    """Our own connections find it out at COMMIT, so only SQLAlchemy's are asked here."""
    transaction = session.begin()
    with Owned(session, transaction, "It is mine.") as owned:
        session.execute(sa.insert(Author).values(name="lost"))
        owned.check_not_aborted()
        with suppress(DBAPIError):
            session.execute(sa.text("SELECT 1 / 0"))
        if isinstance(session.get_bind(), OptInEngine):
            owned.check_not_aborted()
        else:
            with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
                owned.check_not_aborted()
            inner = Owned(session, transaction, "It is another's.")
            with inner, pytest.raises(PendingRollbackError):  # the bind joined before this one
                inner.check_not_aborted()
    session.rollback()


def test_sessions_that_nobody_owns_are_left_alone(session: Session, onlooker: Onlooker) -> None:
    other = type(session)(session.get_bind())
    with session.begin() as transaction, Owned(session, transaction, "It is mine."):
        other.add(Author(name="other"))
        other.commit()
        assert onlooker.names() == ["other"]
        assert not other.info
    other.close()
    assert not session.info


def test_the_listeners_of_the_application_are_asked_as_ever(session: Session) -> None:
    called: list[Any] = []
    event.listen(session, "before_commit", called.append)
    with session.begin() as transaction, Owned(session, transaction, "It is mine."):
        with pytest.raises(InvalidRequestError, match="mine"):
            session.commit()
        assert called == []
    assert called == [session]
