"""``isolate()``: the code under test behaves as in production, and nothing of it is left."""

from __future__ import annotations

import gc
import importlib
import io
import logging
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session

import fictive_sqlalchemy.testing
from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInEngine,
    OptInSession,
    create_engine,
)
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.testing import isolate
from tests.core.test_autocommit import Interrupter, Interruption, chain
from tests.library import (
    Author,
    Onlooker,
    Seat,
    assert_rests,
    authors,
    backend_pid,
    checked_out,
    flags_of,
    opened,
    set_flags,
)
from tests.wire import WireProxy

WORD = re.compile(r"0x[0-9a-f]+|\[.*?\] |pid \d+")


@pytest.fixture
def engine(url: str) -> Iterator[OptInEngine]:
    with opened(url) as engine:
        yield engine


# The same program for real and under isolation


class Actor:
    """Runs actions, and notes what the code under test can see of each."""

    def __init__(self, engine: OptInEngine, seed: int) -> None:
        self.engine = engine
        self.session = OptInSession(engine)
        self.random = random.Random(seed)
        self.seen: list[Any] = []

    def name(self) -> str:
        return self.random.choice(["Ada", "Bob", "Eve", "Fay", "Gus", "Hal", "Ivy"])

    def place(self) -> int:
        return self.random.randint(1, 3)

    def author(self) -> Author | None:
        return self.session.scalars(
            sa.select(Author).where(Author.name == self.name()).order_by(Author.id)
        ).first()

    def act(self, action: Action) -> None:
        result: Any = None
        try:
            result = action(self)
        except (exc.SQLAlchemyError, self.engine.dialect.loaded_dbapi.Error) as error:
            result = of_error(error)
        self.seen.append((action.__name__, result))
        self.seen.append((len(TRANSACTION_CONNECTIONS), self.session.in_transaction()))
        self.seen.append((len(self.session.new), len(self.session.dirty)))
        if not self.session.in_transaction():
            with self.engine.connect() as connection:
                for table in ("author", "document", "seat"):
                    columns = {"author": "name, age", "document": "title", "seat": "place"}[table]
                    sql = f"SELECT id, {columns} FROM {table} ORDER BY id"
                    self.seen.append([tuple(row) for row in connection.execute(sa.text(sql))])
                dbapi: Any = connection.connection.dbapi_connection
                self.seen.append((dbapi.autocommit, int(dbapi.info.transaction_status)))


def of_error(error: BaseException) -> Any:
    original: Any = getattr(error, "orig", error)
    diagnostics = getattr(original, "diag", None)
    fields = ("sqlstate", "message_primary", "message_detail", "constraint_name", "table_name")
    return (
        type(error).__name__,
        type(original).__name__,
        str(error).splitlines()[0] if diagnostics is None else None,
        [getattr(diagnostics, field, None) for field in fields],
    )


Action: TypeAlias = Callable[[Actor], Any]
ANYWHERE: list[Action] = []
OUTSIDE: list[Action] = []
INSIDE: list[Action] = []


def anywhere(action: Action) -> Action:
    ANYWHERE.append(action)
    return action


def outside(action: Action) -> Action:
    OUTSIDE.append(action)
    return action


def inside(action: Action) -> Action:
    INSIDE.append(action)
    return action


@anywhere
def read(actor: Actor) -> Any:
    return actor.session.scalars(sa.select(Author.name).order_by(Author.id)).all()


@anywhere
def get(actor: Actor) -> Any:
    found = actor.session.get(Author, actor.place())
    return found and (found.name, found.age, len(found.documents))


@anywhere
def add(actor: Actor) -> None:
    actor.session.add(Author(name=actor.name(), age=actor.place()))


@anywhere
def change(actor: Actor) -> None:
    if found := actor.author():
        found.age = actor.random.randint(-1, 5)


@anywhere
def rename(actor: Actor) -> None:
    if found := actor.author():
        found.name = actor.name()


@anywhere
def delete(actor: Actor) -> None:
    if found := actor.author():
        actor.session.delete(found)


@anywhere
def flush(actor: Actor) -> None:
    actor.session.flush()


@anywhere
def commit(actor: Actor) -> None:
    actor.session.commit()


@anywhere
def roll_back(actor: Actor) -> None:
    actor.session.rollback()


@anywhere
def expire(actor: Actor) -> None:
    actor.session.expire_all()


@anywhere
def one_statement(actor: Actor) -> Any:
    return actor.session.execute(
        sa.insert(authors).values(name=actor.name()).returning(authors.c.id)
    ).scalar_one()


@anywhere
def update_where(actor: Actor) -> Any:
    statement = sa.update(Author).where(Author.name == actor.name()).values(age=Author.age - 2)
    result: Any = actor.session.execute(statement)
    return result.rowcount


@anywhere
def wrong_statement(actor: Actor) -> None:
    actor.session.execute(sa.text("SELECT 1 / (id - 2) FROM author"))


@anywhere
def many(actor: Actor) -> None:
    rows = [{"name": actor.name()} for _ in range(actor.place())]
    actor.session.execute(sa.insert(authors), rows)


@anywhere
def many_objects(actor: Actor) -> Any:
    rows = [{"name": f"{actor.name()} {actor.place()}"} for _ in range(3)]
    return actor.session.scalars(sa.insert(Author).returning(Author.name), rows).all()


@anywhere
def bulk_save(actor: Actor) -> None:
    actor.session.bulk_save_objects([Seat(place=actor.place()), Seat(place=actor.place())])


@anywhere
def bulk_insert(actor: Actor) -> None:
    rows = [{"name": actor.name(), "age": 1} for _ in range(2)]
    actor.session.bulk_insert_mappings(Author, rows)


@anywhere
def find_or_create(actor: Actor) -> Any:
    found, created = filter_by_or_create(actor.session, Author, {"name": actor.name()}, {"age": 9})
    return found.name, created


@anywhere
def stream(actor: Actor) -> Any:
    statement = sa.select(Author.name).order_by(Author.id).execution_options(yield_per=2)
    names: list[str] = []
    for name in actor.session.scalars(statement):
        names.append(name)
        if len(names) == 3:
            actor.session.execute(sa.update(authors).values(age=1))
    return names


@anywhere
def stream_in_part(actor: Actor) -> Any:
    statement = sa.select(Author.name).order_by(Author.id).execution_options(yield_per=1)
    result = actor.session.scalars(statement)
    name = result.first()
    result.close()
    return name


@anywhere
def savepoint(actor: Actor) -> None:
    with actor.session.begin_nested():
        actor.session.add(Author(name=actor.name()))


