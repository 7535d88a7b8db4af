"""The private names of SQLAlchemy, which are in ``_core/sqlalchemy_private.py`` and nowhere else.

Each name has a test, which fails when the name goes, when its parameters change, or when SQLAlchemy
no longer calls it where the package relies on it. The tests use SQLAlchemy alone, on SQLite.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sqlite3
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any, NoReturn, cast

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    Session,
    SessionTransaction,
    configure_mappers,
    mapped_column,
    relationship,
)
from sqlalchemy.util import greenlet_spawn

from fictive_sqlalchemy import OptInConnection, OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy._core.blocks import OptInSessionTransaction
from fictive_sqlalchemy._core.sqlalchemy_private import forget_addition
from tests.library import Note, NoteBase
from tests.private_names import PACKAGE, is_private, names_with_a_test, parameters, used_in

greenlet: Any = import_module("greenlet")  # has no types
SEAM = PACKAGE / "_core" / "sqlalchemy_private.py"

#: Names that only look like one of SQLAlchemy's: theirs is an attribute of another class.
OUR_OWN = {"_close", "_commit", "_iter", "_savepoint", "_state"}


@pytest.fixture
def engine() -> Iterator[sa.Engine]:
    engine = sa.create_engine("sqlite://")
    NoteBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


class ListBase(DeclarativeBase):
    pass


class Owner(ListBase):
    __tablename__ = "owner"

    id: Mapped[int] = mapped_column(primary_key=True)
    items: Mapped[list[Item]] = relationship(back_populates="owner")
    parts: Mapped[list[Part]] = relationship(cascade="all, delete-orphan")


class Item(ListBase):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("owner.id"))
    owner: Mapped[Owner | None] = relationship(back_populates="items")


class Part(ListBase):
    """Deleted when its owner gives it away."""

    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("owner.id"))


class SpyConnection(sa.Connection):
    """Writes down which of the names are called."""

    called: list[str]

    def __init__(self, engine: sa.Engine) -> None:
        self.called = []
        super().__init__(engine)

    def _autobegin(self) -> None:
        self.called.append("_autobegin")
        super()._autobegin()

    def _handle_dbapi_exception(self, *args: Any, **kw: Any) -> NoReturn:
        self.called.append("_handle_dbapi_exception")
        super()._handle_dbapi_exception(*args, **kw)

    def _rollback_impl(self) -> None:
        self.called.append("_rollback_impl")
        super()._rollback_impl()

    def _run_ddl_visitor(self, *args: Any, **kwargs: Any) -> None:
        self.called.append("_run_ddl_visitor")
        super()._run_ddl_visitor(*args, **kwargs)

    def _log_info(self, message: str, *arg: Any, **kw: Any) -> None:
        self.called.append(f"_log_info {message}")
        super()._log_info(message, *arg, **kw)

    def _safe_close_cursor(self, cursor: Any) -> None:
        self.called.append("_safe_close_cursor")
        super()._safe_close_cursor(cursor)


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[SpyConnection]:
    connection = SpyConnection(engine)
    yield connection
    connection.close()


class TestConnection:
    def test__autobegin(self, connection: SpyConnection) -> None:
        """What begins unasked, and the one place that does."""
        assert parameters(sa.Connection._autobegin) == ["self"]
        connection.execute(sa.text("SELECT 1"))
        assert connection.called.count("_autobegin") == 1
        assert connection.in_transaction()

    def test__dbapi_connection(self, connection: SpyConnection) -> None:
        """Without it a ``Connection`` is invalidated, not closed, and takes a new one."""
        held: Any = connection._dbapi_connection
        assert held.dbapi_connection is not None
        connection._dbapi_connection = None
        assert connection.invalidated
        assert not connection.closed
        held.close()
        assert connection.scalar(sa.text("SELECT 1")) == 1
        assert connection._dbapi_connection is not None

    def test__execution_options(self, connection: SpyConnection) -> None:
        """All execution options: what was given before can be put back."""
        before = connection._execution_options
        connection.execution_options(mine=1)
        assert connection.get_execution_options() == {"mine": 1}
        connection._execution_options = before
        assert connection.get_execution_options() == {}

    def test__message_formatter(self, connection: SpyConnection) -> None:
        """What the execution option ``logging_token`` makes of the messages of the log."""
        before: Any = connection._message_formatter
        connection.execution_options(logging_token="mine")
        after: Any = connection._message_formatter
        assert before is None
        assert "mine" in after("said")

    def test__safe_close_cursor(self, connection: SpyConnection) -> None:
        """Called when a result has been read to its end, and when it is closed."""
        assert parameters(sa.Connection._safe_close_cursor) == ["self", "cursor"]
        connection.execute(sa.text("SELECT 1")).all()
        assert connection.called.count("_safe_close_cursor") == 1
        connection.execute(sa.text("SELECT 1")).close()
        assert connection.called.count("_safe_close_cursor") == 2

    def test__log_info(self, connection: SpyConnection, engine: sa.Engine) -> None:
        """Called with what SQLAlchemy says of transactions, in these words."""
        assert parameters(sa.Connection._log_info) == ["self", "message", "arg", "kw"]
        engine.echo = True
        connection._echo = True
        with connection.begin():
            pass
        connection.begin().rollback()
        assert [name for name in connection.called if name.startswith("_log_info")] == [
            *("_log_info BEGIN (implicit)", "_log_info COMMIT"),
            *("_log_info BEGIN (implicit)", "_log_info ROLLBACK"),
        ]
        engine.echo = False

    def test__handle_dbapi_exception(self, connection: SpyConnection) -> None:
        """Called with each error of the driver, to raise SQLAlchemy's error in its place."""
        names = parameters(sa.Connection._handle_dbapi_exception)
        assert names[:5] == ["self", "e", "statement", "parameters", "cursor"]
        with pytest.raises(DBAPIError):
            connection.execute(sa.text("SELECT nothing FROM nowhere"))
        assert connection.called.count("_handle_dbapi_exception") == 1

    def test__rollback_impl(self, connection: SpyConnection) -> None:
        """Called at a rollback, and after an error where no transaction is."""
        assert parameters(sa.Connection._rollback_impl) == ["self"]
        connection.begin().rollback()
        assert connection.called.count("_rollback_impl") == 1
        connection._autobegin = lambda: None  # type: ignore[method-assign]
        with pytest.raises(DBAPIError):
            connection.execute(sa.text("SELECT nothing FROM nowhere"))
        assert connection.called.count("_rollback_impl") == 2

    def test__handle_dbapi_exception_noconnection(self, connection: SpyConnection) -> None:
        """Raises the error of a connection that could not be made as SQLAlchemy's own."""
        handle = connection._handle_dbapi_exception_noconnection
        assert parameters(handle)[:3] == ["e", "dialect", "engine"]
        error = sqlite3.OperationalError("unable to open database file")
        with pytest.raises(OperationalError, match="unable to open") as raised:
            handle(error, connection.dialect, connection.engine)
        assert raised.value.orig is error

    def test__run_ddl_visitor(self, connection: SpyConnection) -> None:
        """What ``create_all()``, ``drop_all()``, ``create()`` and ``drop()`` call."""
        names = parameters(sa.Connection._run_ddl_visitor)
        assert names == ["self", "visitorcallable", "element", "kwargs"]
        NoteBase.metadata.drop_all(connection)
        NoteBase.metadata.create_all(connection)
        NoteBase.metadata.tables["note"].drop(connection)
        assert connection.called.count("_run_ddl_visitor") == 3


