"""The same steps on a stock session and on one with ``begin_on_write=True`` come to the same.

Hypothesis chooses the steps. Each is done to SQLAlchemy's own ``Session`` and to an
:class:`.OptInSession`, in two schemas of one database. After each step these have to agree: what
is committed, the results and errors, the states of the objects and the values they hold, and the
events of the session.

``LIKE_STOCK_EXAMPLES=5000 LIKE_STOCK_SEED=7 pytest`` of this file runs more of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from sqlalchemy import event, exc
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import StaticPool

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.library import assert_at_rest

EXAMPLES = int(os.environ.get("LIKE_STOCK_EXAMPLES", "60"))
SEED = os.environ.get("LIKE_STOCK_SEED")

# Not after_begin, which a read calls on stock alone.
EVENTS = ("before_commit", "after_commit", "after_rollback", "after_soft_rollback")


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    age: Mapped[int] = mapped_column(sa.CheckConstraint("age >= 0"), default=1)
    pets: Mapped[list[Pet]] = relationship(
        back_populates="owner", order_by="Pet.id", cascade="all, delete-orphan"
    )


class Pet(Base):
    __tablename__ = "pet"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.Text)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(Owner.id))
    owner: Mapped[Owner] = relationship(back_populates="pets")


OWNERS: Any = Owner.__table__
SHOWN = ("id", "name", "age")


class Left(Exception):
    """Leaves a block."""


class Side:
    """One of the two sessions, its objects by their numbers, and what it tells."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.objects: list[Owner] = []
        self.blocks: list[Any] = []
        self.events: list[str] = []
        for name in EVENTS:
            event.listen(session, name, self._noting(name))

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            self.events.append(name)

        return note

    def know(self, owner: Owner) -> int:
        """Return the number of an object."""
        for number, known in enumerate(self.objects):
            if known is owner:
                return number
        self.objects.append(owner)
        return len(self.objects) - 1

    def shown(self) -> list[object]:
        """Return what can be seen of the objects without a statement."""
        return [_seen(self.session, owner) for owner in self.objects]

    def step(self, name: str, *arguments: Any) -> object:
        """Do one step; return what came of it."""
        try:
            return getattr(self, name)(*arguments)
        except Left:
            return "left"
        except exc.DBAPIError as error:
            return "error", type(error.orig).__name__
        except exc.PendingRollbackError:
            return "pending rollback"
        except Exception as error:
            return "error", type(error).__name__

    # The steps. Those that take a number take that of an object.

    def add(self, name: str, age: int) -> None:
        owner = Owner(name=name, age=age)
        self.objects.append(owner)
        self.session.add(owner)

    def add_again(self, number: int) -> None:
        self.session.add(self.objects[number])

    def add_pet(self, number: int, name: str) -> None:
        self.objects[number].pets.append(Pet(name=name))

    def remove_pet(self, number: int) -> None:
        self.objects[number].pets.pop()

    def pets(self, number: int) -> object:
        return [pet.name for pet in self.objects[number].pets]

    def rename(self, number: int, name: str) -> None:
        self.objects[number].name = name

    def set_age(self, number: int, age: int) -> None:
        self.objects[number].age = age

    def read(self, number: int) -> object:
        owner = self.objects[number]
        return owner.id, owner.name, owner.age

    def delete(self, number: int) -> None:
        self.session.delete(self.objects[number])

    def expire(self, number: int) -> None:
        self.session.expire(self.objects[number])

    def refresh(self, number: int, locks: bool) -> None:
        self.session.refresh(self.objects[number], with_for_update=locks or None)

    def expunge(self, number: int) -> None:
        self.session.expunge(self.objects[number])

    def merge(self, number: int, name: str) -> object:
        return self.know(self.session.merge(Owner(id=number, name=name, age=3)))

    def flush(self) -> None:
        self.session.flush()

    def commit(self) -> None:
        self.session.commit()

    def rollback(self) -> None:
        self.session.rollback()

    def close(self) -> None:
        self.session.close()

    def expire_all(self) -> None:
        self.session.expire_all()

    def savepoint(self) -> None:
        block = self.session.begin_nested()
        block.__enter__()
        self.blocks.append(block)

    def begin(self) -> None:
        block = self.session.begin()
        block.__enter__()
        self.blocks.append(block)

    def leave(self, fails: bool) -> None:
        if self.blocks:
            error = Left() if fails else None
            self.blocks.pop().__exit__(error and type(error), error, None)

    def end_savepoint(self, commits: bool) -> None:
        savepoint = self.session.get_nested_transaction()
        if savepoint is not None:
            (savepoint.commit if commits else savepoint.rollback)()

    def query(self, kind: str) -> object:
        select = sa.select(Owner).order_by(Owner.id)
        if kind == "lock":
            select = select.with_for_update()
        elif kind == "populate_existing":
            select = select.execution_options(populate_existing=True)
        elif kind == "stream":
            select = select.execution_options(yield_per=1)
        elif kind == "no_autoflush":
            with self.session.no_autoflush:
                return [self.know(owner) for owner in self.session.scalars(select)]
        return [self.know(owner) for owner in self.session.scalars(select)]

    def get(self, key: int, locks: bool) -> object:
        owner = self.session.get(Owner, key, with_for_update=locks or None)
        return None if owner is None else self.know(owner)

    def rows(self, kind: str) -> object:
        if kind == "text":
            return self.session.execute(sa.text("SELECT id, name FROM owner ORDER BY id")).all()
        if kind == "count":
            return self.session.query(Owner).count()
        select = sa.select(OWNERS.c.id, OWNERS.c.name).order_by(OWNERS.c.id)
        if kind == "connection":
            return self.session.connection().execute(select).all()
        if kind == "driver":
            update = "UPDATE owner SET age = age + 1"
            return self.session.connection().exec_driver_sql(update).rowcount
        return self.session.execute(select).all()

    def update(self, name: str, age: int, synchronizes: Any) -> object:
        update = sa.update(Owner).where(Owner.name == name).values(age=age)
        options = {"synchronize_session": synchronizes}
        result: Any = self.session.execute(update, execution_options=options)
        return result.rowcount

    def update_by_key(self, number: int, age: int) -> None:
        self.session.execute(sa.update(Owner), [{"id": number, "age": age}])

    def query_update(self, name: str, age: int, synchronizes: Any) -> object:
        query = self.session.query(Owner).filter(Owner.name == name)
        return query.update({"age": age}, synchronize_session=synchronizes)

    def delete_where(self, name: str, synchronizes: Any) -> object:
        delete = sa.delete(Owner).where(Owner.name == name)
        options = {"synchronize_session": synchronizes}
        result: Any = self.session.execute(delete, execution_options=options)
        return result.rowcount

    def insert(self, names: list[str], age: int, kind: str) -> object:
        dicts: list[Any] = [{"name": name, "age": 1} for name in names]
        dicts[-1]["age"] = age
        if kind == "returning":
            rows = self.session.scalars(sa.insert(Owner).returning(Owner), dicts)
            return [self.know(owner) for owner in rows]
        if kind == "orm":
            self.session.execute(sa.insert(Owner), dicts)
        elif kind == "values":
            self.session.execute(sa.insert(Owner).values(dicts))
        elif kind == "table":
            self.session.execute(sa.insert(OWNERS), dicts)
        elif kind == "text":
            insert = sa.text("INSERT INTO owner (name, age) VALUES (:name, :age)")
            self.session.execute(insert, dicts)
        elif kind == "cte":
            inserted = sa.insert(OWNERS).values(dicts[0]).returning(OWNERS.c.name).cte("inserted")
            return self.session.scalars(sa.select(inserted.c.name)).all()
        elif kind == "mappings":
            self.session.bulk_insert_mappings(sa.inspect(Owner), dicts)
        else:
            self.session.bulk_save_objects([Owner(**values) for values in dicts])
        return None

    def update_mappings(self, numbers: list[int], age: int) -> None:
        dicts: list[Any] = [{"id": number, "age": 2} for number in numbers]
        dicts[-1]["age"] = age
        self.session.bulk_update_mappings(sa.inspect(Owner), dicts)

    def text(self, sql: str) -> object:
        result: Any = self.session.execute(sa.text(sql))
        return result.all() if result.returns_rows else result.rowcount


