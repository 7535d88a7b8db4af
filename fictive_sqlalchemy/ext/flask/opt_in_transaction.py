"""The mixin whose extension sends reads alone, and begins a transaction only when asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import sqlalchemy
from flask import Flask, has_app_context
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError

from ..._core.atomic import HasAtomic
from ..._core.create import engine_from_config
from ..._core.engine import OptInEngine
from ..._core.errors import see
from ..._core.local_settings import SettingsFunction
from ..._core.session import OptInSession
from ..._core.transactions import TRANSACTION_CONNECTIONS, TransactionConnections
from ...guarding import Guard
from ...scoped_session import OptInScopedSession
from ...testing import isolate
from ._private import current_app_context, record_queries_of
from .atomic_requests import AtomicRequestsMixin, atomic_requests_of
from .binds import BindSession
from .contexts import ContextRegistry
from .declarative import DeclarativeBaseMixin
from .open_transactions import add_command
from .request_reports import RequestReportsMixin
from .strict_report import strict_report_of


class Session(OptInSession, BindSession):
    """The class of ``db.session``: Flask-SQLAlchemy's session with transactions on request.

    The session finds the bind by the model's bind key. To customize the session, subclass this
    class and pass the subclass as ``session_options={"class_": …}``.
    """


class OptInTransactionMixin(
    HasAtomic, AtomicRequestsMixin, RequestReportsMixin, DeclarativeBaseMixin
):
    """Gives an extension transactions that you opt in to; put it before ``SQLAlchemy``::

        class Database(OptInTransactionMixin, SQLAlchemy): ...

    Reads are then sent alone, and ``with db.session.begin():`` is a transaction, on each bind
    whose backend is in :attr:`AUTOCOMMIT_DRIVERS`. Other binds are as Flask-SQLAlchemy makes them.
    """

    AUTOCOMMIT_DRIVERS: ClassVar[list[str]] = ["postgresql"]
    """The backends whose connections are in autocommit. A subclass may name any backend whose
    SQLAlchemy dialect offers AUTOCOMMIT."""

    TRANSACTION_CONNECTIONS: ClassVar[TransactionConnections] = TRANSACTION_CONNECTIONS
    """A live view: each open transaction and the connections it took out of autocommit."""

    _begins_on_write = False

    if TYPE_CHECKING:
        # What create_scoped_session() makes; Flask-SQLAlchemy declares its own.
        session: OptInScopedSession[Session]  # type: ignore[assignment]  # pyright: ignore

    def atomic_session(self) -> Session:
        return self.session()

    def set_rollback(self) -> None:
        """Ask for a rollback at the end of the innermost block, without an error.

        See :meth:`fictive_sqlalchemy.OptInSession.set_rollback`.
        """
        self.session.set_rollback()

    def on_commit(self, function: Callable[[], object]) -> None:
        """Call a function once the open transaction is committed; outside, call it at once.

        See :meth:`fictive_sqlalchemy.OptInSession.on_commit`.
        """
        self.session.on_commit(function)

    def local_settings(self, function: SettingsFunction) -> SettingsFunction:
        """Use a function as the source of the settings of ``db.session``; a decorator::

            @db.local_settings
            def tenant():
                return {"app.tenant_id": g.tenant_id} if "tenant_id" in g else None

        In each request, command or task, the function is called before the first statement or
        ``begin()`` block of ``db.session``. If it returns ``None``, it is called again before the
        next one. After it has returned settings, they are sent with the statements of the session:
        see :meth:`fictive_sqlalchemy.OptInSession.set_local`. An atomic request calls the function
        before its first statement, and not before its transaction.

        :param function: A function without parameters that returns settings, or ``None``.
        :returns: The function.
        :raises sqlalchemy.exc.ArgumentError: if the function can't be called, or is async.
        """
        return self.session.local_settings(function)

    def guard_transactions(
        self,
        mode: Literal["raise", "log"],
        app: Flask | None = None,
        *,
        allow: Iterable[str] = (),
    ) -> Guard:
        """Refuse or log calls that may wait, while a transaction is open. Sends nothing.

        See :class:`fictive_sqlalchemy.guarding.Guard`.

        :param mode: ``"raise"`` or ``"log"``.
        :param app: The application; the current one if it is left out.
        :param allow: Hosts that may be called inside a transaction.
        :returns: The guard, which is started already. Its ``stop()`` stops it.
        :raises sqlalchemy.exc.ArgumentError: if an argument is not as :class:`.Guard` describes it.
        :raises RuntimeError: if ``app`` is left out outside an application context.
        """
        if app is None and not has_app_context():
            raise RuntimeError(
                "guard_transactions() needs an application: use it in an application context, or "
                "pass it: db.guard_transactions(mode, app)." + see("recording-arguments")
            )
        with nullcontext() if app is None else app.app_context():
            return Guard(mode, self, allow=allow).start()

    def on_rollback(self, function: Callable[[], object]) -> None:
        """Call a function if the open transaction or savepoint is rolled back.

        See :meth:`fictive_sqlalchemy.OptInSession.on_rollback`.
        """
        self.session.on_rollback(function)

    def create_engine(self, sa_url: str | URL, engine_opts: Mapping[str, Any]) -> Engine:
        """Create the engine of one bind. Sends nothing.

        :param sa_url: The URL of the database.
        :param engine_opts: The options, as :func:`fictive_sqlalchemy.create_engine` takes them. An
            ``isolation_level`` is that of the transactions. If the ``session_options`` have
            ``begin_on_write=True``, the option holds for connections of ``db.engine``, too.
        :returns: An :class:`.OptInEngine` if the backend is in :attr:`AUTOCOMMIT_DRIVERS`, else
            an engine as SQLAlchemy makes it.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know the isolation level,
            if an option contradicts autocommit, or if the dialect does not offer AUTOCOMMIT.
        """
        options = {**engine_opts, "url": sa_url}
        if make_url(sa_url).get_backend_name() in self.AUTOCOMMIT_DRIVERS:
            if self._begins_on_write:
                options.setdefault("begin_on_write", True)
            return engine_from_config(options, prefix="")
        return sqlalchemy.engine_from_config(options, prefix="")

    def create_scoped_session(
        self, options: dict[str, Any] | None = None
    ) -> OptInScopedSession[Any]:
        """Create the scoped session that becomes ``db.session``.

        :param options: Flask-SQLAlchemy's ``session_options``. A ``class_`` among them is
            combined with :class:`.OptInSession`.
        """
        options = dict(options or {})
        self._begins_on_write = options.get("begin_on_write") is True
        class_ = options.get("class_", Session)
        bases = list(dict.fromkeys((OptInSession, class_, BindSession)))
        # A class is not needed if another of these classes is derived from it.
        needed = [base for base in bases if sum(issubclass(one, base) for one in bases) == 1]
        options["class_"] = (
            needed[0] if len(needed) == 1 else type(class_.__name__, tuple(needed), {})
        )
        is_scoped_by_us = "scopefunc" not in options
        stock = super()._session_of_extension(options)
        if not is_scoped_by_us:
            return OptInScopedSession(stock.session_factory, stock.registry.scopefunc)
        session = OptInScopedSession(stock.session_factory, current_app_context)
        session.registry = ContextRegistry(stock.session_factory, current_app_context)
        return session

    @contextmanager
    def test_isolation(
        self, app: Flask | None = None, *, bind_keys: Iterable[str | None] | None = None
    ) -> Generator[None]:
        """Undo all work at the end of the block; until then, the work seems committed::

            with db.test_isolation():
                with db.session.begin():
                    db.session.add(User(email="ada@example.com"))

            assert User.query.count() == 0

        The isolation covers sessions of any number of application contexts, requests of test
        clients and ``db.engine``, all of which behave as in production. For what is sent, and what
        can't be isolated, see :func:`fictive_sqlalchemy.testing.isolate`. Before the end, the
        session of the current application context is removed, if there is such a context.

        :param app: The application; the current one if it is left out.
        :param bind_keys: The bind keys of the engines to isolate; all engines if it is left out.
            The key of the default bind is ``None``.
        :returns: A context manager.
        :raises RuntimeError: if ``app`` is left out outside an application context.
        :raises sqlalchemy.exc.ArgumentError: if a bind's driver is not psycopg2 or psycopg, or if
            the application has no such bind key.
        :raises sqlalchemy.exc.InvalidRequestError: if a connection is in use, or, at the end, if
            something has committed for real.
        """
        if app is None and not has_app_context():
            raise RuntimeError(
                "test_isolation() needs an application: use it in an application context, or pass "
                "it: db.test_isolation(app)." + see("nothing-to-isolate")
            )
        with nullcontext() if app is None else app.app_context():
            engines = self.engines
        keys = list(engines) if bind_keys is None else list(bind_keys)
        if unknown := [key for key in keys if key not in engines]:
            raise ArgumentError(
                f"The application has no bind {unknown[0]!r}: its bind keys are "
                f"{', '.join(sorted(map(repr, engines)))}. To isolate all, leave bind_keys out."
                + see("nothing-to-isolate")
            )
        if has_app_context():
            self.session.give_back()
        with isolate(*(engines[key] for key in keys)):
            try:
                yield
            finally:
                if has_app_context():
                    self.session.remove()  # the rows of its objects are about to be undone

    def init_app(self, app: Flask) -> None:
        """Initialize an application as Flask-SQLAlchemy does. Sends nothing.

        If the setting ``SQLALCHEMY_STRICT_REPORT`` names a file, the places that behave differently
        in the strict mode are recorded in the file, and ``flask db-strict-report`` prints them: see
        :mod:`fictive_sqlalchemy.strict_report`. ``flask db-transactions`` prints the transactions
        that are open on the server.

        :param app: The application.
        """
        super().init_app(app)
        atomic_requests_of(self, app)
        strict_report_of(app)
        add_command(app)

    def session_of_request(self) -> Session:
        """Return the session of this application context, for the transaction of a request."""
        return self.session()

    def _session_of_extension(self, options: dict[str, Any]) -> OptInScopedSession[Any]:
        return self.create_scoped_session(options)

    def _engine_of_bind(self, bind_key: str | None, options: dict[str, Any], app: Flask) -> Engine:
        options = dict(options)
        config = cast("Mapping[str, Any]", app.config)
        if bind_key is not None and "replicas" in options:
            given: Any = config["SQLALCHEMY_BINDS"][bind_key]
            if not isinstance(given, Mapping) or "replicas" not in given:
                raise ArgumentError(
                    "The extension's engine_options are for every bind, and their replicas would "
                    f"be those of the bind {bind_key!r}, too: put those of the default bind into "
                    "SQLALCHEMY_ENGINE_OPTIONS, and those of others into SQLALCHEMY_BINDS = "
                    f"{{{bind_key!r}: {{'url': …, 'replicas': […]}}}}." + see("replica-options")
                )
        engine = self.create_engine(options.pop("url"), options)
        if isinstance(engine, OptInEngine) and config.get("SQLALCHEMY_RECORD_QUERIES"):
            for replica in engine.replicas:
                record_queries_of(replica)
        return engine
