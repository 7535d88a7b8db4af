"""An error outside a transaction leaves a session that can be used."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.orm import scoped_session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

from fictive_sqlalchemy import OptInSession
from tests.active_record.models import Seat, Team, used
from tests.active_record.support import Store
from tests.wire import Message


def test_a_refused_create_leaves_a_usable_session(any_store: Store) -> None:
    with any_store.fails_at_one("INSERT", error=exc.IntegrityError):
        Team.create(name="Red")
    with any_store.stores_one("INSERT"):
        Team.create(name="Green")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 3


def test_a_refused_save_can_be_put_right_and_repeated(any_store: Store) -> None:
    team = Team(name="Red", city="Bern")
    with any_store.fails_at_one("INSERT", error=exc.IntegrityError):
        team.save()
    assert sa.inspect(team).transient
    assert (team.name, team.city) == ("Red", "Bern")
    team.name = "Green"
    with any_store.stores_one("INSERT"):
        team.save()
    assert any_store.onlooker.scalar("SELECT city FROM team WHERE name = 'Green'") == "Bern"


def test_a_refused_update_leaves_what_the_database_has(any_store: Store) -> None:
    player = any_store.player()
    with any_store.fails("UPDATE", error=exc.IntegrityError):
        player.update(name="Bob", mood="fine")
    with any_store.sends("SELECT") if any_store.opts_in else nullcontext():
        assert (player.name, player.mood) == ("Ada", "good")
    player.update(mood="fine")
    assert any_store.onlooker.column("SELECT mood FROM player WHERE name = 'Ada'") == ["fine"]


def test_a_refused_delete_leaves_the_object(any_store: Store) -> None:
    player = any_store.player()
    any_store.onlooker.run("INSERT INTO game (player_id) VALUES (1)")
    with pytest.raises(exc.IntegrityError):
        player.delete()
    assert sa.inspect(player).persistent
    assert player.name == "Ada"
    any_store.onlooker.run("DELETE FROM game")
    player.delete()
    assert any_store.onlooker.column("SELECT name FROM player") == ["Bob"]


def test_a_value_that_the_database_can_not_read_is_its_error(any_store: Store) -> None:
    player = any_store.player()
    with pytest.raises(exc.DBAPIError):
        player.update({"age": "thirty"})
    assert player.age == 30
    player.update({"age": "31"})
    assert any_store.onlooker.scalar("SELECT age FROM player WHERE name = 'Ada'") == 31


def test_an_error_at_commit_is_raised_and_nothing_is_stored(any_store: Store) -> None:
    Seat.create(place=1)
    seat, team = Seat(place=1), Team(name="Green")
    any_store().add(team)
    verbs = ["BEGIN", "INSERT", "INSERT", "COMMIT"]
    with any_store.sends(*verbs), pytest.raises(exc.IntegrityError):
        seat.save()
    assert sa.inspect(seat).transient
    assert sa.inspect(team).transient
    assert any_store.onlooker.scalar("SELECT count(*) FROM seat") == 1
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    Seat.create(place=2)


def test_updating_a_row_that_somebody_else_has_deleted_is_an_error(any_store: Store) -> None:
    player = any_store.player()
    any_store.onlooker.run("DELETE FROM player WHERE name = 'Ada'")
    with pytest.raises(StaleDataError):
        player.update(age=31)
    Team.create(name="Green")


def test_updating_a_version_that_somebody_else_has_counted_on_is_an_error(any_store: Store) -> None:
    player = any_store.player()
    any_store.onlooker.run("UPDATE player SET version = 2, age = 50 WHERE name = 'Ada'")
    with pytest.raises(StaleDataError):
        player.update(age=31)
    assert player.age == 50
    player.update(age=51)


def test_a_killed_connection_is_an_error_once(any_store: Store) -> None:
    player = any_store.player()

    def cut(message: Message) -> None:
        if message.verb == "UPDATE":
            any_store.wire.before_forward = None
            any_store.wire.cut_all()

    any_store.wire.before_forward = cut
    with pytest.raises(exc.OperationalError):
        player.update(age=31)
    assert player.age == 30
    assert player.update(age=32).age == 32


def test_what_else_waited_is_rolled_back_with_a_refused_create(any_store: Store) -> None:
    player, waiting = any_store.player(), Team(name="Green")
    any_store().add(waiting)
    player.age = 31
    with pytest.raises(exc.IntegrityError):
        Team.create(name="Red")
    assert sa.inspect(waiting).transient
    assert player.age == 30


def test_a_flush_that_can_not_begin_forgets_what_it_was_about(store: Store) -> None:
    unbound = scoped_session(sessionmaker(class_=OptInSession))
    used.append(unbound)
    team = Team(name="Green")
    with pytest.raises(exc.UnboundExecutionError):
        team.save()
    assert sa.inspect(team).transient
    used.remove(unbound)
    unbound.remove()
    team.save()


def test_an_interrupted_call_leaves_a_usable_session(any_store: Store) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    event.listen(any_store(), "before_flush", interrupt, once=True)
    with pytest.raises(KeyboardInterrupt):
        Team.create(name="Green")
    Team.create(name="Green")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 3
