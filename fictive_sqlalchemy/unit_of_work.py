"""A unit of work: a session for one block or call, which is committed as a whole or not at all.

Units of work are for code outside of views: the services, commands and scripts of an application.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from sqlalchemy import exc
from sqlalchemy.orm import (
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    scoped_session,
    sessionmaker,
)

from ._core.errors import NOTHING_STORED, see
from ._core.flow import here
from ._core.functions import check_function, finished
from ._core.local_settings import Settings, check_source, checked
from ._core.observing import reported
from ._core.places import calling_place
from ._core.session import OptInSession
from .owned import Owned

S = TypeVar("S", bound=Session)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_NAME = "unit_of_work()"

_NO_COMMIT = (
    "A unit of work commits at its end, as a whole: leave session.commit() out. Use "
    "session.flush() to send pending changes." + see("commit-in-unit-of-work")
)


class unit_of_work(Generic[S]):
    """A block or function that commits as a whole or rolls back, and then closes its session::

        Session = sessionmaker(engine, class_=OptInSession)

        with unit_of_work(Session) as session:
            session.add(User(email="ada@example.com"))

        @unit_of_work(Session)
        def rename(session: OptInSession, user_id: int, name: str) -> None:
            session.get_one(User, user_id).name = name

        rename(1, "Ada")

    The block is one transaction, as with ``session.begin()``: BEGIN is sent with the first
    statement, and COMMIT or ROLLBACK at the end. A block that is one INSERT or UPDATE sends that
    statement alone. The block commits if it is left without an exception, even by ``return`` or
    ``break``. Each exception rolls back, ``KeyboardInterrupt`` and ``SystemExit`` included. Then
    the session is closed, unless the caller has passed it, a ``scoped_session`` had it before, or
    the factory returned it with an open transaction.

    A block inside another block of the same factory joins the other block: it gets the same
    session, and is a savepoint, to which an exception rolls back. The outermost block commits. Each
    thread, asyncio task and greenlet has units of its own.

    A function with a parameter ``session``, at any position, gets the session as this argument.
    Callers leave the argument out, or pass a session of their own as ``session=…``. The call is
    then a transaction on that session, or a savepoint if a transaction is open.

    :param session_factory: A ``sessionmaker``, a ``scoped_session`` such as ``db.session``, or
        any callable that returns a session.
    :param settings: Settings that are sent with the session's statements, as with
        :meth:`.OptInSession.set_local`, or a function without parameters that returns the settings.
        The function is called at the start of each unit. A unit inside another unit may give the
        same settings again. If it gives others, its start raises
        ``sqlalchemy.exc.InvalidRequestError``.
    :raises TypeError: if ``session_factory`` is no factory of sessions, or, at the start of a unit,
        if there are settings and the session is no :class:`.OptInSession`.
    :raises sqlalchemy.exc.ArgumentError: if a setting has a name or value that is not allowed.
    """

    def __init__(
        self,
        session_factory: Callable[[], S],
        *,
        settings: Settings | Callable[[], Settings | None] | None = None,
    ) -> None:
        if isinstance(session_factory, Session) or not callable(session_factory):
            raise TypeError(
                f"unit_of_work() takes a session factory, such as a sessionmaker or db.session, "
                f"not {_a(session_factory)}." + see("unit-of-work-factory")
            )
        if inspect.isfunction(session_factory) and _needs_arguments(session_factory):
            raise TypeError(
                f"{session_factory.__name__}() needs arguments, so it makes no sessions. To "
                "decorate it, name the factory: write @unit_of_work(Session)."
                + see("decorator-arguments")
            )
        if callable(settings):
            check_source(settings)
        elif settings is not None:
            checked(settings, _NAME)
        self._factory = session_factory
        self._settings = settings
        self._uses = itertools.count()
        self._block: AbstractContextManager[S]

    def __enter__(self) -> S:
        """Begin a unit of work, or join the block around this block.

        :raises sqlalchemy.exc.InvalidRequestError: if this object was used for a block before, or
            if SQLAlchemy has begun a transaction by itself on the session before the block.
        :raises TypeError: if what the factory returned is no session.
        """
        if next(self._uses):  # in one step: threads may share the object
            raise exc.InvalidRequestError(
                "A unit_of_work() object can be used for one block only: write "
                "`with unit_of_work(session_factory) as session:` each time."
                + see("unit-of-work-used-twice")
            )
        self._block = _block(self._factory, settings=self._settings)
        return self._block.__enter__()

    def __exit__(
        self,
        type_: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or roll back on an exception, and close the session.

        :raises sqlalchemy.exc.InvalidRequestError: if blocks did not end in the order of their
            nesting, or if the transaction was ended inside the block. Nothing of it is stored.
        :raises Exception: if COMMIT fails. Nothing of the block is stored, except perhaps after
            :class:`.CommitOutcomeUnknown`.
        """
        self._block.__exit__(type_, value, traceback)

    @overload
    def __call__(self, function: Callable[Concatenate[S, P], R]) -> Callable[P, R]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[T, S, P], R]
    ) -> Callable[Concatenate[T, P], R]: ...

    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Make each call of a function a unit of work.

        :param function: A plain function or method.
        :returns: The function, whose callers need not pass a ``session``.
        :raises TypeError: if the function is async or a generator, which runs after the call.
        """
        _check_function(function)
        factory, settings = self._factory, self._settings
        signature = inspect.signature(function)
        parameter = signature.parameters.get("session")
        if parameter is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):

            @wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                with _block(factory, settings=settings):
                    return finished(function(*args, **kwargs), function, _NAME)

            return call

        by_name = parameter.kind is parameter.KEYWORD_ONLY
        place = list(signature.parameters).index("session")

        @wraps(function)
        def call_with_session(*args: Any, **kwargs: Any) -> Any:
            with _block(factory, kwargs.pop("session", None), settings) as session:
                if by_name or len(args) < place:
                    result: Any = function(*args, **kwargs, session=session)
                else:
                    result = function(*args[:place], session, *args[place:], **kwargs)
                return finished(result, function, _NAME)

        call_with_session.__signature__ = _without_session(signature)  # type: ignore[attr-defined]
        return call_with_session


class _Unit:
    """An outermost block, and the blocks that have joined it."""

    def __init__(
        self,
        factory: Callable[[], Any],
        scope: scoped_session[Any] | None,
        session: Session,
        is_ours: bool,
    ) -> None:
        self.factory = factory
        self.scope = scope
        self.session = session
        self.is_ours = is_ours
        self.flow = here()
        self.is_ending = False
        self.has_ended = False
        self.transactions: list[SessionTransaction] = []
        """The transaction of the outermost block, and the savepoints of the blocks in it."""

    def is_open(self) -> bool:
        """Tell whether the outermost block has not ended yet."""
        # Either of these tells that the block has ended. An exception from a signal handler may
        # prevent the note of the other.
        if self.has_ended or not self.transactions:
            return False
        # Callbacks after the end of the transaction are not part of the block.
        return self.transactions[0].is_active or not self.is_ending

    def begin(self) -> SessionTransaction:
        """Begin the transaction of a block."""
        if self.transactions:
            self.check_active(self.transactions[-1])
        if self.session.in_transaction():
            return self.session.begin_nested()
        return self.session.begin()

    @contextmanager
    def with_settings(self, settings: dict[str, str | None] | None) -> Generator[None]:
        """Have the statements of the session carry settings in this block, and not after it."""
        if settings is None:
            yield
            return
        session = self._own_session()
        own = session.local_settings
        before: Mapping[str, str | None] = {} if own is None else own.by_hand
        session.set_local(settings)
        own = session.local_settings
        try:
            yield
        finally:
            if own is not None and session.local_settings is own:  # the session was not closed
                own.restore(before)

    def check_settings(self, settings: dict[str, str | None]) -> None:
        """Refuse different settings for a block that joins this unit.

        :raises sqlalchemy.exc.InvalidRequestError: if a setting has another value in this unit.
        """
        session = self._own_session()
        session.ask_for_settings()
        own = session.local_settings
        values = {} if own is None else own.values
        for name, value in settings.items():
            if values.get(name) != value:
                raise exc.InvalidRequestError(
                    f"This unit of work joins the one around it, which has another value for "
                    f"{name}: both are one transaction. Give the setting to the outermost one, or "
                    "call session.set_local() in the block." + see("settings-of-unit-of-work")
                )

    def _own_session(self) -> OptInSession:
        if not isinstance(self.session, OptInSession):
            raise TypeError(
                f"The settings of unit_of_work() need an OptInSession, and this is a "
                f"{type(self.session).__name__}: make the factory with "
                "sessionmaker(…, class_=OptInSession)." + see("settings-of-unit-of-work")
            )
        return self.session

    def check_end(self, transaction: SessionTransaction) -> None:
        """Refuse to commit if a block ends out of order, in another thread, or after a rollback."""
        if self.has_ended or transaction is not self.transactions[-1]:
            raise exc.InvalidRequestError(
                "The blocks of a unit of work end in the order in which they are nested, and this "
                "one did not. Nothing of them is stored. A generator that yields inside such a "
                "block keeps it open: let it yield after the block." + see("unit-of-work-order")
            )
        if self.flow != here():
            raise exc.InvalidRequestError(
                "A unit of work ends in the thread, asyncio task and greenlet in which it began, "
                "and this one did not. Nothing of it is stored." + see("unit-of-work-order")
            )
        self.check_active(transaction)

    def check_active(self, transaction: SessionTransaction) -> None:
        """Refuse to go on with a transaction that has ended, or whose flush has failed."""
        if transaction.is_active:
            return
        if transaction in (self.session.get_nested_transaction(), self.session.get_transaction()):
            raise exc.PendingRollbackError(NOTHING_STORED)
        raise exc.InvalidRequestError(
            "The transaction of this unit of work was ended inside it, by rollback(), close() or "
            "remove(), and nothing of it is stored: leave these calls out. The end of the "
            "block closes the session, and rolls back if an exception leaves the block; "
            "session.set_rollback() rolls back without an exception." + see("unit-of-work-ended")
        )

    def close(self) -> None:
        """Close the session, if it was made for this unit."""
        if not self.is_ours:
            if isinstance(self.session, OptInSession):
                self.session.give_back()  # objects stay attached to it
            return
        try:
            self.session.close()
        finally:
            if self.scope is not None and self.is_in_scope():
                self.scope.registry.clear()  # not remove(), which raises an error inside a block

    def is_in_scope(self) -> bool:
        """Tell whether the scope still has the session, if the session came from a scope."""
        if self.scope is None:
            return True
        try:
            return self.scope.registry.has() and self.scope() is self.session
        except RuntimeError:  # there is no scope, such as Flask's application context
            return False


_units: ContextVar[tuple[_Unit, ...]] = ContextVar("units of work", default=())


@contextmanager
def _block(
    factory: Callable[[], S],
    given: object = None,
    settings: Settings | Callable[[], Settings | None] | None = None,
) -> Generator[S]:
    # This is a generator function, because a generator that is garbage-collected rolls back: so a
    # block does if it is never ended, or if its end is interrupted at once.
    asked = settings() if callable(settings) else settings
    own = None if asked is None else checked(asked, _NAME)
    unit = _unit_to_join(factory, given)
    if unit is not None:
        if own is not None:
            unit.check_settings(own)
        with _begun(unit):
            yield unit.session  # type: ignore[misc]  # the factory is the same
        return
    unit = _make_unit(factory, given)
    with reported(_name):
        try:
            _units.set((*filter(_Unit.is_open, _units.get()), unit))
            with unit.with_settings(own), _begun(unit):
                yield unit.session  # type: ignore[misc]  # it is the factory's, or the caller's
        finally:
            unit.has_ended = True
            try:
                _units.set(tuple(filter(_Unit.is_open, _units.get())))
            finally:
                unit.close()


def _name() -> str:
    place = calling_place()
    return f"{_NAME} in {place.filename}, line {place.line}, in {place.function}"


@contextmanager
def _begun(unit: _Unit) -> Generator[None]:
    transaction = unit.begin()
    unit.transactions.append(transaction)
    try:
        with transaction, Owned(unit.session, transaction, _NO_COMMIT) as owned:
            try:
                yield
                unit.check_end(transaction)
                owned.check_not_aborted()
            finally:
                unit.is_ending = True
    finally:
        unit.is_ending = False
        unit.transactions.remove(transaction)


def _unit_to_join(factory: Callable[[], Any], given: object) -> _Unit | None:
    """Return the innermost open unit of a factory in this thread, task and greenlet."""
    flow = None
    for unit in reversed(_units.get()):
        if not unit.is_open() or unit.factory != factory:
            continue
        flow = flow or here()
        if unit.flow != flow:
            continue  # another thread or task runs in a copy of the context
        if given is not None:
            if given is unit.session:
                return unit
            continue
        if unit.is_in_scope():
            return unit
        unit.check_active(unit.transactions[0])  # if it is active, this is another scope, inside
    return None


def _make_unit(factory: Callable[[], Any], given: object) -> _Unit:
    make: Any = factory
    scope: scoped_session[Any] | None = None
    is_ours = given is None
    if given is not None:
        session: Any = given
    elif _is_scoped(factory):
        scope = make
        is_ours = not make.registry.has()
        session = make()
    elif issubclass(type(factory), sessionmaker):
        session = make(close_resets_only=False)  # SQLAlchemy refuses to use it after its end
    else:
        session = make()
    if not issubclass(type(session), Session):  # isinstance() is true for proxies
        source = "session=… is" if given is not None else f"{factory!r} returned"
        raise TypeError(
            f"A unit of work needs a session of SQLAlchemy's, and {source} {_a(session)}."
            + see("unit-of-work-factory")
        )
    transaction = session.get_transaction()
    if transaction is None or transaction.origin is SessionTransactionOrigin.BEGIN:
        return _Unit(factory, scope, session, is_ours and transaction is None)
    if isinstance(session, OptInSession):
        session.begin()  # this raises an error that says why
    raise exc.InvalidRequestError(
        "SQLAlchemy has begun a transaction by itself on this session, at its first use, before "
        "the unit of work, which would commit that transaction, too. Call commit() or "
        "rollback() before, or make the session an OptInSession, whose reads begin nothing."
        + see("unit-of-work-on-used-session")
    )


def _is_scoped(factory: object) -> bool:
    return isinstance(factory, scoped_session)  # true for a proxy of one, too


def _check_function(function: Any) -> None:
    check_function(function, _NAME, "the session factory, as in @unit_of_work(Session)")
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            "unit_of_work() does not decorate async functions, which would need an AsyncSession. "
            "Put the code that needs the session into a plain function, and call that function."
            + see("unit-of-work-async")
        )


def _needs_arguments(function: Callable[..., Any]) -> bool:
    return any(
        parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    )


def _without_session(signature: inspect.Signature) -> inspect.Signature:
    kept = [one for one in signature.parameters.values() if one.name != "session"]
    return signature.replace(parameters=kept)


def _a(value: object) -> str:
    return f"an object of the type {type(value).__name__}"
