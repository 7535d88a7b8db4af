"""An application under Sentry, in a process of its own: Sentry can't be taken out of one again.

``python -m tests.neighbours.sentry_site URL PATH…`` posts to each path, or gets ``/``, and prints
as JSON what Sentry would have sent for each.
"""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import json
import sys
from typing import Any

import sentry_sdk
from flask import Flask
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration
from sentry_sdk.transport import Transport
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy


class Memory(Transport):
    """Keeps what it is to send."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.payloads: list[dict[str, Any]] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.payloads += [
            item.payload.json for item in envelope.items if item.payload.json is not None
        ]


def main(url: str, *paths: str) -> None:
    memory = Memory()
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=memory,
        traces_sample_rate=1.0,
        default_integrations=False,
        integrations=[FlaskIntegration(), SqlalchemyIntegration()],
    )
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db = SQLAlchemy(app)

    class User(db.Model):
        __tablename__ = "users"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(unique=True)

    @app.get("/")
    def name() -> str:
        return str(db.session.get_one(User, 1).name)

    @app.post("/<name>")
    def rename(name: str) -> str:
        user = db.session.get_one(User, 1)
        with sentry_sdk.start_span(op="db.transaction", name="rename"), db.session.begin():
            user.name = name
        return "done"

    with app.app_context():
        db.create_all()
        db.session.add_all([User(name="Ada"), User(name="Bob")])
        db.session.commit()
    client = app.test_client()
    seen: list[list[dict[str, Any]]] = []
    for path in paths:
        memory.payloads = []
        client.get("/") if path == "/" else client.post(path)
        seen.append(memory.payloads)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
