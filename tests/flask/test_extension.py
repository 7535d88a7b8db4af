"""The API of Flask-SQLAlchemy on the opt-in session: what it returns and what it sends."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, Response, abort, stream_with_context
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.query import Query
from flask_sqlalchemy.record_queries import get_recorded_queries
from sqlalchemy.exc import IntegrityError, NoResultFound, ProgrammingError
from sqlalchemy.orm import Mapped, mapped_column, relationship
from werkzeug.exceptions import NotFound

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine, OptInSession
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.postgres import PostgresServer
from tests.wire import WireProxy


class CountingQuery(Query):
    """A query class of the user's."""

    def sorted_names(self) -> list[str]:
        return sorted(user.name for user in self)


db: Any = Database(query_class=CountingQuery)

membership = db.Table(
    "membership",
    sa.Column("user_id", sa.ForeignKey("user.id"), primary_key=True),
    sa.Column("club_id", sa.ForeignKey("club.id"), primary_key=True),
)


class Club(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class User(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    clubs: Mapped[list[Club]] = relationship(secondary=membership)
    letters = db.relationship("Letter", lazy="dynamic", back_populates="user")


class Letter(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id))
    text: Mapped[str]
    user: Mapped[User] = relationship(back_populates="letters")


def fill(app: Flask, *names: str) -> None:
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add_all(User(id=number, name=name) for number, name in enumerate(names, 1))


@pytest.fixture
def app(make_app: MakeApp, url: str, wire_url: str) -> Flask:
    # Filled by another application: psycopg prepares what a connection executes often.
    fill(make_app(db, url), "Ada", "Grace", "Jean")
    app = make_app(db, wire_url)
    with app.app_context():
        db.session.execute(sa.text("SELECT 1"))
    return app


@pytest.fixture
def context(app: Flask) -> Iterator[None]:
    with app.app_context():
        yield


READS: dict[str, Callable[[], object]] = {
    "Model.query.all": lambda: User.query.all()[0].name,
    "Model.query.filter_by.first": lambda: User.query.filter_by(name="Ada").first().name,
    "Model.query.filter.one": lambda: User.query.filter(User.id == 1).one().name,
    "Model.query.get_or_404": lambda: User.query.get_or_404(1).name,
    "Model.query.first_or_404": lambda: User.query.order_by(User.id).first_or_404().name,
    "Model.query.one_or_404": lambda: User.query.filter_by(id=1).one_or_404().name,
    "the user's query class": lambda: User.query.sorted_names()[0],
    "session.query": lambda: db.session.query(User.name).order_by(User.id).first()[0],
    "session.get": lambda: db.session.get(User, 1).name,
    "session.get_one": lambda: db.session.get_one(User, 1).name,
    "session.execute": lambda: db.session.execute(db.select(User.name).filter_by(id=1)).scalar(),
    "session.scalar": lambda: db.session.scalar(db.select(User.name).filter_by(id=1)),
    "session.scalars": lambda: db.session.scalars(db.select(User).order_by(User.id)).first().name,
    "session.merge": lambda: db.session.merge(User(id=1), load=True).name or "Ada",
    "db.get_or_404": lambda: db.get_or_404(User, 1).name,
    "db.first_or_404": lambda: db.first_or_404(db.select(User).order_by(User.id)).name,
    "db.one_or_404": lambda: db.one_or_404(db.select(User).filter_by(name="Ada")).name,
    "db.paginate": lambda: db.paginate(db.select(User).filter_by(id=1), count=False).items[0].name,
    "query.paginate": lambda: User.query.order_by(User.id).paginate(count=False).items[0].name,
    "text": lambda: db.session.scalar(db.text('SELECT name FROM "user" WHERE id = 1')),
    "a table": lambda: db.session.execute(db.select(User.__table__).filter_by(id=1)).one().name,
}


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.LegacyAPIWarning")
@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_read_sends_one_select(read: Callable[[], object], wire: WireProxy) -> None:
    with wire.record() as recording:
        assert read() == "Ada"

    assert sent(recording) == ["SELECT user"]
    assert recording.round_trips == 1
    assert not db.session().in_transaction()


@pytest.mark.usefixtures("context")
def test_pagination_sends_its_two_selects(wire: WireProxy) -> None:
    with wire.record() as recording:
        page = db.paginate(db.select(User).order_by(User.id), page=2, per_page=2)
        assert (page.total, page.pages, [user.name for user in page]) == (3, 2, ["Jean"])
    assert sent(recording) == ["SELECT user", "SELECT user"]
    assert recording.round_trips == 2

    with wire.record() as recording:
        previous = page.prev()
        assert [user.name for user in previous] == ["Ada", "Grace"]
    assert recording.verbs == ["SELECT"]  # the count is known


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.LegacyAPIWarning")
@pytest.mark.usefixtures("context")
@pytest.mark.parametrize(
    "find",
    [
        lambda: db.get_or_404(User, 9),
        lambda: db.first_or_404(db.select(User).filter_by(id=9)),
        lambda: db.one_or_404(db.select(User).filter_by(id=9)),
        lambda: db.one_or_404(db.select(User)),
        lambda: db.paginate(db.select(User), page=9),
        lambda: User.query.get_or_404(9),
        lambda: User.query.filter_by(id=9).first_or_404(),
        lambda: User.query.one_or_404(),
        lambda: User.query.paginate(page=9),
    ],
)
def test_what_is_not_found_aborts_and_the_session_goes_on(
    find: Callable[[], object], wire: WireProxy
) -> None:
    with wire.record() as recording:
        with pytest.raises(NotFound):
            find()
        assert db.session.get(User, 1).name == "Ada"

    assert set(recording.verbs) == {"SELECT"}
    with pytest.raises(NoResultFound):
        User.query.filter_by(id=9).one()


@pytest.mark.usefixtures("context")
def test_abort_inside_a_transaction_rolls_it_back(wire: WireProxy) -> None:
    def add_and_abort() -> None:
        with db.session.begin():
            db.session.add(User(id=4, name="Joan"))
            db.get_or_404(User, 9)

    with wire.record() as recording, pytest.raises(NotFound):
        add_and_abort()

    assert sent(recording) == ["BEGIN", "INSERT user", "SELECT user", "ROLLBACK"]
    assert User.query.count() == 3


@pytest.mark.usefixtures("context")
def test_relationships_are_loaded_outside_and_written_inside(wire: WireProxy) -> None:
    with db.session.begin():
        ada = db.session.get(User, 1)
        ada.clubs.append(Club(name="Engines"))
        db.session.add(Letter(user=ada, text="Dear Charles"))

    with wire.record() as recording:
        assert [club.name for club in ada.clubs] == ["Engines"]
        assert isinstance(ada.letters, CountingQuery)
        assert ada.letters.filter_by(text="Dear Charles").count() == 1

    assert set(recording.verbs) == {"SELECT"}
    assert db.session.execute(db.select(membership)).all() == [(1, 1)]


@pytest.mark.usefixtures("context")
def test_commit_in_the_old_manner_is_one_transaction(wire: WireProxy) -> None:
    with wire.record() as recording:
        db.session.add(User(id=4, name="Joan"))
        db.session.add(Club(name="Codes"))
        db.session.commit()
    assert recording.verbs == ["BEGIN", "INSERT", "INSERT", "COMMIT"]

    with wire.record() as recording:
        db.session.add(User(id=5, name="Ada"))
        db.session.get(User, 4).name = "Jane"
        with pytest.raises(IntegrityError):
            db.session.commit()
        assert User.query.count() == 4
    assert recording.verbs == ["SELECT", "BEGIN", "UPDATE", "INSERT", "ROLLBACK", "SELECT"]


# -- tables ---------------------------------------------------------------------------------------


def test_tables_are_created_and_dropped_in_one_transaction(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    ignored = {"SELECT", "DEALLOCATE"}  # psycopg deallocates what it has prepared after a DROP
    app = make_app(db, wire_url)
    with app.app_context():
        db.session.execute(sa.text("SELECT 1"))
        with wire.record() as recording:
            db.create_all()
        verbs = [verb for verb in recording.verbs if verb not in ignored]
        assert verbs == ["BEGIN", "CREATE", "CREATE", "CREATE", "CREATE", "COMMIT"]
        assert set(sa.inspect(db.engine).get_table_names()) == set(db.metadata.tables)

        with wire.record() as recording:
            db.drop_all()
        verbs = [verb for verb in recording.verbs if verb not in ignored]
        assert verbs == ["BEGIN", "DROP", "DROP", "DROP", "DROP", "COMMIT"]
        assert sa.inspect(db.engine).get_table_names() == []


def test_tables_that_cannot_all_be_created_are_none(make_app: MakeApp, url: str) -> None:
    db: Any = Database()
    db.Table("first", sa.Column("id", sa.Integer, primary_key=True))
    db.Table("second", sa.Column("id", sa.Integer, sa.CheckConstraint("no_such_function(id)")))
    app = make_app(db, url)
    with app.app_context():
        with pytest.raises(ProgrammingError, match="no_such_function"):
            db.create_all()
        assert sa.inspect(db.engine).get_table_names() == []


def test_tables_are_reflected(app: Flask, make_app: MakeApp, url: str) -> None:
    other = Database()
    with make_app(other, url).app_context():
        other.reflect()
        assert set(other.metadata.tables) == set(db.metadata.tables)
        users = other.metadata.tables["user"]
        assert other.session.execute(other.select(users.c.name).order_by("id")).first() == ("Ada",)


# -- applications and their contexts --------------------------------------------------------------


def test_the_extension_may_be_made_with_the_application(url: str, wire: WireProxy) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = wire.url(url)
    db: Any = Database(app)
    with app.app_context():
        assert isinstance(db.engine, OptInEngine)
        assert isinstance(db.session(), OptInSession)
        assert repr(db).startswith("<Database postgresql+")
        assert db.session.scalar(sa.text("SELECT 1")) == 1
    with app.app_context():
        db.engine.dispose()
    assert repr(db) == "<Database>"


def test_registering_twice_is_still_refused(app: Flask) -> None:
    with pytest.raises(RuntimeError, match="already been registered"):
        db.init_app(app)


def test_an_application_that_is_not_registered_is_still_refused() -> None:
    with Flask(__name__).app_context(), pytest.raises(RuntimeError, match="init_app"):
        db.session.get(User, 1)


def test_applications_share_the_extension_and_keep_their_databases(
    app: Flask, make_app: MakeApp, server: PostgresServer, driver: str, other_database: str
) -> None:
    other = make_app(db, server.url(driver, other_database))
    fill(other, "Edsger")

    with app.app_context():
        assert User.query.sorted_names() == ["Ada", "Grace", "Jean"]
        with other.app_context():
            assert User.query.sorted_names() == ["Edsger"]
            with db.session.begin():
                User.query.delete()
        with db.session.begin():
            db.session.add(User(id=4, name="Joan"))
            with other.app_context():
                assert User.query.count() == 0
        assert User.query.count() == 4


def test_nested_contexts_have_sessions_of_their_own(app: Flask, wire: WireProxy) -> None:
    with app.app_context(), app.app_context():  # two connections for the pool
        db.session.execute(sa.text("SELECT 1"))
    with app.app_context():
        with db.session.begin(), wire.record() as recording:
            outer = db.session()
            db.session.add(User(id=4, name="Joan"))
            db.session.flush()
            with app.app_context():
                assert db.session() is not outer
                assert not db.session().in_transaction()
                assert User.query.count() == 3  # the outer one has not committed
            assert db.session() is outer
            assert User.query.count() == 4
        assert recording.verbs == ["BEGIN", "INSERT", "SELECT", "SELECT"]
        assert User.query.count() == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_the_context_gives_everything_back(
    app: Flask, wire: WireProxy, fails: bool
) -> None:
    ended = []

    @app.get("/")
    def view() -> ResponseReturnValue:
        db.session.add(User(id=4, name="Joan"))
        db.session().begin()  # and never ended
        db.session.execute(sa.update(User).values(name=User.name + "!"))
        ended.append(db.session())
        assert len(TRANSACTION_CONNECTIONS) == 1
        if fails:
            raise ValueError("a fault of the view")
        return "fine"

    with wire.record() as recording:
        assert app.test_client().get("/").status_code == (500 if fails else 200)
    assert recording.verbs == ["BEGIN", "INSERT", "UPDATE", "ROLLBACK"]
    assert not TRANSACTION_CONNECTIONS
    assert not ended[0].in_transaction()
    with app.app_context():
        assert not db.session.registry.has()
        assert db.engine.pool.checkedout() == 0
        assert User.query.sorted_names() == ["Ada", "Grace", "Jean"]


def test_after_an_abort_the_connection_is_back_in_the_pool(app: Flask) -> None:
    @app.get("/<int:number>")
    def view(number: int) -> ResponseReturnValue:
        if db.session.get(User, number) is None:
            abort(404)
        return "found"

    client = app.test_client()
    assert client.get("/1").status_code == 200
    assert client.get("/9").status_code == 404
    with app.app_context():
        assert db.engine.pool.checkedout() == 0


def test_a_response_streams_rows_without_a_transaction(app: Flask, wire: WireProxy) -> None:
    open_while_streaming = []

    @app.get("/names")
    def names() -> Response:
        def lines() -> Iterator[str]:
            for user in db.session.scalars(
                db.select(User).order_by(User.id).execution_options(yield_per=1)
            ):
                wire.quiesce()
                open_while_streaming.append(wire.transactions_open)
                yield f"{user.name}\n"

        return Response(stream_with_context(lines()), mimetype="text/plain")

    assert app.test_client().get("/names").text == "Ada\nGrace\nJean\n"
    assert open_while_streaming == [0, 0, 0]
    with app.app_context():
        assert db.engine.pool.checkedout() == 0


def test_a_command_of_the_application_uses_the_session(app: Flask) -> None:
    @app.cli.command("add-user")
    def add_user() -> None:
        with db.session.begin():
            db.session.add(User(id=4, name="Joan"))

    result = app.test_cli_runner().invoke(args=["add-user"])
    assert result.exit_code == 0, result.output
    with app.app_context():
        assert User.query.count() == 4


# -- what Flask-SQLAlchemy records ----------------------------------------------------------------


def test_queries_are_recorded(make_app: MakeApp, url: str) -> None:
    app = make_app(db, url, SQLALCHEMY_RECORD_QUERIES=True)
    fill(app, "Ada")
    with app.app_context():
        with db.session.begin():
            db.session.get(User, 1).name = "Augusta"
        recorded = [query.statement.split()[0] for query in get_recorded_queries()]  # type: ignore[union-attr]
        assert recorded == ["SELECT", "UPDATE"]
        assert all(query.duration >= 0 for query in get_recorded_queries())


def test_the_log_says_what_was_sent(
    make_app: MakeApp, url: str, wire_url: str, wire: WireProxy, caplog: pytest.LogCaptureFixture
) -> None:
    def read_and_fail() -> None:
        with db.session.begin():
            db.session.get(User, 1)
            raise ValueError("undone")

    # SQLALCHEMY_ECHO adds a handler to the logger, once, which would write to the console.
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    logger.addHandler(logging.NullHandler())
    fill(make_app(db, url), "Ada")
    app = make_app(db, wire_url, SQLALCHEMY_ECHO=True)
    with app.app_context():
        db.session.execute(sa.text("SELECT 1"))
    caplog.clear()
    with app.app_context(), wire.record() as recording:
        ada = User.query.one()
        with db.session.begin():
            ada.name = "Augusta"
            db.session.flush()
        db.session.add(User(id=2, name="Grace"))
        db.session.commit()
        with db.session.begin():
            pass
        with pytest.raises(ValueError, match="undone"):
            read_and_fail()
        with pytest.raises(ProgrammingError):
            db.session.execute(sa.text("SELECT nothing"))
        db.session.rollback()

    said = [
        record.getMessage().split()[0]
        for record in caplog.records
        if record.name == "sqlalchemy.engine.Engine" and not record.getMessage().startswith("[")
    ]
    assert said == recording.verbs
    assert said == [
        *("SELECT", "BEGIN", "UPDATE", "COMMIT", "INSERT"),
        *("BEGIN", "SELECT", "ROLLBACK", "SELECT"),
    ]
    assert "autocommit" not in caplog.text.lower()


def test_the_same_application_on_the_stock_extension_sends_more(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    # What the other tests compare with: the harness sees the transaction of a plain read.
    stock = SQLAlchemy()
    with make_app(stock, wire_url).app_context():
        stock.session.execute(sa.text("SELECT 1"))
        stock.session.remove()
        with wire.record() as recording:
            stock.session.execute(sa.text("SELECT 1"))
            stock.session.remove()
    assert recording.verbs == ["BEGIN", "SELECT", "ROLLBACK"]


def test_a_session_whose_context_ended_badly_never_comes_back(make_app: MakeApp, url: str) -> None:
    """Flask runs teardown functions in reverse, and stops at the first that fails."""
    db = Database()

    class Tag(db.Model):
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    app = make_app(db, url)
    with app.app_context():
        db.create_all()
    fails = [True]

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        if fails[0]:
            raise ZeroDivisionError

    for _ in range(5):
        with pytest.raises(ZeroDivisionError), app.app_context():  # noqa: PT012
            db.session.begin()
            db.session.add(Tag(name="gone"))
            db.session.flush()
    fails[0] = False
    gc.collect()
    for _ in range(5):
        with app.app_context():
            assert not db.session().in_transaction()
            db.session.add(Tag(name="kept"))
            db.session.commit()
    with app.app_context():
        assert set(db.session.scalars(sa.select(Tag.name))) == {"kept"}
    assert len(db.session.registry.registry) == 0
    assert len(TRANSACTION_CONNECTIONS) == 0
