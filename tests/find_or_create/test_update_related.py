"""``update_or_create()`` with related objects among the defaults."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from tests.find_or_create.stores import Author, Book, Store
from tests.wire import WireProxy

both = pytest.mark.parametrize("where", ["outside", "inside"])


def block(store: Store, where: str) -> Any:
    return store.session.begin() if where == "inside" else nullcontext()


@both
def test_a_related_object_that_is_stored(store: Store, wire: WireProxy, where: str) -> None:
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


def test_a_foreign_key_that_only_the_session_remembers(store: Store, another: Store) -> None:
    ada, _ = store.ask(Author, name="Ada")
    store.ask(Author, name="Bob")
    book, _ = store.put(Book, {"author": ada}, title="Notes")
    assert book.author is ada
    bob = another.ask(Author, name="Bob")[0]
    another.put(Book, {"author": bob}, title="Notes")
    store.put(Book, {"author": ada}, title="Notes")
    assert store.stored(Book, "author_id") == [ada.id]
    assert book.author is ada


def test_inside_related_objects_are_stored_with_it(store: Store) -> None:
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
