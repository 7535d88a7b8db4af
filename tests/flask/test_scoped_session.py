"""A session per application context, over models and engines that are plain SQLAlchemy."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from flask import Flask, copy_current_request_context, stream_with_context
from sqlalchemy.exc import InvalidRequestError, LegacyAPIWarning
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.flask import current_session, flask_scoped_session
from tests.library import Author, Onlooker, assert_at_rest, checked_out, opened, sent
from tests.wire import WireProxy

if TYPE_CHECKING:
    from typing_extensions import assert_type


@pytest.fixture
def engine(library: None, url: str) -> Iterator[OptInEngine]:
    with opened(url) as engine:
        yield engine


@pytest.fixture
def sessions(engine: OptInEngine) -> sessionmaker[OptInSession]:
    return sessionmaker(engine, class_=OptInSession)


@pytest.fixture
def web() -> Flask:
    return Flask(__name__)


@pytest.fixture
def session(web: Flask, sessions: sessionmaker[OptInSession]) -> flask_scoped_session[OptInSession]:
    return flask_scoped_session(sessions, web)


# -- As flask-sqlalchemy-session ------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("class_", [Session, OptInSession])
def test_code_for_the_old_package_works(
    engine: OptInEngine, web: Flask, late: bool, class_: type[Session]
) -> None:
    session_factory = sessionmaker(bind=engine, class_=class_)
    if late:
        session: flask_scoped_session[Session] = flask_scoped_session(session_factory)
        session.init_app(web)
    else:
        session = flask_scoped_session(session_factory, web)

    @web.get("/<name>")
    def view(name: str) -> str:
        by_session = session.query(Author).filter_by(name=name).one()
        by_proxy = current_session.query(Author).filter_by(name=name).first()
        by_app: Any = web.scoped_session.query(Author).get(by_session.id)  # type: ignore[attr-defined]
        assert by_session is by_proxy is by_app
        return str(by_session.id)

    @web.post("/<name>")
    def add(name: str) -> str:
        current_session.add(Author(name=name))
        current_session.commit()
        return name

    client = web.test_client()
    with pytest.warns(LegacyAPIWarning):
        assert client.get("/Ada").text == "1"
    assert client.post("/new").text == "new"
    with pytest.warns(LegacyAPIWarning):
        assert client.get("/new").text == "4"
    assert web.scoped_session is session  # type: ignore[attr-defined]
    assert checked_out(engine) == 0


def test_flask_scoped_session_has_what_a_scoped_session_has(
    web: Flask, sessions: sessionmaker[OptInSession], session: flask_scoped_session[OptInSession]
) -> None:
    with web.app_context():
        first = session()
        assert session.session_factory is sessions
        assert session.registry() is first is current_session()
        assert session.registry.has()
        session.remove()
        assert not session.registry.has()
        assert session() is not first
        session.remove()
        assert session(autoflush=False).autoflush is False
        with pytest.raises(InvalidRequestError, match="already present"):
            session(autoflush=True)


def test_a_model_may_have_a_query_property(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    class Base(DeclarativeBase):
        query = session.query_property()

    class Writer(Base):
        __table__ = sa.Table("author", Base.metadata, autoload_with=engine)

    with web.app_context():
        assert Writer.query.count() == 3


# -- On the wire ----------------------------------------------------------------------------------


def test_reads_are_untransacted_and_writes_atomic(
    web: Flask, wire: WireProxy, url: str, wire_url: str, onlooker: Onlooker
) -> None:
    with opened(url):
        engine = create_engine(wire_url)
        session = flask_scoped_session(sessionmaker(engine, class_=OptInSession), web)
        engine.connect().close()

        @web.post("/")
        def view() -> str:
            author = session.get(Author, 1)
            assert author
            with session.begin():
                author.age = 31
                current_session.add(Author(name="new"))
            with current_session.begin(isolation_level="REPEATABLE READ", read_only=True):
                count = session.scalar(sa.select(sa.func.count(Author.id)))
            current_session.give_back()
            return f"{count}"

        with wire.record() as recording:
            assert web.test_client().post("/").text == "4"
        assert sent(recording) == [
            "SELECT",
            *("BEGIN", "UPDATE", "INSERT", "COMMIT"),
            *("BEGIN", "SELECT", "COMMIT"),
        ]
        assert recording.statements[5] == "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
        assert onlooker.names() == ["new"]
        assert_at_rest(engine)
        engine.dispose()


@pytest.mark.parametrize("kind", ["sessionmaker", "function"])
def test_any_factory_of_stock_sessions_works(
    web: Flask, wire: WireProxy, url: str, wire_url: str, kind: str
) -> None:
    with opened(url):
        engine = sa.create_engine(wire_url)
        engine.connect().close()
        factory: Callable[[], Session] = (
            sessionmaker(engine) if kind == "sessionmaker" else lambda: Session(engine)
        )
        session = flask_scoped_session(factory, web)
        with web.app_context(), wire.record() as recording:
            with session.begin():
                session.add(Author(name="new"))
            assert session.get(Author, 1)
            session.remove()
        assert sent(recording) == ["BEGIN", "INSERT", "COMMIT", "BEGIN", "SELECT", "ROLLBACK"]
        with web.app_context():
            with pytest.raises(TypeError, match="class_=OptInSession"):
                session.begin(read_only=True)
            with pytest.raises(TypeError, match="class_=OptInSession"):
                session.give_back()
        engine.dispose()


# -- Removed in time ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_end_of_the_context_removes_the_session(
    engine: OptInEngine,
    web: Flask,
    session: flask_scoped_session[OptInSession],
    onlooker: Onlooker,
    error: type[BaseException] | None,
) -> None:
    seen: list[OptInSession] = []
    web.testing = True

    @web.get("/")
    def view() -> str:
        seen.append(session())
        session.begin()
        session.add(Author(name="new"))
        session.flush()
        assert checked_out(engine) == 1
        if error:
            raise error
        return ""

    for _ in range(2):
        if error:
            with pytest.raises(error):
                web.test_client().get("/")
        else:
            web.test_client().get("/")
        assert checked_out(engine) == 0
    assert seen[0] is not seen[1]
    assert not any(each.in_transaction() or each.new for each in seen)
    assert onlooker.names() == []


def test_teardown_functions_of_the_application_may_still_use_the_session(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    seen: list[Any] = []

    @web.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        seen.append(session.scalar(sa.select(Author.name).where(Author.id == 1)))

    with web.app_context():
        pass
    assert seen == ["Ada"]
    assert checked_out(engine) == 0


def test_a_context_that_does_not_use_a_session_makes_none(web: Flask) -> None:
    def never() -> Session:
        raise AssertionError

    flask_scoped_session(never, web)
    with web.app_context():
        pass
    assert web.test_client().get("/").status_code == 404


def test_an_error_of_the_factory_has_no_other_error_as_its_context(web: Flask) -> None:
    def fail() -> OptInSession:
        raise ZeroDivisionError

    failing = flask_scoped_session(fail, web)
    with web.app_context(), pytest.raises(ZeroDivisionError) as raised:
        failing()
    assert raised.value.__context__ is None


def test_a_stream_has_one_session_to_its_end(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    @web.get("/")
    def view() -> Any:
        def lines() -> Iterator[str]:
            for author in session.scalars(sa.select(Author).order_by(Author.id)):
                yield f"{author.name}\n"

        return stream_with_context(lines())

    response = web.test_client().get("/")
    assert response.text == "Ada\nBob\nCid\n"
    response.close()
    assert checked_out(engine) == 0


# -- Never shared ---------------------------------------------------------------------------------


def test_nested_contexts_have_a_session_each(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    other = Flask("other")
    session.init_app(other)
    with web.app_context():
        outer = session()
        author = session.get(Author, 1)
        assert author
        author.name = "changed"
        for app in (web, other):
            with app.app_context():
                assert session() is not outer
                assert current_session() is session()
                inner = session.get(Author, 1)
                assert inner
                assert inner is not author
                assert inner.name == "Ada"
        assert session() is outer
        assert author in session.dirty
    assert checked_out(engine) == 0


def test_a_request_in_the_context_of_a_test_shares_its_session(
    web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    """Flask gives the request no context of its own, then."""
    seen: list[OptInSession] = []

    @web.get("/")
    def view() -> str:
        seen.append(session())
        return ""

    with web.app_context():
        web.test_client().get("/")
        assert seen == [session()]


def test_each_thread_has_a_session_of_its_own(
    web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    together = threading.Barrier(8)
    seen: list[OptInSession] = []
    failures: list[BaseException] = []

    @web.get("/")
    def view() -> str:
        mine = session()
        seen.append(mine)
        together.wait(30)
        assert session() is mine
        assert mine.get(Author, 1)
        together.wait(30)
        return ""

    def run() -> None:
        try:
            for _ in range(3):
                assert web.test_client().get("/").status_code == 200
        except BaseException as error:
            together.abort()
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(seen) == len(set(map(id, seen))) == 24


def test_a_thread_with_a_copy_of_the_request_has_its_own_session(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    seen: list[OptInSession] = []

    @web.get("/")
    def view() -> str:
        @copy_current_request_context
        def other() -> None:
            assert session.get(Author, 1)
            seen.append(session())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        seen.append(session())
        return ""

    assert web.test_client().get("/").status_code == 200
    assert seen[0] is not seen[1]
    assert checked_out(engine) == 0


def test_each_greenlet_has_a_session_of_its_own(
    web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    greenlets: Any = pytest.importorskip("greenlet")
    seen: list[OptInSession] = []

    def run() -> None:
        with web.app_context():
            mine = session()
            seen.append(mine)
            greenlets.getcurrent().parent.switch()  # the others run now
            assert session() is mine

    running = [greenlets.greenlet(run) for _ in range(3)]
    for _ in range(2):
        for each in running:
            each.switch()
    assert all(each.dead for each in running)
    assert len(set(map(id, seen))) == 3


def test_each_async_view_has_a_session_of_its_own(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    """Each request has its own, also while others wait; the tasks of a view have the view's."""
    seen: list[OptInSession] = []
    together = threading.Barrier(3)

    @web.get("/")
    async def view() -> str:
        mine = session()
        seen.append(mine)
        together.wait(30)
        await asyncio.sleep(0)

        async def task() -> None:
            assert session() is mine

        await asyncio.gather(task(), task())
        assert session.get(Author, 1)
        return ""

    failures: list[BaseException] = []

    def run() -> None:
        try:
            assert web.test_client().get("/").status_code == 200
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(map(id, seen))) == 3
    assert checked_out(engine) == 0


