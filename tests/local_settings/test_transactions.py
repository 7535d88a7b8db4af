"""In a transaction: the settings are sent once, with its first statement, and after each change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.recording import record
from tests.library import Author, Document, Note, NoteBase, Onlooker, authors, fill, sent
from tests.local_settings.support import TIMEOUT, has_none, tenant
from tests.local_settings.test_statements import WORKS
from tests.postgres import PostgresServer, ReplicaServer
from tests.wire import Recording, WireProxy

Sessions = sessionmaker[OptInSession]


def settings_sent(recording: Recording) -> int:
    return sum("SET LOCAL" in statement for statement in recording.statements)


def test_the_settings_are_sent_once_for_a_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    session.set_local({"app.tenant_id": 7})
    with wire.record() as recording, session.begin():
        assert [tenant(session) for _ in range(5)] == ["7"] * 5
        session.add(Author(name="x"))
    assert settings_sent(recording) == 1
    assert recording.round_trips == 8
    assert tenant(session) == "7"


def test_a_change_is_sent_with_the_next_statement(
    session: OptInSession, wire: WireProxy, driver: str
) -> None:
    session.set_local({"app.tenant_id": 7})
    with wire.record() as recording, session.begin():
        assert tenant(session) == "7"
        session.set_local({"app.tenant_id": 8, "statement_timeout": "9s"})
        assert tenant(session) == "8"
        assert session.scalar(TIMEOUT) == "9s"
        session.set_local({"app.tenant_id": None})
        assert has_none(session)
        assert session.scalar(TIMEOUT) == "9s"
    assert settings_sent(recording) == 3
    # psycopg 3 sends a change in a message of its own.
    assert recording.round_trips == (7 if driver == "psycopg2" else 9)


def test_a_block_that_is_rolled_back_keeps_what_was_set_in_it(session: OptInSession) -> None:
    with session.begin() as transaction:
        session.set_local({"app.tenant_id": 7})
        assert tenant(session) == "7"
        transaction.rollback()
    assert tenant(session) == "7"


def test_a_savepoint_that_is_rolled_back_keeps_what_was_set_in_it(
    session: OptInSession, wire: WireProxy
) -> None:
    """The server forgets what was set in it; the session does not."""
    session.set_local({"app.tenant_id": 7})
    with wire.record() as recording, session.begin():
        assert tenant(session) == "7"
        with session.begin_nested() as savepoint:
            assert tenant(session) == "7"
            session.set_local({"app.tenant_id": 8, "statement_timeout": "9s"})
            assert tenant(session) == "8"
            savepoint.rollback()
        assert tenant(session) == "8"
        assert session.scalar(TIMEOUT) == "9s"
        with session.begin_nested():
            session.set_local({"app.tenant_id": 9})
            assert tenant(session) == "9"
        assert tenant(session) == "9"
    assert settings_sent(recording) == 4


def test_a_failed_statement_in_a_savepoint_leaves_the_settings_right(session: OptInSession) -> None:
    with session.begin():
        session.set_local({"app.tenant_id": 7})
        with pytest.raises(exc.DataError), session.begin_nested():
            session.execute(text("SELECT 1 / 0"))
        assert tenant(session) == "7"
        session.set_local({"app.tenant_id": 8})
        with pytest.raises(exc.DataError), session.begin_nested():
            session.execute(text("SELECT 1 / 0"))
        assert tenant(session) == "8"


def test_a_change_in_an_aborted_savepoint_is_sent_after_its_rollback(session: OptInSession) -> None:
    """ROLLBACK TO is all that the server accepts then, and so carries nothing."""
    session.set_local({"app.tenant_id": 7})
    with session.begin():
        nested = session.begin_nested()
        with pytest.raises(exc.DataError):
            session.execute(text("SELECT 1 / 0"))
        session.set_local({"app.tenant_id": 8})
        nested.rollback()
        assert tenant(session) == "8"


def test_the_settings_are_sent_after_a_first_statement_that_was_not_sent(
    session: OptInSession,
) -> None:
    session.set_local({"app.tenant_id": 7})
    with session.begin():
        with pytest.raises(exc.StatementError):
            session.execute(text("SELECT :missing"))
        assert tenant(session) == "7"


def test_one_statement_with_settings_is_one_round_trip(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    session.set_local({"app.tenant_id": 7})
    author = session.get_one(Author, 1)
    author.age = 31
    with wire.record() as recording:
        session.commit()
    assert recording.round_trips == 1
    assert "BEGIN" not in sent(recording)
    assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 31


def test_begin_on_write_sends_the_settings_once(sessions: Sessions, wire: WireProxy) -> None:
    with sessions(begin_on_write=True) as session:
        session.set_local({"app.tenant_id": 7})
        assert tenant(session) == "7"
        assert not session.in_transaction()
        with wire.record() as recording:
            session.execute(update(Author).values(age=1))
            assert tenant(session) == "7"
            session.commit()
        assert settings_sent(recording) == 1
        assert tenant(session) == "7"


def test_filter_by_or_create_has_the_settings(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    seen: list[Any] = []

    @event.listens_for(session, "after_flush")
    def look(session: OptInSession, _: Any) -> None:
        seen.append(tenant(session))

    filter_by_or_create(session, Author, {"name": "new"}, {})
    with session.begin():
        filter_by_or_create(session, Author, {"name": "newer"}, {})
        filter_by_or_create(session, Author, {"name": "Ada"}, {})
    assert seen
    assert set(seen) == {"7"}


def test_a_retry_has_the_settings_of_the_session(session: OptInSession, onlooker: Onlooker) -> None:
    tries: list[Any] = []

    @retry_transaction(session)
    def work() -> None:
        tries.append(tenant(session))
        session.set_local({"app.tenant_id": 8})
        tries.append(tenant(session))
        if len(tries) == 2:
            session.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    session.set_local({"app.tenant_id": 7})
    work()
    assert tries == ["7", "8", "8", "8"]
    with session.atomic():
        assert tenant(session) == "8"


def test_listeners_to_the_begin_have_the_settings(
    session: OptInSession, engine: OptInEngine
) -> None:
    seen: list[Any] = []

    @event.listens_for(session, "after_begin")
    def first(session: OptInSession, _: Any, connection: sa.Connection) -> None:
        seen.append(tenant(connection))

    session.set_local({"app.tenant_id": 7})
    with session.begin():
        seen.append(tenant(session))
    assert seen == ["7", "7"]


def test_the_connection_that_is_handed_out_has_the_settings(session: OptInSession) -> None:
    connection = session.connection()
    session.set_local({"app.tenant_id": 7})
    assert tenant(connection) == "7"
    with session.begin():
        assert tenant(connection) == "7"
        assert tenant(session) == "7"
        raw = connection.connection.cursor()
        raw.execute("SELECT current_setting('app.tenant_id', true)")
        assert raw.fetchone() == ("7",)
    session.set_local({"app.tenant_id": 8})
    assert tenant(connection) == "8"


def test_a_two_phase_transaction_has_the_settings(sessions: Sessions) -> None:
    with sessions(twophase=True) as session:
        session.set_local({"app.tenant_id": 7})
        with session.begin():
            assert tenant(session) == "7"
            session.execute(update(Author).values(age=1))
        assert tenant(session) == "7"


def test_a_transaction_with_an_isolation_level_has_the_settings(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    with session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True):
        assert tenant(session) == "7"
        assert session.scalar(text("SHOW transaction_isolation")) == "serializable"


@pytest.fixture
def notes(server: PostgresServer, wire: WireProxy, driver: str) -> Iterator[OptInEngine]:
    """An engine on another database."""
    name = server.create_database()
    engine = create_engine(wire.url(server.url(driver, name)))
    NoteBase.metadata.create_all(engine)
    yield engine
    engine.dispose()
    server.drop_database(name)


def test_two_binds_have_the_settings_each(engine: OptInEngine, notes: OptInEngine) -> None:
    mine = text("SELECT current_setting('app.tenant_id', true)")
    with OptInSession(binds={Author: engine, NoteBase: notes}) as session:

        def both() -> list[Any]:
            return [
                session.scalar(mine, bind_arguments={"mapper": mapper}) for mapper in (Author, Note)
            ]

        session.set_local({"app.tenant_id": 7})
        assert both() == ["7", "7"]
        with session.begin():
            assert both() == ["7", "7"]
            session.set_local({"app.tenant_id": 8})
            session.add_all([Author(name="x"), Note(text="x")])
            assert both() == ["8", "8"]


def test_a_bind_of_another_database_has_no_settings(engine: OptInEngine) -> None:
    lite = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    NoteBase.metadata.create_all(lite)
    with OptInSession(binds={Author: engine, NoteBase: lite}) as session:
        session.set_local({"app.tenant_id": 7})
        session.add(Note(text="x"))
        session.commit()
        assert session.scalars(select(Note.text)).all() == ["x"]
        assert session.scalar(select(Author.name).where(Author.id == 1)) == "Ada"


def test_reads_of_a_replica_have_the_settings(
    replica: ReplicaServer, url: str, driver: str, database: str
) -> None:
    fill(url)
    replica.catch_up()
    engine = create_engine(url, replicas=[replica.url(driver, database)])
    with OptInSession(engine) as session:
        session.set_local({"app.tenant_id": 7})
        where = select(sa.func.current_setting("app.tenant_id"), sa.func.pg_is_in_recovery())
        assert tuple(session.execute(where).one()) == ("7", True)
        with session.begin():
            assert tuple(session.execute(where).one()) == ("7", False)
    engine.dispose()


def test_reads_of_an_engine_that_is_read_only_outside_have_the_settings(
    wire_url: str, library: None
) -> None:
    fill(wire_url)
    engine = create_engine(wire_url, read_only_outside=True)
    with OptInSession(engine) as session:
        session.set_local({"app.tenant_id": 7})
        assert tenant(session) == "7"
        with pytest.raises(exc.DBAPIError, match="read-only"):
            session.execute(update(Author).values(age=1))
        stream = session.execute(
            text("SELECT current_setting('app.tenant_id')"), execution_options={"yield_per": 2}
        )
        assert stream.scalars().all() == ["7"]
        with session.begin():
            session.execute(update(Author).values(age=1))
    engine.dispose()


def test_the_settings_are_sent_again_after_a_lost_connection(
    session: OptInSession, onlooker: Onlooker
) -> None:
    session.set_local({"app.tenant_id": 7})
    pid = session.scalar(text("SELECT pg_backend_pid()"))
    onlooker.run(f"SELECT pg_terminate_backend({pid})")
    onlooker.run("SELECT pg_sleep(0.2)")
    assert tenant(session) == "7"  # on another connection
    with session.begin():
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        onlooker.run(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(exc.DBAPIError):
            session.execute(text("SELECT pg_sleep(1)"))
        session.rollback()
    assert tenant(session) == "7"


def test_a_loss_in_the_one_statement_is_an_unknown_outcome(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    session.set_local({"app.tenant_id": 7})
    author = session.get_one(Author, 1)
    wire.cut_where = lambda message: "after" if "UPDATE" in message.text else None
    with pytest.raises(CommitOutcomeUnknown), session.begin():
        author.age = 77
    wire.cut_where = None
    assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 77
    assert tenant(session) == "7"


@pytest.mark.parametrize("begin_on_write", [False, True])
@pytest.mark.parametrize("name", WORKS)
def test_a_recording_counts_as_the_wire(
    sessions: Sessions, wire: WireProxy, onlooker: Onlooker, name: str, begin_on_write: bool
) -> None:
    with sessions(begin_on_write=begin_on_write) as session:
        session.set_local({"app.tenant_id": 7, "statement_timeout": "9s"})
        tenant(session)
        for _ in range(3):
            with record(session) as seen, wire.record() as recording:
                WORKS[name](session)
                session.rollback()
            onlooker.run("DELETE FROM document WHERE id > 3; DELETE FROM author WHERE id > 3")
            assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_recording_of_a_stream_counts_as_the_wire(
    session: OptInSession, wire: WireProxy, is_inside: bool
) -> None:
    session.set_local({"app.tenant_id": 7})
    for _ in range(8):
        with record(session) as seen, wire.record() as recording:
            if is_inside:
                with session.begin():
                    tenant(session)
                    session.set_local({"app.tenant_id": 8})
                    list(session.scalars(select(Author).execution_options(yield_per=1)))
            else:
                list(session.scalars(select(Author).execution_options(yield_per=1)))
        assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"


def test_a_recording_goes_on_when_the_first_settings_come(
    session: OptInSession, wire: WireProxy
) -> None:
    with record(session) as seen, wire.record() as recording:
        session.get(Author, 1)
        session.set_local({"app.tenant_id": 7})
        session.get(Author, 2)
        with session.begin():
            session.get(Author, 3)
            session.execute(update(authors).values(age=1))
    assert seen.round_trips == recording.round_trips, f"{seen}\n{recording}"
    assert len(seen.statements) == 4
    session.get(Document, 1)
    assert len(seen.statements) == 4
    assert tenant(session) == "7"
