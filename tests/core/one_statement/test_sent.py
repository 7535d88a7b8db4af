"""The statement is sent alone if the last flush of a transaction sends the only one."""

# ruff: noqa: PT012  # what raises is the end of a block

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.exc import FlushError, StaleDataError

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession, unit_of_work
from tests.core.one_statement.models import (
    Cat,
    Club,
    Key,
    Member,
    Node,
    Note,
    Plain,
    Room,
    Versioned,
)
from tests.core.one_statement.ways import (
    Way,
    atomic,
    begin_commit,
    block,
    commit,
    flush,
    nested,
)
from tests.library import Onlooker, sent
from tests.wire import WireProxy

WAYS: dict[str, Way] = {
    "block": block,
    "begin_nested": nested,
    "atomic": atomic,
    "begin, commit": begin_commit,
    "flush": flush,
    "commit": commit,
}


@pytest.mark.parametrize("way", WAYS)
class TestEachWay:
    def test_one_new_row_is_inserted_in_one_round_trip(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, way: str
    ) -> None:
        session.get(Club, 1)  # psycopg 3 and SQLAlchemy know the connection
        with wire.record() as recording:
            WAYS[way](session, lambda: session.add(Club(name="new")))
        assert sent(recording) == ["INSERT"]
        assert recording.round_trips == 1
        assert onlooker.scalar("SELECT count(*) FROM club") == 3
        assert len(TRANSACTION_CONNECTIONS) == 0
        assert not session.in_transaction()

    def test_one_changed_row_is_updated_in_one_round_trip(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, way: str
    ) -> None:
        club = session.get_one(Club, 1)
        with wire.record() as recording:
            WAYS[way](session, lambda: setattr(club, "name", "go"))
        assert sent(recording) == ["UPDATE"]
        assert recording.round_trips == 1
        assert onlooker.scalar("SELECT name FROM club WHERE id = 1") == "go"

    def test_one_statement_that_fails_stores_nothing_and_leaves_the_session_usable(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, way: str
    ) -> None:
        said: list[str] = []
        session.get(Club, 1)

        def change() -> None:
            session.on_commit(lambda: said.append("commit"))
            session.on_rollback(lambda: said.append("rollback"))
            session.add(Club(name="chess"))

        with wire.record() as recording, pytest.raises(IntegrityError, match="club_name_key"):
            WAYS[way](session, change)
        assert sent(recording) == ["INSERT"]
        if way == "begin, commit":
            session.rollback()
        # Outside there was nothing to wait for when the functions were registered.
        assert said == (["commit"] if way in ("flush", "commit") else ["rollback"])
        assert not session.new
        session.add(Club(name="new"))
        with wire.record() as recording:
            session.commit()
        assert sent(recording) == ["INSERT"]
        assert onlooker.column("SELECT name FROM club ORDER BY id") == ["chess", "tennis", "new"]

    def test_nothing_is_sent_if_nothing_has_changed(
        self, session: OptInSession, wire: WireProxy, way: str
    ) -> None:
        club = session.get_one(Club, 1)
        with wire.record() as recording:
            WAYS[way](session, lambda: setattr(club, "name", "chess"))
        assert sent(recording) == []
        session.rollback()
        assert session.get_one(Club, 2).name == "tennis"


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_after_a_commit_that_failed_nothing_is_sent_until_rollback(
    sessions: sessionmaker[OptInSession],
    wire: WireProxy,
    onlooker: Onlooker,
    begin_on_write: bool,
) -> None:
    with sessions(begin_on_write=begin_on_write) as session:
        if not begin_on_write:
            session.begin()
        session.add(Club(name="chess"))
        with pytest.raises(IntegrityError):
            session.commit()
        with wire.record() as recording:
            with pytest.raises(PendingRollbackError):
                session.execute(sa.insert(Club).values(name="by itself"))
            with pytest.raises(PendingRollbackError):
                session.scalar(sa.select(Club.id))
            with pytest.raises(PendingRollbackError):
                session.commit()
        assert sent(recording) == []
        session.rollback()
        session.add(Club(name="new"))
        session.commit()
    assert onlooker.column("SELECT name FROM club ORDER BY id") == ["chess", "tennis", "new"]


def test_a_commit_that_begins_on_write_is_one_statement(
    sessions: sessionmaker[OptInSession], wire: WireProxy
) -> None:
    with sessions(begin_on_write=True) as session:
        club = session.get_one(Club, 1)
        club.name = "go"
        with wire.record() as recording:
            session.commit()
        assert sent(recording) == ["UPDATE"]


def test_a_flush_that_begins_on_write_sends_begin(
    sessions: sessionmaker[OptInSession], wire: WireProxy
) -> None:
    with sessions(begin_on_write=True) as session:
        session.get_one(Club, 1).name = "go"
        with wire.record() as recording:
            session.flush()
            session.rollback()
        assert sent(recording) == ["BEGIN", "UPDATE", "ROLLBACK"]


