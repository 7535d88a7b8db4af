"""Tasks that run in this process: their context, their session, their transaction."""

# mypy: disable-error-code="name-defined,misc,untyped-decorator"

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, shared_task, states
from celery.exceptions import Ignore, ImproperlyConfigured, Reject, SoftTimeLimitExceeded
from flask import Flask, current_app, g, has_app_context
from flask.globals import app_ctx
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Mapped, Session, mapped_column, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.celery import DatabaseTask
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from tests.flask.conftest import MakeApp, make_app
from tests.flask.support import Database
from tests.library import Author, Onlooker, assert_at_rest, fill
from tests.wire import WireProxy

__all__ = ["make_app"]

db: Any = Database()


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Seat(db.Model):
    """Its constraint is checked at COMMIT."""

    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


@pytest.fixture
def app(make_app: MakeApp, url: str, wire_url: str) -> Iterator[Flask]:
    with make_app(db, url).app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Item(name="one"))
    app = make_app(db, wire_url)
    with app.app_context():  # what SQLAlchemy and psycopg ask on the first connection
        db.session.execute(sa.text("SELECT 1"))
    yield app
    with app.app_context():
        assert_at_rest(db.engine)


def celery_of(task_cls: type[DatabaseTask], **settings: Any) -> Any:
    """A Celery app that no other test sees."""
    celery: Any = Celery("tests", task_cls=task_cls, set_as_current=False)
    celery.conf.update(broker_url="memory://", result_backend="cache+memory://", **settings)
    return celery


@pytest.fixture
def task(app: Flask) -> Callable[..., Any]:
    """``@task(**options)``, of a Celery app of this test."""
    celery = celery_of(DatabaseTask.of(app))

    def decorate(**options: Any) -> Any:
        return celery.task(shared=False, **options)

    return decorate


def items(onlooker: Onlooker) -> list[str]:
    return onlooker.column("SELECT name FROM item WHERE name <> 'one' ORDER BY name")


CALLS: list[Callable[[Any], Any]] = [
    lambda task: task(),
    lambda task: task.apply().get(),
    lambda task: task.run(),
]


@pytest.mark.parametrize("call", CALLS, ids=["call", "apply", "run"])
class TestContext:
    def test_a_task_has_one_of_its_own(self, app: Flask, task: Any, call: Any) -> None:
        @task()
        def look() -> tuple[Flask, Any]:
            return current_app._get_current_object(), app_ctx._get_current_object()  # type: ignore[attr-defined]

        _, first = call(look)
        found, second = call(look)
        assert found is app
        assert first is not second
        assert not has_app_context()

    def test_also_inside_another_one(self, app: Flask, task: Any, call: Any) -> None:
        @task()
        def look() -> tuple[bool, int]:
            db.session.add(Item(name="of the task"))
            return "name" in g, len(db.session.new)

        with app.test_request_context():
            g.name = "of the view"
            db.session.add(Item(name="of the view"))
            assert call(look) == (False, 1)
            assert [item.name for item in db.session.new] == ["of the view"]
            assert g.name == "of the view"

    def test_its_session_is_removed(self, app: Flask, task: Any, call: Any) -> None:
        sessions: list[Session] = []

        @task()
        def use(fails: bool = False) -> None:
            sessions.append(db.session())
            db.session.add(Item(name="pending"))
            db.session.get(Item, 1)
            if fails:
                raise ValueError("it fails")

        @task()
        def fail() -> None:
            use.run(fails=True)

        call(use)
        with pytest.raises(ValueError, match="fails"):
            call(fail)
        assert not any(session.new or session.identity_map for session in sessions)
        assert len(db.session.registry.registry) == 0

    def test_its_session_is_removed_also_where_a_teardown_function_fails(
        self, app: Flask, task: Any, call: Any
    ) -> None:
        @app.teardown_appcontext
        def fail(_: object) -> None:
            if "fails" in g:
                raise ZeroDivisionError

        @task()
        def use() -> None:
            g.fails = True
            db.session.add(Item(name="pending"))

        with pytest.raises(ZeroDivisionError):
            call(use)
        assert not has_app_context()
        assert len(db.session.registry.registry) == 0

    def test_a_read_is_one_statement(self, task: Any, wire: WireProxy, call: Any) -> None:
        @task()
        def read() -> str:
            return str(db.session.get(Item, 1).name)

        with wire.record() as recording:
            assert call(read) == "one"
        assert recording.verbs == ["SELECT"]
        assert recording.round_trips == 1

    def test_an_atomic_task_is_a_transaction(self, task: Any, wire: WireProxy, call: Any) -> None:
        @task(atomic=True)
        def write() -> None:
            item = db.session.get(Item, 1)
            item.name = "renamed"

        with wire.record() as recording:
            call(write)
        assert recording.verbs == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]

    def test_an_atomic_task_that_does_nothing_sends_nothing(
        self, task: Any, wire: WireProxy, call: Any
    ) -> None:
        @task(atomic=True)
        def idle() -> None:
            pass

        with wire.record() as recording:
            call(idle)
        assert recording.verbs == []


