"""One transaction per request, committed or rolled back by the status of the response."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from inspect import unwrap
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from flask import Blueprint, Flask, Response, current_app, request
from flask.blueprints import BlueprintSetupState
from flask.ctx import RequestContext
from sqlalchemy import event, exc
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction, SessionTransactionOrigin

from ..._core import observing
from ..._core.blocks import Block
from ..._core.callbacks import after_end
from ..._core.errors import see
from ..._core.local_settings import begin_before_settings
from ..._core.places import Place
from ..._core.session import OptInSession
from ...owned import Owned, listen_once, listen_to_sessions
from ._private import before_handlers_of_500, come_first, current_request_context

NO_COMMIT = (
    "This request is one transaction, which commits by itself if the status of the response is "
    "below 400: leave commit() out. If the view has to commit on its own, put the decorator "
    "non_atomic_request on it. Nothing was committed." + see("commit-in-atomic-request")
)
LOST = (
    "Nothing of this request is stored: the request is one transaction, which was ended before the "
    "response, by close() or remove() of the session, or by rollback() in an atomic() or "
    "begin_nested() block. Leave that call out: the session is closed at the end of the request, "
    "and an error that leaves such a block rolls the block back." + see("atomic-request-ended")
)
ANOTHER = (
    "This request can't be a transaction of its own: it shares the application context, and so the "
    "session, of code that has begun a transaction. End that transaction first, or send the "
    "request outside of that code's `with app.app_context():`." + see("atomic-request-joined")
)

V = TypeVar("V", bound=Callable[..., Any])

WRITING_METHODS = ("POST", "PUT", "PATCH", "DELETE")

_EXTENSION = "fictive_sqlalchemy.atomic_requests"
_MARKS = "_fictive_atomic_request"
_WATCHED_BY = "fictive_sqlalchemy.request_transaction"


class AtomicRequestsMixin:
    """Gives an extension, or a scoped session, requests that are one transaction each."""

    def atomic_requests(
        self, app: Flask | Blueprint, methods: Collection[str] = WRITING_METHODS
    ) -> None:
        """Make each request with one of these methods one transaction::

            db.atomic_requests(app)

        The transaction begins before the first ``before_request`` function, and ends after the last
        ``after_request`` function. It is committed if the status of the response is below 400, and
        rolled back otherwise. BEGIN is sent with the first statement, so a request without a
        statement sends nothing. A request that is one INSERT or UPDATE sends that statement alone.
        If the commit fails, the application's error handlers get the exception, and their result is
        the response.

        Call this method again to add a blueprint, or more methods.

        :param app: The application, or a blueprint. A blueprint stands for its own views and for
            those of the blueprints in it.
        :param methods: The HTTP methods. ``"GET"`` includes HEAD, as in Flask.
        :raises AssertionError: from Flask, if the application has handled a request already, or the
            blueprint is registered already.
        :raises TypeError: if ``methods`` is a string, or ``app`` is neither.
        """
        if isinstance(methods, str):
            raise TypeError(
                f"methods is a list of strings, such as methods=[{methods!r}]."
                + see("atomic-request-arguments")
            )
        names = {method.upper() for method in methods}
        if "GET" in names:
            names.add("HEAD")
        if isinstance(app, Flask):
            atomic_requests_of(self, app).add(None, names)
        elif isinstance(app, Blueprint):  # pyright: ignore[reportUnnecessaryIsInstance]

            def register(state: BlueprintSetupState) -> None:
                assert isinstance(state.app, Flask)
                name = f"{state.name_prefix}.{state.name}".lstrip(".")
                atomic_requests_of(self, state.app).add(name, names)

            app.record(register)
        else:
            raise TypeError(
                f"atomic_requests() takes a Flask application or blueprint, not {app}."
                + see("atomic-request-arguments")
            )

    def atomic_request(self, view: V) -> V:
        """Mark a view whose requests are one transaction each, with any HTTP method::

            @app.get("/next-number")
            @db.atomic_request
            def next_number(): ...

        A marked view needs no :meth:`atomic_requests`.

        :param view: A function, a ``View`` class, or a method of a ``MethodView``. If there are
            several marks, that of the method counts before that of the class, and on one view the
            outermost mark counts.
        :returns: The view itself.
        :raises TypeError: if the object can't be marked, because it takes no attributes.
        """
        return _mark(self, view, True)

    def non_atomic_request(self, view: V) -> V:
        """Mark a view whose requests are not transactions::

            @app.post("/import")
            @db.non_atomic_request
            def import_rows(): ...

        :param view: As for :meth:`atomic_request`.
        :returns: The view itself.
        :raises TypeError: if the object can't be marked.
        """
        return _mark(self, view, False)

    def session_of_request(self) -> Session:
        """Return the session of this application context, for the transaction of a request."""
        raise NotImplementedError


def _mark(owner: object, view: V, atomic: bool) -> V:
    _watch_sessions()
    marks: dict[object, bool] = {**getattr(view, _MARKS, {}), owner: atomic}
    try:
        setattr(view, _MARKS, marks)
    except AttributeError:
        raise TypeError(
            f"{view!r} can't be marked: put the decorator where the view is defined, below "
            "@app.route(…) and above the others." + see("atomic-request-arguments")
        ) from None
    return view


def atomic_requests_of(owner: AtomicRequestsMixin, app: Flask) -> AtomicRequests:
    """Return the object that handles the requests of an application; make it if there is none."""
    by_owner: dict[object, AtomicRequests] = app.extensions.setdefault(_EXTENSION, {})
    if owner not in by_owner:
        by_owner[owner] = AtomicRequests(owner, app)
    return by_owner[owner]


class AtomicRequests:
    """Decides which requests of an application are a transaction, and begins and ends these.

    :param owner: The extension, or scoped session.
    :param app: The application.
    """

    def __init__(self, owner: AtomicRequestsMixin, app: Flask) -> None:
        self._owner = owner
        self._app = app
        self._methods: dict[str | None, set[str]] = {}
        self._open: WeakKeyDictionary[RequestContext, RequestTransaction] = WeakKeyDictionary()
        self._come_first()
        app.teardown_request(self.abandon)
        before_handlers_of_500(app, self.abandon)

    def add(self, blueprint: str | None, methods: set[str]) -> None:
        """Add methods for a blueprint, or for all of the application."""
        _watch_sessions()
        self._come_first()
        self._methods.setdefault(blueprint, set()).update(methods)

    def _come_first(self) -> None:
        """Run before all others of before_request, and after all others of after_request."""
        self._app.before_request(self.begin)
        self._app.after_request(self.end)
        come_first(self._app, self.begin, self.end)

    def _is_atomic(self) -> bool:
        view = self._app.view_functions.get(request.endpoint or "")
        view_class = getattr(view, "view_class", None)
        marked: list[Any] = [view, view_class]
        if view_class is not None:
            name = request.method.lower()
            if name == "head" and not hasattr(view_class, name):
                name = "get"  # as MethodView does
            marked[:0] = [getattr(view_class, each, None) for each in (name, "dispatch_request")]
        for each in marked:
            mark: bool | None = getattr(each, _MARKS, {}).get(self._owner)
            if mark is not None:
                return mark
        method = request.method
        return method in self._methods.get(None, ()) or (
            any(method in self._methods.get(name, ()) for name in request.blueprints)
        )

    # What Flask calls

    def begin(self) -> None:
        """Begin the transaction of the request, if the request is to be a transaction."""
        if self._is_atomic():
            self._open[current_request_context()] = RequestTransaction(
                self._owner.session_of_request()
            )

    def end(self, response: Response) -> Response:
        """Commit or roll back before the response is sent."""
        transaction = self._open.pop(current_request_context(), None)
        if transaction is None:
            return response
        if response.status_code >= 400:
            transaction.roll_back()
            return response
        try:
            transaction.commit()
        except Exception as error:
            page = self._app.make_response(self._app.handle_user_exception(error))
            response.close()  # this response is not sent
            page = self._app.process_response(page)
            # Flask saves its session once more after this, and would set the cookie twice.
            cookie = self._app.session_interface.get_cookie_name(self._app)
            cookies = page.headers.getlist("Set-Cookie")
            page.headers.setlist(
                "Set-Cookie", [one for one in cookies if not one.startswith(f"{cookie}=")]
            )
            return page
        return response

    def abandon(self, exception: BaseException | None = None) -> None:
        """Roll back if no error handler has taken an exception, so handlers of 500 run outside.

        Flask also calls this method at the end of each request, which may have had no response.
        """
        transaction = self._open.pop(current_request_context(), None)
        if transaction is not None:
            transaction.roll_back(only_log=True)


class RequestTransaction:
    """The transaction of one request, which only the request may end.

    :param session: The session, which is watched until the end. ``commit()`` is refused. After
        ``rollback()``, the request goes on in a new transaction.
    :raises sqlalchemy.exc.InvalidRequestError: if a transaction was begun on the session already.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._current = _entered(_begun_for_request(session))
        if observing.recorder is not None:  # name the view, and not Flask's line that calls this
            self._current.opened_at = _place_of_view()  # type: ignore[attr-defined]
        self._is_lost = False
        self._owned = Owned(session, self._current, NO_COMMIT)
        self._owned.__enter__()
        session.info[_WATCHED_BY] = self

    # What the session's events call (see the end of this module)

    def note_end(self, transaction: SessionTransaction) -> None:
        """Note that nothing can be stored any more, unless rollback() has ended the transaction."""
        if transaction is self._current:
            self._is_lost = True
            self._owned.refusal = LOST
            # On an OptInSession, a later statement would be stored on its own.
            event.listen(self._session, "do_orm_execute", _refuse_statement)

    def go_on_after_rollback(self, transaction: SessionTransaction) -> None:
        """Begin another transaction for the rest of the request, after a ``rollback()``."""
        if transaction is self._current and not self._is_in_a_block():
            self._leave()
            self._current = _entered(begin_before_settings(self._session))
            self._owned.go_on_in(self._current)
            self._owned.refusal = NO_COMMIT
            self._is_lost = False
            event.remove(self._session, "do_orm_execute", _refuse_statement)

    def _is_in_a_block(self) -> bool:
        """Tell whether ``rollback()`` came in a ``begin_nested()`` block, which can't go on."""
        session = self._session
        return isinstance(session, OptInSession) and session.entered is not self._current

    def _leave(self) -> None:
        if isinstance(self._current, Block):
            self._current.leave(cast(OptInSession, self._session))

    # The end

    def commit(self) -> None:
        """Commit the transaction.

        :raises Exception: if COMMIT fails. Nothing is stored, except perhaps after
            ``CommitOutcomeUnknown``.
        :raises sqlalchemy.exc.InvalidRequestError: if the transaction was ended before.
        :raises sqlalchemy.exc.PendingRollbackError: if a statement failed, and the error was
            caught. PostgreSQL would roll back at COMMIT without an error:
            https://www.postgresql.org/docs/current/sql-commit.html
        """
        self._stop_watching()
        try:
            if self._is_lost:
                raise exc.InvalidRequestError(LOST)
            self._owned.check_not_aborted()
            if isinstance(self._current, Block) and self._current.roll_back_only == "":
                self._roll_back()  # set_rollback() asked for it
            else:
                self._session.commit()
        except BaseException:
            self._roll_back(only_log=True)
            raise

    def roll_back(self, *, only_log: bool = False) -> None:
        """Roll back the transaction.

        :param only_log: Whether errors of callbacks are only logged, because another error is being
            raised.
        """
        self._stop_watching()
        self._roll_back(only_log=only_log)

    def _roll_back(self, *, only_log: bool = False) -> None:
        session = self._session
        after: AbstractContextManager[None] = nullcontext()
        if isinstance(session, OptInSession):
            after = after_end(session, only_log=only_log)
        with after:
            try:
                session.rollback()
            except exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise  # if the connection is lost, the server has rolled back

    def _stop_watching(self) -> None:
        self._leave()
        self._owned.leave()
        del self._session.info[_WATCHED_BY]
        if self._is_lost:
            event.remove(self._session, "do_orm_execute", _refuse_statement)


