"""What gunicorn serves: the bank's accounts, and transfers whose ids the clients choose.

The models are those of :mod:`examples.bank`. Its ``transfer()`` is a transaction of its own, so
that a row of the ledger could not be in it; here is one that has both. The environment variable
``CLUSTER`` says, in JSON, what :class:`.Options` has.

No request is tried again here. The client decides.
"""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask import Flask, g, jsonify, request
from flask.typing import ResponseReturnValue
from sqlalchemy import BigInteger, Identity, Text, event, func, select
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from examples.bank import database
from fictive_sqlalchemy import CommitOutcomeUnknown
from fictive_sqlalchemy.reporting import Report
from tests.cluster.model import Work
from tests.cluster.options import Options
from tests.cluster.records import ACCOUNTS, BALANCE, TENANT

options = Options(**json.loads(os.environ["CLUSTER"]))
if options.begin_on_write:
    # Before the models, which are made with it, are imported.
    database.db = database.Database(session_options={"begin_on_write": True})

from examples.bank.models import Account  # noqa: E402

db: Any = database.db


class Ledger(db.Model):
    """A transfer, in the transaction that has moved the money."""

    serial: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    id: Mapped[str] = mapped_column(Text, unique=True)
    source_id: Mapped[int]
    target_id: Mapped[int]
    amount: Mapped[int]
    tenant: Mapped[str | None] = mapped_column(Text)


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = options.url
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
    "pool_size": 8,
    "max_overflow": 4,
    "pool_timeout": 10,
    "connect_args": options.connect_args,
    "replicas": options.replicas,
}
db.init_app(app)


def engines() -> dict[str, Any]:
    """Return the engines by the names that the answers have."""
    replicas = {f"replica {number}": one for number, one in enumerate(db.engine.replicas, 1)}
    return {"primary": db.engine, **replicas}


def watch() -> None:
    """Note with each statement where it went. This sends nothing."""

    def listen(name: str, engine: Any) -> None:
        @event.listens_for(engine, "after_cursor_execute")
        def note(connection: Any, *_: Any) -> None:
            info = connection.connection.dbapi_connection.info
            standby = info.parameter_status("in_hot_standby") == "on"
            g.place = {"engine": name, "port": int(info.port), "standby": standby}

    for name, engine in engines().items():
        listen(name, engine)


with app.app_context():
    watch()

if options.record:
    lines = logging.FileHandler(options.record)
    lines.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    logging.getLogger("fictive_sqlalchemy").addHandler(lines)
    logging.getLogger("fictive_sqlalchemy").setLevel(logging.INFO)
    work = Path(options.record).with_suffix(".work").open("a", buffering=1)

    def note(report: Report) -> None:
        seen = report.recording
        at_work = seen.duration + seen.waiting
        work.write(Work(time.monotonic(), at_work, seen.held, seen.round_trips).line())

    db.report_requests(app, callback=note)


@app.cli.command("fill")
def fill() -> None:
    """Create the tables and the accounts."""
    db.create_all()
    with db.session.begin():
        for number in range(1, ACCOUNTS + 1):
            db.session.add(Account(id=number, owner=f"Owner {number}", balance=BALANCE))


@app.before_request
def name_tenant() -> None:
    """Set the tenant, if that is wanted."""
    if options.settings and request.path != "/pool":
        db.session.set_local({"app.tenant_id": TENANT})


@app.post("/transfers")
def post_transfer() -> ResponseReturnValue:
    """Move money, and read in the same session ``before`` or ``after`` it, so many times."""
    values = request.get_json()
    arguments = (values["id"], values["source"], values["target"], values["amount"])
    reads: list[dict[str, Any]] = []
    stored: dict[str, Any] = {"outcome": "not stored", "reads": reads, "before": values["before"]}
    try:
        reads += [read() for _ in range(values["before"])]
        if options.begin_on_write:
            serial = move(*arguments)
            db.session.commit()
        else:
            with db.session.begin():
                serial = move(*arguments)
        stored.update(outcome="stored", serial=serial)
        reads += [read() for _ in range(values["after"])]
    except Exception as error:
        if isinstance(error, CommitOutcomeUnknown):
            stored["outcome"] = "unknown"
        return jsonify(**stored, **described(error)), 503
    return jsonify(stored), 201


def move(id: str, source: int, target: int, amount: int) -> int:
    """Move money and write it down.

    :param id: What the client calls it.
    :param source: The account that pays.
    :param target: The account that receives.
    :param amount: How much.
    :returns: The number in the ledger.
    """
    accounts = Account.lock(source, target)
    accounts[source].balance -= amount
    accounts[target].balance += amount
    tenant = func.current_setting("app.tenant_id") if options.settings else None
    row = Ledger(id=id, source_id=source, target_id=target, amount=amount, tenant=tenant)
    db.session.add(row)
    db.session.flush()
    return row.serial


@app.get("/reads")
def get_reads() -> ResponseReturnValue:
    """Read the same several times in one session, outside a transaction."""
    pause = float(request.args["pause"])
    reads: list[dict[str, Any]] = []
    try:
        for number in range(int(request.args["times"])):
            if number:
                time.sleep(pause)
            reads.append(read())
    except Exception as error:
        return jsonify(reads=reads, **described(error)), 503
    return jsonify(reads=reads)


def read() -> dict[str, Any]:
    """Read the highest number in the ledger, and return it with the place where it was read."""
    value = db.session.scalar(select(func.max(Ledger.serial))) or 0
    return {"value": value, "at": time.monotonic(), **g.place}


def described(error: Exception) -> dict[str, Any]:
    """Return what the client is told of an error."""
    origin = getattr(error, "orig", None)
    names = [type(one).__name__ for one in (error, origin) if one is not None]
    return {"error": "/".join(names), "text": str(error)}


@app.get("/pool")
def get_pool() -> ResponseReturnValue:
    """Tell what the connections of this process are like, when no other request is under way."""
    found: dict[str, Any] = {}
    for name, engine in engines().items():
        pool = engine.pool
        assert isinstance(pool, QueuePool)
        in_use = pool.checkedout()
        connections: list[Any] = []
        try:
            for _ in range(pool.checkedin()):
                # An entry without a connection would connect now, and its server may be down.
                with suppress(engine.dialect.loaded_dbapi.OperationalError):
                    connections.append(engine.raw_connection())
            wrong = [said for one in connections if (said := unrest(one.dbapi_connection))]
        finally:
            for connection in connections:
                connection.close()
        found[name] = {"in_use": in_use, "idle": len(connections), "wrong": wrong}
    return jsonify(process=os.getpid(), engines=found)


def unrest(connection: Any) -> str:
    """Tell what is wrong with a driver's connection that should be idle; nothing if nothing is.

    One that the server has ended, and that nobody has asked since, is as good as idle.
    """
    said: list[str] = []
    if not connection.autocommit:
        said.append("not in autocommit")
    if connection.info.transaction_status not in (0, 4):
        said.append(f"transaction status {int(connection.info.transaction_status)}")
    return ", ".join(said)
