"""What the tests of the extension share: applications that are cleaned up, a second database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeAlias

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from tests.postgres import PostgresServer

MakeApp: TypeAlias = Callable[..., Flask]


@pytest.fixture
def make_app() -> Iterator[MakeApp]:
    """``make_app(db, url, **config)``: an application whose engines are disposed of after the test.

    The keys of ``config`` are those of Flask's configuration.
    """
    with ExitStack() as cleanup:

        def make(db: SQLAlchemy, url: str | None = None, **config: Any) -> Flask:
            app = Flask(__name__)
            if url is not None:
                config["SQLALCHEMY_DATABASE_URI"] = url
            app.config.update(config)
            db.init_app(app)
            cleanup.callback(_dispose, app, db)
            return app

        yield make


@pytest.fixture(scope="session")
def _other_reused_database(server: PostgresServer) -> Iterator[str]:
    name = server.create_database()
    yield name
    server.drop_database(name)


@pytest.fixture
def other_database(server: PostgresServer, _other_reused_database: str) -> str:
    """The name of a second empty database."""
    server.reset_database(_other_reused_database)
    return _other_reused_database


def _dispose(app: Flask, db: SQLAlchemy) -> None:
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()
