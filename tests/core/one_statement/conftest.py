"""Fixtures: an engine on the tables of ``models.py``, and sessions of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.core.one_statement.models import Base, Club
from tests.library import assert_at_rest


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    """An engine on the tables, in which there are two clubs."""
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        session.add_all([Club(name="chess", size=3), Club(name="tennis", size=4)])
        session.commit()
    yield engine
    assert_at_rest(engine)
    engine.dispose()


@pytest.fixture
def sessions(engine: OptInEngine) -> sessionmaker[OptInSession]:
    """A factory of sessions."""
    return sessionmaker(engine, class_=OptInSession)


@pytest.fixture
def session(sessions: sessionmaker[OptInSession]) -> Iterator[OptInSession]:
    """A session."""
    with sessions() as session:
        yield session
