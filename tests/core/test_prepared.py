"""Statements that psycopg 3 has prepared, and that the server does not execute any more.

psycopg2 prepares none. It is asked the same, and gives the same answers.
"""

# ruff: noqa: PT012  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, NotSupportedError
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy._core.psycopg_private import prepared_so_far
from tests.library import ONE, Author, Onlooker, authors, backend_pid, opened, sent
from tests.wire import WireProxy

READ = sa.text("SELECT * FROM author WHERE id = :id")

#: psycopg prepares a statement that was executed more than five times.
OFTEN = range(12)


def migrate(onlooker: Onlooker) -> None:
    onlooker.run("ALTER TABLE author ALTER COLUMN age TYPE bigint")


def raw(connection: sa.Connection) -> Any:
    """The driver's connection."""
    return connection.connection.dbapi_connection


WAYS: dict[str, Callable[[Any], Any]] = {
    "text": lambda connection: connection.execute(READ, {"id": 1}).one()[1],
    "scalar": lambda connection: connection.scalar(
        sa.select(authors.c.age, authors.c.name).where(authors.c.id == 1)
    ),
    "a write": lambda connection: connection.execute(
        sa.update(authors).where(authors.c.id == 1).values(age=30).returning(authors)
    ).one()[1],
    "without parameters": lambda connection: connection.exec_driver_sql(
        "SELECT * FROM author ORDER BY id", execution_options={"no_parameters": True}
    ).first()[1],
}


