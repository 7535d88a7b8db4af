"""An object stays as it was when ``update()`` comes to a value that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc

from tests.active_record.models import Goal, Player, Point, Team, current
from tests.active_record.support import Store


def test_a_value_that_is_refused_midway_changes_nothing(any_store: Store) -> None:
    player = any_store.player()
    before = dict(vars(player))
    values = {"name": "Augusta", "e_mail": "a@x", "at": Point(8, 9), "data": {"b": 1}, "age": 1}
    with any_store.sends(), pytest.raises(ValueError, match="No bad mood here"):
        player.update({**values, "mood": "bad"})
    after = dict(vars(player))
    after.pop("at", None)
    before.pop("at", None)
    assert after == before
    assert player.at == Point(1, 2)
    with any_store.stores("INSERT"):
        Team.create(name="Green")
    assert any_store.onlooker.scalar("SELECT version FROM player WHERE id = 1") == 1


def test_changes_that_waited_before_a_refused_value_still_wait(store: Store) -> None:
    player = store.player()
    player.name = "Augusta"
    player.age = 31
    with store.sends(), pytest.raises(ValueError, match="No bad mood here"):
        player.update({"name": "Grace", "age": 30, "e_mail": "a@x", "mood": "bad"})
    assert (player.name, player.age, player.e_mail) == ("Augusta", 31, None)
    history = sa.inspect(player).attrs["name"].history
    assert (list(history.added), list(history.deleted or ())) == (["Augusta"], ["Ada"])
    with store.stores("UPDATE"):
        player.save()
    assert store.onlooker.column("SELECT age FROM player WHERE name = 'Augusta'") == [31]
    player.mood = "fine"
    with pytest.raises(AttributeError):
        player.update({"mood": "good", "at": "here"})
    store().rollback()
    assert player.mood == "good"


def test_an_attribute_that_was_not_loaded_is_not_loaded_to_put_it_back(store: Store) -> None:
    player = store.player()
    store().expire(player)
    with store.sends(), pytest.raises(ValueError, match="No bad mood here"):
        player.update({"name": "Grace", "age": 31, "mood": "bad"})
    with store.sends("SELECT"):
        assert (player.name, player.age) == ("Ada", 30)
    with store.sends():
        store().flush()


def test_what_a_validator_refuses_is_put_back_all_the_same(store: Store) -> None:
    bob = Player.query.filter_by(name="Bob").one()
    with pytest.raises(AttributeError):
        bob.update({"mood": "fine", "at": "here"})
    assert bob.mood == "old"  # which it was before there was a validator
    with store.sends():
        store().flush()


def test_changes_in_a_mutable_value_are_still_noticed_after_a_refused_value(store: Store) -> None:
    player = store.player()
    with pytest.raises(ValueError, match="No bad mood here"):
        player.update({"data": {"b": 2}, "mood": "bad"})
    assert player.data is not None
    player.data["c"] = 3
    with store.stores("UPDATE"):
        player.save()
    assert store.onlooker.scalar("SELECT data FROM player WHERE id = 1") == {"a": 1, "c": 3}


def test_what_a_setter_has_noted_is_put_back_if_another_value_is_refused(store: Store) -> None:
    player = store.player()
    with pytest.raises(ValueError, match="No bad mood here"):
        player.update({"secret": "abc", "mood": "bad"}, only={"secret", "mood"})
    assert (player.secret, player.noted) == (None, "nothing")
    player.update({"secret": "abc"}, only={"secret"})
    assert (player.secret, player.noted) == ("cba", "a secret")


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("name", ["team", "club"])
def test_the_other_side_of_a_relationship_is_put_back(
    store: Store, loaded: bool, name: str
) -> None:
    player, blue = store.player(), Team.query.filter_by(name="Blue").one()
    assert blue.players == []
    if loaded:
        assert player.team is not None
        assert len(player.team.players) == 2
    with pytest.raises(ValueError, match="No bad mood here"):
        player.update({name: blue, "mood": "bad"}, only={name, "mood"})
    assert blue.players == []
    assert player.team is not None
    assert (player.team.name, len(player.team.players)) == ("Red", 2)
    with store.sends():
        store().flush()


def test_a_collection_is_put_back_if_another_value_is_refused(store: Store) -> None:
    player, bob = store.player(), Player.query.filter_by(name="Bob").one()
    goal, other = Goal.create(minute=1, player=player), Goal.create(minute=2, player=bob)
    store().expire_all()
    with pytest.raises(ValueError, match="No bad mood here"):
        player.update({"goals": [other], "mood": "bad"}, only={"goals", "mood"})
    assert (player.goals, bob.goals) == ([goal], [other])
    assert (goal.player, other.player) == (player, bob)
    with store.sends():
        store().flush()
    player.update({"goals": [other, goal]}, only={"goals"})
    assert store.onlooker.column("SELECT player_id FROM goal ORDER BY id") == [1, 1]


def test_a_read_that_fails_midway_leaves_a_usable_session(any_store: Store) -> None:
    player = any_store.player()

    def look(*_: Any) -> None:
        current().execute(sa.text("SELECT nothing FROM nowhere"))

    event.listen(Player.mood, "set", look)
    try:
        with pytest.raises(exc.ProgrammingError):
            player.update(name="Augusta", mood="fine")
    finally:
        event.remove(Player.mood, "set", look)
    assert (player.name, player.mood) == ("Ada", "good")
    Team.create(name="Green")


def test_a_validator_that_reads_does_not_flush_half_of_the_changes(store: Store) -> None:
    """A validator may read, inside, where reads flush."""
    player = store.player()
    seen: list[str] = []

    def look(target: Player, value: Any, old: Any, initiator: Any) -> None:
        seen.extend(current().scalars(sa.select(Player.name).where(Player.id == 1)))

    event.listen(Player.mood, "set", look)
    try:
        with store.sends("BEGIN", "SELECT", "UPDATE", "COMMIT"), store().begin():
            player.update(name="Augusta", mood="fine")
    finally:
        event.remove(Player.mood, "set", look)
    assert seen == ["Ada"]
