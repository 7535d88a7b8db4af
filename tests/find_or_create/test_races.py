"""There is one row for one key, however many ask for it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import Session

from fictive_sqlalchemy import IsolationLevel, OptInSession
from tests.find_or_create.stores import (
    CaseBlind,
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
from tests.wire import WireProxy


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


def test_a_row_that_vanished_again_is_no_failure_to_retry(
    store: Store, another: Store, just_before_insert: Callable[..., None]
) -> None:
    def create_and_delete_later() -> None:
        ada, _ = another.ask(Heard, {"name": "Ada"}, email="ada@x")

        def delete() -> None:
            with another.session.begin():
                another.session.delete(ada)

        just_before_rollback.append(delete)

    just_before_rollback: list[Callable[[], None]] = []

    @event.listens_for(store.engine, "rollback_savepoint")
    def _(connection: Any, name: str, context: Any) -> None:
        while just_before_rollback:
            just_before_rollback.pop()()

    just_before_insert(create_and_delete_later)
    with store.session.begin():
        with pytest.raises(exc.IntegrityError):
            store.ask(Heard, {"name": "Ada"}, email="ada@x")
        assert store.ask(Heard, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(Heard, "email") == ["ada@x"]


@pytest.mark.parametrize("is_one_statement", [True, False])
@pytest.mark.parametrize("model", [Late, User])
def test_a_constraint_that_is_checked_at_commit_decides_races_too(
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
