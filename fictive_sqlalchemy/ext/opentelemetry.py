"""OpenTelemetry: a span for each transaction, and one for each wait for the pool.

OpenTelemetry's instrumentation of SQLAlchemy makes a span for each statement, but no span for a
transaction or for a wait. To add these spans::

    from fictive_sqlalchemy.ext.opentelemetry import trace_transactions

    trace_transactions(engine)
"""

from __future__ import annotations

import time
from typing import Any

from .._core.places import Place
from .._core.records import ConnectionUse, Transaction
from .._extras import installed_by
from ..recording import Follower

with installed_by("opentelemetry-api"):
    from opentelemetry import trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

__all__ = ["TransactionSpans", "trace_transactions"]

#: A wait for the pool that takes fewer seconds has no span, because a connection was free.
SHORTEST_WAIT = 0.001


def trace_transactions(
    *sources: Any, tracer_provider: TracerProvider | None = None
) -> TransactionSpans:
    """Make a span for each transaction, and for each wait for a connection. Sends nothing.

    A wait that ends with the error of the pool's timeout has no span.

    :param sources: One or more extensions or engines.
    :param tracer_provider: The provider of the tracer; the global one if it is left out.
    :returns: The object that makes the spans, until its ``stop()`` is called.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, or a source has no engine of
        :func:`fictive_sqlalchemy.create_engine`.
    """
    tracer = trace.get_tracer("fictive_sqlalchemy", tracer_provider=tracer_provider)
    return TransactionSpans(tracer, *sources).start()


class TransactionSpans(Follower):
    """Makes the spans of :func:`trace_transactions`.

    A span is made when its transaction has ended, or when the first statement after its wait was
    executed. The span has the times of the start and the end of the transaction or the wait, and is
    a child of the span that is current when it is made. A wait of less than a millisecond has no
    span.
    """

    def __init__(self, tracer: Tracer, *sources: Any) -> None:
        super().__init__(*sources)
        self._tracer = tracer

    def end_transaction(self, transaction: Transaction) -> None:
        """Make the span of a transaction that has ended."""
        if transaction.started is None:
            return
        span = self._span("transaction", transaction.started, transaction.begun_at)
        span.set_attribute("db.transaction.outcome", transaction.outcome)
        span.set_attribute("db.transaction.waiting", transaction.waiting)
        span.set_attribute("db.transaction.round_trips", transaction.round_trips)
        if transaction.isolation_level is not None:
            span.set_attribute("db.transaction.isolation_level", transaction.isolation_level)
        if transaction.outcome == "unknown":
            span.set_status(Status(StatusCode.ERROR, "The connection was lost during COMMIT"))
        span.end(_nanoseconds(transaction.started + transaction.duration))

    def add_use(self, use: ConnectionUse) -> None:
        """Make the span of a wait for the pool."""
        if use.waited >= SHORTEST_WAIT:
            span = self._span("connection pool", use.started - use.waited, use.place)
            span.end(_nanoseconds(use.started))

    def _span(self, name: str, started: float, place: Place | None) -> Span:
        attributes: dict[str, str | int] = {"db.system.name": "postgresql"}
        if place is not None:
            # https://opentelemetry.io/docs/specs/semconv/registry/attributes/code/
            attributes["code.file.path"] = place.filename
            attributes["code.line.number"] = place.line
            attributes["code.function.name"] = place.function
        return self._tracer.start_span(
            name,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=_nanoseconds(started),
        )


def _nanoseconds(moment: float) -> int:
    """Return a moment of :func:`time.perf_counter` as nanoseconds since 1970."""
    return time.time_ns() - int((time.perf_counter() - moment) * 1e9)