class SpySession(Session):
    """Writes down which of the names are called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.called: list[str] = []
        super().__init__(*args, **kwargs)

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **kw: Any) -> Any:
        self.called.append("_connection_for_bind")
        return super()._connection_for_bind(engine, execution_options, **kw)

    def _flush(self, objects: Any = None) -> None:
        self.called.append("_flush")
        super()._flush(*([] if objects is None else [objects]))


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[SpySession]:
    with SpySession(engine) as session:
        yield session


class TestSession:
    def test__connection_for_bind(self, session: SpySession) -> None:
        """Where ``execute()`` and ``connection()`` get a connection, before one is begun."""
        names = parameters(Session._connection_for_bind)
        assert names == ["self", "engine", "execution_options", "kw"]
        session.execute(sa.select(Note))
        session.connection()
        session.get(Note, 1)
        assert session.called.count("_connection_for_bind") == 3

    def test__is_clean(self, session: SpySession) -> None:
        """Whether there is nothing to flush."""
        assert parameters(Session._is_clean) == ["self"]
        assert session._is_clean()
        note = Note(text="new")
        session.add(note)
        assert not session._is_clean()
        session.flush()
        assert session._is_clean()
        note.text = "changed"
        assert not session._is_clean()
        session.flush()
        session.delete(note)
        assert not session._is_clean()

    def test__transaction(self, session: SpySession, connection: SpyConnection) -> None:
        """The innermost transaction of a session, and the outermost one of a connection."""
        outermost = [session._transaction, connection._transaction]
        assert outermost == [None, None]
        begun = session.begin()
        assert session._transaction is begun is session.get_transaction()
        savepoint = session.begin_nested()
        assert session._transaction is savepoint is session.get_nested_transaction()
        savepoint.rollback()
        assert session._transaction is begun
        root = connection.begin()
        connection.begin_nested()
        assert connection._transaction is root is connection.get_transaction()

    def test__new(self, session: SpySession) -> None:
        """The states of the objects that ``new`` has."""
        session.add(note := Note(text="new"))
        assert list(session._new) == [sa.inspect(note)]
        session.flush()
        assert not session._new

    def test__deleted(self, session: SpySession) -> None:
        """The states of the objects that ``deleted`` has."""
        session.add(note := Note(text="new"))
        session.flush()
        session.delete(note)
        assert list(session._deleted) == [sa.inspect(note)]
        session.flush()
        assert not session._deleted

    def test__modified(self, session: SpySession) -> None:
        """The states of the objects that ``dirty`` has; those that are deleted may be there."""
        session.add_all([note := Note(text="one"), Note(text="two")])
        session.flush()
        assert not session.identity_map._modified
        note.text = "changed"
        assert list(session.identity_map._modified) == [sa.inspect(note)]
        session.flush()
        assert not session.identity_map._modified

    def test__flush(self, session: SpySession) -> None:
        """Writes some objects alone, and reads which these are after ``before_flush``."""

        class Read(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                read.append("read")
                return super().__iter__()

        read: list[str] = []
        event.listen(session, "before_flush", lambda *args: read.append("before_flush"))
        one, other = Note(text="one"), Note(text="other")
        session.add_all([one, other])
        flush_without_a_warning = inspect.unwrap(Session._flush)
        assert parameters(flush_without_a_warning) == ["self", "objects"]
        session._flushing = True  # as flush() does around it
        flush_without_a_warning(session, Read([one]))
        session._flushing = False
        assert read == ["before_flush", "read"]
        assert (one in session.new, other in session.new) == (False, True)
        session.flush()
        assert session.called == ["_flush"]

    def test__pending_mutations(self, session: SpySession) -> None:
        """What is to be added to a collection once it is loaded."""
        ListBase.metadata.create_all(session.connection())
        owner = Owner()
        session.add(owner)
        session.commit()
        item = Item(owner=owner)
        pending = sa.inspect(owner)._pending_mutations["items"]
        assert item in pending.added_items
        forget_addition(owner, "items", item)
        assert owner.items == []

    def test__expunge_states(self, session: SpySession) -> None:
        """Takes one object out of the session, and not what is related to it."""
        note = Note(text="one")
        session.add(note)
        session.commit()
        session._expunge_states([sa.inspect(note)])
        assert note not in session
        assert sa.inspect(note).detached

    def test__trans_context_manager(self, session: SpySession) -> None:
        """Set inside a block, also when its transaction has ended."""
        assert session._trans_context_manager is None
        with session.begin() as transaction:
            assert session._trans_context_manager is transaction
            session.commit()
            assert session._trans_context_manager is transaction
            with pytest.raises(InvalidRequestError, match="context manager"):
                session.execute(sa.select(Note))
        assert session._trans_context_manager is None
        # Blocks out of order: back at the block around, though that was left before.
        outer = session.begin().__enter__()
        inner = session.begin_nested().__enter__()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        assert session._trans_context_manager is outer
        session._trans_context_manager = None
        assert session.scalars(sa.select(Note)).all() == []


class TestSessionTransaction:
    def test__restore_snapshot(self, engine: sa.Engine) -> None:
        """What gives objects back what they were, after a flush that failed, too."""
        assert parameters(SessionTransaction._restore_snapshot) == ["self", "dirty_only"]
        with Session(engine) as session:
            transaction = session.begin()
            session.add(Note(id=1))  # no text
            with pytest.raises(IntegrityError):
                session.flush()
            session.add(Note(text="changed after it"))
            transaction._restore_snapshot(dirty_only=False)
            assert not session.new

    def test__connection_for_bind(self, engine: sa.Engine) -> None:
        """Where both a flush and a statement get the connection of a transaction."""
        names = parameters(SessionTransaction._connection_for_bind)
        assert names == ["self", "bind", "execution_options"]
        called: list[Any] = []

        class Spy(SessionTransaction):
            def _connection_for_bind(self, bind: Any, execution_options: Any) -> Any:
                called.append(bind)
                return super()._connection_for_bind(bind, execution_options)

        with Session(engine) as session:

            @event.listens_for(session, "after_transaction_create")
            def spy(session: Session, transaction: SessionTransaction) -> None:
                transaction.__class__ = Spy

            session.add(Note(text="new"))
            session.flush()
            assert called[0] is engine
            called.clear()
            session.execute(sa.select(Note))
            assert called == [engine]

    def test__prepare_impl(self, engine: sa.Engine) -> None:
        """What comes before the first COMMIT, the flush included."""
        assert parameters(SessionTransaction._prepare_impl) == ["self"]
        called: list[str] = []

        class Spy(SessionTransaction):
            def _prepare_impl(self) -> None:
                super()._prepare_impl()
                called.append("prepared")

        with Session(engine) as session:

            @event.listens_for(session, "after_transaction_create")
            def spy(session: Session, transaction: SessionTransaction) -> None:
                if transaction.parent is None:
                    transaction.__class__ = Spy

            event.listen(session, "after_flush", lambda *_: called.append("flushed"))
            event.listen(engine, "commit", lambda *_: called.append("COMMIT"))
            session.add(Note(text="new"))
            session.commit()
        assert called == ["flushed", "prepared", "COMMIT"]


class TestMapper:
    def test__is_orphan(self, session: SpySession, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whether no object owns one any more; a flush asks it which changed ones to delete."""
        is_orphan = Mapper._is_orphan
        assert parameters(is_orphan) == ["self", "state"]
        ListBase.metadata.create_all(session.connection())
        owner = Owner(items=[Item()], parts=[Part(), Part()])
        session.add(owner)
        session.commit()
        item, (lost, kept) = owner.items.pop(), owner.parts
        owner.parts.remove(lost)
        lost.owner_id = cast(Any, None)  # a flush asks of what has changed
        states: list[Any] = [sa.inspect(instance) for instance in (owner, item, lost, kept)]
        found = [state.mapper._is_orphan(state) for state in states]
        assert found == [False, False, True, False]
        asked: list[Any] = []

        def spy(mapper: Mapper[Any], state: Any) -> bool:
            asked.append(state.obj())
            return is_orphan(mapper, state)

        monkeypatch.setattr(Mapper, "_is_orphan", spy)
        session.flush()
        assert lost in asked
        assert session.scalars(sa.select(Part)).all() == [kept]

    def test__delete_orphans(self) -> None:
        """What can make orphans of a class; it grows with a relationship that is added later."""

        class Base(DeclarativeBase):
            pass

        class Leaf(Base):
            __tablename__ = "leaf"
            id: Mapped[int] = mapped_column(primary_key=True)
            tree_id: Mapped[int | None] = mapped_column(sa.ForeignKey("tree.id"))

        class Tree(Base):
            __tablename__ = "tree"
            id: Mapped[int] = mapped_column(primary_key=True)

        mapper: Any = sa.inspect(Leaf)
        configure_mappers()
        rules = mapper._delete_orphans
        assert not rules
        sa.inspect(Tree).add_property("leaves", relationship(Leaf, cascade="all, delete-orphan"))
        configure_mappers()
        assert [key for key, _ in rules] == ["leaves"]
        assert mapper._delete_orphans is rules


