"""Sentry: a span for each transaction of the database, and one for each wait for the pool.

::

    from fictive_sqlalchemy.ext.sentry import trace_transactions

    trace_transactions(engine)
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import Any

from .._core.places import Place
from .._core.records import ConnectionUse, Transaction
from .._extras import installed_by
from ..recording import Follower

with installed_by("sentry-sdk"):
    import sentry_sdk

__all__ = ["TransactionSpans", "trace_transactions"]

#: A wait for the pool that takes fewer seconds has no span, because a connection was free.
SHORTEST_WAIT = 0.001


def trace_transactions(*sources: Any) -> TransactionSpans:
    """Make a span for each transaction, and for each wait for a connection. Sends nothing.

    A wait that ends with the error of the pool's timeout has no span.

    The spans are parts of what Sentry calls a transaction, such as a request. Outside of Sentry's
    transactions, no spans are made.

    :param sources: One or more extensions or engines.
    :returns: The object that makes the spans, until its ``stop()`` is called.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, or a source has no engine of
        :func:`fictive_sqlalchemy.create_engine`.
    """
    return TransactionSpans(*sources).start()


class TransactionSpans(Follower):
    """Makes the spans of :func:`trace_transactions`, each when its end is known."""

    def end_transaction(self, transaction: Transaction) -> None:
        """Make the span of a transaction that has ended."""
        if transaction.started is None:
            return
        end = transaction.started + transaction.duration
        span = _span("db.transaction", transaction.started, transaction.begun_at)
        if span is not None:
            span.set_data("outcome", transaction.outcome)
            span.set_data("waiting", transaction.waiting)
            span.set_data("round_trips", transaction.round_trips)
            span.set_status("internal_error" if transaction.outcome == "unknown" else "ok")
            span.finish(end_timestamp=_moment(end))

    def add_use(self, use: ConnectionUse) -> None:
        """Make the span of a wait for the pool."""
        if use.waited >= SHORTEST_WAIT:
            span = _span("db.pool", use.started - use.waited, use.place)
            if span is not None:
                span.finish(end_timestamp=_moment(use.started))


def _span(operation: str, started: float, place: Place | None) -> Any:
    parent = sentry_sdk.get_current_span()
    if parent is None:
        return None
    name = operation if place is None else str(place)
    span = parent.start_child(op=operation, name=name, start_timestamp=_moment(started))
    span.set_data("db.system", "postgresql")
    if place is not None:
        span.set_data("code.filepath", place.filename)
        span.set_data("code.lineno", place.line)
        span.set_data("code.function", place.function)
    return span


def _moment(moment: float) -> datetime:
    """Return a moment of :func:`time.perf_counter` as a date and time."""
    return datetime.now(timezone.utc) - timedelta(seconds=time.perf_counter() - moment)