def _seen(session: Session, owner: Owner) -> object:
    state: Any = sa.inspect(owner)
    where = [
        name
        for name in ("transient", "pending", "persistent", "deleted", "detached")
        if getattr(state, name)
    ]
    held = {name: value for name, value in vars(owner).items() if name in SHOWN}
    return where, held, owner in session.new, owner in session.dirty, owner in session.deleted


numbers = st.integers(0, 5)
names = st.sampled_from("abcd")
ages = st.sampled_from((0, 1, 2, 2, 2, -1))
synchronizes = st.sampled_from(("auto", "evaluate", "fetch", False))

TEXTS = (
    "UPDATE owner SET age = age + 1",
    "DELETE FROM owner WHERE name = 'a' AND id NOT IN (SELECT owner_id FROM pet)",
    "WITH w AS (UPDATE owner SET age = 7 WHERE name = 'b' RETURNING id) SELECT count(*) FROM w",
    "INSERT INTO owner (name, age) VALUES ('e', -1)",
    "SELECT name FROM owner WHERE name = 'a' FOR UPDATE",
    "SELECT raised(1)",
    "CREATE TABLE IF NOT EXISTS extra (id int)",
    "DROP TABLE IF EXISTS extra",
)

steps = st.one_of(
    st.tuples(st.just("add"), names, ages),
    st.tuples(st.just("add"), names, ages),
    st.tuples(st.sampled_from(("add_again", "delete", "expire", "expunge", "read")), numbers),
    st.tuples(st.sampled_from(("remove_pet", "pets", "delete", "read")), numbers),
    st.tuples(st.sampled_from(("rename", "add_pet", "merge")), numbers, names),
    st.tuples(st.just("rename"), numbers, names),
    st.tuples(st.just("set_age"), numbers, ages),
    st.tuples(st.just("set_age"), numbers, ages),
    st.tuples(st.just("refresh"), numbers, st.booleans()),
    st.tuples(st.sampled_from(("flush", "commit", "rollback"))),
    st.tuples(st.sampled_from(("flush", "commit", "rollback"))),
    st.tuples(st.sampled_from(("close", "expire_all", "savepoint", "savepoint"))),
    st.tuples(st.sampled_from(("commit", "rollback", "begin", "begin"))),
    st.tuples(st.sampled_from(("leave", "end_savepoint")), st.booleans()),
    st.tuples(
        st.just("query"),
        st.sampled_from(("plain", "lock", "populate_existing", "stream", "no_autoflush")),
    ),
    st.tuples(st.just("get"), st.integers(1, 5), st.booleans()),
    st.tuples(st.just("rows"), st.sampled_from(("text", "count", "connection", "driver", "core"))),
    st.tuples(st.sampled_from(("update", "query_update")), names, ages, synchronizes),
    st.tuples(st.just("update_by_key"), st.integers(1, 5), ages),
    st.tuples(st.just("delete_where"), names, synchronizes),
    st.tuples(
        st.just("insert"),
        st.lists(names, min_size=1, max_size=3, unique=True),
        ages,
        st.sampled_from(
            ("returning", "orm", "values", "table", "text", "cte", "mappings", "objects")
        ),
    ),
    st.tuples(
        st.just("update_mappings"), st.lists(st.integers(1, 4), min_size=1, max_size=2), ages
    ),
    st.tuples(st.just("text"), st.sampled_from(TEXTS)),
)

