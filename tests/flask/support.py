"""The extension under test, and how to say what went over the wire."""

from __future__ import annotations

import re
from typing import Any

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import (
    FilterByOrCreateMixin,
    OptInTransactionMixin,
    flask_scoped_session,
)
from tests.wire import Recording

_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+\"?(\w+)\"?", re.IGNORECASE)


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    """Reads are sent alone; `with db.session.begin():` is a transaction."""


class WritingApp:
    """An application whose session has ``begin_on_write=True``.

    Who makes it disposes of its engine.

    :param kind: ``"db"`` for an extension, ``"scoped"`` for a session over plain SQLAlchemy.
    :param url: The database.
    :param config: The keys of Flask's configuration.
    """

    def __init__(self, kind: str, url: str, **config: Any) -> None:
        self.web = Flask(__name__)
        self.web.config.update(config)
        self.owner: Any
        if kind == "db":
            self.web.config["SQLALCHEMY_DATABASE_URI"] = url
            self.owner = Database(self.web, session_options={"begin_on_write": True})
            self.session: Any = self.owner.session
            with self.web.app_context():
                self.engine = self.owner.engine
        else:
            self.engine = create_engine(url)
            factory = sessionmaker(self.engine, class_=OptInSession, begin_on_write=True)
            self.owner = self.session = flask_scoped_session(factory, self.web)


def sent(recording: Recording) -> list[str]:
    """What a recording holds, as ``["BEGIN", "SELECT users", "UPDATE users", "COMMIT"]``."""
    found = []
    for verb, statement in zip(recording.verbs, recording.statements, strict=True):
        table = _TABLE.search(statement)
        found.append(f"{verb} {table[1]}" if table else verb)
    return found
