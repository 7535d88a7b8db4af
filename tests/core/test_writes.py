"""A write outside a transaction works by the caller's own session, whatever the call."""

# ruff: noqa: SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession
from tests.library import Author, Document, Editor, Onlooker, Person, Sessions, authors, sent
from tests.wire import WireProxy

#: Since 2.1 a session flushes before a statement that names no class, too.
CORE_AUTOFLUSHES = not sa.__version__.startswith("2.0.")


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
    def test_a_core_statement_with_orm_criteria_is_sent_alone_outside(
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

    def test_a_core_statement_with_orm_criteria_does_the_same_in_a_block(
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
    def test_an_orm_insert_with_parameters_is_stored_when_it_returns(
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

    def test_an_orm_insert_of_a_generator_is_stored_when_it_returns(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        rows: Any = ({"name": name} for name in ("one", "two"))
        session.execute(sa.insert(Author), rows)
        assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("parameters", [{"name": "Ada"}, [{"name": "a"}, {"name": "Ada"}]])
    def test_an_orm_insert_that_fails_leaves_no_transaction_open(
        self, session: OptInSession, onlooker: Onlooker, parameters: Any
    ) -> None:
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author), parameters)
        assert not session.in_transaction()
        session.execute(sa.insert(Author), {"name": "after"})
        assert onlooker.names() == ["after"]

    def test_an_orm_insert_with_parameters_returns_objects(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        new = session.scalars(sa.insert(Author).returning(Author), {"name": "one"}).one()
        assert new in session
        assert new.name == "one"
        assert onlooker.names() == ["one"]

    def test_a_bulk_update_by_primary_key_is_stored_when_it_returns(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.execute(sa.update(Author), [{"id": 1, "age": 51}, {"id": 2, "age": 52}])
        assert onlooker.column("SELECT age FROM author ORDER BY id") == [51, 52, 30]

    def test_an_orm_insert_into_two_tables_is_all_or_nothing(
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

    def test_a_cte_that_locks_what_its_statement_writes_works_outside(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            assert session.scalar(self.queue()) == 1
        assert sent(recording) == ["WITH"]
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 99

    def test_a_cte_that_locks_for_a_statement_that_writes_nothing_is_refused(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        locked = sa.select(Author.id).with_for_update().cte("locked")
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match=r"with_for_update\(\) outside"):
                session.execute(sa.select(locked.c.id))
        assert recording.messages == []


class TestACommitThatWasRefusedBeforeAnythingWasSent:
    @pytest.mark.parametrize("call", ["commit", "flush"])
    def test_a_commit_that_was_refused_before_it_sent_anything_leaves_what_was_loaded(
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

    def test_objects_stay_readable_when_the_scope_is_removed_after_a_refused_commit(
        self, sessions: Sessions
    ) -> None:
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
