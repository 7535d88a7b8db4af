"""A statement that writes outside is a transaction of its own, and results can be streamed."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    ObjectNotExecutableError,
    ProgrammingError,
    ResourceClosedError,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, foreign, mapped_column, relationship

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import (
    Author,
    Document,
    Editor,
    Onlooker,
    Person,
    Sessions,
    assert_at_rest,
    authors,
    backend_pid,
    sent,
)
from tests.wire import WireProxy


class FamilyBase(DeclarativeBase):
    pass


class Kid(FamilyBase):
    """Outlives its parent: no foreign key says otherwise."""

    __tablename__ = "kid"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None]
    name: Mapped[str]


class Parent(FamilyBase):
    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)
    kids: Mapped[list[Kid]] = relationship(
        cascade="all", primaryjoin=lambda: Parent.id == foreign(Kid.parent_id)
    )


def rows_of_a_result(session: OptInSession) -> list[Any]:
    names = sa.text("SELECT name FROM (VALUES ('n1'), ('n2'), ('Ada')) AS v (name)")
    return list(session.execute(names).mappings())


class TestStatementsThatWriteOutside:
    @pytest.mark.parametrize("synchronize", ["evaluate", "fetch", "auto", False])
    def test_an_orm_update_is_one_statement_and_brings_objects_up_to_date(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, synchronize: Any
    ) -> None:
        author, waiting = session.get_one(Author, 1), session.get_one(Author, 2)
        waiting.age = 99
        with wire.record() as recording, session.no_autoflush:
            session.execute(
                sa.update(Author).where(Author.id == 1).values(age=31),
                execution_options={"synchronize_session": synchronize},
            )
        assert sent(recording) == ["UPDATE"]
        if synchronize:
            assert author.age == 31
        assert waiting.age == 99
        session.rollback()
        assert (author.age, waiting.age) == (31, 30)

    @pytest.mark.parametrize("synchronize", ["evaluate", "fetch", "auto"])
    def test_an_orm_delete_is_not_undone_by_a_rollback(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, synchronize: Any
    ) -> None:
        document, waiting = session.get_one(Document, 1), session.get_one(Author, 1)
        waiting.age = 99
        with wire.record() as recording, session.no_autoflush:
            session.execute(
                sa.delete(Document).where(Document.id == 1),
                execution_options={"synchronize_session": synchronize},
            )
        assert sent(recording) == ["DELETE"]
        session.rollback()
        assert document not in session
        assert waiting.age == 30
        session.commit()
        assert onlooker.scalar("SELECT count(*) FROM document") == 2

    def test_an_orm_delete_keeps_related_objects_and_their_changes(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        FamilyBase.metadata.create_all(session.connection())
        session.add(Parent(id=1, kids=[Kid(id=n, name=f"kid {n}") for n in (1, 2)]))
        session.commit()
        parent = session.get_one(Parent, 1)
        one, two = parent.kids
        one.name = "changed"
        session.execute(sa.delete(Parent))
        assert parent not in session
        assert one in session
        assert two in session
        session.commit()
        assert onlooker.column("SELECT name FROM kid ORDER BY id") == ["changed", "kid 2"]

    def test_an_orm_delete_lets_go_of_every_object_it_deleted(self, session: OptInSession) -> None:
        session.execute(sa.insert(Author), [{"name": f"n{n}"} for n in range(20)])
        loaded = session.scalars(sa.select(Author).where(Author.id > 3)).all()
        session.execute(sa.delete(Author).where(Author.id > 10))
        assert [author.id for author in loaded if author in session] == list(range(4, 11))
        assert all(sa.inspect(author).detached for author in loaded if author not in session)

    def test_a_job_is_taken_with_one_update_that_locks_in_its_subquery(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        free = sa.select(Author.id).order_by(Author.id).limit(1).with_for_update(skip_locked=True)
        take = sa.update(Author).where(Author.id == free.scalar_subquery()).values(age=1)
        with wire.record() as recording:
            assert session.scalar(take.returning(Author.id)) == 1
        assert sent(recording) == ["UPDATE"]

    def test_the_querys_update_and_delete_are_one_statement_each(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            assert session.query(Author).filter_by(id=1).update({"age": 31}) == 1
            assert session.query(Document).filter_by(id=1).delete() == 1
        assert sent(recording) == ["UPDATE", "DELETE"]

    def test_returning_gives_rows_and_objects(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            new = session.scalars(sa.insert(Author).values(name="new").returning(Author)).one()
            assert (new.id, new in session) == (4, True)
            id = session.scalar(sa.insert(authors).values(name="newer").returning(authors.c.id))
            assert id == 5
            ages = session.execute(
                sa.update(Author).where(Author.id < 3).values(age=1).returning(Author.id)
            )
            assert sorted(ages.scalars()) == [1, 2]
        assert sent(recording) == ["INSERT", "INSERT", "UPDATE"]
        assert onlooker.names() == ["new", "newer"]

    def test_an_upsert_that_loads_objects_is_one_statement(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        author = session.get_one(Author, 1)
        upsert = (
            postgresql.insert(Author)
            .values([{"name": "Ada", "age": 61}, {"name": "new", "age": 62}])
            .on_conflict_do_update(index_elements=["name"], set_={"age": 60})
            .returning(Author)
        )
        with wire.record() as recording:
            loaded = session.scalars(
                sa.select(Author).from_statement(upsert).execution_options(populate_existing=True)
            ).all()
        assert sent(recording) == ["INSERT"]
        assert sorted(author.age or 0 for author in loaded) == [60, 62]
        assert author.age == 60
        assert onlooker.names() == ["new"]

    MANY: dict[str, Callable[[OptInSession], Any]] = {  # noqa: RUF012
        "rows of another result": lambda session: session.execute(
            sa.insert(authors),
            rows_of_a_result(session),
        ),
        "a tuple of dictionaries": lambda session: session.execute(
            sa.insert(authors), ({"name": "n1"}, {"name": "n2"}, {"name": "Ada"})
        ),
        "a tuple of dictionaries for the ORM": lambda session: session.execute(
            sa.insert(Author), ({"name": "n1"}, {"name": "n2"}, {"name": "Ada"})
        ),
        "rows for the ORM": lambda session: session.execute(
            sa.insert(Author),
            rows_of_a_result(session),
        ),
        "the driver's SQL": lambda session: session.connection().exec_driver_sql(
            "INSERT INTO author (name) VALUES (%s)", [("n1",), ("n2",), ("Ada",)]
        ),
        "scalars": lambda session: session.scalars(
            sa.insert(Author).returning(Author.id), [{"name": "n1"}, {"name": "Ada"}]
        ),
        "the connection, returning": lambda session: session.connection().execute(
            sa.insert(authors).returning(authors.c.id), [{"name": "n1"}, {"name": "Ada"}]
        ),
        "from_statement": lambda session: session.scalars(
            sa.select(Author).from_statement(sa.insert(Author).returning(Author)),
            [{"name": "n1"}, {"name": "Ada"}],
        ),
    }

    @pytest.mark.parametrize("spelling", MANY)
    def test_many_parameter_sets_are_all_or_nothing_however_they_are_given(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, spelling: str
    ) -> None:
        with wire.record() as recording, pytest.raises(IntegrityError):
            self.MANY[spelling](session)
        assert "BEGIN" in sent(recording)
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_results_of_many_parameter_sets_are_readable(self, session: OptInSession) -> None:
        rows = [{"name": f"n{n}"} for n in range(2500)]
        ids = session.scalars(sa.insert(Author).returning(Author.id), rows)
        assert len(set(ids)) == 2500
        rows = [{"name": f"m{n}"} for n in range(2500)]
        found = session.connection().execute(sa.insert(authors).returning(authors.c.id), rows)
        assert len({row.id for row in found}) == 2500

    def test_one_object_of_two_tables_with_the_bulk_strategy_is_all_or_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        bulk = {"dml_strategy": "bulk"}
        session.execute(sa.insert(Editor), {"name": "E", "rank": 1}, execution_options=bulk)
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Editor), {"name": "F", "rank": 0}, execution_options=bulk)
        assert onlooker.column("SELECT name FROM person") == ["E"]

    def test_updates_of_two_tables_are_all_or_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        session.add_all([Editor(name="E", rank=1), Editor(name="F", rank=2)])
        session.commit()
        for update in (
            lambda rows: session.execute(sa.update(Editor), rows),
            lambda rows: session.bulk_update_mappings(sa.inspect(Editor), rows),
        ):
            with pytest.raises(IntegrityError):
                update([{"id": 1, "name": "X", "rank": 9}, {"id": 2, "name": "Y", "rank": 0}])
        assert onlooker.column("SELECT name FROM person ORDER BY 1") == ["E", "F"]
        assert onlooker.column("SELECT rank FROM editor ORDER BY 1") == [1, 2]

    def test_objects_of_two_tables_are_all_or_nothing_at_flush(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.add(Editor(name="E", rank=1))
        with wire.record() as recording:
            session.flush()
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        session.add(Editor(name="F", rank=0))
        with pytest.raises(IntegrityError):
            session.flush()
        assert [person.name for person in session.scalars(sa.select(Person))] == ["E"]
        assert onlooker.column("SELECT name FROM person") == ["E"]

    def test_bulk_saves_with_nothing_to_save_send_nothing(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            session.bulk_save_objects([])
            session.bulk_insert_mappings(sa.inspect(Author), [])
            session.bulk_update_mappings(sa.inspect(Author), [])
        assert recording.messages == []
        assert not session.in_transaction()

    def test_bulk_saves_give_defaults_back(self, session: OptInSession) -> None:
        saved = [Author(name="one"), Author(name="two")]
        session.bulk_save_objects(saved, return_defaults=True)
        assert [author.id for author in saved] == [4, 5]
        loaded = session.get_one(Author, 1)
        loaded.age = 41
        session.bulk_save_objects([loaded])
        assert session.scalar(sa.text("SELECT age FROM author WHERE id = 1")) == 41

    def test_statements_that_write_inside_are_part_of_the_transaction(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        rows = [{"name": "n1"}, {"name": "n2"}]
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.execute(sa.insert(authors), rows)
                session.bulk_insert_mappings(sa.inspect(Author), [{"name": "n3"}, {"name": "n4"}])
                session.execute(sa.update(Author), [{"id": 1, "age": 1}, {"id": 2, "age": 2}])
                raise ValueError("mine")
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording).count("BEGIN") == 1
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []

    def test_what_is_not_a_statement_is_sqlalchemys_own_error(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        for nonsense in ("SELECT 1", 5, Author):
            with wire.record() as recording, pytest.raises(ArgumentError):
                session.execute(nonsense)  # type: ignore[call-overload]
            with pytest.raises(ObjectNotExecutableError):
                session.connection().execute(nonsense)  # type: ignore[call-overload]
            assert recording.messages == []


class TestStreaming:
    @pytest.fixture(autouse=True)
    def many(self, engine: OptInEngine) -> None:
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO author (name) SELECT 'n' || n FROM generate_series(4, 1000) n")
            )

    STREAM = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=100)
    CURSORS = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")

    def test_two_streams_can_be_read_at_once(self, session: OptInSession) -> None:
        pairs = list(zip(session.scalars(self.STREAM), session.scalars(self.STREAM), strict=True))
        assert pairs == [(n, n) for n in range(1, 1001)]
        assert session.scalar(self.CURSORS) == 0

    def test_a_stream_can_be_read_in_partitions(self, session: OptInSession) -> None:
        sizes = [len(part) for part in session.scalars(self.STREAM).partitions()]
        assert sizes == [100] * 10

    def test_a_stream_outlives_a_failed_and_a_committed_transaction_and_a_flush(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        seen: list[int] = []
        for part in session.scalars(self.STREAM).partitions():
            seen += part
            session.add(Author(name=f"part {part[0]}"))
            session.flush()
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.execute(sa.insert(Author).values(name="gone"))
                raise ValueError("mine")
        assert seen == list(range(1, 1001))
        assert onlooker.scalar("SELECT count(*) FROM author WHERE name LIKE 'part%'") == 10

    def test_a_stream_inside_is_a_plain_cursor_of_the_transaction(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording, session.begin():
            assert len(session.scalars(self.STREAM).all()) == 1000
        assert sent(recording)[:2] == ["BEGIN", "DECLARE"]
        assert "WITH HOLD" not in recording.statements[1]
        assert sent(recording)[-1] == "COMMIT"

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of the cursor
    @pytest.mark.parametrize("end", ["close", "reset", "invalidate", "garbage"])
    def test_an_abandoned_stream_leaves_nothing_behind(
        self, engine: OptInEngine, sessions: Sessions, end: str
    ) -> None:
        session = sessions()
        stream: Any = session.scalars(self.STREAM)
        next(stream)
        if end == "garbage":
            del session
        else:
            getattr(session, end)()
            with pytest.raises((ResourceClosedError, DBAPIError)):
                list(stream)  # not: an end that looks like the end of the rows
        del stream
        assert_at_rest(engine)
        with sessions() as session:
            assert session.scalar(self.CURSORS) == 0

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of the cursor
    @pytest.mark.parametrize("how", ["closed", "read to its end", "forgotten"])
    def test_a_stream_ended_in_an_aborted_transaction_leaves_no_cursor_in_the_pool(
        self, sessions: Sessions, how: str
    ) -> None:
        """There the server takes no CLOSE."""
        with sessions() as session:
            pid = backend_pid(session.connection())
            stream: Any = session.scalars(self.STREAM)
            next(stream)
            with pytest.raises(ValueError, match="mine"), session.begin():
                with pytest.raises(ProgrammingError):
                    session.execute(sa.text("SELECT nothing FROM nowhere"))
                if how == "closed":
                    stream.close()
                elif how == "forgotten":
                    del stream
                else:
                    with pytest.raises(DBAPIError):
                        list(stream)
                raise ValueError("mine")
            session.give_back()
        with sessions() as session:
            assert backend_pid(session.connection()) == pid
            assert session.scalar(self.CURSORS) == 0

    def test_closing_the_result_of_a_stream_closes_its_cursor(self, session: OptInSession) -> None:
        stream = session.scalars(self.STREAM)
        next(stream)
        assert session.scalar(self.CURSORS) == 1
        stream.close()
        assert session.scalar(self.CURSORS) == 0

    def test_a_killed_server_ends_a_stream_with_an_error_not_with_fewer_rows(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        stream = session.scalars(self.STREAM)
        next(stream)
        onlooker.kill(backend_pid(session.connection()))
        with pytest.raises(DBAPIError):
            list(stream)
        assert session.get_one(Author, 1).name == "Ada"
        assert len(session.scalars(self.STREAM).all()) == 1000

    def test_a_stream_keeps_memory_bounded(self, session: OptInSession) -> None:
        """A client-side cursor would fetch all at once: the rows come in FETCHes of a hundred."""
        stream = session.execute(
            sa.text("SELECT n, repeat('x', 1000) FROM generate_series(1, 20000) n"),
            execution_options={"stream_results": True, "yield_per": 100},
        )
        dbapi: Any = session.connection().connection.dbapi_connection
        held = [
            cursor
            for cursor in (stream.cursor,)  # type: ignore[attr-defined]
            if getattr(cursor, "name", None)
        ]
        assert held, "not a server-side cursor"
        assert dbapi.info.transaction_status == 0
        assert sum(1 for _ in stream) == 20000
