"""Every argument and configuration key of Flask-SQLAlchemy goes on working."""

# mypy: disable-error-code="name-defined,misc,valid-type"

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy.model import DefaultMeta, Model
from flask_sqlalchemy.query import Query
from flask_sqlalchemy.session import Session as FlaskSession
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import (
    DeclarativeBase,
    DeclarativeBaseNoMeta,
    Mapped,
    MappedAsDataclass,
    declarative_base,
    mapped_column,
)
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from fictive_sqlalchemy import OptInEngine, OptInSession
from fictive_sqlalchemy.ext.flask.opt_in_transaction import Session
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import Recording, WireProxy

TRANSACTION = {"BEGIN", "COMMIT", "ROLLBACK"}


def with_item(db: Any) -> type[Any]:
    class Item(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(unique=True)

    return Item


def read(db: Any) -> None:
    """One read of a request of its own."""
    db.session.execute(sa.text("SELECT 1"))
    db.session.remove()


def begins(recording: Recording) -> list[set[str]]:
    return [set(text.split()) for text in recording.statements if text.startswith("BEGIN")]


# -- the engine's ---------------------------------------------------------------------------------


def test_engine_options_may_be_strings(make_app: MakeApp, url: str) -> None:
    db: Any = Database()
    options = {
        "pool_size": "2",
        "max_overflow": "0",
        "pool_recycle": "600",
        "pool_timeout": "7",
        "echo": "false",
        "isolation_level": "REPEATABLE READ",
    }
    with make_app(db, url, SQLALCHEMY_ENGINE_OPTIONS=options).app_context():
        assert isinstance(db.engine, OptInEngine)
        assert isinstance(db.engine.pool, QueuePool)
        assert (db.engine.pool.size(), db.engine.pool.timeout()) == (2, 7)
        assert db.engine.echo is False
        with db.session.begin():
            assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "repeatable read"
        assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


def test_options_of_the_extension_are_defaults_for_the_application(
    make_app: MakeApp, url: str
) -> None:
    db: Any = Database(engine_options={"pool_size": 2, "isolation_level": "SERIALIZABLE"})
    app = make_app(db, url, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 3})
    with app.app_context():
        assert db.engine.pool.size() == 3
        with db.engine.begin() as connection:
            assert connection.scalar(sa.text("SHOW transaction_isolation")) == "serializable"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"isolation_level": "SERIALIZABLE"}, {"ISOLATION", "LEVEL", "SERIALIZABLE"}),
        (
            {"execution_options": {"isolation_level": "REPEATABLE READ"}},
            {"ISOLATION", "LEVEL", "REPEATABLE", "READ"},
        ),
        ({"execution_options": {"postgresql_readonly": True}}, {"READ", "ONLY"}),
        ({"execution_options": {"compiled_cache": None}}, set()),
    ],
    ids=["level", "level as execution option", "read-only", "none of these"],
)
def test_options_of_transactions_are_sent_with_begin_alone(
    make_app: MakeApp,
    wire_url: str,
    wire: WireProxy,
    options: dict[str, Any],
    words: set[str],
) -> None:
    db: Any = Database()
    with make_app(db, wire_url, SQLALCHEMY_ENGINE_OPTIONS=options).app_context():
        read(db)
        with wire.record() as recording:
            for _ in range(2):
                read(db)
                with db.session.begin():
                    db.session.execute(sa.text("SELECT 1"))
        assert recording.verbs == ["SELECT", "BEGIN", "SELECT", "COMMIT"] * 2
        assert begins(recording) == [{"BEGIN"} | words] * 2
        assert recording.round_trips == 8


def test_begin_has_the_last_word_over_the_engine(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    db: Any = Database(engine_options={"isolation_level": "SERIALIZABLE"})
    with make_app(db, wire_url).app_context():
        read(db)
        with wire.record() as recording:
            for level in ("READ COMMITTED", None):
                with db.session.begin(isolation_level=level):
                    db.session.execute(sa.text("SELECT 1"))
    assert begins(recording) == [
        {"BEGIN", "ISOLATION", "LEVEL", "READ", "COMMITTED"},
        {"BEGIN", "ISOLATION", "LEVEL", "SERIALIZABLE"},
    ]


@pytest.mark.parametrize("poolclass", [QueuePool, NullPool, StaticPool])
def test_pools_of_every_kind_work(
    make_app: MakeApp, wire_url: str, wire: WireProxy, poolclass: type[Any]
) -> None:
    db: Any = Database(engine_options={"poolclass": poolclass})
    Item = with_item(db)
    with make_app(db, wire_url).app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Item(text="one"))
        db.session.remove()
        with wire.record() as recording:
            assert db.session.scalars(sa.select(Item.text)).all() == ["one"]
            db.session.add_all([Item(text="two"), Item(text="one")])
            with pytest.raises(IntegrityError):
                db.session.commit()
            db.session.remove()
        asked = [verb for verb in sent(recording) if "item" in verb or verb in TRANSACTION]
        assert asked == ["SELECT item", "BEGIN", "INSERT item", "ROLLBACK"]


