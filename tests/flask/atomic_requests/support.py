"""A ``House`` is an application with one kind of session; the tests send requests to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import OptInTransactionMixin, flask_scoped_session
from fictive_sqlalchemy.ext.flask.atomic_requests import AtomicRequestsMixin
from tests.library import Author, Seat, assert_at_rest, checked_out

WRITTEN = ["BEGIN", "INSERT", "COMMIT"]
UNDONE = ["BEGIN", "INSERT", "ROLLBACK"]


class Database(OptInTransactionMixin, SQLAlchemy):
    pass


class House:
    """An application with an extension or a scoped session; engines are disposed of at the end.

    :param kind: ``"db"``, ``"scoped"`` or ``"stock"``.
    """

    def __init__(self, kind: str, url: str, **engine_options: Any) -> None:
        self.kind = kind
        self.url = url
        self.web = Flask(__name__)
        self.web.secret_key = "secret"
        self.extension: Any
        self.session: scoped_session[Any]
        self.engine: sa.Engine
        if kind == "db":
            self.web.config["SQLALCHEMY_DATABASE_URI"] = url
            self.web.config["SQLALCHEMY_ENGINE_OPTIONS"] = engine_options
            self.extension = Database(self.web)
            self.session = self.extension.session
            with self.web.app_context():
                self.engine = self.extension.engine
        else:
            sessions: sessionmaker[Any]
            if kind == "scoped":
                self.engine = create_engine(url, **engine_options)
                sessions = sessionmaker(self.engine, class_=OptInSession)
            else:
                self.engine = sa.create_engine(url, **engine_options)
                sessions = sessionmaker(self.engine)
            self.extension = self.session = flask_scoped_session(sessions, self.web)
        self.owner: AtomicRequestsMixin = self.extension
        self.engine.connect().close()  # SQLAlchemy asks the server for its version, and the like

    @property
    def written_alone(self) -> list[str]:
        """What is sent for a transaction that has one INSERT, and no flush before its end."""
        return WRITTEN if self.kind == "stock" else ["INSERT"]

    def add(self, name: str = "new") -> None:
        self.session.add(Author(name=name))
        self.session.flush()

    def close(self) -> None:
        if isinstance(self.engine, OptInEngine):
            assert_at_rest(self.engine)
        else:
            assert checked_out(self.engine) == 0
        self.engine.dispose()


def open_house(kind: str, url: str) -> Iterator[House]:
    house = House(kind, url)
    yield house
    house.close()


def post(house: House, path: str = "/", **options: Any) -> tuple[int, str]:
    response = house.web.test_client().post(path, **options)
    return response.status_code, response.text


def two_in_one_seat(house: House) -> None:
    """What COMMIT refuses, and nothing before it."""
    house.session.add_all([Seat(place=1), Seat(place=1)])
    house.session.flush()
