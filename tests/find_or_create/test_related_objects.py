"""Related objects can be filters and defaults."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from tests.find_or_create.stores import (
    Author,
    Book,
    Careful,
    Child,
    Parent,
    Store,
    Tag,
    Tagging,
    User,
)
from tests.wire import WireProxy


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_related_object_is_a_filter_and_a_default(
    store: Store, wire: WireProxy, where: str
) -> None:
    session = store.session
    ada, _ = store.ask(Author, name="Ada")
    bob, _ = store.ask(Author, name="Bob")
    assert ada.books == []
    with wire.record() as recording, session.begin() if where == "inside" else nullcontext():
        book, created = store.ask(Book, {"reviewer": bob}, author=ada, title="Notes")
        assert created
        assert (book.author, book.reviewer) == (ada, bob)
        assert (book.author_id, book.reviewer_id) == (ada.id, bob.id)
        assert store.ask(Book, author=ada, title="Notes") == (book, False)
        same, _ = store.ask(Book, {"reviewer": ada}, author=ada, title="Same")
        assert (same.author, same.reviewer) == (ada, ada)
    if where == "outside":
        assert recording.verbs == ["SELECT", "INSERT", "SELECT", "SELECT", "INSERT"]
    assert ada.books == [book, same]
    assert not session.dirty
    assert not session.new
    assert store.stored(Book, "title", "author_id", "reviewer_id") == [
        ("Notes", ada.id, bob.id),
        ("Same", ada.id, ada.id),
    ]


def test_none_for_a_related_object_is_a_filter(store: Store) -> None:
    ada, _ = store.ask(Author, name="Ada")
    assert store.ask(Book, author=ada, title="Notes")[1]
    book, created = store.ask(Book, author=None, title="Notes")
    assert (book.author, book.author_id, created) == (None, None, True)
    with store.session.begin():
        assert store.ask(Book, author=None, title="Notes") == (book, False)


def test_outside_a_related_object_stays_as_it_was(store: Store, wire: WireProxy) -> None:
    session = store.session
    ada, _ = store.ask(Author, name="Ada")
    ada.mood = "bad"
    waiting = Book(title="Waiting")
    ada.books.append(waiting)
    with wire.record() as recording:
        book, created = store.ask(Book, author=ada, title="Notes")
    assert created
    assert recording.verbs == ["SELECT", "INSERT"]
    assert (ada.mood, ada.books) == ("bad", [waiting, book])
    assert (set(session.new), set(session.dirty)) == ({waiting}, {ada})
    assert store.stored(Author, "name", "mood") == [("Ada", None)]
    session.commit()
    session.expire_all()
    assert ada.books == [book, waiting]


def test_outside_a_constructor_looks_at_the_related_object_as_it_is(
    store: Store, wire: WireProxy
) -> None:
    ada, _ = store.ask(Author, {"mood": "fine"}, name="Ada")
    ada.mood = "bad"
    with wire.record() as recording:
        one, created = store.ask(Careful, {"word": "p"}, email="one@x", author=ada)
    assert (one.author, one.author_id, created) == (ada, ada.id, True)
    assert one.author_name == "Ada, bad"
    assert recording.verbs == ["SELECT", "INSERT"]
    assert store.stored(Author, "mood") == ["fine"]


def test_outside_a_related_object_may_be_in_no_session(store: Store) -> None:
    ada, _ = store.ask(Author, name="Ada")
    store.session.expunge(ada)
    book, created = store.ask(Book, author=ada, title="Notes")
    assert (book.author_id, created) == (ada.id, True)
    assert book.author is ada
    assert ada in store.session


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [Book, Careful])
def test_the_loser_of_a_race_leaves_related_objects_alone(
    store: Store,
    another: Store,
    just_before_insert: Callable[..., None],
    where: str,
    model: type[Any],
) -> None:
    ada, _ = store.ask(Author, name="Ada")
    mine: dict[str, Any] = {"title": "Notes"} if model is Book else {"email": "e@x"}
    word = {} if model is Book else {"word": "p"}
    assert ada.books == []

    def win() -> None:
        another.ask(model, word, author=another.session.get(Author, ada.id), **mine)

    just_before_insert(win)
    with store.session.begin() if where == "inside" else nullcontext():
        book, created = store.ask(model, word, author=ada, **mine)
        assert not created
        assert not store.session.dirty
    assert store.stored(model, "id") == [book.id]
    store.session.expire_all()
    assert ada.books == ([book] if model is Book else [])


def test_related_objects_that_would_have_to_be_written_are_refused_outside(
    store: Store, wire: WireProxy
) -> None:
    new = Author(name="New")
    store.session.add(new)
    calls: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"title": "Notes"}, {"author": new}),
        ({"title": "Notes", "author": new}, {}),
        ({"title": "Notes"}, {"author": Author(name="Other")}),
    ]
    for filters, defaults in calls:
        with (
            wire.record() as recording,
            pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*session.begin"),
        ):
            store.ask(Book, defaults, **filters)
        assert recording.verbs == []
    with (
        wire.record() as recording,
        pytest.raises(exc.InvalidRequestError, match=r"changes other rows.*session.begin"),
    ):
        store.ask(Author, {"books": [Book(title="Notes")]}, name="Ada")
    assert recording.verbs == []
    assert list(store.session.new) == [new]


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(
    ("model", "value", "error", "message"),
    [
        (Book, {"author": "Ada"}, exc.ArgumentError, "Book.author is a Author or None, not 'Ada'"),
        (Book, {"author": User()}, exc.ArgumentError, "Book.author is a Author or None, not <"),
        (Book, {"any_author": Author()}, exc.InvalidRequestError, "viewonly.*columns"),
    ],
)
def test_what_is_no_related_object_is_refused(
    store: Store,
    wire: WireProxy,
    where: str,
    model: type[Any],
    value: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(error, match=message):
            store.ask(model, title="Notes", **value)
        with pytest.raises(error, match=message):
            store.ask(model, value, title="Notes")
    assert recording.verbs == []


def test_related_objects_are_written_inside(store: Store) -> None:
    new = Author(name="New")
    with store.session.begin():
        store.session.add(new)
        book, created = store.ask(Book, title="Notes", author=new)
        assert created
        assert store.ask(Book, title="Notes", author=new) == (book, False)
        assert store.ask(Book, {"author": Author(name="Other")}, title="More")[1]
        ada, created = store.ask(Author, {"books": [Book(title="Last")]}, name="Ada")
        assert created
    assert [book.title for book in ada.books] == ["Last"]
    assert store.stored(Author, "name") == ["Ada", "New", "Other"]


def test_a_filter_that_nothing_can_refer_to_is_refused_inside(
    store: Store, wire: WireProxy
) -> None:
    with store.session.begin():
        waiting = Author(name="New")
        with pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*flush"):
            store.ask(Book, title="Notes", author=waiting)
        store.session.add(waiting)
        with (
            store.session.no_autoflush,
            pytest.raises(exc.InvalidRequestError, match=r"not stored yet.*flush"),
        ):
            store.ask(Book, title="Notes", author=waiting)


def test_what_a_constructor_makes_is_written_with_its_object(store: Store) -> None:
    parent, created = store.ask(Parent, key="p")
    assert created
    assert [child.name for child in parent.children] == ["first"]
    assert parent.children[0].parent is parent
    assert set(store.session) == {parent, parent.children[0]}
    with store.session.begin():
        _, created = store.ask(Parent, key="q")
        assert created
    assert store.stored(Child, "parent_key", "name") == [("p", "first"), ("q", "first")]


def test_what_waits_in_the_session_is_not_taken_along_outside(store: Store) -> None:
    tag = Tag(name="new")
    store.session.add(tag)
    with pytest.raises(exc.InvalidRequestError, match=r"takes along a Tag.*session.begin"):
        store.ask(Book, {"tags": [tag]}, title="Notes")
    assert list(store.session.new) == [tag]
    assert store.stored(Book, "title") == []
    with store.session.begin():
        book, created = store.ask(Book, {"tags": [tag]}, title="Notes")
        assert (list(book.tags), created) == ([tag], True)
    assert store.stored(Tagging, "book_id", "tag_name") == [(book.id, "new")]


def test_what_an_association_proxy_makes_is_stored_with_its_object(store: Store) -> None:
    tag, _ = store.ask(Tag, name="new")
    book, created = store.ask(Book, {"tags": [tag]}, title="Notes")
    assert (list(book.tags), created) == ([tag], True)
    assert store.stored(Tagging, "book_id", "tag_name") == [(book.id, "new")]


def test_an_object_whose_row_was_deleted_by_another_is_that_of_the_new_row(
    store: Store, another: Store
) -> None:
    models: list[tuple[type[Any], dict[str, Any]]] = [(Tag, {"name": "k"}), (Parent, {"key": "k"})]
    for model, filters in models:
        old, _ = store.ask(model, **filters)
        with another.engine.begin() as connection:
            connection.execute(sa.delete(Child))
            connection.execute(sa.delete(model))
        new, created = store.ask(model, **filters)
        assert created
        assert new is old
        assert filters.items() <= {name: getattr(new, name) for name in filters}.items()