@anywhere
def savepoint_that_fails(actor: Actor) -> None:
    with suppress(exc.IntegrityError), actor.session.begin_nested():
        actor.session.add(Author(name="Ada"))


@anywhere
def nested_savepoints(actor: Actor) -> None:
    with actor.session.begin_nested():
        one_statement(actor)
        with suppress(exc.DBAPIError), actor.session.begin_nested():
            wrong_statement(actor)
        one_statement(actor)


@anywhere
def seat(actor: Actor) -> None:
    actor.session.add(Seat(place=actor.place()))


@anywhere
def move_seats(actor: Actor) -> None:
    actor.session.execute(sa.text("UPDATE seat SET place = 1 + place % 3"))


@anywhere
def deferred(actor: Actor) -> None:
    mode = actor.random.choice(["DEFERRED", "IMMEDIATE"])
    actor.session.execute(sa.text(f"SET CONSTRAINTS ALL {mode}"))


@anywhere
def caught(actor: Actor) -> None:
    with suppress(exc.DBAPIError):
        wrong_statement(actor)


@anywhere
def lock(actor: Actor) -> Any:
    return actor.session.scalars(sa.select(Author.name).order_by(Author.id).with_for_update()).all()


@outside
def begin(actor: Actor) -> None:
    actor.session.begin()


@outside
def begin_read_only(actor: Actor) -> None:
    actor.session.begin(read_only=True)


@outside
def block(actor: Actor) -> None:
    with actor.session.begin():
        add(actor)
        seat(actor)
        change(actor)


@outside
def block_that_raises(actor: Actor) -> None:
    with suppress(KeyError), actor.session.begin():
        one_statement(actor)
        raise KeyError


@outside
def block_of_the_engine(actor: Actor) -> None:
    with actor.engine.begin() as connection:
        connection.execute(sa.insert(authors).values(name=actor.name()))
        with suppress(exc.DBAPIError), connection.begin_nested():
            connection.execute(sa.insert(authors).values(name="Ada"))
        connection.execute(sa.insert(Seat).values(place=actor.place()))


@outside
def connection(actor: Actor) -> None:
    with actor.engine.connect() as connection:
        connection.execute(sa.insert(authors).values(name=actor.name()))
        connection.rollback()
        with connection.begin() as transaction:
            connection.execute(sa.insert(authors).values(name=actor.name()))
            transaction.rollback()


@outside
def raw_connection(actor: Actor) -> None:
    raw = actor.engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("INSERT INTO author (name) VALUES (%s)", (actor.name(),))
        dbapi: Any = raw.dbapi_connection
        dbapi.autocommit = False
        cursor.execute("INSERT INTO seat (place) VALUES (1), (2)")
        actor.random.choice([raw.commit, raw.rollback])()
        cursor.execute("INSERT INTO author (name) VALUES ('lost')")
    finally:
        raw.close()


@outside
def schema(actor: Actor) -> Any:
    metadata = sa.MetaData()
    table = sa.Table("shelf", metadata, sa.Column("id", sa.Integer, primary_key=True))
    metadata.create_all(actor.engine)
    with actor.engine.begin() as connection:
        connection.execute(sa.insert(table).values(id=1))
    names = sa.inspect(actor.engine).get_table_names()
    metadata.drop_all(actor.engine)
    return sorted(names)


@outside
def close(actor: Actor) -> None:
    actor.session.close()


@inside
def leave_by_commit(actor: Actor) -> None:
    actor.session.commit()


@inside
def leave_by_rollback(actor: Actor) -> None:
    actor.session.rollback()


@contextmanager
def log_of_the_engine() -> Iterator[list[str]]:
    """What SQLALCHEMY_ECHO would print, times and addresses left out."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(WORD.sub("", record.getMessage()))

    logger = logging.getLogger("sqlalchemy.engine")
    handler, before = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def play(engine: OptInEngine, seed: int) -> tuple[list[Any], list[str]]:
    """Run a random program; return what was seen, and the log."""
    actor = Actor(engine, seed)
    with log_of_the_engine() as log:
        for _ in range(40):
            more = INSIDE * 4 if actor.session.in_transaction() else OUTSIDE
            actor.act(actor.random.choice(ANYWHERE + more))
        actor.session.close()
    return actor.seen, log


@pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # psycopg's cursors
@pytest.mark.parametrize("seed", range(10))
def test_a_random_program_does_not_notice(url: str, onlooker: Onlooker, seed: int) -> None:
    with opened(url) as engine:
        for_real, log_for_real = play(engine, seed)
    onlooker.run("DROP SCHEMA public CASCADE")
    onlooker.run("CREATE SCHEMA public")
    with opened(url) as engine:
        before = onlooker.column("SELECT xmin::text || name FROM author ORDER BY id")
        with isolate(engine):
            isolated, log = play(engine, seed)
            assert onlooker.names() == []
        assert onlooker.column("SELECT xmin::text || name FROM author ORDER BY id") == before
    for step, (here, there) in enumerate(zip(isolated, for_real, strict=True)):
        assert here == there, (step, isolated[max(0, step - 12) : step + 1])
    assert log == log_for_real


@pytest.fixture
def stock(url: str, engine: OptInEngine) -> Iterator[sa.Engine]:
    """An engine as SQLAlchemy makes it, on the same tables."""
    stock = sa.create_engine(url)
    yield stock
    stock.dispose()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads give up soon."""
    monkeypatch.setattr(fictive_sqlalchemy.testing, "PATIENCE", 0.2)


