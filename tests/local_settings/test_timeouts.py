"""``begin(timeout=…)``: the server ends a transaction that takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, text
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, TransactionTimeout
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, Onlooker
from tests.local_settings.support import TIMEOUT, tenant
from tests.local_settings.test_transactions import settings_sent
from tests.postgres import PostgresServer
from tests.wire import WireProxy

Sessions = sessionmaker[OptInSession]

IDLE = text("SHOW idle_in_transaction_session_timeout")


@pytest.mark.parametrize(
    "timeout", [2, 2.0, "2s", "2000ms", " 2 s ", "2000000us", timedelta(seconds=2)]
)
def test_the_timeout_is_part_of_the_first_message(
    session: OptInSession, wire: WireProxy, server: PostgresServer, timeout: Any
) -> None:
    with wire.record() as recording, session.begin(timeout=timeout):
        assert session.scalar(TIMEOUT) == "2s"
        assert session.scalar(IDLE) == "2s"
        whole = session.scalar(text("SELECT current_setting('transaction_timeout', true)"))
        assert whole == ("2s" if server.version >= 17 else None)
    assert settings_sent(recording) == 1
    assert recording.round_trips == 5
    assert session.scalar(TIMEOUT) == session.scalar(IDLE) == "0"
    with session.begin():
        assert session.scalar(TIMEOUT) == "0"


def during_a_statement(session: OptInSession) -> None:
    session.execute(text("SELECT pg_sleep(10)"))


def between_two_statements(session: OptInSession) -> None:
    time.sleep(0.6)
    session.execute(text("SELECT 1"))


def before_the_commit(session: OptInSession) -> None:
    time.sleep(0.6)


LATE = [during_a_statement, between_two_statements, before_the_commit]


def store_late(session: OptInSession, late: Callable[[OptInSession], None]) -> None:
    with session.begin(timeout=0.2):
        session.add(Author(name="late"))
        session.flush()
        late(session)


@pytest.mark.parametrize("late", LATE)
def test_when_the_timeout_runs_out_nothing_is_stored(
    session: OptInSession, onlooker: Onlooker, late: Callable[[OptInSession], None]
) -> None:
    with pytest.raises(
        TransactionTimeout, match=r"timeout of 0\.2 seconds.*The transaction is rolled"
    ):
        store_late(session, late)
    assert onlooker.names() == []
    assert not session.in_transaction()
    with session.begin(timeout=5):  # on another connection, if that one was closed
        session.add(Author(name="in time"))
    assert onlooker.names() == ["in time"]


@pytest.mark.parametrize("late", LATE)
def test_the_timeout_runs_out_after_one_statement_was_sent_in_time(
    session: OptInSession, late: Callable[[OptInSession], None]
) -> None:
    """psycopg's pipelines would switch off the server's timeout between two statements."""
    transaction = session.begin(timeout="200ms")
    session.scalar(text("SELECT 1"))
    with pytest.raises(TransactionTimeout), transaction:
        late(session)


def swallow(session: OptInSession) -> None:
    with pytest.raises(TransactionTimeout):
        during_a_statement(session)


def test_a_timeout_that_is_caught_inside_is_the_cause_of_the_error_at_the_end(
    session: OptInSession, onlooker: Onlooker
) -> None:
    with pytest.raises(
        exc.PendingRollbackError, match="Nothing of this block was stored"
    ) as caught:
        store_late(session, swallow)
    assert isinstance(caught.value.__cause__, TransactionTimeout)
    assert onlooker.names() == []


def test_other_errors_stay_what_they_are(session: OptInSession, onlooker: Onlooker) -> None:
    with pytest.raises(exc.DataError), session.begin(timeout=5):
        session.execute(text("SELECT 1 / 0"))
    transaction = session.begin(timeout=5)
    onlooker.kill(session.scalar(text("SELECT pg_backend_pid()")))
    with pytest.raises(exc.OperationalError) as caught, transaction:
        session.execute(text("SELECT 1"))
    assert not isinstance(caught.value, TransactionTimeout)


def test_a_cancel_by_somebody_else_is_no_timeout(session: OptInSession, onlooker: Onlooker) -> None:
    transaction = session.begin(timeout=30)
    pid = session.scalar(text("SELECT pg_backend_pid()"))
    cancel = threading.Timer(0.2, onlooker.scalar, [f"SELECT pg_cancel_backend({pid})"])
    cancel.start()
    with pytest.raises(exc.OperationalError) as caught, transaction:
        session.execute(text("SELECT pg_sleep(10)"))
    cancel.join()
    assert not isinstance(caught.value, TransactionTimeout)


def test_the_first_settings_in_a_transaction_leave_its_timeout_in_force(
    session: OptInSession,
) -> None:
    transaction = session.begin(timeout=0.5)
    assert session.scalar(text("SELECT 1")) == 1
    session.set_local({"app.tenant_id": 7})
    assert tenant(session) == "7"
    with pytest.raises(TransactionTimeout), transaction:
        session.execute(text("SELECT pg_sleep(10)"))


def test_the_timeout_goes_before_the_settings_of_the_session(session: OptInSession) -> None:
    session.set_local({"app.tenant_id": 7, "statement_timeout": "9s"})
    with session.begin(timeout=2):
        assert session.scalar(TIMEOUT) == "2s"
        assert tenant(session) == "7"
        with session.begin_nested() as savepoint:
            session.scalar(TIMEOUT)
            savepoint.rollback()
        assert session.scalar(TIMEOUT) == "2s"
    assert session.scalar(TIMEOUT) == "9s"
    with session.begin():
        assert session.scalar(TIMEOUT) == "9s"
        assert session.scalar(IDLE) == "0"


def test_atomic_and_retry_take_a_timeout(session: OptInSession) -> None:
    with session.atomic(timeout=2):
        assert session.scalar(TIMEOUT) == "2s"
        with (
            pytest.raises(exc.InvalidRequestError, match="timeout can only be given"),
            session.atomic(timeout=2),
        ):
            pass

    @retry_transaction(session, timeout=3)
    def work() -> Any:
        return session.scalar(TIMEOUT)

    assert work() == "3s"


def test_one_object_is_stored_with_begin_and_commit_if_there_is_a_timeout(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    with wire.record() as recording, session.begin(timeout=2):
        session.add(Author(name="x"))
    assert recording.round_trips == 3
    assert onlooker.names() == ["x"]


def test_the_timeout_ends_with_its_transaction_under_isolation(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine), sessions() as session:
        with session.begin(timeout=2):
            assert session.scalar(TIMEOUT) == "2s"
        assert session.scalar(TIMEOUT) == "0"
        with session.begin():
            assert session.scalar(TIMEOUT) == "0"


@pytest.mark.parametrize(
    "timeout", [0, -1, "2", "soon", "2 years", "", True, float("nan"), 1e12, [2], timedelta(0)]
)
def test_what_is_no_timeout_is_refused(session: OptInSession, timeout: Any) -> None:
    with pytest.raises(exc.ArgumentError, match="timeout is a number of seconds"):
        session.begin(timeout=timeout)
    assert not session.in_transaction()


def test_a_bind_that_can_have_no_timeout_refuses_it(engine: OptInEngine, url: str) -> None:
    stock, lite = sa.create_engine(url), sa.create_engine("sqlite://")
    for bind in (stock, lite):
        with (
            OptInSession(bind) as session,
            pytest.raises(exc.ArgumentError, match="timeout of begin"),
            session.begin(timeout=2),
        ):
            session.execute(text("SELECT 1"))
    stock.dispose()
    with (
        pytest.raises(exc.InvalidRequestError, match="savepoint"),
        OptInSession(engine) as session,
        session.begin(),
    ):
        session.begin(nested=True, timeout=2)


def test_psycopg_has_the_private_names_that_begin_with_settings(
    engine: OptInEngine, driver: str
) -> None:
    if driver != "psycopg":
        pytest.skip("psycopg's")
    with engine.connect() as connection:
        dbapi: Any = connection.connection.dbapi_connection
        assert dbapi._autocommit is True
        assert dbapi._get_tx_start_command() == b"BEGIN"
