"""A connection takes execution options, and can be invalidated, detached and given back."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
)

from fictive_sqlalchemy import OptInConnection, OptInEngine
from tests.core.connection.support import insert
from tests.library import (
    LEVEL,
    ONE,
    READ_ONLY,
    NoteBase,
    Onlooker,
    authors,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy


class TestOptions:
    def test_a_level_is_that_of_the_connections_transactions(
        self, engine: OptInEngine, connection: OptInConnection, wire: WireProxy
    ) -> None:
        assert connection.execution_options(isolation_level="SERIALIZABLE") is connection
        with wire.record() as recording:
            assert connection.scalar(LEVEL) == "read committed"
            for _ in range(3):
                with connection.begin():
                    assert connection.scalar(LEVEL) == "serializable"
        assert sent(recording) == ["SHOW", *["BEGIN", "SHOW", "COMMIT"] * 3]
        assert recording.round_trips == 10
        with engine.begin() as other:
            assert other.scalar(LEVEL) == "read committed"

    def test_a_level_does_not_outlive_the_connection(self, engine: OptInEngine) -> None:
        with engine.connect() as connection:
            connection.execution_options(
                isolation_level="SERIALIZABLE", postgresql_readonly=True, postgresql_deferrable=True
            )
            pid = backend_pid(connection)
            with connection.begin():
                assert connection.scalar(READ_ONLY) == "on"
                assert connection.scalar(sa.text("SHOW transaction_deferrable")) == "on"
        with engine.begin() as connection:
            assert backend_pid(connection) == pid
            assert connection.scalar(LEVEL) == "read committed"
            assert connection.scalar(READ_ONLY) == "off"

    def test_options_given_one_after_the_other_add_up(self, connection: OptInConnection) -> None:
        connection.execution_options(isolation_level="SERIALIZABLE")
        connection.execution_options(postgresql_readonly=True)
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"
            assert connection.scalar(READ_ONLY) == "on"
        connection.execution_options(isolation_level="REPEATABLE_READ", postgresql_readonly=False)
        with connection.begin():
            assert connection.scalar(LEVEL) == "repeatable read"
            assert connection.scalar(READ_ONLY) == "off"

    def test_autocommit_by_name_begins_nothing_until_another_level(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        """As Alembic's ``autocommit_block()`` does it."""
        before = connection.get_isolation_level()
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with wire.record() as recording, connection.begin():
            connection.execute(sa.text("VACUUM author"))
            connection.execute(insert("done"))
            assert onlooker.names() == ["done"]
        assert sent(recording) == ["VACUUM", "INSERT"]
        connection.execution_options(isolation_level=before)
        with wire.record() as recording, connection.begin():
            connection.execute(insert("newer"))
            assert onlooker.names() == ["done"]
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(IntegrityError), connection.begin():
            connection.execute(insert("newest"))
            connection.execute(insert("Ada"))
        assert onlooker.names() == ["done", "newer", "newest"]

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": "SNAPSHOT"},
            {"postgresql_readonly": "yes"},
            {"postgresql_deferrable": True},
        ],
    )
    def test_what_the_database_does_not_know_is_refused(
        self, connection: OptInConnection, wire: WireProxy, options: dict[str, Any]
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ArgumentError):
                connection.execution_options(**options)
        assert recording.messages == []
        with connection.begin():
            assert connection.scalar(LEVEL) == "read committed"

    def test_what_a_transaction_began_with_can_not_change(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        with connection.begin():
            connection.execute(insert("one"))
            for options in ({"isolation_level": "SERIALIZABLE"}, {"postgresql_readonly": True}):
                with pytest.raises(InvalidRequestError):
                    connection.execution_options(**options)
            connection.execution_options(logging_token="harmless")
        assert onlooker.names() == ["one"]

    def test_a_read_only_transaction_refuses_to_write(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execution_options(postgresql_readonly=True)
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="read-only"), connection.begin():
                connection.execute(insert("new"))
        assert recording.messages == []
        with pytest.raises(DBAPIError, match="read-only"), connection.begin():
            connection.execute(sa.text("DELETE FROM author"))
        connection.execute(insert("outside"))
        assert onlooker.names() == ["outside"]

    def test_other_execution_options_work_as_ever(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        connection.execute(sa.text("CREATE SCHEMA tenant"))
        connection.execution_options(schema_translate_map={None: "tenant"})
        NoteBase.metadata.create_all(connection)
        notes = NoteBase.metadata.tables["note"]
        with connection.begin():
            connection.execute(sa.insert(notes).values(text="one"))
        assert onlooker.scalar("SELECT text FROM tenant.note") == "one"

    def test_the_level_of_a_connection_can_be_asked_for(self, connection: OptInConnection) -> None:
        assert connection.get_isolation_level() == "READ COMMITTED"
        assert connection.default_isolation_level == "READ COMMITTED"
        connection.execution_options(isolation_level="SERIALIZABLE")
        with connection.begin():
            assert connection.get_isolation_level() == "SERIALIZABLE"


class TestTheConnectionItself:
    def test_a_connection_invalidated_in_a_transaction_works_after_its_rollback(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        transaction = connection.begin()
        connection.execute(insert("gone"))
        connection.invalidate()
        with pytest.raises(PendingRollbackError):
            connection.execute(ONE)
        transaction.rollback()
        assert connection.scalar(ONE) == 1
        with connection.begin():
            connection.execute(insert("after"))
        assert onlooker.names() == ["after"]

    def test_a_detached_connection_works_as_ever(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with engine.connect() as connection:
            connection.execute(ONE)
            connection.detach()
            with wire.record() as recording:
                connection.execute(ONE)
                with connection.begin():
                    connection.execute(insert("one"))
                for row in connection.execute(
                    sa.select(authors.c.id), execution_options={"yield_per": 1}
                ):
                    assert row
            assert sent(recording)[:4] == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["one"]

    def test_a_connection_works_after_it_was_killed_outside_and_inside(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        onlooker.kill(backend_pid(connection))
        assert connection.scalar(ONE) == 1
        with pytest.raises(OperationalError), connection.begin():
            connection.execute(insert("gone"))
            onlooker.kill(backend_pid(connection))
            connection.execute(ONE)
        assert connection.scalar(ONE) == 1
        with pytest.raises(OperationalError), connection.begin():
            connection.execute(insert("gone"))
            onlooker.kill(backend_pid(connection))
        with connection.begin():
            connection.execute(insert("after"))
        assert onlooker.names() == ["after"]

    def test_a_connection_given_back_by_hand_takes_another_at_its_next_use(
        self, engine: OptInEngine, connection: OptInConnection, wire: WireProxy
    ) -> None:
        unread = connection.execute(sa.select(authors.c.name).order_by(authors.c.id))
        with wire.record() as recording:
            connection.give_back()
        assert recording.messages == []
        assert checked_out(engine) == 0
        assert not connection.closed
        assert unread.scalars().all() == ["Ada", "Bob", "Cid"]
        connection.execution_options(isolation_level="SERIALIZABLE")
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"
            connection.give_back()
            assert checked_out(engine) == 1
            assert connection.scalar(LEVEL) == "serializable"
        connection.give_back()
        with connection.begin():
            assert connection.scalar(LEVEL) == "serializable"

    def test_a_connection_is_not_given_back_by_itself(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with engine.connect() as connection:
                connection.execute(sa.text("CREATE TEMPORARY TABLE mine (id int)"))
                assert checked_out(engine) == 1
                assert connection.scalar(sa.text("SELECT count(*) FROM mine")) == 0
