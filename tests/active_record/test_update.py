"""``update()`` takes mappings and keywords, and refuses what must not be changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import pytest
from sqlalchemy import exc
from werkzeug.datastructures import CombinedMultiDict, ImmutableMultiDict, MultiDict

from tests.active_record.models import Awkward, Big, Cat, Dog, Player, Point, Round, Shape
from tests.active_record.support import Store


class Form(dict[str, list[str]]):
    """What is no dict of values, and yet a mapping of them."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)[0]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"name": "Augusta", "e_mail": "a@x"}, id="dict"),
        pytest.param(MappingProxyType({"name": "Augusta", "e_mail": "a@x"}), id="mapping"),
        pytest.param(MultiDict([("name", "Augusta"), ("e_mail", "a@x"), ("name", "no")]), id="md"),
        pytest.param(ImmutableMultiDict({"name": "Augusta", "e_mail": ["a@x", "b"]}), id="form"),
        pytest.param(
            CombinedMultiDict([MultiDict({"name": "Augusta"}), MultiDict({"e_mail": "a@x"})]),
            id="request.values",
        ),
        pytest.param(Form(name=["Augusta"], e_mail=["a@x"]), id="subclass"),
    ],
)
def test_update_takes_a_mapping(store: Store, values: Mapping[str, Any]) -> None:
    player = store.player()
    with store.stores("UPDATE"):
        player.update(values)
    assert (player.name, player.e_mail) == ("Augusta", "a@x")


def test_update_takes_a_mapping_and_keywords_together(store: Store) -> None:
    player = store.player().update({"name": "Augusta"}, age=31)
    assert (player.name, player.age) == ("Augusta", 31)


def test_update_sets_what_has_columns_of_its_own(store: Store) -> None:
    player = store.player()
    player.update(
        login="Augusta", at=Point(5, 6), above=Point(5, 7), data={"b": 2}, tags=["x"], mood=None
    )
    sql = "SELECT concat_ws(' ', name, x, y, z, data, tags, mood) FROM player WHERE id = 1"
    assert store.onlooker.scalar(sql) == 'Augusta 5 6 7 {"b": 2} {x}'
    assert player.data is not None
    player.data["c"] = 3
    player.save()
    assert store.onlooker.scalar("SELECT data FROM player WHERE id = 1") == {"b": 2, "c": 3}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nmae", r"is not a mapped attribute of Player \(did you mean 'name'\?\)"),
        ("qqq", "is not a mapped attribute of Player$"),
        (
            "email",
            r"is not a mapped attribute of Player \(the attribute of this column is 'e_mail'",
        ),
        ("plain", "is not a mapped attribute of Player"),
        ("noted", "is not a mapped attribute of Player"),
        ("save", "is not a mapped attribute of Player"),
        ("metadata", "is not a mapped attribute of Player"),
        ("__class__", "is not a mapped attribute of Player"),
        ("_sa_instance_state", "is not a mapped attribute of Player"),
        ("doubled", "is computed by the database"),
        ("shout", "is a SQL expression"),
        ("seen", "is a viewonly relationship"),
        ("games", "is a collection that is never loaded"),
        ("is_adult", "is a hybrid property without a setter"),
        ("minutes", "is no attribute that stores a value of its own"),
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_what_can_not_be_changed_is_refused(
    store: Store, name: str, reason: str, named: bool
) -> None:
    player = store.player()
    only = {name, "age"} if named else None
    reason = reason.replace("$", r"\. Nothing was changed\. See")
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{name}' {reason}"):
        player.update({"age": 31, name: "x"}, only=only)
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{name}' {reason}"):
        Player.create({"age": 31, name: "x"}, only=only)
    with store.sends():
        assert (player.age, list(store().dirty)) == (30, [])


PROTECTED: list[tuple[str, Any, str]] = [
    ("id", 7, "a primary key"),
    ("key", 7, "a primary key"),
    ("team_id", 2, "a foreign key"),
    ("ally_id", 2, "a foreign key"),
    ("team", None, "a relationship"),
    ("club", None, "a relationship"),
    ("goals", [], "a relationship"),
    ("number", 99, "an identity column"),
    ("home_at", Point(1, 2), "a foreign key"),
    ("secret", "abc", "a hybrid property"),
    ("_secret", "abc", "private by its name"),
]


@pytest.mark.parametrize(("name", "value", "reason"), PROTECTED)
def test_what_a_form_must_not_set_is_refused_unless_named(
    store: Store, name: str, value: Any, reason: str
) -> None:
    player = store.player()
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{name}' is {reason}"):
        player.update({"mood": "fine", name: value})
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{name}' is {reason}"):
        player.update(**{"mood": "fine", name: value})
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{name}' is {reason}"):
        Player.create({"name": "Cid", name: value})
    with store.sends():
        assert player.mood == "good"
        assert not store().dirty
    player.update({name: value}, only=[name])
    assert getattr(player, name) == ("cba" if name == "secret" else value)
    assert store.onlooker.scalar("SELECT count(*) FROM player WHERE mood = 'good'") == 1


