"""What writes, begins or asks for a cursor during the last flush brings BEGIN and COMMIT."""

# ruff: noqa: PT012  # what raises is the end of a block

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    object_session,
    relationship,
    sessionmaker,
    validates,
)

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession, create_engine
from tests.library import assert_at_rest, sent
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class Log(Base):
    __tablename__ = "log"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.Text)


class Work:
    """What a default does while the row is being written."""

    do: Callable[[Any], Any] = staticmethod(lambda context: None)


class Row(Base):
    """The name ``refuse`` is refused by the database."""

    __tablename__ = "row"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, sa.CheckConstraint("name <> 'refuse'"))
    number: Mapped[int | None] = mapped_column(default=lambda context: Work.do(context))


class Parent(Base):
    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(sa.Text, unique=True)
    children: Mapped[list[Child]] = relationship(back_populates="parent", passive_updates=False)
    notes: Mapped[list[Note]] = relationship()


class Child(Base):
    """Refers to a column that is not the key."""

    __tablename__ = "child"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_code: Mapped[str | None] = mapped_column(
        sa.ForeignKey("parent.code", deferrable=True, initially="DEFERRED")
    )
    parent: Mapped[Parent | None] = relationship(back_populates="children")


class Note(Base):
    """Its validator writes when the flush sets the parent's key."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, sa.CheckConstraint("name <> 'refuse'"))
    parent_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Parent.id))

    @validates("parent_id")
    def write(self, key: str, value: Any) -> Any:
        session = object_session(self)
        if session is not None:
            session.execute(sa.insert(Log).values(text="by a validator"))
        return value


@pytest.fixture
def engine(wire_url: str) -> Iterator[OptInEngine]:
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    yield engine
    assert_at_rest(engine)
    engine.dispose()


@pytest.fixture
def session(engine: OptInEngine) -> Iterator[OptInSession]:
    # Not expired by the commits, so that nothing has to be read in the transaction.
    sessions = sessionmaker(engine, class_=OptInSession, expire_on_commit=False)
    with sessions() as session:
        yield session


def write(context: Any) -> None:
    context.connection.execute(sa.insert(Log).values(text="by a default"))


def write_in_a_savepoint(context: Any) -> None:
    with context.connection.begin_nested():
        write(context)


def write_in_a_savepoint_of_the_session(context: Any) -> None:
    session = Work.session  # type: ignore[attr-defined]
    with session.begin_nested():
        session.execute(sa.insert(Log).values(text="by a default"))


def write_by_the_session(context: Any) -> None:
    Work.session.execute(sa.insert(Log).values(text="by a default"))  # type: ignore[attr-defined]


def write_on_a_cursor(context: Any) -> None:
    with context.connection.connection.cursor() as cursor:
        cursor.execute("INSERT INTO log (text) VALUES ('by a default')")


@pytest.mark.parametrize(
    "work",
    [
        write,
        write_in_a_savepoint,
        write_in_a_savepoint_of_the_session,
        write_by_the_session,
        write_on_a_cursor,
    ],
)
@pytest.mark.parametrize("way", ["block", "commit", "flush"])
class TestADefault:
    @pytest.fixture(autouse=True)
    def _work(self, session: OptInSession, work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Work, "do", staticmethod(work))
        monkeypatch.setattr(Work, "session", session, raising=False)

    def store(self, session: OptInSession, way: str, name: str) -> None:
        if way == "block":
            with session.begin():
                session.add(Row(name=name))
        else:
            session.add(Row(name=name))
            getattr(session, way)()

    def test_a_default_that_writes_is_part_of_the_transaction(
        self, session: OptInSession, wire: WireProxy, way: str
    ) -> None:
        with wire.record() as recording:
            self.store(session, way, "kept")
        verbs = [verb for verb in sent(recording) if verb not in ("SAVEPOINT", "RELEASE")]
        assert verbs == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert len(TRANSACTION_CONNECTIONS) == 0

    def test_what_a_default_writes_is_undone_with_the_row(
        self, session: OptInSession, way: str
    ) -> None:
        said: list[str] = []
        with pytest.raises(IntegrityError, match="check constraint"):
            if way == "block":
                with session.begin():
                    session.on_rollback(lambda: said.append("rollback"))
                    session.add(Row(name="refuse"))
            else:
                self.store(session, way, "refuse")
        assert said == (["rollback"] if way == "block" else [])
        assert session.scalar(sa.select(sa.func.count(Log.id))) == 0
        assert session.scalar(sa.select(sa.func.count(Row.id))) == 0


def test_what_a_validator_writes_is_undone_with_the_row(
    session: OptInSession, wire: WireProxy
) -> None:
    session.add(parent := Parent(code="a"))
    session.commit()
    assert not parent.notes
    said: list[str] = []
    with wire.record() as recording, pytest.raises(IntegrityError), session.begin():
        session.on_rollback(lambda: said.append("rollback"))
        parent.notes.append(Note(name="refuse"))
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "ROLLBACK"]
    assert said == ["rollback"]
    assert session.scalar(sa.select(sa.func.count(Log.id))) == 0


def test_rows_that_follow_a_changed_column_are_changed_with_it(
    session: OptInSession, wire: WireProxy
) -> None:
    session.add(parent := Parent(code="a", children=[Child()]))
    session.commit()
    assert parent.children
    with wire.record() as recording, session.begin():
        parent.code = "b"
    assert sent(recording) == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]
    assert session.scalar(sa.select(Child.parent_code)) == "b"


@pytest.mark.parametrize("name", ["after_execute", "after_cursor_execute"])
def test_what_a_listener_writes_after_the_statement_is_in_the_transaction(
    engine: OptInEngine, session: OptInSession, wire: WireProxy, name: str
) -> None:
    def audit(connection: sa.Connection, *arguments: Any) -> None:
        if "INTO log" not in str(arguments[0] if name == "after_execute" else arguments[1]):
            connection.execute(sa.insert(Log).values(text="audit"))

    event.listen(engine, name, audit)
    with wire.record() as recording, session.begin():
        session.add(Row(name="kept"))
    event.remove(engine, name, audit)
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


@pytest.mark.parametrize("name", ["after_transaction_create", "after_transaction_end"])
def test_what_a_listener_to_the_flushs_transaction_writes_is_in_the_transaction(
    session: OptInSession, wire: WireProxy, name: str
) -> None:
    def audit(session: Session, transaction: Any) -> None:
        if transaction.parent is not None and not transaction.nested:
            session.execute(sa.insert(Log).values(text="audit"))

    event.listen(session, name, audit)
    with wire.record() as recording, session.begin():
        session.add(Row(name="kept"))
    event.remove(session, name, audit)
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_a_setting_that_the_statement_leaves_reaches_nobody(
    engine: OptInEngine, session: OptInSession
) -> None:
    with pytest.warns(Warning, match="set_config"), session.begin():
        session.add(Row(name=sa.func.set_config("app.tenant", "42", False)))
    session.close()
    with engine.connect() as connection:
        setting = connection.scalar(sa.text("SELECT current_setting('app.tenant', true)"))
    assert setting is None


def test_another_bind_that_is_refused_keeps_the_row_from_being_stored(
    engine: OptInEngine, server: Any, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = server.create_database()
    other = create_engine(server.url(driver, name))
    Base.metadata.create_all(other)
    session = OptInSession(binds={Row: engine, Log: other}, expire_on_commit=False)

    def write_elsewhere(context: Any) -> int:
        try:
            session.execute(sa.insert(Log).values(text=None))
        except IntegrityError:
            return 7
        return 8

    monkeypatch.setattr(Work, "do", staticmethod(write_elsewhere))
    with session, pytest.raises(PendingRollbackError), session.begin():
        session.add(Row(name="kept"))
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count(Row.id))) == 0
    other.dispose()
    server.drop_database(name)


def test_a_translated_error_of_the_server_is_a_rollback(
    engine: OptInEngine, session: OptInSession
) -> None:
    class Refused(Exception):
        pass

    def translate(context: Any) -> None:
        raise Refused from context.original_exception

    said: list[str] = []
    event.listen(engine, "handle_error", translate)
    with pytest.raises(Refused), session.begin():
        session.on_rollback(lambda: said.append("rollback"))
        session.add(Row(name="refuse"))
    event.remove(engine, "handle_error", translate)
    assert said == ["rollback"]


def test_a_flush_that_looks_like_ours_is_not_taken_for_it(
    engine: OptInEngine, wire: WireProxy
) -> None:
    class FlushesMore(OptInSession):
        @wraps(OptInSession.flush)
        def flush(self, objects: Any = None) -> None:  # type: ignore[override]
            is_first = bool(self.new)
            super().flush(objects)
            if is_first:
                self.execute(sa.insert(Log).values(text="more"))

    with FlushesMore(engine) as session, wire.record() as recording, session.begin():
        session.add(Row(name="kept"))
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_after_a_commit_that_failed_before_its_flush_the_next_flush_is_not_the_last(
    session: OptInSession, wire: WireProxy
) -> None:
    def refuse(session: Session) -> None:
        raise ZeroDivisionError

    session.begin()
    event.listen(session, "before_commit", refuse)
    session.add(Row(name="one"))
    with pytest.raises(ZeroDivisionError):
        session.commit()
    event.remove(session, "before_commit", refuse)
    with wire.record() as recording:
        session.flush()
        session.rollback()
    assert recording.verbs == ["BEGIN", "INSERT", "ROLLBACK"]
    assert session.scalars(sa.select(Row.name)).all() == []
