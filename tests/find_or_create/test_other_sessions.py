"""SQLAlchemy's own sessions and binds, a connection of the user's own and SQLite work, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session

from fictive_sqlalchemy import OptInSession, create_engine
from tests.find_or_create.stores import Author, Base, Book, Store, User
from tests.wire import WireProxy


def test_a_session_of_sqlalchemy_is_always_inside(
    make_store: Callable[..., Store], wire: WireProxy
) -> None:
    store = make_store(create=sa.create_engine, session_class=Session)
    with wire.record() as recording:
        ada, created = store.ask(User, {"name": "Ada"}, email="ada@x")
        assert created
        assert store.ask(User, email="ada@x") == (ada, False)
    assert recording.verbs == ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE", "SELECT"]
    assert store.stored(User, "email") == []
    store.session.commit()
    assert store.stored(User, "email") == ["ada@x"]


def test_a_bind_of_sqlalchemy_is_always_inside(
    make_store: Callable[..., Store], wire: WireProxy
) -> None:
    store = make_store(create=sa.create_engine)
    assert isinstance(store.session, OptInSession)
    with wire.record() as recording:
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert recording.verbs == ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE"]
    store.session.commit()
    assert store.stored(User, "email") == ["ada@x"]


def test_a_connection_of_the_users_own_is_always_inside(store: Store) -> None:
    with store.engine.connect() as connection, connection.begin() as transaction:
        session = OptInSession(connection)
        assert store.ask(User, {"name": "Ada"}, session, email="ada@x")[1]
        session.close()
        transaction.rollback()
    assert store.stored(User, "email") == []


@pytest.mark.parametrize("create", [create_engine, sa.create_engine])
def test_rows_are_found_or_created_on_sqlite(create: Callable[..., sa.Engine]) -> None:
    engine = create("sqlite://")
    names = ("users", "authors", "books")
    Base.metadata.create_all(engine, [Base.metadata.tables[name] for name in names])
    store = Store(engine)
    ada, created = store.ask(User, {"name": "Ada", "nick": "a"}, email="ada@x")
    assert created
    assert store.ask(User, email="ada@x") == (ada, False)
    with pytest.raises(exc.IntegrityError):
        store.ask(User, {"name": "Ada", "nick": "a"}, email="eve@x")
    store.session.commit()
    with store.session.begin():
        with pytest.raises(exc.IntegrityError):
            store.ask(User, {"name": "Ada", "nick": "a"}, email="eve@x")
        assert store.ask(User, {"name": "Bob"}, email="bob@x")[1]
    author, _ = store.ask(Author, name="A")
    assert store.ask(Book, title="T", author=author)[0].author is author
    store.session.commit()
    assert store.session.scalars(sa.select(User.email).order_by("email")).all() == [
        "ada@x",
        "bob@x",
    ]
    store.session.close()
    engine.dispose()


@pytest.mark.parametrize("create", [create_engine, sa.create_engine])
def test_sqlite_finds_a_row_that_another_session_has_created_meanwhile(
    create: Callable[..., sa.Engine], tmp_path: Path
) -> None:
    engine = create(f"sqlite:///{tmp_path}/database")
    Base.metadata.create_all(engine, [Base.metadata.tables["users"]])
    store = Store(engine)

    def create_it_meanwhile() -> str:
        with Session(engine) as other:
            other.add(User(email="ada@x", name="Ada"))
            other.commit()
        return "Bob"

    found, created = store.ask(User, {"name": create_it_meanwhile}, email="ada@x")
    assert (found.name, created) == ("Ada", False)
    store.session.close()
    engine.dispose()