def test_the_version_and_the_discriminator_are_refused_unless_named(store: Store) -> None:
    dog, cat = Dog.create(name="Rex", legs=4), Cat.create(name="Tom", lives=9)
    for animal in (dog, cat):
        with pytest.raises(exc.InvalidRequestError, match="'kind' is the discriminator"):
            animal.update(kind="animal")
        with pytest.raises(exc.InvalidRequestError, match="'id' is a primary key"):
            animal.update(id=7)
    with store.stores("UPDATE", "UPDATE"):
        dog.update({"name": "Max", "legs": 3})
    with store.stores_one("UPDATE"):
        cat.update(name="Kit", lives=8)
    with pytest.raises(exc.InvalidRequestError, match="'legs' is not a mapped attribute of Cat"):
        cat.update(legs=4)
    with pytest.raises(exc.InvalidRequestError, match="'version' is the version"):
        store.player().update({"version": 9})


@pytest.mark.parametrize(
    ("class_", "column", "other"),
    [(Shape, "corners", "name"), (Round, "corners", "name"), (Big, "size", "colour")],
)
def test_an_expression_as_discriminator_is_refused_unless_named(
    store: Store, class_: Any, column: str, other: str
) -> None:
    value = {Shape: 3, Round: 0, Big: 10}[class_]
    for make in (class_.create, class_(**{column: value}).update):
        with pytest.raises(
            exc.InvalidRequestError, match=f"'{column}' is the discriminator|not st"
        ):
            make({column: 1, other: "x"})
    instance = class_.create({column: value, other: "one"}, only={column, other})
    with store.sends(), pytest.raises(exc.InvalidRequestError, match=f"'{column}' is the discrim"):
        instance.update({column: 1})
    with store.stores_one("UPDATE"):
        instance.update({other: "two"})
    assert getattr(instance, other) == "two"
    assert type(class_.query.one()) is class_
    with store.stores_one("UPDATE"):
        instance.update({column: value + 1}, only={column})


def test_only_names_what_may_be_changed_and_all_else_is_refused(store: Store) -> None:
    player = store.player()
    for only in ({"mood", "age"}, ["mood", "age"], ("mood", "age"), {"mood": 1, "age": 2}.keys()):
        with store.sends(), pytest.raises(exc.InvalidRequestError, match="'name' is not named in"):
            player.update({"mood": "fine", "name": "Augusta"}, only=only)
    with store.sends(), pytest.raises(exc.InvalidRequestError, match="'name' is not named in only"):
        player.update({"mood": "fine"}, only={"mood"}, name="Augusta")
    with store.sends(), pytest.raises(exc.InvalidRequestError, match="'mood' is not named in only"):
        player.update({"mood": "fine"}, only=())
    with store.sends(), pytest.raises(exc.InvalidRequestError, match="'nmae' is not a mapped"):
        player.update({"mood": "fine"}, only={"mood", "nmae"})
    assert player.mood == "good"
    with store.stores("UPDATE"):
        player.update({"mood": "fine"}, only={"mood", "age"})


@pytest.mark.parametrize("only", ["mood", 7, [Player.mood], iter(["mood"]), [7], b"mood"])
def test_only_is_a_collection_of_names(store: Store, only: Any) -> None:
    player = store.player()
    with store.sends(), pytest.raises(exc.ArgumentError, match=r"only=\{'name', …\}"):
        player.update({"mood": "fine"}, only=only)


@pytest.mark.parametrize("values", [["mood"], [("mood", "fine")], "mood=fine", 7, object(), b"{}"])
def test_update_and_create_refuse_what_is_no_mapping(store: Store, values: Any) -> None:
    player = store.player()
    with store.sends(), pytest.raises(exc.ArgumentError, match="mapping of names and values"):
        player.update(values)
    with store.sends(), pytest.raises(exc.ArgumentError, match="mapping of names and values"):
        Player.create(values)


def test_update_with_nothing_at_all_is_an_error(store: Store) -> None:
    player = store.player()
    with pytest.raises(exc.ArgumentError, match=r"got nothing to change.*save\(\)"):
        player.update()
    with pytest.raises(exc.ArgumentError, match="got nothing to change"):
        player.update(None)  # such as a request without JSON


def test_a_name_that_is_given_twice_is_an_error(store: Store) -> None:
    with pytest.raises(exc.ArgumentError, match="'mood' both in the mapping and as a keyword"):
        store.player().update({"mood": "fine"}, mood="good")
    with pytest.raises(exc.ArgumentError, match="'name' both in the mapping and as a keyword"):
        Player.create({"name": "Cid"}, name="Dan")


def test_names_that_are_no_strings_are_refused(store: Store) -> None:
    with pytest.raises(exc.InvalidRequestError, match="7 is not a mapped attribute"):
        store.player().update(cast("Any", {7: "x", None: "y"}))


def test_the_error_names_a_few_of_many(store: Store) -> None:
    with pytest.raises(exc.InvalidRequestError) as raised:
        store.player().update({f"wrong{number}": number for number in range(10_000)})
    assert "'wrong0'" in str(raised.value)
    assert len(str(raised.value)) < 1_000


def test_attributes_may_be_called_like_the_mixins_own(store: Store) -> None:
    with store.stores_one("INSERT"):
        row = Awkward.create(values="a", query="b", save="c", delete="d")
    row.update(values="A", save="C").update({"only": "O", "self": "S"}, query="B")
    with pytest.raises(exc.ArgumentError, match="An attribute that is called 'only' goes into the"):
        row.update(only="x")
    row.update({"only": "P"}, only={"only"})
    found = store.onlooker.scalar(
        "SELECT concat_ws(' ', values, query, save, delete, \"only\", self) FROM awkward"
    )
    assert found == "A B C d P S"
