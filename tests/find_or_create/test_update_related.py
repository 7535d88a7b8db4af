"""``update_or_create()`` with related objects among the defaults."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import exc

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create, update_or_create
from tests.find_or_create.models import Author as Writer
from tests.find_or_create.models import Portrait, Rows
from tests.find_or_create.stores import Author, Book, Store
from tests.wire import WireProxy

both = pytest.mark.parametrize("where", ["outside", "inside"])


def block(store: Store, where: str) -> Any:
    return store.session.begin() if where == "inside" else nullcontext()


@both
def test_a_related_object_that_is_stored_may_be_a_default(
    store: Store, wire: WireProxy, where: str
) -> None:
    ada, _ = store.ask(Author, name="Ada")
    bob, _ = store.ask(Author, name="Bob")
    with block(store, where):
        book, _ = store.put(Book, {"author": ada}, title="Notes")
        assert ada.books == [book]
        with wire.record() as recording:
            store.put(Book, {"author": bob}, title="Notes")
        assert recording.verbs.count("UPDATE") == 1
        assert (book.author, ada.books, bob.books) == (bob, [], [book])
        with wire.record() as recording:
            store.put(Book, {"author": bob}, title="Notes")
        assert recording.verbs == ["SELECT"]
        store.put(Book, {"author": None}, title="Notes")
        assert bob.books == []
        store.put(Book, {"author_id": ada.id}, title="Notes")
    assert not store.session.dirty
    store.session.expire_all()
    with wire.record() as recording:
        store.put(Book, {"author": ada}, title="Notes")
    assert recording.verbs == ["SELECT"]
    assert store.stored(Book, "author_id") == [ada.id]


def test_a_related_object_goes_on_waiting_outside(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(Author, name="Ada")
    bob, _ = store.ask(Author, name="Bob")
    book, _ = store.put(Book, {"author": ada}, title="Notes")
    assert (ada.books, bob.books) == ([book], [])
    ada.mood = bob.mood = "bad"
    with wire.record() as recording:
        store.put(Book, {"author": bob}, title="Notes")
    assert recording.verbs == ["SELECT", "UPDATE"]
    assert store.stored(Author, "mood") == [None, None]
    assert set(store.session.dirty) == {ada, bob}
    with wire.record() as recording:
        store.session.commit()
    assert {text.split()[1] for text in recording.statements if "UPDATE" in text} == {"authors"}
    assert (ada.books, bob.books) == ([], [book])
    assert store.stored(Book, "author_id") == [bob.id]


def test_a_foreign_key_that_only_the_session_remembers_is_stored_again(
    store: Store, another: Store
) -> None:
    ada, _ = store.ask(Author, name="Ada")
    store.ask(Author, name="Bob")
    book, _ = store.put(Book, {"author": ada}, title="Notes")
    assert book.author is ada
    bob = another.ask(Author, name="Bob")[0]
    another.put(Book, {"author": bob}, title="Notes")
    store.put(Book, {"author": ada}, title="Notes")
    assert store.stored(Book, "author_id") == [ada.id]
    assert book.author is ada


def test_inside_related_objects_are_stored_with_the_object(store: Store) -> None:
    with store.session.begin():
        store.put(Book, title="Notes")
        book, _ = store.put(Book, {"author": Author(name="New")}, title="Notes")
        assert store.put(Author, {"books": [book, Book(title="More")]}, name="New")[1] is False
    assert store.stored(Author, "name") == ["New"]
    assert len(set(store.stored(Book, "author_id"))) == 1


def test_a_value_that_waits_for_a_relationship_gives_way_to_the_default(
    store: Store, another: Store
) -> None:
    ada, bob = store.put(Author, name="Ada")[0], store.put(Author, name="Bob")[0]
    book, _ = store.put(Book, {"author": ada}, title="Notes")
    another.put(Book, {"author_id": bob.id}, title="Notes")
    book.author = None
    store.put(Book, {"author": ada}, title="Notes")
    assert book.author is ada
    store.session.commit()
    assert store.stored(Book, "author_id") == [ada.id]


@pytest.mark.parametrize("is_function", [True, False])
def test_outside_an_error_leaves_a_related_object_of_no_session_alone(
    store: Store, is_function: bool
) -> None:
    ada, bob = store.ask(Author, name="Ada")[0], store.ask(Author, name="Bob")[0]
    book, _ = store.put(Book, {"author": ada}, title="Notes")
    other, _ = store.put(Book, {"author": bob}, title="More")
    assert bob.books == [other]
    store.session.expunge(bob)
    store.session.expunge(other)
    bob_or_function = (lambda: bob) if is_function else bob
    with pytest.raises(exc.IntegrityError):
        store.put(Book, {"author": bob_or_function, "reviewer_id": 999}, title="Notes")
    assert (book.author, ada.books) == (ada, [book])
    assert (bob.books, other.author) == ([other], bob)
    assert list(store.session.dirty) == []
    assert set(store.session) == {ada, book}
    store.put(Book, {"author": bob}, title="Notes")
    assert bob in store.session
    assert store.stored(Book, "author_id") == [bob.id, bob.id]


@pytest.mark.parametrize("is_function", [True, False])
@pytest.mark.parametrize("is_waiting", [True, False])
def test_outside_an_error_leaves_the_other_side_of_one_to_one_alone(
    session: OptInSession, rows: Rows, is_waiting: bool, is_function: bool
) -> None:
    def put(title: str, **defaults: Any) -> Portrait:
        return update_or_create(session, Portrait, {"title": title}, defaults)[0]

    ada, bob = (filter_by_or_create(session, Writer, {"name": name}, {})[0] for name in "AB")
    of_ada, of_bob = put("a", author=ada), put("b", author=bob)
    assert (ada.portrait, bob.portrait) == (of_ada, of_bob)
    if is_waiting:
        bob.mood = "waits"
    with pytest.raises(exc.IntegrityError):
        update_or_create(
            session,
            Portrait,
            {"title": "a"},
            {"author": (lambda: bob) if is_function else bob, "size": -1},
        )
    assert (ada.portrait, bob.portrait) == (of_ada, of_bob)
    assert (of_ada.author, of_bob.author) == (ada, bob)
    session.commit()
    assert rows("SELECT author_id FROM portraits ORDER BY title") == [ada.id, bob.id]
    assert rows("SELECT mood FROM writers ORDER BY name") == [None, "waits" if is_waiting else None]
