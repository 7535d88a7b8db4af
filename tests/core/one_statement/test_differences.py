"""If a transaction is one statement, an error that comes after the statement can't undo it.

The page about writing names each of these cases. Each test runs twice: with the statement alone,
which stays stored, and with a listener, so that BEGIN is sent and nothing is stored.
"""

# ruff: noqa: PT012, PT031  # what raises or warns is the end of a block

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, SAWarning
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    sessionmaker,
)
from sqlalchemy.orm.exc import FlushError, StaleDataError

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.library import Onlooker, assert_at_rest, sent
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class Unreadable(sa.TypeDecorator[str]):
    """Refuses what comes from the database."""

    impl = sa.Text
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> str | None:
        raise ValueError("unreadable")


class Ticket(Base):
    __tablename__ = "ticket"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.Text)


class Sealed(Base):
    """Its key is made by the server, and can't be read."""

    __tablename__ = "sealed"

    id: Mapped[str] = mapped_column(
        Unreadable, primary_key=True, server_default=sa.text("gen_random_uuid()::text")
    )
    title: Mapped[str] = mapped_column(sa.Text)


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    said: Mapped[str] = mapped_column(sa.CheckConstraint("said <> 'refuse'"))


def _add_note(context: Any) -> str:
    title: str = context.get_current_parameters()["title"]
    _sessions[0].add(Note(said=title))
    return title


_sessions: list[Session] = []


class AddsNote(Base):
    """A default of it adds another object to the session."""

    __tablename__ = "adds_note"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.Text)
    noted: Mapped[str] = mapped_column(sa.Text, default=_add_note)


TRIGGER = """
CREATE FUNCTION take_note() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN INSERT INTO note (said) VALUES ('by a trigger'); RETURN NULL; END $$;
CREATE TRIGGER take_note {} ON ticket FOR EACH {} EXECUTE FUNCTION take_note()
"""


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    """An engine on the tables, in which there is one ticket."""
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        session.add(Ticket(title="first"))
        session.commit()
    yield engine
    assert_at_rest(engine)
    engine.dispose()


@pytest.fixture(params=["alone", "listened to"])
def is_alone(request: pytest.FixtureRequest, engine: OptInEngine) -> Iterator[bool]:
    """Whether nobody listens, so that the statement is sent alone."""
    if request.param == "alone":
        yield True
        return
    with listening(engine, "before_cursor_execute", lambda *_: None):
        yield False


@pytest.fixture
def called() -> list[str]:
    """The functions that were called after the transaction."""
    return []


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    with sessionmaker(engine, class_=OptInSession)() as session:
        session.get(Ticket, 1)
        yield session


@contextmanager
def listening(target: Any, name: str, listener: Callable[..., Any]) -> Iterator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def note_calls(session: OptInSession, called: list[str]) -> None:
    session.on_commit(lambda: called.append("commit"))
    session.on_rollback(lambda: called.append("rollback"))


@pytest.mark.parametrize(
    ("when", "level"), [("AFTER UPDATE", "STATEMENT"), ("BEFORE UPDATE", "ROW")]
)
def test_what_a_trigger_has_done_stays_where_no_row_was_changed(
    engine: OptInEngine,
    session: OptInSession,
    wire: WireProxy,
    onlooker: Onlooker,
    is_alone: bool,
    called: list[str],
    when: str,
    level: str,
) -> None:
    ticket = session.get_one(Ticket, 1)
    onlooker.run(TRIGGER.format(when, level))
    if level == "STATEMENT":
        onlooker.run("DELETE FROM ticket")
    with wire.record() as recording, pytest.raises(StaleDataError), session.begin():
        note_calls(session, called)
        ticket.title = "changed"
    assert sent(recording) == (["UPDATE"] if is_alone else ["BEGIN", "UPDATE", "ROLLBACK"])
    assert onlooker.scalar("SELECT count(*) FROM note") == is_alone
    assert called == ["rollback"]


def test_what_a_trigger_has_done_stays_where_it_turned_the_new_row_away(
    session: OptInSession, onlooker: Onlooker, is_alone: bool, called: list[str]
) -> None:
    onlooker.run(TRIGGER.format("BEFORE INSERT", "ROW"))
    with pytest.raises(FlushError), session.begin():
        note_calls(session, called)
        session.add(Ticket(title="second"))
    assert onlooker.scalar("SELECT count(*) FROM ticket") == 1
    assert onlooker.scalar("SELECT count(*) FROM note") == is_alone
    assert called == ["rollback"]


def test_an_error_of_a_type_that_reads_the_answer_leaves_the_row_stored(
    session: OptInSession, onlooker: Onlooker, is_alone: bool, called: list[str]
) -> None:
    with pytest.raises(ValueError, match="unreadable"), session.begin():
        note_calls(session, called)
        session.add(Sealed(title="first"))
    assert onlooker.scalar("SELECT count(*) FROM sealed") == is_alone
    assert called == ([] if is_alone else ["rollback"])
    session.add(Ticket(title="second"))
    session.commit()


@pytest.mark.parametrize("name", ["after_cursor_execute", "after_execute"])
def test_an_error_of_a_listener_after_the_statement_undoes_it(
    engine: OptInEngine,
    session: OptInSession,
    onlooker: Onlooker,
    called: list[str],
    name: str,
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("too late")

    with (
        listening(engine, name, fail),
        pytest.raises(ValueError, match="too late"),
        session.begin(),
    ):
        note_calls(session, called)
        session.add(Ticket(title="second"))
    # A listener brings BEGIN and COMMIT.
    assert onlooker.scalar("SELECT count(*) FROM ticket") == 1
    assert called == ["rollback"]


@pytest.mark.parametrize("is_refused", [False, True])
def test_objects_that_a_default_adds_are_a_transaction_of_their_own(
    session: OptInSession,
    wire: WireProxy,
    onlooker: Onlooker,
    is_alone: bool,
    called: list[str],
    is_refused: bool,
) -> None:
    def store() -> None:
        with pytest.warns(SAWarning, match=r"Session.add\(\)"), session.begin():
            note_calls(session, called)
            _sessions[:] = [session]
            session.add(AddsNote(title="refuse" if is_refused else "take"))

    with wire.record() as recording:
        if is_refused:
            with pytest.raises(IntegrityError):
                store()
        else:
            store()
    end = "ROLLBACK" if is_refused else "COMMIT"
    second = ["BEGIN", "INSERT", end]
    assert sent(recording) == (
        ["INSERT", *second] if is_alone else ["BEGIN", "INSERT", "INSERT", end]
    )
    assert onlooker.scalar("SELECT count(*) FROM note") == (not is_refused)
    assert onlooker.scalar("SELECT count(*) FROM adds_note") == (is_alone or not is_refused)
    if is_refused:
        assert called == ([] if is_alone else ["rollback"])
    else:
        assert called == ["commit"]
