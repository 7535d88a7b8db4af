"""Factory Boy: what its factories send. Under isolation they are tested in test_pytest_plugin."""

# A factory inherits the Meta of its base, which it does not subclass.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Iterator

import pytest
from factory.alchemy import SQLAlchemyModelFactory
from factory.declarations import Sequence, SubFactory
from sqlalchemy import ForeignKey
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

from fictive_sqlalchemy import OptInScopedSession, OptInSession, create_engine
from tests.flask.support import sent
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    email: Mapped[str] = mapped_column(unique=True)


class Book(Base):
    __tablename__ = "books"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id))
    author: Mapped[Author] = relationship()


Session = OptInScopedSession(sessionmaker(class_=OptInSession))


@pytest.fixture(autouse=True)
def session(wire_url: str) -> Iterator[OptInSession]:
    """The session of the factories, on an empty database."""
    engine = create_engine(wire_url)
    Base.metadata.create_all(engine)
    yield Session(bind=engine)
    Session.remove()
    engine.dispose()


class AuthorFactory(SQLAlchemyModelFactory):
    """Its objects are pending."""

    class Meta:
        model = Author
        sqlalchemy_session = Session

    name = Sequence("author {}".format)
    email = Sequence("{}@example.com".format)


class BookFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Book
        sqlalchemy_session = Session

    title = Sequence("book {}".format)
    author = SubFactory(AuthorFactory)


class FlushedAuthorFactory(AuthorFactory):
    class Meta:
        sqlalchemy_session_persistence = "flush"


class FlushedBookFactory(BookFactory):
    class Meta:
        sqlalchemy_session_persistence = "flush"

    author = SubFactory(FlushedAuthorFactory)


class CommittedAuthorFactory(AuthorFactory):
    class Meta:
        sqlalchemy_session_persistence = "commit"


class CommittedBookFactory(BookFactory):
    class Meta:
        sqlalchemy_session_persistence = "commit"

    author = SubFactory(CommittedAuthorFactory)


class GotOrCreatedAuthorFactory(FlushedAuthorFactory):
    class Meta:
        sqlalchemy_get_or_create = ("name", "email")


def stored(session: OptInSession) -> tuple[int, int]:
    """How many authors and books another session sees."""
    with OptInSession(session.get_bind()) as other:
        return other.query(Author).count(), other.query(Book).count()


def test_what_is_pending_is_stored_in_one_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    with wire.record() as recording:
        book = BookFactory()
        BookFactory(author=book.author)
    assert sent(recording) == []
    assert session.query(Book).count() == 0  # a read never writes
    with wire.record() as recording:
        session.commit()
    assert sent(recording) == ["BEGIN", "INSERT authors", "INSERT books", "COMMIT"]
    assert stored(session) == (1, 2)


@pytest.mark.parametrize(
    ("authors", "books", "refused"),
    [
        pytest.param(FlushedAuthorFactory, FlushedBookFactory, ["INSERT books"], id="flush"),
        pytest.param(
            CommittedAuthorFactory,
            CommittedBookFactory,
            # commit() has expired the author, whom the flush of the book reads.
            ["BEGIN", "SELECT authors", "INSERT books", "ROLLBACK"],
            id="commit",
        ),
    ],
)
def test_each_object_that_the_factory_stores_is_a_transaction(
    session: OptInSession,
    wire: WireProxy,
    authors: type[AuthorFactory],
    books: type[BookFactory],
    refused: list[str],
) -> None:
    with wire.record() as recording:
        authors()
    assert sent(recording) == ["INSERT authors"]
    books(title="Notes")
    assert stored(session) == (2, 1)
    with wire.record() as recording, pytest.raises(IntegrityError):
        books(title="Notes")
    assert sent(recording) == ["INSERT authors", *refused]
    assert stored(session) == (3, 1)  # the author of the book that was refused
    books()
    assert stored(session) == (4, 2)


def test_flushes_of_a_factory_in_a_block_belong_to_the_block(
    session: OptInSession, wire: WireProxy
) -> None:
    with wire.record() as recording, session.begin():
        FlushedBookFactory(title="Notes")
    assert sent(recording) == ["BEGIN", "INSERT authors", "INSERT books", "COMMIT"]
    with pytest.raises(IntegrityError), session.begin():
        FlushedBookFactory(title="Notes")
    assert stored(session) == (1, 1)


def test_a_commit_of_a_factory_in_a_block_is_refused(session: OptInSession) -> None:
    for begin in (session.begin, session.atomic):
        with pytest.raises(InvalidRequestError, match=r"leave commit\(\) out"), begin():
            CommittedBookFactory()
        assert stored(session) == (0, 0)


def test_get_or_create_outside_is_a_select_and_an_insert(
    session: OptInSession, wire: WireProxy
) -> None:
    with wire.record() as recording:
        ada = GotOrCreatedAuthorFactory(name="Ada", email="ada@example.com")
    assert sent(recording) == ["SELECT authors", "INSERT authors"]
    with wire.record() as recording:
        assert GotOrCreatedAuthorFactory(name="Ada", email="ada@example.com") is ada
    assert sent(recording) == ["SELECT authors"]
    with wire.record() as recording:  # there is none with the e-mail that the factory makes up
        assert GotOrCreatedAuthorFactory(name="Ada") is ada
    assert sent(recording) == ["SELECT authors", "INSERT authors", "SELECT authors"]


def test_get_or_create_may_end_a_block(session: OptInSession) -> None:
    """It calls rollback() where the INSERT was refused, as with SQLAlchemy's session."""
    AuthorFactory(name="Ada")
    session.commit()
    with pytest.raises(InvalidRequestError, match="inside context manager"), session.begin():
        session.add_all([FlushedAuthorFactory(name="Bob"), GotOrCreatedAuthorFactory(name="Ada")])
    assert stored(session) == (1, 0)
