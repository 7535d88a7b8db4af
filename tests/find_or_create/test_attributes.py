"""Defaults, constructors and attributes of each kind give a new row its values."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime

import pytest
import sqlalchemy as sa

from tests.find_or_create.stores import (
    Author,
    Careful,
    Cat,
    Counted,
    Defaults,
    Patient,
    Place,
    Point,
    Store,
    User,
)
from tests.wire import WireProxy


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_defaults_of_every_kind_are_used_for_a_new_object(
    store: Store, wire: WireProxy, where: str
) -> None:
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        row, created = store.ask(Defaults, key="k")
        assert created
        assert (row.python, row.called, row.expression) == ("python", "for k", 42)
        assert isinstance(row.server, datetime)
        assert (row.computed, row.document) == ("k!", None)
    if where == "outside":
        assert recording.verbs == ["SELECT", "INSERT"]
    assert (row.large, row.loud) == ("large", "K")
    given, _ = store.ask(
        Defaults,
        {
            "python": "given",
            "called": sa.func.upper("given"),
            "expression": 1,
            "document": {"a": [1]},
            "large": sa.func.lower("GIVEN"),
        },
        key="l",
    )
    assert (given.python, given.called, given.expression) == ("given", "GIVEN", 1)
    assert (given.document, given.large, given.loud) == ({"a": [1]}, "given", "L")


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_none_to_search_for_is_stored_as_null_whatever_the_default(
    store: Store, where: str
) -> None:
    with store.session.begin() if where == "inside" else nullcontext():
        row, created = store.ask(Defaults, key="k", python=None)
        assert created
        assert row.python is None
        assert store.ask(Defaults, key="k", python=None) == (row, False)
        assert store.ask(Defaults, {"python": None}, key="l")[0].python == "python"
    assert store.stored(Defaults, "key", "python") == [("k", None), ("l", "python")]


def test_a_sql_expression_may_be_searched_for(store: Store) -> None:
    ada, created = store.ask(User, {"name": "Ada"}, email=sa.func.lower("ADA@X"))
    assert (ada.email, created) == ("ada@x", True)
    assert store.ask(User, email=sa.func.lower("ADA@X")) == (ada, False)


def test_a_default_may_be_a_property_or_a_parameter_of_the_constructor(store: Store) -> None:
    ada, _ = store.ask(User, {"password": "p"}, email="ada@x")
    assert ada.name == "hash of p"
    bob, _ = store.ask(Careful, {"word": "p"}, email="bob@x")
    assert bob.secret == "hash of p"
    with store.session.begin():
        assert store.ask(Careful, {"word": "q"}, email="eve@x")[0].secret == "hash of q"


def test_a_constructor_may_take_anything(store: Store) -> None:
    cat, created = store.ask(Cat, {"sound": "MEOW"}, name="Tom")
    assert (cat.voice, created) == ("meow", True)


def test_constructors_and_validators_run(store: Store, wire: WireProxy) -> None:
    with pytest.raises(ValueError, match="no address"):
        store.ask(Careful, {"word": "p"}, email="bob")
    with pytest.raises(TypeError, match="word"):
        store.ask(Careful, email="bob@x")
    with store.session.begin():
        with pytest.raises(ValueError, match="no address"):
            store.ask(Careful, {"word": "p"}, email="bob")
        assert store.ask(Careful, {"word": "p"}, email="bob@x")[1]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_attributes_that_are_more_than_a_column_may_be_searched_for_and_set(
    store: Store, where: str
) -> None:
    with store.session.begin() if where == "inside" else nullcontext():
        place, created = store.ask(Place, {"label": "Top"}, point=Point(1, 2))
        assert (place.point, place.called, created) == (Point(1, 2), "Top", True)
        assert store.ask(Place, called="Top") == (place, False)
        assert store.ask(Place, lower="top") == (place, False)
        low, created = store.ask(Place, {"point": Point(3, 4), "facts": {"a": 1}}, lower="low")
        assert (low.label, low.point, low.facts, created) == ("low", Point(3, 4), {"a": 1}, True)
    with store.session.begin():
        assert low.facts is not None
        low.facts["b"] = 2  # noticed, as with an object that was loaded
    assert store.stored(Place, "label", "facts") == [("Top", None), ("low", {"a": 1, "b": 2})]


def test_a_version_counter_counts_from_the_start(store: Store) -> None:
    one, created = store.ask(Counted, key="k")
    assert (one.version, created) == (1, True)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_dataclasses_are_found_or_created(store: Store, wire: WireProxy, where: str) -> None:
    doctor, _ = store.ask(Author, name="Dr. No")
    with wire.record() as recording, store.session.begin() if where == "inside" else nullcontext():
        one, created = store.ask(Patient, {"doctor": doctor}, name="One")
        assert (one.doctor, one.doctor_id, one.ward, created) == (
            doctor,
            doctor.id,
            "general",
            True,
        )
        assert store.ask(Patient, doctor=doctor) == (one, False)
        two, _ = store.ask(Patient, {"ward": "W"}, name="Two")
        assert (two.doctor, two.doctor_id, two.ward) == (None, None, "W")
    if where == "outside":
        assert recording.verbs == ["SELECT", "INSERT", "SELECT", "SELECT", "INSERT"]
