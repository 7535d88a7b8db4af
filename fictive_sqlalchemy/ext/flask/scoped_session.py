"""A session per application context, over models and engines that are plain SQLAlchemy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast
from weakref import WeakSet

from flask import Flask, current_app, has_app_context
from flask.ctx import AppContext
from sqlalchemy.orm import Session, sessionmaker
from werkzeug.local import LocalProxy

from ..._core.errors import see
from ...scoped_session import OptInScopedSession
from ._private import current_app_context
from .atomic_requests import AtomicRequestsMixin, atomic_requests_of
from .contexts import ContextRegistry
from .strict_report import strict_report_of

S = TypeVar("S", bound=Session)


class flask_scoped_session(AtomicRequestsMixin, OptInScopedSession[S]):
    """A ``scoped_session`` whose scope is the application context::

        engine = create_engine(url)
        session = flask_scoped_session(sessionmaker(engine, class_=OptInSession), app)

    Each context has a session of its own. The session is made at its first use, and removed at the
    end of the context, even after an exception.

    :param session_factory: The factory of sessions: a ``sessionmaker``, or any callable.
    :param app: The application. For several applications, or to name it later, see
        :meth:`init_app`.
    """

    def __init__(
        self, session_factory: sessionmaker[S] | Callable[[], S], app: Flask | None = None
    ) -> None:
        self._apps: WeakSet[Flask] = WeakSet()
        super().__init__(cast("sessionmaker[S]", session_factory), self._scope)
        self.registry = ContextRegistry(self.session_factory, self._scope)
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set up an application, whose ``app.scoped_session`` becomes this object.

        At the end of each application context, the context's session is removed. The setting
        ``SQLALCHEMY_STRICT_REPORT`` has the effect that :meth:`.OptInTransactionMixin.init_app`
        describes.

        :param app: The application.
        :raises AssertionError: from Flask, if the application has handled a request already.
        """
        if app not in self._apps:
            app.teardown_appcontext(self._remove)
            atomic_requests_of(self, app)
            strict_report_of(app)
            self._apps.add(app)
        app.scoped_session = self  # type: ignore[attr-defined]  # pyright: ignore

    def _remove(self, exception: BaseException | None) -> None:
        self.remove()

    def _scope(self) -> AppContext:
        if not has_app_context():
            raise RuntimeError(
                "This session belongs to an application context, and there is none: put the code "
                "into `with app.app_context():`, or use a session of your own, "
                "`with session_factory() as session:`." + see("no-application-context")
            )
        context = current_app_context()
        if context.app not in self._apps:
            raise AttributeError(_not_initialised(context.app))
        return context

    def session_of_request(self) -> S:
        """Return the session of this application context, for the transaction of a request."""
        return self()


def _not_initialised(app: Flask) -> str:
    return (
        f"The application {app.name!r} has no scoped_session: call "
        "flask_scoped_session(session_factory, app), or init_app(app) of one that you have."
        + see("no-scoped-session")
    )


def _current_session() -> flask_scoped_session[Any]:
    if not current_app:
        raise RuntimeError(
            "current_session belongs to an application context, and there is none: put the code "
            "into `with app.app_context():`." + see("no-application-context")
        )
    session: flask_scoped_session[Any] | None = getattr(current_app, "scoped_session", None)
    if session is None:
        raise AttributeError(_not_initialised(current_app))
    return session


current_session: flask_scoped_session[Any] = LocalProxy(_current_session)  # type: ignore[assignment]  # pyright: ignore
"""The :class:`flask_scoped_session` of the current application.

:raises RuntimeError: at any use outside of an application context.
:raises AttributeError: at any use if the application has no :class:`flask_scoped_session`.
"""
