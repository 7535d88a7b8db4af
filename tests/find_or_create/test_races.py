"""There is one row for one key, however many ask for it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session

from fictive_sqlalchemy import IsolationLevel, OptInSession
from tests.find_or_create.stores import (
    CaseBlind,
    Cat,
    Employee,
    Heard,
    Late,
    Person,
    Store,
    Tag,
    User,
    chain,
    sqlstate,
)
from tests.wire import Message, WireProxy


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [User, Heard, Employee, CaseBlind])
def test_32_threads_on_5_connections_create_one_row(
    make_store: Callable[..., Store], url: str, model: type[Any], where: str, level: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    threads, keys = 32, ["a@x", "b@x", "c@x"]
    together = threading.Barrier(threads)

    def ask(session: Session, key: str) -> tuple[int, bool]:
        defaults = {"badge": key} if model is Employee else {"name": "Ada"}
        instance, created = store.ask(model, defaults, session, email=key)
        return instance.id, created

    def ask_inside(session: Session, key: str, mark: str) -> tuple[int, bool]:
        while True:
            try:
                with session.begin():
                    session.add(Tag(name=mark))
                    return ask(session, key)
            except exc.DBAPIError as error:
                if level == "READ COMMITTED" or sqlstate(error) != "40001":
                    raise

    def work(number: int) -> list[tuple[int, bool]]:
        answers: list[tuple[int, bool]] = []
        with store.maker() as session:
            for key in keys:
                together.wait()
                if where == "outside":
                    answers.append(ask(session, key))
                else:
                    answers.append(ask_inside(session, key, f"{number} {key}"))
        return answers

    with ThreadPoolExecutor(threads) as executor:
        answers = list(executor.map(work, range(threads)))
    for of_one_key in zip(*answers, strict=True):
        assert len({identity for identity, _ in of_one_key}) == 1
        assert sum(created for _, created in of_one_key) == 1
    assert store.stored(model, "email") == keys
    # No transaction was lost on the way.
    assert len(store.stored(Tag, "name")) == (threads * len(keys) if where == "inside" else 0)


@pytest.mark.parametrize(
    ("model", "attempt"), [(User, ["INSERT"]), (Heard, ["BEGIN", "INSERT", "ROLLBACK"])]
)
def test_the_loser_of_a_race_outside_gets_what_the_winner_created(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[User],
    attempt: list[str],
) -> None:
    just_before_insert(lambda: another.ask(model, {"name": "Winner"}, email="ada@x"))
    with wire.record() as recording:
        ada, created = store.ask(model, {"name": "Loser"}, email="ada@x")
    assert (ada.name, created) == ("Winner", False)
    assert recording.verbs == ["SELECT", *attempt, "SELECT"]
    assert list(store.session) == [ada]


@pytest.mark.parametrize("model", [User, Heard])
def test_the_loser_of_a_race_inside_keeps_its_transaction(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[User],
) -> None:
    with wire.record() as recording, store.session.begin():
        before = User(email="before@x", name="B")
        store.session.add(before)
        store.session.flush()
        just_before_insert(lambda: another.ask(model, {"name": "Winner"}, email="ada@x"))
        ada, created = store.ask(model, {"name": "Loser"}, email="ada@x")
        assert (ada.name, created) == ("Winner", False)
        ada.nick = "a"
    assert recording.verbs == [
        *["BEGIN", "INSERT"],
        *["SELECT", "SAVEPOINT", "INSERT", "ROLLBACK TO", "SELECT"],
        *["UPDATE", "COMMIT"],
    ]
    assert ("before@x", None) in store.stored(User, "email", "nick")
    assert ("ada@x", "a") in store.stored(model, "email", "nick")


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize(
    ("model", "filters", "defaults"),
    [
        (User, {"email": "ada@x"}, {"name": "Ada"}),
        (Heard, {"email": "ada@x"}, {"name": "Ada"}),
        (CaseBlind, {"email": "ada@x"}, {}),
        (Person, {"email": "ada@x"}, {}),
        (Employee, {"email": "ada@x"}, {"badge": "7"}),
        (Employee, {"badge": "7"}, {"email": "ada@x"}),
        (Employee, {"badge": "7"}, {}),
    ],
)
def test_a_row_that_the_snapshot_does_not_show_is_a_failure_to_retry(
    store: Store,
    another: Store,
    level: IsolationLevel,
    model: type[Any],
    filters: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    assert isinstance(store.session, OptInSession)
    with store.session.begin(isolation_level=level) as transaction:
        store.session.execute(sa.select(User))  # the snapshot
        another.ask(model, defaults, **filters)
        with pytest.raises(exc.DBAPIError) as raised:
            store.ask(model, defaults, **filters)
        transaction.rollback()
    assert sqlstate(raised.value) == "40001"
    assert chain(raised.value) == [raised.value, raised.value.orig]
    with store.session.begin(isolation_level=level):
        assert not store.ask(model, defaults, **filters)[1]


@pytest.fixture
def come_and_go(
    another: Store, wire: WireProxy, just_before_insert: Callable[..., None]
) -> Callable[[type[Any]], None]:
    """Somebody else creates the row before our INSERT, and deletes it before our next SELECT."""

    def delete_before_select(model: type[Any]) -> None:
        def look(message: Message) -> None:
            if message.is_statement and message.verb == "SELECT":
                wire.before_forward = None
                with another.session.begin():
                    another.session.execute(sa.delete(model))

        wire.before_forward = look

    def arrange(model: type[Any]) -> None:
        def create() -> None:
            another.ask(model, {"name": "Ada"}, email="ada@x")
            delete_before_select(model)

        just_before_insert(create)

    return arrange


@pytest.mark.parametrize("call", ["ask", "put"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [User, Heard])
def test_a_row_that_came_and_went_is_created(
    store: Store,
    wire: WireProxy,
    come_and_go: Callable[[type[Any]], None],
    model: type[Any],
    where: str,
    call: str,
) -> None:
    come_and_go(model)
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        ada, created = getattr(store, call)(model, {"name": "Ada"}, email="ada@x")
        assert created
    assert list(store.session) == [ada]
    assert store.stored(model, "id") == [ada.id]
    if where == "outside" and model is User:
        assert recording.verbs == ["SELECT", "INSERT", "SELECT", "INSERT"]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_row_that_comes_and_goes_for_ever_is_an_error(
    store: Store,
    wire: WireProxy,
    come_and_go: Callable[[type[Any]], None],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setattr("fictive_sqlalchemy._find_or_create.find.MOST_IN_VAIN", 3)
    tries: list[int] = []

    def make_name() -> str:
        come_and_go(User)
        tries.append(1)
        return "Ada"

    with store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(exc.IntegrityError):
            store.ask(User, {"name": make_name}, email="ada@x")
        assert len(tries) == 3
        wire.before_forward = None
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(User, "email") == ["ada@x"]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_another_constraint_is_no_reason_to_try_again(store: Store, where: str) -> None:
    calls: list[int] = []

    def make_name() -> str:
        calls.append(1)
        return "Ada"

    store.ask(User, {"name": "Bob", "nick": "taken"}, email="bob@x")
    with store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(exc.IntegrityError):
            store.ask(User, {"name": make_name, "nick": "taken"}, email="ada@x")
        with pytest.raises(exc.IntegrityError):  # the row in the way has another name
            store.ask(User, {}, email="bob@x", name="Ada")
    assert calls == [1]


@pytest.mark.parametrize("call", ["ask", "put"])
def test_an_object_whose_row_was_deleted_makes_room_inside(
    store: Store, another: Store, call: str
) -> None:
    """SQLAlchemy would warn, and the session would have two objects for one row."""
    store.ask(Cat, {"sound": "MEOW"}, name="Tom")
    tom = store.session.scalars(sa.select(Cat)).one()

    def get(sound: str | None) -> tuple[Cat, bool]:
        create_defaults = {"sound": sound}
        if call == "ask":
            return store.ask(Cat, create_defaults, name="Tom")
        return store.put(Cat, {"voice": "purr"}, create_defaults, name="Tom")

    with another.engine.begin() as connection:
        connection.execute(sa.delete(Cat))
    with store.session.begin():
        with pytest.raises(AttributeError):
            get(None)
        assert tom in store.session
        new, created = get("HISS")
        assert created
        assert list(store.session) == [new]
    assert store.stored(Cat, "name", "voice") == [("Tom", "hiss")]
    assert new.voice == "hiss"


@pytest.mark.parametrize("is_one_statement", [True, False])
@pytest.mark.parametrize("model", [Late, User])
def test_a_constraint_that_is_checked_at_commit_decides_races(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before_insert: Callable[..., None],
    model: type[Any],
    is_one_statement: bool,
) -> None:
    filters: dict[str, Any] = {"key": "k"} if model is Late else {"email": "ada@x", "name": "Ada"}
    if model is User:  # of which the model knows nothing
        with another.engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE users DROP CONSTRAINT users_email_key"))
            connection.execute(
                sa.text("ALTER TABLE users ADD UNIQUE (email) DEFERRABLE INITIALLY DEFERRED")
            )
    if not is_one_statement:
        event.listen(store.maker, "before_commit", lambda session: None)
    just_before_insert(lambda: another.ask(model, **filters))
    one, created = store.ask(model, **filters)
    assert not created
    assert store.stored(model, "id") == [one.id]
    with wire.record() as recording:
        two, created = store.ask(model, **{**filters, next(iter(filters)): "other"})
    assert created
    stored = ["INSERT"] if is_one_statement else ["BEGIN", "INSERT", "COMMIT"]
    assert recording.verbs == ["SELECT", *stored]
    assert store.stored(model, "id") == [one.id, two.id]