class TestListeners:
    def test__has_events(self, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set with the first listener, of whatever has listeners to a statement."""
        called: list[str] = []
        # Another test may have listened to all. Up to 2.0.55, Connection has no default.
        for each in (sa.Connection, sa.Engine, type(engine.dialect)):
            monkeypatch.setattr(each, "_has_events", False, raising=False)
        with engine.connect() as connection:
            targets: list[Any] = [connection, engine.dialect, engine]
            number = 0
            for number, target in enumerate(targets, 1):
                assert target._has_events is False
                name = "do_execute" if target is engine.dialect else "before_execute"
                event.listen(target, name, lambda *_: called.append("called"))
                assert target._has_events is True
                called.clear()
                connection.execute(sa.text("SELECT 1"))
                assert len(called) == number
            for target in targets:
                target._has_events = False
            called.clear()
            connection.execute(sa.text("SELECT 1"))
            assert called == []


class TestOthers:
    def test__overflow(self) -> None:
        """How many connections a QueuePool has beyond those that it keeps, as ``overflow()``."""
        connect: Any = partial(sqlite3.connect, ":memory:")
        pool = sa.QueuePool(connect, pool_size=2, max_overflow=1)
        found = [pool._overflow]
        taken = []
        for _ in range(3):
            taken.append(pool.connect())
            found.append(pool._overflow)
            assert pool.overflow() == found[-1]
        assert found == [-2, -1, 0, 1]
        for connection in taken:
            connection.close()
        assert pool._overflow == pool.overflow() == 0
        pool.dispose()

    def test___sqlalchemy_greenlet_provider__(self) -> None:
        """Tells that a greenlet was made for one call of the asyncio extension."""
        found = asyncio.run(greenlet_spawn(greenlet.getcurrent))
        assert found.__sqlalchemy_greenlet_provider__ is True
        assert not hasattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__")


NAMES = names_with_a_test(
    TestConnection, TestSession, TestSessionTransaction, TestMapper, TestListeners, TestOthers
)


def theirs() -> set[str]:
    """Every such name of SQLAlchemy's objects that the package meets, and of their classes."""
    engine = sa.create_engine("sqlite://", poolclass=sa.QueuePool)
    with engine.connect() as connection, Session(engine) as session:
        session.add(note := Note(text="new"))
        result: Any = connection.execute(sa.select(1))
        instances: list[Any] = [
            *(engine, engine.pool, engine.dialect, connection, connection.connection),
            *(connection.begin_nested(), connection.get_transaction(), result, result.context),
            *(result.cursor_strategy, sa.select(1), sa.select(1).compile(), sa.insert(Note)),
            *(session, session.get_transaction(), session.identity_map, session.query(Note)),
            *(sa.inspect(note), sa.inspect(Note), sa.inspect(Note).attrs.text, Note.__table__),
            asyncio.run(greenlet_spawn(greenlet.getcurrent)),
        ]
        names = {name for each in instances for name in dir(each)}
    engine.dispose()
    return set(filter(is_private, names))


def test_each_private_name_in_the_seam_has_a_test_here_and_no_test_is_left_over() -> None:
    assert used_in(SEAM) & theirs() == NAMES


def test_no_other_module_uses_a_private_name_of_sqlalchemy() -> None:
    names = theirs()
    others = [path for path in PACKAGE.rglob("*.py") if path != SEAM]
    found = {path.name: used_in(path) & names - OUR_OWN for path in others}
    assert {file: names for file, names in found.items() if names} == {}
    assert used_in(*others) >= OUR_OWN


def test_no_other_module_imports_a_private_module_or_name_of_sqlalchemy() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.insert(0, node.module or "")
            if names[0].partition(".")[0] == "sqlalchemy":
                parts = [part for name in names for part in name.split(".")]
                assert not any(map(is_private, parts)), f"{path.name}, line {node.lineno}"


def test_our_own_names_are_no_names_of_the_classes_that_they_are_on() -> None:
    stock_engine, our_engine = sa.create_engine("sqlite://"), create_engine("sqlite://")
    with stock_engine.connect() as stock_connection, our_engine.connect() as our_connection:
        pairs: list[tuple[object, object]] = [
            (Session(stock_engine), OptInSession(our_engine)),
            (stock_connection, our_connection),
            (stock_engine, our_engine),
            (Session(stock_engine).begin(), OptInSession(our_engine).begin()),
        ]
        for stock, ours in pairs:
            added = set(vars(ours)) - set(vars(stock))
            for base in type(ours).__mro__:
                if base.__module__.startswith("fictive_sqlalchemy"):
                    added |= set(vars(base))
            added = {name for name in added if not name.startswith("__")}
            clashing = {name for name in added & set(dir(stock)) if name.startswith("_")}
            assert clashing <= NAMES
    assert isinstance(our_connection, OptInConnection)
    assert isinstance(our_engine, OptInEngine)
    assert isinstance(pairs[3][1], OptInSessionTransaction)
    stock_engine.dispose()
    our_engine.dispose()
