"""Writes outside a transaction: one mechanism on the caller's own session, whatever the call."""

# pytest.raises() ends the block around the one that it names:
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, sessionmaker

from fictive_sqlalchemy import (
    CommitOutcomeUnknown,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
)
from tests.library import (
    Author,
    Document,
    Editor,
    Note,
    NoteBase,
    Onlooker,
    Person,
    authors,
    backend_pid,
    sent,
)
from tests.wire import Message, WireProxy

Sessions = sessionmaker[OptInSession]
#: Since 2.1 a session flushes before a statement that names no class, too.
CORE_AUTOFLUSHES = not sa.__version__.startswith("2.0.")

documents: sa.Table = Author.metadata.tables["document"]


class TestACoreStatementWithOrmCriteria:
    """Its criteria have the ORM's plugin, and its table has no class."""

    @pytest.fixture(params=["delete", "update", "insert from select"])
    def statement(self, request: pytest.FixtureRequest) -> Any:
        link = sa.table("document", sa.column("author_id"), sa.column("title"))
        wanted = link.c.author_id.in_(sa.select(Author.id).where(Author.name == "Ada"))
        statements: dict[str, Any] = {
            "delete": sa.delete(link).where(wanted),
            "update": sa.update(link).where(wanted).values(title="Of 1"),
            "insert from select": sa.insert(link).from_select(
                ["author_id", "title"],
                sa.select(Author.id, Author.name).where(Author.name == "Ada"),
            ),
        }
        return statements[request.param]

    @pytest.mark.parametrize("call", ["execute", "scalars", "scalar"])
    def test_is_sent_alone_outside(
        self, session: OptInSession, wire: WireProxy, statement: Any, call: str
    ) -> None:
        if call != "execute":
            statement = statement.returning(sa.column("title"))
        with wire.record() as recording:
            result = getattr(session, call)(statement)
        assert len(sent(recording)) == 1
        assert recording.round_trips == 1
        if call == "execute":
            assert result.rowcount in (1, -1)  # SQLAlchemy 2.0 has none for INSERT … SELECT
        else:
            title = result.one() if call == "scalars" else result
            assert title in ("Of 1", "Ada")

    def test_does_the_same_in_a_block_and_on_a_connection(
        self, session: OptInSession, engine: OptInEngine, statement: Any
    ) -> None:
        result: Any
        with session.begin() as transaction:
            result = session.execute(statement)
            assert result.rowcount in (1, -1)
            transaction.rollback()
        with engine.connect() as connection:
            assert connection.execute(statement).rowcount == result.rowcount


class TestAnOrmInsertWithParameters:
    """SQLAlchemy takes it for a bulk call, which needs a transaction."""

    @pytest.mark.parametrize(
        ("parameters", "names"),
        [
            ({"name": "one"}, ["one"]),
            ([{"name": "one"}], ["one"]),
            ([{"name": "one"}, {"name": "two"}], ["one", "two"]),
            (({"name": "one"}, {"name": "two"}), ["one", "two"]),
        ],
        ids=["a dictionary", "a list of one", "a list of two", "a tuple"],
    )
    @pytest.mark.parametrize("is_waiting", [False, True])
    def test_is_stored_when_it_returns(
        self,
        session: OptInSession,
        wire: WireProxy,
        onlooker: Onlooker,
        parameters: Any,
        names: list[str],
        is_waiting: bool,
    ) -> None:
        if is_waiting:
            session.add(Author(name="a waiting one"))
            names = ["a waiting one", *names]
        with wire.record() as recording:
            session.execute(sa.insert(Author), parameters)
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert sent(recording).count("BEGIN") == 1
        assert onlooker.names() == names
        assert not session.in_transaction()

    def test_a_generator_is_stored_too(self, session: OptInSession, onlooker: Onlooker) -> None:
        rows: Any = ({"name": name} for name in ("one", "two"))
        session.execute(sa.insert(Author), rows)
        assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("parameters", [{"name": "Ada"}, [{"name": "a"}, {"name": "Ada"}]])
    def test_that_fails_leaves_no_transaction_open(
        self, session: OptInSession, onlooker: Onlooker, parameters: Any
    ) -> None:
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author), parameters)
        assert not session.in_transaction()
        session.execute(sa.insert(Author), {"name": "after"})
        assert onlooker.names() == ["after"]

    def test_returns_objects(self, session: OptInSession, onlooker: Onlooker) -> None:
        new = session.scalars(sa.insert(Author).returning(Author), {"name": "one"}).one()
        assert new in session
        assert new.name == "one"
        assert onlooker.names() == ["one"]

    def test_a_bulk_update_by_primary_key_is_stored_too(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.execute(sa.update(Author), [{"id": 1, "age": 51}, {"id": 2, "age": 52}])
        assert onlooker.column("SELECT age FROM author ORDER BY id") == [51, 52, 30]

    def test_of_two_tables_is_all_or_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Editor), {"name": "e", "rank": 0})
        assert onlooker.scalar("SELECT count(*) FROM person") == 0
        session.execute(sa.insert(Editor), {"name": "e", "rank": 1})
        assert session.scalars(sa.select(Person)).one().name == "e"


