"""``builtins`` makes new resources, ``shared`` has the ready-made ones."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy as FlaskSQLAlchemy
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy.orm import Mapped, mapped_column

import fictive_sqlalchemy
from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.ext.flask import (
    FilterByOrCreateMixin,
    OptInTransactionMixin,
    builtins,
    shared,
)
from tests.flask.conftest import MakeApp
from tests.flask.support import sent
from tests.postgres import PostgresServer
from tests.wire import WireProxy


class Visit(shared.Model):
    """A model of a module that most code imports."""

    id: Mapped[int] = mapped_column(primary_key=True)
    page: Mapped[str] = mapped_column(unique=True)


def test_the_ready_class_has_both_mixins() -> None:
    assert issubclass(builtins.SQLAlchemy, OptInTransactionMixin)
    assert issubclass(builtins.SQLAlchemy, FilterByOrCreateMixin)
    assert issubclass(builtins.SQLAlchemy, FlaskSQLAlchemy)
    assert issubclass(builtins.Session, OptInSession)
    assert issubclass(builtins.Session, FlaskSession)


@pytest.mark.parametrize("module", [builtins, shared])
def test_each_module_says_what_is_public(module: Any) -> None:
    assert module.__doc__
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_new_resources_are_independent_of_the_shared_ones(make_app: MakeApp, url: str) -> None:
    class OwnSession(builtins.Session):
        def greet(self) -> str:
            return "hello"

    db: Any = builtins.SQLAlchemy(session_options={"class_": OwnSession})

    class Item(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    assert "item" not in shared.db.metadata.tables
    with make_app(db, url).app_context():
        db.create_all()
        assert isinstance(db.engine, OptInEngine)
        assert db.session().greet() == "hello"
        assert Item.filter_by_or_create(id=1).id == 1


def test_the_shared_session_and_models_are_those_of_the_shared_extension() -> None:
    assert shared.session is shared.db.session
    assert shared.Model is shared.db.Model
    assert isinstance(shared.db, builtins.SQLAlchemy)


def test_the_shared_resources_serve_one_application(
    make_app: MakeApp, url: str, wire_url: str, wire: WireProxy
) -> None:
    with make_app(shared.db, url).app_context():
        shared.db.create_all()
    with make_app(shared.db, wire_url).app_context():
        shared.session.execute(sa.text("SELECT 1"))
        with wire.record() as recording:
            assert shared.session.get(Visit, 1) is None
            with shared.session.begin():
                shared.session.add(Visit(id=1, page="/"))
            assert Visit.query.count() == 1
            assert Visit.filter_by_or_create(page="/").id == 1
        assert sent(recording) == ["SELECT visit", "INSERT visit", "SELECT visit", "SELECT visit"]
        assert recording.round_trips == 4


def test_the_shared_resources_serve_several_applications_at_once(
    make_app: MakeApp, server: PostgresServer, driver: str, url: str, other_database: str
) -> None:
    first = make_app(shared.db, url)
    second = make_app(shared.db, server.url(driver, other_database))
    for app, page in ((first, "/first"), (second, "/second")):
        with app.app_context():
            shared.db.create_all()
            with shared.session.begin():
                shared.session.add(Visit(page=page))

    def pages(app: Flask) -> list[str]:
        with app.app_context():
            return list(shared.session.scalars(sa.select(Visit.page)))

    assert pages(first) == ["/first"]
    assert pages(second) == ["/second"]
    with first.app_context():
        with second.app_context():
            shared.session.add(Visit(page="/pending"))
            assert len(shared.session.new) == 1
        assert not shared.session.new
    assert pages(second) == ["/second"]


def test_outside_an_application_the_shared_session_says_so() -> None:
    with pytest.raises(RuntimeError, match="Working outside of application context"):
        shared.session.get(Visit, 1)


def test_the_core_knows_nothing_of_flask() -> None:
    """Only what lives under ``ext`` imports it, and nothing imports that unasked."""
    package = Path(fictive_sqlalchemy.__file__).parents[1]
    program = (
        "import sys, fictive_sqlalchemy; sys.exit("
        "any(name.split('.')[0] in ('flask', 'flask_sqlalchemy', 'werkzeug')"
        " or name.startswith('fictive_sqlalchemy.ext') for name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert done.returncode == 0
