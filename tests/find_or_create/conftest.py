"""A session on a wire that is recorded, and what the tests ask of it."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    sessionmaker,
)

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy._core.engine import OptInEngine
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.find_or_create.models import (
    DDL,
    Ask,
    Base,
    Rows,
)


@pytest.fixture(scope="module")
def ddl(driver: str) -> str:
    statements: list[str] = []

    def note(statement: Any, *args: Any, **kwargs: Any) -> None:
        statements.append(str(statement.compile(dialect=engine.dialect)))

    engine = sa.create_mock_engine(f"postgresql+{driver}://", note)
    Base.metadata.create_all(engine, checkfirst=False)
    return ";".join([*statements, DDL])


@pytest.fixture
def tables(url: str, ddl: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(ddl)
    engine.dispose()


@pytest.fixture
def maker(engine: OptInEngine, tables: None) -> sessionmaker[OptInSession]:
    """Sessions on a wire that is recorded. Listeners to it hear each of them, and are forgotten."""

    class OwnSession(OptInSession):
        pass

    engine.connect().close()  # SQLAlchemy asks for the version and more at first
    return sessionmaker(engine, class_=OwnSession)


@pytest.fixture
def session(maker: sessionmaker[OptInSession]) -> Iterator[OptInSession]:
    with maker() as session:
        yield session


@pytest.fixture
def ask(session: OptInSession) -> Ask:
    def ask(model: type[Any], /, defaults: dict[str, Any] | None = None, **filters: Any) -> Any:
        return filter_by_or_create(session, model, filters, defaults or {})

    return ask


@pytest.fixture
def rows(url: str, tables: None) -> Iterator[Rows]:
    """What the database has, by the eyes of another."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

    def rows(statement: str) -> list[Any]:
        with engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            if not result.returns_rows:
                return []
            return [row[0] if len(row) == 1 else tuple(row) for row in result]

    yield rows
    engine.dispose()