def test_a_context_that_was_never_popped_leaves_nothing_to_another(
    engine: OptInEngine, web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    """Its id() comes again; its session does not."""

    def leave() -> int:
        web.app_context().push()
        session.add(Author(name="left"))
        session.get(Author, 1)
        return id(session())

    for _ in range(20):
        contextvars.copy_context().run(leave)
    gc.collect()
    assert len(session.registry.registry) == 0
    for _ in range(20):
        with web.app_context():
            assert not session.registry.has()
            assert not session.new


# -- Several --------------------------------------------------------------------------------------


def test_two_scoped_sessions_in_one_application_are_both_removed(
    engine: OptInEngine, web: Flask, sessions: sessionmaker[OptInSession]
) -> None:
    """``current_session`` is the last one; each is removed."""
    first = flask_scoped_session(sessions, web)
    second = flask_scoped_session(sessions, web)
    with web.app_context():
        assert first() is not second()
        assert current_session() is second()
        assert first.get(Author, 1) is not second.get(Author, 1)
        assert checked_out(engine) == 2
    assert checked_out(engine) == 0


def test_init_app_may_be_called_again(
    web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    count = len(web.teardown_appcontext_funcs)
    session.init_app(web)
    assert len(web.teardown_appcontext_funcs) == count


# -- Misuse ---------------------------------------------------------------------------------------


def test_outside_of_a_context_each_use_is_an_error(
    web: Flask, session: flask_scoped_session[OptInSession]
) -> None:
    for use in (
        lambda: session.get(Author, 1),
        lambda: session(),
        lambda: session.add(Author(name="new")),
        lambda: session.remove(),
        lambda: current_session.get(Author, 1),
        lambda: current_session(),
        lambda: current_session.remove(),
    ):
        with pytest.raises(RuntimeError, match=r"with app\.app_context\(\):"):
            use()
    with pytest.raises(RuntimeError, match=r"with session_factory\(\) as session"):
        session()


def test_an_application_that_was_not_initialised_is_an_error(
    session: flask_scoped_session[OptInSession],
) -> None:
    with Flask("forgotten").app_context():
        for use in (lambda: session(), lambda: current_session(), lambda: current_session.query):
            with pytest.raises(AttributeError, match=r"'forgotten'.*init_app\(app\)"):
                use()


def test_a_scoped_session_of_another_application_is_an_error(
    web: Flask,
    session: flask_scoped_session[OptInSession],
    sessions: sessionmaker[OptInSession],
) -> None:
    other = flask_scoped_session(sessions)
    with web.app_context():
        assert current_session() is session()
        with pytest.raises(AttributeError, match=r"init_app\(app\)"):
            other()


def test_init_app_is_refused_after_the_first_request(
    web: Flask, sessions: sessionmaker[OptInSession]
) -> None:
    web.test_client().get("/")
    with pytest.raises(AssertionError, match="can no longer be called on the application"):
        flask_scoped_session(sessions, web)
    assert not hasattr(web, "scoped_session")


# -- Without Flask-SQLAlchemy ---------------------------------------------------------------------


def test_flask_scoped_session_needs_flask_and_sqlalchemy_alone() -> None:
    code = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "flask_sqlalchemy":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())
    from flask import Flask
    from sqlalchemy.orm import sessionmaker
    from fictive_sqlalchemy.ext.flask import current_session, flask_scoped_session
    import fictive_sqlalchemy.ext.flask

    app = Flask("app")
    session = flask_scoped_session(sessionmaker(), app)
    session.atomic_requests(app)
    with app.app_context():
        assert current_session() is session()
    try:
        fictive_sqlalchemy.ext.flask.OptInTransactionMixin
    except ModuleNotFoundError as error:
        assert error.name == "flask_sqlalchemy"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_the_package_has_what_it_says() -> None:
    import fictive_sqlalchemy.ext.flask as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=r"ext\.flask' has no attribute 'NoSuchName'"):
        package.NoSuchName  # type: ignore[attr-defined]  # noqa: B018


if TYPE_CHECKING:

    def _types(web: Flask, stock: sessionmaker[Session], ours: sessionmaker[OptInSession]) -> None:
        assert_type(flask_scoped_session(stock), flask_scoped_session[Session])
        assert_type(flask_scoped_session(ours, web), flask_scoped_session[OptInSession])
        assert_type(flask_scoped_session(ours, web)(), OptInSession)
        assert_type(
            flask_scoped_session(lambda: OptInSession()), flask_scoped_session[OptInSession]
        )
        assert_type(current_session, flask_scoped_session[Any])
        assert_type(flask_scoped_session(stock).get(Author, 1), Author | None)
