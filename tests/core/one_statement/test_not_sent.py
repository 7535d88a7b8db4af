"""BEGIN and COMMIT are sent if one statement alone would not be the same, or might not be."""

# ruff: noqa: PT012  # what raises is the end of a block

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.core.one_statement.models import (
    Animal,
    AsksForItsKey,
    Base,
    Club,
    Counted,
    Dog,
    Key,
    Member,
    Node,
    PartOfView,
    ReadsBack,
    Room,
    Versioned,
    VersionedByServer,
    WritesFirst,
)
from tests.library import Onlooker, sent
from tests.wire import Recording, WireProxy


class Refused(Exception):
    """Raised by a listener."""


def is_transaction(recording: Recording) -> bool:
    """Tell whether BEGIN was sent before the first write, and the end after the last one."""
    verbs = [verb for verb in sent(recording) if verb != "SELECT"]
    return verbs[0] == "BEGIN" and verbs[-1] in ("COMMIT", "ROLLBACK", "PREPARE TRANSACTION")


@contextmanager
def listening(
    target: Any, name: str, listener: Callable[..., Any], **options: Any
) -> Iterator[None]:
    event.listen(target, name, listener, **options)
    try:
        yield
    finally:
        event.remove(target, name, listener)


# What a flush sends


def two_new(session: Session) -> None:
    session.add_all([Member(name="Ada"), Member(name="Bob")])


def a_new_and_a_changed(session: Session) -> None:
    session.get_one(Club, 1).size = 5
    session.add(Member(name="Ada"))


def two_changed(session: Session) -> None:
    session.get_one(Club, 1).size = 5
    session.get_one(Club, 2).size = 6


def a_deleted(session: Session) -> None:
    session.delete(session.get_one(Room, 1))


def a_deleted_parent(session: Session) -> None:
    session.delete(session.get_one(Club, 1))


def two_tables(session: Session) -> None:
    session.add(Dog(name="Rex"))


def a_changed_one_of_two_tables(session: Session) -> None:
    session.get_one(Dog, 1).rank = 7


def another_key_than_the_table_has(session: Session) -> None:
    session.add(PartOfView(id=1, name="part"))


def a_changed_key(session: Session) -> None:
    session.get_one(Node, 1).id = 50


def a_many_to_many_relationship(session: Session) -> None:
    session.add(Member(name="Ada", clubs={session.get_one(Club, 1)}))


def a_changed_many_to_many_relationship(session: Session) -> None:
    member = session.get_one(Member, 1)
    member.clubs.add(session.get_one(Club, 2))


def a_new_parent_of_a_stored_object(session: Session) -> None:
    session.add(Club(name="new", rooms=[session.get_one(Room, 1)]))


def a_new_parent_and_its_child(session: Session) -> None:
    session.add(Club(name="new", rooms=[Room(name="hall")]))


def an_orphan(session: Session) -> None:
    club = session.get_one(Club, 1)
    club.keys.remove(session.get_one(Key, 1))


def an_orphan_that_has_changed(session: Session) -> None:
    key = session.get_one(Key, 1)
    key.name = "lost"
    club = session.get_one(Club, 1)
    club.keys.remove(key)


def an_owner_of_its_own_that_has_changed(session: Session) -> None:
    club = session.get_one(Club, 1)
    club.size = 5
    club.keys.append(Key(name="second"))


def an_update_after_the_insert(session: Session) -> None:
    session.add(Node(name="fan", favourite=session.get_one(Node, 1)))


def a_version_that_the_server_makes(session: Session) -> None:
    session.get_one(VersionedByServer, 1).name = "second"


def what_is_read_back(session: Session) -> None:
    session.get_one(ReadsBack, 1).name = "second"


def a_key_that_is_read_before(session: Session) -> None:
    session.add(AsksForItsKey(name="asked"))


def a_default_that_reads(session: Session) -> None:
    session.add(Counted(name="counted"))


def an_onupdate_that_reads(session: Session) -> None:
    session.get_one(Counted, 1).name = "counted again"


def a_default_that_writes(session: Session) -> None:
    session.add(WritesFirst(name="second"))


FLUSHES = [
    two_new,
    a_new_and_a_changed,
    two_changed,
    a_deleted,
    a_deleted_parent,
    two_tables,
    a_changed_one_of_two_tables,
    another_key_than_the_table_has,
    a_changed_key,
    a_many_to_many_relationship,
    a_changed_many_to_many_relationship,
    a_new_parent_of_a_stored_object,
    a_new_parent_and_its_child,
    an_orphan,
    an_orphan_that_has_changed,
    an_owner_of_its_own_that_has_changed,
    an_update_after_the_insert,
    a_version_that_the_server_makes,
    what_is_read_back,
    a_key_that_is_read_before,
    a_default_that_reads,
    an_onupdate_that_reads,
    a_default_that_writes,
]