def _entered(transaction: SessionTransaction) -> SessionTransaction:
    """Enter a transaction as ``with`` would, so that its session refuses to go on after its end."""
    if isinstance(transaction, Block):
        transaction.__enter__()
        transaction.entered_in = None  # Flask may run an async view in a thread of its own
    return transaction


def _place_of_view() -> Place | None:
    """Return the place in the code of the view whose request is one transaction."""
    view = current_app.view_functions.get(request.endpoint or "")
    code = getattr(unwrap(view), "__code__", None) if view is not None else None
    if code is None:
        return None
    return Place(code.co_filename, code.co_firstlineno, code.co_name, "atomic_requests")


def _begun_for_request(session: Session) -> SessionTransaction:
    transaction = session.get_transaction()
    if transaction is None:
        return begin_before_settings(session)
    if transaction.origin is SessionTransactionOrigin.BEGIN:
        raise exc.InvalidRequestError(ANOTHER)
    if isinstance(session, OptInSession):
        return session.begin()  # this raises an error that says why
    return transaction  # stock SQLAlchemy has begun the transaction by itself, with a read


def _refuse_statement(execution: ORMExecuteState) -> None:
    raise exc.InvalidRequestError(LOST)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if watched_by := _watched_by(session):
        watched_by.note_end(transaction)


def _after_soft_rollback(session: Session, previous_transaction: SessionTransaction) -> None:
    if watched_by := _watched_by(session):
        watched_by.go_on_after_rollback(previous_transaction)


def _watched_by(session: Session) -> RequestTransaction | None:
    return session.info.get(_WATCHED_BY)


def _watch_sessions() -> None:
    """Listen to the events of all sessions, once a request is to be a transaction."""
    listen_to_sessions()
    listen_once("after_transaction_end", _after_transaction_end)
    listen_once("after_soft_rollback", _after_soft_rollback)