#: Those whose first argument is the number of an object.
OF_OBJECTS = frozenset(
    (
        *("add_again", "delete", "expire", "expunge", "read", "rename", "set_age", "refresh"),
        *("add_pet", "remove_pet", "pets"),
    )
)


class Fixture(NamedTuple):
    stock: sa.Engine
    ours: OptInEngine
    control: sa.Engine

    def stored(self) -> tuple[object, object]:
        """Return what is committed in each schema."""
        with self.control.connect() as connection:
            stock, ours = (
                (
                    connection.execute(sa.text(f"SELECT * FROM {schema}.owner ORDER BY id")).all(),
                    connection.execute(sa.text(f"SELECT * FROM {schema}.pet ORDER BY id")).all(),
                    connection.scalar(sa.text(f"SELECT to_regclass('{schema}.extra') IS NULL")),
                )
                for schema in ("stock", "ours")
            )
        return stock, ours

    def clear(self) -> None:
        """Empty the tables."""
        with self.control.connect() as connection:
            for schema in ("stock", "ours"):
                connection.execute(
                    sa.text(
                        f"TRUNCATE {schema}.owner, {schema}.pet RESTART IDENTITY;"
                        f"DROP TABLE IF EXISTS {schema}.extra"
                    )
                )


RAISED = """
CREATE FUNCTION raised(by int) RETURNS bigint LANGUAGE sql AS
$$ WITH u AS (UPDATE owner SET age = age + by RETURNING id) SELECT count(*) FROM u $$
"""


