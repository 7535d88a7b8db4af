"""A store is a session of one kind on a filled database, with what the tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.active_record.models import Base, DataBase, Player, used
from tests.library import Onlooker, assert_at_rest, sent
from tests.wire import WireProxy


@dataclass
class Store:
    """A kind of session on a filled database."""

    wire: WireProxy
    engine: sa.Engine
    sessions: scoped_session[Any]
    onlooker: Onlooker
    opts_in: bool

    def __call__(self) -> Session:
        return cast("Session", self.sessions())

    @contextmanager
    def sends(self, *verbs: str) -> Iterator[None]:
        """Check what the block sends, word by word."""
        with self.wire.record() as recording:
            yield
        assert sent(recording) == list(verbs)

    @contextmanager
    def stores(self, *verbs: str) -> Iterator[None]:
        """Check what the block sends outside, between BEGIN and COMMIT."""
        with self.sends("BEGIN", *verbs, "COMMIT"):
            yield

    @contextmanager
    def fails(self, *verbs: str, error: type[BaseException]) -> Iterator[None]:
        """Check what the block sends outside, and that it fails."""
        with self.sends("BEGIN", *verbs, "ROLLBACK"), pytest.raises(error):
            yield

    @contextmanager
    def stores_one(self, verb: str) -> Iterator[None]:
        """Check that the block sends one statement outside, alone where transactions are opt-in.

        That is not for a player: SQLAlchemy listens to the flush of its composites.
        """
        with self.sends(*self._one(verb, "COMMIT")):
            yield

    @contextmanager
    def fails_at_one(self, verb: str, error: type[BaseException]) -> Iterator[None]:
        """Check that the block sends one statement outside, which fails."""
        with self.sends(*self._one(verb, "ROLLBACK")), pytest.raises(error):
            yield

    def _one(self, verb: str, end: str) -> list[str]:
        return [verb] if self.opts_in else ["BEGIN", verb, end]

    def player(self) -> Player:
        """Ada, loaded, with no transaction open."""
        player = Player.query.filter_by(name="Ada").one()
        self.rest()
        return player

    def rest(self) -> None:
        """End the transaction that a read has begun, on the kind that begins by itself."""
        if not self.opts_in:
            expire, self().expire_on_commit = self().expire_on_commit, False
            self().commit()
            self().expire_on_commit = expire


KINDS = ["opt-in", "stock", "opt-in on a stock bind"]


def open_store(kind: str, wire: WireProxy, wire_url: str, url: str) -> Iterator[Store]:
    engine: sa.Engine = create_engine(wire_url) if kind == "opt-in" else sa.create_engine(wire_url)
    class_ = Session if kind == "stock" else OptInSession
    sessions = scoped_session(sessionmaker(engine, class_=class_))
    Base.metadata.create_all(engine)
    DataBase.metadata.create_all(engine)
    onlooker = Onlooker(url)
    onlooker.run("INSERT INTO team (name) VALUES ('Red'), ('Blue')")
    onlooker.run(
        "INSERT INTO player (name, age, mood, data, team_id, x, y, version) VALUES "
        "('Ada', 30, 'good', '{\"a\": 1}', 1, 1, 2, 1), ('Bob', 40, 'old', NULL, 1, 3, 4, 1)"
    )
    used.append(sessions)
    try:
        yield Store(wire, engine, sessions, onlooker, kind == "opt-in")
        sessions.remove()
        if isinstance(engine, OptInEngine):
            assert_at_rest(engine)
    finally:
        used.remove(sessions)
        sessions.remove()
        onlooker.close()
        engine.dispose()
