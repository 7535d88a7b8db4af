"""OpenTelemetry's instrumentation of SQLAlchemy: its spans agree with the wire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from packaging.requirements import Requirement
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.wire import Recording, WireProxy

# Up to 0.66b2 its range ends before SQLAlchemy 2.1.
IS_IN_ITS_RANGE = all(
    sa.__version__ in Requirement(one).specifier
    for one in SQLAlchemyInstrumentor().instrumentation_dependencies()
)


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Telemetry:
    """A provider of tracers whose spans stay in memory."""

    def __init__(self) -> None:
        self.provider = TracerProvider()
        self.exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    def instrument(self, *, skip_dep_check: bool = True, **options: Any) -> None:
        SQLAlchemyInstrumentor().instrument(
            tracer_provider=self.provider, skip_dep_check=skip_dep_check, **options
        )

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    @property
    def verbs(self) -> list[str]:
        return [span.name.split()[0] for span in self.spans]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    yield Telemetry()
    instrumentor = SQLAlchemyInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()


@pytest.fixture
def make_engine(wire_url: str) -> Iterator[Callable[[], OptInEngine]]:
    with ExitStack() as cleanup:

        def make() -> OptInEngine:
            engine = create_engine(wire_url)
            cleanup.callback(engine.dispose)
            Base.metadata.create_all(engine)
            with OptInSession(engine) as session:
                session.add_all([User(name="Ada"), User(name="Bob")])
                session.commit()
            return engine

        yield make


@pytest.fixture
def session(telemetry: Telemetry, make_engine: Callable[[], OptInEngine]) -> Iterator[OptInSession]:
    """A session whose statements are traced, on a database with two users."""
    telemetry.instrument()
    with OptInSession(make_engine()) as session:
        telemetry.exporter.clear()
        yield session


def statements(recording: Recording) -> list[str]:
    """What was sent, but for what the driver sends by itself."""
    return [verb for verb in recording.verbs if verb not in ("BEGIN", "COMMIT", "ROLLBACK")]


def test_a_read_is_one_span(session: OptInSession, telemetry: Telemetry, wire: WireProxy) -> None:
    with wire.record() as recording:
        session.get(User, 1)
        session.get(User, 2)
    assert telemetry.verbs == recording.verbs == ["SELECT", "SELECT"]
    assert [span.status.status_code for span in telemetry.spans] == [StatusCode.UNSET] * 2
    assert "FROM users" in str((telemetry.spans[0].attributes or {})["db.statement"])


def test_a_transaction_has_a_span_for_each_statement(
    session: OptInSession, telemetry: Telemetry, wire: WireProxy
) -> None:
    with wire.record() as recording, session.begin():
        session.get_one(User, 1).name = "Grace"
        with session.begin_nested():
            session.add(User(name="Cid"))
    assert recording.verbs == [
        "BEGIN",
        "SELECT",
        "UPDATE",
        "SAVEPOINT",
        "INSERT",
        "RELEASE",
        "COMMIT",
    ]
    assert telemetry.verbs == statements(recording)


def test_a_statement_that_fails_is_a_span_that_says_so(
    session: OptInSession, telemetry: Telemetry, wire: WireProxy
) -> None:
    session.get_one(User, 1).name = "Bob"
    telemetry.exporter.clear()
    with wire.record() as recording, pytest.raises(IntegrityError):
        session.commit()
    assert recording.verbs == ["BEGIN", "UPDATE", "ROLLBACK"]
    assert telemetry.verbs == ["UPDATE"]
    assert telemetry.spans[0].status.status_code is StatusCode.ERROR
    session.scalars(sa.select(User).where(User.id > 0)).all()
    assert telemetry.verbs == ["UPDATE", "SELECT"]
    assert telemetry.spans[1].status.status_code is StatusCode.UNSET


def test_many_rows_have_a_span_for_each_statement_sent(
    session: OptInSession, telemetry: Telemetry, wire: WireProxy
) -> None:
    rows = [{"name": f"user {number}"} for number in range(2001)]
    with wire.record() as recording:
        session.scalars(sa.insert(User).returning(User.id), rows)
    assert telemetry.verbs == statements(recording)
    assert len(telemetry.spans) > 1


def test_one_call_of_the_drivers_executemany_is_one_span(
    session: OptInSession, telemetry: Telemetry, wire: WireProxy
) -> None:
    update = sa.update(User).where(User.id == sa.bindparam("user_id"))
    rows = [{"user_id": 1, "name": "Grace"}, {"user_id": 2, "name": "Rob"}]
    with wire.record() as recording:
        session.connection().execute(update, rows)
    assert recording.verbs == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]
    assert telemetry.verbs == ["UPDATE"]


def test_a_stream_is_one_span(session: OptInSession, telemetry: Telemetry, wire: WireProxy) -> None:
    with wire.record() as recording:
        names = session.scalars(sa.select(User.name).execution_options(yield_per=1)).all()
    assert names == ["Ada", "Bob"]
    assert recording.verbs[0] == "DECLARE"
    assert telemetry.verbs == ["SELECT"]


def test_what_is_refused_before_it_is_sent_is_no_span(
    session: OptInSession, telemetry: Telemetry
) -> None:
    with pytest.raises(InvalidRequestError, match="with_for_update"):
        session.scalars(sa.select(User).with_for_update())
    assert telemetry.verbs == []


def test_a_span_around_the_block_is_that_of_the_transaction(
    session: OptInSession, telemetry: Telemetry
) -> None:
    with telemetry.tracer.start_as_current_span("rename"), session.begin():
        session.get_one(User, 1).name = "Grace"
    read, write, around = telemetry.spans
    assert telemetry.verbs == ["SELECT", "UPDATE", "rename"]
    assert around.context is not None
    for span in read, write:
        assert span.parent is not None
        assert span.parent.span_id == around.context.span_id
    telemetry.exporter.clear()

    with (
        pytest.raises(IntegrityError),
        telemetry.tracer.start_as_current_span("rename"),
        session.begin(),
    ):
        session.get_one(User, 1).name = "Bob"
    assert telemetry.verbs[-2:] == ["UPDATE", "rename"]
    assert telemetry.spans[-1].status.status_code is StatusCode.ERROR


def test_a_commit_that_fails_is_in_the_span_around_alone(
    session: OptInSession, telemetry: Telemetry
) -> None:
    with session.begin():
        session.execute(sa.text("ALTER TABLE users DROP CONSTRAINT users_name_key"))
        session.execute(
            sa.text("ALTER TABLE users ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
        )
    telemetry.exporter.clear()
    with (
        pytest.raises(IntegrityError),
        telemetry.tracer.start_as_current_span("rename"),
        session.begin(),
    ):
        session.get_one(User, 1).name = "Bob"
    assert telemetry.verbs == ["SELECT", "UPDATE", "rename"]
    codes = [span.status.status_code for span in telemetry.spans]
    assert codes == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]


def test_a_stock_engine_has_a_span_for_the_pool_and_ours_has_none(
    telemetry: Telemetry, make_engine: Callable[[], OptInEngine]
) -> None:
    telemetry.instrument()
    engine = make_engine()
    stock = sa.create_engine(engine.url)
    telemetry.exporter.clear()
    for one, session_class in (stock, Session), (engine, OptInSession):
        with session_class(one) as session:
            session.get(User, 1)
    assert telemetry.verbs == ["connect", "SELECT", "SELECT"]
    stock.dispose()


def test_an_engine_that_is_there_is_instrumented_by_itself(
    telemetry: Telemetry, make_engine: Callable[[], OptInEngine]
) -> None:
    engine = make_engine()
    telemetry.instrument()
    with OptInSession(engine) as session:
        session.get(User, 1)
    assert telemetry.verbs == []
    SQLAlchemyInstrumentor().uninstrument()
    telemetry.instrument(engine=engine)
    with OptInSession(engine) as session:
        session.get(User, 1)
    assert telemetry.verbs == ["SELECT"]


def test_the_extension_is_instrumented_before_init_app(
    telemetry: Telemetry, make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    telemetry.instrument()
    db = Database()
    app = make_app(db, wire_url)
    with app.app_context():
        db.session.execute(db.text("SELECT 1"))
        telemetry.exporter.clear()
        with wire.record() as recording:
            db.session.execute(db.text("SELECT 1"))
        assert telemetry.verbs == recording.verbs == ["SELECT"]


def test_comments_in_the_sql_change_nothing_else(
    telemetry: Telemetry, make_engine: Callable[[], OptInEngine], wire: WireProxy
) -> None:
    telemetry.instrument(enable_commenter=True)
    with OptInSession(make_engine()) as session:
        with wire.record() as recording:
            user = session.get_one(User, 1)
            with session.begin():
                user.name = "Grace"
        assert recording.verbs == ["SELECT", "BEGIN", "UPDATE", "COMMIT"]
        assert "/*" in recording.statements[0]
        with pytest.raises(InvalidRequestError, match="with_for_update"):
            session.scalars(sa.select(User).with_for_update())


@pytest.mark.skipif(IS_IN_ITS_RANGE, reason="it says that it knows this SQLAlchemy")
def test_opentelemetry_does_nothing_on_an_unknown_sqlalchemy_unless_it_skips_its_check(
    telemetry: Telemetry,
    make_engine: Callable[[], OptInEngine],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        telemetry.instrument(skip_dep_check=False)
    with OptInSession(make_engine()) as session:
        session.get(User, 1)
    assert telemetry.verbs == []
    assert "sqlalchemy" in caplog.text
