"""What gunicorn serves in the tests of streams: answers whose clients go away half way."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import Context
from itertools import chain, count
from threading import Barrier, Event, Lock
from typing import Any

import sqlalchemy as sa
from flask import Flask, Response, g, jsonify, stream_with_context
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy

# How many requests are in a view at the same time. gunicorn has that many threads, so each thread
# has one of them.
AT_ONCE = 20

# No client's and no kernel's buffers hold a whole answer: the server notices who goes away.
PADDING = "x" * 16384
LINES = 1000

PATIENCE = 60.0

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SERVED_DATABASE"]
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 5, "max_overflow": 15}
db: Any = SQLAlchemy(app)


class Line(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Visit(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)


opened = closed = 0
lock = Lock()
turn = Barrier(AT_ONCE)
answer_of_service = Event()


@contextmanager
def counted() -> Generator[None]:
    """Count a stream's beginning and its end, by whatever exception."""
    global opened, closed
    with lock:
        opened += 1
    try:
        yield
    finally:
        with lock:
            closed += 1


def event(number: int, text: str) -> str:
    return f"data: {number} {text} {PADDING}\n\n"


def lines() -> Any:
    """Stream rows from a server-side cursor."""
    return db.session.scalars(sa.select(Line).order_by(Line.id).execution_options(yield_per=10))


def events() -> Iterator[str]:
    """Look into the database before each event."""
    with counted():
        for number in count(1):
            text = db.session.scalar(sa.select(Line.text).where(Line.id == number % LINES + 1))
            yield event(number, text)


def events_given_back() -> Iterator[str]:
    """Hold nothing at a yield."""
    with counted():
        for number in count(1):
            text = db.session.scalar(sa.select(Line.text).where(Line.id == number % LINES + 1))
            db.session.give_back()
            yield event(number, text)


def query() -> Iterator[str]:
    """Yield within a stream from the server, which keeps its connection."""
    with counted():
        for line in lines():
            yield event(line.id, line.text)


def query_in_block() -> Iterator[str]:
    """Yield within a transaction, and in a stream from the server within that."""
    with counted(), db.session.begin():
        for line in lines():
            yield event(line.id, line.text)


def block() -> Iterator[str]:
    """Yield within a transaction that has written."""
    with counted(), db.session.begin():
        visit = Visit()
        db.session.add(visit)
        db.session.flush()
        for number in count(1):
            yield event(number, str(visit.id))


def service() -> Iterator[str]:
    """Wait for a slow service after the first event, with nothing in hand."""
    with counted():
        line = db.session.get(Line, 1)
        db.session.give_back()
        yield event(1, line.text)
        answer_of_service.wait(PATIENCE)
        for number in count(2):
            yield event(number, line.text)


def in_context_of_its_own(generator: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Iterate over a generator in an application context, and in no request context."""
    with app.app_context():
        yield from generator()


STREAMS = {
    one.__name__: one for one in (events, events_given_back, query, query_in_block, block, service)
}


@app.get("/with-context/<name>")
def with_context(name: str) -> ResponseReturnValue:
    return Response(stream_with_context(STREAMS[name]()))


@app.get("/own-context/<name>")
def own_context(name: str) -> ResponseReturnValue:
    return Response(in_context_of_its_own(STREAMS[name]))


@app.get("/begun-in-view/<name>")
def begun_in_view(name: str) -> ResponseReturnValue:
    """Ask for the first event in the view. A chain has no close()."""
    stream = stream_with_context(STREAMS[name]())
    return Response(chain([next(stream)], stream))


@app.get("/left/<name>")
def left(name: str) -> ResponseReturnValue:
    """The same, and the stream refers to its context, which refers to the stream.

    The garbage collector is left to the test: it would close the stream in the middle of another
    request, and Flask would then call the teardown functions for the context of that.
    """
    gc.disable()
    g.stream = stream_with_context(STREAMS[name]())
    return Response(chain([next(g.stream)], g.stream))


@app.get("/go-on")
def go_on() -> ResponseReturnValue:
    """Let the slow service answer."""
    answer_of_service.set()
    return jsonify(True)


@app.get("/collect")
def collect() -> ResponseReturnValue:
    """Collect what nobody has a reference to."""
    return jsonify(gc.collect())


@app.get("/state")
def state() -> ResponseReturnValue:
    """What is in use: streams, connections, transactions and sessions."""
    return jsonify(
        opened=opened,
        open=opened - closed,
        checked_out=db.engine.pool.checkedout(),
        transactions=len(TRANSACTION_CONNECTIONS),
        sessions=len(db.session.registry.registry),
    )


@app.get("/own/<int:number>")
def own(number: int) -> ResponseReturnValue:
    """Read and store what is this request's own, and leave changes that nobody is to see."""
    is_new = not db.session.registry.has()
    session = db.session()
    is_clean = not (session.in_transaction() or session.identity_map or session.new)
    turn.wait(PATIENCE)
    text = db.session.get(Line, number).text
    with db.session.begin():
        db.session.add(Visit(id=number))
    db.session.get(Line, number).text = "changed, and never stored"
    db.session.add(Line(id=-number, text="added, and never stored"))
    same = session is db.session()
    return jsonify(text=text, is_new=is_new, is_clean=is_clean, same=same)


class EachInItsOwnContext:
    """Middleware: what a stream leaves in the context variables is gone with its request.

    :param wsgi_app: The application around which it is.
    """

    def __init__(self, wsgi_app: Any) -> None:
        self.wsgi_app = wsgi_app

    def __call__(self, environ: Any, start_response: Any) -> Iterator[bytes]:
        context = Context()
        answer = context.run(self.wsgi_app, environ, start_response)
        return _InContext(context, answer)


class _InContext:
    def __init__(self, context: Context, answer: Any) -> None:
        self._context = context
        self._answer = answer
        self._iterator = iter(answer)

    def __iter__(self) -> _InContext:
        return self

    def __next__(self) -> bytes:
        one: bytes = self._context.run(next, self._iterator)
        return one

    def close(self) -> None:
        """Close the answer, as the server wants it."""
        if hasattr(self._answer, "close"):
            self._context.run(self._answer.close)


separated = EachInItsOwnContext(app)
