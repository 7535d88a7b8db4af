"""The private names of Flask and Flask-SQLAlchemy that the extension uses.

They are in ``ext/flask/_private.py`` and nowhere else. Each has a test whose failure names it.
"""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import flask_sqlalchemy
import sqlalchemy as sa
from flask import Blueprint, Flask, after_this_request
from flask.ctx import AppContext, RequestContext
from flask.globals import app_ctx, request_ctx
from flask_sqlalchemy import SQLAlchemy, record_queries

import fictive_sqlalchemy.ext.flask as flask_extension
from tests.private_names import PACKAGE, names_with_a_test, parameters, used_in


class TestFlaskSQLAlchemy:
    def test__make_scoped_session(self) -> None:
        """What makes ``db.session``."""
        assert parameters(SQLAlchemy._make_scoped_session) == ["self", "options"]
        made: list[Any] = []

        class Spy(SQLAlchemy):
            def _make_scoped_session(self, options: dict[str, Any]) -> Any:
                made.append(super()._make_scoped_session(options))
                return made[0]

        db = Spy(session_options={"expire_on_commit": False})
        assert [db.session] == made

    def test__make_engine(self) -> None:
        """What makes the engine of each bind, with the URL among its options."""
        assert parameters(SQLAlchemy._make_engine) == ["self", "bind_key", "options", "app"]
        made: dict[str | None, Any] = {}

        class Spy(SQLAlchemy):
            def _make_engine(
                self, bind_key: str | None, options: dict[str, Any], app: Flask
            ) -> sa.Engine:
                made[bind_key] = dict(options)
                return super()._make_engine(bind_key, options, app)

        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
        app.config["SQLALCHEMY_BINDS"] = {"other": "sqlite://"}
        db = Spy(app)
        with app.app_context():
            assert set(made) == {None, "other"} == set(db.engines)
            assert all(sa.make_url(options["url"]) is not None for options in made.values())
            for engine in db.engines.values():
                engine.dispose()

    def test__make_declarative_base(self) -> None:
        """What makes ``db.Model``."""
        names = parameters(SQLAlchemy._make_declarative_base)
        assert names == ["self", "model_class", "disable_autonaming"]
        made: list[Any] = []

        class Spy(SQLAlchemy):
            def _make_declarative_base(
                self, model_class: Any, disable_autonaming: bool = False
            ) -> Any:
                made.append(super()._make_declarative_base(model_class, disable_autonaming))
                return made[0]

        db = Spy()
        assert [db.Model] == made

    def test__listen(self) -> None:
        """What records the queries of an engine."""
        assert parameters(record_queries._listen) == ["engine"]
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
        SQLAlchemy(app)
        engine = sa.create_engine("sqlite://")
        record_queries._listen(engine)
        with app.app_context(), engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            assert [query.statement for query in record_queries.get_recorded_queries()] == [
                "SELECT 1"
            ]
        engine.dispose()

    def test___fsa__(self) -> None:
        """The way from a model to its extension."""
        db = SQLAlchemy()
        assert db.Model.__fsa__ is db

    def test_FSAModel(self) -> None:
        """The type that Flask-SQLAlchemy declares for ``db.Model``."""
        assert SQLAlchemy.__annotations__.get("Model") is None  # or there would be a public name
        assert hasattr(flask_sqlalchemy.extension, "_FSAModel")


class TestFlask:
    """Not private by name, but Flask calls them internal."""

    def test_app_ctx_and_request_ctx_stand_for_a_new_object_for_each_context(self) -> None:
        """Each stands for a context object, which is a new one for each context."""
        app = Flask(__name__)
        proxies: list[tuple[Any, Any]] = [(app_ctx, AppContext), (request_ctx, RequestContext)]
        for proxy, kind in proxies:
            assert not proxy
            seen: list[Any] = []
            for _ in range(2):
                with app.test_request_context() as context:
                    seen.append(proxy._get_current_object())
                    assert isinstance(seen[-1], kind)
                    assert (seen[-1] is context) == (proxy is request_ctx)
            assert seen[0] is not seen[1]

    def test_handle_exception_is_called_before_the_handlers_of_500(self) -> None:
        """Flask calls it where no error handler took an exception, before the handlers of 500."""
        order: list[str] = []
        app = Flask(__name__)
        app.add_url_rule("/<int:n>", "fail", lambda n: 1 // n)
        app.register_error_handler(500, lambda error: order.append("500") or ("sorry", 500))  # type: ignore[func-returns-value]
        handle = app.handle_exception

        def spy(e: Exception) -> Any:
            order.append("spy")
            return handle(e)

        app.handle_exception = spy  # type: ignore[method-assign]
        assert app.test_client().get("/0").status_code == 500
        assert order == ["spy", "500"]

    def test_functions_first_in_before_and_after_request_funcs_run_around_the_others(self) -> None:
        """The first of both lists runs around all other functions of a request."""
        order: list[str] = []
        app = Flask(__name__)
        blueprint = Blueprint("blueprint", __name__)

        def add(name: str, response: Any = None) -> Any:
            order.append(name)
            return response

        @blueprint.get("/")
        def view() -> str:
            after_this_request(partial(add, "this"))
            return ""

        for target in (app, blueprint):
            target.before_request(partial(add, f"before {target.name}"))
            target.after_request(partial(add, f"after {target.name}"))
        app.register_blueprint(blueprint)
        app.before_request_funcs[None].insert(0, partial(add, "first"))
        app.after_request_funcs[None].insert(0, partial(add, "last"))
        app.test_client().get("/")
        assert order == [
            *("first", f"before {app.name}", "before blueprint"),
            *("this", "after blueprint", f"after {app.name}", "last"),
        ]


def test_no_other_module_of_ext_flask_uses_a_private_name() -> None:
    """They are at home in ``_private.py``, and have names of our own elsewhere."""
    theirs = {name for name in dir(SQLAlchemy()) if not name.endswith("__")}
    for module in (flask_sqlalchemy.extension, record_queries):
        theirs |= set(vars(module))
    private = {name for name in theirs if name.startswith("_")} | {
        *("__fsa__", "_get_current_object", "app_ctx", "request_ctx", "handle_exception"),
        *("before_request_funcs", "after_request_funcs"),
    }
    folder = Path(flask_extension.__file__).parent
    used: set[tuple[str, str]] = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[Any] = [getattr(node, each, None) for each in ("attr", "name", "id")]
            if isinstance(node, ast.Constant):
                names.append(node.value)
            used |= {(path.name, name) for name in names if name in private}
    used -= {(file, name) for file, name in used if name.startswith("__") and name != "__fsa__"}
    assert {file for file, _ in used} == {"_private.py"}, sorted(used)
    assert {"_make_engine", "_listen", "__fsa__", "app_ctx"} <= {name for _, name in used}


def test_no_test_of_flask_sqlalchemy_is_left_over() -> None:
    flask = used_in(PACKAGE / "ext" / "flask" / "_private.py")
    assert names_with_a_test(TestFlaskSQLAlchemy) - {"__fsa__"} <= flask
