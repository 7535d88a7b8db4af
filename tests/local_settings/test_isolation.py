"""Under test isolation the settings end where they would in production."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, insert, text, update
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, Onlooker
from tests.local_settings.support import TIMEOUT, has_none, tenant

Sessions = sessionmaker[OptInSession]


def test_settings_end_with_the_statement_under_isolation(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine):
        with sessions() as session, sessions() as other:
            session.set_local({"app.tenant_id": 7, "statement_timeout": "9s"})
            assert tenant(session) == "7"
            assert has_none(other)
            assert other.scalar(TIMEOUT) == "0"
            other.set_local({"app.tenant_id": 8})
            assert [tenant(other), tenant(session)] == ["8", "7"]
            session.set_local({"app.tenant_id": None})
            assert has_none(session)
            assert session.scalar(TIMEOUT) == "9s"
        with sessions() as session:
            assert has_none(session)
        with engine.connect() as connection:
            assert has_none(connection)


def test_settings_end_with_the_transaction_under_isolation(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine), sessions() as session, sessions() as other:
        session.set_local({"app.tenant_id": 7})
        with session.begin():
            assert tenant(session) == "7"
            session.execute(insert(Author).values(name="x"))
            session.set_local({"app.tenant_id": 8})
            assert tenant(session) == "8"
        assert has_none(other)
        with session.begin() as transaction:
            assert tenant(session) == "8"
            session.execute(insert(Author).values(name="y"))
            transaction.rollback()
        assert has_none(other)
        with other.begin():
            assert has_none(other)


def test_a_transaction_that_is_parked_has_its_settings_again(
    engine: OptInEngine, sessions: Sessions
) -> None:
    """One that has only read lets another connection go first, and has them again after it."""
    with isolate(engine), sessions() as session, sessions() as other:
        session.set_local({"app.tenant_id": 7})
        with session.begin():
            assert tenant(session) == "7"
            assert has_none(other)
            assert tenant(session) == "7"
            with other.begin():
                assert has_none(other)
            assert tenant(session) == "7"
            session.execute(update(Author).values(age=5))
            assert tenant(session) == "7"
        assert has_none(other)


def test_savepoints_keep_the_settings_under_isolation(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine), sessions() as session:
        session.set_local({"app.tenant_id": 7})
        with session.begin():
            session.execute(insert(Author).values(name="x"))
            with session.begin_nested() as savepoint:
                session.set_local({"app.tenant_id": 8})
                assert tenant(session) == "8"
                savepoint.rollback()
            assert tenant(session) == "8"
            with pytest.raises(exc.DataError), session.begin_nested():
                session.execute(text("SELECT 1 / 0"))
            assert tenant(session) == "8"
        assert tenant(session) == "8"


def test_errors_leave_the_settings_right_under_isolation(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine), sessions() as session, sessions() as other:
        session.set_local({"app.tenant_id": 7})
        with pytest.raises(exc.DataError):
            session.execute(text("SELECT 1 / 0"))
        assert has_none(other)
        assert tenant(session) == "7"
        session.set_local({"statement_timeout": "soon"})
        with pytest.raises(exc.DBAPIError, match=r"set_local\(\)"):
            tenant(session)
        assert has_none(other)
        with pytest.raises(exc.DBAPIError, match=r"set_local\(\)"), session.begin():
            tenant(session)
        assert has_none(other)
        session.set_local({"statement_timeout": None})
        assert tenant(session) == "7"


def test_streams_have_the_settings_under_isolation(engine: OptInEngine, sessions: Sessions) -> None:
    stream = text("SELECT current_setting('app.tenant_id', true) FROM generate_series(1, 4)")
    with isolate(engine), sessions() as session, sessions() as other:
        session.set_local({"app.tenant_id": 7})
        rows = session.scalars(stream, execution_options={"yield_per": 2})
        assert next(rows) == "7"
        assert has_none(other)
        assert list(rows) == ["7"] * 3
        with session.begin():
            assert session.scalars(stream, execution_options={"yield_per": 2}).all() == ["7"] * 4
        rows = session.scalars(stream, execution_options={"yield_per": 2})
        assert next(rows) == "7"
        other.set_local({"app.tenant_id": 9})
        with other.begin():
            other.execute(update(Author).values(age=5))
            assert list(rows) == ["7"] * 3
            assert tenant(other) == "9"


def test_a_statement_without_settings_has_none_of_the_one_before_it(
    engine: OptInEngine, sessions: Sessions
) -> None:
    with isolate(engine):
        for number in range(1, 20):
            with sessions() as session:
                if number % 3:
                    session.set_local({"app.tenant_id": number})
                expected: Any = str(number) if number % 3 else None
                assert (tenant(session) or None) == expected
                with session.begin():
                    assert (tenant(session) or None) == expected
                    session.add(Author(name=f"n{number}"))
                assert (tenant(session) or None) == expected


def test_nothing_is_left_after_the_isolation(
    engine: OptInEngine, sessions: Sessions, onlooker: Onlooker
) -> None:
    with isolate(engine), sessions() as session:
        session.set_local({"app.tenant_id": 7})
        session.add(Author(name="x"))
        session.commit()
        with session.begin():
            tenant(session)
    with sessions() as session:
        assert has_none(session)
        assert session.scalar(sa.select(sa.func.count()).select_from(Author)) == 3
    assert onlooker.scalar("SELECT count(*) FROM author") == 3
