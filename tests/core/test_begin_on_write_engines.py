"""``begin_on_write=True`` and engines: isolation levels, several binds, replicas, read-only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, insert, select, text, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.testing import isolate
from tests.library import (
    Author,
    Base,
    Note,
    NoteBase,
    Onlooker,
    assert_at_rest,
    authors,
    fill,
    opened,
    sent,
)
from tests.postgres import PostgresServer, ReplicaServer
from tests.wire import WireProxy

READ = select(Author.name).where(Author.id == 1)
WRITE = insert(authors).values(name="new")


class NamelessFunction(FunctionElement[Any]):
    """A function of the user's own, as SQLAlchemy's documentation makes ``utcnow``."""

    inherit_cache = True


@compiles(NamelessFunction)
def compile_nameless_function(element: Any, compiler: Any, **kwargs: Any) -> str:
    return "now()"


def begun(engine: Any, **options: Any) -> OptInSession:
    return OptInSession(engine, begin_on_write=True, **options)


class TestAboveReadCommitted:
    """A snapshot that starts at the write would miss what the reads saw."""

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    @pytest.mark.parametrize("how", ["engine", "execution options", "copy", "update"])
    def test_a_read_begins_above_read_committed(
        self, wire_url: str, wire: WireProxy, level: str, how: str
    ) -> None:
        options: dict[str, Any] = {"isolation_level": level}
        given = {"engine": options, "execution options": {"execution_options": options}}
        with opened(wire_url, **given.get(how, {})) as engine:
            used = engine.execution_options(**options) if how == "copy" else engine
            if how == "update":
                engine.update_execution_options(**options)
            with wire.record() as recording, begun(used) as session:
                session.execute(READ).all()
                session.execute(WRITE)
                session.commit()
            assert sent(recording) == ["BEGIN", "SELECT", "INSERT", "COMMIT"]
            assert level in recording.statements[0]

    def test_nobody_can_change_what_was_read_above_read_committed(
        self, wire_url: str, onlooker: Onlooker
    ) -> None:
        with (
            opened(wire_url, isolation_level="REPEATABLE READ") as engine,
            begun(engine) as session,
        ):
            author = session.get_one(Author, 1)
            onlooker.run("UPDATE author SET age = 99 WHERE id = 1")
            assert author.age is not None
            author.age += 1
            with pytest.raises(exc.OperationalError, match="could not serialize"):
                session.commit()
            session.rollback()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 99

    def test_the_first_read_of_an_engine_begins_where_the_servers_default_is_above(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker, database: str
    ) -> None:
        fill(wire_url)
        default = "default_transaction_isolation"
        onlooker.run(f"ALTER DATABASE {database} SET {default} = 'serializable'")
        try:
            engine = create_engine(wire_url)
            with begun(engine) as session:
                session.execute(READ).all()
                assert session.in_transaction()
                assert wire.transactions_open == 1
                session.commit()
                with wire.record() as recording:
                    session.execute(READ).all()
                    session.rollback()
            assert sent(recording) == ["BEGIN", "SELECT", "ROLLBACK"]
            assert_at_rest(engine)
            engine.dispose()
        finally:
            onlooker.run(f"ALTER DATABASE {database} RESET {default}")

    def test_a_read_does_not_begin_at_read_committed_by_name(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with opened(wire_url, isolation_level="READ COMMITTED") as engine, begun(engine) as session:
            with wire.record() as recording:
                session.execute(READ).all()
            assert sent(recording) == ["SELECT"]

    def test_the_error_of_begin_names_the_read(self, wire_url: str) -> None:
        with opened(wire_url, isolation_level="SERIALIZABLE") as engine, begun(engine) as session:
            session.get(Author, 1)
            with pytest.raises(exc.InvalidRequestError, match=r"begun by get\(\) in .*/test_begin"):
                session.begin()

    def test_a_level_of_the_sessions_connection_is_that_of_the_transaction(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        options: dict[str, Any] = {"isolation_level": "SERIALIZABLE"}
        with begun(engine) as session, wire.record() as recording:
            session.connection(execution_options=options)
            session.execute(READ).all()
            session.commit()
            session.execute(READ).all()
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
        assert "SERIALIZABLE" in recording.statements[0]

    @pytest.mark.skipif(not sa.__version__.startswith("2.1"), reason="new in SQLAlchemy 2.1")
    def test_a_read_begins_where_the_session_has_a_level(
        self, engine: OptInEngine, wire: WireProxy
    ) -> None:
        options: dict[str, Any] = {"isolation_level": "SERIALIZABLE"}
        with begun(engine, execution_options=options) as session, wire.record() as recording:
            session.execute(READ).all()
            session.commit()
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]


class TestReadOnlyOutside:
    def test_writes_are_in_a_transaction_and_allowed_with_read_only_outside(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        fill(wire_url)
        engine = create_engine(wire_url, read_only_outside=True)
        with begun(engine) as session:
            session.execute(READ).all()
            with wire.record() as recording:
                session.execute(WRITE)
                session.add(Author(name="newer"))
                session.commit()
            assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
            assert onlooker.names() == ["new", "newer"]
        assert_at_rest(engine)
        engine.dispose()

    def test_a_function_that_nobody_noticed_is_refused_by_the_server(
        self, wire_url: str, onlooker: Onlooker
    ) -> None:
        fill(wire_url)
        onlooker.run(
            "CREATE FUNCTION renew(n int) RETURNS int LANGUAGE sql AS "
            "$$ UPDATE author SET age = n; SELECT n $$"
        )
        engine = create_engine(wire_url, read_only_outside=True)
        with begun(engine) as session:
            noticed = text("SELECT renew(1)")
            unnoticed = text("SELECT renew(id) FROM author")
            with pytest.raises(exc.InternalError, match="read-only"):
                session.execute(unnoticed)
            session.execute(noticed)
            session.execute(unnoticed)  # in a transaction by now
            session.rollback()
        engine.dispose()


class TestReplicas:
    @pytest.fixture
    def replica_wire(self, replica: ReplicaServer) -> Iterator[WireProxy]:
        with WireProxy(replica.host, replica.port) as wire:
            yield wire

    @pytest.fixture
    def engine(
        self,
        wire_url: str,
        replica_wire: WireProxy,
        replica: ReplicaServer,
        driver: str,
        database: str,
    ) -> Iterator[OptInEngine]:
        urls = [replica_wire.url(replica.url(driver, database))]
        with opened(wire_url, replicas=urls) as engine:
            replica.catch_up()
            engine.replicas[0].connect().close()  # SQLAlchemy asks the server this and that
            yield engine

    IN_RECOVERY = select(func.pg_is_in_recovery())

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    def test_reads_go_to_a_replica_until_the_first_write(
        self, engine: OptInEngine, ends: str
    ) -> None:
        with begun(engine) as session:
            assert session.scalar(self.IN_RECOVERY) is True
            session.add(Author(name="new"))
            session.flush()
            assert session.scalar(self.IN_RECOVERY) is False
            getattr(session, ends)()
            assert session.scalar(self.IN_RECOVERY) is False
        with begun(engine) as session:
            assert session.scalar(self.IN_RECOVERY) is True

    def test_a_lock_goes_to_the_primary(self, engine: OptInEngine) -> None:
        with begun(engine) as session:
            session.scalars(select(Author)).all()
            session.get(Author, 1, with_for_update=True)
            assert session.scalar(self.IN_RECOVERY) is False

    @pytest.mark.parametrize(
        "statement",
        [
            select(Author).with_for_update(),
            select(func.nextval("author_id_seq")),
            select(func.nextval("author_id_seq")).select_from(Author),
            select(select(Author.id).with_for_update().subquery()),
            select(text("nextval('author_id_seq')")).select_from(Author),
            text("SELECT id FROM author FOR UPDATE"),
        ],
        ids=["lock", "nextval", "nextval of rows", "lock in a subquery", "fragment", "text"],
    )
    def test_what_begins_goes_to_the_primary(self, engine: OptInEngine, statement: Any) -> None:
        with begun(engine) as session:
            session.execute(statement).all()
            assert session.in_transaction()
            assert session.scalar(self.IN_RECOVERY) is False

    @pytest.mark.parametrize(
        "statement",
        [
            select(func.count()).select_from(Author),
            select(func.initcap(Author.name)),
            select(text("count(*)")).select_from(Author),
            select(Author).where(text("age > 1")),
            select(NamelessFunction()),
        ],
        ids=["count", "function", "fragment", "criteria", "function without a name"],
    )
    def test_what_reads_goes_to_a_replica(
        self, engine: OptInEngine, replica_wire: WireProxy, statement: Any
    ) -> None:
        with begun(engine) as session, replica_wire.record() as recording:
            session.execute(statement).all()
        assert sent(recording) == ["SELECT"]

    def test_a_read_while_changes_wait_goes_to_the_primary(self, engine: OptInEngine) -> None:
        with begun(engine) as session:
            session.add(Author(name="new"))
            assert session.scalars(select(Author).filter_by(name="new")).one()

    def test_above_read_committed_all_goes_to_the_primary(
        self, engine: OptInEngine, replica_wire: WireProxy
    ) -> None:
        used = engine.execution_options(isolation_level="REPEATABLE READ")
        with replica_wire.record() as recording, begun(used) as session:
            session.scalars(select(Author)).all()
            assert session.scalar(self.IN_RECOVERY) is False
        assert sent(recording) == []


class TestSeveralBinds:
    @pytest.fixture(params=[True, False], ids=["two of ours", "a stock one beside"])
    def binds(
        self,
        request: pytest.FixtureRequest,
        engine: OptInEngine,
        server: PostgresServer,
        driver: str,
    ) -> Iterator[dict[Any, sa.Engine]]:
        name = server.create_database()
        make = create_engine if request.param else sa.create_engine
        other = make(server.url(driver, name))
        NoteBase.metadata.create_all(other)
        yield {Base: engine, NoteBase: other}
        other.dispose()
        server.drop_database(name)

    def notes(self, binds: dict[Any, sa.Engine]) -> list[str]:
        with binds[NoteBase].connect() as connection:
            return list(connection.scalars(select(Note.text)))

    @pytest.mark.parametrize("order", ["ours first", "the other first"])
    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    def test_writes_to_two_binds_are_one_transaction(
        self, binds: dict[Any, sa.Engine], onlooker: Onlooker, order: str, ends: str
    ) -> None:
        with OptInSession(binds=binds, begin_on_write=True) as session:
            writes: list[Any] = [insert(Author).values(name="new"), insert(Note).values(text="new")]
            for write in writes if order == "ours first" else writes[::-1]:
                session.execute(write)
            session.add_all([Author(name="newer"), Note(text="newer")])
            session.flush()
            assert onlooker.names() == self.notes(binds) == []
            getattr(session, ends)()
            stored = ["new", "newer"] if ends == "commit" else []
            assert onlooker.names() == self.notes(binds) == stored

    def test_a_read_of_the_stock_bind_does_not_keep_a_write_of_ours_from_beginning(
        self, binds: dict[Any, sa.Engine], wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with OptInSession(binds=binds, begin_on_write=True) as session:
            session.scalars(select(Note)).all()
            with wire.record() as recording:
                session.scalars(select(Author)).all()
                session.execute(insert(Author).values(name="new"))
                session.rollback()
            assert sent(recording) == ["SELECT", "BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []

    def test_an_error_on_one_bind_undoes_both(
        self, binds: dict[Any, sa.Engine], onlooker: Onlooker
    ) -> None:
        with OptInSession(binds=binds, begin_on_write=True) as session:
            session.execute(insert(Note).values(text="new"))
            session.add(Author(name="Ada"))
            with pytest.raises(exc.IntegrityError):
                session.commit()
            session.rollback()
            assert onlooker.names() == self.notes(binds) == []


class TestIsolate:
    def test_isolation_undoes_what_was_committed_and_a_rollback_works_inside(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with isolate(engine):
            with begun(engine) as session:
                session.execute(WRITE)
                session.commit()
                session.execute(insert(authors).values(name="newer"))
                session.add(Author(name="newest"))
                session.flush()
                session.rollback()
            with begun(engine) as session:
                names = session.scalars(select(Author.name).order_by(Author.id)).all()
                assert names == ["Ada", "Bob", "Cid", "new"]
                session.get(Author, 1, with_for_update=True)
                with pytest.raises(exc.InvalidRequestError, match=r"begun by get\(\)"):
                    session.begin()
                session.commit()
                with session.begin_nested():
                    session.execute(update(Author).values(age=9))
                session.rollback()
                assert session.get_one(Author, 1).age == 30
        assert onlooker.names() == []


class TestAConnection:
    def test_a_session_on_a_connection_does_as_sqlalchemys_does(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        with closing(engine.connect()) as connection:
            transaction = connection.begin()
            with begun(connection, join_transaction_mode="create_savepoint") as session:
                session.execute(WRITE)
                session.commit()
                assert session.scalars(select(Author).filter_by(name="new")).one()
            transaction.rollback()
        assert onlooker.names() == []

    def test_a_stock_engine_is_as_ever(self, url: str, onlooker: Onlooker) -> None:
        fill(url)
        engine = sa.create_engine(url)
        for session in (Session(engine), begun(engine)):
            with session:
                session.scalars(select(Author)).all()
                assert session.in_transaction()
                session.execute(WRITE)
                session.rollback()
        assert onlooker.names() == []
        engine.dispose()
