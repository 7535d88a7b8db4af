"""Listeners to the session, the mapper and the attributes are called for a new object."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from tests.find_or_create.stores import Store, Tag, User
from tests.wire import WireProxy

AROUND_IT = ["before_attach", "transient_to_pending", "after_commit"]
IN_A_TRANSACTION = [
    *["pending_to_persistent", "before_flush", "after_flush", "after_flush_postexec"],
    *["after_begin", "before_commit"],
]


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        *[(name, ["INSERT"]) for name in AROUND_IT],
        *[(name, ["BEGIN", "INSERT", "COMMIT"]) for name in IN_A_TRANSACTION],
    ],
)
def test_listeners_of_the_session_hear_of_a_new_object(
    store: Store, wire: WireProxy, name: str, stored: list[str]
) -> None:
    heard: list[str] = []
    event.listen(store.maker, name, lambda *args: heard.append(name))
    with wire.record() as recording:
        assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert recording.verbs == ["SELECT", *stored]
    assert heard


@pytest.mark.parametrize("is_pending", [False, True])
def test_before_commit_is_called_outside_unless_other_changes_are_pending(
    store: Store, is_pending: bool
) -> None:
    @event.listens_for(store.maker, "before_commit")
    def _(session: Session) -> None:
        session.add(Tag(name="of the listener"))

    if is_pending:
        store.session.add(User(email="pending@x", name="Bob"))
    assert store.ask(User, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(User, "email") == ["ada@x"]
    assert store.stored(Tag, "name") == ([] if is_pending else ["of the listener"])


def test_listeners_of_the_session_can_change_the_object(store: Store) -> None:
    @event.listens_for(store.maker, "before_flush")
    def _(session: Session, context: Any, instances: Any) -> None:
        for instance in session.new:
            instance.name = "stamped"

    assert store.ask(User, email="outside@x")[0].name == "stamped"
    with store.session.begin():
        assert store.ask(User, email="inside@x")[0].name == "stamped"


@pytest.mark.parametrize("name", ["before_insert", "after_insert"])
def test_listeners_of_the_mapper_hear_of_a_new_object(store: Store, name: str) -> None:
    heard: list[Any] = []

    def listen(mapper: Any, connection: Any, target: Any) -> None:
        heard.append(target)

    event.listen(User, name, listen)
    try:
        ada, _ = store.ask(User, {"name": "Ada"}, email="ada@x")
        with store.session.begin():
            bob, _ = store.ask(User, {"name": "Bob"}, email="bob@x")
    finally:
        event.remove(User, name, listen)
    assert heard == [ada, bob]


def test_init_events_and_attribute_events_run_for_a_new_object(
    store: Store, wire: WireProxy
) -> None:
    heard: list[Any] = []

    def init(target: Any, args: Any, kwargs: Any) -> None:
        kwargs["age"] = 1

    def changed(target: Any, value: Any, old: Any, initiator: Any) -> str:
        heard.append(value)
        return str(value).title()

    event.listen(User, "init", init)
    event.listen(User.name, "set", changed, retval=True)
    try:
        with wire.record() as recording:
            ada, _ = store.ask(User, {"name": "ada"}, email="ada@x")
    finally:
        event.remove(User, "init", init)
        event.remove(User.name, "set", changed)
    assert (ada.name, ada.age, heard) == ("Ada", 1, ["ada"])
    assert recording.verbs == ["SELECT", "INSERT"]
    assert store.stored(User, "name", "age") == [("Ada", 1)]
