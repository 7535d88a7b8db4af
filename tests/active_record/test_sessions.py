"""A model finds its session, and refuses objects that are in another one or in none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Query,
    mapped_column,
    object_session,
    scoped_session,
)
from sqlalchemy.orm.exc import UnmappedClassError

from fictive_sqlalchemy import OptInScopedSession, OptInSession
from fictive_sqlalchemy.active_record import ActiveRecordMixin
from tests.active_record.models import Base, Player, Team, current
from tests.active_record.support import Store

# -- objects that are elsewhere ----------------------------------------------------------------


def test_update_and_delete_need_a_row(any_store: Store) -> None:
    transient, pending = Team(name="Green"), Team(name="Yellow")
    with any_store().no_autoflush:
        any_store().add(pending)
        for team in (transient, pending):
            with any_store.sends():
                with pytest.raises(exc.InvalidRequestError, match=r"not stored yet: call save\("):
                    team.update(city="Bern")
                with pytest.raises(exc.InvalidRequestError, match=r"not stored yet: call save\("):
                    team.delete()
            assert team.city is None
    assert pending in any_store().new
    pending.save().update(city="Bern")


def test_a_deleted_object_is_gone(any_store: Store) -> None:
    team = Team.create(name="Green")
    team.delete()
    with any_store.sends():
        with pytest.raises(exc.InvalidRequestError, match="this object is deleted"):
            team.update(city="Bern")
        with pytest.raises(exc.InvalidRequestError, match="this object is deleted"):
            team.delete()
        with pytest.raises(exc.InvalidRequestError, match="has been deleted"):
            team.save()
    with any_store().begin():
        team = Team.create(name="Yellow")
        team.delete()
        with pytest.raises(exc.InvalidRequestError, match="this object is deleted"):
            team.update(city="Bern")
    any_store().rollback()


def test_an_object_that_is_marked_as_deleted_is_not_updated(store: Store) -> None:
    player = store.player()
    store().delete(player)
    with pytest.raises(exc.InvalidRequestError, match="this object is deleted"):
        player.update(age=31)
    store().rollback()
    player.update(age=31)


def test_a_detached_object_can_be_saved_and_nothing_else(any_store: Store) -> None:
    player = any_store.player()
    any_store.sessions.remove()
    player.mood = "fine"
    with any_store.sends():
        with pytest.raises(exc.InvalidRequestError, match="belongs to no session any more: get it"):
            player.update(age=31)
        with pytest.raises(exc.InvalidRequestError, match="belongs to no session any more: get it"):
            player.delete()
    with any_store.stores("UPDATE"):
        player.save()
    assert player in any_store()
    any_store.sessions.remove()
    same = any_store.player()
    with pytest.raises(exc.InvalidRequestError, match="another instance with key"):
        player.save()
    same.update(mood="good")


def test_an_object_of_another_session_is_refused(any_store: Store) -> None:
    with any_store.sessions.session_factory() as other:
        player = other.scalars(sa.select(Player).filter_by(name="Ada")).one()
        pending = Team(name="Green")
        other.add(pending)
        calls: list[Callable[[], object]] = [
            *(player.save, player.delete, pending.save, pending.delete),
            lambda: player.update(age=31),
        ]
        for call in calls:
            with (
                any_store.sends(),
                pytest.raises(exc.InvalidRequestError, match="belongs to another session than"),
            ):
                call()
        assert object_session(player) is other
        assert player.age == 30


def test_threads_do_not_share_a_session(any_store: Store) -> None:
    mine = any_store.player()
    together = threading.Barrier(5)

    def work(number: int) -> tuple[int, str]:
        together.wait(10)
        try:
            with pytest.raises(exc.InvalidRequestError, match="that of another thread"):
                mine.update(age=number)
            team = Team.create(name=f"Team {number}")
            with pytest.raises(exc.IntegrityError):
                Team.create(name="Red")
            together.wait(10)
            with current().begin():
                team = Team.query.filter_by(name=f"Team {number}").one()
                team.update(city=f"City {number}")
                Team.create(name=f"Other {number}")
            return id(current()), cast("str", team.city)
        finally:
            any_store.sessions.remove()

    with ThreadPoolExecutor(5) as executor:
        found = list(executor.map(work, range(5)))
    assert [city for _, city in found] == [f"City {number}" for number in range(5)]
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 12
    assert mine.age == 30


# -- where the session is found ----------------------------------------------------------------


def model_with(source: Any, **names: Any) -> Any:
    """A model in a registry of its own."""

    class Own(ActiveRecordMixin, DeclarativeBase):
        if source is not None:
            __scoped_session__ = source

    columns = {"id": mapped_column(sa.Integer, primary_key=True), "name": mapped_column(sa.Text)}
    return type("Item", (Own,), {"__tablename__": "team", **columns, **names})


def test_a_model_that_knows_no_session_says_what_to_set() -> None:
    model = model_with(None)
    calls: list[Callable[[], object]] = [
        *(model.create, model().save, model().delete),
        lambda: model.query,
        lambda: model().update(name="x"),
    ]
    for call in calls:
        with pytest.raises(
            exc.InvalidRequestError, match=r"Item does not know.*__scoped_session__"
        ):
            call()


def test_what_returns_another_session_each_time_is_refused(store: Store) -> None:
    for wrong in (store.sessions.session_factory, OptInSession, store(), "session", 7):
        with pytest.raises(exc.ArgumentError, match="has to return the same session each time"):
            model_with(wrong).create(name="Green")
    with pytest.raises(exc.ArgumentError, match="returned None, which is no"):
        model_with(lambda: None).create(name="Green")


def test_the_session_may_be_given_by_a_scope_or_a_function(store: Store) -> None:
    scoped = OptInScopedSession(store.sessions.session_factory)
    for source in (scoped, lambda: scoped, scoped.registry, staticmethod(scoped)):
        model = model_with(source)
        item = model.create(name=f"Item {id(source)}")
        assert object_session(item) is scoped()
        assert model.query.filter_by(name=item.name).one() is item
    scoped.remove()


def test_a_model_may_have_another_session_than_its_base(store: Store) -> None:
    other = scoped_session(store.sessions.session_factory)
    model = model_with(store.sessions, __scoped_session__=other)
    assert object_session(model.create(name="Green")) is other()
    other.remove()


def test_a_class_that_is_not_mapped_is_refused() -> None:
    with pytest.raises(UnmappedClassError, match="Base' is not mapped"):
        Base.create(name="Green")


def test_the_mixin_works_on_one_model_and_in_any_order(store: Store) -> None:
    class Plain(DeclarativeBase):
        pass

    class First(ActiveRecordMixin, Plain):
        __tablename__ = "first"
        __scoped_session__ = store.sessions
        id: Mapped[int] = mapped_column(primary_key=True)

    class Last(Plain, ActiveRecordMixin):
        __tablename__ = "last"
        __scoped_session__ = store.sessions
        id: Mapped[int] = mapped_column(primary_key=True)

    Plain.metadata.create_all(store.engine)
    for model in (First, Last):
        row = model.create()
        assert model.query.all() == [row] == row.query.all()
        row.delete()


def test_a_query_of_the_base_is_not_hidden(store: Store) -> None:
    class Mine(Query[Any]):
        pass

    class Plain(DeclarativeBase):
        query = store.sessions.query_property(Mine)

    class Item(ActiveRecordMixin, Plain):
        __tablename__ = "team"
        __scoped_session__ = store.sessions
        id: Mapped[int] = mapped_column(primary_key=True)

    assert isinstance(Item.query, Mine)
    assert Item.query.count() == 2
