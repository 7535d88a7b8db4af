"""A program that runs under ``isolate()`` sees what it sees without it."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from fictive_sqlalchemy.testing import isolate
from tests.library import Author, Onlooker, Seat, authors, opened

WORD = re.compile(r"0x[0-9a-f]+|\[.*?\] |pid \d+")


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
def test_a_random_program_does_not_notice_isolation(
    url: str, onlooker: Onlooker, seed: int
) -> None:
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
