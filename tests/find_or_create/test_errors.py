"""Errors that no race explains are raised, and wrong names are refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import exc
from sqlalchemy.orm.exc import UnmappedClassError

from tests.find_or_create.stores import Heard, Point, Store, User, chain, sqlstate
from tests.wire import WireProxy


@pytest.mark.parametrize(
    ("defaults", "code"),
    [
        ({}, "23502"),
        ({"name": "Ada", "nick": "taken"}, "23505"),
        ({"name": "Ada", "age": -1}, "23514"),
        ({"name": "Ada", "age": 2**31}, "22003"),
    ],
    ids=["not null", "another unique column", "check", "out of range"],
)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("model", [User, Heard])
def test_an_error_that_is_no_race_reaches_the_caller_once(
    make_store: Callable[..., Store],
    model: type[User],
    where: str,
    level: str,
    defaults: dict[str, Any],
    code: str,
) -> None:
    store = make_store(isolation_level=level)
    other, _ = store.ask(model, {"name": "Other", "nick": "taken"}, email="other@x")
    with store.session.begin() if where == "inside" else nullcontext():
        with pytest.raises(exc.DBAPIError) as raised:
            store.ask(model, defaults, email="ada@x")
        assert sqlstate(raised.value) == code
        assert chain(raised.value) == [raised.value, raised.value.orig]
        # The session goes on as if nothing had happened, inside with the same transaction.
        assert list(store.session) == [other]
        assert other.name == "Other"
        assert store.ask(model, {"name": "Ada"}, email="ada@x")[1]
    assert store.stored(model, "email") == ["ada@x", "other@x"]


def test_an_error_of_what_waited_in_the_session_is_not_taken_for_a_race(store: Store) -> None:
    store.ask(User, {"name": "Ada"}, email="ada@x")
    session = store.session
    with session.begin() as transaction, session.no_autoflush:
        session.add(User(email="ada@x", name="Twice"))
        with pytest.raises(exc.IntegrityError, match="ada@x"):
            store.ask(Heard, {"name": "Bob"}, email="bob@x")
        transaction.rollback()
    assert store.ask(Heard, {"name": "Bob"}, email="bob@x")[1]


def test_more_than_one_row_that_is_found_is_an_error(store: Store) -> None:
    for email in ("a@x", "b@x", "c@x"):
        store.ask(User, {"name": "Same"}, email=email)
    with pytest.raises(exc.MultipleResultsFound):
        store.ask(User, name="Same")
    with store.session.begin(), pytest.raises(exc.MultipleResultsFound):
        store.ask(User, name="Same")


@pytest.mark.parametrize(
    ("filters", "defaults", "error", "message"),
    [
        (
            {"mail": "a"},
            {},
            exc.InvalidRequestError,
            "User has no attribute 'mail'; it has 'name', 'id",
        ),
        ({"email": "a"}, {"mail": "a"}, exc.InvalidRequestError, "User has no attribute 'mail'"),
        ({"password": "a"}, {}, exc.InvalidRequestError, "User has no attribute 'password'"),
        ({"email": "a"}, {"email": "b"}, exc.ArgumentError, "leave it out of the defaults"),
        ({}, {"email": "b"}, exc.ArgumentError, "nothing to search for"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_sent(
    store: Store,
    wire: WireProxy,
    filters: dict[str, Any],
    defaults: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with wire.record() as recording:
        with pytest.raises(error, match=message):
            store.ask(User, defaults, **filters)
        with pytest.raises(error, match=message), store.session.begin():
            store.ask(User, defaults, **filters)
    assert recording.verbs == []


def test_defaults_without_names_are_refused(store: Store, wire: WireProxy) -> None:
    wrong: Any = "Ada"
    with wire.record() as recording, pytest.raises(exc.ArgumentError, match="not 'Ada'"):
        store.ask(User, wrong, email="ada@x")
    assert recording.verbs == []


def test_a_class_that_is_not_mapped_is_refused(store: Store) -> None:
    with pytest.raises(UnmappedClassError):
        store.ask(Point, x=1)
