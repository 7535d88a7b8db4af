"""What gunicorn serves in the tests: an app whose parent process may have used the database."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib import import_module
from threading import Lock
from typing import Any

import sqlalchemy as sa
from flask import Flask, jsonify
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInSession
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy

PID = sa.text("SELECT pg_backend_pid()")
# As long as the test holds the lock: what a request waits for, in the database.
WAIT = sa.text("SELECT pg_advisory_lock_shared(1), pg_advisory_unlock_shared(1)")

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SERVED_DATABASE"]
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 5, "max_overflow": 15}
db: Any = SQLAlchemy(app)


class Counted(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


parents: list[int] = []
session: OptInSession | None = None  # one for all requests, which have to take turns
turn = Lock()
if "SERVED_USES_DATABASE" in os.environ:
    with app.app_context():
        session = OptInSession(db.engine)  # which nobody closes before the fork
        parents = [db.session.scalar(PID), session.scalar(PID)]


@app.get("/pids")
def pids() -> ResponseReturnValue:
    """The process, its server processes, and those of its parent."""
    own = [db.session.scalar(PID)]
    if session is not None:
        with turn:
            own.append(session.scalar(PID))
    return jsonify(process=os.getpid(), own=own, parents=parents)


@app.get("/wait-outside")
def wait_outside() -> ResponseReturnValue:
    """Read, wait for the database, and read."""
    before = db.session.get(Counted, 1).number
    db.session.execute(WAIT).all()
    return jsonify(before=before, transactions=len(TRANSACTION_CONNECTIONS))


@app.post("/wait-inside/<int:number>")
def wait_inside(number: int) -> ResponseReturnValue:
    """Write, wait, and roll back what has an odd number."""
    session_id = id(db.session())
    with db.session.begin() as transaction:
        first = db.session.scalar(PID)
        db.session.add(Counted(id=number, number=number))
        db.session.flush()
        db.session.execute(WAIT).all()
        own = db.session.scalars(sa.select(Counted.id).filter(Counted.id >= 100)).all()
        answer = {
            "session": session_id,
            "pids": [first, db.session.scalar(PID)],
            "own": own,
            "transactions": len(TRANSACTION_CONNECTIONS),
        }
        if number % 2:
            transaction.rollback()
    return jsonify(answer)


@app.get("/timeout")
def timeout() -> ResponseReturnValue:
    """Give up a wait for the database, as gevent does it, and read."""
    Timeout: Any = import_module("gevent").Timeout

    given_up = 0
    for place in ("outside", "inside"):
        try:
            with Timeout(0.2), nullcontext() if place == "outside" else db.session.begin():
                db.session.execute(WAIT).all()
        except Timeout:
            given_up += 1
    return jsonify(given_up=given_up, number=db.session.get(Counted, 1).number)