@pytest.fixture
def fixture(url: str) -> Iterator[Fixture]:
    in_schema: Any = sa.make_url(url)
    control = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=StaticPool)
    stock = sa.create_engine(in_schema.update_query_dict({"options": "-csearch_path=stock"}))
    ours = create_engine(in_schema.update_query_dict({"options": "-csearch_path=ours"}))
    with control.connect() as connection:
        for schema, engine in (("stock", stock), ("ours", ours)):
            connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
            Base.metadata.create_all(engine)
            with engine.begin() as own:
                own.execute(sa.text(RAISED))
    try:
        yield Fixture(stock, ours, control)
        assert_at_rest(ours)
    finally:
        for engine in (stock, ours, control):
            engine.dispose()


def run(fixture: Fixture, sequence: list[tuple[Any, ...]], options: dict[str, Any]) -> None:
    """Do the steps on both sides, and compare after each."""
    fixture.clear()
    stock = Side(Session(fixture.stock, **options))
    ours = Side(OptInSession(fixture.ours, begin_on_write=True, **options))
    done: list[object] = []
    try:
        for name, *arguments in [*sequence, ("commit",)]:
            if name in OF_OBJECTS:
                if not stock.objects:
                    continue
                arguments[0] %= len(stock.objects)
            if name == "rollback" and not stock.session.in_transaction():
                continue  # a stock one does nothing then; ours forgets, row 11
            if name == "begin" and (
                stock.session.in_transaction() or ours.session.in_transaction()
            ):
                continue  # on stock a read has begun it, too
            results = stock.step(name, *arguments), ours.step(name, *arguments)
            done.append((name, *arguments, results))
            if results[1] == "pending rollback" and name in ("commit", "leave", "end_savepoint"):
                # Stock loses without a word what was done in a transaction that is aborted.
                return
            assert results[0] == results[1], done
            assert stock.shown() == ours.shown(), done
            assert stock.events == ours.events, done
            stored = fixture.stored()
            assert stored[0] == stored[1], done
    finally:
        for side in (stock, ours):
            side.blocks.clear()
            side.session.close()


@pytest.mark.parametrize("expires", [True, False])
def test_the_same_steps_come_to_the_same_as_on_stock(fixture: Fixture, expires: bool) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(sequence=st.lists(steps, min_size=3, max_size=20))
    def check(sequence: list[tuple[Any, ...]]) -> None:
        run(fixture, sequence, {"expire_on_commit": expires})

    (check if SEED is None else seed(int(SEED))(check))()


WRITES_FIRST: list[list[tuple[Any, ...]]] = [
    [("add", "a", 1), ("flush",), ("query", "plain"), ("commit",), ("add", "b", 1), ("commit",)],
    [("insert", ["a", "b"], 1, "table"), ("query", "plain"), ("rollback",), ("add", "c", 1)],
    [("savepoint",), ("add", "a", 1), ("leave", True), ("add", "b", 1), ("commit",)],
    [("add", "a", 1), ("savepoint",), ("add", "b", -1), ("leave", False), ("rollback",)],
    [("insert", ["a"], -1, "mappings"), ("commit",), ("rollback",), ("insert", ["a"], 1, "orm")],
    [("begin",), ("add", "a", 1), ("commit",), ("leave", False), ("add", "b", 1), ("flush",)],
    [("add", "a", 1), ("flush",), ("close",), ("add", "b", 1), ("flush",), ("delete", 1)],
    [("text", "UPDATE owner SET age = 3"), ("add", "a", -1), ("flush",), ("rollback",)],
]


@pytest.mark.parametrize("sequence", WRITES_FIRST)
def test_after_begin_comes_as_on_stock_where_a_write_is_first(
    fixture: Fixture, sequence: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "EVENTS", (*EVENTS, "after_begin"))
    run(fixture, sequence, {})
