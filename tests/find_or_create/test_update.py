"""``update_or_create()`` stores the defaults of one object, whether it is found or created."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.testing import isolate
from tests.find_or_create.stores import (
    Author,
    Base,
    Book,
    Careful,
    Counted,
    Defaults,
    Employee,
    Heard,
    Person,
    Place,
    Point,
    Store,
    Tag,
    User,
)
from tests.wire import WireProxy

both = pytest.mark.parametrize("where", ["outside", "inside"])


def block(store: Store, where: str) -> Any:
    return store.session.begin() if where == "inside" else nullcontext()


# What is sent


def test_an_object_created_outside_is_the_insert_alone(store: Store, wire: WireProxy) -> None:
    with wire.record() as recording:
        ada, created = store.put(User, {"name": "Ada"}, email="ada@x")
    assert (ada.name, created) == ("Ada", True)
    assert recording.verbs == ["SELECT", "INSERT"]
    assert recording.round_trips == 2
    assert store.stored(User, "email", "name") == [("ada@x", "Ada")]


def test_an_object_updated_outside_is_the_update_alone(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    with wire.record() as recording:
        found, created = store.put(User, {"name": "Ada L."}, email="ada@x")
    assert (found, found.name, created) == (ada, "Ada L.", False)
    assert recording.verbs == ["SELECT", "UPDATE"]
    assert recording.round_trips == 2
    assert store.stored(User, "name") == ["Ada L."]
    assert not store.session.dirty
    assert not store.session.in_transaction()


def test_an_object_updated_outside_with_a_listener_has_begin_and_commit(
    store: Store, wire: WireProxy
) -> None:
    store.ask(Heard, {"name": "Ada"}, email="ada@x")
    heard: list[str | None] = []

    def before_update(mapper: Any, connection: Any, target: Heard) -> None:
        heard.append(target.name)
        target.greeting = "Welcome back"

    event.listen(Heard, "before_update", before_update)
    try:
        with wire.record() as recording:
            store.put(Heard, {"name": "Ada L."}, email="ada@x")
    finally:
        event.remove(Heard, "before_update", before_update)
    assert recording.verbs == ["SELECT", "BEGIN", "UPDATE", "COMMIT"]
    assert heard == ["Ada L."]
    assert store.stored(Heard, "name", "greeting") == [("Ada L.", "Welcome back")]


@both
@pytest.mark.parametrize("is_known", [True, False])
def test_an_object_with_nothing_to_change_is_the_select_alone(
    store: Store, wire: WireProxy, where: str, is_known: bool
) -> None:
    ada, _ = store.ask(User, {"name": "Ada", "age": 36}, email="ada@x")
    if not is_known:
        store.session.expunge_all()
    with wire.record() as recording, block(store, where):
        found, created = store.put(User, {"name": "Ada", "age": lambda: 36}, email="ada@x")
        assert not store.session.dirty
    assert (found.id, created) == (ada.id, False)
    select = ["SELECT"] if where == "outside" else ["BEGIN", "SELECT", "COMMIT"]
    assert recording.verbs == select
    assert recording.round_trips == len(select)
    with wire.record() as recording:
        assert store.put(User, email="ada@x") == (found, False)
    assert recording.verbs == ["SELECT"]


def test_an_object_updated_inside_is_part_of_the_transaction(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    with wire.record() as recording, store.session.begin() as transaction:
        found, created = store.put(User, {"name": "Ada L."}, email="ada@x")
        assert (found, created) == (ada, False)
        bob, created = store.put(User, {"name": "Bob"}, email="bob@x")
        assert created
        assert store.stored(User, "name") == ["Ada"]
        transaction.rollback()
    verbs = [
        *("BEGIN", "SELECT", "SAVEPOINT", "UPDATE", "RELEASE"),
        *("SELECT", "SAVEPOINT", "INSERT", "RELEASE", "ROLLBACK"),
    ]
    assert recording.verbs == verbs
    assert recording.round_trips == len(verbs)
    assert ada.name == "Ada"
    assert bob not in store.session
    assert store.stored(User, "name") == ["Ada"]


def test_the_row_is_locked_inside_from_the_search_on(
    store: Store, another: Store, wire: WireProxy
) -> None:
    store.ask(User, {"name": "Ada"}, email="ada@x")
    with wire.record() as outside:
        store.put(User, {"name": "Ada"}, email="ada@x")
    assert "FOR" not in outside.statements[0]
    assert isinstance(another.session, OptInSession)
    with store.session.begin(), another.session.begin():
        store.put(User, {"name": "Ada"}, email="ada@x")
        another.session.execute(sa.text("SET LOCAL lock_timeout = '100ms'"))
        with pytest.raises(exc.OperationalError, match="lock timeout"):
            another.session.execute(sa.update(User).values(name="Bob"))
        another.session.rollback()


@both
def test_what_waits_goes_on_waiting_outside(store: Store, wire: WireProxy, where: str) -> None:
    session = store.session
    old, _ = store.ask(User, {"name": "Old"}, email="old@x")
    gone, _ = store.ask(User, {"name": "Gone"}, email="gone@x")
    store.ask(User, {"name": "Ada"}, email="ada@x")
    with block(store, where):
        old.name = "New"
        session.delete(gone)
        waiting = User(email="waiting@x", name="W")
        session.add(waiting)
        with wire.record() as recording:
            store.put(User, {"name": "Ada L."}, email="ada@x")
        if where == "outside":
            assert recording.verbs.count("UPDATE") == 1
            assert not {"INSERT", "DELETE"} & set(recording.verbs)
            assert (set(session.new), set(session.dirty), set(session.deleted)) == (
                {waiting},
                {old},
                {gone},
            )
            assert store.stored(User, "name") == ["Ada L.", "Gone", "Old"]
            session.rollback()
            assert old.name == "Old"
    names = ["Ada L.", "Gone", "Old"] if where == "outside" else ["Ada L.", "New", "W"]
    assert store.stored(User, "name") == names


def test_what_waits_of_the_object_itself_is_stored_with_it(store: Store, wire: WireProxy) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    ada.nick = "a"
    with wire.record() as recording:
        store.put(User, {"name": "Ada"}, email="ada@x")
    assert recording.verbs == ["SELECT"]  # it has that name
    assert ada in store.session.dirty
    with wire.record() as recording:
        store.put(User, {"name": "Ada L."}, email="ada@x")
    assert recording.verbs == ["SELECT", "UPDATE"]
    assert store.stored(User, "name", "nick") == [("Ada L.", "a")]


def test_begin_on_write_begins_the_transaction_with_the_update(
    store: Store, wire: WireProxy
) -> None:
    store.ask(User, {"name": "Ada"}, email="ada@x")
    with store.maker(begin_on_write=True) as session:
        with wire.record() as recording:
            store.put(User, {"name": "Ada"}, session=session, email="ada@x")
        assert recording.verbs == ["SELECT"]
        assert not session.in_transaction()
        with wire.record() as recording:
            store.put(User, {"name": "Ada L."}, session=session, email="ada@x")
        assert recording.verbs == ["SELECT", "BEGIN", "SAVEPOINT", "UPDATE", "RELEASE"]
        assert session.in_transaction()
        assert store.stored(User, "name") == ["Ada"]
        session.commit()
    assert store.stored(User, "name") == ["Ada L."]


def test_a_bind_of_sqlite_beside_ours_has_its_own_transaction(
    store: Store, wire: WireProxy
) -> None:
    session = store.session
    sqlite = sa.create_engine("sqlite://")
    Base.metadata.create_all(sqlite, [Base.metadata.tables["authors"]])
    session.bind_mapper(Author, sqlite)
    store.put(User, {"name": "Ada"}, email="ada@x")
    assert session.scalars(sa.select(Author)).all() == []  # SQLAlchemy begins by itself
    with wire.record() as recording:
        store.put(User, {"name": "Ada"}, email="ada@x")
    assert recording.verbs == ["SELECT"]
    assert "FOR" not in recording.statements[0]
    store.put(Author, {"mood": "good"}, name="Ada")
    store.put(Author, {"mood": "bad"}, name="Ada")
    store.put(User, {"name": "Ada L."}, email="ada@x")
    session.commit()
    assert session.scalar(sa.select(Author.mood)) == "bad"
    assert store.stored(User, "name") == ["Ada L."]
    session.close()
    sqlite.dispose()


@pytest.mark.parametrize("has_changed", [True, False])
def test_sqlalchemys_own_session_updates_in_a_savepoint(
    make_store: Callable[..., Store], wire: WireProxy, has_changed: bool
) -> None:
    store = make_store(create=sa.create_engine, session_class=Session)
    assert store.put(User, {"name": "Ada"}, email="ada@x")[1]
    store.session.commit()
    with wire.record() as recording:
        name = "Ada L." if has_changed else "Ada"
        assert store.put(User, {"name": name}, email="ada@x")[0].name == name
        store.session.commit()
    stored = ["SAVEPOINT", "UPDATE", "RELEASE"] if has_changed else []
    assert recording.verbs == ["BEGIN", "SELECT", *stored, "COMMIT"]
    assert store.stored(User, "name") == [name]


def test_isolation_undoes_what_was_updated(store: Store) -> None:
    with isolate(store.engine):
        store.put(User, {"name": "Ada"}, email="ada@x")
        store.put(User, {"name": "Ada L."}, email="ada@x")
        with store.session.begin():
            store.put(User, {"name": "Ada B."}, email="ada@x")
        with pytest.raises(exc.IntegrityError):
            store.put(User, {"age": -1}, email="ada@x")
        assert store.session.scalars(sa.select(User.name)).all() == ["Ada B."]
    assert store.stored(User, "name") == []


def test_joined_inheritance_is_an_update_for_each_table(store: Store, wire: WireProxy) -> None:
    store.put(Employee, {"badge": "7", "name": "Eve"}, email="eve@x")
    with wire.record() as recording:
        store.put(Employee, {"badge": "8", "name": "Eva"}, email="eve@x")
    assert recording.verbs == ["SELECT", "BEGIN", "UPDATE", "UPDATE", "COMMIT"]
    with wire.record() as recording:
        store.put(Employee, {"badge": "9"}, email="eve@x")
    assert recording.verbs[0] == "SELECT"
    assert recording.verbs.count("UPDATE") == 1
    with store.session.begin():
        eve, created = store.put(Person, {"name": "Eve"}, email="eve@x")
    assert (type(eve), created) == (Employee, False)
    assert store.stored(Employee, "badge", "name") == [("9", "Eve")]


# create_defaults, functions and expressions


@both
def test_create_defaults_are_used_in_place_of_the_defaults(store: Store, where: str) -> None:
    defaults, create_defaults = {"name": "Updated"}, {"name": "Created", "age": 1}
    with block(store, where):
        ada, created = store.put(User, defaults, create_defaults, email="ada@x")
        assert (ada.name, ada.age, created) == ("Created", 1, True)
        assert store.put(User, defaults, create_defaults, email="ada@x") == (ada, False)
        assert (ada.name, ada.age) == ("Updated", 1)
        with pytest.raises(exc.IntegrityError):  # an empty one is one: there is no name
            store.put(User, defaults, {}, email="bob@x")
    assert store.stored(User, "name", "age") == [("Updated", 1)]


@both
def test_functions_are_called_where_they_are_needed(store: Store, where: str) -> None:
    called: list[str] = []

    def function(name: str) -> Callable[[], str]:
        def call() -> str:
            called.append(name)
            return name

        return call

    with block(store, where):
        given = {"name": function("updated")}, {"name": function("created")}
        assert store.put(User, *given, email="ada@x")[0].name == "created"
        assert store.put(User, *given, email="ada@x")[0].name == "updated"
        assert called == ["created", "updated"]
        assert store.put(User, given[0], email="ada@x")[0].name == "updated"
    assert called == ["created", "updated", "updated"]


@both
def test_an_expression_is_evaluated_by_the_database(
    store: Store, another: Store, wire: WireProxy, where: str
) -> None:
    defaults, create_defaults = {"age": User.age + 1}, {"name": "Ada", "age": 1}
    ada, _ = store.put(User, defaults, create_defaults, email="ada@x")
    another.put(User, {"age": 41}, email="ada@x")
    with wire.record() as recording, block(store, where):
        assert store.put(User, defaults, create_defaults, email="ada@x") == (ada, False)
    assert recording.verbs.count("UPDATE") == 1
    assert store.stored(User, "age") == [42]
    assert ada.age == 42


@both
def test_none_is_null_in_the_filters_and_the_defaults(store: Store, where: str) -> None:
    store.put(User, {"name": "Ada", "age": 36}, email="ada@x", nick=None)
    with block(store, where):
        assert not store.put(User, {"age": None}, email="ada@x", nick=None)[1]
    assert store.stored(User, "nick", "age") == [(None, None)]


@both
def test_attributes_that_are_more_than_a_column_may_be_updated(store: Store, where: str) -> None:
    with block(store, where):
        place, _ = store.put(Place, {"point": Point(1, 2), "facts": {"a": 1}}, label="Top")
        store.put(Place, {"point": Point(3, 4), "facts": {"b": 2}}, label="Top")
        assert (place.point, place.facts) == (Point(3, 4), {"b": 2})
        store.put(Place, {"called": "Peak"}, point=Point(3, 4))
        store.put(Place, {"lower": "peak"}, point=Point(3, 4))
        ada, _ = store.put(User, {"password": "p"}, email="ada@x")
        store.put(User, {"password": "q"}, email="ada@x")
        assert ada.name == "hash of q"
    with store.session.begin():
        assert place.facts is not None
        place.facts["c"] = 3  # noticed, as of any other object
    assert store.stored(Place, "label", "facts") == [("peak", {"b": 2, "c": 3})]


def test_a_column_that_is_not_loaded_with_the_object_is_compared(
    store: Store, wire: WireProxy
) -> None:
    store.put(Defaults, {"large": "L"}, key="k")
    store.session.expunge_all()
    with wire.record() as recording:
        found, _ = store.put(Defaults, {"large": "L", "document": {"a": 1}}, key="k")
        assert found.large == "L"
    assert recording.verbs == ["SELECT", "UPDATE"]
    with wire.record() as recording:
        store.put(Defaults, {"large": "L", "document": {"a": 1}}, key="k")
    assert recording.verbs == ["SELECT"]


@both
def test_a_composite_value_that_is_the_same_is_the_select_alone(
    store: Store, wire: WireProxy, where: str
) -> None:
    place, _ = store.put(Place, {"point": Point(1, 2)}, label="Top")
    with wire.record() as recording, block(store, where):
        store.put(Place, {"point": Point(1, 2)}, label="Top")
    assert set(recording.verbs) <= {"BEGIN", "SELECT", "COMMIT"}
    place.point = Point(3, 4)
    with block(store, where), store.session.no_autoflush:
        store.put(Place, {"point": Point(1, 2)}, label="Top")
    assert not store.session.is_modified(place)
    assert store.session.scalars(sa.select(Place.point)).one() == Point(1, 2)


# What the row has, and not what the session remembers


@both
def test_a_value_that_only_the_session_remembers_is_stored_again(
    store: Store, another: Store, wire: WireProxy, where: str
) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    another.put(User, {"name": "Bob"}, email="ada@x")
    assert ada.name == "Ada"
    with wire.record() as recording, block(store, where):
        store.put(User, {"name": "Ada"}, email="ada@x")
    assert recording.verbs.count("UPDATE") == 1
    assert store.stored(User, "name") == ["Ada"]


@both
def test_a_value_that_waits_gives_way_to_the_default(
    store: Store, another: Store, where: str
) -> None:
    ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
    another.put(User, {"name": "Bob"}, email="ada@x")
    with block(store, where), store.session.no_autoflush:
        ada.name = "Waiting"
        store.put(User, {"name": "Ada"}, email="ada@x")
        assert ada.name == "Ada"
    assert store.stored(User, "name") == ["Ada"]
    assert not store.session.dirty


def test_all_columns_that_the_defaults_name_are_set_by_one_update(
    store: Store, wire: WireProxy
) -> None:
    """So that of two calls at the same time one is the last, and no row is a mixture."""
    store.put(User, {"name": "Ada", "age": 36, "nick": None}, email="ada@x")
    with wire.record() as recording:
        store.put(User, {"name": "Ada", "age": 37}, email="ada@x")
    (update,) = [text for text in recording.statements if text.startswith("UPDATE")]
    assert "name=" in update
    assert "age=" in update
    assert "nick" not in update


@both
def test_a_composite_that_only_the_session_remembers_is_stored_again(
    store: Store, another: Store, where: str
) -> None:
    place, _ = store.put(Place, {"point": Point(1, 2)}, label="Top")
    assert place.point == Point(1, 2)
    another.put(Place, {"point": Point(3, 4)}, label="Top")
    with block(store, where):
        store.put(Place, {"point": Point(1, 2)}, label="Top")
        assert place.point == Point(1, 2)
    assert another.session.scalars(sa.select(Place.point)).one() == Point(1, 2)


@both
def test_a_change_in_a_mutable_value_of_the_row_is_noticed(
    store: Store, another: Store, where: str
) -> None:
    place, _ = store.put(Place, {"facts": {"a": 1}}, point=Point(1, 2))
    assert place.facts == {"a": 1}
    another.put(Place, {"facts": {"b": 2}}, point=Point(1, 2))
    with block(store, where):
        store.put(Place, {"facts": {"b": 2}}, point=Point(1, 2))
        assert place.facts is not None
        place.facts["c"] = 3
    store.session.commit()
    assert store.stored(Place, "id", "facts") == [(place.id, {"b": 2, "c": 3})]


def test_a_version_is_that_of_the_row(store: Store, another: Store) -> None:
    one, _ = store.put(Counted, key="k")
    another.put(Counted, {"note": "theirs"}, key="k")
    store.put(Counted, {"note": "ours"}, key="k")
    assert (one.version, one.note) == (3, "ours")
    with store.session.begin():
        another.put(Counted, {"note": "theirs"}, key="k")
        store.put(Counted, {"note": "ours"}, key="k")
    assert store.stored(Counted, "version", "note") == [(5, "ours")]


def test_changes_that_wait_are_not_stored_over_a_version_that_they_have_not_seen(
    store: Store, another: Store
) -> None:
    one, _ = store.put(Counted, key="k")
    one.other = "waits"
    another.put(Counted, {"note": "theirs"}, key="k")
    with pytest.raises(StaleDataError):
        store.put(Counted, {"note": "ours"}, key="k")
    assert (one.other, one.note) == ("waits", "theirs")
    assert one in store.session.dirty
    assert store.stored(Counted, "note") == ["theirs"]


# After an error


@both
@pytest.mark.parametrize(
    ("defaults", "code"),
    [({"name": None}, "23502"), ({"nick": "taken"}, "23505"), ({"name": "B", "age": -1}, "23514")],
)
def test_an_error_undoes_the_update_and_nothing_else(
    store: Store, where: str, defaults: dict[str, Any], code: str
) -> None:
    session = store.session
    store.put(User, {"name": "Other", "nick": "taken"}, email="other@x")
    ada, _ = store.put(User, {"name": "Ada"}, email="ada@x")
    with block(store, where):
        waiting = Tag(name="waiting")
        session.add(waiting)
        with pytest.raises(exc.IntegrityError) as raised:
            store.put(User, defaults, email="ada@x")
        orig: Any = raised.value.orig
        assert (getattr(orig, "sqlstate", None) or orig.pgcode) == code
        assert (ada.name, ada.nick, ada.age) == ("Ada", None, None)
        assert ada not in session.dirty
        assert waiting in session
        assert not store.put(User, {"name": "Ada L."}, email="ada@x")[1]
    session.commit()
    assert store.stored(User, "name", "age") == [("Ada L.", None), ("Other", None)]
    assert store.stored(Tag, "name") == ["waiting"]


def test_outside_an_error_leaves_what_waits_of_the_object(store: Store) -> None:
    ada, _ = store.put(User, {"name": "Ada"}, email="ada@x")
    ada.nick, ada.name = "a", "Waiting"
    with pytest.raises(exc.IntegrityError):
        store.put(User, {"name": "Ada L.", "age": -1}, email="ada@x")
    assert (ada.nick, ada.name, ada.age) == ("a", "Waiting", None)
    store.session.commit()
    assert store.stored(User, "nick", "name", "age") == [("a", "Waiting", None)]


@pytest.mark.parametrize("how", ["at COMMIT", "in a later flush"])
def test_outside_what_waits_of_the_object_waits_after_an_error_that_comes_late(
    store: Store, another: Store, how: str
) -> None:
    """The flush has succeeded before, so SQLAlchemy takes the changes for stored."""
    old, _ = store.put(Author, name="Old")
    new, _ = store.put(Author, name="New")
    book, _ = store.put(Book, {"author": old}, title="Notes")
    ada, _ = store.put(Heard, {"name": "Ada"}, email="ada@x")
    ada.nick, book.author = "waits", new
    with another.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger AS "
            "'BEGIN RAISE EXCEPTION ''refused''; END' LANGUAGE plpgsql"
        )
        for table in ("heard", "books") if how == "at COMMIT" else ():
            connection.exec_driver_sql(
                f"CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON {table} "
                "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
            )

    def after_flush(*args: Any) -> None:
        if how == "in a later flush":
            store.session.add(User(email="without a name"))

    event.listen(store.session, "after_flush_postexec", after_flush)
    try:
        with pytest.raises(exc.DBAPIError):
            store.put(Heard, {"name": "Ada L."}, email="ada@x")
        with pytest.raises(exc.DBAPIError):
            store.put(Book, {"reviewer": old}, title="Notes")
    finally:
        event.remove(store.session, "after_flush_postexec", after_flush)
    assert (ada.name, ada.nick, ada.age) == ("Ada", "waits", None)
    assert (book.author, book.reviewer) == (new, None)
    with another.engine.begin() as connection:
        connection.exec_driver_sql("DROP FUNCTION refuse CASCADE")
    store.session.commit()
    assert store.stored(Heard, "name", "nick", "age") == [("Ada", "waits", None)]
    assert store.stored(Book, "author_id", "reviewer_id") == [(new.id, None)]


@both
def test_a_function_or_a_validator_that_fails_changes_nothing(
    store: Store, wire: WireProxy, where: str
) -> None:
    def fail() -> str:
        raise ZeroDivisionError

    ada, _ = store.ask(Author, {"mood": "fine"}, name="Ada")
    one, _ = store.ask(Careful, {"word": "p", "author": ada}, email="one@x")
    with block(store, where):
        with wire.record() as recording:
            with pytest.raises(ZeroDivisionError):
                store.put(Author, {"mood": fail}, name="Ada")
            with pytest.raises(exc.ArgumentError, match="not 'nobody'"):
                store.put(Careful, {"author": lambda: "nobody"}, email="one@x")
        assert "UPDATE" not in recording.verbs
        assert (ada.mood, one.author) == ("fine", ada)
        one.secret = "waits"
        with pytest.raises(ValueError, match="no address"):
            store.put(Careful, {"author": None, "email": "two"}, id=one.id)
    store.session.rollback()
    assert (one.author, one.author_name) == (ada, "Ada, fine")


def test_callbacks_are_called_after_the_update(store: Store) -> None:
    session = store.session
    assert isinstance(session, OptInSession)
    store.put(Heard, {"name": "Ada"}, email="ada@x")
    called: list[Any] = []

    def after_update(*args: Any) -> None:
        session.on_commit(lambda: called.append(store.stored(Heard, "name")))
        session.on_rollback(lambda: called.append("rolled back"))

    event.listen(Heard, "after_update", after_update)
    try:
        store.put(Heard, {"name": "Ada L."}, email="ada@x")
        assert called == [["Ada L."]]
        with session.begin():
            store.put(Heard, {"name": "Ada B."}, email="ada@x")
            assert len(called) == 1
    finally:
        event.remove(Heard, "after_update", after_update)
    assert called == [["Ada L."], ["Ada B."]]
