"""The signals of SQLALCHEMY_TRACK_MODIFICATIONS tell what is committed, and nothing else."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy.track_modifications import before_models_committed, models_committed
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from tests.flask.conftest import MakeApp
from tests.flask.support import Database


class Signals:
    """What ``before_models_committed`` and ``models_committed`` said, in order."""

    def __init__(self, app: Flask) -> None:
        self.received: list[tuple[str, list[tuple[str, str]]]] = []
        before_models_committed.connect(self.before, app)
        models_committed.connect(self.after, app)

    def before(self, app: Flask, changes: list[tuple[Any, str]]) -> None:
        self.received.append(("before", [(what.name, how) for what, how in changes]))

    def after(self, app: Flask, changes: list[tuple[Any, str]]) -> None:
        self.received.append(("after", [(what.__dict__["name"], how) for what, how in changes]))


@pytest.fixture
def signals(make_app: MakeApp, url: str) -> Iterator[Signals]:
    db: Any = Database(session_options={"expire_on_commit": False})

    class Club(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    app = make_app(db, url, SQLALCHEMY_TRACK_MODIFICATIONS=True)
    with app.app_context():
        db.create_all()
        signals = Signals(app)
        signals.db, signals.Club = db, Club  # type: ignore[attr-defined]
        yield signals


def test_modifications_are_tracked_in_a_transaction(signals: Any) -> None:
    session, Club = signals.db.session, signals.Club
    with session.begin():
        session.add(Club(id=1, name="Engines"))
        assert signals.received == []
    assert signals.received == [
        ("before", [("Engines", "insert")]),
        ("after", [("Engines", "insert")]),
    ]
    signals.received.clear()

    def add_and_fail() -> None:
        with session.begin():
            session.add(Club(id=2, name="Codes"))
            session.flush()
            raise ValueError("undone")

    with pytest.raises(ValueError, match="undone"):
        add_and_fail()
    session.scalars(sa.select(Club)).all()
    with session.begin():
        session.delete(session.get(Club, 1))
    assert signals.received == [
        ("before", [("Engines", "delete")]),
        ("after", [("Engines", "delete")]),
    ]


@pytest.mark.parametrize("call", ["flush", "commit"])
def test_modifications_are_tracked_outside(signals: Any, call: str) -> None:
    session, Club = signals.db.session, signals.Club
    session.add(Club(id=1, name="Engines"))
    getattr(session, call)()
    assert signals.received == [
        ("before", [("Engines", "insert")]),
        ("after", [("Engines", "insert")]),
    ]
    signals.received.clear()

    session.add(Club(id=2, name="Engines"))
    with pytest.raises(IntegrityError):
        getattr(session, call)()
    assert [how for how, _ in signals.received] in ([], ["before"])
    signals.received.clear()

    session.add(Club(id=3, name="Codes"))
    getattr(session, call)()
    assert signals.received == [
        ("before", [("Codes", "insert")]),
        ("after", [("Codes", "insert")]),
    ]


def test_modifications_that_still_wait_are_not_said_to_be_committed(signals: Any) -> None:
    session, Club = signals.db.session, signals.Club
    session.add(Club(id=1, name="still pending"))
    session.bulk_insert_mappings(Club, [{"id": 2, "name": "Codes"}])
    assert signals.received == []
    session.rollback()
    session.add(Club(id=3, name="Engines"))
    session.commit()
    assert signals.received == [
        ("before", [("Engines", "insert")]),
        ("after", [("Engines", "insert")]),
    ]
