"""Each call is one transaction outside a transaction, and a part of it inside one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from tests.active_record.models import Dog, Game, Team
from tests.active_record.support import Store

# -- outside: one transaction for each call ----------------------------------------------------


def test_create_is_one_transaction(any_store: Store) -> None:
    with any_store.stores_one("INSERT"):
        team = Team.create(name="Green")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2") == ["Green"]
    assert team in any_store()
    assert team.name == "Green"


def test_save_is_one_transaction(any_store: Store) -> None:
    team = Team(name="Green")
    with any_store.stores_one("INSERT"):
        assert team.save() is team
    team.name = "Yellow"
    any_store.rest()
    with any_store.stores_one("UPDATE") if any_store.opts_in else nullcontext():
        assert team.save() is team
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2") == ["Yellow"]


def test_update_is_one_transaction(any_store: Store) -> None:
    player = any_store.player()
    with any_store.stores("UPDATE"):
        assert player.update(name="Augusta", age=31) is player
    assert any_store.onlooker.column("SELECT name FROM player WHERE age = 31") == ["Augusta"]
    assert (player.name, player.age) == ("Augusta", 31)


def test_delete_is_one_transaction(any_store: Store) -> None:
    team = Team.query.filter_by(name="Blue").one()
    any_store.rest()
    reads = ["SELECT"]  # of the players, who would go with it
    if any_store.opts_in:
        with any_store.sends(*reads, "BEGIN", "DELETE", "COMMIT"):
            team.delete()
    else:
        with any_store.stores(*reads, "DELETE"):
            team.delete()
    assert any_store.onlooker.column("SELECT name FROM team") == ["Red"]
    assert team not in any_store()
    assert team.name == "Blue"


def test_a_row_of_two_tables_is_one_transaction(any_store: Store) -> None:
    with any_store.stores("INSERT", "INSERT"):
        dog = Dog.create(name="Rex", legs=4)
    with any_store.fails("INSERT", "INSERT", error=exc.IntegrityError):
        Dog.create(name="Max", legs=0)
    assert any_store.onlooker.column("SELECT name FROM animal") == ["Rex"]
    assert dog.legs == 4


def test_a_cascade_is_in_the_same_transaction(store: Store) -> None:
    team = Team.query.filter_by(name="Red").one()
    # Its players are read before, and the goals of each, which only lose the player.
    with store.sends("SELECT", "BEGIN", "SELECT", "SELECT", *["DELETE"] * 3, "COMMIT"):
        team.delete()
    assert store.onlooker.scalar("SELECT count(*) FROM player") == 0


def test_saving_what_has_not_changed_sends_nothing(store: Store) -> None:
    player = store.player()
    with store.sends():
        player.save()
        player.update(name="Ada")
        player.update({})
        assert player.age == 30


def test_a_save_expires_nothing(store: Store) -> None:
    player, team = store.player(), Team.query.filter_by(name="Red").one()
    with store.stores_one("UPDATE"):
        team.update(city="Bern")
    with store.sends():
        assert (team.name, team.city, player.name) == ("Red", "Bern", "Ada")


def test_create_stores_what_else_waits(any_store: Store) -> None:
    player = any_store.player()
    player.age = 31
    any_store().add(Team(name="Green"))
    Team.create(name="Yellow")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2 ORDER BY id") == [
        "Green",
        "Yellow",
    ]
    assert any_store.onlooker.scalar("SELECT age FROM player WHERE name = 'Ada'") == 31


def test_no_transaction_is_open_after_a_call(any_store: Store) -> None:
    player = any_store.player()
    player.update(age=31)
    Team.create(name="Green").delete()
    player.save()
    assert not any_store().in_transaction()
    any_store().begin().rollback()


# -- inside: part of the transaction -----------------------------------------------------------


def test_each_call_inside_a_block_is_part_of_its_transaction(any_store: Store) -> None:
    with any_store.stores("INSERT", "UPDATE", "INSERT", "DELETE"), any_store().begin():
        game = Game.create(player_id=1)
        assert game.update({"player_id": 2}, only=["player_id"]) is game
        other = Game(player_id=1)
        assert other.save() is other
        other.delete()
    assert any_store.onlooker.column("SELECT player_id FROM game") == [2]


def test_an_exception_undoes_the_block(any_store: Store) -> None:
    player = any_store.player()
    team: Team | None = None
    with pytest.raises(RuntimeError), any_store().begin():  # noqa: PT012
        team = Team.create(name="Green")
        player.update(name="Augusta")
        player.delete()
        raise RuntimeError
    assert any_store.onlooker.column("SELECT name FROM player ORDER BY id") == ["Ada", "Bob"]
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    assert (player.name, player in any_store()) == ("Ada", True)
    assert team is not None
    assert sa.inspect(team).transient


def test_an_error_inside_ends_the_block(any_store: Store) -> None:
    any_store().rollback()
    with any_store.fails("INSERT", "INSERT", error=exc.IntegrityError), any_store().begin():
        Team.create(name="Green")
        Team.create(name="Red")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    with any_store.stores_one("INSERT"):
        Team.create(name="Green")


def test_an_error_that_is_caught_inside_does_not_end_in_silence(any_store: Store) -> None:
    with pytest.raises(exc.PendingRollbackError), any_store().begin():  # noqa: PT012
        Team.create(name="Green")
        with pytest.raises(exc.IntegrityError):
            Team.create(name="Red")
        Team.create(name="Yellow")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    Team.create(name="Green")


def test_begin_nested_keeps_the_transaction_of_a_caught_error(any_store: Store) -> None:
    words = ["INSERT", "SAVEPOINT", "INSERT", "ROLLBACK TO", "INSERT"]
    with any_store.sends("BEGIN", *words, "COMMIT"), any_store().begin():
        Team.create(name="Green")
        with pytest.raises(exc.IntegrityError), any_store().begin_nested():
            Team.create(name="Red")
        Team.create(name="Yellow")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 4


def test_a_create_in_begin_nested_alone_is_part_of_its_transaction(any_store: Store) -> None:
    with any_store().begin_nested():
        Team.create(name="Green")
        assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    any_store().commit()
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 3


def test_nothing_is_created_in_a_block_whose_transaction_was_ended_by_hand(
    any_store: Store,
) -> None:
    with any_store().begin() as transaction:
        transaction.rollback()
        with pytest.raises(exc.InvalidRequestError, match="context manager"):
            Team.create(name="Green")
    Team.create(name="Yellow")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2") == ["Yellow"]