def test_a_unit_of_work_that_only_stores_is_one_statement(
    sessions: sessionmaker[OptInSession], wire: WireProxy
) -> None:
    with wire.record() as recording, unit_of_work(sessions) as session:
        session.get_one(Club, 1, with_for_update=False)
        session.add(Club(name="new"))
    assert sent(recording) == ["BEGIN", "SELECT", "INSERT", "COMMIT"]  # the read is inside
    with wire.record() as recording, unit_of_work(sessions) as session:
        session.add(Club(name="newer"))
    assert sent(recording) == ["INSERT"]


def test_functions_and_listeners_are_called_as_after_a_commit(
    session: OptInSession, wire: WireProxy
) -> None:
    said: list[str] = []
    for name in ("after_commit", "after_rollback", "after_soft_rollback"):
        event.listen(session, name, lambda *_, name=name: said.append(name))
    with wire.record() as recording, session.begin():
        session.add(Club(name="new"))
        session.on_commit(lambda: said.append("on_commit"))
        session.on_rollback(lambda: said.append("on_rollback"))
    assert sent(recording) == ["INSERT"]
    assert said == ["after_commit", "on_commit"]


def change_the_name(session: Session) -> None:
    session.get_one(Club, 1).name = "go"


def change_by_sql(session: Session) -> None:
    session.get_one(Club, 1).size = Club.size + 1


def add_to_a_stored_parent(session: Session) -> None:
    session.add(Room(name="hall", club=session.get_one(Club, 1)))


def append_to_a_stored_parent(session: Session) -> None:
    club = session.get_one(Club, 1)
    club.rooms.append(Room(name="hall"))


def append_to_a_stored_owner(session: Session) -> None:
    club = session.get_one(Club, 1)
    club.keys.append(Key(name="front"))


def add_to_a_dynamic_collection(session: Session) -> None:
    club = session.get_one(Club, 1)
    club.notes.add(Note(name="hello"))


def move_to_another_parent(session: Session) -> None:
    session.get_one(Room, 1).club = session.get_one(Club, 2)


def add_without_a_parent(session: Session) -> None:
    session.add(Room(name="hall"))


def add_with_empty_collections(session: Session) -> None:
    session.add(Club(name="new", rooms=[], keys=[], members=set()))


def add_of_one_table(session: Session) -> None:
    session.add(Cat(name="Tom"))


def add_versioned(session: Session) -> None:
    session.add(Versioned(name="first"))


def change_versioned(session: Session) -> None:
    session.get_one(Versioned, 1).name = "second"


def add_a_child_of_its_own_table(session: Session) -> None:
    session.add(Node(name="leaf", parent=session.get_one(Node, 1)))


def add_with_all_kinds_of_columns(session: Session) -> None:
    session.add(Plain(name="plain"))


@pytest.mark.parametrize(
    "change",
    [
        change_the_name,
        change_by_sql,
        add_to_a_stored_parent,
        append_to_a_stored_parent,
        append_to_a_stored_owner,
        add_to_a_dynamic_collection,
        move_to_another_parent,
        add_without_a_parent,
        add_with_empty_collections,
        add_of_one_table,
        add_versioned,
        change_versioned,
        add_a_child_of_its_own_table,
        add_with_all_kinds_of_columns,
    ],
)
def test_one_changed_row_is_one_statement(
    session: OptInSession,
    sessions: sessionmaker[OptInSession],
    wire: WireProxy,
    change: Callable[[Session], None],
) -> None:
    with sessions.begin() as other:
        other.add_all([Room(name="one", club_id=1), Node(name="root"), Versioned(name="zero")])
    with session.no_autoflush:
        change(session)
    with wire.record() as recording:
        session.commit()
    writing = [verb for verb in sent(recording) if verb != "SELECT"]
    assert writing in (["INSERT"], ["UPDATE"])
    assert not session.dirty
    assert not session.new


def test_a_row_that_is_gone_is_an_error(session: OptInSession, onlooker: Onlooker) -> None:
    club = session.get_one(Club, 1)
    onlooker.run("DELETE FROM club WHERE id = 1")
    said: list[str] = []
    with pytest.raises(StaleDataError), session.begin():
        session.on_rollback(lambda: said.append("rollback"))
        club.name = "go"
    assert said == ["rollback"]
    session.add(Club(name="new"))
    session.commit()


def test_a_row_that_a_trigger_does_not_store_is_an_error(
    session: OptInSession, onlooker: Onlooker
) -> None:
    onlooker.run(
        "CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER leave_out BEFORE INSERT ON club FOR EACH ROW EXECUTE FUNCTION leave_out()"
    )
    said: list[str] = []
    with pytest.raises(FlushError), session.begin():
        session.on_commit(lambda: said.append("commit"))
        session.on_rollback(lambda: said.append("rollback"))
        session.add(Club(name="new"))
    assert said == ["rollback"]
    assert onlooker.scalar("SELECT count(*) FROM club") == 2


def test_a_member_of_two_binds_is_sent_to_its_own(
    engine: OptInEngine, wire: WireProxy, wire_url: str
) -> None:
    other: Any = OptInSession(binds={Club: engine, Member: engine})
    with other as session, wire.record() as recording:
        session.add(Member(name="Ada"))
        session.commit()
    assert sent(recording) == ["INSERT"]
