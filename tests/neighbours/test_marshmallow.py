"""marshmallow-sqlalchemy: what loading sends, and what is stored of it."""

# Its schemas take as type parameter no class of DeclarativeBase.
# mypy: disable-error-code="type-arg"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from marshmallow import ValidationError
from marshmallow_sqlalchemy import SQLAlchemyAutoSchema
from marshmallow_sqlalchemy.fields import Nested
from sqlalchemy import ForeignKey
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fictive_sqlalchemy import OptInSession, create_engine
from tests.flask.support import sent
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    books: Mapped[list[Book]] = relationship(
        back_populates="author", cascade="all, delete-orphan", order_by="Book.id"
    )


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship(back_populates="books")


class BookSchema(SQLAlchemyAutoSchema):
    class Meta:
        model = Book
        load_instance = True


class AuthorSchema(SQLAlchemyAutoSchema):
    class Meta:
        model = Author
        load_instance = True

    books = Nested(BookSchema, many=True)


@pytest.fixture
def session(wire_url: str) -> Iterator[OptInSession]:
    """On a database with an author, Ada, and two books of hers."""
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    with OptInSession(engine) as session:
        ada = Author(name="Ada", books=[Book(title="Notes"), Book(title="Letters")])
        session.add_all([ada, Author(name="Bob")])
        session.commit()
    with OptInSession(engine) as session:
        yield session
    engine.dispose()


def stored(session: OptInSession) -> dict[str, list[str]]:
    """What another session sees."""
    with OptInSession(session.get_bind()) as other:
        authors = other.query(Author).order_by(Author.id)
        return {author.name: [book.title for book in author.books] for author in authors}


BEFORE = {"Ada": ["Notes", "Letters"], "Bob": []}


def test_dumping_sends_reads_alone(session: OptInSession, wire: WireProxy) -> None:
    ada = session.get_one(Author, 1)
    with wire.record() as recording:
        assert AuthorSchema().dump(ada) == {
            "id": 1,
            "name": "Ada",
            "books": [{"id": 1, "title": "Notes"}, {"id": 2, "title": "Letters"}],
        }
    assert sent(recording) == ["SELECT books"]


def test_loading_into_an_object_sends_nothing(session: OptInSession, wire: WireProxy) -> None:
    ada = session.get_one(Author, 1)
    with wire.record() as recording:
        assert AuthorSchema().load({"name": "Grace"}, session=session, instance=ada) is ada
    assert sent(recording) == []
    with wire.record() as recording:
        session.commit()
    assert sent(recording) == ["UPDATE authors"]
    assert stored(session) == {"Grace": ["Notes", "Letters"], "Bob": []}


def test_loading_by_key_is_a_read(session: OptInSession, wire: WireProxy) -> None:
    with wire.record() as recording:
        ada = AuthorSchema().load({"id": 1, "name": "Grace"}, session=session)
    assert sent(recording) == ["SELECT authors"]
    assert ada in session.dirty
    assert stored(session) == BEFORE


def test_what_is_nested_is_stored_with_its_object(session: OptInSession, wire: WireProxy) -> None:
    data = {"id": 1, "name": "Grace", "books": [{"id": 2, "title": "Diary"}, {"title": "Poems"}]}
    with wire.record() as recording:
        AuthorSchema().load(data, session=session)
    assert set(recording.verbs) == {"SELECT"}
    with wire.record() as recording:
        session.commit()
    assert recording.verbs[0] == "BEGIN"
    assert recording.verbs.count("COMMIT") == 1
    assert sorted(sent(recording)[1:-1]) == [
        "DELETE books",
        "INSERT books",
        "UPDATE authors",
        "UPDATE books",
    ]
    assert stored(session) == {"Grace": ["Diary", "Poems"], "Bob": []}


def test_loading_inside_belongs_to_the_transaction(session: OptInSession, wire: WireProxy) -> None:
    with wire.record() as recording, session.begin():
        session.add(AuthorSchema().load({"name": "Cid"}, session=session))
        AuthorSchema().load({"id": 2, "name": "Rob"}, session=session)
    assert sent(recording) == [
        "BEGIN",
        "INSERT authors",
        "SELECT authors",
        "UPDATE authors",
        "COMMIT",
    ]


def test_nothing_of_what_the_database_refuses_is_stored(session: OptInSession) -> None:
    new: dict[str, Any] = {"name": "Cid", "books": [{"title": "New"}, {"title": "Notes"}]}
    session.add(AuthorSchema().load(new, session=session))
    with pytest.raises(IntegrityError):
        session.commit()
    assert stored(session) == BEFORE
    new["books"].pop()
    session.add(AuthorSchema().load(new, session=session))
    session.commit()
    assert stored(session) == {**BEFORE, "Cid": ["New"]}


def test_what_is_invalid_leaves_the_objects_alone(session: OptInSession, wire: WireProxy) -> None:
    with wire.record() as recording, pytest.raises(ValidationError):
        AuthorSchema().load({"id": 1, "name": None}, session=session)
    assert sent(recording) == []
    assert not session.dirty


def test_what_is_loaded_and_not_wanted_waits_for_the_next_commit(
    session: OptInSession, wire: WireProxy
) -> None:
    """As with SQLAlchemy's session. To check alone, load without load_instance."""
    AuthorSchema().load({"id": 1, "name": "Grace"}, session=session)
    session.rollback()
    session.commit()
    assert stored(session) == BEFORE
    AuthorSchema().load({"id": 1, "name": "Grace"}, session=session)
    with session.begin():
        session.get_one(Author, 2).name = "Rob"
    assert stored(session) == {"Grace": BEFORE["Ada"], "Rob": []}
    with wire.record() as recording:
        data = AuthorSchema(load_instance=False).load({"id": 1, "name": "Eve"})
    assert data == {"id": 1, "name": "Eve"}
    assert sent(recording) == []
