"""Outside a transaction: each statement has the settings, in its round trip, and no other has."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, insert, select, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Document, Onlooker, add, authors, sent
from tests.local_settings.support import TENANT, TIMEOUT, has_none, tenant, transaction_status
from tests.wire import WireProxy

Sessions = sessionmaker[OptInSession]


def test_a_read_has_the_settings_in_one_round_trip(session: OptInSession, wire: WireProxy) -> None:
    session.set_local({"app.tenant_id": 7})
    with wire.record() as recording:
        assert tenant(session) == "7"
    assert recording.round_trips == 1
    assert set(sent(recording)) <= {"SET", "SELECT"}
    assert transaction_status(recording) == "I"


def test_the_connection_keeps_none_of_the_settings(engine: OptInEngine, sessions: Sessions) -> None:
    with sessions() as session:
        session.set_local({"app.tenant_id": 7, "statement_timeout": "5s"})
        assert tenant(session) == "7"
        assert session.scalar(TIMEOUT) == "5s"
        raw = session.connection().connection.dbapi_connection
        assert raw is not None
        cursor = raw.cursor()
        cursor.execute("SELECT current_setting('app.tenant_id', true)")
        assert cursor.fetchone() in (("",), (None,))
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("0",)
    with engine.connect() as connection:
        assert has_none(connection)
        assert connection.scalar(TIMEOUT) == "0"


def test_closing_the_session_forgets_the_settings(session: OptInSession) -> None:
    for end in (session.close, session.reset, session.invalidate):
        session.set_local({"app.tenant_id": 7})
        assert tenant(session) == "7"
        end()
        assert has_none(session)


def test_commit_and_rollback_keep_the_settings(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    session.add(Author(name="x"))
    session.commit()
    assert tenant(session) == "7"
    session.rollback()
    assert tenant(session) == "7"


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("o'brien", "o'brien"),
        ("100 %", "100 %"),
        ("%(x)s %s %%", "%(x)s %s %%"),
        ("back\\slash '\\' E'", "back\\slash '\\' E'"),
        ("a;b -- c /* d", "a;b -- c /* d"),
        ("Zoë ☃", "Zoë ☃"),
        ("", ""),
        ("line\nbreak", "line\nbreak"),
        (7, "7"),
        (2.5, "2.5"),
        (Decimal("1.10"), "1.10"),
        (True, "on"),
        (False, "off"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_each_value_of_a_setting_arrives_as_it_is(
    session: OptInSession, value: Any, seen: str
) -> None:
    session.set_local({"app.tenant_id": value})
    assert tenant(session) == seen
    with_parameters = session.execute(
        text("SELECT current_setting('app.tenant_id'), :x, '100%'"), {"x": "5 % '"}
    ).one()
    assert tuple(with_parameters) == (seen, "5 % '", "100%")
    plain = session.connection().exec_driver_sql(
        "SELECT current_setting('app.tenant_id'), '100%'",
        execution_options={"no_parameters": True},
    )
    assert tuple(plain.one()) == (seen, "100%")
    with session.begin():
        assert tenant(session) == seen


def test_names_of_settings_ignore_the_case(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    session.set_local({"App.Tenant_ID": 8})
    assert tenant(session) == "8"
    session.set_local({"APP.TENANT_ID": None})
    assert has_none(session)


def test_none_takes_one_setting_back_and_leaves_the_others(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7, "statement_timeout": 5000})
    session.set_local({"app.tenant_id": None, "app.never_set": None})
    assert has_none(session)
    assert session.scalar(TIMEOUT) == "5s"


WORKS: dict[str, Any] = {
    "select": lambda session: session.scalars(select(Author)).all(),
    "get": lambda session: session.get(Author, 1),
    "lazy load": lambda session: session.get_one(Document, 1).author.name,
    "text": lambda session: session.execute(text("SELECT 1")).all(),
    "insert": lambda session: session.execute(insert(Author).values(name="new")),
    "update": lambda session: session.execute(update(Author).values(age=1)),
    "returning": lambda session: session.execute(
        insert(Author).values(name="new").returning(Author.id)
    ).all(),
    "one object": lambda session: (session.add(Author(name="new")), session.commit()),
    "several objects": lambda session: _several(session),
    "many rows": lambda session: session.execute(
        insert(Author), [{"name": f"n{n}"} for n in range(20)]
    ),
    "executemany": lambda session: session.execute(
        update(authors).where(authors.c.id == sa.bindparam("i")).values(age=sa.bindparam("n")),
        [{"i": 1, "n": 1}, {"i": 2, "n": 2}],
    ),
    "bulk": lambda session: session.bulk_insert_mappings(
        Author,
        [{"name": "a"}, {"name": "b"}],
    ),
    "query update": lambda session: session.query(Author).update({"age": 3}),
    "query delete": lambda session: session.query(Document).delete(),
    "block": lambda session: _block(session),
    "savepoint": lambda session: _savepoint(session),
}


def _several(session: OptInSession) -> None:
    add(session, "n", "m")
    session.commit()


def _block(session: OptInSession) -> None:
    with session.begin():
        session.get_one(Author, 1).age = 3
        session.add(Author(name="new"))


def _savepoint(session: OptInSession) -> None:
    with session.begin(), session.begin_nested():
        session.get_one(Author, 1).age = 3


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("begin_on_write", [False, True])
def test_no_statement_is_without_the_settings(
    sessions: Sessions, onlooker: Onlooker, name: str, begin_on_write: bool
) -> None:
    """The server refuses to touch the table for anybody else: the trigger and the policy ask."""
    onlooker.run(
        """
        CREATE TABLE seen (tenant text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (current_setting('app.tenant_id', true)); RETURN NULL;
        END $$;
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON author
            FOR EACH ROW EXECUTE FUNCTION note();
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON document
            FOR EACH ROW EXECUTE FUNCTION note()
        """
    )
    with sessions(begin_on_write=begin_on_write) as session:
        session.set_local({"app.tenant_id": 7})
        WORKS[name](session)
        session.commit()
    seen = set(onlooker.column("SELECT tenant FROM seen"))
    assert seen == {"7"} or (not seen and name in ("select", "get", "lazy load", "text"))


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("begin_on_write", [False, True])
def test_settings_cost_no_round_trip(
    sessions: Sessions,
    wire: WireProxy,
    onlooker: Onlooker,
    driver: str,
    name: str,
    begin_on_write: bool,
) -> None:
    counts = []
    both: list[dict[str, Any]] = [{}, {"app.tenant_id": 7, "statement_timeout": "9s"}]
    for settings in both:
        onlooker.run("DELETE FROM document WHERE id > 3; DELETE FROM author WHERE id > 3")
        with sessions(begin_on_write=begin_on_write) as session:
            session.set_local(settings)
            with wire.record() as recording:
                WORKS[name](session)
                session.commit()
            assert transaction_status(recording) == "I"
        counts.append(recording.round_trips)
    # psycopg2's executemany() is one message for each row, and the settings are one before them.
    extra = 1 if driver == "psycopg2" and name == "executemany" else 0
    assert counts[1] <= counts[0] + extra


def test_a_stream_has_the_settings_while_the_server_executes_it(
    session: OptInSession, wire: WireProxy, driver: str
) -> None:
    stream = text("SELECT current_setting('app.tenant_id', true), n FROM generate_series(1, 5) n")
    session.set_local({"app.tenant_id": 7})
    with wire.record() as recording:
        result = session.execute(stream, execution_options={"yield_per": 2})
        status = transaction_status(recording)
        rows = [tuple(row) for row in result]
    assert status == "I"  # no transaction is open while the rows are read
    assert rows == [("7", n) for n in range(1, 6)]
    verbs = [verb for verb in sent(recording) if verb != "FETCH"]
    assert verbs == ["BEGIN", "DECLARE", "COMMIT", "CLOSE"]
    assert 'BEGIN; SET LOCAL "app"."tenant_id" TO' in recording.statements[0]
    session.set_local({"app.tenant_id": 8})
    with session.begin():
        rows = [tuple(row) for row in session.execute(stream, execution_options={"yield_per": 2})]
    assert rows == [("8", n) for n in range(1, 6)]


def test_a_stream_that_fails_leaves_no_transaction_open(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7})
    for sql in ("SELECT 1 / (n - 3) FROM generate_series(1, 5) n", "SELECT nothing FROM nowhere"):
        with pytest.raises(exc.DBAPIError):
            session.execute(text(sql), execution_options={"yield_per": 2}).all()
        assert tenant(session) == "7"
        assert not session.in_transaction()
        raw: Any = session.connection().connection.dbapi_connection
        assert raw.info.transaction_status == 0


def test_an_error_of_the_statement_is_its_own(session: OptInSession, wire: WireProxy) -> None:
    session.set_local({"app.tenant_id": 7})
    with pytest.raises(exc.DataError, match="division by zero") as caught:
        session.execute(text("SELECT 1 / 0"))
    assert "set_local" not in str(caught.value)
    assert caught.value.statement == "SELECT 1 / 0"
    with pytest.raises(exc.IntegrityError):
        session.execute(insert(Author).values(name="Ada"))
    with wire.record() as recording:
        assert tenant(session) == "7"
    assert recording.round_trips == 1


@pytest.mark.parametrize(
    "settings", [{"statement_timeout": "soon"}, {"no_such_setting": 1}, {"max_connections": 5}]
)
def test_an_error_of_a_setting_names_the_settings(
    session: OptInSession, onlooker: Onlooker, settings: dict[str, Any]
) -> None:
    session.set_local(settings)
    (name,) = settings
    for statement in (TENANT, insert(Author).values(name="new")):
        with pytest.raises(exc.DBAPIError, match=rf"set_local\(\).*{name}.*executed nothing of"):
            session.execute(statement)
    assert onlooker.scalar("SELECT count(*) FROM author") == 3
    session.set_local({name: None})
    assert has_none(session)


def test_vacuum_is_refused_with_advice(session: OptInSession, engine: OptInEngine) -> None:
    session.set_local({"app.tenant_id": 7})
    for sql in ("VACUUM author", "CREATE INDEX CONCURRENTLY i ON author (age)"):
        with pytest.raises(exc.DBAPIError, match=r"set_local.*engine.connect"):
            session.execute(text(sql))
    with engine.connect() as connection:
        connection.execute(text("VACUUM author"))
    assert tenant(session) == "7"


def test_a_statement_timeout_is_a_deadline_for_reads(session: OptInSession) -> None:
    session.set_local({"statement_timeout": "100ms"})
    with pytest.raises(exc.OperationalError, match="statement timeout"):
        session.execute(text("SELECT pg_sleep(10)"))
    session.set_local({"statement_timeout": None})
    session.execute(text("SELECT pg_sleep(0.2)"))


def test_a_session_has_no_settings_of_the_one_before_it_on_its_connection(
    sessions: Sessions,
) -> None:
    for number in range(20):
        with sessions() as session:
            if number % 2:
                session.set_local({"app.tenant_id": number})
                assert tenant(session) == str(number)
            else:
                assert has_none(session)


def test_without_settings_the_dialect_is_left_alone(
    engine: OptInEngine, sessions: Sessions
) -> None:
    before = {name: vars(engine.dialect).get(name) for name in ("do_execute", "do_executemany")}
    with sessions() as session:
        session.get(Author, 1)
        session.add(Author(name="x"))
        session.commit()
    assert {name: vars(engine.dialect).get(name) for name in before} == before


def test_a_prepared_statement_is_prepared_anew_after_a_migration(
    session: OptInSession, onlooker: Onlooker, engine: OptInEngine
) -> None:
    session.set_local({"app.tenant_id": 7})
    every = text("SELECT * FROM author WHERE id = :id")
    for _ in range(8):
        session.execute(every, {"id": 1})
    onlooker.run("ALTER TABLE author ADD COLUMN more int")
    row = session.execute(every, {"id": 1}).one()
    assert len(row) == 4
    assert tenant(session) == "7"