def test_a_ping_before_use_is_the_one_statement_more(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    db: Any = Database(engine_options={"pool_pre_ping": True})
    with make_app(db, wire_url).app_context():
        read(db)
        with wire.record() as recording:
            read(db)
        assert not TRANSACTION & set(recording.verbs)
        assert recording.round_trips <= 2
        wire.cut_all()
        read(db)  # on a new connection, without an error


def test_the_servers_own_settings_stay(make_app: MakeApp, url: str) -> None:
    options = {"options": "-c default_transaction_isolation=serializable"}
    db: Any = Database(engine_options={"connect_args": options})
    with make_app(db, url).app_context():
        for _ in range(2):
            with db.session.begin():
                assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "serializable"
            with db.session.begin(isolation_level="READ COMMITTED"):
                assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "read committed"
            db.session.remove()


# -- the session's --------------------------------------------------------------------------------


class UsersSession(FlaskSession):
    """Overrides what SQLAlchemy's session has, and knows nothing of ours."""

    def __init__(self, db: Any, **options: Any) -> None:
        self.heard: list[str] = []
        super().__init__(db, **options)

    def greet(self) -> str:
        return "hello"

    def begin(self, nested: bool = False) -> Any:
        self.heard.append("begin")
        return super().begin(nested)

    def commit(self) -> None:
        self.heard.append("commit")
        super().commit()

    def rollback(self) -> None:
        self.heard.append("rollback")
        super().rollback()

    def flush(self, objects: Any = None) -> None:
        self.heard.append("flush")
        super().flush()

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        self.heard.append("execute")
        return super().execute(*args, **kwargs)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        self.heard.append("get")
        return super().get(*args, **kwargs)

    def close(self) -> None:
        self.heard.append("close")
        super().close()

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        self.heard.append("get_bind")
        return super().get_bind(*args, **kwargs)


def test_a_session_class_of_the_users_own_is_combined_with_ours(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    db: Any = Database(session_options={"class_": UsersSession})
    Item = with_item(db)
    with make_app(db, wire_url).app_context():
        db.create_all()
        read(db)
        session: Any = db.session()
        assert isinstance(session, UsersSession)
        assert isinstance(session, OptInSession)
        assert session.greet() == "hello"
        with wire.record() as recording:
            assert session.get(Item, 1) is None
            with db.session.begin():
                db.session.add(Item(text="one"))
        assert sent(recording) == ["SELECT item", "INSERT item"]


class UsersOptInSession(OptInSession):
    pass


@pytest.mark.parametrize("class_", [OptInSession, FlaskSession, Session, UsersOptInSession])
def test_a_session_class_that_is_a_base_of_ours_may_be_given(
    make_app: MakeApp, wire_url: str, class_: type[Any]
) -> None:
    db: Any = Database(session_options={"class_": class_})
    with_item(db)
    with make_app(db, wire_url).app_context():
        db.create_all()
        session = db.session()
        assert isinstance(session, class_)
        assert isinstance(session, OptInSession)
        assert isinstance(session, FlaskSession)
        assert session.scalar(sa.text("SELECT 1")) == 1
        with db.session.begin():
            assert session.scalar(sa.text("SELECT 1")) == 1


CALLS: dict[str, Callable[[Any], object]] = {
    "begin": lambda session: session.begin_nested(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "flush": lambda session: session.flush(),
    "execute": lambda session: session.execute(sa.text("SELECT 1")),
    "get_bind": lambda session: session.execute(sa.text("SELECT 1")),
    "close": lambda session: session.close(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_methods_of_a_session_class_of_the_users_own_are_called(
    make_app: MakeApp, url: str, name: str, inside: bool
) -> None:
    db: Any = Database(session_options={"class_": UsersSession})
    with make_app(db, url).app_context():
        session: Any = db.session()
        if inside:
            db.session.begin()
        session.heard.clear()
        CALLS[name](db.session)
        assert name in session.heard


def test_get_bind_of_a_session_class_of_the_users_own_chooses_the_bind(
    make_app: MakeApp, server: Any, driver: str, url: str, other_database: str
) -> None:
    """Reads from a replica, writes to the primary, as SQLAlchemy's documentation does it."""

    class RoutingSession(FlaskSession):
        def get_bind(
            self, mapper: Any = None, clause: Any = None, bind: Any = None, **kwargs: Any
        ) -> Any:
            if self._flushing or isinstance(clause, (sa.Update, sa.Delete, sa.Insert)):
                return self._db.engines["primary"]
            return super().get_bind(mapper, clause, bind, **kwargs)

    db: Any = Database(session_options={"class_": RoutingSession})
    Item = with_item(db)
    binds = {"primary": server.url(driver, other_database)}
    with make_app(db, url, SQLALCHEMY_BINDS=binds).app_context():
        db.metadata.create_all(db.engine)
        db.metadata.create_all(db.engines["primary"])

        def on_primary() -> list[str]:
            with db.engines["primary"].connect() as connection:
                return sorted(connection.scalars(sa.select(Item.text)))

        with db.session.begin():
            db.session.add(Item(id=1, text="inside"))
        assert on_primary() == ["inside"]
        db.session.add(Item(id=2, text="flush"))
        db.session.flush()
        assert on_primary() == ["flush", "inside"]
        db.session.add(Item(id=3, text="commit"))
        db.session.commit()
        db.session.execute(sa.insert(Item).values(id=4, text="insert"))
        db.session.execute(sa.update(Item).where(Item.id == 1).values(text="updated"))
        assert on_primary() == ["commit", "flush", "insert", "updated"]
        assert db.session.scalars(sa.select(Item)).all() == []


def test_a_subclass_of_our_own_session_is_used_as_it_is(make_app: MakeApp, url: str) -> None:
    class OwnSession(Session):
        def begin(self, nested: bool = False, **options: Any) -> Any:
            given: Any = {"isolation_level": "SERIALIZABLE", **options}
            return super().begin(nested, **given)

    db: Any = Database(session_options={"class_": OwnSession})
    with make_app(db, url).app_context():
        assert isinstance(db.session(), OwnSession)
        with db.session().begin():
            assert db.session.scalar(sa.text("SHOW transaction_isolation")) == "serializable"


def test_a_scope_of_the_users_own_outlives_the_context(make_app: MakeApp, url: str) -> None:
    options = {"scopefunc": threading.get_ident, "info": {"made": "here"}}
    db: Any = Database(session_options=options)
    app = make_app(db, url)
    assert set(options) == {"scopefunc", "info"}
    sessions = []
    with app.app_context():
        first = db.session()
        thread = threading.Thread(target=lambda: sessions.append(db.session()))
        thread.start()
        thread.join()
        assert sessions[0] is not first
        with app.app_context():
            assert db.session() is first
        assert first.info == {"made": "here"}


def test_other_session_options_are_passed_on(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    class OwnQuery(Query):
        pass

    db: Any = Database(
        session_options={
            "autoflush": False,
            "expire_on_commit": False,
            "query_cls": OwnQuery,
        }
    )
    Item = with_item(db)
    with make_app(db, wire_url).app_context():
        db.create_all()
        assert isinstance(db.session.query(Item), OwnQuery)
        with db.session.begin():
            item = Item(text="one")
            db.session.add(item)
            assert db.session.scalars(sa.select(Item)).all() == []
        with wire.record() as recording:
            assert item.text == "one"
        assert recording.messages == []


def test_without_autobegin_reads_need_no_begin(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    db: Any = Database(session_options={"autobegin": False})
    Item = with_item(db)
    with make_app(db, wire_url).app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Item(id=1, text="one"))
        db.session.remove()
        with wire.record() as recording:
            assert db.session.get(Item, 1).text == "one"
        assert recording.verbs == ["SELECT"]


def test_two_phase_commit_is_that_of_all_binds(
    make_app: MakeApp, server: Any, driver: str, url: str, other_database: str, wire: WireProxy
) -> None:
    db: Any = Database(session_options={"twophase": True})

    class First(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    class Second(db.Model):
        __bind_key__ = "second"
        id: Mapped[int] = mapped_column(primary_key=True)
        first: Mapped[int] = mapped_column(unique=True)
        __table_args__ = (
            sa.UniqueConstraint("first", deferrable=True, initially="DEFERRED", name="late"),
        )

    binds = {"second": wire.url(server.url(driver, other_database))}
    with make_app(db, wire.url(url), SQLALCHEMY_BINDS=binds).app_context():
        db.create_all()
        if db.session.scalar(sa.text("SHOW max_prepared_transactions")) == "0":
            pytest.skip("The server allows no prepared transactions.")
        with wire.record() as recording, db.session.begin():
            db.session.add_all([First(id=1), Second(id=1, first=1)])
        prepared = [text for text in recording.statements if text.startswith("PREPARE")]
        assert len(prepared) == 2
        assert recording.verbs.count("COMMIT PREPARED") == 2

        def fail() -> None:
            with db.session.begin():
                db.session.add_all([First(id=2), Second(id=1, first=2)])

        with pytest.raises(IntegrityError):
            fail()
        assert db.session.scalars(sa.select(First.id)).all() == [1]
        assert db.session.scalars(sa.select(Second.id)).all() == [1]
        with db.engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM pg_prepared_xacts")) == 0
        with wire.record() as recording:
            read(db)
        assert recording.verbs == ["SELECT"]


# -- the models' ----------------------------------------------------------------------------------


def plain() -> Any:
    class Base(Model):
        def greet(self) -> str:
            return "hello"

    return Base


def made_before() -> Any:
    return declarative_base(cls=plain(), name="Base", metaclass=DefaultMeta)


def declarative() -> Any:
    class Base(DeclarativeBase):
        def greet(self) -> str:
            return "hello"

    return Base


def without_metaclass() -> Any:
    class Base(DeclarativeBaseNoMeta):
        def greet(self) -> str:
            return "hello"

    return Base


def dataclass() -> Any:
    class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
        def greet(self) -> str:
            return "hello"

    return Base


def dataclass_without_metaclass() -> Any:
    class Base(MappedAsDataclass, DeclarativeBaseNoMeta, kw_only=True):
        def greet(self) -> str:
            return "hello"

    return Base


@pytest.mark.parametrize(
    "make_base",
    [plain, made_before, declarative, without_metaclass, dataclass, dataclass_without_metaclass],
)
def test_models_of_every_base_are_read_and_written(
    make_app: MakeApp, url: str, wire_url: str, wire: WireProxy, make_base: Callable[[], Any]
) -> None:
    db: Any = Database(model_class=make_base())
    is_dataclass = issubclass(db.Model, MappedAsDataclass)
    no_init: dict[str, Any] = {"init": False} if is_dataclass else {}

    class BlogPost(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True, **no_init)
        text: Mapped[str] = mapped_column(unique=True)

    with make_app(db, url).app_context():
        db.create_all()
    with make_app(db, wire_url).app_context():
        read(db)
        with wire.record() as recording:
            with db.session.begin():
                db.session.add(BlogPost(text="one"))
            assert db.session.scalars(db.select(BlogPost)).one().greet() == "hello"
            assert BlogPost.query.filter_by(text="one").one().id == 1
            assert BlogPost.filter_by_or_create(text="one").id == 1
        assert sent(recording) == ["INSERT blog_post", *["SELECT blog_post"] * 3]
        assert recording.round_trips == 4


def test_metadata_of_the_users_own_is_used(make_app: MakeApp, url: str) -> None:
    metadata = sa.MetaData(naming_convention={"uq": "unique_%(table_name)s_%(column_0_name)s"})
    db: Any = Database(metadata=metadata)
    Item = with_item(db)
    with make_app(db, url).app_context():
        db.create_all()
        assert db.metadata is metadata
        assert Item.metadata is metadata
        names = [found["name"] for found in sa.inspect(db.engine).get_unique_constraints("item")]
        assert names == ["unique_item_text"]


def test_names_are_left_alone_where_the_user_wants_that(make_app: MakeApp, url: str) -> None:
    db: Any = Database(disable_autonaming=True)

    class Item(db.Model):
        __tablename__ = "things"
        id: Mapped[int] = mapped_column(primary_key=True)

    with make_app(db, url).app_context():
        db.create_all()
        assert sa.inspect(db.engine).get_table_names() == ["things"]


def test_the_shell_context_may_be_left_alone(url: str) -> None:
    for wanted in (True, False):
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db: Any = Database(app, add_models_to_shell=wanted)
        with app.app_context():
            assert ("db" in app.make_shell_context()) is wanted
            db.engine.dispose()


def test_the_application_has_to_say_which_database() -> None:
    with pytest.raises(RuntimeError, match="SQLALCHEMY_DATABASE_URI"):
        Database(Flask(__name__))


def test_a_pool_with_a_time_limit_still_has_its_limit(make_app: MakeApp, url: str) -> None:
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.01}
    db: Any = Database(engine_options=options)
    with make_app(db, url).app_context(), db.engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        with pytest.raises(PoolTimeout, match="QueuePool limit"):
            db.session.execute(sa.text("SELECT 1"))


def test_a_session_class_for_scripts_serves_an_application(make_app: Any, url: str) -> None:
    class Own(OptInSession):
        def greet(self) -> str:
            return "hello"

    db: Any = Database(session_options={"class_": Own})
    with make_app(db, url).app_context():
        assert db.session().greet() == "hello"
        assert isinstance(db.session(), FlaskSession)
        assert db.session.scalar(sa.text("SELECT 1")) == 1