@pytest.fixture
def stored(sessions: sessionmaker[OptInSession]) -> None:
    with sessions.begin() as session:
        session.add_all(
            [
                Room(name="one", club_id=1),
                Key(name="front", club_id=1),
                Member(name="Cid"),
                Dog(name="Bello"),
                Node(name="root"),
                Versioned(name="first"),
                VersionedByServer(name="first"),
                ReadsBack(name="first"),
                Counted(name="first"),
                WritesFirst(name="first"),
            ]
        )
    with sessions.begin() as session:
        session.execute(sa.delete(Club).where(Club.name == "by a default"))


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("change", FLUSHES)
@pytest.mark.parametrize("way", ["block", "commit", "flush"])
def test_a_flush_that_may_send_more_than_one_statement_is_a_transaction(
    session: OptInSession, wire: WireProxy, change: Callable[[Session], None], way: str
) -> None:
    with session.no_autoflush:
        change(session)
    with wire.record() as recording:
        if way == "block":
            with session.begin():
                pass
        else:
            getattr(session, way)()
    assert is_transaction(recording), str(recording)


@pytest.mark.usefixtures("stored")
def test_a_collection_that_the_block_loads_is_read_in_the_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    club = session.get_one(Club, 1)
    with wire.record() as recording, session.begin():
        club.rooms.append(Room(name="hall"))
    assert sent(recording) == ["BEGIN", "SELECT", "INSERT", "COMMIT"]


# What would be stored in part


def stores_nothing(session: OptInSession, onlooker: Onlooker, add: Callable[[], object]) -> None:
    before = [onlooker.scalar(f"SELECT count(*) FROM {table}") for table in Base.metadata.tables]
    with pytest.raises(IntegrityError), session.begin():
        add()
    after = [onlooker.scalar(f"SELECT count(*) FROM {table}") for table in Base.metadata.tables]
    assert before == after


def test_an_insert_that_the_second_table_refuses_stores_nothing(
    session: OptInSession, onlooker: Onlooker
) -> None:
    stores_nothing(session, onlooker, lambda: session.add(Dog(name="Rex", rank=0)))
    assert onlooker.column("SELECT name FROM animal") == []
    assert not session.scalars(sa.select(Animal)).all()


@pytest.mark.usefixtures("stored")
def test_a_row_that_is_refused_after_its_default_has_written_stores_nothing(
    session: OptInSession, onlooker: Onlooker
) -> None:
    stores_nothing(session, onlooker, lambda: session.add(WritesFirst(name="first")))


@pytest.mark.usefixtures("stored")
def test_a_member_that_is_refused_after_its_owner_has_changed_stores_nothing(
    session: OptInSession, onlooker: Onlooker
) -> None:
    club = session.get_one(Club, 1)

    def change() -> None:
        club.size = 9
        club.rooms.append(Room(name=cast(Any, None)))

    stores_nothing(session, onlooker, change)
    assert onlooker.scalar("SELECT size FROM club WHERE id = 1") == 3


# Who listens


def refuse(*_: Any) -> None:
    raise Refused


@pytest.mark.parametrize(
    "name", ["before_commit", "before_flush", "after_flush", "after_flush_postexec"]
)
def test_what_a_listener_of_the_session_refuses_is_not_stored(
    session: OptInSession, onlooker: Onlooker, name: str
) -> None:
    with listening(session, name, refuse), pytest.raises(Refused), session.begin():
        session.add(Club(name="new"))
    assert onlooker.scalar("SELECT count(*) FROM club") == 2


# SQLAlchemy 2.0 leaves the object in a state of which its own cleanup complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_listener_to_the_objects_refuses_is_not_stored(
    session: OptInSession, onlooker: Onlooker
) -> None:
    with (
        listening(session, "pending_to_persistent", refuse),
        pytest.raises(Refused),
        session.begin(),
    ):
        session.add(Club(name="new"))
    assert onlooker.scalar("SELECT count(*) FROM club") == 2


@pytest.mark.parametrize("name", ["after_insert", "refresh_flush"])
def test_what_a_listener_of_the_model_refuses_is_not_stored(
    session: OptInSession, onlooker: Onlooker, name: str
) -> None:
    with listening(Counted, name, refuse), pytest.raises(Refused), session.begin():
        session.add(Counted(name="new"))
    assert onlooker.scalar("SELECT count(*) FROM counted") == 0


