"""Our spans for OpenTelemetry and Sentry: of each transaction, and of each wait for the pool."""

# ruff: noqa: PT012 (what fails, and when, takes several statements)

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from sentry_sdk.transport import Transport
from sqlalchemy import exc, select

from fictive_sqlalchemy import CommitOutcomeUnknown, OptInEngine, OptInSession
from fictive_sqlalchemy._core import observing
from fictive_sqlalchemy.ext import opentelemetry, sentry
from tests.library import Author, opened, sent
from tests.wire import Message, WireProxy

READ = select(Author.name).where(Author.id == 1)


class Spans:
    """OpenTelemetry, whose spans stay in memory."""

    def __init__(self) -> None:
        self.provider = TracerProvider()
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("tests")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture
def spans(engine: OptInEngine) -> Iterator[Spans]:
    spans = Spans()
    with opentelemetry.trace_transactions(engine, tracer_provider=spans.provider):
        yield spans
    assert observing.recorder is None


def slowly(session: OptInSession) -> None:
    with session.begin(isolation_level="SERIALIZABLE"):
        session.execute(READ).all()
        time.sleep(0.05)


class TestOpenTelemetry:
    def test_a_transaction_is_a_span(self, spans: Spans, session: OptInSession) -> None:
        with spans.tracer.start_as_current_span("request") as request:
            session.execute(READ).all()
            slowly(session)
        (span,) = spans.named("transaction")
        assert 0.05 <= seconds(span) < 5
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.attributes is not None
        assert span.attributes["db.transaction.outcome"] == "committed"
        assert span.attributes["db.transaction.isolation_level"] == "SERIALIZABLE"
        assert span.attributes["db.transaction.round_trips"] == 3
        assert 0.05 <= float(str(span.attributes["db.transaction.waiting"])) <= seconds(span)
        assert span.attributes["code.function.name"] == "slowly"
        assert span.attributes["code.file.path"] == __file__

    def test_a_transaction_that_is_one_statement_is_a_span(
        self, spans: Spans, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            session.add(Author(name="new"))
            session.commit()
        assert sent(recording) == ["INSERT"]
        assert len(spans.named("transaction")) == 1

    def test_a_transaction_that_is_rolled_back_is_no_error(
        self, spans: Spans, session: OptInSession
    ) -> None:
        with pytest.raises(exc.IntegrityError), session.begin():
            session.execute(READ).all()
            session.add(Author(id=1, name="new"))
        (span,) = spans.named("transaction")
        assert span.attributes is not None
        assert span.attributes["db.transaction.outcome"] == "rolled back"
        assert span.status.status_code is StatusCode.UNSET

    def test_an_unknown_outcome_is_an_error(
        self, spans: Spans, session: OptInSession, wire: WireProxy
    ) -> None:
        def cut(message: Message) -> Any:
            return "after" if message.is_statement and message.verb == "COMMIT" else None

        def work() -> None:
            with session.begin():
                session.execute(READ).all()
                wire.cut_where = cut

        with pytest.raises(CommitOutcomeUnknown):
            work()
        (span,) = spans.named("transaction")
        assert span.status.status_code is StatusCode.ERROR

    def test_a_wait_for_the_pool_is_a_span(self, wire_url: str) -> None:
        spans = Spans()
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            holder = engine.connect()
            timer = threading.Timer(0.1, holder.close)
            provider = spans.provider
            with opentelemetry.trace_transactions(engine, tracer_provider=provider):
                with OptInSession(engine) as session:
                    timer.start()
                    session.execute(READ).all()
                with OptInSession(engine) as session:
                    session.execute(READ).all()  # at once
            timer.join()
        (span,) = spans.named("connection pool")
        assert 0.05 <= seconds(span) < 5

    def test_trace_transactions_without_a_source_is_an_error(self) -> None:
        with pytest.raises(exc.ArgumentError, match=r"TransactionSpans\(\) needs a source"):
            opentelemetry.trace_transactions()


class Kept(Transport):
    """Keeps what would be sent to Sentry."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [item.payload.json for item in envelope.items if item.payload.json]


@pytest.fixture
def kept() -> Iterator[Kept]:
    kept = Kept()
    sentry_sdk.init(
        dsn="https://key@sentry.example/1",
        traces_sample_rate=1.0,
        transport=kept,
        default_integrations=False,
    )
    yield kept
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)  # another init() would listen to each engine


class TestSentry:
    def test_a_transaction_of_the_database_is_a_span_of_the_request(
        self, engine: OptInEngine, session: OptInSession, kept: Kept
    ) -> None:
        with (
            sentry.trace_transactions(engine),
            sentry_sdk.start_transaction(op="http.server", name="request"),
        ):
            session.execute(READ).all()
            slowly(session)
        (event,) = kept.events
        (span,) = [span for span in event["spans"] if span["op"] == "db.transaction"]
        assert span["data"]["outcome"] == "committed"
        assert span["data"]["waiting"] >= 0.05
        assert span["data"]["code.function"] == "slowly"
        assert span["timestamp"] > span["start_timestamp"]

    def test_outside_of_a_request_there_is_no_span(
        self, engine: OptInEngine, session: OptInSession, kept: Kept
    ) -> None:
        with sentry.trace_transactions(engine):
            slowly(session)
        assert kept.events == []