def names(engine: sa.Engine) -> list[str]:
    """The authors' names, as a new connection sees them, those of the start left out."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(authors.c.name).where(authors.c.id > 3)))


def add_author(engine: sa.Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(authors).values(name=name))


def run(engine: sa.Engine, sql: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(sql))


def scalar(engine: sa.Engine, sql: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(sa.text(sql))


class TestWhatIsSent:
    def test_one_begin_and_one_rollback(self, wire: WireProxy, wire_url: str) -> None:
        with opened(wire_url) as engine:
            pid = scalar(engine, "SELECT pg_backend_pid()")
            with wire.record() as recording, isolate(engine):
                add_author(engine, "Eve")
                with OptInSession(engine) as session:
                    session.add(Author(name="Fay"))
                    session.commit()
                    with pytest.raises(exc.IntegrityError), session.begin():
                        session.add(Author(name="Ada"))
                assert names(engine) == ["Eve", "Fay"]
                assert scalar(engine, "SELECT pg_backend_pid()") == pid
            assert recording.verbs[:2] == ["SHOW", "BEGIN"]
            assert recording.verbs[-1] == "ROLLBACK"
            assert {"COMMIT", "BEGIN", "ROLLBACK"}.isdisjoint(recording.verbs[2:-1])
            assert len({message.connection for message in recording.messages}) == 1
            assert wire.transactions_open == 0
            assert scalar(engine, "SELECT pg_backend_pid()") == pid
            assert names(engine) == []

    def test_a_statement_outside_is_a_savepoint(self, wire: WireProxy, wire_url: str) -> None:
        with opened(wire_url) as engine, isolate(engine), engine.connect() as connection:
            with wire.record() as recording:
                connection.execute(sa.select(authors)).all()
            assert recording.verbs == ["SAVEPOINT", "SELECT", "SELECT", "SET", "SET", "RELEASE"]
            # The one constraint that is deferrable
            assert recording.statements[3] == "SET CONSTRAINTS public.seat_place_key IMMEDIATE"
            assert recording.statements[4] == "SET CONSTRAINTS public.seat_place_key DEFERRED"

    def test_an_onlooker_sees_nothing(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            assert onlooker.names() == []
        assert onlooker.names() == []

    def test_an_exception_in_the_block_undoes_it_too(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with suppress(KeyboardInterrupt), isolate(engine):
            add_author(engine, "Eve")
            raise KeyboardInterrupt
        assert onlooker.names() == names(engine) == []


class TestErrors:
    def test_in_a_block_undoes_that_block_alone(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.add(Author(name="before"))
            session.commit()
            with pytest.raises(exc.IntegrityError), session.begin():
                session.add_all([Author(name="in it"), Author(name="Ada")])
            assert names(engine) == ["before"]
            with session.begin():
                session.add(Author(name="after"))
            assert names(engine) == ["before", "after"]

    def test_outside_undo_that_statement_alone(self, engine: OptInEngine) -> None:
        with isolate(engine), engine.connect() as connection:
            connection.execute(sa.insert(authors).values(name="before"))
            with pytest.raises(exc.IntegrityError):
                connection.execute(sa.insert(authors).values(name="Ada"))
            assert names(engine) == ["before"]

    def test_of_what_is_no_part_of_a_transaction_are_postgresqls(self, engine: OptInEngine) -> None:
        with isolate(engine), engine.connect() as connection:
            add_author(engine, "Eve")
            with pytest.raises(exc.DBAPIError, match="VACUUM cannot run inside a transaction"):
                connection.execute(sa.text("VACUUM author"))
            with pytest.raises(exc.DBAPIError, match="invalid transaction termination"):
                connection.execute(sa.text("DO $$ BEGIN COMMIT; END $$"))
            assert names(engine) == ["Eve"]

    @pytest.mark.parametrize("sql", ["SAVEPOINT mine", "RELEASE mine", "ROLLBACK TO mine"])
    def test_of_a_savepoint_outside_are_as_in_production(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with engine.connect() as connection:
            with pytest.raises(exc.DBAPIError, match="only be used in transaction") as for_real:
                connection.execute(sa.text(sql))
            with isolate_anew(connection, engine):
                with pytest.raises(exc.DBAPIError, match="only be used in transaction") as isolated:
                    connection.execute(sa.text(sql))
                assert type(isolated.value.orig) is type(for_real.value.orig)


@contextmanager
def isolate_anew(connection: sa.Connection, engine: sa.Engine) -> Iterator[None]:
    """Isolate, though a connection of the engine has been used before."""
    connection.invalidate()
    with isolate(engine):
        yield
        connection.invalidate()


class TestDeferredConstraints:
    def test_are_checked_at_the_commit(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as session:
            with session.begin():
                session.add_all([Seat(place=1), Seat(place=2)])
            with session.begin():
                session.execute(sa.text("UPDATE seat SET place = 2 WHERE place = 1"))
                session.execute(sa.text("UPDATE seat SET place = 1 WHERE id = 2"))
            with pytest.raises(exc.IntegrityError, match="seat_place_key"), session.begin():
                session.execute(sa.text("UPDATE seat SET place = 3"))
            with pytest.raises(exc.IntegrityError, match="seat_place_key"):
                session.execute(sa.text("UPDATE seat SET place = 3"))
            places = session.scalars(sa.text("SELECT place FROM seat ORDER BY id")).all()
            assert places == [2, 1]

    def test_of_a_new_table_are_deferred_at_once(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            with engine.begin() as connection:
                connection.execute(
                    sa.text("CREATE TABLE t (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
                )
                connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM t"))

    def test_are_as_declared_in_the_next_transaction(self, engine: OptInEngine) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE t (id int UNIQUE DEFERRABLE INITIALLY IMMEDIATE)")
            with engine.begin() as connection:
                connection.execute(sa.text("SET CONSTRAINTS ALL DEFERRED"))
                connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM t"))
            with engine.begin() as connection:
                with pytest.raises(exc.IntegrityError), connection.begin_nested():
                    connection.execute(sa.text("INSERT INTO t VALUES (1), (1)"))
                connection.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
            with engine.begin() as connection:
                connection.execute(sa.text("INSERT INTO seat (place) VALUES (1), (1)"))
                connection.execute(sa.text("DELETE FROM seat"))

    def test_triggers_fire_once_for_each_commit(self, engine: OptInEngine) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE log (text text)")
            run(
                engine,
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO log VALUES (NEW.name); RETURN NULL; END $$",
            )
            run(
                engine,
                "CREATE CONSTRAINT TRIGGER t AFTER INSERT ON author DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION note()",
            )
            with engine.begin() as connection:
                for name in ("Eve", "Fay"):
                    connection.execute(sa.insert(authors).values(name=name))
                assert connection.scalar(sa.text("SELECT count(*) FROM log")) == 0
            add_author(engine, "Gus")
            with engine.connect() as connection:
                logged = connection.scalars(sa.text("SELECT text FROM log")).all()
            assert logged == ["Eve", "Fay", "Gus"]

    def test_of_one_name_with_one_that_is_not_deferrable(self, engine: OptInEngine) -> None:
        with isolate(engine):
            run(engine, "CREATE TABLE one (id int CONSTRAINT same REFERENCES author)")
            run(
                engine,
                "CREATE TABLE two (id int CONSTRAINT same REFERENCES author "
                "DEFERRABLE INITIALLY DEFERRED)",
            )
            with pytest.raises(exc.IntegrityError):
                run(engine, "INSERT INTO two VALUES (99)")
            run(engine, "INSERT INTO two VALUES (1)")


class TestSeveralTransactions:
    def test_may_read_at_the_same_time(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            one.begin()
            assert one.get(Author, 1)
            two.begin()
            assert two.get(Author, 2)
            one.add(Author(name="one"))
            one.commit()
            two.add(Author(name="two"))
            two.rollback()
            assert names(engine) == ["one"]

    def test_that_would_see_anothers_changes_are_refused(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            with one.begin():
                one.add(Author(name="one"))
                one.flush()
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    two.get(Author, 1)
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    names(engine)
            assert two.get(Author, 1)
            assert names(engine) == ["one"]

    def test_that_a_rollback_would_take_along_are_refused(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            with one.begin():
                one.get(Author, 1, with_for_update=True)
                with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                    two.execute(sa.insert(authors).values(name="audit"))
            assert names(engine) == []

    @pytest.mark.parametrize(
        "sql",
        ["SET LOCAL lock_timeout = 9", "SAVEPOINT mine", "SELECT set_config('my.one', '1', true)"],
    )
    def test_that_have_set_something_are_not_interrupted(
        self, engine: OptInEngine, sql: str
    ) -> None:
        with isolate(engine), engine.begin() as connection:
            connection.execute(sa.text(sql))
            with pytest.raises(exc.InvalidRequestError, match="commit that transaction"):
                names(engine)

    def test_one_that_has_failed_is_in_nobodys_way(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one:
            one.begin()
            one.execute(sa.insert(authors).values(name="undone"))
            with pytest.raises(exc.ProgrammingError):
                one.execute(sa.text("SELECT nothing"))
            add_author(engine, "Eve")
            with pytest.raises(exc.DBAPIError, match="current transaction is aborted") as error:
                one.execute(sa.select(authors))
            assert type(error.value.orig).__name__ == "InFailedSqlTransaction"
            with pytest.raises(exc.PendingRollbackError, match="Nothing of this block was stored"):
                one.commit()
            one.rollback()
            assert names(engine) == ["Eve"]
            one.add(Author(name="Fay"))
            one.commit()
            assert names(engine) == ["Eve", "Fay"]

    def test_reading_a_stream_goes_on_in_anothers_transaction(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as one, OptInSession(engine) as two:
            statement = sa.select(Author).order_by(Author.id).execution_options(yield_per=1)
            with two.begin():
                for author in one.scalars(statement):
                    two.add(Author(name=f"after {author.name}"))
                    two.flush()
            assert names(engine) == ["after Ada", "after Bob", "after Cid"]

    def test_savepoints_in_a_read_only_one(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as session:
            with session.begin(read_only=True):
                names(engine)  # it is parked meanwhile
                for _ in range(2):
                    refused = pytest.raises(exc.DBAPIError, match="read-only transaction")
                    with refused, session.begin_nested():
                        session.execute(sa.text("DELETE FROM document"))
            session.execute(sa.text("DELETE FROM document"))


class TestStockEngines:
    def test_an_open_read_is_in_nobodys_way(self, stock: sa.Engine) -> None:
        with isolate(stock):
            reader = Session(stock)
            assert reader.get(Author, 1)
            with Session(stock) as writer:
                writer.add(Author(name="Eve"))
                writer.commit()
            reader.rollback()
            reader.close()
            assert names(stock) == ["Eve"]

    def test_commit_and_rollback(self, stock: sa.Engine) -> None:
        with isolate(stock):
            with Session(stock) as session:
                session.add(Author(name="Eve"))
                session.commit()
                session.add(Author(name="Fay"))
                session.flush()
                session.rollback()
                session.add(Author(name="Ada"))
                with pytest.raises(exc.IntegrityError):
                    session.commit()
                session.rollback()
                with session.begin_nested():
                    session.add(Author(name="Gus"))
                session.commit()
            assert names(stock) == ["Eve", "Gus"]
        assert names(stock) == []

    def test_autocommit(self, stock: sa.Engine) -> None:
        with isolate(stock):
            options = {"isolation_level": "AUTOCOMMIT"}
            with stock.connect().execution_options(**options) as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                connection.rollback()
            assert names(stock) == ["Eve"]
            with stock.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
                connection.execute(sa.insert(authors).values(name="Fay"))
            assert names(stock) == ["Eve"]

    def test_a_stream(self, stock: sa.Engine) -> None:
        with isolate(stock), Session(stock) as session:
            statement = sa.select(Author.name).execution_options(yield_per=1)
            assert session.scalars(statement).all() == ["Ada", "Bob", "Cid"]


class TestTransactionControl:
    @pytest.mark.parametrize(
        "sql",
        [
            "COMMIT",
            "  /* so */ -- or\n commit work",
            "BEGIN",
            "START TRANSACTION",
            "END",
            "ABORT",
            "ROLLBACK",
            "ROLLBACK WORK",
            "COMMIT AND CHAIN",
            "PREPARE TRANSACTION 'x'",
            "SELECT 1; COMMIT",
            "SELECT ';', $$;$$, E'\\';' ; /* ; */ COMMIT; SELECT 1",
            'SELECT 1 AS "a;b"; ROLLBACK;',
        ],
    )
    def test_as_a_statement_is_refused(self, engine: OptInEngine, sql: str) -> None:
        with isolate(engine):
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                with pytest.raises(exc.InvalidRequestError, match=r"use begin\(\), commit"):
                    connection.exec_driver_sql(sql)
            refused = pytest.raises(exc.InvalidRequestError, match=r"use begin\(\), commit")
            with engine.connect() as connection, refused:
                connection.exec_driver_sql(sql)
            assert names(engine) == ["Eve"]
        assert names(engine) == []

    @pytest.mark.parametrize(
        "sql",
        [
            "SELECT 'COMMIT; COMMIT'",
            "SELECT 1 /* ; COMMIT */",
            "DO $$ BEGIN PERFORM 1; END $$",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
            "PREPARE mine AS SELECT 1",
            'CREATE TABLE "begin" (id int); INSERT INTO "begin" VALUES (1)',
            "",
        ],
    )
    def test_what_only_looks_like_it_is_not(self, engine: OptInEngine, sql: str) -> None:
        with isolate(engine), engine.begin() as connection, suppress(exc.ProgrammingError):
            connection.exec_driver_sql(sql)  # psycopg2 does not like an empty one

    def test_that_gets_past_is_noticed(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        isolation = isolate(engine)
        isolation.__enter__()
        add_author(engine, "Eve")
        raw = engine.raw_connection()
        dbapi: Any = raw.dbapi_connection
        dbapi.isolation.physical.commit()
        for _ in range(2):
            with pytest.raises(exc.InvalidRequestError, match="leave COMMIT and ROLLBACK"):
                raw.cursor().execute("SELECT 1")
        raw.close()
        with pytest.raises(exc.InvalidRequestError, match="was ended in it"):
            isolation.__exit__(None, None, None)
        assert onlooker.names() == ["Eve"]

    def test_two_phase_is_refused(self, engine: OptInEngine) -> None:
        with isolate(engine), engine.connect() as connection:
            with pytest.raises(exc.InvalidRequestError, match="can't be isolated"):
                connection.begin_twophase().__enter__()
            connection.invalidate()


class TestIsolationInIsolation:
    def test_is_undone_at_its_own_end(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            for name in ("Fay", "Gus"):
                with isolate(engine):
                    add_author(engine, name)
                    assert names(engine) == ["Eve", name]
                assert names(engine) == ["Eve"]
            add_author(engine, "Hal")
            assert names(engine) == ["Eve", "Hal"]
        assert names(engine) == []

    def test_has_no_part_of_a_transaction(self, engine: OptInEngine) -> None:
        with isolate(engine):
            isolation = isolate(engine)
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                with pytest.raises(exc.InvalidRequestError, match="has to be around it"):
                    isolation.__enter__()
            assert names(engine) == ["Eve"]

    def test_ends_what_is_open_at_its_end(self, engine: OptInEngine) -> None:
        with isolate(engine), OptInSession(engine) as before:
            before.get(Author, 1)
            with isolate(engine):
                before.begin()
                before.add(Author(name="lost"))
                before.flush()
            assert names(engine) == []
            with pytest.raises(exc.DBAPIError, match="current transaction is aborted"):
                before.execute(sa.select(authors))
            before.rollback()
            before.add(Author(name="Eve"))
            before.commit()
            assert names(engine) == ["Eve"]

    def test_of_a_copy_with_other_options(self, engine: OptInEngine) -> None:
        copy = engine.execution_options(isolation_level="SERIALIZABLE")
        with isolate(engine, copy):
            add_author(copy, "Eve")
            assert names(engine) == ["Eve"]
        with isolate(copy):
            add_author(engine, "Eve")
        assert names(engine) == names(copy) == []


class TestWhatIsRefused:
    def test_another_driver(self) -> None:
        engine = sa.create_engine("sqlite://")
        with pytest.raises(exc.ArgumentError, match="used with pysqlite: leave this engine out"):
            isolate(engine).__enter__()
        engine.dispose()

    def test_asyncio(self) -> None:
        engine = sa.create_engine("postgresql+psycopg_async://")
        with pytest.raises(exc.ArgumentError, match="and asyncio: leave this engine out"):
            isolate(engine).__enter__()

    def test_no_engine(self) -> None:
        for wrong in ([], ["postgresql://"], [None]):
            with pytest.raises(exc.ArgumentError, match="takes engines"):
                isolate(*wrong).__enter__()  # pyright: ignore

    def test_a_connection_in_use(self, engine: OptInEngine) -> None:
        with OptInSession(engine) as session:
            session.get(Author, 1)
            with pytest.raises(exc.InvalidRequestError, match="1 connections to"):
                isolate(engine).__enter__()
            session.give_back()
            with isolate(engine):
                session.execute(sa.delete(Author).where(Author.id == 99))

    def test_one_of_several_undoes_the_others(self, engine: OptInEngine) -> None:
        other = sa.create_engine("sqlite://")
        with pytest.raises(exc.ArgumentError):
            isolate(engine, other).__enter__()
        add_author(engine, "Eve")
        assert checked_out(engine) == 0
        other.dispose()

    def test_a_forked_process(self, engine: OptInEngine) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python 3.12: there are other threads
                child = os.fork()
            if not child:
                try:
                    names(engine)
                except exc.InvalidRequestError as error:
                    os._exit("was forked" in str(error))
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
            assert names(engine) == ["Eve"]


class TestLeftOvers:
    def test_a_session_works_after_the_end(self, engine: OptInEngine) -> None:
        session = OptInSession(engine)
        for _ in range(2):
            with isolate(engine):
                session.add(Author(name="Eve"))
                session.commit()
                assert session.scalars(sa.select(Author)).all()[3].name == "Eve"
            assert len(session.scalars(sa.select(Author)).all()) == 3
            session.give_back()
        session.close()

    def test_a_session_in_a_transaction_says_so(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        session = OptInSession(engine)
        with isolate(engine):
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
        with pytest.raises(exc.PendingRollbackError):
            session.scalars(sa.select(Author)).all()
        session.rollback()
        assert len(session.scalars(sa.select(Author)).all()) == 3
        session.close()
        assert onlooker.names() == []

    def test_a_stock_session_says_so(self, stock: sa.Engine, onlooker: Onlooker) -> None:
        session = Session(stock)
        with isolate(stock):
            session.add(Author(name="Eve"))
            session.flush()
        with pytest.raises(exc.PendingRollbackError):
            session.commit()
        session.rollback()
        assert len(session.scalars(sa.select(Author)).all()) == 3
        session.close()
        assert onlooker.names() == []

    def test_what_is_the_drivers_is_closed(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine):
            raw = engine.raw_connection()
            cursor = raw.cursor()
            stream = engine.connect().execution_options(stream_results=True)
            result = stream.execute(sa.select(authors))
            assert result.fetchone()
        for use in (
            lambda: cursor.execute("INSERT INTO author (name) VALUES ('Eve')"),
            raw.cursor,
            raw.commit,
            lambda: result.fetchall(),
        ):
            with pytest.raises((exc.DBAPIError, engine.dialect.loaded_dbapi.Error)):
                use()
        result.close()
        stream.close()
        raw.close()
        assert onlooker.names() == []

    def test_a_lost_session_is_rolled_back(self, engine: OptInEngine) -> None:
        with isolate(engine):
            for _ in range(3):
                session = OptInSession(engine)
                session.begin()
                session.add(Author(name="Eve"))
                session.flush()
                del session
                gc.collect()
            assert names(engine) == []

    def test_a_disposed_engine_has_no_connection(
        self, url: str, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        mine = create_engine(url)
        with isolate(mine):
            add_author(mine, "Eve")
            mine.dispose()
            assert names(mine) == ["Eve"]
            pid = scalar(mine, "SELECT pg_backend_pid()")
            mine.dispose()
        assert checked_out(mine) == 0
        assert mine.pool.checkedin() == 0  # type: ignore[attr-defined]
        assert onlooker.state(pid) is None
        assert onlooker.names() == []

    @pytest.mark.parametrize("pool", [sa.NullPool, sa.StaticPool, sa.pool.AssertionPool])
    def test_of_other_pools(self, url: str, onlooker: Onlooker, pool: type[sa.Pool]) -> None:
        with opened(url, poolclass=pool) as engine:
            with isolate(engine):
                add_author(engine, "Eve")
                assert names(engine) == ["Eve"]
            assert names(engine) == onlooker.names() == []

    def test_flags_that_connections_start_with(self, url: str, onlooker: Onlooker) -> None:
        with opened(url) as other:
            engine = create_engine(url)

            @event.listens_for(engine, "connect")
            def start(dbapi: Any, record: Any) -> None:
                set_flags(dbapi, "SERIALIZABLE", read_only=True)

            before = flags_of(engine.raw_connection().dbapi_connection)
            gc.collect()
            with isolate(engine):
                with OptInSession(engine) as session:
                    with pytest.raises(exc.DBAPIError, match="read-only"), session.begin():
                        session.execute(sa.text("DELETE FROM document"))
                    with session.begin(read_only=False):
                        session.add(Author(name="Eve"))
                    raw = session.connection().connection.dbapi_connection
                    assert flags_of(raw) == before
                assert names(engine) == ["Eve"]
            raw = engine.raw_connection()
            assert_rests(raw.dbapi_connection, before)
            raw.close()
            assert names(other) == onlooker.names() == []
            engine.dispose()

    def test_an_engine_that_is_read_only_outside(self, url: str) -> None:
        with opened(url, read_only_outside=True) as engine:
            with isolate(engine), OptInSession(engine) as session:
                for _ in range(2):
                    with pytest.raises(exc.InternalError, match="read-only transaction"):
                        session.execute(sa.delete(Author))
                    with session.begin():
                        session.add(Author(name="Eve"))
                        session.flush()
                        session.rollback()
                    session.add(Author(name="Fay"))
                    session.commit()
                    session.execute(sa.insert(Author), [{"name": "Gus"}, {"name": "Hal"}])
                    with session.begin():
                        session.execute(sa.delete(Author).where(Author.id > 3))
                read_only = pytest.raises(exc.InternalError, match="read-only transaction")
                with read_only, session.begin(read_only=True):
                    session.execute(sa.text("DELETE FROM author"))
            read_only = pytest.raises(exc.InternalError, match="read-only transaction")
            with engine.connect() as connection, read_only:
                connection.execute(sa.delete(authors))

    def test_listeners_of_the_pool_are_called(self, engine: OptInEngine, stock: sa.Engine) -> None:
        called: list[str] = []

        def checkout(dbapi: Any, record: Any, proxy: Any) -> None:
            called.append("out")
            dbapi.cursor().execute("SET application_name = 'mine'")

        def checkin(dbapi: Any, record: Any) -> None:
            called.append("in")

        def of_all_pools(dbapi: Any, record: Any) -> None:
            called.append("in any")

        event.listen(sa.Pool, "checkin", of_all_pools)
        for one in (engine, stock):
            event.listen(one, "checkout", checkout)
            event.listen(one, "checkin", checkin)
        try:
            with isolate(engine, stock):
                for one in (engine, stock):
                    called.clear()
                    assert scalar(one, "SHOW application_name") == "mine"
                    assert called == ["out", "in any", "in"]
        finally:
            event.remove(sa.Pool, "checkin", of_all_pools)


class TestThreads:
    def test_have_their_transactions_one_after_the_other(self, engine: OptInEngine) -> None:
        def work(number: int) -> None:
            for turn in range(5):
                with OptInSession(engine) as session:
                    session.get(Author, 1)
                    with session.begin():
                        session.add(Author(name=f"{number} {turn}"))
                        session.flush()
                        session.get(Author, 2)
                    with suppress(exc.IntegrityError), session.begin():
                        session.add(Author(name=f"lost {number} {turn}"))
                        session.flush()
                        session.add(Author(name="Ada"))
                    assert session.scalars(sa.select(Author.name)).all()

        with isolate(engine):
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(work, range(6)))
            assert sorted(names(engine)) == [
                f"{one} {turn}" for one in range(6) for turn in range(5)
            ]

    def test_one_that_waits_for_another_is_told(self, engine: OptInEngine, patience: None) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads, engine.begin() as connection:
            connection.execute(sa.insert(authors).values(name="Eve"))
            with pytest.raises(exc.InvalidRequestError, match="Don't wait for one thread"):
                threads.submit(names, engine).result()

    def test_one_waits_for_the_end_of_another(self, engine: OptInEngine) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads:
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                waiting = threads.submit(add_author, engine, "Fay")
            waiting.result()
            assert names(engine) == ["Eve", "Fay"]

    def test_a_transaction_may_go_from_one_to_another(self, engine: OptInEngine) -> None:
        with isolate(engine), ThreadPoolExecutor(1) as threads, OptInSession(engine) as session:
            with session.begin():
                session.add(Author(name="Eve"))
                threads.submit(session.flush).result()
                threads.submit(session.get, Author, 1).result()
            assert names(engine) == ["Eve"]

    def test_one_that_goes_on_after_the_end_is_told(self, engine: OptInEngine) -> None:
        begun, ended = threading.Event(), threading.Event()

        def work() -> None:
            with engine.begin() as connection:
                connection.execute(sa.insert(authors).values(name="Eve"))
                begun.set()
                assert ended.wait(20)
                connection.execute(sa.insert(authors).values(name="Fay"))

        with ThreadPoolExecutor(1) as threads:
            with isolate(engine):
                working = threads.submit(work)
                assert begun.wait(20)
            ended.set()
            with pytest.raises(exc.SQLAlchemyError):
                working.result()
        assert names(engine) == []

    def test_one_in_a_statement_at_the_end_is_told(
        self, engine: OptInEngine, onlooker: Onlooker, patience: None
    ) -> None:
        isolation = isolate(engine)
        isolation.__enter__()
        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(scalar, engine, "SELECT pg_sleep(1)")
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(1)'"
            deadline = time.monotonic() + 20
            while not onlooker.scalar(sleeping + " AND state = 'active'"):
                assert time.monotonic() < deadline
            with pytest.raises(exc.InvalidRequestError, match="wait for the threads"):
                isolation.__exit__(None, None, None)
            with pytest.raises(exc.OperationalError, match="server closed the connection"):
                working.result()
        assert names(engine) == []

    def test_a_lock_of_another_connection_is_not_waited_for_for_ever(
        self, engine: OptInEngine, stock: sa.Engine, patience: None
    ) -> None:
        with isolate(engine), stock.connect() as other:
            other.execute(sa.text("LOCK TABLE document"))
            with pytest.raises(exc.OperationalError, match="lock timeout"), engine.begin() as mine:
                mine.execute(sa.text("DELETE FROM document"))
            other.rollback()
            run(engine, "DELETE FROM document")


def do_all(engine: OptInEngine) -> None:
    with OptInSession(engine) as session:
        session.add(Author(name="Eve"))
        session.commit()
        with suppress(exc.IntegrityError), session.begin():
            session.add(Author(name="Ada"))
        with session.begin():
            session.get(Author, 1)
            names(engine)
            with suppress(exc.IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
        for _ in session.scalars(sa.select(Author).execution_options(yield_per=2)):
            pass
        session.execute(sa.delete(Author).where(Author.id > 3))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of a stream's cursor
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_at_any_line_leaves_nothing_behind(url: str, onlooker: Onlooker) -> None:
    with opened(url) as engine:
        lost: list[int | None] = []

        def play(at: int | None) -> list[tuple[str, int]]:
            interrupter = Interrupter(at)
            with isolate(engine):
                try:
                    interrupter.run(lambda: do_all(engine))
                except BaseException as raised:
                    if at is None or Interruption not in map(type, chain(raised)):
                        raise
                    raised.__traceback__ = None  # it would keep what had the connection
                gc.collect()
                try:
                    assert set(names(engine)) <= {"Eve"}
                except exc.InvalidRequestError:
                    lost.append(at)
            return interrupter.lines

        play(None)
        lines = play(None)
        ours = str(Path(fictive_sqlalchemy.testing.__file__).parent)
        last = {line: turn for turn, line in enumerate(lines) if line[0].startswith(ours)}
        assert len(last) > 100
        for line, turn in last.items():
            play(turn)
            assert checked_out(engine) == 0, line
            assert onlooker.names() == names(engine) == [], line
        assert len(lost) < 6, lost  # where nobody knows, who goes on is told


class TestLostConnections:
    def test_the_code_under_test_is_told(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.add(Author(name="Eve"))
            session.commit()
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(exc.OperationalError):
                session.execute(sa.select(authors))
            with pytest.raises(exc.InvalidRequestError, match="lost or at its end"):
                session.execute(sa.select(authors))
            with pytest.raises(exc.InvalidRequestError, match="lost or at its end"):
                names(engine)
        assert names(engine) == onlooker.names() == []

    def test_in_a_transaction(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.get(Author, 1)
            pid = backend_pid(session.connection())
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
            onlooker.kill(pid)
            with pytest.raises(exc.OperationalError):
                session.execute(sa.select(authors))
            session.rollback()
            assert not session.in_transaction()
        assert names(engine) == onlooker.names() == []

    def test_at_the_commit(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine), OptInSession(engine) as session:
            session.begin()
            session.add(Author(name="Eve"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(exc.OperationalError):
                session.commit()
            session.rollback()
        assert names(engine) == onlooker.names() == []

    def test_just_before_the_end(self, engine: OptInEngine, onlooker: Onlooker) -> None:
        with isolate(engine):
            add_author(engine, "Eve")
            onlooker.kill(scalar(engine, "SELECT pg_backend_pid()"))
        assert names(engine) == onlooker.names() == []


@pytest.fixture
def raw(engine: OptInEngine) -> Iterator[Any]:
    """A raw connection of an isolated engine."""
    with isolate(engine):
        raw = engine.raw_connection()
        yield raw
        raw.close()


class TestTheDriversConnection:
    def test_autocommit_and_transactions(self, engine: OptInEngine, raw: Any) -> None:
        dbapi = raw.dbapi_connection
        cursor = raw.cursor()
        cursor.execute("INSERT INTO author (name) VALUES ('Eve')")
        assert dbapi.info.transaction_status == 0
        assert names(engine) == ["Eve"]
        dbapi.autocommit = False
        cursor.execute("INSERT INTO author (name) VALUES ('Fay')")
        assert dbapi.info.transaction_status == 2
        with pytest.raises(engine.dialect.loaded_dbapi.ProgrammingError):
            dbapi.autocommit = True
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            cursor.execute("SELECT nothing")
        assert dbapi.info.transaction_status == 3
        raw.rollback()
        assert dbapi.info.transaction_status == 0
        with dbapi.cursor() as cursor:
            cursor.execute("INSERT INTO author (name) VALUES ('Gus')")
        raw.commit()
        assert names(engine) == ["Eve", "Gus"]
        assert not dbapi.closed
        dbapi.close()
        dbapi.close()
        assert dbapi.closed

    def test_the_connection_of_a_cursor_is_no_way_out(
        self, engine: OptInEngine, raw: Any, onlooker: Onlooker
    ) -> None:
        raw.dbapi_connection.autocommit = False
        cursor = raw.cursor()
        cursor.execute("INSERT INTO author (name) VALUES ('Eve')")
        cursor.connection.commit()
        assert onlooker.names() == []
        assert names(engine) == ["Eve"]

    def test_bytes_and_sql_objects(self, engine: OptInEngine, raw: Any) -> None:
        sql = importlib.import_module(f"{engine.dialect.driver}.sql")
        cursor = raw.cursor()
        insert = sql.SQL("INSERT INTO {} (name) VALUES ({})")
        cursor.execute(insert.format(sql.Identifier("author"), sql.Literal("Eve's")))
        cursor.execute(b"INSERT INTO author (name) VALUES ('Fay')")
        assert names(engine) == ["Eve's", "Fay"]
        for commit in (sql.SQL("COMMIT"), b"COMMIT"):
            with pytest.raises(exc.InvalidRequestError, match="COMMIT as a statement"):
                cursor.execute(commit)

    def test_executemany(self, engine: OptInEngine, raw: Any) -> None:
        cursor = raw.cursor()
        insert = "INSERT INTO author (name) VALUES (%s)"
        cursor.executemany(insert, [("Eve",), ("Fay",)])
        with pytest.raises(engine.dialect.loaded_dbapi.IntegrityError):
            cursor.executemany(insert, [("Gus",), ("Ada",)])
        assert names(engine) == ["Eve", "Fay"]

    def test_a_cursor_on_the_server(self, engine: OptInEngine, raw: Any) -> None:
        with pytest.raises(engine.dialect.loaded_dbapi.Error):
            raw.cursor("mine").execute("SELECT 1")
        raw.dbapi_connection.autocommit = False
        cursor = raw.cursor("mine")
        cursor.execute("SELECT name FROM author ORDER BY id")
        assert cursor.fetchone() == ("Ada",)
        assert cursor.fetchmany(1) == [("Bob",)]
        cursor.scroll(-1)
        assert list(cursor) == [("Bob",), ("Cid",)]
        cursor.close()
        with pytest.raises(engine.dialect.loaded_dbapi.Error), raw.cursor("mine") as cursor:
            cursor.execute("SELECT nothing")
        raw.rollback()

    def test_what_can_not_be_isolated_says_so(self, raw: Any) -> None:
        for name in ("tpc_begin", "lobject", "reset", "transaction", "pipeline", "xid"):
            with pytest.raises((exc.InvalidRequestError, AttributeError)):
                getattr(raw.dbapi_connection, name)
        with pytest.raises(AttributeError):
            raw.dbapi_connection.no_such_thing  # noqa: B018


class TestPsycopg2:
    @pytest.fixture(autouse=True)
    def only(self, driver: str) -> None:
        if driver != "psycopg2":
            pytest.skip("for psycopg2")

    def test_copy(self, engine: OptInEngine, raw: Any) -> None:
        cursor = raw.cursor()
        cursor.copy_expert("COPY author (name) FROM STDIN", io.StringIO("Eve\nFay\n"))
        with pytest.raises(engine.dialect.loaded_dbapi.IntegrityError):
            cursor.copy_from(io.StringIO("Gus\nAda\n"), "author", columns=["name"])
        assert names(engine) == ["Eve", "Fay"]
        out = io.StringIO()
        cursor.copy_to(out, "author", columns=["name"])
        assert out.getvalue() == "Ada\nBob\nCid\nEve\nFay\n"
        with pytest.raises(exc.InvalidRequestError, match="COMMIT as a statement"):
            cursor.copy_expert("COMMIT", io.StringIO())

    def test_callproc_and_mogrify(self, raw: Any) -> None:
        cursor = raw.cursor()
        cursor.callproc("abs", [-1])
        assert cursor.fetchone() == (1,)
        assert cursor.mogrify("SELECT %s", (1,)) == b"SELECT 1"

    def test_cursor_classes_and_extras(self, raw: Any) -> None:
        extras = importlib.import_module("psycopg2.extras")
        cursor = raw.cursor(cursor_factory=extras.RealDictCursor)
        assert isinstance(cursor, extras.RealDictCursor)
        cursor.execute("SELECT id, name FROM author WHERE id = %s", (1,))
        assert cursor.fetchall() == [{"id": 1, "name": "Ada"}]
        with raw.cursor(cursor_factory=extras.NamedTupleCursor) as cursor:
            extras.execute_values(
                cursor, "INSERT INTO author (name) VALUES %s", [("Eve",), ("Fay",)], page_size=1
            )
            cursor.execute("SELECT name FROM author")
            assert [row.name for row in cursor] == ["Ada", "Bob", "Cid", "Eve", "Fay"]
        raw.dbapi_connection.cursor_factory = extras.DictCursor
        with raw.cursor() as cursor:
            cursor.execute("SELECT name FROM author")
            assert cursor.fetchone()["name"] == "Ada"

    def test_session_settings(self, raw: Any) -> None:
        dbapi = raw.dbapi_connection
        assert (dbapi.status, dbapi.get_transaction_status()) == (1, 0)
        dbapi.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=False)
        assert (dbapi.isolation_level, dbapi.readonly, dbapi.autocommit) == (
            *("SERIALIZABLE", True),
            False,
        )
        dbapi.cursor().execute("SELECT 1")
        assert (dbapi.status, dbapi.get_transaction_status()) == (2, 2)
        with pytest.raises(exc.InvalidRequestError, match="set_client_encoding"):
            dbapi.set_client_encoding("LATIN1")
        dbapi.set_isolation_level(0)
        assert dbapi.autocommit
        assert dbapi.encoding == "UTF8"
        with dbapi:
            dbapi.readonly = None
            dbapi.cursor().execute("SELECT 1")
        assert not dbapi.closed


class TestPsycopg3:
    @pytest.fixture(autouse=True)
    def only(self, driver: str) -> None:
        if driver != "psycopg":
            pytest.skip("for psycopg 3")

    def test_copy(self, engine: OptInEngine, raw: Any) -> None:
        cursor = raw.cursor()
        with cursor.copy("COPY author (name) FROM STDIN") as copy:
            copy.write_row(["Eve"])
            with pytest.raises(exc.InvalidRequestError, match="in the middle of another one"):
                names(engine)
        refused = pytest.raises(engine.dialect.loaded_dbapi.IntegrityError)
        with refused, cursor.copy("COPY author (name) FROM STDIN") as copy:
            copy.write_row(["Ada"])
        assert names(engine) == ["Eve"]
        with cursor.copy("COPY (SELECT name FROM author WHERE id > %s) TO STDOUT", (3,)) as copy:
            assert b"".join(copy) == b"Eve\n"
        sql = "COPY (SELECT generate_series(1, 99999)) TO STDOUT"
        with suppress(KeyError), cursor.copy(sql) as copy:
            assert copy.read_row() == ("1",)
            raise KeyError  # the rest is cancelled
        assert names(engine) == ["Eve"]

    def test_stream_and_row_factories(self, engine: OptInEngine, raw: Any) -> None:
        rows = importlib.import_module("psycopg.rows")
        cursor = raw.cursor(row_factory=rows.dict_row)
        stream = cursor.stream("SELECT name FROM author WHERE id < %s ORDER BY id", (3,))
        assert next(stream) == {"name": "Ada"}
        assert names(engine) == []
        assert list(stream) == [{"name": "Bob"}]
        raw.dbapi_connection.row_factory = rows.dict_row
        assert raw.dbapi_connection.execute("SELECT 7 AS n").fetchone() == {"n": 7}
        assert raw.dbapi_connection.execute("SELECT 7 AS n", binary=True).fetchall() == [{"n": 7}]
        assert raw.cursor(binary=True).execute("SELECT 7 AS n").fetchone() == {"n": 7}

    def test_cursor_classes(self, raw: Any) -> None:
        psycopg = importlib.import_module("psycopg")
        raw.dbapi_connection.cursor_factory = psycopg.ClientCursor
        cursor = raw.cursor()
        assert isinstance(cursor, psycopg.ClientCursor)
        assert cursor.mogrify("SELECT %s", (1,)) == "SELECT 1"
        assert psycopg.sql.Literal("a'b").as_string(cursor) == "'a''b'"
        assert psycopg.sql.Literal("a'b").as_string(raw.dbapi_connection) == "'a''b'"

    def test_settings(self, raw: Any) -> None:
        dbapi = raw.dbapi_connection
        dbapi.set_autocommit(False)
        dbapi.set_read_only(True)
        dbapi.set_deferrable(True)
        dbapi.set_isolation_level(None)
        with pytest.raises(Exception, match="read-only"):
            dbapi.execute("DELETE FROM document")
        assert dbapi.pgconn.transaction_status == 3
        assert not dbapi.broken
        with pytest.raises(KeyError), dbapi:
            raise KeyError
        assert dbapi.closed
        raw.invalidate()
