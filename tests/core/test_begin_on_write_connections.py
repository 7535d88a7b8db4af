"""``create_engine(…, begin_on_write=True)``: a connection that its user holds. On the wire."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Integer, MetaData, Table, exc, func, insert, select, text, update

from fictive_sqlalchemy import OptInConnection, OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.testing import isolate
from tests.library import Onlooker, authors, fill, opened, sent
from tests.wire import WireProxy

READ = select(authors.c.name).where(authors.c.id == 1)
WRITE = insert(authors).values(name="new")

MANY = [{"name": "new"}, {"name": "newer"}]
RENAME = "UPDATE author SET name = 'new' WHERE id = 1"
EXTRA = Table("extra", MetaData(), Column("id", Integer))

Call = Callable[[OptInConnection], Any]


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    with opened(wire_url, begin_on_write=True) as engine:
        yield engine


@pytest.fixture
def connection(engine: OptInEngine) -> Iterator[OptInConnection]:
    with closing(engine.connect()) as connection:
        yield connection


def _in_a_savepoint(connection: OptInConnection) -> None:
    connection.execute(select(func.nextval("author_id_seq")))
    with connection.begin_nested():
        connection.execute(WRITE)


def _in_a_failing_savepoint(connection: OptInConnection) -> None:
    connection.execute(WRITE)
    with suppress(exc.IntegrityError), connection.begin_nested():
        connection.execute(insert(authors).values(id=1, name="taken"))


#: The steps of the random programs.
STEPS: dict[str, Call] = {
    "read": lambda c: c.execute(select(authors.c.name).order_by(authors.c.id)).all(),
    "insert": lambda c: c.execute(WRITE).rowcount,
    "insert many": lambda c: c.execute(insert(authors), MANY).rowcount,
    "update": lambda c: c.execute(update(authors).values(age=authors.c.age + 1)).rowcount,
    "fail": lambda c: c.execute(insert(authors).values(id=1, name="taken")),
    "commit": lambda c: c.commit(),
    "rollback": lambda c: c.rollback(),
    "savepoint": _in_a_savepoint,
    "savepoint that fails": _in_a_failing_savepoint,
}


def _run(engine: Any, calls: list[str]) -> list[object]:
    """Run the calls on a connection; return what each came to, and what is stored at the end.

    One difference is known: `commit()` of an aborted transaction rolls back on stock, and is
    refused here.
    """
    seen: list[object] = []
    has_failed = False
    with engine.connect() as connection:
        for name in calls:
            if name == "commit" and has_failed:
                with suppress(exc.PendingRollbackError):
                    connection.commit()
                connection.rollback()
                has_failed = False
                continue
            try:
                seen.append(STEPS[name](connection))
                has_failed = has_failed and name != "rollback"
            except exc.SQLAlchemyError as error:
                seen.append(type(error))
                has_failed = True
    with engine.connect() as connection:
        seen.append(connection.execute(select(authors.c.name, authors.c.age)).all())
    return seen


#: What begins the transaction, and what is sent for it after BEGIN.
WRITES: dict[str, tuple[Call, str]] = {
    "insert": (lambda c: c.execute(WRITE), "INSERT"),
    "many rows": (lambda c: c.execute(insert(authors), MANY), "INSERT"),
    "text": (lambda c: c.execute(text(RENAME)), "UPDATE"),
    "driver": (lambda c: c.exec_driver_sql(RENAME), "UPDATE"),
    "scalar": (lambda c: c.scalar(WRITE.returning(authors.c.id)), "INSERT"),
    "a function": (lambda c: c.scalar(select(func.nextval("author_id_seq"))), "SELECT"),
    "lock": (lambda c: c.execute(READ.with_for_update()).all(), "SELECT"),
    "SET LOCAL": (lambda c: c.execute(text("SET LOCAL lock_timeout = '5s'")), "SET"),
    "savepoint": (_in_a_savepoint, "RELEASE"),
    "DDL": (EXTRA.create, "CREATE"),
    "a stream that locks": (
        lambda c: c.execute(READ.with_for_update().execution_options(yield_per=10)).all(),
        "CLOSE",
    ),
}


class TestWhatBegins:
    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("end", ["commit", "rollback", "close"])
    def test_a_write_begins_what_commit_rollback_and_close_end(
        self, engine: OptInEngine, wire: WireProxy, onlooker: Onlooker, write: str, end: str
    ) -> None:
        call, expected = WRITES[write]
        with wire.record() as recording:
            connection = engine.connect()
            connection.execute(READ).all()
            call(connection)
            assert onlooker.names() == []
            assert onlooker.scalar("SELECT to_regclass('extra')") is None
            getattr(connection, end)()
        last = "COMMIT" if end == "commit" else "ROLLBACK"
        seen = sent(recording)
        assert seen[:2] == ["SELECT", "BEGIN"]
        assert seen[-1] == last
        assert expected in seen[2:-1]
        assert not {"BEGIN", "COMMIT", "ROLLBACK"} & set(seen[2:-1])
        assert engine.pool.checkedout() == (end != "close")  # type: ignore[attr-defined]
        connection.close()

    def test_a_read_stands_alone_before_and_after(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            connection.execute(READ).all()
            connection.execute(READ.execution_options(yield_per=10)).all()
            connection.execute(WRITE)
            connection.commit()
            connection.execute(READ).all()
            connection.commit()
            connection.rollback()
        verbs = [verb for verb in sent(recording) if verb not in ("DECLARE", "FETCH", "CLOSE")]
        assert verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT", "SELECT"]
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    def test_a_read_begins_where_a_transaction_has_one_snapshot(
        self, wire_url: str, wire: WireProxy, level: str
    ) -> None:
        with (
            opened(wire_url, begin_on_write=True, isolation_level=level) as engine,
            wire.record() as recording,
            engine.connect() as connection,
        ):
            connection.execute(READ).all()
            connection.execute(WRITE)
            connection.commit()
        assert sent(recording) == ["BEGIN", "SELECT", "INSERT", "COMMIT"]

    def test_begin_works_after_reads(
        self, connection: OptInConnection, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            connection.execute(READ).all()
            with connection.begin():
                connection.execute(WRITE)
        assert sent(recording) == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
        assert onlooker.names() == ["new"]

    def test_begin_after_a_write_is_sqlalchemys_error(self, connection: OptInConnection) -> None:
        connection.execute(WRITE)
        with pytest.raises(exc.InvalidRequestError, match="already initialized"):
            connection.begin()

    def test_an_error_needs_rollback_as_on_stock(
        self, connection: OptInConnection, onlooker: Onlooker
    ) -> None:
        connection.execute(WRITE)
        with pytest.raises(exc.IntegrityError):
            connection.execute(insert(authors).values(id=1, name="taken"))
        with pytest.raises(exc.InternalError):
            connection.execute(WRITE)
        connection.rollback()
        connection.execute(WRITE)
        connection.commit()
        assert onlooker.names() == ["new"]

    def test_what_postgresql_refuses_in_a_transaction_works_at_the_level_autocommit(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        with engine.connect() as connection, wire.record() as recording:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("VACUUM author"))
            connection.execution_options(isolation_level="READ COMMITTED")
        assert sent(recording) == ["VACUUM"]


class TestWhoSays:
    def test_the_option_of_a_session_holds_for_the_connections_it_borrows(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        with OptInSession(engine) as session, wire.record() as recording:
            session.execute(WRITE)
            session.connection().execute(update(authors).values(age=9))
        assert sent(recording) == ["INSERT", "UPDATE"]

    def test_an_engine_without_the_option_stores_at_once(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with (
            opened(wire_url) as engine,
            OptInSession(engine, begin_on_write=True) as session,
            engine.connect() as connection,
            wire.record() as recording,
        ):
            session.execute(WRITE)
            session.commit()
            connection.execute(update(authors).values(age=9))
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT", "UPDATE"]

    def test_a_copy_of_the_engine_begins_on_write(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        copy = engine.execution_options(logging_token="copy")
        with wire.record() as recording, copy.connect() as connection:
            connection.execute(WRITE)
            connection.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]

    def test_a_connection_whose_session_is_gone_is_held_by_its_user(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        session = OptInSession(engine, begin_on_write=True)
        connection = session.connection()
        del session
        gc.collect()
        with closing(connection):
            connection.execute(WRITE)
            connection.rollback()
            assert onlooker.names() == []

    def test_under_isolation_a_write_begins_as_well(self, engine: OptInEngine) -> None:
        with isolate(engine):
            with engine.connect() as connection:
                connection.execute(WRITE)
            with engine.connect() as connection:
                assert not connection.scalars(select(authors.c.id).filter_by(name="new")).all()
                connection.execute(WRITE)
                connection.commit()
            with engine.connect() as connection:
                assert (
                    len(connection.scalars(select(authors.c.id).filter_by(name="new")).all()) == 1
                )


class TestLikeStock:
    """The same random calls come to the same as on a connection of SQLAlchemy's."""

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(calls=st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
    def test_the_same_calls_give_the_same_rows_and_errors_as_on_stock(
        self, url: str, onlooker: Onlooker, calls: list[str]
    ) -> None:
        outcomes = []
        for make in (sqlalchemy.create_engine, partial(create_engine, begin_on_write=True)):
            onlooker.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            fill(url)
            engine = make(url)
            try:
                outcomes.append(_run(engine, calls))
            finally:
                engine.dispose()
        assert outcomes[0] == outcomes[1]
