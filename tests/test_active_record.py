"""Models that store themselves: what each call sends, what it refuses, what an error leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy import ForeignKey, event, exc
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Query,
    Session,
    WriteOnlyMapped,
    column_property,
    composite,
    foreign,
    mapped_column,
    object_session,
    relationship,
    scoped_session,
    sessionmaker,
    synonym,
    validates,
)
from sqlalchemy.orm.exc import StaleDataError, UnmappedClassError
from typing_extensions import assert_type
from werkzeug.datastructures import CombinedMultiDict, ImmutableMultiDict, MultiDict

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, create_engine
from fictive_sqlalchemy.active_record import ActiveRecordMixin
from tests.library import Onlooker, assert_at_rest, sent
from tests.wire import Message, WireProxy

# -- the models --------------------------------------------------------------------------------

_used: list[scoped_session[Any]] = []


def current() -> Session:
    """The session of the store under test."""
    return cast("Session", _used[-1]())


class Base(ActiveRecordMixin, DeclarativeBase):
    __scoped_session__ = current


class Team(Base):
    __tablename__ = "team"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    city: Mapped[str | None] = mapped_column()
    players: Mapped[list[Player]] = relationship(
        back_populates="team",
        cascade="all",
        order_by="Player.id",
        foreign_keys="Player.team_id",
    )


@dataclass
class Point:
    x: int | None
    y: int | None


class Player(Base):
    """All that an attribute can be."""

    __tablename__ = "player"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012
    name: Mapped[str] = mapped_column(sa.Text, unique=True)
    age: Mapped[int | None] = mapped_column(sa.CheckConstraint("age >= 0"))
    e_mail: Mapped[str | None] = mapped_column("email")
    _secret: Mapped[str | None] = mapped_column("secret")
    mood: Mapped[str | None]
    data: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSONB))
    tags: Mapped[list[str] | None] = mapped_column(ARRAY(sa.Text))
    x: Mapped[int | None]
    y: Mapped[int | None]
    at: Mapped[Point] = composite("x", "y")
    team_id: Mapped[int | None] = mapped_column(ForeignKey(Team.id))
    home_id: Mapped[int | None] = mapped_column(ForeignKey(Team.id))
    ally_id: Mapped[int | None]
    number: Mapped[int] = mapped_column(sa.Identity())
    doubled: Mapped[int | None] = mapped_column(sa.Computed("age * 2", persisted=True))
    shout: Mapped[str] = column_property(sa.func.upper(name))
    login: Mapped[str] = synonym("name")
    key: Mapped[int] = synonym("id")
    club: Mapped[Team | None] = synonym("team")
    _z: Mapped[int | None] = mapped_column("z")
    above: Mapped[Point] = composite("x", "_z")
    home_at: Mapped[Point] = composite("home_id", "x")

    team: Mapped[Team | None] = relationship(back_populates="players", foreign_keys=team_id)
    ally: Mapped[Team | None] = relationship(primaryjoin=lambda: foreign(Player.ally_id) == Team.id)
    seen: Mapped[Team | None] = relationship(foreign_keys=team_id, viewonly=True)
    games: WriteOnlyMapped[Game] = relationship(passive_deletes="all")
    goals: Mapped[list[Goal]] = relationship(back_populates="player", order_by="Goal.id")
    minutes: AssociationProxy[list[int]] = association_proxy("goals", "minute")

    noted = "nothing"

    @validates("mood")
    def check_mood(self, key: str, mood: str | None) -> str | None:
        if mood in ("bad", "old"):
            raise ValueError(f"No {mood} mood here.")
        return mood

    @hybrid_property
    def secret(self) -> str | None:
        return self._secret

    @secret.inplace.setter
    def _set_secret(self, secret: str | None) -> None:
        self.noted = "a secret"
        self._secret = secret and secret[::-1]

    @hybrid_property
    def is_adult(self) -> bool:
        return (self.age or 0) >= 18

    @property
    def plain(self) -> str:
        return self.name

    @plain.setter
    def plain(self, value: str) -> None:
        self.name = value


class Game(Base):
    __tablename__ = "game"

    id: Mapped[int] = mapped_column(primary_key=True)
    player_id: Mapped[int] = mapped_column(ForeignKey(Player.id))


class Goal(Base):
    __tablename__ = "goal"

    id: Mapped[int] = mapped_column(primary_key=True)
    minute: Mapped[int]
    player_id: Mapped[int | None] = mapped_column(ForeignKey(Player.id))
    player: Mapped[Player | None] = relationship(back_populates="goals")


class Animal(Base):
    __tablename__ = "animal"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]


class Dog(Animal):
    """Two tables."""

    __tablename__ = "dog"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    legs: Mapped[int] = mapped_column(sa.CheckConstraint("legs > 0"))


class Cat(Animal):
    """One table with its base."""

    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012

    lives: Mapped[int | None]


class Shape(Base):
    """The discriminator is an expression of a column."""

    __tablename__ = "shape"

    id: Mapped[int] = mapped_column(primary_key=True)
    corners: Mapped[int] = mapped_column()
    name: Mapped[str | None]
    __mapper_args__ = {  # noqa: RUF012
        "polymorphic_on": sa.case((cast("Any", corners).column == 0, "round"), else_="shape"),
        "polymorphic_identity": "shape",
    }


class Round(Shape):
    __mapper_args__ = {"polymorphic_identity": "round"}  # noqa: RUF012


class Ball(Base):
    """The discriminator is an attribute that is an expression, and is given by its name."""

    __tablename__ = "ball"

    id: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column()
    colour: Mapped[str | None]
    kind: Mapped[str] = column_property(
        sa.case((cast("Any", size).column > 9, "big"), else_="ball")
    )
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "ball"}  # noqa: RUF012


class Big(Ball):
    __mapper_args__ = {"polymorphic_identity": "big"}  # noqa: RUF012


class Seat(Base):
    """Its constraint is checked at COMMIT."""

    __tablename__ = "seat"
    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


class Awkward(Base):
    """Columns that are called like what the mixin has."""

    __tablename__ = "awkward"

    id: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[str | None]
    only: Mapped[str | None]
    self: Mapped[str | None]
    query: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore
    save: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore
    delete: Mapped[str | None]  # type: ignore[assignment]  # pyright: ignore


class DataBase(ActiveRecordMixin, MappedAsDataclass, DeclarativeBase):
    __scoped_session__ = current


class Record(DataBase):
    __tablename__ = "record"

    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    title: Mapped[str]
    year: Mapped[int] = mapped_column(default=1999)


# -- the stores --------------------------------------------------------------------------------


@dataclass
class Store:
    """A kind of session on a filled database."""

    wire: WireProxy
    engine: sa.Engine
    sessions: scoped_session[Any]
    onlooker: Onlooker
    opts_in: bool

    def __call__(self) -> Session:
        return cast("Session", self.sessions())

    @contextmanager
    def sends(self, *verbs: str) -> Iterator[None]:
        """Check what the block sends, word by word."""
        with self.wire.record() as recording:
            yield
        assert sent(recording) == list(verbs)

    @contextmanager
    def stores(self, *verbs: str) -> Iterator[None]:
        """Check what the block sends outside, between BEGIN and COMMIT."""
        with self.sends("BEGIN", *verbs, "COMMIT"):
            yield

    @contextmanager
    def fails(self, *verbs: str, error: type[BaseException]) -> Iterator[None]:
        """Check what the block sends outside, and that it fails."""
        with self.sends("BEGIN", *verbs, "ROLLBACK"), pytest.raises(error):
            yield

    def player(self) -> Player:
        """Ada, loaded, with no transaction open."""
        player = Player.query.filter_by(name="Ada").one()
        self.rest()
        return player

    def rest(self) -> None:
        """End the transaction that a read has begun, on the kind that begins by itself."""
        if not self.opts_in:
            expire, self().expire_on_commit = self().expire_on_commit, False
            self().commit()
            self().expire_on_commit = expire


KINDS = ["opt-in", "stock", "opt-in on a stock bind"]


def _store(kind: str, wire: WireProxy, wire_url: str, url: str) -> Iterator[Store]:
    engine: sa.Engine = create_engine(wire_url) if kind == "opt-in" else sa.create_engine(wire_url)
    class_ = Session if kind == "stock" else OptInSession
    sessions = scoped_session(sessionmaker(engine, class_=class_))
    Base.metadata.create_all(engine)
    DataBase.metadata.create_all(engine)
    onlooker = Onlooker(url)
    onlooker.run("INSERT INTO team (name) VALUES ('Red'), ('Blue')")
    onlooker.run(
        "INSERT INTO player (name, age, mood, data, team_id, x, y, version) VALUES "
        "('Ada', 30, 'good', '{\"a\": 1}', 1, 1, 2, 1), ('Bob', 40, 'old', NULL, 1, 3, 4, 1)"
    )
    _used.append(sessions)
    try:
        yield Store(wire, engine, sessions, onlooker, kind == "opt-in")
        sessions.remove()
        if isinstance(engine, OptInEngine):
            assert_at_rest(engine)
    finally:
        _used.remove(sessions)
        sessions.remove()
        onlooker.close()
        engine.dispose()


@pytest.fixture(params=KINDS)
def any_store(
    request: pytest.FixtureRequest, wire: WireProxy, wire_url: str, url: str
) -> Iterator[Store]:
    """Each kind of session."""
    yield from _store(request.param, wire, wire_url, url)


@pytest.fixture
def store(wire: WireProxy, wire_url: str, url: str) -> Iterator[Store]:
    """Opt-in transactions."""
    yield from _store("opt-in", wire, wire_url, url)


# -- outside: one transaction for each call ----------------------------------------------------


def test_create_is_one_transaction(any_store: Store) -> None:
    with any_store.stores("INSERT"):
        team = Team.create(name="Green")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2") == ["Green"]
    assert team in any_store()
    assert team.name == "Green"


def test_save_is_one_transaction(any_store: Store) -> None:
    team = Team(name="Green")
    with any_store.stores("INSERT"):
        assert team.save() is team
    team.name = "Yellow"
    any_store.rest()
    with any_store.stores("UPDATE") if any_store.opts_in else nullcontext():
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


def test_it_expires_nothing(store: Store) -> None:
    player, team = store.player(), Team.query.filter_by(name="Red").one()
    with store.stores("UPDATE"):
        team.update(city="Bern")
    with store.sends():
        assert (team.name, team.city, player.name) == ("Red", "Bern", "Ada")


def test_what_else_waits_is_stored_too(any_store: Store) -> None:
    player = any_store.player()
    player.age = 31
    any_store().add(Team(name="Green"))
    Team.create(name="Yellow")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2 ORDER BY id") == [
        "Green",
        "Yellow",
    ]
    assert any_store.onlooker.scalar("SELECT age FROM player WHERE name = 'Ada'") == 31


def test_no_transaction_is_open_afterwards(any_store: Store) -> None:
    player = any_store.player()
    player.update(age=31)
    Team.create(name="Green").delete()
    player.save()
    assert not any_store().in_transaction()
    any_store().begin().rollback()


# -- inside: part of the transaction -----------------------------------------------------------


def test_inside_each_is_part_of_the_transaction(any_store: Store) -> None:
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
    with any_store.stores("INSERT"):
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


def test_begin_nested_alone_is_inside_too(any_store: Store) -> None:
    with any_store().begin_nested():
        Team.create(name="Green")
        assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 2
    any_store().commit()
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 3


def test_a_transaction_that_was_ended_by_hand_in_its_block_is_over(any_store: Store) -> None:
    with any_store().begin() as transaction:
        transaction.rollback()
        with pytest.raises(exc.InvalidRequestError, match="context manager"):
            Team.create(name="Green")
    Team.create(name="Yellow")
    assert any_store.onlooker.column("SELECT name FROM team WHERE id > 2") == ["Yellow"]


# -- errors outside ----------------------------------------------------------------------------


def test_a_refused_create_leaves_a_usable_session(any_store: Store) -> None:
    with any_store.fails("INSERT", error=exc.IntegrityError):
        Team.create(name="Red")
    with any_store.stores("INSERT"):
        Team.create(name="Green")
    assert any_store.onlooker.scalar("SELECT count(*) FROM team") == 3


def test_a_refused_save_can_be_put_right_and_repeated(any_store: Store) -> None:
    team = Team(name="Red", city="Bern")
    with any_store.fails("INSERT", error=exc.IntegrityError):
        team.save()
    assert sa.inspect(team).transient
    assert (team.name, team.city) == ("Red", "Bern")
    team.name = "Green"
    with any_store.stores("INSERT"):
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
    seat = Seat(place=1)
    with any_store.sends("BEGIN", "INSERT", "COMMIT"), pytest.raises(exc.IntegrityError):
        seat.save()
    assert sa.inspect(seat).transient
    assert any_store.onlooker.scalar("SELECT count(*) FROM seat") == 1
    Seat.create(place=2)


def test_a_row_that_somebody_else_has_deleted(any_store: Store) -> None:
    player = any_store.player()
    any_store.onlooker.run("DELETE FROM player WHERE name = 'Ada'")
    with pytest.raises(StaleDataError):
        player.update(age=31)
    Team.create(name="Green")


def test_a_version_that_somebody_else_has_counted_on(any_store: Store) -> None:
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


def test_what_else_waited_is_rolled_back_with_a_refused_one(any_store: Store) -> None:
    player, waiting = any_store.player(), Team(name="Green")
    any_store().add(waiting)
    player.age = 31
    with pytest.raises(exc.IntegrityError):
        Team.create(name="Red")
    assert sa.inspect(waiting).transient
    assert player.age == 30


def test_a_flush_that_can_not_begin_forgets_what_it_was_about(store: Store) -> None:
    unbound = scoped_session(sessionmaker(class_=OptInSession))
    _used.append(unbound)
    team = Team(name="Green")
    with pytest.raises(exc.UnboundExecutionError):
        team.save()
    assert sa.inspect(team).transient
    _used.remove(unbound)
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


# -- update: what it takes ---------------------------------------------------------------------


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
    reason = reason.replace("$", r"\. Nothing was changed\.$")
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
    with store.stores("UPDATE"):
        cat.update(name="Kit", lives=8)
    with pytest.raises(exc.InvalidRequestError, match="'legs' is not a mapped attribute of Cat"):
        cat.update(legs=4)
    with pytest.raises(exc.InvalidRequestError, match="'version' is the version"):
        store.player().update({"version": 9})


@pytest.mark.parametrize(
    ("class_", "column", "other"),
    [(Shape, "corners", "name"), (Round, "corners", "name"), (Big, "size", "colour")],
)
def test_a_discriminator_that_is_an_expression(
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
    with store.stores("UPDATE"):
        instance.update({other: "two"})
    assert getattr(instance, other) == "two"
    assert type(class_.query.one()) is class_
    with store.stores("UPDATE"):
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


def test_attributes_that_are_called_like_the_mixins_own(store: Store) -> None:
    with store.stores("INSERT"):
        row = Awkward.create(values="a", query="b", save="c", delete="d")
    row.update(values="A", save="C").update({"only": "O", "self": "S"}, query="B")
    with pytest.raises(exc.ArgumentError, match="An attribute that is called 'only' goes into the"):
        row.update(only="x")
    row.update({"only": "P"}, only={"only"})
    found = store.onlooker.scalar(
        "SELECT concat_ws(' ', values, query, save, delete, \"only\", self) FROM awkward"
    )
    assert found == "A B C d P S"


# -- update: a value that is refused midway ----------------------------------------------------


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


def test_changes_that_waited_before_still_wait(store: Store) -> None:
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


def test_what_was_not_loaded_is_not_loaded_for_it(store: Store) -> None:
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


def test_what_a_mutable_holds_is_still_looked_after(store: Store) -> None:
    player = store.player()
    with pytest.raises(ValueError, match="No bad mood here"):
        player.update({"data": {"b": 2}, "mood": "bad"})
    assert player.data is not None
    player.data["c"] = 3
    with store.stores("UPDATE"):
        player.save()
    assert store.onlooker.scalar("SELECT data FROM player WHERE id = 1") == {"a": 1, "c": 3}


def test_what_a_setter_has_noted_is_put_back(store: Store) -> None:
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


def test_a_collection_is_put_back(store: Store) -> None:
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


def test_half_of_the_changes_go_nowhere(store: Store) -> None:
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


# -- create ------------------------------------------------------------------------------------


def test_keywords_of_create_are_the_constructors(store: Store) -> None:
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


def test_models_that_are_dataclasses(store: Store) -> None:
    record = Record.create(title="Blue", year=1971)
    assert record == Record.create({"title": "Blue"}, year=1971) or record.id == 1
    with pytest.raises(TypeError, match="title"):
        Record.create(year=1971)
    with pytest.raises(TypeError, match="id"):
        Record.create({"id": 7, "title": "Red"}, only={"id", "title"})
    record.update(year=1972).update({"title": "Red"})
    assert store.onlooker.column("SELECT title FROM record WHERE year = 1972") == ["Red"]
    record.delete()


# -- objects that are elsewhere ----------------------------------------------------------------


def test_update_and_delete_need_a_row(any_store: Store) -> None:
    transient, pending = Team(name="Green"), Team(name="Yellow")
    with any_store().no_autoflush:
        any_store().add(pending)
        for team in (transient, pending):
            with any_store.sends():
                with pytest.raises(exc.InvalidRequestError, match=r"not stored yet: save\(\) it"):
                    team.update(city="Bern")
                with pytest.raises(exc.InvalidRequestError, match=r"not stored yet: save\(\) it"):
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


def test_where_the_session_may_be_found(store: Store) -> None:
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
