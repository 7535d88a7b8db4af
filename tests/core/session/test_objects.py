"""Outside a transaction a flush and a commit store objects and expire them as SQLAlchemy does."""

# ruff: noqa: PT012  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
)
from sqlalchemy.orm.exc import StaleDataError

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Document, Onlooker, Sessions, sent
from tests.wire import WireProxy


class TestObjectsOutside:
    def test_a_flush_outside_does_not_expire_objects(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        author, new = session.get_one(Author, 1), Author(name="new")
        author.age = 31
        session.add(new)
        session.flush()
        with wire.record() as recording:
            assert (author.age, new.name, new.id) == (31, "new", 4)
        assert recording.messages == []

    def test_a_commit_outside_expires_objects(self, session: OptInSession, wire: WireProxy) -> None:
        author = session.get_one(Author, 1)
        author.age = 31
        session.commit()
        with wire.record() as recording:
            assert author.age == 31
        assert sent(recording) == ["SELECT"]

    def test_a_commit_outside_with_nothing_waiting_expires_objects(
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

    def test_a_flush_that_failed_leaves_new_objects_transient_to_be_added_again(
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

    def test_an_object_that_was_deleted_and_flushed_is_gone(
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

    def test_an_object_whose_deletion_failed_is_back(self, session: OptInSession) -> None:
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

    def test_refresh_and_expire_forget_the_change_of_one_object_and_send_one_select(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        one, two = session.get_one(Author, 1), session.get_one(Author, 2)
        one.age = two.age = 99
        with wire.record() as recording:
            session.refresh(one)
            session.expire(two)
            assert (one.age, two.age) == (30, 30)
        assert sent(recording) == ["SELECT", "SELECT"]

    def test_a_flush_of_a_row_that_somebody_deleted_meanwhile_changes_nothing(
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
            session.add_all([Author(name="new"), Author(name="newer")])
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
        with pytest.raises(IntegrityError), sessions.begin() as session:
            session.add(Author(name="newest"))
            session.flush()
            session.add(Author(name="new"))
        assert onlooker.names() == ["new", "newer"]


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
    def test_a_dynamic_relationship_is_read_outside_without_writing(
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

    def test_a_dynamic_relationship_is_read_inside_after_a_flush(
        self, session: OptInSession, wire: WireProxy
    ) -> None:
        writer = session.get_one(Writer, 1)
        with wire.record() as recording, session.begin():
            writer.books.append(Book(title="new"))
            assert writer.books.count() == 2
            with session.no_autoflush:
                writer.books.append(Book(title="newer"))
                assert writer.books.count() == 2
        assert recording.verbs == ["BEGIN", "INSERT", "SELECT", "SELECT", "INSERT", "COMMIT"]

    def test_a_dynamic_relationship_of_another_database_is_read_after_a_flush(self) -> None:
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


def test_a_version_counter_refuses_what_somebody_else_has_changed(
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
