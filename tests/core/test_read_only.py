"""Writes outside a transaction, refused by the server: ``read_only_outside=True``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import ArgumentError, DBAPIError, InternalError
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import (
    OptInEngine,
    OptInSession,
    SessionStateWarning,
    create_engine,
    engine_from_config,
)
from tests.flask.support import Database
from tests.library import Author, Base, Onlooker, assert_at_rest, sent
from tests.wire import WireProxy

WRITE = sa.text("INSERT INTO author (name) VALUES ('stray')")


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    engine = create_engine(wire_url, read_only_outside=True)
    Base.metadata.create_all(engine)
    yield engine
    assert_at_rest(engine)
    engine.dispose()


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    with OptInSession(engine) as session:
        yield session


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.execute(WRITE),
        lambda session: session.execute(sa.insert(Author).values(name="stray")),
        lambda session: session.connection().execute(WRITE),
        lambda session: session.connection().exec_driver_sql(str(WRITE)),
    ],
    ids=["text", "insert", "connection", "driver"],
)
def test_a_stray_write_says_what_to_do(
    session: OptInSession, onlooker: Onlooker, write: Any
) -> None:
    with pytest.raises(InternalError, match=r"put the statement into `with db\.session\.begin"):
        write(session)
    assert onlooker.names() == []
    with session.begin():
        write(session)
    assert onlooker.names() == ["stray"]


def test_nothing_more_is_sent_with_read_only_outside(
    session: OptInSession, wire: WireProxy
) -> None:
    session.scalar(sa.select(1))
    with wire.record() as recording:
        session.scalar(sa.select(1))
        with session.begin():
            session.add(Author(name="one"))
        session.add(Author(name="two"))
        session.commit()
    assert sent(recording) == ["SELECT", *(["BEGIN", "INSERT", "COMMIT"] * 2)]
    assert recording.statements.count("BEGIN READ WRITE") == 2
    assert recording.round_trips == 7


def test_a_call_that_sends_several_statements_is_a_transaction_that_writes(
    session: OptInSession, onlooker: Onlooker
) -> None:
    session.execute(sa.insert(Author), [{"name": "one"}, {"name": "two"}])
    session.bulk_save_objects([Author(name="three")])
    assert onlooker.names() == ["one", "three", "two"]


def test_each_new_connection_is_told_once(engine: OptInEngine, wire: WireProxy) -> None:
    engine.dispose()
    with wire.record() as recording, OptInSession(engine) as session:
        for _ in range(3):
            session.scalar(sa.select(1))
    told = [one for one in recording.statements if "read_only" in one]
    assert told == ["SET default_transaction_read_only TO on"]


def test_the_options_of_begin_are_kept(session: OptInSession, wire: WireProxy) -> None:
    with wire.record() as recording:
        with session.begin(isolation_level="SERIALIZABLE"):
            session.scalar(sa.select(1))
        with session.begin(read_only=True):
            session.scalar(sa.select(1))
    begins = [one for one in recording.statements if one.startswith("BEGIN")]
    assert begins == ["BEGIN ISOLATION LEVEL SERIALIZABLE READ WRITE", "BEGIN READ ONLY"]


def test_a_write_in_a_read_only_transaction_is_not_advised_to_begin_one(
    session: OptInSession,
) -> None:
    with pytest.raises(DBAPIError) as raised, session.begin(read_only=True):
        session.execute(WRITE)
    assert "put the statement into" not in str(raised.value)


def test_begin_on_the_engine_is_read_write(engine: OptInEngine, onlooker: Onlooker) -> None:
    with engine.begin() as connection:
        connection.execute(WRITE)
    copy = engine.execution_options(isolation_level="REPEATABLE READ")
    with copy.begin() as connection:
        connection.execute(sa.insert(Author).values(name="two"))
    assert onlooker.names() == ["stray", "two"]
    with engine.connect() as connection, pytest.raises(InternalError, match="put the statement"):
        connection.execute(WRITE)


def test_reads_outside_stay_read_only_after_errors_and_rollbacks(session: OptInSession) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), session.begin():  # noqa: PT012
            session.execute(WRITE)
            raise ZeroDivisionError
        with pytest.raises(InternalError):
            session.execute(WRITE)


@pytest.mark.parametrize("sql", ["RESET ALL", "DISCARD ALL"])
def test_what_resets_the_setting_holds_for_its_connection_alone(
    engine: OptInEngine, onlooker: Onlooker, sql: str
) -> None:
    with OptInSession(engine) as session:
        with pytest.warns(SessionStateWarning):
            session.execute(sa.text(sql))
        session.execute(WRITE)
    assert onlooker.names() == ["stray"]
    with OptInSession(engine) as session, pytest.raises(InternalError, match="put the statement"):
        session.execute(WRITE)


def test_a_role_that_only_reads_by_default_gets_the_same_advice(
    wire_url: str, onlooker: Onlooker
) -> None:
    engine = create_engine(wire_url, execution_options={"postgresql_readonly": False})
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        with pytest.warns(SessionStateWarning):
            session.execute(sa.text("SET default_transaction_read_only TO on"))
        with pytest.raises(InternalError, match="put the statement"):
            session.execute(WRITE)
        with session.begin():
            session.execute(WRITE)
    assert onlooker.names() == ["stray"]
    engine.dispose()


def test_the_advice_to_a_role_that_only_reads_by_default_is_what_works(
    wire_url: str, onlooker: Onlooker
) -> None:
    """There a plain ``begin()`` fails as well as no ``begin()``."""
    arguments = {"options": "-c default_transaction_read_only=on"}
    engine = create_engine(wire_url, connect_args=arguments)
    with engine.begin() as connection:
        connection.execute(sa.text("SET TRANSACTION READ WRITE"))
        Base.metadata.create_all(connection)
    with OptInSession(engine) as session:
        with pytest.raises(InternalError) as raised:
            session.execute(WRITE)
        assert "`with session.begin(read_only=False):`" in str(raised.value)
        assert "default_transaction_read_only is on here" in str(raised.value)
        assert "this engine only reads" not in str(raised.value)
        with pytest.raises(InternalError), session.begin():
            session.execute(WRITE)
        with session.begin(read_only=False):
            session.execute(WRITE)
    assert onlooker.names() == ["stray"]
    engine.dispose()


def test_a_missing_privilege_is_no_matter_of_transactions(
    wire_url: str, onlooker: Onlooker
) -> None:
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session, session.begin():
        session.execute(sa.text("SET LOCAL ROLE pg_read_all_data"))
        with pytest.raises(DBAPIError, match="permission denied") as raised:
            session.execute(WRITE)
        session.rollback()
    assert "begin(" not in str(raised.value)
    engine.dispose()


@pytest.mark.parametrize("value", ["true", "True", True])
def test_engine_from_config_takes_read_only_outside(url: str, value: object) -> None:
    engine = engine_from_config({"sqlalchemy.url": url, "sqlalchemy.read_only_outside": value})
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW transaction_read_only")) == "on"
    engine.dispose()


def test_read_only_outside_is_for_postgresql_alone() -> None:
    with pytest.raises(ArgumentError, match="read_only_outside is for PostgreSQL"):
        create_engine("sqlite://", read_only_outside=True)


def test_flask_sqlalchemy_takes_read_only_outside(url: str) -> None:
    db = Database()

    class Tag(db.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"read_only_outside": True}
    db.init_app(app)
    with app.app_context():
        db.session.execute(sa.select(1))
        with pytest.raises(InternalError, match="put the statement"):
            db.session.execute(sa.text("CREATE TABLE stray (id int)"))
        with db.session.begin():
            db.session.execute(sa.text("CREATE TABLE meant (id int)"))
        db.create_all()
        made, created = Tag.filter_by_or_create.with_created(name="new")
        assert (made.name, created) == ("new", True)
        assert Tag.filter_by_or_create.with_created(name="new") == (made, False)
        db.session.remove()
        db.engine.dispose()
