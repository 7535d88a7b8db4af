"""Models, listeners and failures of more kinds."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, exc
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    mapped_column,
    relationship,
)

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy._core.engine import OptInEngine
from tests.find_or_create.models import Ask, Rows, listening
from tests.wire import WireProxy


class Base(DeclarativeBase):
    pass


class Person(Base):
    """Refers to itself, and is the base of joined inheritance."""

    __tablename__ = "people"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    email: Mapped[str | None] = mapped_column(unique=True)
    boss_id: Mapped[int | None] = mapped_column(ForeignKey("people.id"))
    boss: Mapped[Person | None] = relationship(remote_side=id, back_populates="team")
    team: Mapped[list[Person]] = relationship(back_populates="boss")


class Clerk(Person):
    __tablename__ = "clerks"
    __mapper_args__ = {"polymorphic_identity": "clerk"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(ForeignKey("people.id"), primary_key=True)
    badge: Mapped[str] = mapped_column(unique=True)


class Owner(Base):
    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(primary_key=True)
    pets: Mapped[list[Pet]] = relationship(back_populates="owner", cascade="all, delete-orphan")


class Pet(Base):
    __tablename__ = "pets"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    owner_name: Mapped[str] = mapped_column(ForeignKey("owners.name"))
    owner: Mapped[Owner] = relationship(back_populates="pets")


class Asking(Base):
    """A column default sends SQL."""

    __tablename__ = "asking"

    name: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(
        default=lambda context: context.connection.scalar(sa.text("SELECT 42"))
    )


class Shelf(MappedAsDataclass, Base):
    __tablename__ = "shelves"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str] = mapped_column(unique=True)
    books: Mapped[list[Volume]] = relationship(back_populates="shelf", default_factory=list)


class Volume(MappedAsDataclass, Base):
    __tablename__ = "volumes"

    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    name: Mapped[str] = mapped_column(unique=True)
    shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelves.id"), init=False)
    shelf: Mapped[Shelf | None] = relationship(back_populates="books", default=None)


@pytest.fixture(autouse=True)
def more_tables(engine: OptInEngine) -> None:
    Base.metadata.create_all(engine)


def test_an_object_of_joined_inheritance_may_refer_to_its_own_class(
    session: OptInSession, ask: Ask, wire: WireProxy
) -> None:
    boss, _ = ask(Clerk, {"email": "boss"}, badge="1")
    boss.email = "waits"
    clerk, created = ask(Clerk, {"email": "clerk"}, badge="2", boss=boss)
    assert (created, boss.team, list(session.dirty)) == (True, [clerk], [boss])
    person, created = ask(Person, {"boss": clerk}, email="person")
    assert (created, clerk.team, list(session.dirty)) == (True, [person], [boss])
    with pytest.raises(exc.IntegrityError):
        ask(Person, {"boss": boss, "id": clerk.id}, email="other")
    assert boss.team == [clerk]
    with wire.record() as recording:
        session.commit()
    assert recording.verbs == ["BEGIN", "UPDATE", "COMMIT"]


def test_a_new_dataclass_is_added_to_the_collection_of_its_owner(
    session: OptInSession, ask: Ask
) -> None:
    shelf, _ = ask(Shelf, name="a")
    volume, created = ask(Volume, name="b", shelf=shelf)
    assert (created, shelf.books, volume.shelf_id) == (True, [volume], shelf.id)
    with pytest.raises(exc.IntegrityError):
        ask(Volume, name="b", shelf=None)
    assert (shelf.books, list(session.dirty), list(session.new)) == ([volume], [], [])


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_new_object_is_added_to_a_collection_whose_orphans_are_deleted(
    session: OptInSession, ask: Ask, rows: Rows, is_waiting: bool
) -> None:
    owner, _ = ask(Owner, name="Ada")
    waiting = [Pet(name="waiting", owner=owner)] if is_waiting else []
    session.add_all(waiting)
    pet, created = ask(Pet, {"owner": owner}, name="cat")
    with pytest.raises(exc.DataError):
        ask(Pet, {"owner": owner, "id": 2**40}, name="dog")
    assert created
    assert set(owner.pets) == {pet, *waiting}
    session.commit()
    assert sorted(rows("SELECT name FROM pets")) == ["cat", "waiting"][: 1 + is_waiting]


def test_a_related_object_that_waits_to_be_deleted_goes_on_waiting(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    owner, _ = ask(Owner, name="Ada")
    session.delete(owner)
    assert ask(Pet, {"owner": owner}, name="cat")[1]
    assert list(session.deleted) == [owner]
    assert rows("SELECT name FROM pets") == ["cat"]


def test_an_expired_related_object_is_loaded_in_the_transaction(
    session: OptInSession, ask: Ask, wire: WireProxy
) -> None:
    owner, _ = ask(Owner, name="Ada")
    session.expire_all()
    with wire.record() as recording:
        pet, created = ask(Pet, {"owner": owner}, name="cat")
    assert recording.verbs == ["SELECT", "BEGIN", "SELECT", "INSERT", "COMMIT"]
    assert (created, owner.pets) == (True, [pet])


def test_a_column_default_that_sends_sql_is_in_the_transaction(ask: Ask, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert ask(Asking, name="a")[0].number == 42
    assert recording.verbs == ["SELECT", "BEGIN", "SELECT", "INSERT", "COMMIT"]


def test_a_function_among_the_defaults_may_create_an_object_in_the_same_way(
    session: OptInSession, ask: Ask
) -> None:
    def owner_of(name: str) -> Any:
        return lambda: ask(Owner, name=name)[0]

    cat, created = ask(Pet, {"owner": owner_of("Ada")}, name="cat")
    assert (created, cat.owner.pets) == (True, [cat])
    with session.begin():
        dog, created = ask(Pet, {"owner": owner_of("Bob")}, name="dog")
        assert (created, dog.owner.pets) == (True, [dog])


def test_a_callback_after_the_commit_may_create_an_object_in_the_same_way(
    session: OptInSession, ask: Ask
) -> None:
    answers: list[Any] = []

    def after_insert(*args: Any) -> None:
        session.on_commit(lambda: answers.append(ask(Owner, name="Ada")[1]))

    with listening(Asking, "after_insert", after_insert):
        ask(Asking, name="a")
    assert (answers, session.in_transaction()) == ([True], False)


@pytest.mark.parametrize("where", ["init", "before_insert"])
def test_an_interrupted_attempt_leaves_no_trace(
    session: OptInSession, ask: Ask, where: str
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    owner, _ = ask(Owner, name="Ada")
    with listening(Pet, where, interrupt), pytest.raises(KeyboardInterrupt):
        ask(Pet, {"owner": owner}, name="cat")
    assert (owner.pets, list(session.new), list(session.dirty)) == ([], [], [])
    assert not session.in_transaction()


def test_what_waits_survives_a_connection_that_is_lost(
    session: OptInSession, ask: Ask, rows: Rows
) -> None:
    waiting = Owner(name="waiting")
    session.add(waiting)
    is_first = [True]

    def kill(mapper: Any, connection: Any, target: Any) -> None:
        if is_first.pop():
            connection.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with listening(Asking, "before_insert", kill), pytest.raises(exc.OperationalError):
        ask(Asking, name="a")
    assert (list(session.new), session.in_transaction()) == ([waiting], False)
    assert ask(Asking, name="a")[1]
    session.commit()
    assert rows("SELECT name FROM owners") == ["waiting"]