def test_a_listener_of_the_model_whose_write_is_refused_stores_nothing(
    session: OptInSession, onlooker: Onlooker
) -> None:
    def write(mapper: Any, connection: sa.Connection, club: Club) -> None:
        connection.execute(sa.insert(Member).values(name=None))

    with listening(Club, "before_update", write):
        stores_nothing(session, onlooker, lambda: setattr(session.get(Club, 1), "size", 9))


def test_a_listener_to_the_begin_may_set_the_tenant(
    session: OptInSession, onlooker: Onlooker
) -> None:
    """As for row-level security: its setting is local to the transaction."""

    def set_tenant(session: Session, transaction: Any, connection: sa.Connection) -> None:
        connection.execute(sa.text("SET LOCAL app.tenant = 'seven'"))

    onlooker.run("ALTER TABLE club ALTER name SET DEFAULT current_setting('app.tenant')")
    with listening(session, "after_begin", set_tenant), session.begin():
        session.add(Club(name=cast(Any, sa.text("current_setting('app.tenant')"))))
    assert onlooker.scalar("SELECT name FROM club WHERE id > 2") == "seven"


def set_tenant_by_hand(connection: sa.Connection, *_: Any) -> None:
    dbapi: Any = connection.connection
    with dbapi.cursor() as cursor:
        cursor.execute("SET LOCAL app.tenant = 'seven'")


@pytest.mark.parametrize("name", ["before_cursor_execute", "before_execute", "begin"])
def test_a_listener_of_the_engine_may_set_the_tenant(
    engine: OptInEngine, session: OptInSession, onlooker: Onlooker, name: str
) -> None:
    with listening(engine, name, set_tenant_by_hand), session.begin():
        session.add(Club(name=cast(Any, sa.text("current_setting('app.tenant')"))))
    assert onlooker.scalar("SELECT name FROM club WHERE id > 2") == "seven"


@pytest.mark.parametrize("name", ["before_cursor_execute", "before_execute", "begin"])
def test_a_listener_of_the_connection_may_set_the_tenant(
    engine: OptInEngine, session: OptInSession, onlooker: Onlooker, name: str
) -> None:
    def listen(connection: sa.Connection) -> None:
        event.listen(connection, name, set_tenant_by_hand)

    with listening(engine, "engine_connect", listen), session.begin():
        session.add(Club(name=cast(Any, sa.text("current_setting('app.tenant')"))))
    assert onlooker.scalar("SELECT name FROM club WHERE id > 2") == "seven"


def test_a_listener_of_the_dialect_may_set_the_tenant(
    engine: OptInEngine, session: OptInSession, onlooker: Onlooker
) -> None:
    def set_tenant(cursor: Any, statement: str, *_: Any) -> None:
        cursor.execute("SET LOCAL app.tenant = 'seven'")

    with listening(engine, "do_execute", set_tenant), session.begin():
        session.add(Club(name=cast(Any, sa.text("current_setting('app.tenant')"))))
    assert onlooker.scalar("SELECT name FROM club WHERE id > 2") == "seven"


def test_what_a_listener_to_the_commit_refuses_is_not_stored(
    engine: OptInEngine, session: OptInSession, onlooker: Onlooker
) -> None:
    with listening(engine, "commit", refuse), pytest.raises(Refused), session.begin():
        session.add(Club(name="new"))
    assert onlooker.scalar("SELECT count(*) FROM club") == 2


# What the transaction is


def new_club(session: OptInSession) -> None:
    session.add(Club(name="new"))


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "SERIALIZABLE"},
        {"read_only": False},
        {"isolation_level": "READ COMMITTED"},
    ],
)
def test_a_block_with_a_level_or_a_flag_is_a_transaction(
    session: OptInSession, wire: WireProxy, options: Any
) -> None:
    with wire.record() as recording, session.begin(**options):
        new_club(session)
    assert is_transaction(recording)


@pytest.mark.parametrize(
    "options",
    [
        {"isolation_level": "REPEATABLE READ"},
        {"execution_options": {"postgresql_readonly": False}},
        {"read_only_outside": True},
        {"poolclass": StaticPool},
        {"poolclass": SingletonThreadPool},
    ],
)
@pytest.mark.usefixtures("engine")
def test_an_engine_with_options_or_one_connection_for_all_sends_a_transaction(
    wire_url: str, wire: WireProxy, onlooker: Onlooker, options: Any
) -> None:
    engine = create_engine(wire_url, **options)
    engine.connect().close()
    with OptInSession(engine) as session, wire.record() as recording, session.begin():
        new_club(session)
    engine.dispose()
    assert is_transaction(recording)
    assert onlooker.scalar("SELECT count(*) FROM club") == 3


