"""Finding a row is one round trip, and creating it is one transaction."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from tests.find_or_create.stores import (
    Book,
    Car,
    Chapter,
    Employee,
    Heard,
    Person,
    Store,
    User,
    Vehicle,
)
from tests.wire import WireProxy


def test_an_object_that_is_found_is_one_round_trip(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    store.session.expunge_all()
    with wire.record() as outside:
        found, created = store.ask(User, {"name": "Bob"}, email="ada@x")
    assert (found.id, found.name, created) == (ada.id, "Ada", False)
    assert outside.verbs == ["SELECT"]
    assert outside.round_trips == 1
    with wire.record() as inside, store.session.begin():
        assert store.ask(User, email="ada@x") == (found, False)
    assert inside.verbs == ["BEGIN", "SELECT", "COMMIT"]


def test_an_object_created_outside_is_stored_at_once_and_loaded(
    store: Store, wire: WireProxy
) -> None:
    with wire.record() as recording:
        ada, created = store.ask(User, {"name": "Ada"}, email="ada@x")
        assert (ada.email, ada.name, ada.nick, ada.age) == ("ada@x", "Ada", None, None)
        assert isinstance(ada.id, int)
    assert created
    assert recording.verbs == ["SELECT", "INSERT"]
    assert recording.round_trips == 2
    assert ada in store.session
    assert sa.inspect(ada).persistent
    assert store.session.get(User, ada.id) is ada
    assert store.stored(User, "email", "name") == [("ada@x", "Ada")]


def test_an_object_created_outside_with_a_listener_has_begin_and_commit(
    store: Store, wire: WireProxy
) -> None:
    with wire.record() as recording:
        ada, created = store.ask(Heard, {"name": "Ada"}, email="ada@x")
        assert (ada.email, ada.name, ada.greeting) == ("ada@x", "Ada", "Hello ada@x")
    assert created
    assert recording.verbs == ["SELECT", "BEGIN", "INSERT", "COMMIT"]
    assert recording.round_trips == 4
    assert ada in store.session
    assert sa.inspect(ada).persistent
    assert store.stored(Heard, "greeting") == ["Hello ada@x"]


@pytest.mark.parametrize("model", [User, Heard])
def test_an_object_created_inside_is_part_of_the_transaction(
    store: Store, wire: WireProxy, model: type[User]
) -> None:
    with wire.record() as recording, store.session.begin():
        ada, created = store.ask(model, {"name": "Ada"}, email="ada@x")
        assert created
        assert store.ask(model, email="ada@x") == (ada, False)
        assert store.stored(model, "email") == []
    verbs = ["BEGIN", "SELECT", "SAVEPOINT", "INSERT", "RELEASE", "SELECT", "COMMIT"]
    assert recording.verbs == verbs
    assert recording.round_trips == len(verbs)
    assert store.stored(model, "email") == ["ada@x"]


@pytest.mark.parametrize("model", [User, Heard])
def test_an_object_created_inside_goes_with_the_transaction(
    store: Store, model: type[User]
) -> None:
    with store.session.begin() as transaction:
        ada, _ = store.ask(model, {"name": "Ada"}, email="ada@x")
        transaction.rollback()
    assert sa.inspect(ada).transient
    assert store.stored(model, "email") == []
    with store.session.begin():
        assert store.ask(model, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(model, "email") == ["ada@x"]


def test_an_object_created_outside_stays_after_a_rollback(store: Store) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    heard, _ = store.ask(Heard, {"name": "Ada"}, email="ada@x")
    store.session.rollback()
    assert (ada.name, heard.name) == ("Ada", "Ada")


def test_a_created_object_is_changed_and_deleted_like_any_other(store: Store) -> None:
    models: list[type[User | Heard]] = [User, Heard]
    for model in models:
        ada, _ = store.ask(model, {"name": "Ada"}, email="ada@x")
        with store.session.begin():
            ada.name = "Ada L."
        assert store.stored(model, "name") == ["Ada L."]
        with store.session.begin():
            store.session.delete(ada)
        assert store.stored(model, "name") == []


@pytest.mark.parametrize("model", [User, Heard])
def test_everything_else_that_waits_outside_goes_on_waiting(
    store: Store, wire: WireProxy, model: type[User]
) -> None:
    session = store.session
    old, _ = store.ask(User, {"name": "Old"}, email="old@x")
    gone, _ = store.ask(User, {"name": "Gone"}, email="gone@x")
    old.name = "New"
    session.delete(gone)
    waiting = User(email="waiting@x", name="W")
    session.add(waiting)
    with wire.record() as recording:
        ada, created = store.ask(model, {"name": "Ada"}, email="ada@x")
    assert created
    assert recording.verbs.count("INSERT") == 1
    assert not {"UPDATE", "DELETE"} & set(recording.verbs)
    assert (set(session.new), set(session.dirty), set(session.deleted)) == (
        {waiting},
        {old},
        {gone},
    )
    assert ("waiting@x", "W") not in store.stored(User, "email", "name")
    session.rollback()
    assert old.name == "Old"
    assert gone in session
    assert waiting not in session
    assert ada in session


def test_joined_inheritance_is_an_insert_for_each_table(store: Store, wire: WireProxy) -> None:
    with wire.record() as outside:
        eve, created = store.ask(Employee, {"badge": "7"}, email="eve@x")
        assert (eve.kind, eve.email, eve.badge, created) == ("employee", "eve@x", "7", True)
    assert outside.verbs == ["SELECT", "BEGIN", "INSERT", "INSERT", "COMMIT"]
    assert store.ask(Employee, badge="7", email="eve@x") == (eve, False)
    assert store.ask(Person, email="eve@x") == (eve, False)
    with wire.record() as base:
        pat, created = store.ask(Person, {"name": "Pat"}, email="pat@x")
    assert (type(pat), pat.kind, created) == (Person, "person", True)
    assert base.verbs == ["SELECT", "INSERT"]
    with store.session.begin():
        assert store.ask(Employee, {"email": "kim@x"}, badge="8")[1]
    assert store.stored(Employee, "email", "badge") == [("eve@x", "7"), ("kim@x", "8")]


def test_single_table_inheritance_is_one_insert(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording:
        car, created = store.ask(Car, {"doors": 5}, plate="A 1")
        assert (type(car), car.kind, car.doors, created) == (Car, "car", 5, True)
    assert recording.verbs == ["SELECT", "INSERT"]
    assert store.ask(Vehicle, plate="A 1") == (car, False)
    assert store.ask(Car, plate="A 1") == (car, False)
    store.ask(Vehicle, plate="A 2")
    with pytest.raises(exc.IntegrityError):  # it is taken, but by no car
        store.ask(Car, plate="A 2")


def test_rows_with_composite_keys_are_found_or_created(store: Store, wire: WireProxy) -> None:
    book, _ = store.ask(Book, title="On keys")
    with wire.record() as recording:
        one, created = store.ask(Chapter, {"title": "One"}, book_id=book.id, number=1)
    assert created
    assert recording.verbs == ["SELECT", "INSERT"]
    assert store.session.get(Chapter, (book.id, 1)) is one
    two, created = store.ask(Chapter, book=book, number=2)
    assert (two.book_id, two.number, two.book, created) == (book.id, 2, book, True)
    with store.session.begin():
        three, created = store.ask(Chapter, book=book, number=3)
        assert created
        assert store.ask(Chapter, book_id=book.id, number=1) == (one, False)
    assert (three.book_id, three.number) == (book.id, 3)
