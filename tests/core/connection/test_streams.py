"""A connection streams its results outside a transaction and inside one."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError, ResourceClosedError

from fictive_sqlalchemy import OptInConnection, OptInEngine, OptInSession
from tests.core.connection.support import insert
from tests.library import ONE, Author, Onlooker, assert_rests, authors, backend_pid, sent
from tests.wire import WireProxy


class TestStreaming:
    ROWS = sa.text("SELECT n FROM generate_series(1, 1000) n")
    CURSORS = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")

    @pytest.mark.parametrize("option", [{"yield_per": 100}, {"stream_results": True}])
    @pytest.mark.parametrize("on", ["statement", "call", "connection", "engine"])
    def test_a_stream_outside_opens_no_transaction(
        self, engine: OptInEngine, wire: WireProxy, on: str, option: dict[str, Any]
    ) -> None:
        options = {**option, "max_row_buffer": 100}
        if on == "engine":
            engine.update_execution_options(**options)
        with engine.connect() as connection, wire.record() as recording:
            if on == "connection":
                connection.execution_options(**options)
            rows = connection.execute(
                self.ROWS.execution_options(**options) if on == "statement" else self.ROWS,
                execution_options=options if on == "call" else None,
            )
            seen = 0
            for _ in rows:
                seen += 1
                if seen % 300 == 0:
                    assert wire.transactions_open == 0
            assert seen == 1000
        assert "WITH HOLD" in recording.statements[0]
        assert not {"BEGIN", "COMMIT", "ROLLBACK"} & set(sent(recording))
        assert recording.idle_in_transaction == 0

    def test_a_stream_leaves_nothing_when_its_connection_is_closed_half_way(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        with engine.connect() as connection:
            pid = backend_pid(connection)
            stream = connection.execute(self.ROWS, execution_options={"yield_per": 10})
            stream.fetchone()
            other = connection.execute(self.ROWS, execution_options={"yield_per": 10})
        with pytest.raises(ResourceClosedError):
            stream.fetchall()
        with pytest.raises(ResourceClosedError):
            other.fetchall()
        with engine.connect() as connection:
            assert backend_pid(connection) == pid
            assert connection.scalar(self.CURSORS) == 0

    def test_a_stream_goes_on_through_transactions_errors_and_give_back(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        stream = connection.execute(self.ROWS, execution_options={"yield_per": 100})
        seen = [n for (n,) in stream.fetchmany(50)]
        with connection.begin():
            connection.execute(insert("one"))
            seen += [n for (n,) in stream.fetchmany(100)]
        with pytest.raises(IntegrityError), connection.begin():
            connection.execute(insert("Ada"))
        connection.give_back()
        with pytest.raises(ProgrammingError):
            connection.execute(sa.text("SELECT nothing FROM nowhere"))
        seen += [n for (n,) in stream]
        assert seen == list(range(1, 1001))
        assert connection.scalar(self.CURSORS) == 0
        assert onlooker.names() == ["one"]

    def test_other_statements_work_on_a_streaming_connection(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        connection.execution_options(stream_results=True)
        client_side = {"stream_results": False}
        connection.execute(insert("one"), execution_options=client_side)
        connection.exec_driver_sql(
            "INSERT INTO author (name) VALUES ('two')", execution_options=client_side
        )
        assert connection.scalar(sa.select(sa.func.count()).select_from(authors)) == 5
        assert onlooker.names() == ["one", "two"]

    def test_an_error_of_a_streamed_statement_is_that_error(
        self, connection: OptInConnection, wire: WireProxy
    ) -> None:
        stream = {"stream_results": True}
        with pytest.raises(DBAPIError, match="nowhere"):
            connection.execute(sa.text("SELECT * FROM nowhere"), execution_options=stream)
        assert connection.scalar(ONE) == 1
        assert_rests(connection.connection.dbapi_connection)

    def test_a_stream_of_an_empty_result_leaves_no_cursor(
        self, connection: OptInConnection
    ) -> None:
        stream = {"stream_results": True}
        assert (
            connection.execute(sa.text("SELECT 1 WHERE false"), execution_options=stream).all()
            == []
        )
        assert connection.scalar(self.CURSORS) == 0

    def test_a_stream_leaves_the_drivers_own_cursors_as_they_are(
        self, connection: OptInConnection
    ) -> None:
        dbapi: Any = connection.connection.dbapi_connection
        before = (
            getattr(dbapi, "cursor_factory", None),
            getattr(dbapi, "server_cursor_factory", None),
        )
        connection.execute(self.ROWS, execution_options={"yield_per": 10}).all()
        with pytest.raises(DBAPIError):
            connection.execute(sa.text("SELECT 1/0"), execution_options={"yield_per": 10}).all()
        after = (
            getattr(dbapi, "cursor_factory", None),
            getattr(dbapi, "server_cursor_factory", None),
        )
        assert after == before


@pytest.mark.parametrize("of", ["connection", "session"])
def test_a_stream_whose_declare_fails_sends_nothing_more_and_logs_nothing(
    engine: OptInEngine, wire: WireProxy, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    statement = sa.text("SELECT 1 / (id - 2) FROM author").execution_options(yield_per=1)
    with OptInSession(engine) if of == "session" else engine.connect() as user:
        assert user.scalar(ONE) == 1
        with wire.record() as recording:
            with pytest.raises(DBAPIError, match="division"):
                user.execute(statement)
            assert user.scalar(ONE) == 1
            user.close()
        assert sent(recording) == ["DECLARE", "SELECT"]
    assert caplog.records == []


def test_a_stream_whose_declare_fails_leaves_another_stream_alone(
    engine: OptInEngine, wire: WireProxy
) -> None:
    fails = sa.text("SELECT 1 / (id - 2) FROM author").execution_options(yield_per=1)
    with engine.connect() as connection:
        stream = connection.execute(sa.select(authors.c.id).execution_options(yield_per=1))
        assert stream.fetchone() is not None
        with pytest.raises(DBAPIError, match="division"):
            connection.execute(fails)
        assert len(stream.all()) == 2


@pytest.mark.parametrize("options", [{}, {"yield_per": 1}], ids=["all rows", "a stream"])
def test_a_connection_that_is_lost_before_a_write_begins_the_transaction_is_replaced(
    engine: OptInEngine, onlooker: Onlooker, options: dict[str, Any]
) -> None:
    """After the connection was looked at, while the statement is compiled."""
    locks = sa.select(Author.name).order_by(Author.id).with_for_update()
    asks = sa.select(sa.func.pg_backend_pid())
    with OptInSession(engine, begin_on_write=True) as session:
        pid = session.scalars(asks).one()
        event.listen(engine, "before_execute", lambda *_: onlooker.kill(pid), once=True)
        names = session.scalars(locks.execution_options(**options))
        assert next(names) == "Ada"
        assert session.in_transaction()
        assert session.scalar(asks) != pid
        assert len(names.all()) == 2
