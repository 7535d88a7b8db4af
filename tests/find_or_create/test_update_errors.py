"""What can't be changed of an object that is found is refused before anything is sent."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import exc

from fictive_sqlalchemy.filter_by_or_create import update_or_create
from tests.find_or_create.stores import (
    Author,
    Book,
    Careful,
    Chapter,
    Defaults,
    Place,
    Store,
    Tag,
    User,
)
from tests.wire import WireProxy


@pytest.mark.parametrize(
    ("model", "filters", "defaults", "error", "message"),
    [
        (User, {}, {"name": "A"}, exc.ArgumentError, r"User.update_or_create\(\) has nothing to"),
        (
            User,
            {"mail": "a"},
            {},
            exc.InvalidRequestError,
            "User has no attribute 'mail'; it has 'name', 'id",
        ),
        (User, {"email": "a"}, {"mail": "a"}, exc.InvalidRequestError, "no attribute 'mail'"),
        (
            User,
            {"email": "a"},
            {"email": "b"},
            exc.ArgumentError,
            r"User.update_or_create\(\) searches for 'email'",
        ),
        (
            Place,
            {"called": "Top"},
            {"label": "Peak"},
            exc.ArgumentError,
            r"Place.update_or_create\(\) searches for 'label'",
        ),
        (
            Book,
            {"author": None},
            {"author_id": 7},
            exc.ArgumentError,
            r"Book.update_or_create\(\) searches for 'author_id'",
        ),
        (
            Careful,
            {"email": "a@x"},
            {"word": "p"},
            exc.InvalidRequestError,
            "no attribute 'word' that can be set .* constructor takes into create_defaults",
        ),
        (
            User,
            {"email": "a"},
            {"id": 7},
            exc.InvalidRequestError,
            r"can't change 'id' of an object that is found: it is part of the primary key; a new",
        ),
        (
            Chapter,
            {"title": "One"},
            {"book": None},
            exc.InvalidRequestError,
            "can't change 'book' .* primary key",
        ),
        (
            Defaults,
            {"key": "k"},
            {"computed": "c"},
            exc.InvalidRequestError,
            "can't change 'computed' .* computed by the database",
        ),
        (
            Defaults,
            {"key": "k"},
            {"loud": "K"},
            exc.InvalidRequestError,
            "can't change 'loud' .* SQL expression",
        ),
        (
            Book,
            {"title": "a"},
            {"any_author": None},
            exc.InvalidRequestError,
            "any_author is viewonly",
        ),
        (Book, {"title": "a"}, {"author": "Ada"}, exc.ArgumentError, "a Author or None, not 'Ada'"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_sent(
    store: Store,
    wire: WireProxy,
    model: type[Any],
    filters: dict[str, Any],
    defaults: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with wire.record() as recording:
        with pytest.raises(error, match=message):
            store.put(model, defaults, **filters)
        with pytest.raises(error, match=message), store.session.begin():
            store.put(model, defaults, {}, **filters)
    assert recording.verbs == []


@pytest.mark.parametrize(
    ("create_defaults", "error", "message"),
    [
        ({"mail": "a"}, exc.InvalidRequestError, "User has no attribute 'mail'; it has"),
        ({"email": "b"}, exc.ArgumentError, r"searches for 'email', which a new object gets"),
    ],
)
def test_create_defaults_are_checked_also_if_the_object_is_found(
    store: Store,
    wire: WireProxy,
    create_defaults: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    store.put(User, {"name": "Ada"}, email="ada@x")
    with wire.record() as recording, pytest.raises(error, match=message):
        store.put(User, {"name": "A"}, create_defaults, email="ada@x")
    assert recording.verbs == []


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_related_object_does_not_change_what_is_searched_for(
    store: Store, wire: WireProxy, where: str
) -> None:
    ada, bob = store.ask(Author, name="Ada")[0], store.ask(Author, name="Bob")[0]
    store.ask(Book, {"title": "Notes"}, author=ada)
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        store.put(Book, {"author": ada}, author_id=ada.id)
        for author in (bob, None, lambda: bob):
            with pytest.raises(exc.ArgumentError, match="searches for 'author', and can't change"):
                store.put(Book, {"author": author}, author_id=ada.id)
    assert "UPDATE" not in recording.verbs
    assert not store.session.dirty


def test_what_is_no_mapping_is_refused(store: Store, wire: WireProxy) -> None:
    wrong: Any = "Ada"
    with wire.record() as recording:
        with pytest.raises(exc.ArgumentError, match="not 'Ada'"):
            update_or_create(store.session, User, {"email": "ada@x"}, wrong)
        with pytest.raises(exc.ArgumentError, match="not 'Ada'"):
            update_or_create(store.session, User, {"email": "ada@x"}, {}, wrong)
    assert recording.verbs == []


def test_a_new_object_may_get_what_a_found_one_may_not(store: Store) -> None:
    ada, created = store.put(User, {"name": "Ada"}, {"name": "Ada", "id": 7}, email="ada@x")
    assert (ada.id, created) == (7, True)
    assert store.put(User, {"name": "A."}, {"name": "Ada", "id": 8}, email="ada@x") == (ada, False)
    one, _ = store.put(Careful, {"secret": "s"}, {"word": "p"}, email="one@x")
    assert one.secret == "hash of p"
    store.put(Careful, {"secret": "s"}, {"word": "p"}, email="one@x")
    assert store.stored(Careful, "secret") == ["s"]


def test_more_than_one_row_that_is_found_is_an_error(store: Store) -> None:
    for email in ("a@x", "b@x", "c@x"):
        store.ask(User, {"name": "Same"}, email=email)
    with pytest.raises(exc.MultipleResultsFound):
        store.put(User, {"age": 1}, name="Same")
    with store.session.begin(), pytest.raises(exc.MultipleResultsFound):
        store.put(User, {"age": 1}, name="Same")
    assert store.stored(User, "age") == [None] * 3


def test_outside_related_objects_that_would_have_to_be_written_are_refused(
    store: Store, wire: WireProxy
) -> None:
    store.put(Book, title="Notes")
    store.put(Author, name="Ada")
    new = Author(name="New")
    store.session.add(new)
    with wire.record() as recording:
        for author in (new, Author(name="Other")):
            with pytest.raises(
                exc.InvalidRequestError, match=r"not stored yet, and update_or_create\(\) outside"
            ):
                store.put(Book, {"author": author}, title="Notes")
        with pytest.raises(exc.InvalidRequestError, match=r"changes other rows, but update_or_c"):
            store.put(Author, {"books": []}, name="Ada")
    assert recording.verbs == []
    with pytest.raises(exc.InvalidRequestError, match="not stored yet"):
        store.put(Book, {"author": lambda: new}, title="Notes")
    assert list(store.session.new) == [new]
    assert store.stored(Book, "author_id") == [None]


def test_outside_an_object_that_waits_is_not_taken_along(store: Store) -> None:
    book, _ = store.put(Book, title="Notes")
    tag = Tag(name="new")
    store.session.add(tag)
    with pytest.raises(
        exc.InvalidRequestError, match=r"The Book takes along a Tag .* update_or_create\(\) outside"
    ):
        store.put(Book, {"tags": [tag]}, title="Notes")
    assert list(store.session.new) == [tag]
    assert list(book.tags) == []
    new = Author(name="New")
    store.session.add(new)
    book.author = new  # waits, as the author does
    with pytest.raises(exc.InvalidRequestError, match=r"The Book takes along a Author"):
        store.put(Book, {"reviewer_id": None, "tags": []}, title="Notes")
    assert book.author is new
    store.session.commit()
    assert store.stored(Book, "author_id") == [new.id]


def test_an_object_that_is_to_be_deleted_is_not_updated(store: Store, wire: WireProxy) -> None:
    ada, _ = store.put(User, {"name": "Ada"}, email="ada@x")
    store.session.delete(ada)
    with pytest.raises(exc.InvalidRequestError, match=r"The User that was found is deleted in"):
        store.put(User, {"name": "Ada L."}, email="ada@x")
    assert list(store.session.deleted) == [ada]
    with store.session.begin():  # where the search flushes
        again, created = store.put(User, {"name": "Ada L."}, email="ada@x")
        assert created
    assert store.stored(User, "name") == ["Ada L."]
    assert again is not ada
