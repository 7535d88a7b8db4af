"""The fixtures make sessions: ours and stock ones, by factories of each kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession
from tests.library import checked_out
from tests.unit_of_work.support import Factory


@pytest.fixture
def stock(wire_url: str, engine: OptInEngine) -> Iterator[sa.Engine]:
    stock = sa.create_engine(wire_url)
    stock.connect().close()  # SQLAlchemy asks the server for its version, and the like
    yield stock
    assert checked_out(stock) == 0
    stock.dispose()


@pytest.fixture
def maker(engine: OptInEngine) -> sessionmaker[OptInSession]:
    return sessionmaker(engine, class_=OptInSession)


@pytest.fixture
def scope(maker: sessionmaker[OptInSession]) -> Iterator[OptInScopedSession[OptInSession]]:
    scope = OptInScopedSession(maker)
    yield scope
    scope.remove()


FACTORIES = [
    "sessionmaker",
    "scoped_session",
    "a callable",
    "a stock sessionmaker",
    "a stock scoped_session",
    "a stock sessionmaker on our engine",
]


@pytest.fixture(params=FACTORIES)
def factory(request: pytest.FixtureRequest, engine: OptInEngine, stock: sa.Engine) -> Factory:
    def make() -> OptInSession:
        return OptInSession(engine)

    factories: dict[str, Factory] = {
        "sessionmaker": sessionmaker(engine, class_=OptInSession),
        "scoped_session": OptInScopedSession(sessionmaker(engine, class_=OptInSession)),
        "a callable": make,
        "a stock sessionmaker": sessionmaker(stock),
        "a stock scoped_session": scoped_session(sessionmaker(stock)),
        "a stock sessionmaker on our engine": sessionmaker(engine),
    }
    return factories[request.param]
