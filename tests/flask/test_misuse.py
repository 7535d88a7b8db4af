"""Bad input and misuse: an error that says what to do, nothing sent, nothing lost."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import flask_sqlalchemy_lite
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InvalidRequestError,
    OperationalError,
    UnboundExecutionError,
)
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine
from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import WireProxy

db: Any = Database()


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


@pytest.fixture
def app(make_app: MakeApp, url: str, wire_url: str) -> Iterator[Flask]:
    with make_app(db, url).app_context():
        db.create_all()
        db.session.execute(sa.insert(Item), [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}])
    app = make_app(db, wire_url)
    with app.app_context():
        db.session.scalars(sa.select(Item)).all()
        db.session.expunge_all()
        yield app
    assert not TRANSACTION_CONNECTIONS


@pytest.fixture
def waiting(app: Flask) -> Any:
    """An object that was changed outside, beside another that is pending."""
    item: Any = db.session.get(Item, 1)
    item.text = "changed"
    db.session.add(Item(id=3, text="pending"))
    return item


def still_waits(item: Any) -> None:
    """Nothing of what waited is lost, and it can be stored."""
    assert item.text == "changed"
    assert [pending.text for pending in db.session.new] == ["pending"]
    with db.session.begin():
        pass
    assert sorted(db.session.scalars(sa.select(Item.text))) == ["changed", "pending", "two"]


# -- begin ----------------------------------------------------------------------------------------


def test_begin_inside_points_at_savepoints(app: Flask, wire: WireProxy) -> None:
    with db.session.begin():
        db.session.add(Item(id=3, text="three"))
        with (
            wire.record() as recording,
            pytest.raises(InvalidRequestError, match=r"already begun.*begin_nested\(\)"),
        ):
            db.session.begin()
        assert recording.messages == []
        db.session.add(Item(id=4, text="four"))
    assert sorted(db.session.scalars(sa.select(Item.id))) == [1, 2, 3, 4]


def test_begin_twice_in_one_block_undoes_the_block(app: Flask, wire: WireProxy) -> None:
    def twice() -> None:
        with db.session.begin():
            db.session.add(Item(id=3, text="three"))
            db.session.flush()
            with db.session.begin():
                raise AssertionError("never comes here")

    with wire.record() as recording, pytest.raises(InvalidRequestError, match="already begun"):
        twice()
    assert recording.verbs == ["BEGIN", "INSERT", "ROLLBACK"]
    assert sorted(db.session.scalars(sa.select(Item.id))) == [1, 2]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown level": (
        {"isolation_level": "NO SUCH LEVEL"},
        "'NO SUCH LEVEL'.*REPEATABLE READ.*SERIALIZABLE",
    ),
    "autocommit": ({"isolation_level": "AUTOCOMMIT"}, "use one of"),
    "not a level": ({"isolation_level": 4}, "use one of"),
    "injection": ({"isolation_level": "SERIALIZABLE; DROP TABLE item"}, "use one of"),
    "deferrable alone": ({"deferrable": True}, "isolation_level=.SERIALIZABLE.*read_only=True"),
    "deferrable, not read-only": (
        {"deferrable": True, "isolation_level": "SERIALIZABLE"},
        "read_only=True",
    ),
    "deferrable, not serializable": (
        {"deferrable": True, "read_only": True, "isolation_level": "REPEATABLE READ"},
        "isolation_level=.SERIALIZABLE",
    ),
    "read_only is text": ({"read_only": "yes"}, "read_only is True, False or None"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_of_begin_that_the_database_does_not_know_is_refused(
    app: Flask, waiting: Any, wire: WireProxy, case: str
) -> None:
    options, says = BAD_OPTIONS[case]
    with wire.record() as recording, pytest.raises(ArgumentError, match=says):
        db.session.begin(**options)
    assert recording.messages == []
    assert not db.session().in_transaction()
    still_waits(waiting)


def test_options_on_a_savepoint_are_refused(app: Flask, wire: WireProxy) -> None:
    with db.session.begin():
        with wire.record() as recording, pytest.raises(InvalidRequestError, match="savepoint"):
            db.session.begin(nested=True, isolation_level="SERIALIZABLE")
        assert recording.messages == []


def test_options_for_a_connection_outside_are_refused(
    app: Flask, waiting: Any, wire: WireProxy
) -> None:
    with (
        wire.record() as recording,
        pytest.raises(InvalidRequestError, match=r"session\.begin\("),
    ):
        db.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
    assert recording.messages == []
    still_waits(waiting)


# -- locks ----------------------------------------------------------------------------------------

LOCKS: dict[str, Callable[[], object]] = {
    "select": lambda: db.session.scalars(sa.select(Item).with_for_update()).all(),
    "select of shares": lambda: db.session.scalars(sa.select(Item).with_for_update(read=True)),
    "get": lambda: db.session.get(Item, 2, with_for_update=True),
    "get of a known object": lambda: db.session.get(Item, 1, with_for_update=True),
    "query": lambda: Item.query.with_for_update().all(),
    "get_or_404": lambda: db.get_or_404(Item, 1, with_for_update=True),
    "refresh": lambda: db.session.refresh(db.session.get(Item, 1), with_for_update=True),
    "a connection": lambda: db.session.connection().execute(
        sa.select(Item.__table__).with_for_update()
    ),
}


@pytest.mark.parametrize("case", LOCKS)
def test_a_lock_outside_is_refused(app: Flask, waiting: Any, wire: WireProxy, case: str) -> None:
    with (
        wire.record() as recording,
        pytest.raises(InvalidRequestError, match=r"with_for_update.*begin\(\)"),
    ):
        LOCKS[case]()
    assert recording.messages == []
    still_waits(waiting)


@pytest.mark.parametrize("case", LOCKS)
def test_a_lock_inside_works(app: Flask, wire: WireProxy, case: str) -> None:
    with db.session.begin():
        db.session.get(Item, 1)
        with wire.record() as recording:
            LOCKS[case]()
        assert len([text for text in recording.statements if " FOR " in text]) == 1


# -- read-only transactions -----------------------------------------------------------------------

WRITES: dict[str, Callable[[], object]] = {
    "flush": lambda: (db.session.add(Item(id=3, text="three")), db.session.flush()),
    "commit": lambda: db.session.add(Item(id=3, text="three")),
    "core": lambda: db.session.execute(sa.insert(Item).values(id=3, text="three")),
    "bulk": lambda: db.session.execute(sa.insert(Item), [{"id": 3, "text": "three"}] * 2),
    "text": lambda: db.session.execute(sa.text("DELETE FROM item")),
    "filter_by_or_create": lambda: Item.filter_by_or_create(id=3, text="three"),
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("read_first", [False, True])
def test_a_write_in_a_read_only_transaction_is_refused(
    app: Flask, wire: WireProxy, case: str, read_first: bool
) -> None:
    def write() -> None:
        with db.session.begin(read_only=True):
            if read_first:
                db.session.scalars(sa.select(Item)).all()
            WRITES[case]()

    with wire.record() as recording, pytest.raises((InvalidRequestError, DBAPIError)) as caught:
        write()
    assert "read-only" in str(caught.value)
    assert "COMMIT" not in recording.verbs
    if case not in ("text", "filter_by_or_create"):
        assert not {"INSERT", "DELETE"} & set(recording.verbs)
        assert "read_only" in str(caught.value)  # what to leave out
    assert db.session.scalars(sa.select(Item.id).order_by("id")).all() == [1, 2]
    with db.session.begin():
        db.session.add(Item(id=3, text="three"))
    assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 3


def test_a_read_only_transaction_reads_in_its_one_snapshot(app: Flask, wire: WireProxy) -> None:
    with (
        wire.record() as recording,
        db.session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True),
    ):
        assert len(db.session.scalars(sa.select(Item)).all()) == 2
    assert sent(recording) == ["BEGIN", "SELECT item", "COMMIT"]
    words = {"BEGIN", "ISOLATION", "LEVEL", "SERIALIZABLE", "READ", "ONLY", "DEFERRABLE"}
    assert set(recording.statements[0].split()) == words


# -- the engine's options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"isolation_level": "NO SUCH LEVEL"}, "'NO SUCH LEVEL'.*SERIALIZABLE"),
        ({"isolation_level": "AUTOCOMMIT"}, "[Aa]utocommit"),
        ({"execution_options": {"isolation_level": "AUTOCOMMIT"}}, "[Aa]utocommit"),
        ({"execution_options": {"isolation_level": "NO SUCH LEVEL"}}, "'NO SUCH LEVEL'"),
        ({"execution_options": {"postgresql_deferrable": True}}, "deferrable"),
        ({"execution_options": {"postgresql_readonly": "yes"}}, "read_only"),
        ({"server_side_cursors": True}, "stream_results"),
    ],
)
@pytest.mark.parametrize("place", ["application", "extension", "bind"])
def test_an_engine_option_that_contradicts_is_refused(
    wire: WireProxy, wire_url: str, options: dict[str, Any], says: str, place: str
) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = wire_url
    db: Any = Database(engine_options=options if place == "extension" else None)
    if place == "application":
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options
    if place == "bind":
        app.config["SQLALCHEMY_BINDS"] = {"other": {"url": wire_url, **options}}
    with wire.record() as recording, pytest.raises(ArgumentError, match=says):
        db.init_app(app)
    assert recording.messages == []


def test_engine_options_are_fine_where_the_backend_is_not_opted_in(make_app: MakeApp) -> None:
    db: Any = Database(engine_options={"isolation_level": "AUTOCOMMIT"})
    with make_app(db, "sqlite://").app_context():
        assert not isinstance(db.engine, OptInEngine)
        assert db.session.scalar(sa.text("SELECT 1")) == 1


# -- application contexts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda: db.session.begin(),
        lambda: db.session.get(Item, 1),
        lambda: db.session.commit(),
        lambda: db.session.give_back(),
        lambda: db.session(),
        lambda: Item.query,
        lambda: Item.filter_by_or_create(id=1),
        lambda: db.engine,
        lambda: db.create_all(),
    ],
)
def test_outside_an_application_context_flasks_own_error_stays(use: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="Working outside of application context") as caught:
        use()
    assert type(caught.value) is RuntimeError


# -- the class of the extension -------------------------------------------------------------------


def named(name: str, *bases: type[Any]) -> type[Any]:
    # Made at run time: type checkers notice the wrong order, too.
    return type(name, bases, {})


OptIn, Creates = OptInTransactionMixin, FilterByOrCreateMixin
BehindBoth = named("BehindBoth", SQLAlchemy, OptIn, Creates)
BehindOne = named("BehindOne", Creates, SQLAlchemy, OptIn)
Between = named("Between", OptIn, SQLAlchemy, Creates)
Inherited = named("Inherited", BehindOne)


@pytest.mark.parametrize("class_", [BehindBoth, BehindOne, Between, Inherited])
@pytest.mark.parametrize("arguments", [{}, {"metadata": sa.MetaData()}])
def test_a_mixin_behind_the_extension_is_noticed(
    class_: type[Any], arguments: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=rf"{class_.__name__}.*before.*Mixin, .*SQLAlchemy\)"):
        class_(**arguments)


@pytest.mark.parametrize("mixin", [OptInTransactionMixin, FilterByOrCreateMixin])
def test_a_mixin_without_the_extension_is_noticed(mixin: type[Any]) -> None:
    with pytest.raises(TypeError, match=f"{mixin.__name__} is a mixin, and no extension: derive"):
        mixin()

    class Other:
        pass

    made = type("Database", (mixin, Other), {})
    says = rf"write class Database\({mixin.__name__}, Other, SQLAlchemy\)"
    with pytest.raises(TypeError, match=says):
        made()
    lite = type("Database", (mixin, flask_sqlalchemy_lite.SQLAlchemy), {})
    with pytest.raises(TypeError, match="without SQLAlchemy among its bases: import it"):
        lite()


def test_each_mixin_works_alone(make_app: MakeApp, url: str) -> None:
    class OptInAlone(OptInTransactionMixin, SQLAlchemy):
        pass

    class CreatesAlone(FilterByOrCreateMixin, SQLAlchemy):
        pass

    with make_app(OptInAlone(), url).app_context() as context:
        extension = context.app.extensions["sqlalchemy"]
        assert isinstance(extension.engine, OptInEngine)
        assert not hasattr(extension.Model, "filter_by_or_create")
    with make_app(CreatesAlone(), url).app_context() as context:
        extension = context.app.extensions["sqlalchemy"]
        assert not isinstance(extension.engine, OptInEngine)
        assert hasattr(extension.Model, "filter_by_or_create")


# -- AUTOCOMMIT_DRIVERS ---------------------------------------------------------------------------


class DialectWithoutAutocommit(SQLiteDialect_pysqlite):
    """sqlite, as a backend that has transactions alone."""

    name = "transactional"
    supports_statement_cache = True

    def get_isolation_level_values(self, dbapi_connection: Any) -> Any:
        return ["SERIALIZABLE"]


class DialectWithoutLevels(SQLiteDialect_pysqlite):
    """sqlite, as a backend whose dialect knows no isolation levels at all."""

    name = "levelless"
    supports_statement_cache = True

    def get_isolation_level_values(self, dbapi_connection: Any) -> Any:
        raise NotImplementedError


registry.register("transactional", __name__, "DialectWithoutAutocommit")
registry.register("levelless", __name__, "DialectWithoutLevels")


@pytest.mark.parametrize("backend", ["transactional", "levelless"])
def test_a_backend_without_autocommit_cannot_be_opted_in(make_app: MakeApp, backend: str) -> None:
    class Everything(Database):
        AUTOCOMMIT_DRIVERS = ["postgresql", backend]  # noqa: RUF012

    with pytest.raises(ArgumentError, match=rf"{backend}.*AUTOCOMMIT_DRIVERS"):
        make_app(Everything(), f"{backend}://")
    with make_app(Database(), f"{backend}://").app_context() as context:
        extension = context.app.extensions["sqlalchemy"]
        assert extension.session.scalar(sa.text("SELECT 1")) == 1


def test_a_backend_may_be_opted_out(make_app: MakeApp, wire_url: str, wire: WireProxy) -> None:
    class Nothing(Database):
        AUTOCOMMIT_DRIVERS = []  # noqa: RUF012

    db: Any = Nothing()
    with make_app(db, wire_url).app_context():
        db.session.execute(sa.text("SELECT 1"))
        db.session.remove()
        with wire.record() as recording:
            db.session.execute(sa.text("SELECT 1"))
            db.session.remove()
    assert recording.verbs == ["BEGIN", "SELECT", "ROLLBACK"]


# -- no server, no bind ---------------------------------------------------------------------------


def test_a_server_that_is_down_at_the_start_is_used_once_it_is_up(
    make_app: MakeApp, url: str, driver: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    # Nobody listens there now.
    target = sa.make_url(url)
    db: Any = Database()
    app = make_app(db, target.set(host="127.0.0.1", port=port))
    with app.app_context():
        for use in (
            lambda: db.session.execute(sa.text("SELECT 1")),
            db.create_all,
            lambda: db.session.scalar(sa.text("SELECT 1")),
        ):
            with pytest.raises(OperationalError, match=r"[Cc]onnection"):
                use()
            assert not db.session().in_transaction()

        def transaction() -> None:
            with db.session.begin():
                db.session.execute(sa.text("SELECT 1"))

        with pytest.raises(OperationalError, match=r"[Cc]onnection"):
            transaction()
        assert not TRANSACTION_CONNECTIONS
        assert db.engine.pool.checkedout() == 0

        with WireProxy(target.host or "127.0.0.1", target.port or 5432) as proxy:
            # The server is up now: the same engine, sent to where it listens.
            event.listen(
                db.engine,
                "do_connect",
                lambda dialect, record, args, options: options.update(
                    host=proxy.host, port=proxy.port
                ),
            )
            with proxy.record() as recording:
                assert db.session.scalar(sa.text("SELECT 1")) == 1
                transaction()
            assert recording.verbs[-3:] == ["BEGIN", "SELECT", "COMMIT"]
            db.session.remove()
            with proxy.record() as recording:
                assert db.session.scalar(sa.text("SELECT 1")) == 1
            assert recording.verbs == ["SELECT"]
            db.session.remove()
            db.engine.dispose()


def test_a_session_without_a_bind_raises_sqlalchemys_error_and_goes_on(
    make_app: MakeApp, url: str
) -> None:
    db: Any = Database()

    class Lost(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)

    with make_app(db, None, SQLALCHEMY_BINDS={"other": url}).app_context():
        with pytest.raises(UnboundExecutionError):
            db.session.scalars(sa.select(Lost)).all()
        db.session.add(Lost(id=1))
        with pytest.raises(UnboundExecutionError):
            db.session.commit()
        assert not db.session().in_transaction()
        db.session.rollback()
        with db.session.begin(isolation_level="SERIALIZABLE"):
            engine = db.engines["other"]
            bind = {"bind": engine}
            level = db.session.scalar(sa.text("SHOW transaction_isolation"), bind_arguments=bind)
            assert level == "serializable"
