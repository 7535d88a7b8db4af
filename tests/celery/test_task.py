"""A task has an application context and a session of its own, whatever kind of task it is."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from celery import shared_task, states
from celery.exceptions import ImproperlyConfigured
from flask import Flask, current_app, g, has_app_context
from flask.globals import app_ctx
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInSession, create_engine
from fictive_sqlalchemy.ext.celery import DatabaseTask
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from tests.celery.tasks import Item, celery_of, db, items
from tests.flask.conftest import MakeApp
from tests.library import Author, Onlooker, assert_at_rest, fill
from tests.wire import WireProxy

CALLS: list[Callable[[Any], Any]] = [
    lambda task: task(),
    lambda task: task.apply().get(),
    lambda task: task.run(),
]


@pytest.mark.parametrize("call", CALLS, ids=["call", "apply", "run"])
class TestContext:
    def test_a_task_has_an_application_context_of_its_own(
        self, app: Flask, task: Any, call: Any
    ) -> None:
        @task()
        def look() -> tuple[Flask, Any]:
            return current_app._get_current_object(), app_ctx._get_current_object()  # type: ignore[attr-defined]

        _, first = call(look)
        found, second = call(look)
        assert found is app
        assert first is not second
        assert not has_app_context()

    def test_a_task_has_its_own_context_inside_another_one(
        self, app: Flask, task: Any, call: Any
    ) -> None:
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

    def test_the_session_of_a_task_is_removed_at_its_end(
        self, app: Flask, task: Any, call: Any
    ) -> None:
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

    def test_the_session_of_a_task_is_removed_where_a_teardown_function_fails(
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


class TestKindsOfTasks:
    def test_a_shared_task_has_a_context(self, app: Flask) -> None:
        celery = celery_of(DatabaseTask.of(app))

        @shared_task(name="tests.celery.shared")
        def read() -> str:
            return str(db.session.get(Item, 1).name)

        assert celery.tasks["tests.celery.shared"].apply().get() == "one"

    def test_a_task_class_may_be_atomic(self, app: Flask, onlooker: Onlooker) -> None:
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
    def test_the_app_may_be_made_by_the_first_task(self, app: Flask) -> None:
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

    def test_a_base_class_may_know_no_app(self, app: Flask, onlooker: Onlooker) -> None:
        """A library's, or one in a module that is imported before there is an app."""

        class Base(DatabaseTask):
            atomic = True

        @celery_of(DatabaseTask.of(app)).task(base=Base, shared=False)
        def write() -> None:
            db.session.add(Item(name="new"))

        assert write.apply().state == states.SUCCESS
        assert items(onlooker) == ["new"]

    def test_a_task_without_an_app_is_an_error(self) -> None:
        @celery_of(DatabaseTask).task(shared=False)
        def read() -> None:
            pass

        with pytest.raises(ImproperlyConfigured, match=r"task_cls=DatabaseTask\.of\(app\)"):
            read.apply().get()

    @pytest.mark.parametrize("given", ["shop:create_app", None, Flask])
    def test_something_else_than_an_app_is_refused(self, given: Any) -> None:
        with pytest.raises(TypeError, match="takes the Flask app, or a function"):
            DatabaseTask.of(given)

    def test_a_function_that_makes_something_else_than_an_app_is_refused(self) -> None:
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
    def test_a_task_may_use_flask_scoped_session(
        self, url: str, wire_url: str, wire: WireProxy
    ) -> None:
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
            session.add_all([Author(name=f"{name} junior"), Author(name=name)])

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

    def test_an_atomic_task_works_with_flask_sqlalchemy_as_it_is(
        self, make_app: MakeApp, url: str
    ) -> None:
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