def test_options_of_the_connection_make_it_a_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    with wire.record() as recording, session.begin():
        session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        new_club(session)
    assert is_transaction(recording)


class FlushesMore(OptInSession):
    """Writes a log with each flush."""

    def flush(self, objects: Any = None) -> None:
        is_first = bool(self.new)
        super().flush(objects)
        if is_first:
            self.execute(sa.insert(Member).values(name="log"))


def test_a_flush_of_the_users_own_is_a_transaction(engine: OptInEngine, wire: WireProxy) -> None:
    with FlushesMore(engine) as session, wire.record() as recording, session.begin():
        new_club(session)
    assert sent(recording) == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


class Sharded(OptInSession, ShardedSession):
    """Its objects have several binds."""


def test_a_session_with_shards_sends_a_transaction(engine: OptInEngine, wire: WireProxy) -> None:
    session = Sharded(
        shards={"one": engine},
        shard_chooser=lambda *_, **__: "one",
        identity_chooser=lambda *_, **__: ["one"],
        execute_chooser=lambda _: ["one"],
    )
    with session, wire.record() as recording, session.begin():
        new_club(session)
    assert is_transaction(recording)


def test_a_two_phase_session_sends_a_transaction(
    engine: OptInEngine, wire: WireProxy, onlooker: Onlooker
) -> None:
    with (
        OptInSession(engine, twophase=True) as session,
        wire.record() as recording,
        session.begin(),
    ):
        new_club(session)
    assert sent(recording)[0] == "BEGIN"
    assert onlooker.scalar("SELECT count(*) FROM club") == 3


def send_before(session: OptInSession) -> None:
    session.execute(sa.update(Club).values(size=9))


def lock_before(session: OptInSession) -> None:
    session.get_one(Club, 1, with_for_update=True)


def read_before(session: OptInSession) -> None:
    session.get_one(Club, 1)


def flush_before(session: OptInSession) -> None:
    session.add(Member(name="Ada"))
    session.flush()


def set_a_savepoint_before(session: OptInSession) -> None:
    with session.begin_nested():
        session.add(Member(name="Ada"))


def hand_out_before(session: OptInSession) -> None:
    session.connection()


@pytest.mark.parametrize(
    "before",
    [send_before, lock_before, read_before, flush_before, set_a_savepoint_before, hand_out_before],
)
def test_what_comes_before_the_last_flush_makes_it_a_transaction(
    session: OptInSession, wire: WireProxy, before: Callable[[OptInSession], None]
) -> None:
    with wire.record() as recording, session.begin():
        before(session)
        new_club(session)
    assert sent(recording)[0] == "BEGIN"
    assert sent(recording)[-1] == "COMMIT"


def test_a_cursor_that_the_user_has_makes_it_a_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    dbapi: Any = session.connection().connection
    with dbapi.cursor() as cursor, wire.record() as recording, session.begin():
        new_club(session)
        cursor.execute("UPDATE club SET size = 9")
    assert sent(recording) == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]


def test_an_explicit_flush_is_not_the_end_of_the_transaction(
    session: OptInSession, wire: WireProxy, onlooker: Onlooker
) -> None:
    with pytest.raises(Refused), wire.record() as recording, session.begin():
        new_club(session)
        session.flush()
        raise Refused
    assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
    assert onlooker.scalar("SELECT count(*) FROM club") == 2


def test_a_flush_before_another_statement_is_one_transaction_with_it(
    session: OptInSession, wire: WireProxy
) -> None:
    new_club(session)
    with wire.record() as recording:
        session.execute(sa.update(Club).values(size=9))
    assert sent(recording) == ["BEGIN", "INSERT", "UPDATE", "COMMIT"]


def test_a_stock_bind_that_has_joined_is_committed_with_ours(
    engine: OptInEngine, wire: WireProxy, wire_url: str
) -> None:
    stock = sa.create_engine(wire_url)
    with (
        OptInSession(binds={Member: stock, Club: engine}) as session,
        wire.record() as recording,
        session.begin(),
    ):
        session.scalar(sa.select(Member.id).limit(1))
        new_club(session)
    stock.dispose()
    assert sent(recording).count("COMMIT") == 2


def test_what_retry_transaction_may_repeat_is_a_transaction(
    session: OptInSession, wire: WireProxy
) -> None:
    """``retry_transaction()`` flushes before the end, to know how many binds take part."""
    with wire.record() as recording:
        retry_transaction(session)(lambda: new_club(session))()
    assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
