"""``create()`` takes a form and keywords, and refuses what the model does not have."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
from sqlalchemy import exc
from sqlalchemy.orm import Query
from typing_extensions import assert_type
from werkzeug.datastructures import MultiDict

from tests.active_record.models import Dog, Player, Record, Team
from tests.active_record.support import Store

# -- create ------------------------------------------------------------------------------------


def test_keywords_of_create_are_those_of_the_constructor(store: Store) -> None:
    team = Team.query.filter_by(name="Red").one()
    player = Player.create(id=9, name="Cid", team=team, secret="abc", plain="Dan")
    assert (player.id, player.team_id, player.secret, player.name) == (9, team.id, "cba", "Dan")
    with pytest.raises(TypeError, match="'nmae' is an invalid keyword argument for Player"):
        Player.create(nmae="Eve")


def test_a_payload_in_the_keywords_can_not_switch_off_its_own_check(store: Store) -> None:
    player = store.player()
    payload: dict[str, Any] = {"id": 77, "only": ["id", "mood"]}
    with store.sends(), pytest.raises(exc.ArgumentError, match=r"update\(form, only=…\), not \*\*"):
        player.update(**payload)
    with (
        store.sends(),
        pytest.raises(
            exc.InvalidRequestError,
            match=r"'id' is a primary key: if it may be changed, give it in a mapping, and name",
        ),
    ):
        player.update({"mood": "fine"}, **payload)
    with store.sends(), pytest.raises(exc.InvalidRequestError, match="give it in a mapping, and"):
        player.update(id=77)
    with store.sends():
        assert (player.id, player.mood) == (1, "good")
    with store.stores("UPDATE"):
        player.update({"mood": "fine"}, only={"mood", "age"}, age=31)


def test_create_takes_a_form_and_keywords_of_the_programmer(store: Store) -> None:
    form: MultiDict[str, Any] = MultiDict([("name", "Cid"), ("mood", "fine")])
    player = Player.create(form, only={"name", "mood"}, team_id=2)
    assert (player.name, player.mood, player.team_id) == ("Cid", "fine", 2)
    form.add("team_id", "2")
    with store.sends(), pytest.raises(exc.InvalidRequestError, match="'team_id' is not named in"):
        Player.create(form, only={"name", "mood"})
    player = Player.create({"name": "Dan", "team_id": 2}, only={"name", "team_id"})
    assert player.team_id == 2


def test_create_with_only_and_no_mapping_is_an_error(store: Store) -> None:
    with store.sends(), pytest.raises(exc.ArgumentError, match=r"Player.create\(form, only=…\)"):
        Player.create(**{"name": "Cid", "team_id": 2}, only={"name"})


def test_a_constructor_that_refuses_leaves_nothing(store: Store) -> None:
    with store.sends(), pytest.raises(ValueError, match="No bad mood here"):
        Player.create(name="Cid", mood="bad")
    assert not store().new
    Team.create(name="Green")
    assert store.onlooker.scalar("SELECT count(*) FROM player") == 2


def test_dataclass_models_are_created_updated_and_deleted(store: Store) -> None:
    record = Record.create(title="Blue", year=1971)
    assert record == Record.create({"title": "Blue"}, year=1971) or record.id == 1
    with pytest.raises(TypeError, match="title"):
        Record.create(year=1971)
    with pytest.raises(TypeError, match="id"):
        Record.create({"id": 7, "title": "Red"}, only={"id", "title"})
    record.update(year=1972).update({"title": "Red"})
    assert store.onlooker.column("SELECT title FROM record WHERE year = 1972") == ["Red"]
    record.delete()


# -- types -------------------------------------------------------------------------------------


def test_type_checkers_know_what_is_returned(store: Store) -> None:
    team = assert_type(Team.create(name="Green"), Team)
    assert_type(team.save(), Team)
    assert_type(team.update(name="Yellow"), Team)
    assert_type(Team.query, Query[Team])
    assert_type(Team.query.all(), list[Team])
    assert_type(Dog.create({"name": "Rex"}, legs=4).save(), Dog)
    held: AbstractContextManager[Any] = store().begin()
    with held:
        assert_type(Team.query.filter_by(name="Yellow").one(), Team).update(city="Bern")
