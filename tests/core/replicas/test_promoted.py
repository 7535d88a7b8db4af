"""A replica that was promoted, and an engine that has reached a standby in place of the primary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc, select

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession, create_engine
from tests.core.replicas.support import IN_RECOVERY, opened_with, recorded
from tests.library import Author, backend_pid, fill
from tests.postgres import PostgresServer, ReplicaServer
from tests.wire import WireProxy


def _in_a_block(session: OptInSession) -> None:
    with session.begin():
        assert session.scalar(select(sa.func.count()).select_from(Author)) is not None
        session.execute(sa.update(Author).values(age=8))


def _insert(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="Barbara"))


def _lock(session: OptInSession) -> None:
    with session.begin():
        session.scalars(select(Author).with_for_update()).all()


def _begin_to_write(session: OptInSession) -> None:
    with session.begin(read_only=False):
        session.scalar(sa.select(1))


WAYS: dict[str, Callable[[OptInSession], object]] = {
    "one statement": lambda session: session.execute(sa.update(Author).values(age=7)),
    "a block": _in_a_block,
    "a block of one INSERT": _insert,
    "a lock": _lock,
    "a read-write transaction": _begin_to_write,
}


class TestAStandbyInPlaceOfThePrimary:
    """The address of the primary may lead to a standby for a moment after a failover."""

    @pytest.fixture
    def leads_to(self, replica: ReplicaServer, driver: str, database: str, url: str) -> list[str]:
        """The URL that new connections use: first that of the standby."""
        fill(url)
        replica.catch_up()
        return [replica.url(driver, database)]

    @pytest.fixture
    def engine(self, leads_to: list[str], url: str) -> Iterator[OptInEngine]:
        plain = sa.create_engine(url)
        dbapi: Any = plain.dialect.loaded_dbapi

        def connect() -> Any:
            address = sa.make_url(leads_to[0])
            return dbapi.connect(
                host=address.host,
                port=address.port,
                user=address.username,
                password=address.password,
                dbname=address.database,
            )

        engine = create_engine(url, creator=connect, pool_size=3)
        yield engine
        engine.dispose()
        plain.dispose()

    @pytest.mark.parametrize("way", WAYS)
    def test_a_standby_is_left_by_the_whole_pool_when_it_refuses_a_write(
        self, engine: OptInEngine, leads_to: list[str], url: str, way: str
    ) -> None:
        with ExitStack() as stack:  # three connections to the standby are in the pool
            for _ in range(3):
                session = stack.enter_context(OptInSession(engine))
                assert session.scalar(IN_RECOVERY)
        leads_to[0] = url
        with OptInSession(engine) as session:
            with pytest.raises(exc.DBAPIError, match="This server is a standby") as raised:
                WAYS[way](session)
            assert raised.value.connection_invalidated
            assert not isinstance(raised.value, CommitOutcomeUnknown)
            WAYS[way](session)  # the same session, on the primary
        with ExitStack() as stack:
            for _ in range(3):
                session = stack.enter_context(OptInSession(engine))
                assert not session.scalar(IN_RECOVERY)

    def test_a_standby_keeps_what_a_savepoint_a_stream_and_a_lock_need(
        self, engine: OptInEngine
    ) -> None:
        """An application may be on a standby on purpose, and go on after the error."""
        write = sa.update(Author).values(age=7)
        rows = select(Author.id).order_by(Author.id).execution_options(yield_per=1)
        with OptInSession(engine) as session, session.begin():
            with pytest.raises(exc.DBAPIError, match="standby"), session.begin_nested():
                session.execute(write)
            assert session.scalar(IN_RECOVERY)
        with OptInSession(engine) as session:
            stream = session.scalars(rows)
            assert next(stream) == 1
            with pytest.raises(exc.DBAPIError, match="standby"):
                session.execute(write)
            assert list(stream) == [2, 3]
        with engine.connect() as connection:
            pid = backend_pid(connection)
            with pytest.raises(exc.DBAPIError, match="standby"):
                connection.execute(write)
            assert backend_pid(connection) == pid
        with engine.connect() as connection:
            assert backend_pid(connection) != pid  # the pool has closed it meanwhile

    def test_the_pool_is_not_replaced_again_and_again(self, engine: OptInEngine) -> None:
        opened: list[object] = []
        event.listen(engine, "connect", lambda *_: opened.append(1))
        pids: list[int] = []
        for _ in range(5):
            with OptInSession(engine) as session:
                pids.append(backend_pid(session.connection()))
                with pytest.raises(exc.DBAPIError, match="standby"):
                    session.execute(sa.update(Author).values(age=7))
        assert len(opened) <= 6

    def test_an_error_with_the_same_code_is_not_taken_for_a_standby(
        self, engine: OptInEngine
    ) -> None:
        with OptInSession(engine) as session:
            pid = backend_pid(session.connection())
            with pytest.raises(exc.NotSupportedError) as raised:
                session.execute(sa.text("SELECT * FROM other.public.author"))
            assert "standby" not in str(raised.value)
            assert backend_pid(session.connection()) == pid

    def test_nothing_more_is_sent_to_look_for_a_standby(
        self, engine: OptInEngine, leads_to: list[str], url: str, wire: WireProxy, wire_url: str
    ) -> None:
        leads_to[0] = wire_url
        with OptInSession(engine) as session:
            session.scalar(sa.select(1))  # the driver connects
            with wire.record() as recording:
                session.execute(sa.update(Author).values(age=7))
                session.scalar(IN_RECOVERY)
        assert recording.verbs == ["UPDATE", "SELECT"]


def test_a_replica_that_was_promoted_is_not_asked_any_more(
    server: PostgresServer, driver: str, wire_url: str, database: str
) -> None:
    try:
        promoted = server.start_replica()
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    with ExitStack() as stack:
        stack.enter_context(promoted)
        promoted.catch_up()
        way = stack.enter_context(WireProxy(promoted.host, promoted.port))
        replica_url = way.url(promoted.url(driver, database))
        engine = stack.enter_context(opened_with(wire_url, [replica_url], promoted, pool_size=3))
        with ExitStack() as sessions:  # several connections in the replica's pool
            for _ in range(3):
                session = sessions.enter_context(OptInSession(engine))
                assert session.scalar(IN_RECOVERY)
        promoted.promote()
        with OptInSession(engine) as session:
            session.scalar(IN_RECOVERY)  # with its answer the server tells
            session.scalar(IN_RECOVERY)  # this session stays there, because that is not behind
        for _ in range(4):
            with recorded(way) as [asked], OptInSession(engine) as session:
                assert session.scalar(IN_RECOVERY) is False
            assert asked.statements == []
        assert not engine.replicas[0].health.is_up
