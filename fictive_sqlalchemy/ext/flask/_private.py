"""Every private name of Flask-SQLAlchemy, Flask and Werkzeug, behind names of our own.

No public name does what is done here. Names that Flask documents and calls internal are here, too.
``tests/flask/test_private_names.py`` has a test for each name, and a test that no other module of
``ext/flask`` uses a private name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from flask import Flask
from flask.ctx import AppContext, RequestContext
from flask.globals import app_ctx, request_ctx
from werkzeug.wrappers import Response

if TYPE_CHECKING:
    from flask_sqlalchemy import SQLAlchemy
    from flask_sqlalchemy.extension import _FSAModel  # pyright: ignore[reportPrivateUsage]
    from sqlalchemy.engine import Engine

    _Extension = SQLAlchemy

    class ModelBase(_FSAModel):
        """The type that Flask-SQLAlchemy declares for ``db.Model``."""

else:
    # ExtensionHooks is a mixin: the extension class comes after it in the bases of a class.
    _Extension = object


class ExtensionHooks(_Extension):
    """Hooks to override how Flask-SQLAlchemy's extension makes its parts.

    Flask-SQLAlchemy 2 had public methods for this. Since 3.0, they are private.
    """

    def _session_of_extension(self, options: dict[str, Any]) -> Any:
        """Make ``db.session``.

        :param options: The extension's ``session_options``.
        """
        return super()._make_scoped_session(options)  # private: see the class

    def _engine_of_bind(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        """Make the engine of a bind.

        :param bind_key: The key of the bind; ``None`` is the key of the default bind.
        :param options: The engine's options, with its ``url``.
        :param app: The application.
        """
        return super()._make_engine(bind_key, options, app)  # private: see the class

    def _base_of_models(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        """Make ``db.Model``.

        Only this method gets the class whose attributes Flask-SQLAlchemy copies.

        :param model_class: The class that was passed to the extension.
        :param disable_autonaming: Whether to leave ``__tablename__`` to the models.
        """
        # private: see the class
        return super()._make_declarative_base(model_class, disable_autonaming=disable_autonaming)

    # What Flask-SQLAlchemy calls

    def _make_scoped_session(self, options: dict[str, Any]) -> Any:
        return self._session_of_extension(options)  # private: see the class

    def _make_engine(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        return self._engine_of_bind(bind_key, options, app)  # private: see the class

    def _make_declarative_base(self, model_class: Any, disable_autonaming: bool = False) -> Any:
        # private: see the class
        return self._base_of_models(model_class, disable_autonaming)


def extension_of(model: type[Any]) -> SQLAlchemy | None:
    """Return the extension that made the base class of a model. No public name leads there.

    :param model: The model.
    :returns: The extension; ``None`` if the model is none of Flask-SQLAlchemy's.
    """
    extension: SQLAlchemy | None = getattr(model, "__fsa__", None)
    return extension


def record_queries_of(engine: Engine) -> None:
    """Have ``get_recorded_queries()`` include an engine that the extension does not know.

    The extension does this for the engine of each bind, but a replica is no bind.

    :param engine: The engine.
    """
    from flask_sqlalchemy import record_queries

    # private: what the extension calls for each engine
    record_queries._listen(engine)  # pyright: ignore[reportPrivateUsage]


# Returns the application context itself, to which ``current_app`` and ``g`` belong. Flask documents
# ``app_ctx``, and calls it internal. An alias is enough, and is fast: each use of a scoped session
# calls it.
_app_ctx: Any = app_ctx
current_app_context: Callable[[], AppContext] = _app_ctx._get_current_object


def current_request_context() -> RequestContext:
    """Return the request context itself.

    ``request`` is the same object in a copy of its context, as ``copy_current_request_context()``
    makes it. Flask documents ``request_ctx``, and calls it internal.
    """
    proxy: Any = request_ctx
    return cast(RequestContext, proxy._get_current_object())


def come_first(app: Flask, begin: Callable[[], Any], end: Callable[[Any], Any]) -> None:
    """Run one function before all others of ``before_request``, and one last in ``after_request``.

    Flask has no public way to run before functions that were registered earlier, and calls its
    lists of functions internal. It runs the functions of ``after_request`` from the end of the
    list.

    :param app: The application.
    :param begin: A function that is registered with ``before_request``.
    :param end: A function that is registered with ``after_request``.
    """
    for functions, first in (
        (app.before_request_funcs[None], begin),
        (app.after_request_funcs[None], end),
    ):
        ordered: list[Any] = functions
        ordered[:] = [first, *(each for each in ordered if each != first)]


def before_handlers_of_500(app: Flask, function: Callable[[], object]) -> None:
    """Call a function when no error handler has taken an exception, before those of 500 run.

    Flask sends the signal ``got_request_exception`` at this point, but views and extensions send
    this signal as well, to report an error that they answer. The method ``handle_exception`` is
    public, but replacing this method on an application that somebody else has made is not.

    :param app: The application.
    :param function: The function.
    """
    handle = app.handle_exception

    @wraps(handle)
    def call_and_handle(e: Exception) -> Response:
        function()
        return handle(e)

    app.handle_exception = call_and_handle  # type: ignore[assignment,method-assign]  # pyright: ignore
