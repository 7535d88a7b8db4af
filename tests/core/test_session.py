"""The session, closer than the contract: objects, writing calls, binds, connections, the loan."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import CursorResult
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    ObjectNotExecutableError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    ResourceClosedError,
    TimeoutError,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    Session,
    foreign,
    mapped_column,
    relationship,
    selectinload,
    sessionmaker,
)
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.pool import (
    AssertionPool,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
)

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    OptInConnection,
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
    Seat,
    Sessions,
    add,
    assert_at_rest,
    authors,
    backend_pid,
    checked_out,
    opened,
    sent,
)
from tests.wire import WireProxy


class TestObjectsOutside:
    def test_a_flush_does_not_expire_them(self, session: OptInSession, wire: WireProxy) -> None:
        author, new = session.get_one(Author, 1), Author(name="new")
        author.age = 31
        session.add(new)
        session.flush()
        with wire.record() as recording:
            assert (author.age, new.name, new.id) == (31, "new", 4)
        assert recording.messages == []

    def test_a_commit_does(self, session: OptInSession, wire: WireProxy) -> None:
        author = session.get_one(Author, 1)
        author.age = 31
        session.commit()
        with wire.record() as recording:
            assert author.age == 31
        assert sent(recording) == ["SELECT"]

    def test_a_commit_with_nothing_waiting_does_too(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        author = session.get_one(Author, 1)
        onlooker.column("UPDATE author SET age = 32 RETURNING age")
        session.commit()
        assert author.age == 32

    def test_expire_on_commit_is_left_as_the_user_set_it(self, sessions: Sessions) -> None:
        for expire in (True, False):
            with sessions(expire_on_commit=expire) as session:
                author = session.get_one(Author, 1)
                author.age = 32 + expire
                session.flush()
                session.execute(sa.insert(Author), [{"name": f"{expire}{n}"} for n in "ab"])
                assert session.expire_on_commit is expire
                session.commit()
                assert ("age" in sa.inspect(author).expired_attributes) is expire

    def test_a_flush_that_failed_leaves_new_ones_transient_to_be_added_again(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        wrong, fine = Author(name="Ada"), Author(name="fine")
        session.add_all([fine, wrong])
        with pytest.raises(IntegrityError):
            session.flush()
        assert sa.inspect(fine).transient
        assert sa.inspect(wrong).transient
        assert fine.id is None
        wrong.name = "right"
        session.add_all([fine, wrong])
        session.commit()
        assert onlooker.names() == ["fine", "right"]

    def test_rollback_after_a_flush_keeps_what_was_flushed(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        author, new = session.get_one(Author, 1), Author(name="new")
        author.age = 31
        session.add(new)
        session.flush()
        author.age = 99
        session.rollback()
        assert author.age == 31
        assert new in session
        assert new.name == "new"
        assert onlooker.names() == ["new"]

    def test_one_that_was_deleted_and_flushed_is_gone(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        document = session.get_one(Document, 1)
        session.delete(document)
        session.flush()
        assert onlooker.scalar("SELECT count(*) FROM document") == 2
        session.rollback()
        assert document not in session
        assert session.get(Document, 1) is None
        session.commit()

    def test_one_whose_deletion_failed_is_back(self, session: OptInSession) -> None:
        author = session.get_one(Author, 1)
        session.execute(sa.text("ALTER TABLE document DROP CONSTRAINT document_author_id_fkey"))
        session.execute(
            sa.text("ALTER TABLE document ADD FOREIGN KEY (author_id) REFERENCES author")
        )
        session.execute(sa.delete(Document).where(Document.id > 1))
        session.delete(author)
        session.get_one(Author, 2).age = 77
        with pytest.raises(IntegrityError):
            session.flush()
        assert author in session
        assert author not in session.deleted
        assert author.name == "Ada"
        assert session.get_one(Author, 2).age == 30

    def test_merge_reads_and_waits(
        self, sessions: Sessions, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with sessions() as other:
            author = other.get_one(Author, 1)
        author.age = 55
        with wire.record() as recording:
            merged = session.merge(author)
            new = session.merge(Author(name="merged"))
        assert sent(recording) == ["SELECT"]
        assert merged.age == 55
        assert new in session.new
        with wire.record() as recording:
            session.commit()
        assert sorted(sent(recording)) == ["BEGIN", "COMMIT", "INSERT", "UPDATE"]
        assert onlooker.names() == ["merged"]

    def test_refresh_and_expire_forget_the_change_of_one_and_send_one_select(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        one, two = session.get_one(Author, 1), session.get_one(Author, 2)
        one.age = two.age = 99
        with wire.record() as recording:
            session.refresh(one)
            session.expire(two)
            assert (one.age, two.age) == (30, 30)
        assert sent(recording) == ["SELECT", "SELECT"]

    def test_a_row_that_somebody_deleted_meanwhile(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        document, author = session.get_one(Document, 1), session.get_one(Author, 2)
        onlooker.column("DELETE FROM document WHERE id = 1 RETURNING 1")
        document.title, author.age = "changed", 99
        with pytest.raises(StaleDataError):
            session.flush()
        assert author.age == 30
        assert onlooker.scalar("SELECT max(age) FROM author") == 30
        author.age = 40
        session.flush()
        assert onlooker.scalar("SELECT max(age) FROM author") == 40

    def test_relationships_are_stored_together(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        new = Author(name="new", documents=[Document(title="a"), Document(title="b")])
        session.add(new)
        with wire.record() as recording:
            session.flush()
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert [document.author_id for document in new.documents] == [new.id] * 2

    def test_eager_loading_sends_its_selects_alone(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            loaded = session.scalars(
                sa.select(Author).options(selectinload(Author.documents))
            ).all()
        assert sent(recording) == ["SELECT", "SELECT"]
        assert [len(author.documents) for author in loaded] == [1, 1, 1]

    def test_flush_of_one_object_stores_that_one_alone(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        dirty, one, other = session.get_one(Author, 1), Author(name="one"), Author(name="other")
        dirty.age = 99
        session.add_all([one, other])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SQLAlchemy 2.1 deprecates it
            session.flush([one])
        assert onlooker.names() == ["one"]
        assert onlooker.scalar("SELECT max(age) FROM author") == 30
        assert other in session.new
        assert dirty in session.dirty
        session.rollback()
        assert other not in session
        assert dirty.age == 30
        assert one in session

    def test_events_of_a_flush_may_add_more(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @event.listens_for(session, "before_flush")
        def add_another(session: Session, context: object, instances: object) -> None:
            if not any(isinstance(new, Document) for new in session.new):
                session.add(Document(title="by event", author_id=1))

        session.add(Author(name="new"))
        with wire.record() as recording:
            session.flush()
        assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 4

    def test_events_of_a_commit_may_read_write_and_flush(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        @event.listens_for(session, "before_commit")
        def write(session: Session) -> None:
            assert session.scalar(sa.select(sa.func.count(Author.id))) is not None
            session.execute(sa.update(Document).values(title="by event"))
            session.flush()

        for store in (session.flush, session.commit):
            session.add(Author(name=store.__name__))
            store()
            assert onlooker.column("SELECT DISTINCT title FROM document") == ["by event"]
            onlooker.column("UPDATE document SET title = 'x' RETURNING 1")
        assert onlooker.names() == ["commit", "flush"]

    def test_events_of_transactions_come_for_transactions_only(self, session: OptInSession) -> None:
        seen: list[str] = []
        for name in ("after_begin", "after_commit", "after_rollback"):
            event.listen(session, name, lambda *_, name=name: seen.append(name))
        session.get(Author, 1)
        session.execute(sa.update(Author).values(age=3))
        assert seen == []
        session.add(Author(name="one"))
        session.flush()
        assert seen == ["after_begin", "after_commit"]
        seen.clear()
        with session.begin():
            session.get(Author, 2)
        assert seen == ["after_begin", "after_commit"]
        seen.clear()
        with pytest.raises(ValueError, match="mine"), session.begin():
            session.get(Author, 3)
            raise ValueError("mine")
        assert seen == ["after_begin", "after_rollback"]

    def test_a_sessions_options_keep_their_meaning(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        with sessions(autoflush=False) as session, session.begin():
            session.add(Author(name="new"))
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 3
        with sessions() as session, session.begin(), session.no_autoflush:
            session.add(Author(name="newer"))
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 4
        with sessions(autobegin=False) as session:
            with session.begin():
                session.add(Author(name="newest"))
            with session.begin():
                assert session.scalar(sa.select(sa.func.count(Author.id))) == 6

    def test_a_sessionmakers_begin_is_a_transaction(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, sessions.begin() as session:
            session.add(Author(name="new"))
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with pytest.raises(IntegrityError), sessions.begin() as session:
            session.add(Author(name="newer"))
            session.flush()
            session.add(Author(name="new"))
        assert onlooker.names() == ["new"]


class TestTheEndOfABlock:
    @pytest.mark.parametrize("commit", ["session", "transaction", "in a savepoint"])
    def test_commit_inside_is_refused_and_the_whole_block_is_rolled_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, commit: str
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="stored at its end, as a whole"):
                with session.begin() as transaction:
                    session.add(Author(name="one"))
                    session.flush()
                    if commit == "session":
                        session.commit()
                    elif commit == "transaction":
                        transaction.commit()
                    else:
                        with session.begin_nested():
                            session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []
        session.add(Author(name="two"))
        session.commit()
        assert onlooker.names() == ["two"]

    def test_commit_inside_that_is_refused_and_caught_leaves_the_block_as_it_was(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="one"))
            with pytest.raises(InvalidRequestError, match="Nothing was committed"):
                session.commit()
            assert onlooker.names() == []
            session.add(Author(name="two"))
        assert onlooker.names() == ["one", "two"]

    def test_a_savepoint_that_was_not_entered_may_be_committed_inside(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            savepoint = session.begin_nested()
            session.add(Author(name="one"))
            savepoint.commit()
        assert onlooker.names() == ["one"]

    def test_that_was_rolled_back_inside_too(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="one"))
            session.flush()
            session.rollback()
            session.rollback()
            with pytest.raises(InvalidRequestError, match="context manager"):
                session.execute(sa.insert(Author).values(name="two"))
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_that_was_closed_inside_rolls_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.add(Author(name="one"))
            session.flush()
            session.close()
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []
        session.add(Author(name="two"))
        session.commit()
        assert onlooker.names() == ["two"]

    @pytest.mark.parametrize("how", ["execute", "flush"])
    def test_with_an_error_caught_inside_says_that_nothing_was_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, how: str
    ) -> None:
        with pytest.raises(PendingRollbackError, match=r"begin_nested\(\)"):
            with session.begin():
                session.add(Author(name="lost"))
                session.flush()
                with pytest.raises(IntegrityError):
                    if how == "execute":
                        session.execute(sa.insert(Author).values(name="Ada"))
                    else:
                        session.add(Author(name="Ada"))
                        session.flush()
        assert onlooker.names() == []
        assert wire.transactions_open == 0
        with session.begin():
            session.add(Author(name="after"))
        assert onlooker.names() == ["after"]

    def test_with_an_error_caught_inside_can_go_on_after_a_savepoint(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="kept"))
            for _ in range(3):
                with pytest.raises(IntegrityError), session.begin_nested():
                    session.execute(sa.insert(Author).values(name="Ada"))
            with pytest.raises(IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 4
        assert onlooker.names() == ["kept"]

    def test_of_a_savepoint_with_an_error_caught_inside_is_not_silent_either(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with session.begin():
            session.add(Author(name="kept"))
            with pytest.raises((PendingRollbackError, DBAPIError)), session.begin_nested():
                session.add(Author(name="lost"))
                session.flush()
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(Author).values(name="Ada"))
        assert onlooker.names() == ["kept"]

    def test_a_commit_that_fails_leaves_objects_as_after_a_rollback(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        author, seat = session.get_one(Author, 1), Seat(place=1)
        with pytest.raises(IntegrityError), session.begin():
            author.age = 99
            session.add_all([seat, Seat(place=1)])
        assert author.age == 30
        assert sa.inspect(seat).transient
        session.add(seat)
        session.commit()
        assert onlooker.scalar("SELECT count(*) FROM seat") == 1


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


class DynamicBase(DeclarativeBase):
    pass


class Book(DynamicBase):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(sa.ForeignKey("author.id"))


class Writer(DynamicBase):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: DynamicMapped[Book] = relationship(order_by=Book.id)


class OwnFlush(OptInSession):
    def flush(self, objects: Any = None) -> None:
        super().flush(objects)


DYNAMIC_READS: dict[str, Callable[[Writer], Any]] = {
    "count": lambda writer: writer.books.count(),
    "all": lambda writer: len(writer.books.all()),
    "first": lambda writer: writer.books.first() is not None,
    "iteration": lambda writer: len(list(writer.books)),
    "slice": lambda writer: len(writer.books[0:1]),
    "filter": lambda writer: writer.books.filter_by(title="Of 1").count(),
}


class TestADynamicRelationship:
    @pytest.mark.parametrize("class_", [OptInSession, OwnFlush])
    @pytest.mark.parametrize("name", DYNAMIC_READS)
    def test_is_read_outside_without_writing(
        self,
        engine: OptInEngine,
        wire: WireProxy,
        onlooker: Onlooker,
        name: str,
        class_: type[OptInSession],
    ) -> None:
        with class_(engine) as session:
            writer = session.get_one(Writer, 1)
            session.add(Writer(name="Ada"))  # which could not be stored
            with wire.record() as recording:
                assert DYNAMIC_READS[name](writer) == 1
            assert recording.verbs == ["SELECT"]
            assert len(session.new) == 1
            session.rollback()
        assert onlooker.names() == []

    def test_is_read_inside_after_a_flush(self, session: OptInSession, wire: WireProxy) -> None:
        writer = session.get_one(Writer, 1)
        with wire.record() as recording, session.begin():
            writer.books.append(Book(title="new"))
            assert writer.books.count() == 2
            with session.no_autoflush:
                writer.books.append(Book(title="newer"))
                assert writer.books.count() == 2
        assert recording.verbs == ["BEGIN", "INSERT", "SELECT", "SELECT", "INSERT", "COMMIT"]

    def test_of_another_database_is_read_after_a_flush(self) -> None:
        engine = sa.create_engine("sqlite://")
        DynamicBase.metadata.create_all(engine)
        with OptInSession(engine) as session:
            writer = Writer(name="one")
            session.add(writer)
            session.commit()
            writer.books.append(Book(title="new"))
            assert writer.books.count() == 1
            session.rollback()
            assert writer.books.count() == 0
        engine.dispose()


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

    def test_an_upsert_that_loads_objects(
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

    def test_one_object_of_two_tables_with_the_bulk_strategy(
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

    def test_inside_they_are_part_of_the_transaction(
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


class TestTheSessionsConnection:
    def test_is_the_same_outside_and_inside(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        outside = session.connection()
        assert isinstance(outside, OptInConnection)
        with wire.record() as recording:
            outside.execute(sa.insert(authors).values(name="outside"))
            assert onlooker.names() == ["outside"]
            with session.begin():
                inside = session.connection()
                assert inside.in_transaction()
                inside.execute(sa.insert(authors).values(name="inside"))
                assert onlooker.names() == ["outside"]
        assert sent(recording) == ["INSERT", "BEGIN", "INSERT", "COMMIT"]
        assert inside is outside
        assert not inside.in_transaction()

    def test_begins_by_hand_as_any_connection_and_the_session_joins(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.connection().begin():
                session.execute(sa.insert(Author).values(name="one"))
                session.add(Author(name="two"))
                session.flush()
                with session.begin():
                    session.add(Author(name="three"))
                raise ValueError("mine")
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "ROLLBACK"
        assert "COMMIT" not in sent(recording)
        assert onlooker.names() == []
        session.close()

    def test_takes_an_isolation_level_inside_as_its_first_use(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        level = sa.text("SHOW transaction_isolation")
        with wire.record() as recording, session.begin():
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            assert session.scalar(level) == "serializable"
        assert sent(recording) == ["BEGIN", "SHOW", "COMMIT"]
        with session.begin():
            assert session.scalar(level) == "read committed"
        with session.connection().begin():
            assert session.scalar(level) == "read committed"

    def test_refuses_an_isolation_level_outside(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="begin"):
                session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            with pytest.raises(InvalidRequestError, match="begin"):
                session.connection(execution_options={"postgresql_readonly": True})
        assert recording.messages == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_a_level_does_not_leak_into_a_transaction_that_is_begun_by_hand(
        self, session: OptInSession
    ) -> None:
        level = sa.text("SHOW transaction_isolation")
        with session.begin(isolation_level="SERIALIZABLE"):
            assert session.scalar(level) == "serializable"
        connection = session.connection()
        with connection.begin():
            assert connection.scalar(level) == "read committed"

    def test_a_level_that_was_set_on_it_is_not_dropped(self, session: OptInSession) -> None:
        level = sa.text("SHOW transaction_isolation")
        session.connection().execution_options(isolation_level="REPEATABLE READ")
        with session.connection().begin():
            assert session.scalar(level) == "repeatable read"

    @pytest.mark.parametrize("is_stored", [True, False])
    @pytest.mark.parametrize(
        "give",
        [
            lambda session, **options: session.connection(execution_options=options),
            lambda session, **options: session.connection().execution_options(**options),
        ],
        ids=["to the session", "to the connection"],
    )
    def test_has_execution_options_to_the_end_of_the_transaction_that_they_were_given_in(
        self, session: OptInSession, onlooker: Onlooker, give: Any, is_stored: bool
    ) -> None:
        onlooker.run("CREATE SCHEMA other CREATE TABLE author (id int, name text, age int)")
        onlooker.run("INSERT INTO other.author VALUES (1, 'of the other')")
        name = sa.select(authors.c.name).where(authors.c.id == 1)
        session.connection(execution_options={"logging_token": "outside"})
        with suppress(ZeroDivisionError), session.begin():
            give(session, schema_translate_map={None: "other"}, logging_token="inside")
            assert session.scalar(name) == "of the other"
            if not is_stored:
                raise ZeroDivisionError
        assert session.scalar(name) == "Ada"
        assert session.connection().get_execution_options() == {"logging_token": "outside"}
        with session.begin():
            assert session.scalar(name) == "Ada"

    @pytest.mark.skipif(sa.__version__ < "2.1", reason="new in SQLAlchemy 2.1")
    def test_has_the_sessions_execution_options(self, sessions: Sessions) -> None:
        options = {"isolation_level": "REPEATABLE READ"}
        with sessions(execution_options=options) as session, session.begin():
            shown = session.scalar(sa.text("SHOW transaction_isolation"))
        with Session(
            sa.create_engine(sessions.kw["bind"].url, poolclass=NullPool),
            execution_options=options,  # type: ignore[call-arg, unused-ignore]
        ) as stock:
            assert shown == stock.scalar(sa.text("SHOW transaction_isolation"))

    @pytest.mark.skipif(sa.__version__ < "2.1", reason="new in SQLAlchemy 2.1")
    @pytest.mark.parametrize("call", ["bulk_insert_mappings", "bulk_save_objects"])
    def test_has_them_too_if_a_bulk_call_takes_it_first(
        self, sessions: Sessions, onlooker: Onlooker, call: str
    ) -> None:
        onlooker.run("CREATE SCHEMA other")
        onlooker.run("CREATE TABLE other.author (LIKE author INCLUDING ALL)")
        options = {"schema_translate_map": {None: "other"}}
        with sessions(execution_options=options) as session:
            if call == "bulk_insert_mappings":
                session.bulk_insert_mappings(sa.inspect(Author), [{"name": "new"}])
            else:
                session.bulk_save_objects([Author(name="new")])
        assert onlooker.column("SELECT name FROM other.author") == ["new"]
        assert onlooker.names() == []

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_ended_by_hand_inside_a_block_writes_nothing_more(
        self, session: OptInSession, onlooker: Onlooker, end: str
    ) -> None:
        with pytest.raises(InvalidRequestError), session.begin():
            session.execute(sa.insert(Author).values(name="one"))
            getattr(session.connection(), end)()  # commit() is refused
            session.execute(sa.insert(Author).values(name="two"))
        assert onlooker.names() == []
        assert not session.in_transaction()
        session.add(Author(name="three"))
        session.commit()
        assert "three" in onlooker.names()

    def test_closed_by_hand_is_replaced(self, session: OptInSession) -> None:
        session.connection().close()
        assert session.get_one(Author, 1).name == "Ada"
        with pytest.raises((InvalidRequestError, ResourceClosedError)), session.begin():
            session.get(Author, 2)
            session.connection().close()
            session.get(Author, 3)
        assert session.get_one(Author, 3).name == "Cid"
        assert not session.in_transaction()

    def test_text_that_begins_by_hand_is_refused(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(InvalidRequestError, match="begin"):
            session.execute(sa.text("BEGIN"))
        assert wire.transactions_open == 0
        session.execute(sa.insert(Author).values(name="after"))
        session.close()
        assert onlooker.names() == ["after"]


class TestBegin:
    @pytest.mark.parametrize(
        ("options", "begin"),
        [
            ({}, "BEGIN"),
            ({"isolation_level": "SERIALIZABLE"}, "BEGIN ISOLATION LEVEL SERIALIZABLE"),
            ({"isolation_level": "READ COMMITTED"}, "BEGIN ISOLATION LEVEL READ COMMITTED"),
            ({"read_only": True}, "BEGIN READ ONLY"),
            ({"read_only": False}, "BEGIN READ WRITE"),
            (
                {"isolation_level": "SERIALIZABLE", "read_only": True, "deferrable": True},
                "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE",
            ),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_sends_what_it_begins_with_in_the_one_begin(
        self,
        session: OptInSession,
        wire: WireProxy,
        options: dict[str, Any],
        begin: str,
        nested: bool,
    ) -> None:
        with wire.record() as recording, session.begin(nested, **options):
            session.get_one(Author, 1)
        assert recording.statements[0] == begin
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]
        assert recording.round_trips == 3
        with wire.record() as recording, session.begin():
            session.get_one(Author, 2)
        assert recording.statements[0] == "BEGIN"

    @pytest.mark.parametrize(
        "options",
        [
            {"isolation_level": "SNAPSHOT"},
            {"isolation_level": ""},
            {"isolation_level": "AUTOCOMMIT"},
            {"isolation_level": 3},
            {"read_only": "yes"},
            {"read_only": "False"},
            {"deferrable": "yes"},
            {"deferrable": True},
            {"deferrable": True, "isolation_level": "SERIALIZABLE"},
            {"deferrable": True, "read_only": True},
            {"deferrable": True, "read_only": True, "isolation_level": "REPEATABLE READ"},
        ],
    )
    def test_refuses_what_the_database_does_not_know_and_sends_nothing(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, options: dict[str, Any]
    ) -> None:
        session.add(Author(name="pending"))
        with wire.record() as recording, pytest.raises(ArgumentError):
            session.begin(**options)
        assert recording.messages == []
        assert not session.in_transaction()
        assert len(session.new) == 1
        session.commit()
        assert onlooker.names() == ["pending"]

    def test_reads_a_level_as_sqlalchemy_does(self, session: OptInSession) -> None:
        for level in ("REPEATABLE_READ", "repeatable read"):
            with session.begin(isolation_level=level):
                shown = session.scalar(sa.text("SHOW transaction_isolation"))
                assert shown == "repeatable read"

    def test_of_a_savepoint_takes_no_options(self, session: OptInSession, wire: WireProxy) -> None:
        with session.begin(), wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="savepoint"):
                session.begin(nested=True, isolation_level="SERIALIZABLE")
        assert recording.messages == []

    def test_does_not_leak_its_level_after_an_error(self, session: OptInSession) -> None:
        level = sa.text("SHOW transaction_isolation")
        with pytest.raises(ProgrammingError), session.begin(isolation_level="SERIALIZABLE"):
            session.execute(sa.text("SELECT nothing FROM nowhere"))
        assert session.scalar(level) == "read committed"
        with session.begin():
            assert session.scalar(level) == "read committed"
            assert session.scalar(sa.text("SHOW transaction_read_only")) == "off"

    WRITES: dict[str, Callable[[OptInSession], Any]] = {  # noqa: RUF012
        "flush": lambda session: session.add(Author(name="new")),
        "insert": lambda session: session.execute(sa.insert(Author).values(name="new")),
        "many": lambda session: session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}]),
        "update": lambda session: session.execute(sa.update(Author).values(age=1)),
        "query": lambda session: session.query(Author).update({"age": 1}),
        "text": lambda session: session.execute(sa.text("UPDATE author SET age = 1")),
        "bulk": lambda session: session.bulk_save_objects([Author(name="new")]),
    }

    @pytest.mark.parametrize("write", WRITES)
    def test_of_a_read_only_transaction_refuses_to_write(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        with pytest.raises((InvalidRequestError, DBAPIError), match="read-only"):
            with session.begin(read_only=True):
                self.WRITES[write](session)
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT max(age) FROM author") == 30
        assert wire.transactions_open == 0
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_through_a_scoped_session_takes_the_same(
        self, sessions: Sessions, wire: WireProxy
    ) -> None:
        scoped: OptInScopedSession[OptInSession] = OptInScopedSession(sessions)
        with wire.record() as recording:
            with scoped.begin(isolation_level="SERIALIZABLE", read_only=True):
                scoped.get(Author, 1)
            scoped.get(Author, 2)
            scoped.give_back()
        assert recording.statements[0] == "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY"
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT", "SELECT"]
        with pytest.raises(ArgumentError):
            scoped.begin(isolation_level="SNAPSHOT")
        scoped.remove()


class TestStreaming:
    @pytest.fixture(autouse=True)
    def many(self, engine: OptInEngine) -> None:
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO author (name) SELECT 'n' || n FROM generate_series(4, 1000) n")
            )

    STREAM = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=100)
    CURSORS = sa.text("SELECT count(*) FROM pg_cursors WHERE name <> ''")

    def test_two_at_once(self, session: OptInSession) -> None:
        pairs = list(zip(session.scalars(self.STREAM), session.scalars(self.STREAM), strict=True))
        assert pairs == [(n, n) for n in range(1, 1001)]
        assert session.scalar(self.CURSORS) == 0

    def test_in_partitions(self, session: OptInSession) -> None:
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

    def test_inside_it_is_a_plain_cursor_of_the_transaction(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording, session.begin():
            assert len(session.scalars(self.STREAM).all()) == 1000
        assert sent(recording)[:2] == ["BEGIN", "DECLARE"]
        assert "WITH HOLD" not in recording.statements[1]
        assert sent(recording)[-1] == "COMMIT"

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of the cursor
    @pytest.mark.parametrize("end", ["close", "reset", "invalidate", "garbage"])
    def test_an_abandoned_one_leaves_nothing_behind(
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
    def test_one_that_is_ended_in_an_aborted_transaction_leaves_no_cursor_in_the_pool(
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

    def test_closing_the_result_closes_the_cursor(self, session: OptInSession) -> None:
        stream = session.scalars(self.STREAM)
        next(stream)
        assert session.scalar(self.CURSORS) == 1
        stream.close()
        assert session.scalar(self.CURSORS) == 0

    def test_a_killed_server_ends_it_with_an_error_not_with_fewer_rows(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        stream = session.scalars(self.STREAM)
        next(stream)
        onlooker.kill(backend_pid(session.connection()))
        with pytest.raises(DBAPIError):
            list(stream)
        assert session.get_one(Author, 1).name == "Ada"
        assert len(session.scalars(self.STREAM).all()) == 1000

    def test_keeps_memory_bounded(self, session: OptInSession) -> None:
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


class TestSeveralBinds:
    """Two engines of ours in one session."""

    @pytest.fixture
    def second(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        second = create_engine(wire_url)
        with second.begin() as connection:
            NoteBase.metadata.create_all(connection)
        yield second
        assert_at_rest(second)
        second.dispose()

    @pytest.fixture
    def sessions(self, engine: OptInEngine, second: OptInEngine) -> Sessions:
        binds: dict[Any, Any] = {Note: second, Author: engine, Seat: engine}
        return sessionmaker(binds=binds, class_=OptInSession)

    def test_a_transaction_covers_each_that_is_used(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording, session.begin():
            session.get(Author, 1)
        assert sent(recording) == ["BEGIN", "SELECT", "COMMIT"]
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.add_all([Author(name="new"), Note(text="new")])
                session.flush()
                (connections,) = TRANSACTION_CONNECTIONS.values()
                assert len(connections) == 2
                raise ValueError("mine")
        assert sent(recording).count("BEGIN") == 2
        assert sent(recording).count("ROLLBACK") == 2
        with wire.record() as recording, session.begin():
            session.add_all([Author(name="new"), Note(text="new")])
        assert sent(recording).count("COMMIT") == 2
        assert onlooker.names() == ["new"]
        assert onlooker.column("SELECT text FROM note") == ["new"]

    def test_reads_go_alone_on_each(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording:
            session.get(Author, 1)
            session.get(Note, 1)
            session.get(Author, 2)
        assert sent(recording) == ["SELECT"] * 3
        assert recording.round_trips == 3

    @pytest.mark.parametrize("write", ["flush", "commit", "bulk_save_objects"])
    def test_one_call_outside_stores_on_both_or_none(
        self, session: OptInSession, onlooker: Onlooker, write: str
    ) -> None:
        session.add_all([Author(name="old"), Note(text="old")])
        session.commit()
        for broken in (
            [Author(name="new"), Note(text="old")],
            [Author(name="old"), Note(text="new")],
        ):
            with pytest.raises(IntegrityError):
                if write == "bulk_save_objects":
                    session.bulk_save_objects(broken)
                else:
                    session.add_all(broken)
                    getattr(session, write)()
            assert onlooker.names() == ["old"]
            assert onlooker.column("SELECT text FROM note") == ["old"]
        if write == "bulk_save_objects":
            session.bulk_save_objects([Author(name="new"), Note(text="new")])
        else:
            session.add_all([Author(name="new"), Note(text="new")])
            getattr(session, write)()
        assert onlooker.names() == ["new", "old"]
        assert onlooker.column("SELECT text FROM note ORDER BY 1") == ["new", "old"]

    def test_a_level_is_that_of_each(self, session: OptInSession, wire: WireProxy) -> None:
        with wire.record() as recording, session.begin(isolation_level="SERIALIZABLE"):
            session.get(Author, 1)
            session.get(Note, 1)
        assert [text for text in recording.statements if text.startswith("BEGIN")] == [
            "BEGIN ISOLATION LEVEL SERIALIZABLE"
        ] * 2

    def test_an_unknown_level_is_refused_before_anything_is_sent(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ArgumentError), session.begin(isolation_level="SNAPSHOT"):
                session.get(Author, 1)
        assert recording.messages == []
        assert session.get_one(Author, 1).name == "Ada"

    @staticmethod
    def store(session: OptInSession, write: str, text: str) -> None:
        objects = [Seat(place=1), Note(text=text)]
        if write == "bulk_save_objects":
            session.bulk_save_objects(objects)
            return
        session.add_all(objects)
        if write == "block":
            with session.begin():
                pass
        else:
            getattr(session, write)()

    @pytest.mark.parametrize("write", ["block", "flush", "commit", "bulk_save_objects"])
    def test_two_phases_store_on_both_or_none_even_if_a_commit_fails(
        self, sessions: Sessions, wire: WireProxy, onlooker: Onlooker, write: str
    ) -> None:
        with sessions(twophase=True) as session:
            with wire.record() as recording:
                self.store(session, write, "one")
            assert sent(recording).count("PREPARE") == 2
            assert sent(recording).count("COMMIT PREPARED") == 2
            assert onlooker.column("SELECT text FROM note") == ["one"]
            with pytest.raises(DBAPIError):
                self.store(session, write, "two")
            assert onlooker.column("SELECT text FROM note") == ["one"]
            assert onlooker.scalar("SELECT count(*) FROM seat") == 1
            assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0
            with wire.record() as recording:
                session.get(Note, 1, populate_existing=True)
                session.get(Author, 1)
            assert sent(recording) == ["SELECT", "SELECT"]
        assert wire.transactions_open == 0


class TestARoutingSession:
    """As SQLAlchemy's documentation shows it: writes go to one engine, reads to another."""

    @pytest.fixture
    def follower(self, wire_url: str, engine: OptInEngine) -> Iterator[OptInEngine]:
        follower = create_engine(wire_url, connect_args={"application_name": "follower"})
        follower.connect().close()
        yield follower
        assert_at_rest(follower)
        follower.dispose()

    @pytest.fixture
    def session(self, engine: OptInEngine, follower: OptInEngine) -> Iterator[OptInSession]:
        class RoutingSession(OptInSession):
            def get_bind(self, mapper: Any = None, *, clause: Any = None, **kw: Any) -> Any:
                writes = self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert))
                return engine if writes else follower

        with RoutingSession() as session:
            yield session

    def test_reads_go_to_the_one_and_writes_to_the_other(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        name = sa.text("SHOW application_name")
        assert session.scalar(name) == "follower"
        writes: list[Callable[[], Any]] = [
            lambda: add(session, "one"),
            lambda: session.execute(sa.insert(Author).values(name="two")),
            lambda: session.bulk_insert_mappings(
                sa.inspect(Author), [{"name": "three"}, {"name": "four"}]
            ),
            lambda: session.bulk_save_objects([Author(name="five"), Author(name="six")]),
            lambda: session.execute(sa.update(Author).where(Author.id == 1).values(age=2)),
            lambda: session.execute(sa.delete(Document).where(Document.id == 1)),
        ]
        pid = backend_pid(session.connection())
        for write in writes:
            with wire.record() as recording:
                write()
            written = [m for m in recording.messages if m.verb in ("INSERT", "UPDATE", "DELETE")]
            assert written
            assert pid not in {message.pid for message in written}
        with wire.record() as recording, session.begin():
            session.scalar(name)
            session.add(Author(name="seven"))
        assert sent(recording).count("BEGIN") == sent(recording).count("COMMIT") == 2
        assert len(onlooker.names()) == 7


class TestTwoPhases:
    @pytest.fixture
    def session(self, sessions: Sessions) -> Iterator[OptInSession]:
        with sessions(twophase=True) as session:
            yield session

    def test_an_error_rolls_back(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with wire.record() as recording:
            with pytest.raises(ValueError, match="mine"), session.begin():
                session.add(Author(name="new"))
                session.flush()
                raise ValueError("mine")
            session.get(Author, 1)
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK", "SELECT"]
        assert onlooker.names() == []

    def test_prepare_and_commit_by_hand(self, session: OptInSession, onlooker: Onlooker) -> None:
        session.begin()
        session.add(Author(name="new"))
        session.prepare()
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 1
        assert onlooker.names() == []
        session.commit()
        assert onlooker.names() == ["new"]
        session.begin()
        session.add(Author(name="gone"))
        session.prepare()
        session.rollback()
        assert onlooker.names() == ["new"]
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0

    def test_an_error_caught_inside_is_not_silent(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises((PendingRollbackError, DBAPIError)), session.begin():
            session.execute(sa.insert(Author).values(name="lost"))
            with pytest.raises(IntegrityError):
                session.execute(sa.insert(Author).values(name="Ada"))
        assert onlooker.names() == []
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_reads_outside_are_the_statement_alone(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        with wire.record() as recording:
            session.get(Author, 1)
        assert sent(recording) == ["SELECT"]

    def test_many_rows_outside_are_all_or_nothing(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author), [{"name": "a"}, {"name": "Ada"}])
        with pytest.raises(IntegrityError):
            session.bulk_save_objects([Author(name="a"), Author(name="Ada")])
        assert onlooker.names() == []
        session.bulk_save_objects([Author(name="a"), Author(name="b")])
        session.execute(sa.insert(Author), [{"name": "c"}, {"name": "d"}])
        assert onlooker.names() == ["a", "b", "c", "d"]
        assert onlooker.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0


class TestAStockBindBesideOurs:
    """Row 21: SQLAlchemy's own behaviour for what runs on SQLite, ours for what runs on ours."""

    @pytest.fixture
    def stock(self) -> Iterator[sa.Engine]:
        stock = sa.create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        NoteBase.metadata.create_all(stock)
        yield stock
        stock.dispose()

    @pytest.fixture
    def sessions(self, engine: OptInEngine, stock: sa.Engine) -> Sessions:
        binds: dict[Any, Any] = {Note: stock, Author: engine, Document: engine, Person: engine}
        return sessionmaker(binds=binds, class_=OptInSession)

    @staticmethod
    def notes(stock: sa.Engine) -> list[str]:
        with stock.connect() as connection:
            return list(connection.scalars(sa.select(Note.text).order_by(Note.id)))

    def test_a_read_of_the_stock_one_begins_as_ever(self, session: OptInSession) -> None:
        session.get(Note, 1)
        assert session.in_transaction()
        session.rollback()
        assert not session.in_transaction()

    def test_a_read_of_ours_stays_alone_meanwhile(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        with wire.record() as recording:
            session.get(Author, 1)
            session.execute(sa.insert(Author).values(name="new"))
            session.execute(sa.insert(authors), [{"name": "newer"}, {"name": "newest"}])
        assert sent(recording)[:4] == ["SELECT", "INSERT", "BEGIN", "INSERT"]
        assert sent(recording)[-1] == "COMMIT"
        session.rollback()
        assert onlooker.names() == ["new", "newer", "newest"]

    def test_the_stock_one_flushes_before_it_reads_and_rolls_back_what_it_flushed(
        self, session: OptInSession, stock: sa.Engine
    ) -> None:
        session.add(Note(text="new"))
        assert session.scalars(sa.select(Note.text)).all() == ["new"]
        session.rollback()
        assert self.notes(stock) == []
        session.add(Note(text="newer"))
        session.flush()
        assert session.in_transaction()
        session.rollback()
        assert self.notes(stock) == []

    @pytest.mark.parametrize("begin", [True, False])
    def test_both_are_stored_or_none(
        self,
        session: OptInSession,
        wire: WireProxy,
        stock: sa.Engine,
        onlooker: Onlooker,
        begin: bool,
    ) -> None:
        def store(*objects: object) -> None:
            if begin:
                with session.begin():
                    session.add_all(objects)
            else:
                session.add_all(objects)
                session.commit()

        store(Note(text="one"), Author(name="one"))
        for broken in ((Note(text="one"), Author(name="x")), (Note(text="x"), Author(name="one"))):
            with pytest.raises(IntegrityError):
                store(*broken)
            session.rollback()
            assert not session.in_transaction()
        assert self.notes(stock) == ["one"]
        assert onlooker.names() == ["one"]
        assert wire.transactions_open == 0
        with wire.record() as recording:
            session.get(Author, 1)
        assert sent(recording) == ["SELECT"]

    def test_after_a_read_of_the_stock_one_commit_stores_both(
        self, session: OptInSession, wire: WireProxy, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        session.add_all([Note(text="one"), Author(name="one")])
        with wire.record() as recording:
            session.commit()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        session.get(Note, 1)
        session.add_all([Note(text="two"), Author(name="two")])
        with wire.record() as recording:
            session.rollback()
        assert recording.messages == []
        assert self.notes(stock) == ["one"]
        assert onlooker.names() == ["one"]

    def test_an_orm_bulk_insert_of_ours_meanwhile_joins_or_is_stored(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])
        session.bulk_save_objects([Author(name="c")])
        session.commit()
        assert onlooker.names() == ["a", "b", "c"]
        assert wire.transactions_open == 0

    def test_begin_meanwhile_is_an_error_that_says_why(self, session: OptInSession) -> None:
        session.get(Note, 1)
        with pytest.raises(InvalidRequestError, match=r"commit\(\) or rollback\(\)"):
            session.begin()
        session.commit()
        with session.begin():
            session.get(Note, 1)

    def test_begin_nested_meanwhile_makes_ours_join(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        session.get(Note, 1)
        with wire.record() as recording:
            with session.begin_nested():
                session.add(Author(name="new"))
            assert onlooker.names() == []
            session.commit()
        assert sent(recording)[0] == "BEGIN"
        assert sent(recording)[-1] == "COMMIT"
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("binds", ["both", "the stock one alone", "a default"])
    def test_begin_nested_outside_loses_nothing_that_waits(
        self, engine: OptInEngine, stock: sa.Engine, onlooker: Onlooker, binds: str
    ) -> None:
        choice: dict[str, dict[Any, Any]] = {
            "both": {"binds": {Note: stock, Author: engine}},
            "the stock one alone": {"binds": {Note: stock}},
            "a default": {"bind": engine, "binds": {Note: stock}},
        }
        kinds: list[Callable[[str], Any]] = [lambda text: Note(text=text)]
        if binds != "the stock one alone":
            kinds.append(lambda text: Author(name=text))
        for before in kinds:
            with OptInSession(**choice[binds]) as session:
                session.add(before("waiting"))
                with pytest.raises(ValueError, match="mine"), session.begin_nested():
                    session.add_all([kind("gone") for kind in kinds])
                    session.flush()
                    raise ValueError("mine")
                with session.begin_nested():
                    session.add_all([kind("nested") for kind in kinds])
                session.commit()
                assert not session.in_transaction()
            stored = {*self.notes(stock)} | {*onlooker.names()}
            assert stored == {"waiting", "nested"}
            onlooker.run("DELETE FROM author WHERE id > 3")
            with stock.begin() as connection:
                connection.execute(sa.delete(Note))

    def test_a_bulk_call_that_fails_meanwhile_can_be_rolled_back(
        self, session: OptInSession, wire: WireProxy, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        def save() -> None:
            session.bulk_save_objects([Author(name="a"), Author(name="Ada")])

        def insert() -> None:
            session.execute(sa.insert(Author), [{"name": "a"}, {"name": "Ada"}])

        def flush() -> None:
            session.add_all([Author(name="a"), Author(name="Ada")])
            session.flush()

        for fail in (save, insert, flush):
            session.add(Note(text=fail.__name__))
            session.scalars(sa.select(Note)).all()
            with pytest.raises(IntegrityError):
                fail()
            session.rollback()
            assert not session.in_transaction()
            assert wire.transactions_open == 0
            with wire.record() as recording:
                session.get(Author, 1)
            assert sent(recording) in (["SELECT"], [])
            session.expire_all()
        assert self.notes(stock) == []
        assert onlooker.names() == []

    def test_a_bulk_statement_of_the_stock_one_is_stock(
        self, session: OptInSession, stock: sa.Engine
    ) -> None:
        session.execute(sa.insert(Note), [{"text": "a"}, {"text": "b"}])
        session.bulk_save_objects([Note(text="c")])
        assert session.in_transaction()
        session.rollback()
        assert self.notes(stock) == []
        session.bulk_save_objects([Note(text="c")])
        session.commit()
        assert self.notes(stock) == ["c"]

    def test_a_lock_on_ours_is_refused_all_the_same(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        session.get(Note, 1)
        author = session.get_one(Author, 1)
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="begin"):
                session.scalars(sa.select(Author).with_for_update())
            with pytest.raises(InvalidRequestError, match="begin"):
                session.refresh(author, with_for_update=True)
        assert recording.messages == []


def do_commit(session: Session) -> None:
    session.add(Author(name="new"))
    session.commit()


def do_flush(session: Session) -> None:
    session.add(Author(name="new"))
    session.flush()


def do_rollback(session: Session) -> None:
    session.add(Author(name="new"))
    session.flush()
    session.rollback()
    session.add(Author(name="newer"))
    session.commit()


def do_read(session: Session) -> None:
    session.get(Author, 1)


def do_write(session: Session) -> None:
    session.execute(sa.insert(authors).values(name="new"))


def do_block(session: Session) -> None:
    with session.begin():
        session.add(Author(name="new"))


def do_block_that_fails(session: Session) -> None:
    with pytest.raises(ValueError, match="mine"), session.begin():
        session.add(Author(name="new"))
        session.flush()
        raise ValueError("mine")


def do_savepoint(session: Session) -> None:
    session.add(Author(name="outer"))
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(Author(name="Ada"))
    session.commit()


def do_bulk(session: Session) -> None:
    session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])
    session.commit()


def do_autoflush(session: Session) -> None:
    session.add(Author(name="new"))
    assert session.scalar(sa.select(sa.func.count(Author.id))) == 4


ACTIONS = {
    action.__name__: action
    for action in (
        do_commit,
        do_flush,
        do_rollback,
        do_read,
        do_write,
        do_block,
        do_block_that_fails,
        do_savepoint,
        do_bulk,
        do_autoflush,
    )
}


@pytest.mark.parametrize("outer", ["nothing", "transaction", "savepoint"])
@pytest.mark.parametrize(
    "mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]
)
def test_a_session_on_a_connection_does_what_sqlalchemys_does(
    wire_url: str, wire: WireProxy, onlooker: Onlooker, mode: Any, outer: str
) -> None:
    """Row 20, in each ``join_transaction_mode``: the same statements, the same outcome."""

    def play(
        engine: sa.Engine, session_class: type[Session], action: str
    ) -> tuple[list[str], bool, list[str]]:
        with engine.connect() as connection:
            transaction = connection.begin() if outer != "nothing" else None
            savepoint = connection.begin_nested() if outer == "savepoint" else None
            if transaction is not None:
                connection.execute(sa.text("SELECT 'outer'"))
            with wire.record() as recording:
                with session_class(connection, join_transaction_mode=mode) as session:
                    ACTIONS[action](session)
            if savepoint is not None and savepoint.is_active:
                savepoint.commit()
            stands = transaction is not None and transaction.is_active
            if transaction is not None and stands:
                transaction.commit()
        names = onlooker.names()
        onlooker.run("DELETE FROM author WHERE id > 3")
        return sent(recording), stands, names

    with opened(wire_url) as engine:
        stock_engine = sa.create_engine(wire_url)
        stock_engine.connect().close()
        for action in ACTIONS:
            stock = play(stock_engine, Session, action)
            assert play(stock_engine, OptInSession, action) == stock, action
            assert play(engine, OptInSession, action) == stock, action
        stock_engine.dispose()


class TestTheLoan:
    def test_goes_back_after_every_kind_of_statement_when_the_pool_has_no_spare_one(
        self, wire_url: str, wire: WireProxy
    ) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            statements: dict[str, Callable[[OptInSession], Any]] = {
                "get": lambda session: session.get(Author, 1),
                "scalars": lambda session: session.scalars(sa.select(Author)),
                "scalar": lambda session: session.scalar(sa.text("SELECT 1")),
                "write": lambda session: session.execute(sa.update(Author).values(age=3)),
                "flush": lambda session: add(session, "flush"),
                "many": lambda session: session.execute(
                    sa.insert(authors), [{"name": "a"}, {"name": "b"}]
                ),
                "many for the ORM": lambda session: session.execute(
                    sa.insert(Author), [{"name": "c"}, {"name": "d"}]
                ),
                "bulk": lambda session: session.bulk_save_objects([Author(name="e")]),
                "transaction": begin_and_read,
                "stream": lambda session: session.scalars(
                    sa.select(Author).execution_options(yield_per=1)
                ).all(),
                "connection": lambda session: session.connection().scalar(sa.text("SELECT 1")),
                "exec_driver_sql": lambda session: session.connection().exec_driver_sql("SELECT 1"),
            }
            for name, statement in statements.items():
                with OptInSession(engine) as session:
                    statement(session)
                    assert checked_out(engine) == 0, name

    def test_is_kept_once_its_dbapi_connection_was_handed_out(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                cursor = session.connection().connection.cursor()
                session.get(Author, 1)
                cursor.close()
                assert checked_out(engine) == 1  # its user may have a cursor of it
                session.give_back()
                assert checked_out(engine) == 0

    def test_goes_back_after_an_error_too(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                with pytest.raises(ProgrammingError):
                    session.execute(sa.text("SELECT nothing FROM nowhere"))
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError):
                    session.execute(sa.insert(authors), [{"name": "a"}, {"name": "a"}])
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError):
                    add(session, "Ada")
                assert checked_out(engine) == 0
                with pytest.raises(IntegrityError), session.begin():
                    session.add(Author(name="Ada"))
                assert checked_out(engine) == 0

    def test_many_sessions_share_few_connections(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=2, max_overflow=0, pool_timeout=1) as engine:
            sessions = [OptInSession(engine) for _ in range(8)]
            for id in (1, 2, 3):
                for session in sessions:
                    document = session.get_one(Document, id)
                    assert document.author.id == id
                for session in sessions:
                    with session.begin():
                        session.get_one(Author, id).age = 40 + id
            for session in sessions:
                session.close()

    def test_a_stream_keeps_it_until_it_is_read_to_its_end(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                stream = session.scalars(
                    sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
                )
                assert next(stream) == 1
                session.give_back()
                assert checked_out(engine) == 1
                assert list(stream) == [2, 3]
                assert checked_out(engine) == 0

    def test_results_that_nobody_reads_are_not_kept(self, session: OptInSession) -> None:
        """They would fill the memory of a worker that keeps its session."""
        for _ in range(100):
            session.execute(sa.text("SELECT 1"))
            session.execute(sa.select(Author))
            session.connection().execute(sa.select(authors))
        gc.collect()
        assert sum(type(found) is CursorResult for found in gc.get_objects()) <= 10

    def test_an_abandoned_stream_does_not_keep_it(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                for options in ({"yield_per": 1}, {"stream_results": True}):
                    stream = one.scalars(sa.select(Author.id), execution_options=options)
                    assert next(stream)
                    stream.close()
                    assert two.get_one(Author, 1).name == "Ada"
                    two.expire_all()

    def test_objects_that_are_looped_over_may_be_loaded_from_and_written_meanwhile(
        self, wire_url: str, onlooker: Onlooker
    ) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=1) as engine:
            with OptInSession(engine) as session:
                titles: list[str] = []
                for author in session.scalars(sa.select(Author).order_by(Author.id)):
                    titles += [document.title for document in author.documents]
                    session.give_back()
                    with session.begin():
                        author.age = 50 + author.id
                    assert checked_out(engine) == 0
        assert titles == ["Of 1", "Of 2", "Of 3"]
        assert onlooker.column("SELECT age FROM author ORDER BY id") == [51, 52, 53]

    def test_a_pool_that_has_none_in_time_does_no_harm(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0, pool_timeout=0.1) as engine:
            with OptInSession(engine) as holder, OptInSession(engine) as session:
                dirty = session.get_one(Author, 1)
                dirty.age = 77
                with holder.begin():
                    holder.get(Author, 1)
                    for call in (
                        lambda: session.get(Author, 2),
                        lambda: session.bulk_insert_mappings(Author, [{"name": "a"}]),
                        lambda: session.bulk_save_objects([Author(name="c")]),
                        lambda: session.scalar(sa.text("SELECT 1")),
                    ):
                        with pytest.raises(TimeoutError):
                            call()
                        assert not session.in_transaction()
                        assert dirty.age == 77
                    with pytest.raises(TimeoutError), session.begin():
                        session.get(Author, 2)
                    assert not session.in_transaction()
                    session.add(Author(name="gone"))
                    with pytest.raises(TimeoutError):
                        session.commit()
                    assert not session.in_transaction()
                assert session.get_one(Author, 1).age == 30
                with session.begin():
                    session.get(Author, 2)

    def test_many_unread_results_stay_readable(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with OptInSession(engine) as session:
                results = [
                    session.execute(sa.text(f"SELECT n FROM generate_series({n}, {n} + 2) n"))
                    for n in range(30)
                ]
                partly = session.execute(sa.text("SELECT n FROM generate_series(1, 9) n"))
                assert partly.fetchone() == (1,)
                with session.begin():
                    session.get_one(Author, 1).age = 5
                assert [n for (n,) in partly.fetchmany(2)] == [2, 3]
                for n, result in enumerate(results):
                    assert result.scalars().all() == [n, n + 1, n + 2]
                assert partly.scalars().all() == [4, 5, 6, 7, 8, 9]

    def test_results_keep_their_ways_of_being_read(self, wire_url: str) -> None:
        with opened(wire_url, pool_size=1, max_overflow=0) as engine:
            with OptInSession(engine) as session:
                names = sa.select(Author.id, Author.name).order_by(Author.id)
                assert dict(session.execute(names).mappings().first() or {}) == {
                    "id": 1,
                    "name": "Ada",
                }
                assert session.execute(names).columns("name").fetchone() == ("Ada",)
                assert [len(part) for part in session.execute(names).partitions(2)] == [2, 1]
                assert len(list(session.execute(names).yield_per(2))) == 3
                assert session.execute(names.where(Author.id == 9)).one_or_none() is None
                frozen = session.execute(names).freeze()
                assert len(frozen().all()) == 3
                unique = session.scalars(sa.select(Author.age)).unique()
                assert unique.all() == [30]
                result = session.connection().execute(names)
                assert result.keys() == ["id", "name"]
                assert result.rowcount == 3
                written = session.connection().execute(sa.insert(authors).values(name="n"))
                assert written.inserted_primary_key == (4,)
                changed = session.connection().execute(sa.update(authors).values(age=1))
                assert changed.rowcount == 4

    POOLS: dict[str, tuple[type[Pool], dict[str, Any], int | None]] = {  # noqa: RUF012
        "QueuePool without limit": (QueuePool, {"pool_size": 0}, 1),
        "QueuePool of one": (QueuePool, {"pool_size": 1, "max_overflow": 0}, 0),
        "QueuePool of one that overflows": (QueuePool, {"pool_size": 1, "max_overflow": 5}, 0),
        "QueuePool of two": (QueuePool, {"pool_size": 2, "max_overflow": 0}, 1),
        "NullPool": (NullPool, {}, None),
        "StaticPool": (StaticPool, {}, None),
        "SingletonThreadPool": (SingletonThreadPool, {}, None),
    }

    @pytest.mark.parametrize("pool", POOLS)
    def test_works_with_pools_of_every_kind(
        self, wire_url: str, wire: WireProxy, onlooker: Onlooker, pool: str
    ) -> None:
        poolclass, options, kept = self.POOLS[pool]
        with opened(wire_url, poolclass=poolclass, **options) as engine:
            with OptInSession(engine) as session:
                author = session.get_one(Author, 1)
                if kept is not None:
                    assert checked_out(engine) == kept
                with wire.record() as recording:
                    session.get(Author, 2)
                    with session.begin():
                        author.age = 33
                    session.add(Author(name="new"))
                    session.flush()
                    with pytest.raises(ValueError, match="mine"), session.begin():
                        session.execute(sa.delete(Document))
                        raise ValueError("mine")
                    session.give_back()
                    session.get(Author, 3)
                own = [m for m in recording.messages if m.text not in ("", "SELECT 1")]
                verbs = [m.verb for m in own if m.is_statement and m.verb != "DEALLOCATE"]
                assert [verb for verb in verbs if verb not in ("SHOW", "SET")][:4] == [
                    *("SELECT", "BEGIN", "UPDATE", "COMMIT"),
                ]
                assert wire.transactions_open == 0
                session.rollback()
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT max(age) FROM author")) == 33
        assert onlooker.names() == ["new"]
        assert onlooker.scalar("SELECT count(*) FROM document") == 3

    def test_an_assertion_pool_has_none_to_spare(self, wire_url: str) -> None:
        with opened(wire_url, poolclass=AssertionPool) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                assert one.get_one(Author, 1).name == "Ada"
                assert two.get_one(Author, 2).name == "Bob"
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT 1")) == 1

    @pytest.mark.parametrize("poolclass", [StaticPool, SingletonThreadPool])
    def test_one_connection_for_all_is_not_put_back_under_a_transaction(
        self, wire_url: str, onlooker: Onlooker, poolclass: type[Pool]
    ) -> None:
        with opened(wire_url, poolclass=poolclass) as engine:
            with OptInSession(engine) as session, session.begin():
                session.add(Author(name="one"))
                session.flush()
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT count(*) FROM author")) == 4
                with OptInSession(engine) as other:
                    other.get(Author, 1)
                assert onlooker.names() == []
                session.add(Author(name="two"))
            assert onlooker.names() == ["one", "two"]
            with pytest.raises(ValueError, match="mine"):
                with OptInSession(engine) as session, session.begin():
                    session.add(Author(name="three"))
                    session.flush()
                    with OptInSession(engine) as other:
                        other.get(Author, 1)
                        other.rollback()
                    raise ValueError("mine")
            assert onlooker.names() == ["one", "two"]

    @pytest.mark.parametrize("poolclass", [StaticPool, SingletonThreadPool])
    def test_one_connection_for_all_has_one_transaction_at_a_time(
        self, wire_url: str, onlooker: Onlooker, poolclass: type[Pool]
    ) -> None:
        with opened(wire_url, poolclass=poolclass) as engine:
            with OptInSession(engine) as one, OptInSession(engine) as two:
                with one.begin():
                    one.add(Author(name="one"))
                    one.flush()
                    with pytest.raises(InvalidRequestError), two.begin():
                        two.add(Author(name="two"))
                    assert not two.in_transaction()
                    with pytest.raises(InvalidRequestError), engine.begin() as connection:
                        connection.execute(sa.insert(authors).values(name="three"))
                    assert onlooker.names() == []
                    one.add(Author(name="four"))
                assert onlooker.names() == ["four", "one"]
                with two.begin():
                    two.add(Author(name="two"))
        assert onlooker.names() == ["four", "one", "two"]

    def test_a_closed_session_can_be_used_again(
        self, session: OptInSession, engine: OptInEngine
    ) -> None:
        session.get(Author, 1)
        session.close()
        assert checked_out(engine) == 0
        session.get(Author, 1)
        assert checked_out(engine) == 1
        session.invalidate()
        assert checked_out(engine) == 0
        assert session.get_one(Author, 1).name == "Ada"

    def test_a_session_that_is_forgotten_gives_it_back(
        self, sessions: Sessions, engine: OptInEngine
    ) -> None:
        session = sessions()
        session.get(Author, 1)
        session.begin()
        session.execute(sa.insert(Author).values(name="gone"))
        del session
        assert_at_rest(engine)

    @pytest.mark.parametrize("begin_on_write", [False, True])
    @pytest.mark.parametrize("way", ["read", "unread", "partly", "rows", "handed out", "commit"])
    def test_a_session_that_is_forgotten_gives_it_back_without_the_garbage_collector(
        self, engine: OptInEngine, way: str, begin_on_write: bool
    ) -> None:
        def use(session: OptInSession) -> None:
            if way == "read":
                session.scalars(sa.select(Author)).all()
            elif way == "unread":
                session.scalars(sa.select(Author))
            elif way == "partly":
                session.execute(sa.select(authors)).fetchone()
            elif way == "rows":
                session.scalars(sa.select(Author)).first()
            elif way == "handed out":
                session.connection().execute(sa.select(authors))
            add(session, "new")
            session.commit()

        gc.collect()
        gc.disable()
        try:
            use(OptInSession(engine, begin_on_write=begin_on_write))
            assert checked_out(engine) == 0
        finally:
            gc.enable()

    def test_a_result_of_a_session_that_is_forgotten_can_be_read(self, engine: OptInEngine) -> None:
        stream = sa.select(Author.id).order_by(Author.id).execution_options(yield_per=1)
        result, rows = OptInSession(engine).scalars(stream), OptInSession(engine).scalars(stream)
        assert next(rows) == 1
        assert list(result) == [1, 2, 3]
        assert list(rows) == [2, 3]

    @pytest.mark.filterwarnings("ignore::ResourceWarning")  # psycopg's, of the old pool
    def test_a_disposed_engine_goes_on_with_new_connections(
        self, session: OptInSession, engine: OptInEngine, wire: WireProxy
    ) -> None:
        session.get(Author, 1)
        engine.dispose()
        assert session.get_one(Author, 2).name == "Bob"
        session.close()
        assert session.get_one(Author, 2).name == "Bob"
        gc.collect()


def begin_and_read(session: OptInSession) -> None:
    with session.begin():
        session.get(Author, 1)


class TestAKilledServerProcess:
    def test_while_idle_outside(self, session: OptInSession, onlooker: Onlooker) -> None:
        author = session.get_one(Author, 1)
        author.age = 44
        onlooker.kill(backend_pid(session.connection()))
        assert session.get_one(Author, 2).name == "Bob"
        assert author.age == 44
        session.commit()
        assert onlooker.scalar("SELECT age FROM author WHERE id = 1") == 44

    def test_inside(self, session: OptInSession, wire: WireProxy, onlooker: Onlooker) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            session.get(Author, 1)
        assert not session.in_transaction()
        with wire.record() as recording:
            assert session.scalar(sa.select(sa.func.count(Author.id))) == 3
        assert recording.verbs[-1] == "SELECT"
        assert onlooker.names() == []

    def test_before_the_commit(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
        assert not session.in_transaction()
        assert onlooker.names() == []
        session.add(Author(name="after"))
        session.commit()
        assert onlooker.names() == ["after"]

    def test_before_a_flush_outside(self, session: OptInSession, onlooker: Onlooker) -> None:
        session.get(Author, 1)
        session.add(Author(name="waiting"))
        onlooker.kill(backend_pid(session.connection()))
        session.flush()
        assert onlooker.names() == ["waiting"]

    def test_while_idle_in_the_pool(self, sessions: Sessions, onlooker: Onlooker) -> None:
        with sessions() as session:
            pid = backend_pid(session.connection())
        onlooker.kill(pid)
        with sessions() as session:
            with session.begin():
                assert session.get_one(Author, 1).name == "Ada"
                session.add(Author(name="after"))
        assert onlooker.names() == ["after"]

    def test_in_a_savepoint(self, session: OptInSession, onlooker: Onlooker) -> None:
        with pytest.raises(DBAPIError), session.begin():
            session.add(Author(name="gone"))
            with session.begin_nested():
                session.flush()
                onlooker.kill(backend_pid(session.connection()))
                session.get(Author, 1)
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_caught_inside_the_block_is_not_silent(
        self, session: OptInSession, onlooker: Onlooker
    ) -> None:
        with pytest.raises((PendingRollbackError, DBAPIError)), session.begin():
            session.execute(sa.insert(Author).values(name="lost"))
            onlooker.kill(backend_pid(session.connection()))
            with pytest.raises(OperationalError):
                session.execute(sa.insert(Author).values(name="lost too"))
        assert onlooker.names() == []
        assert session.get_one(Author, 1).name == "Ada"

    def test_with_pre_ping_nobody_notices(self, wire_url: str, onlooker: Onlooker) -> None:
        with opened(wire_url, pool_pre_ping=True) as engine:
            with OptInSession(engine) as session:
                pid = backend_pid(session.connection())
            onlooker.kill(pid)
            with OptInSession(engine) as session, session.begin():
                assert session.get_one(Author, 1).name == "Ada"

    def test_a_broken_network_too(
        self, session: OptInSession, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        with pytest.raises(OperationalError), session.begin():
            session.add(Author(name="gone"))
            session.flush()
            wire.cut_all()
        assert session.get_one(Author, 1).name == "Ada"
        assert onlooker.names() == []


def test_a_model_with_a_version_counter(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    class Base(DeclarativeBase):
        pass

    class Page(Base):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        version: Mapped[int] = mapped_column()
        __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    Base.metadata.create_all(session.connection())
    session.add(Page(text="one"))
    session.commit()
    page = session.get_one(Page, 1)
    onlooker.column("UPDATE page SET version = 7 RETURNING 1")
    page.text = "two"
    with pytest.raises(StaleDataError):
        session.commit()
    assert page.version == 7
    page.text = "three"
    session.commit()
    assert onlooker.column("SELECT text FROM page WHERE version = 8") == ["three"]