class TestMigration:
    """The migration changes what the prepared statement returns."""

    @pytest.mark.parametrize("way", WAYS)
    def test_not_even_the_first_statement_outside_after_a_migration_fails(
        self, engine: OptInEngine, onlooker: Onlooker, way: str
    ) -> None:
        with engine.connect() as connection:
            before = [WAYS[way](connection) for _ in OFTEN]
            pid = backend_pid(connection)
            migrate(onlooker)
            assert [WAYS[way](connection) for _ in OFTEN] == before
            assert backend_pid(connection) == pid

    def test_an_orm_read_outside_works_after_a_migration(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        read = sa.select(Author).order_by(Author.id)
        for _ in OFTEN:
            session.scalars(read).all()
        migrate(onlooker)
        for _ in OFTEN:
            assert len(session.scalars(read).all()) == 3

    def test_a_stream_goes_on_after_a_migration(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            for _ in OFTEN:
                connection.execute(READ, {"id": 1}).all()
            many = sa.text("SELECT generate_series(1, 30)")
            stream = connection.execution_options(yield_per=2).execute(many)
            assert stream.fetchone() == (1,)
            migrate(onlooker)
            assert connection.execute(READ, {"id": 1}).one()[1] == "Ada"
            assert len(stream.all()) == 29

    def test_listeners_and_the_wire_see_one_execution_after_a_migration(
        self, engine: OptInEngine, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        seen: list[str] = []
        failed: list[object] = []
        with engine.connect() as connection:
            for _ in OFTEN:
                connection.execute(READ, {"id": 1}).all()
            migrate(onlooker)
            event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[2]))
            event.listen(engine, "handle_error", failed.append)
            with wire.record() as recording:
                connection.execute(READ, {"id": 1}).all()
            with wire.record() as later:
                connection.execute(READ, {"id": 1}).all()
        assert len(seen) == 2
        assert failed == []
        assert set(sent(recording)) == {"SELECT"}
        assert sent(later) == ["SELECT"]
        assert later.round_trips == 1

    def test_a_read_inside_after_a_migration_aborts_its_transaction_and_works_then(
        self, session: OptInSession, onlooker: Onlooker, driver: str
    ) -> None:
        for _ in OFTEN:
            session.execute(READ, {"id": 1}).all()
        migrate(onlooker)
        if driver == "psycopg":
            with pytest.raises(NotSupportedError), session.begin():
                session.add(Author(name="lost"))
                session.flush()
                session.execute(READ, {"id": 1}).all()
        assert onlooker.names() == []
        for _ in OFTEN:
            with session.begin():
                assert session.execute(READ, {"id": 1}).one()[1] == "Ada"
        for _ in OFTEN:
            assert session.execute(READ, {"id": 1}).one()[1] == "Ada"

    def test_with_begin_on_write_a_read_outside_works_after_a_migration(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with sessionmaker(engine, class_=OptInSession, begin_on_write=True)() as session:
            for _ in OFTEN:
                session.execute(READ, {"id": 1}).all()
            migrate(onlooker)
            assert session.execute(READ, {"id": 1}).one()[1] == "Ada"
            assert not session.in_transaction()

    @pytest.mark.parametrize("threshold", [0, 1, None])
    def test_the_threshold_of_psycopg_makes_no_difference(
        self, wire_url: str, driver: str, onlooker: Onlooker, threshold: int | None
    ) -> None:
        options = {"connect_args": {"prepare_threshold": threshold}} if driver == "psycopg" else {}
        with opened(wire_url, **options) as engine, OptInSession(engine) as session:
            for _ in OFTEN:
                session.execute(READ, {"id": 1}).all()
            migrate(onlooker)
            for _ in OFTEN:
                assert session.execute(READ, {"id": 1}).one()[1] == "Ada"

    def test_a_statement_prepared_by_hand_is_left_to_the_user(
        self, engine: OptInEngine, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with engine.connect() as connection:
            with raw(connection).cursor() as cursor:
                cursor.execute("PREPARE mine AS SELECT * FROM author")
            for _ in OFTEN:
                connection.exec_driver_sql("EXECUTE mine").all()
            migrate(onlooker)
            with wire.record() as recording, pytest.raises(NotSupportedError):
                connection.exec_driver_sql("EXECUTE mine")
            assert "DEALLOCATE" not in recording.verbs
            with pytest.raises(DBAPIError):
                connection.exec_driver_sql("EXECUTE other")
            connection.connection.invalidate()


class TestDropped:
    """The server does not know the prepared statement any more."""

    @pytest.mark.parametrize("by", ["DISCARD ALL", "DEALLOCATE ALL"])
    def test_statements_dropped_by_hand_are_prepared_again(
        self, engine: OptInEngine, by: str
    ) -> None:
        with engine.connect() as connection:
            for _ in range(3):
                for _ in OFTEN:
                    assert connection.execute(READ, {"id": 1}).one()[1] == "Ada"
                with raw(connection).cursor() as cursor:
                    cursor.execute(by)
                for _ in OFTEN:
                    assert connection.execute(READ, {"id": 1}).one()[1] == "Ada"

    def test_statements_dropped_past_psycopg_are_prepared_again(self, engine: OptInEngine) -> None:
        """As a pooler does, or a function of the user's."""
        with engine.connect() as connection:
            for _ in OFTEN:
                connection.execute(READ, {"id": 1}).all()
            connection.exec_driver_sql("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
            for _ in OFTEN:
                assert connection.execute(READ, {"id": 1}).one()[1] == "Ada"

    def test_a_name_that_another_client_of_a_pooler_has_taken_does_no_harm(
        self, engine: OptInEngine
    ) -> None:
        with engine.connect() as connection:
            with raw(connection).cursor() as cursor:
                for number in range(3):
                    cursor.execute(f"PREPARE _pg3_{number} AS SELECT 1")
            for _ in OFTEN:
                assert connection.execute(READ, {"id": 1}).one()[1] == "Ada"


def test_private_names_of_psycopg_tell_what_is_prepared(engine: OptInEngine, driver: str) -> None:
    """psycopg 3: ``Connection._prepared``, with ``_prepared_idx`` and ``_names``."""
    with engine.connect() as connection:
        dbapi = connection.connection.dbapi_connection
        assert prepared_so_far(dbapi) == (0, 0)
        for _ in range(10):
            connection.execute(ONE)
        assert prepared_so_far(dbapi) == ((1, 1) if driver == "psycopg" else (0, 0))