class TestAtomic:
    @pytest.mark.parametrize(
        ("raised", "state"),
        [
            (ValueError("no"), states.FAILURE),
            (SoftTimeLimitExceeded(), states.FAILURE),
            (Ignore(), states.IGNORED),
            (Reject("no"), states.REJECTED),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_an_exception_rolls_back(
        self, task: Any, wire: WireProxy, onlooker: Onlooker, raised: Exception, state: str
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            raise raised

        with wire.record() as recording:
            assert write.apply().state == state
        assert recording.verbs == ["BEGIN", "INSERT", "ROLLBACK"]
        assert items(onlooker) == []

    @pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
    def test_an_interruption_rolls_back(
        self, task: Any, onlooker: Onlooker, raised: type[BaseException]
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            raise raised

        with pytest.raises(raised):
            write.apply()
        assert items(onlooker) == []

    def test_a_retry_rolls_back(self, task: Any, wire: WireProxy, onlooker: Onlooker) -> None:
        @task(atomic=True, bind=True)
        def write(self: Any) -> int:
            # The same name: the attempt before must not be in the way.
            db.session.add(Item(name="new"))
            db.session.flush()
            if self.request.retries < 2:
                raise self.retry(countdown=0)
            return int(self.request.retries)

        with wire.record() as recording:
            assert write.apply().get() == 2
        verbs = ["BEGIN", "INSERT", "ROLLBACK"] * 2 + ["BEGIN", "INSERT", "COMMIT"]
        assert [verb for verb in recording.verbs if verb != "DEALLOCATE"] == verbs
        assert items(onlooker) == ["new"]

    def test_an_attempt_is_rolled_back_before_it_is_made_again_by_autoretry_for(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True, bind=True, autoretry_for=(ValueError,), retry_kwargs={"countdown": 0})
        def write(self: Any) -> None:
            db.session.add(Item(name=f"new {self.request.retries}"))
            db.session.flush()
            if self.request.retries == 0:
                raise ValueError

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new 1"]

    def test_it_is_committed_before_there_is_a_result(self, app: Flask, onlooker: Onlooker) -> None:
        seen: list[list[str]] = []

        class Looking(DatabaseTask):
            def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
                seen.append(items(onlooker))

        @celery_of(Looking.of(app)).task(atomic=True, shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        write.apply()
        assert seen == [["new"]]

    def test_a_commit_that_fails_is_a_failure(self, task: Any, onlooker: Onlooker) -> None:
        onlooker.run("INSERT INTO seat (place) VALUES (1)")

        @task(atomic=True)
        def sit() -> None:
            db.session.add(Seat(place=1))

        result = sit.apply()
        assert result.state == states.FAILURE
        assert isinstance(result.result, IntegrityError)

    def test_a_commit_that_fails_is_retried(self, task: Any, onlooker: Onlooker) -> None:
        onlooker.run("INSERT INTO seat (place) VALUES (1)")

        @task(
            atomic=True,
            bind=True,
            autoretry_for=(IntegrityError,),
            retry_kwargs={"countdown": 0},
        )
        def sit(self: Any) -> int:
            place = 1 + int(self.request.retries)
            db.session.add(Seat(place=place))
            return place

        assert sit.apply().get() == 2
        assert onlooker.column("SELECT place FROM seat ORDER BY place") == [1, 2]

    def test_a_statement_that_failed_and_was_caught_is_a_failure(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def write() -> str:
            db.session.add(Item(name="new"))
            db.session.flush()
            try:
                db.session.execute(sa.insert(Item).values(name="one"))
            except IntegrityError:
                return "it was there"
            return "it is new"

        result = write.apply()
        assert isinstance(result.result, PendingRollbackError)
        assert items(onlooker) == []

    def test_what_may_fail_goes_into_a_savepoint(self, task: Any, onlooker: Onlooker) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            with pytest.raises(IntegrityError), db.session.begin_nested():
                db.session.add(Item(name="one"))
            with db.session.begin_nested():
                db.session.add(Item(name="newer"))

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new", "newer"]

    def test_a_commit_inside_is_refused(
        self, task: Any, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.commit()

        with wire.record() as recording:
            result = write.apply()
        with pytest.raises(InvalidRequestError, match=r"committed when it returns.*leave commit"):
            result.get()
        assert recording.verbs == []

    @pytest.mark.parametrize("end", ["rollback", "close", "remove"])
    def test_a_success_that_is_not_stored_is_a_failure(
        self, task: Any, onlooker: Onlooker, end: str
    ) -> None:
        @task(atomic=True)
        def write() -> None:
            db.session.add(Item(name="new"))
            db.session.flush()
            getattr(db.session, end)()

        message = "ended its own transaction.*begin_nested"
        if end == "remove":
            message = "nothing of it is stored"
        with pytest.raises(InvalidRequestError, match=message):
            write.apply().get()
        assert items(onlooker) == []

    def test_set_rollback_rolls_back_a_success(self, task: Any, onlooker: Onlooker) -> None:
        @task(atomic=True)
        def write() -> str:
            db.session.add(Item(name="new"))
            db.session.flush()
            db.session.set_rollback()
            return "nothing to do"

        assert write.apply().get() == "nothing to do"
        assert items(onlooker) == []

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_task_can_be_sent_on_commit(self, task: Any, onlooker: Onlooker, fails: bool) -> None:
        seen: list[list[str]] = []

        @task()
        def look() -> None:
            seen.append(items(onlooker))

        @task(atomic=True)
        def write() -> None:
            db.session.on_commit(look.apply)
            db.session.add(Item(name="new"))
            if fails:
                raise ValueError

        write.apply()
        assert seen == ([] if fails else [["new"]])

    def test_begin_inside_points_at_begin_nested(self, task: Any) -> None:
        @task(atomic=True)
        def write() -> None:
            with db.session.begin():
                pass

        with pytest.raises(InvalidRequestError, match="begin_nested"):
            write.apply().get()

    def test_a_task_called_in_another_one_is_a_transaction_of_its_own(
        self, task: Any, onlooker: Onlooker
    ) -> None:
        @task(atomic=True)
        def inner() -> int:
            db.session.add(Item(name="inner"))
            return int(db.session.scalar(sa.select(sa.func.count(Item.id))))

        @task(atomic=True)
        def outer() -> None:
            db.session.add(Item(name="outer"))
            db.session.flush()
            assert inner() == 2  # it does not see what is not committed
            raise ValueError

        assert outer.apply().state == states.FAILURE
        assert items(onlooker) == ["inner"]

    def test_parts_of_a_task_that_is_not_atomic_are(self, task: Any, onlooker: Onlooker) -> None:
        @task()
        def write() -> None:
            with db.session.begin():
                db.session.add(Item(name="stored"))
            with db.session.begin():
                db.session.add(Item(name="lost"))
                db.session.flush()
                raise ValueError

        assert write.apply().state == states.FAILURE
        assert items(onlooker) == ["stored"]

    def test_all_tasks_of_a_class(self, app: Flask, onlooker: Onlooker) -> None:
        class Atomic(DatabaseTask):
            atomic = True

        celery = celery_of(Atomic.of(app))

        @celery.task(shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        @celery.task(shared=False, atomic=False)
        def write_nothing() -> None:
            db.session.add(Item(name="pending"))

        write.apply()
        write_nothing.apply()
        assert items(onlooker) == ["new"]


class TestKindsOfTasks:
    def test_shared_tasks(self, app: Flask) -> None:
        celery = celery_of(DatabaseTask.of(app))

        @shared_task(name="tests.celery.shared")
        def read() -> str:
            return str(db.session.get(Item, 1).name)

        assert celery.tasks["tests.celery.shared"].apply().get() == "one"

    def test_task_classes(self, app: Flask, onlooker: Onlooker) -> None:
        class Write(DatabaseTask):
            name = "tests.celery.write"
            atomic = True

            def __init__(self, prefix: str) -> None:
                self.prefix = prefix

            def run(self, name: str) -> str:
                db.session.add(Item(name=f"{self.prefix} {name}"))
                return name

        class WriteTwice(Write):
            name = "tests.celery.write_twice"

            def run(self, name: str) -> str:
                super().run(f"{name} 1")  # the same transaction
                return super().run(f"{name} 2")

        celery = celery_of(DatabaseTask.of(app))
        assert celery.register_task(Write("a")).apply(["b"]).get() == "b"
        assert celery.register_task(WriteTwice("c")).apply(["d"]).get() == "d 2"
        assert items(onlooker) == ["a b", "c d 1", "c d 2"]

    def test_bound_tasks_know_their_request_and_their_app(self, app: Flask, task: Any) -> None:
        @task(bind=True)
        def look(self: Any) -> tuple[str, Flask]:
            return self.request.id, self.flask_app

        assert look.apply(task_id="7").get() == ("7", app)

    def test_a_hook_can_have_a_context(self, app: Flask, onlooker: Onlooker) -> None:
        class Noting(DatabaseTask):
            def on_failure(
                self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: Any
            ) -> None:
                with self.flask_app.app_context(), db.session.begin():
                    db.session.add(Item(name=str(exc)))

        @celery_of(Noting.of(app)).task(atomic=True, shared=False)
        def fail() -> None:
            db.session.add(Item(name="lost"))
            raise ValueError("noted")

        fail.apply()
        assert items(onlooker) == ["noted"]

    def test_a_generator_is_refused(self, task: Any, onlooker: Onlooker) -> None:
        @task(atomic=True)
        def write() -> Generator[int]:
            db.session.add(Item(name="new"))
            yield 1

        with pytest.raises(TypeError, match=r"returned a generator.*return a list"):
            write.apply().get()

    def test_a_coroutine_is_refused(self, task: Any, onlooker: Onlooker) -> None:
        @task()
        async def write() -> None:
            pass

        with pytest.raises(TypeError, match=r"returned a coroutine.*asyncio\.run"):
            write.apply().get()


class TestTheApp:
    def test_it_may_be_made_by_the_first_task(self, app: Flask) -> None:
        made: list[Flask] = []
        all_here = threading.Barrier(4)

        def create_app() -> Flask:
            made.append(app)
            return app

        celery = celery_of(DatabaseTask.of(create_app))

        @celery.task(shared=False)
        def look() -> Any:
            return current_app._get_current_object()  # type: ignore[attr-defined]

        def run(_: int) -> Any:
            all_here.wait(30)
            return look.apply().get()

        assert celery.tasks
        assert made == []
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(run, range(4))) == {app}
        assert made == [app]

    def test_a_base_class_may_know_none(self, app: Flask, onlooker: Onlooker) -> None:
        """A library's, or one in a module that is imported before there is an app."""

        class Base(DatabaseTask):
            atomic = True

        @celery_of(DatabaseTask.of(app)).task(base=Base, shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new"]

    def test_without_one(self) -> None:
        @celery_of(DatabaseTask).task(shared=False)
        def read() -> None:
            pass

        with pytest.raises(ImproperlyConfigured, match=r"task_cls=DatabaseTask\.of\(app\)"):
            read.apply().get()

    @pytest.mark.parametrize("given", ["shop:create_app", None, Flask])
    def test_something_else(self, given: Any) -> None:
        with pytest.raises(TypeError, match="takes the Flask app, or a function"):
            DatabaseTask.of(given)

    def test_a_function_that_makes_something_else(self) -> None:
        @celery_of(DatabaseTask.of(lambda: None)).task(shared=False)  # type: ignore[arg-type,return-value]
        def read() -> None:
            pass

        with pytest.raises(ImproperlyConfigured, match="return the Flask app"):
            read.apply().get()

    def test_an_atomic_task_needs_a_session(self) -> None:
        celery = celery_of(DatabaseTask.of(Flask("plain")))

        @celery.task(shared=False)
        def read() -> str:
            return current_app.name

        @celery.task(shared=False, atomic=True)
        def write() -> None:
            pass

        assert read.apply().get() == "plain"
        with pytest.raises(ImproperlyConfigured, match=r"db\.init_app\(app\)"):
            write.apply().get()

    def test_an_atomic_task_needs_one_session(self, app: Flask, task: Any) -> None:
        flask_scoped_session(sessionmaker(class_=OptInSession), app)

        @task(atomic=True)
        def write() -> None:
            pass

        with pytest.raises(ImproperlyConfigured, match="two sessions"):
            write.apply().get()


class TestOtherSessions:
    def test_flask_scoped_session(self, url: str, wire_url: str, wire: WireProxy) -> None:
        fill(wire_url)
        engine = create_engine(wire_url)
        engine.connect().close()  # SQLAlchemy asks the server for its version, and the like
        app = Flask(__name__)
        session = flask_scoped_session(sessionmaker(engine, class_=OptInSession), app)
        celery = celery_of(DatabaseTask.of(app))

        @celery.task(shared=False)
        def read() -> str:
            session.add(Author(name="pending"))
            author = session.get(Author, 1)
            assert author is not None
            return author.name

        @celery.task(shared=False, atomic=True)
        def write(name: str) -> None:
            session.add(Author(name=name))

        with wire.record() as recording:
            assert read.apply().get() == "Ada"
        assert recording.verbs == ["SELECT"]
        with wire.record() as recording:
            write.apply(["Dan"]).get()
            assert isinstance(write.apply(["Dan"]).result, IntegrityError)
        verbs = ["BEGIN", "INSERT", "COMMIT", "BEGIN", "INSERT", "ROLLBACK"]
        assert [verb for verb in recording.verbs if verb != "DEALLOCATE"] == verbs
        assert isinstance(session, scoped_session)
        assert len(session.registry.registry) == 0
        assert_at_rest(engine)
        engine.dispose()

    def test_flask_sqlalchemy_as_it_is(self, make_app: MakeApp, url: str) -> None:
        stock = SQLAlchemy()
        counted = sa.table("item", sa.column("name"))
        app = make_app(stock, url)
        with app.app_context(), stock.engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE item (name text)"))
        celery = celery_of(DatabaseTask.of(app))

        @celery.task(shared=False, atomic=True)
        def write(then: str) -> None:
            stock.session.execute(sa.insert(counted).values(name=then))
            if then == "fail":
                raise ValueError
            if then != "return":
                getattr(stock.session, then)()

        for then in ("return", "fail", "commit", "rollback", "close", "remove"):
            state = write.apply([then]).state
            assert state == (states.SUCCESS if then == "return" else states.FAILURE)
        with app.app_context():
            assert stock.session.scalars(sa.select(counted.c.name)).all() == ["return"]
