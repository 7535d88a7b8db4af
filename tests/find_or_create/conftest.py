"""A session, or a store, on a wire that is recorded, and what the tests ask of it."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.find_or_create.models import (
    DDL,
    Ask,
    Base,
    Rows,
)
from tests.find_or_create.stores import Base as StoreBase
from tests.find_or_create.stores import Store
from tests.wire import Message, WireProxy


def ddl_of(metadata: sa.MetaData, driver: str) -> str:
    """What makes the tables, in one go: most tests need them, and each has an empty database."""
    statements: list[str] = []

    def note(statement: Any, *args: Any, **kwargs: Any) -> None:
        statements.append(str(statement.compile(dialect=engine.dialect)))

    engine = sa.create_mock_engine(f"postgresql+{driver}://", note)
    metadata.create_all(engine, checkfirst=False)
    return ";".join(statements)


def run(url: str, sql: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(sql)
    engine.dispose()


@pytest.fixture(scope="module")
def ddl(driver: str) -> str:
    return ";".join([ddl_of(Base.metadata, driver), DDL])


@pytest.fixture
def tables(url: str, ddl: str) -> None:
    run(url, ddl)


@pytest.fixture(scope="module")
def store_ddl(driver: str) -> str:
    return ddl_of(StoreBase.metadata, driver)


@pytest.fixture
def store_tables(url: str, store_ddl: str) -> None:
    run(url, store_ddl)


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


# Stores


@pytest.fixture
def make_store(url: str, wire_url: str, store_tables: None) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(
        via: str = wire_url,
        create: Callable[..., sa.Engine] = create_engine,
        session_class: type[Session] = OptInSession,
        **options: Any,
    ) -> Store:
        store = Store(create(via, **options), session_class, url)
        stores.append(store)
        store.engine.connect().close()  # SQLAlchemy asks for the version and more at first
        return store

    yield make
    for store in stores:
        store.session.close()
        store.engine.dispose()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


@pytest.fixture
def another(make_store: Callable[..., Store], url: str) -> Store:
    """Somebody else, who is not recorded."""
    return make_store(url)


@pytest.fixture
def just_before_insert(wire: WireProxy) -> Callable[[Callable[[], Any]], None]:
    """Lets somebody else be faster, once: just before the next INSERT reaches the server."""

    def arrange(act: Callable[[], Any]) -> None:
        def look(message: Message) -> None:
            if message.is_statement and message.verb == "INSERT":
                wire.before_forward = None
                act()

        wire.before_forward = look

    return arrange