class TestTwoWritesKeepTheirOrder:
    def test_a_read_outside_does_not_write(self, session: OptInSession, wire: WireProxy) -> None:
        session.get_one(Author, 1).age = 40
        with wire.record() as recording:
            session.scalars(sa.select(Author).where(Author.id == 2)).one()
            session.scalar(sa.text("SELECT 'UPDATE author'"))
        assert sent(recording) == ["SELECT", "SELECT"]
        assert session.is_modified(session.get_one(Author, 1))

    def test_a_select_with_a_cte_that_writes_comes_after_what_waits(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get_one(Author, 1).age = 40
        older = sa.update(Author).where(Author.id == 1).values(age=Author.age + 1)
        changed = older.returning(Author.age).cte()
        with wire.record() as recording:
            assert session.scalar(sa.select(changed.c.age)) == 41
        assert sent(recording) == ["BEGIN", "UPDATE", "WITH", "COMMIT"]
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 41

    @pytest.mark.skipif(not CORE_AUTOFLUSHES, reason="SQLAlchemy 2.0 does not flush before text()")
    def test_text_that_writes_comes_after_what_waits(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get_one(Author, 1).age = 40
        with wire.record() as recording:
            session.execute(sa.text("UPDATE author SET age = age + 1 WHERE id = 1"))
        assert sent(recording) == ["BEGIN", "UPDATE", "UPDATE", "COMMIT"]
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 41

    def test_without_autoflush_what_waits_goes_on_waiting(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        ada = session.get_one(Author, 1)
        ada.age = 40
        with session.no_autoflush, wire.record() as recording:
            session.execute(sa.update(Author).where(Author.id == 2).values(age=50))
        assert sent(recording) == ["UPDATE"]
        assert session.is_modified(ada)
        session.execute(sa.update(Author).where(Author.id == 3).values(age=60))
        assert onlooker.column("SELECT age FROM author ORDER BY id") == [40, 50, 60]

    def test_autoflush_switched_off_for_the_session_is_off_everywhere(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        with sessions(autoflush=False) as session:
            session.get_one(Author, 1).age = 40
            with session.no_autoflush:
                pass
            assert session.autoflush is False
            with wire.record() as recording:
                session.execute(sa.update(Author).where(Author.id == 2).values(age=50))
                with session.begin():
                    session.get(Author, 3)
            assert sent(recording) == ["UPDATE", "BEGIN", "SELECT", "UPDATE", "COMMIT"]

    def test_a_delete_evaluates_what_was_changed(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        ada = session.get_one(Author, 1)
        session.execute(sa.delete(Document))
        ada.age = 9
        result: Any = session.execute(sa.delete(Author).where(Author.age == 9))
        assert result.rowcount == 1
        assert ada not in session
        assert onlooker.scalar("SELECT count(*) FROM author") == 2


class TestTheSessionsListeners:
    def test_after_begin_is_called_with_the_callers_session_for_each_way_to_write(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.info["tenant"] = 7
        seen: list[Any] = []

        @event.listens_for(Session, "after_begin")
        def note(session: Session, transaction: Any, connection: sa.Connection) -> None:
            seen.append((session, session.info))
            connection.execute(sa.text("SELECT set_config('app.tenant', '7', true)"))

        try:
            session.bulk_insert_mappings(Author, [{"name": "a"}])
            session.bulk_save_objects([Author(name="b")])
            session.bulk_update_mappings(Author, [{"id": 1, "age": 3}])
            session.execute(sa.insert(Author), [{"name": "c"}, {"name": "d"}])
            session.execute(sa.insert(authors), [{"name": "e"}, {"name": "f"}])
            session.execute(sa.insert(Author), {"name": "g"})
            session.add(Author(name="h"))
            session.flush()
            session.add(Author(name="i"))
            session.commit()
        finally:
            event.remove(Session, "after_begin", note)
        assert seen == [(session, {"tenant": 7})] * 8
        assert onlooker.names() == list("abcdefghi")

    def test_on_commit_of_a_listener_to_a_flush_is_called_after_commit(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        calls: list[Any] = []

        @event.listens_for(Author, "after_insert")
        def register(mapper: Any, connection: Any, target: Author) -> None:
            session.on_commit(lambda: calls.append(onlooker.names()))
            session.on_rollback(lambda: calls.append("rolled back"))

        try:
            session.add(Author(name="one"))
            session.flush()
            assert calls == [["one"]]
            session.add_all([Author(name="two"), Author(name="one")])
            with pytest.raises(IntegrityError):
                session.flush()
        finally:
            event.remove(Author, "after_insert", register)
        assert calls[0] == ["one"]
        assert set(calls[1:]) <= {"rolled back"}

    def test_events_of_a_deletion_come_in_sqlalchemys_order(
        self, session: OptInSession, sessions: Sessions
    ) -> None:
        orders: list[list[Any]] = []
        for how in ("outside", "inside"):
            with sessions() as session:
                order: list[Any] = []
                event.listen(
                    session,
                    "persistent_to_deleted",
                    lambda s, o, order=order: order.append(
                        ("deleted", o in s, sa.inspect(o).deleted)
                    ),
                )
                event.listen(
                    session,
                    "deleted_to_detached",
                    lambda s, o, order=order: order.append(("detached", o in s)),
                )
                document = session.get_one(Document, 1 if how == "outside" else 2)
                statement = sa.delete(Document).where(Document.id == document.id)
                if how == "outside":
                    session.execute(statement)
                else:
                    with session.begin():
                        session.execute(statement)
                orders.append(order)
                assert sa.inspect(document).detached
        assert orders[0] == orders[1]


class TestTheUsersOverridesAreAskedAsSqlalchemyAsks:
    def test_get_bind_is_always_given_a_mapper(self, engine: OptInEngine) -> None:
        given: list[Any] = []

        class Routing(OptInSession):
            def get_bind(self, mapper: Any = None, **kw: Any) -> Any:
                if mapper is not None:
                    given.append(mapper.class_)
                return super().get_bind(mapper, **kw)

        with Routing(engine) as session:
            session.execute(sa.update(Author).values(age=3))
            session.execute(sa.insert(Author), {"name": "one"})
            session.execute(sa.delete(Document))
            session.bulk_insert_mappings(Author, [{"name": "two"}])
            session.add(Author(name="three"))
            session.flush()
            session.get_one(Author, 1).age = 4
            session.scalars(sa.select(Author)).all()
            session.commit()
        assert set(given) <= {Author, Document}

    @pytest.mark.parametrize("begin_on_write", [False, True])
    def test_a_shard_chooser_is_given_the_instance_and_a_read_does_not_ask_it(
        self, engine: OptInEngine, onlooker: Onlooker, begin_on_write: bool
    ) -> None:
        asked: list[Any] = []

        class Sharded(OptInSession, ShardedSession):
            pass

        def choose_shard(mapper: Any, instance: Any, clause: Any = None) -> str:
            if instance is not None:
                asked.append(instance.name)
            else:
                assert clause is not None
            return "one"

        options: dict[str, Any] = {"begin_on_write": begin_on_write}
        with Sharded(
            shards={"one": engine},
            shard_chooser=choose_shard,
            identity_chooser=lambda *_, **__: ["one"],
            execute_chooser=lambda context: ["one"],
            **options,
        ) as session:
            ada = session.scalars(sa.select(Author).where(Author.id == 1)).one()
            ada.age = 40
            session.scalars(sa.select(Author).where(Author.id == 2)).one()
            session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 40
        assert set(asked) <= {"Ada"}


class TestACteThatLocks:
    def queue(self) -> Any:
        free = (
            sa.select(Author.id)
            .order_by(Author.id)
            .limit(1)
            .with_for_update(skip_locked=True)
            .cte("free")
        )
        taken = (
            sa.update(Author)
            .where(Author.id == sa.select(free.c.id).scalar_subquery())
            .values(age=99)
            .returning(Author.id)
            .cte("taken")
        )
        return sa.select(taken.c.id)

    def test_of_a_statement_that_writes_what_it_has_locked_works_outside(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            assert session.scalar(self.queue()) == 1
        assert sent(recording) == ["WITH"]
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 99

    def test_of_one_that_writes_nothing_is_refused(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        locked = sa.select(Author.id).with_for_update().cte("locked")
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match=r"with_for_update\(\) outside"):
                session.execute(sa.select(locked.c.id))
        assert recording.messages == []


def store(session: OptInSession, author: Author) -> None:
    session.add(author)
    session.flush()


def read_after(session: OptInSession, author: Author) -> None:
    session.add(author)
    session.scalars(sa.select(Author)).all()


CAUGHT: dict[str, Callable[[OptInSession], Any]] = {
    "execute": lambda session: session.execute(sa.insert(Author).values(name="Ada")),
    "flush": lambda session: store(session, Author(name="Ada")),
    "autoflush": lambda session: read_after(session, Author(name="Ada")),
    "many": lambda session: session.execute(sa.insert(authors), [{"name": "x"}, {"name": "Ada"}]),
    "text": lambda session: session.execute(sa.text("INSERT INTO author (name) VALUES ('Ada')")),
    "connection": lambda session: session.connection().execute(
        sa.insert(Author).values(name="Ada")
    ),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Author, [{"name": "Ada"}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Author(name="Ada")]),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(
        Author, [{"id": 2, "name": "Ada"}]
    ),
}


class TestTheCauseOfAPendingRollback:
    @pytest.mark.parametrize("how", CAUGHT)
    def test_is_the_databases_error_at_the_end_of_a_block(
        self, session: OptInSession, how: str
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError) as caught:
                CAUGHT[how](session)
        assert raised.value.__cause__ is caught.value
        assert "author_name_key" in str(raised.value.__cause__)

    def test_is_the_first_error_if_there_are_several(self, session: OptInSession) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError) as caught:
                CAUGHT["execute"](session)
            with pytest.raises(DBAPIError, match="author_name_key") as later:
                session.execute(sa.select(Author))
            assert "An earlier statement of this transaction failed" in str(later.value)
        assert raised.value.__cause__ is caught.value

    def test_is_not_one_that_a_savepoint_has_undone(self, session: OptInSession) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(IntegrityError), session.begin_nested():
                CAUGHT["execute"](session)
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"))
        assert raised.value.__cause__ is caught.value

    def test_is_the_databases_error_on_a_connection(self, engine: OptInEngine) -> None:
        with pytest.raises(PendingRollbackError) as raised, engine.begin() as connection:
            with pytest.raises(IntegrityError) as caught:
                connection.execute(sa.insert(Author).values(name="Ada"))
        assert raised.value.__cause__ is caught.value

    def test_is_the_error_of_an_atomic_block_that_has_joined(self, session: OptInSession) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.atomic():
            with pytest.raises(ZeroDivisionError) as caught, session.atomic(savepoint=False):
                raise ZeroDivisionError
        assert raised.value.__cause__ is caught.value

    def test_is_there_at_a_commit_by_hand(self, session: OptInSession) -> None:
        session.begin()
        with pytest.raises(IntegrityError) as caught:
            CAUGHT["execute"](session)
        with pytest.raises(PendingRollbackError) as raised:
            session.commit()
        assert raised.value.__cause__ is caught.value
        session.rollback()


class TestTwoBinds:
    @pytest.fixture
    def other(self, server: Any, driver: str, wire: WireProxy) -> Iterator[OptInEngine]:
        name = server.create_database()
        engine = create_engine(wire.url(server.url(driver, name)))
        NoteBase.metadata.create_all(engine)
        yield engine
        engine.dispose()
        server.drop_database(name)

    @pytest.fixture
    def session(self, engine: OptInEngine, other: OptInEngine) -> Iterator[OptInSession]:
        binds: dict[Any, Any] = {Note: other, Author: engine, Document: engine}
        with OptInSession(binds=binds) as session:
            yield session

    def test_a_loss_after_the_first_commit_says_that_half_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, other: OptInEngine
    ) -> None:
        calls: list[str] = []
        committed = 0

        def cut(message: Message) -> None:
            nonlocal committed
            if message.is_statement and message.verb == "COMMIT":
                committed += 1
                if committed == 2:
                    wire.before_forward = None
                    wire.cut_all()

        wire.before_forward = cut
        with pytest.raises(OperationalError, match="stored in part") as raised:
            with session.begin():
                session.on_commit(lambda: calls.append("committed"))
                session.on_rollback(lambda: calls.append("rolled back"))
                session.add_all([Author(name="one"), Note(text="one")])
        assert "nothing of the transaction is stored" not in str(raised.value)
        with other.connect() as connection:
            stored = [*onlooker.names(), *connection.scalars(sa.select(Note.text))]
        assert stored == ["one"]
        assert calls == []
        assert not session.in_transaction()

    def test_a_server_that_went_before_the_second_commit_says_so_too(
        self, session: OptInSession, onlooker: Onlooker, other: OptInEngine
    ) -> None:
        calls: list[str] = []
        committed: list[sa.Connection] = []

        def kill_the_other(connection: sa.Connection) -> None:
            committed.append(connection)
            if len(committed) == 1:
                [victim] = {one, two} - {connection}
                onlooker.kill(backend_pid(victim))

        event.listen(session.get_bind(Author.__mapper__), "commit", kill_the_other)
        event.listen(other, "commit", kill_the_other)
        with pytest.raises(OperationalError) as raised, session.begin():
            session.on_rollback(lambda: calls.append("rolled back"))
            session.add_all([Author(name="one"), Note(text="one")])
            session.flush()
            one = session.connection({"mapper": Author.__mapper__})
            two = session.connection({"mapper": Note.__mapper__})
        assert "stored in part" in str(raised.value)
        assert not isinstance(raised.value, CommitOutcomeUnknown)
        assert calls == []


class TestBeginTakesABoolForNested:
    @pytest.mark.parametrize("nested", ["SERIALIZABLE", 1, 0, None, {"isolation_level": "x"}])
    def test_and_refuses_anything_else(
        self, session: OptInSession, wire: WireProxy, nested: Any
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ArgumentError, match=r"begin\(isolation_level=…\)"):
                session.begin(nested)
        assert recording.messages == []
        assert not session.in_transaction()


class TestACommitThatWasRefusedBeforeAnythingWasSent:
    @pytest.mark.parametrize("call", ["commit", "flush"])
    def test_leaves_what_was_loaded(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, call: str
    ) -> None:
        ada = session.get_one(Author, 1)
        session.add(Author(name="one"))

        def refuse(*_: Any) -> None:
            raise ValueError("refused")

        event.listen(session, "before_flush", refuse)
        with wire.record() as recording:
            with pytest.raises(ValueError, match="refused"):
                getattr(session, call)()
            assert not session.in_transaction()
            assert ada.name == "Ada"
        assert recording.messages == []
        event.remove(session, "before_flush", refuse)
        session.commit()
        assert onlooker.names() == ["one"]

    def test_leaves_it_readable_when_the_scope_is_removed(self, sessions: Sessions) -> None:
        scope = OptInScopedSession(sessions)
        ada = scope.get_one(Author, 1)
        scope.add(Author(name="one"))

        def refuse(*_: Any) -> None:
            raise ValueError("refused")

        event.listen(scope(), "before_flush", refuse)
        with pytest.raises(ValueError, match="refused"):
            scope.commit()
        scope.remove()
        assert ada.name == "Ada"


def test_eighty_thousand_callbacks_take_time_in_proportion(session: OptInSession) -> None:
    calls: list[int] = []
    with session.begin(), session.begin_nested():
        for number in range(80_000):
            session.on_commit(lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == list(range(80_000))


def test_begin_nested_that_fails_expires_what_it_has_changed_alone(
    session: OptInSession, wire: WireProxy
) -> None:
    loaded = session.scalars(sa.select(Author).order_by(Author.id)).all()
    with session.begin():
        with pytest.raises(IntegrityError), session.begin_nested():
            loaded[0].age = 7
            session.flush()
            session.execute(sa.insert(Author).values(name="Ada"))
        with wire.record() as recording:
            assert [author.age for author in loaded] == [30, 30, 30]
    assert sent(recording) == ["SELECT"]


class TestTwoBindsBeforeTheFirstCommit(TestTwoBinds):
    """Tried several times, since SQLAlchemy commits the binds in no order."""

    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_one_that_is_aborted_keeps_the_other_from_being_stored(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            session.add_all([Author(name="one"), Note(text="one")])
            session.flush()
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_one_that_is_aborted_keeps_one_that_joins_at_the_end_from_being_stored(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(DBAPIError) as caught:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
            session.add(Note(text="one") if aborted is Author else Author(name="one"))
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_one_that_a_listener_aborts_keeps_the_other_from_being_stored(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        caught: list[DBAPIError] = []

        @event.listens_for(session, "after_flush_postexec")
        def fail(*_: Any) -> None:
            try:
                session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": Author})
            except DBAPIError as error:
                caught.append(error)

        with pytest.raises(PendingRollbackError) as raised, session.begin():
            session.get(Author, 1)
            session.get(Note, 1)
            session.add(Note(text="one"))
        assert raised.value.__cause__ is caught[0]
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_one_that_is_lost_keeps_the_other_from_being_stored(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        with pytest.raises(OperationalError, match="nothing of the transaction is stored"):
            with session.begin():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                onlooker.kill(backend_pid(session.connection({"mapper": Author.__mapper__})))
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []


def test_a_savepoint_that_cannot_be_set_is_not_left_open(
    session: OptInSession, onlooker: Onlooker
) -> None:
    session.connection()
    with pytest.raises(PendingRollbackError), session.begin():
        session.execute(sa.insert(authors).values(name="one"))
        with pytest.raises(DBAPIError):
            session.execute(sa.text("SELECT 1/0"))
        with pytest.raises(DBAPIError), session.begin_nested():
            pass
        assert not session.in_nested_transaction()
    assert onlooker.names() == []


class TestTwoBindsInASavepoint(TestTwoBinds):
    @pytest.mark.parametrize("attempt", range(6))
    @pytest.mark.parametrize("aborted", [Author, Note])
    def test_one_that_is_aborted_takes_the_part_of_the_other_back(
        self,
        session: OptInSession,
        other: OptInEngine,
        onlooker: Onlooker,
        aborted: Any,
        attempt: int,
    ) -> None:
        with session.begin():
            with pytest.raises(PendingRollbackError), session.begin_nested():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                with pytest.raises(DBAPIError):
                    session.execute(sa.text("SELECT 1/0"), bind_arguments={"mapper": aborted})
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []

    @pytest.mark.parametrize("attempt", range(6))
    def test_one_that_is_lost_is_the_error_even_if_the_other_is_released(
        self, session: OptInSession, other: OptInEngine, onlooker: Onlooker, attempt: int
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, session.begin():
            with pytest.raises(OperationalError) as caught, session.begin_nested():
                session.add_all([Author(name="one"), Note(text="one")])
                session.flush()
                onlooker.kill(backend_pid(session.connection({"mapper": Author.__mapper__})))
            assert caught.value.connection_invalidated
        assert raised.value.__cause__ is caught.value
        assert onlooker.names() == []
        with other.connect() as connection:
            assert connection.scalars(sa.select(Note.text)).all() == []


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_a_connection_handed_out_rests_after_a_refused_statement_and_a_rollback(
    sessions: Sessions, begin_on_write: bool
) -> None:
    with sessions(begin_on_write=begin_on_write) as session:
        if not begin_on_write:
            session.begin()
        connection = session.connection()
        connection.execute(sa.insert(authors).values(name="one"))
        session.add(Author(name="Ada"))
        with pytest.raises(IntegrityError):
            session.flush()
        with pytest.raises(PendingRollbackError):
            session.execute(sa.text("SELECT 1"))
        session.rollback()
        dbapi: Any = connection.connection.dbapi_connection
        assert dbapi.autocommit is True
        assert not session.in_transaction()
