"""Inside a transaction, SAVEPOINT and INSERT take one round trip; nothing else changes."""

# ruff: noqa: PT012  # what raises has several lines

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy._core.pending_savepoints import PendingSavepoints
from fictive_sqlalchemy.testing import isolate
from tests.find_or_create.stores import Base, Heard, Store, Tag, User, sqlstate
from tests.interruptions import HardStop, Interruption, SoftLimit
from tests.wire import Message, Recording, WireProxy


class Numbered(Base):
    """Its key comes from a sequence, which is asked before the INSERT."""

    __tablename__ = "numbered"
    __table_args__ = {"implicit_returning": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(sa.Sequence("numbers"), primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)


class Asking(Base):
    """A default is a statement with a parameter, before the INSERT."""

    __tablename__ = "asking"
    __table_args__ = {"implicit_returning": False}  # noqa: RUF012

    id: Mapped[int] = mapped_column(
        default=sa.select(sa.cast(sa.literal(41), sa.Integer) + 1).scalar_subquery(),
        primary_key=True,
    )
    key: Mapped[str] = mapped_column(unique=True)


class Broken(Base):
    """Its INSERT is no SQL."""

    __tablename__ = "broken"

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(unique=True)
    value: Mapped[str] = mapped_column(default=sa.text("no sql at all"))


def names(recording: Recording) -> list[str]:
    return [verb for verb in recording.verbs if verb != "SELECT"]


def test_a_request_that_creates_is_four_round_trips(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording, store.session.begin():
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert recording.verbs == ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "COMMIT"]
    assert recording.round_trips == 4


def test_no_savepoint_is_inside_the_last(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording, store.session.begin():
        for number in range(3):
            assert store.ask(User, {"name": "Ada"}, email=f"{number}@x")[1]
    assert names(recording) == [
        *("BEGIN", "SAVEPOINT", "INSERT"),
        *("RELEASE", "SAVEPOINT", "INSERT") * 2,
        "COMMIT",
    ]
    assert recording.round_trips == 8
    assert store.stored(User, "email") == ["0@x", "1@x", "2@x"]


@pytest.mark.parametrize("way", ["begin_nested", "atomic", "text", "connection"])
@pytest.mark.parametrize("ends", ["stays", "goes"])
def test_savepoints_of_the_user_after_it(
    store: Store, wire: WireProxy, way: str, ends: str
) -> None:
    session = store.session
    assert isinstance(session, OptInSession)
    with wire.record() as recording, session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        if way == "text":
            session.execute(sa.text("SAVEPOINT mine"))
            store.ask(User, {"name": "Ada"}, email="2@x")
            how = "RELEASE" if ends == "stays" else "ROLLBACK TO"
            session.execute(sa.text(f"{how} SAVEPOINT mine"))
            if ends == "goes":
                session.expunge_all()
        elif way == "connection":
            savepoint = session.connection().begin_nested()
            session.connection().execute(sa.insert(User).values(email="2@x", name="Ada"))
            savepoint.commit() if ends == "stays" else savepoint.rollback()
        else:
            block = session.begin_nested() if way == "begin_nested" else session.atomic()
            try:
                with block:
                    store.ask(User, {"name": "Ada"}, email="2@x")
                    assert ends == "stays"
            except AssertionError:
                pass
        store.ask(User, {"name": "Ada"}, email="3@x")
    stays = ["1@x", "2@x", "3@x"] if ends == "stays" else ["1@x", "3@x"]
    assert store.stored(User, "email") == stays
    # The server has released the first before the user's savepoint is set.
    assert names(recording)[:5] == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SAVEPOINT"]


@pytest.mark.parametrize("ends", ["stays", "goes"])
def test_inside_a_savepoint_of_the_user(store: Store, wire: WireProxy, ends: str) -> None:
    session = store.session
    with wire.record() as recording, session.begin():
        session.add(User(email="0@x", name="Ada"))
        outer = session.begin_nested()
        store.ask(User, {"name": "Ada"}, email="1@x")
        session.add(User(email="2@x", name="Ada"))
        session.flush()
        outer.commit() if ends == "stays" else outer.rollback()
        store.ask(User, {"name": "Ada"}, email="3@x")
    end = "RELEASE" if ends == "stays" else "ROLLBACK TO"
    assert names(recording) == [
        *("BEGIN", "INSERT", "SAVEPOINT", "SAVEPOINT", "INSERT", "INSERT", end),
        *("SAVEPOINT", "INSERT", "COMMIT"),
    ]
    stays = ["0@x", "1@x", "2@x", "3@x"] if ends == "stays" else ["0@x", "3@x"]
    assert store.stored(User, "email") == stays


@pytest.mark.parametrize(
    ("name", "error"),
    [(object(), exc.DBAPIError), ("\0", (exc.DBAPIError, ValueError)), ("\ud800", Exception)],
    ids=["of no type", "nul", "surrogate"],
)
def test_what_the_driver_refuses_undoes_nothing(
    store: Store, wire: WireProxy, name: Any, error: Any
) -> None:
    with wire.record() as recording, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        with pytest.raises(error):
            store.ask(User, {"name": name}, email="2@x")
        store.ask(User, {"name": "Ada"}, email="3@x")
    assert store.stored(User, "email") == ["1@x", "3@x"]
    assert recording.verbs.count("INSERT") == 2


def test_a_statement_that_is_no_sql(store: Store, driver: str) -> None:
    """psycopg2: the server parses the two as one, so the savepoint is not set."""
    store.ask(User, {"name": "Ada"}, email="0@x")

    def block() -> None:
        with store.session.begin():
            store.ask(User, {"name": "Ada"}, email="1@x")
            with pytest.raises(exc.ProgrammingError) as raised:
                store.ask(Broken, key="k")
            assert sqlstate(raised.value) == "42601"
            errors.append(raised.value)

    errors: list[BaseException] = []
    if driver == "psycopg":
        block()
        assert store.stored(User, "email") == ["0@x", "1@x"]
    else:
        with pytest.raises(exc.PendingRollbackError) as refused:
            block()
        assert refused.value.__cause__ is errors[0]
        assert store.stored(User, "email") == ["0@x"]
    assert store.ask(User, {"name": "Ada"}, email="2@x")[1]


@pytest.mark.parametrize("model", [Numbered, Asking])
def test_the_savepoint_goes_with_the_first_statement(
    store: Store, another: Store, wire: WireProxy, model: type[Any], just_before_insert: Any
) -> None:
    session = store.session
    with wire.record() as recording, session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        just_before_insert(lambda: another.ask(model, key="k"))
        assert not store.ask(model, key="k")[1]
    assert recording.verbs == [
        *("BEGIN", "SELECT", "SAVEPOINT", "INSERT"),
        *("SELECT", "RELEASE", "SAVEPOINT", "SELECT", "INSERT", "ROLLBACK TO", "SELECT"),
        "COMMIT",
    ]
    assert store.stored(User, "email") == ["1@x"]


@pytest.mark.parametrize("how", ["execute", "raw", "nested", "many", "stream"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_listener_that_sends_something_before_the_insert(
    store: Store, how: str, fails: bool
) -> None:
    @event.listens_for(User, "before_insert")
    def _(mapper: Any, connection: Any, target: User) -> None:
        insert = "INSERT INTO tags (name) VALUES ('of the listener')"
        if how == "execute":
            connection.exec_driver_sql(insert)
        elif how == "raw":
            with connection.connection.cursor() as cursor:
                cursor.execute(insert)
        elif how == "many":
            connection.exec_driver_sql(
                "INSERT INTO tags (name) VALUES (%(name)s)",
                [{"name": "of the listener"}, {"name": "too"}],
            )
        elif how == "stream":
            options = {"stream_results": True}
            rows = connection.execute(
                sa.text("SELECT 1 + :one"), {"one": 1}, execution_options=options
            )
            assert rows.scalar_one() == 2
            connection.exec_driver_sql(insert)
        else:
            with connection.begin_nested():
                connection.exec_driver_sql(insert)

    try:
        with store.session.begin():
            store.session.execute(sa.text("INSERT INTO tags (name) VALUES ('before')"))
            if fails:
                with pytest.raises(exc.IntegrityError):
                    store.ask(User, {"name": "Ada", "age": -1}, email="1@x")
            else:
                store.ask(User, {"name": "Ada", "age": 1}, email="1@x")
            store.session.execute(sa.text("INSERT INTO tags (name) VALUES ('after')"))
    finally:
        event.remove(User, "before_insert", _)
    found = ["after", "before"]
    if not fails:
        found += ["of the listener", "too"] if how == "many" else ["of the listener"]
    assert store.stored(Tag, "name") == found


def test_a_constructor_that_raises_sends_nothing(store: Store, wire: WireProxy) -> None:
    def fail() -> str:
        raise ZeroDivisionError

    with wire.record() as recording, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        with pytest.raises(ZeroDivisionError):
            store.ask(User, {"name": fail}, email="2@x")
        store.ask(User, {"name": "Ada"}, email="3@x")
    assert names(recording) == [
        *("BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SAVEPOINT", "INSERT", "COMMIT")
    ]


def test_what_postgresql_refuses_in_a_savepoint(store: Store) -> None:
    with store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        assert store.session.scalar(sa.select(sa.func.pg_export_snapshot()))
        store.ask(User, {"name": "Ada"}, email="2@x")
        store.session.execute(sa.text("SET TRANSACTION READ ONLY"))
        assert store.session.scalar(sa.text("SHOW transaction_read_only")) == "on"


@pytest.mark.parametrize(
    "name",
    ["savepoint", "release_savepoint", "before_cursor_execute", "after_execute", "do_execute"],
)
def test_who_listens_hears_each_of_them(store: Store, wire: WireProxy, name: str) -> None:
    heard: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> None:
        heard.append(args)

    event.listen(store.engine, name, note)  # which passes do_execute on to the dialect
    with wire.record() as recording, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
    assert heard
    assert recording.round_trips == 6
    assert names(recording) == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]


def test_the_log_says_what_is_sent(
    make_store: Callable[..., Store], wire: WireProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(echo=True)
    caplog.clear()
    with wire.record() as recording, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        store.ask(User, {"name": "Ada"}, email="2@x")
        store.session.execute(sa.text("SAVEPOINT mine"))
    logged = [
        Message(0, 0, 0, "frontend", "Query", line.getMessage(), False).verb
        for line in caplog.records
    ]
    assert [verb for verb in logged if verb] == recording.verbs


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_connection_that_is_lost_while_both_are_sent(
    store: Store, wire: WireProxy, where: Any
) -> None:
    def cut(message: Message) -> Any:
        is_it = message.waits and savepoints and message.name in ("Query", "Sync")
        return where if is_it else None

    savepoints: list[str] = []

    def look(message: Message) -> None:
        savepoints.extend(part.text for part in message.parts if part.verb == "SAVEPOINT")

    wire.before_forward, wire.cut_where = look, cut
    with pytest.raises(exc.DBAPIError) as raised, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
    assert raised.value.connection_invalidated
    wire.before_forward = wire.cut_where = None
    assert store.stored(User, "email") == []
    with store.session.begin():
        assert store.ask(User, {"name": "Ada"}, email="1@x")[1]


@pytest.mark.parametrize("exception", [SoftLimit, HardStop])
def test_an_interruption_at_any_line(store: Store, exception: type[BaseException]) -> None:
    """Somebody catches it inside: the rest of the block is stored, or nothing is."""
    engine = sa.create_engine(store.url, isolation_level="AUTOCOMMIT")
    while_sending = {f"pending_savepoints.py:{line}" for line in _lines_of(*SENDING)}
    kept: set[str | None] = set()
    lost: set[str | None] = set()
    with engine.connect() as onlooker:
        for number in count(1):
            interruption = Interruption(number, exception)
            onlooker.exec_driver_sql("DELETE FROM users")
            try:
                with store.maker() as session, session.begin():
                    store.ask(User, {"name": "Ada"}, session, email="1@x")
                    interruption.run(partial(store.ask, User, {"name": "A"}, session, email="2@x"))
                    store.ask(User, {"name": "Ada"}, session, email="3@x")
            except (exc.SQLAlchemyError, exception):
                lost.add(interruption.place)
                expected: list[list[str]] = [[]]
            else:
                kept.add(interruption.place)
                expected = [["1@x", "3@x"], ["1@x", "2@x", "3@x"]]
                if interruption.place in while_sending:
                    expected.pop()
            stored = list(onlooker.exec_driver_sql("SELECT email FROM users ORDER BY 1").scalars())
            assert stored in expected, interruption.place
            if interruption.place is None:
                break
    engine.dispose()
    assert kept & while_sending
    assert lost & while_sending


SENDING = [
    function
    for name, function in vars(PendingSavepoints).items()
    if name in ("add_savepoint", "note_sent") or name.lstrip("_").startswith(("send", "begin_to"))
]


def _lines_of(*functions: Callable[..., Any]) -> Iterator[int]:
    for function in functions:
        lines, first = inspect.getsourcelines(function)
        yield from range(first, first + len(lines))


def test_ctrl_c_while_the_insert_waits(store: Store, another: Store, driver: str) -> None:
    if driver == "psycopg2":
        pytest.skip("it waits in C, where no signal handler is called")
    with another.session.begin():
        another.ask(User, {"name": "Ada"}, email="2@x")
        timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
        with pytest.raises(KeyboardInterrupt), store.session.begin():
            store.ask(User, {"name": "Ada"}, email="1@x")
            timer.start()
            store.ask(User, {"name": "Ada"}, email="2@x")
    timer.join()
    assert store.stored(User, "email") == ["2@x"]
    with store.session.begin():
        assert not store.ask(User, {"name": "Ada"}, email="2@x")[1]
        assert store.ask(User, {"name": "Ada"}, email="3@x")[1]


def test_in_two_phases_savepoints_are_not_kept_back(store: Store, wire: WireProxy) -> None:
    session = OptInSession(store.engine, twophase=True)
    with wire.record() as recording, session.begin():
        store.ask(User, {"name": "Ada"}, session, email="1@x")
    assert names(recording)[:4] == ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE"]
    assert store.stored(User, "email") == ["1@x"]


def test_isolated_tests(store: Store, wire: WireProxy) -> None:
    with isolate(store.engine):
        with store.session.begin():
            store.ask(User, {"name": "Ada"}, email="1@x")
            with pytest.raises(exc.IntegrityError):
                store.ask(User, {"name": "Ada", "age": -1}, email="2@x")
            store.ask(User, {"name": "Ada"}, email="3@x")
        assert store.session.scalars(sa.select(User.email)).all() == ["1@x", "3@x"]
    assert store.stored(User, "email") == []


@pytest.mark.parametrize("how", ["rollback", "set_rollback", "error"])
def test_callbacks(store: Store, how: str) -> None:
    session = store.session
    assert isinstance(session, OptInSession)
    called: list[str] = []
    with session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        session.on_commit(lambda: called.append("commit"))
    try:
        with session.begin() as transaction:
            session.on_rollback(lambda: called.append("rollback"))
            store.ask(Heard, {"name": "Ada"}, email="1@x")
            if how == "rollback":
                transaction.rollback()
            elif how == "set_rollback":
                session.set_rollback()
            else:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert called == ["commit", "rollback"]
    assert store.stored(Heard, "email") == []


def test_another_encoding_sends_the_savepoint_alone(
    make_store: Callable[..., Store], wire: WireProxy
) -> None:
    store = make_store(connect_args={"client_encoding": "LATIN1"})
    with wire.record() as recording, store.session.begin():
        store.ask(User, {"name": "Ada"}, email="1@x")
        with pytest.raises(UnicodeEncodeError):
            store.ask(User, {"name": "\u20ac"}, email="2@x")
        store.ask(User, {"name": "Ad\u00e4"}, email="3@x")
    assert store.stored(User, "name") == ["Ada", "Ad\u00e4"]
    assert not any("; INSERT" in message.text for message in recording.messages)
