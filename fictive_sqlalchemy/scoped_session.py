"""SQLAlchemy's ``scoped_session``, with the methods that ``OptInSession`` adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.orm import Session, SessionTransaction, scoped_session, sessionmaker

from ._core.atomic import HasAtomic
from ._core.callbacks import Callback
from ._core.errors import see
from ._core.local_settings import Settings, SettingsFunction, check_source
from ._core.options import BeginOptions, given_options
from ._core.session import OptInSession

if TYPE_CHECKING:
    from typing_extensions import Unpack

S = TypeVar("S", bound=Session)


class OptInScopedSession(HasAtomic, scoped_session[S]):
    """A ``scoped_session`` with the methods that :class:`OptInSession` adds.

    The additional methods need a factory of :class:`OptInSession`. With another factory, those
    that need an :class:`OptInSession` raise ``TypeError``.
    """

    def begin(self, nested: bool = False, **options: Unpack[BeginOptions]) -> SessionTransaction:
        """Begin a transaction: see :meth:`OptInSession.begin`."""
        session = self()
        if not options or not given_options("begin()", options):
            return session.begin(nested)
        what = "isolation_level=, read_only=, deferrable= and timeout= are options"
        return _opt_in(session, what).begin(nested, **options)

    def atomic_session(self) -> OptInSession:
        return _opt_in(self(), "atomic() is a method")

    def in_transaction(self) -> bool:
        """Tell whether a transaction is open: see :meth:`OptInSession.in_transaction`.

        SQLAlchemy's ``scoped_session`` lacks this method and the next three. All four work with
        every session.
        """
        return self().in_transaction()

    def in_nested_transaction(self) -> bool:
        """Tell whether a savepoint is open, as ``Session.in_nested_transaction()`` does."""
        return self().in_nested_transaction()

    def get_transaction(self) -> SessionTransaction | None:
        """Return the outermost transaction: see :meth:`OptInSession.get_transaction`."""
        return self().get_transaction()

    def get_nested_transaction(self) -> SessionTransaction | None:
        """Return the innermost savepoint, as ``Session.get_nested_transaction()`` does."""
        return self().get_nested_transaction()

    def set_rollback(self) -> None:
        """Ask for a rollback at the end of the block: see :meth:`OptInSession.set_rollback`."""
        _opt_in(self(), "set_rollback() is a method").set_rollback()

    def on_commit(self, function: Callback) -> None:
        """Call a function after the commit: see :meth:`OptInSession.on_commit`."""
        _opt_in(self(), "on_commit() is a method").on_commit(function)

    def on_rollback(self, function: Callback) -> None:
        """Call a function after a rollback: see :meth:`OptInSession.on_rollback`."""
        _opt_in(self(), "on_rollback() is a method").on_rollback(function)

    def read_from_primary(self) -> None:
        """Send all reads to the primary: see :meth:`OptInSession.read_from_primary`."""
        _opt_in(self(), "read_from_primary() is a method").read_from_primary()

    def set_local(self, settings: Settings) -> None:
        """Send settings with each statement: see :meth:`OptInSession.set_local`."""
        _opt_in(self(), "set_local() is a method").set_local(settings)

    def local_settings(self, function: SettingsFunction) -> SettingsFunction:
        """Use a function as the source of the settings of each session; a decorator.

        The function becomes the parameter ``local_settings`` of each :class:`OptInSession`.

        :param function: A function without parameters.
        :returns: The function.
        :raises sqlalchemy.exc.ArgumentError: if the function can't be called or is async, or if the
            session factory is no ``sessionmaker`` of :class:`OptInSession`.
        """
        check_source(function)
        factory: Any = self.session_factory
        made: Any = getattr(factory, "class_", object)
        if not isinstance(factory, sessionmaker) or not issubclass(made, OptInSession):
            raise exc.ArgumentError(
                "local_settings() needs a session factory that is a sessionmaker of OptInSession; "
                "with a function as the factory, call set_local() of each session that it returns."
                + see("local-settings-function")
            )
        factory.configure(local_settings=function)
        return function

    def remove(self) -> None:
        """Close the session of the scope, and forget it, as SQLAlchemy does.

        :raises sqlalchemy.exc.InvalidRequestError: inside a block. The transaction of the block is
            rolled back. Without the error, a new session would store the rest of the block alone.
        """
        is_inside = is_open = False
        if self.registry.has():
            session = self.registry()
            is_inside = isinstance(session, OptInSession) and session.entered is not None
            is_open = is_inside and session.in_transaction()
            session.close()
        # The error may be lost: Python ignores it if a stream is garbage-collected, at which Flask
        # calls its teardown functions. So, if a transaction was open, the scope keeps the session,
        # which refuses the rest of the block. A second call forgets the session.
        if not is_open:
            self.registry.clear()
        if is_inside:
            raise exc.InvalidRequestError(
                "remove() inside a transaction: the transaction is rolled back, and nothing of it "
                "is stored. Leave the block first. In a request that is one transaction, leave "
                "remove() out: the session is closed at the end of the request."
                + see("remove-in-block")
            )

    def give_back(self) -> None:
        """Give connections back to the pool: see :meth:`OptInSession.give_back`."""
        _opt_in(self(), "give_back() is a method").give_back()


def _opt_in(session: Session, what: str) -> OptInSession:
    if not isinstance(session, OptInSession):
        raise TypeError(
            f"{what} of OptInSession, and this is a {type(session).__name__}: make the "
            "factory with sessionmaker(…, class_=OptInSession)." + see("session-class")
        )
    return session
