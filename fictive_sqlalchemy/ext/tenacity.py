"""Transactions that tenacity runs again after a serialization failure or a deadlock.

::

    from fictive_sqlalchemy.ext.tenacity import retry_transaction

    @retry_transaction(db.session, isolation_level="SERIALIZABLE")
    def transfer(sender_id, receiver_id, amount):
        sender = db.session.get_one(Account, sender_id)
        receiver = db.session.get_one(Account, receiver_id)
        sender.balance -= amount
        receiver.balance += amount
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast, overload

from sqlalchemy import exc
from sqlalchemy.orm import Session, SessionTransactionOrigin, scoped_session, sessionmaker

from .._core.atomic import Atomic
from .._core.blocks import OptInSessionTransaction
from .._core.errors import CommitOutcomeUnknown, see, sqlstate
from .._core.functions import check_function, finished
from .._core.options import BeginOptions, given_options
from .._core.session import OptInSession
from .._extras import installed_by

with installed_by("this package with the extra [retry]"):
    from tenacity import (
        RetryCallState,
        Retrying,
        retry_if_exception,
        stop_after_attempt,
        wait_random_exponential,
    )

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["is_serialization_failure", "retry_transaction"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=OptInSession)

_NAME = "retry_transaction()"


@overload
def retry_transaction(
    session: sessionmaker[S],
    *,
    tries: int = 10,
    **options: Unpack[BeginOptions],
) -> Callable[[Callable[Concatenate[S, P], R]], Callable[P, R]]: ...


@overload
def retry_transaction(
    session: OptInSession | scoped_session[Any],
    *,
    tries: int = 10,
    **options: Unpack[BeginOptions],
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def retry_transaction(
    session: Any,
    *,
    tries: int = 10,
    **options: Unpack[BeginOptions],
) -> Any:
    """Make each call of a function a transaction, which is run again after a conflict.

    The transaction is run again after a serialization failure or a deadlock, SQLSTATE 40001 and
    40P01. PostgreSQL says that the whole transaction then has to be run again, including the code
    that decides what is written:
    https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
    The transaction is not run again after another error, nor once it is committed.

    Between two tries, the call waits for a random time: up to 10 ms at first, then up to twice as
    long each time, and 1 s at most. In each try, objects that were loaded before are read again at
    their next use. Functions of ``on_commit()`` are called only for the try that was committed.

    The decorated function has an attribute ``retry``, the ``tenacity.Retrying`` that controls its
    tries. To change the waits, write ``transfer.retry.wait = wait_none()``. ``sleep``, ``stop`` and
    ``before_sleep`` can be changed in the same way.

    :param session: The session, a ``scoped_session`` such as ``db.session``, or a
        ``sessionmaker``. With a ``sessionmaker``, each try has a new session, which the function
        gets as its first argument.
    :param tries: How often the transaction is run at most.
    :param options: ``isolation_level``, ``read_only``, ``deferrable`` and ``timeout``, as
        :meth:`.OptInSession.begin` takes them.
    :returns: A decorator. If all tries fail, the function raises the last error, which tells the
        number of tries. If a transaction is open already, or if the session has pending changes,
        which a rollback would lose, the function raises ``sqlalchemy.exc.InvalidRequestError``. If
        an argument can be read only once, such as a generator or an open file, the function raises
        ``TypeError``.
    :raises TypeError: if ``session`` can't be one of these, if an option is unknown, or, from the
        decorator, if the function is no plain function. If ``session`` is a callable that returns
        something else, the decorated function raises this error.
    :raises ValueError: if ``tries`` is no number, or is less than 1.
    """
    if not (issubclass(type(session), Session) or callable(session)):
        raise _no_session(session)
    if inspect.isroutine(session):
        raise TypeError(
            f"{_NAME} needs the session first: write @retry_transaction(db.session)."
            + see("retry-session")
        )
    given: Any = tries
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(
            f"tries is the largest number of attempts, at least 1, and not {tries!r}."
            + see("retry-arguments")
        )
    given_options(_NAME, options)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        check_function(function, _NAME)
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{_NAME} does not decorate async functions, which it would have to wait for: put "
                "the transaction into a plain function, and call that, as with "
                "asyncio.to_thread()." + see("retry-arguments")
            )
        retrying = Retrying(
            stop=stop_after_attempt(tries),
            wait=wait_random_exponential(multiplier=0.01, max=1),
            retry_error_callback=_give_up,
        )

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            _refuse_iterators(enumerate(args, 1), kwargs.items())
            tried = _Tried()

            @wraps(function)
            def once() -> Any:
                with _session(session) as (own, given), tried.transaction(own, options):
                    return finished(function(*given, *args, **kwargs), function, _NAME)

            return retrying.copy(retry=retry_if_exception(tried.may_be_repeated))(once)

        call.retry = retrying  # type: ignore[attr-defined]  # pyright: ignore
        return call

    return decorate


def is_serialization_failure(error: BaseException) -> bool:
    """Tell whether the transaction should be run again after an error: SQLSTATE 40001 or 40P01.

    :param error: The error.
    """
    if not isinstance(error, exc.DBAPIError) or isinstance(error, CommitOutcomeUnknown):
        return False
    return sqlstate(error) in ("40001", "40P01")


class _Tried:
    """The state of the last try of one call."""

    def __init__(self) -> None:
        self._may_be_stored = False
        self._block: OptInSessionTransaction | None = None

    @contextmanager
    def transaction(self, session: OptInSession, options: BeginOptions) -> Generator[None]:
        """Begin and end the transaction of one try."""
        self._may_be_stored, self._block = False, None
        _refuse_what_is_open(session)
        session.expire_all()  # or the function would decide by values that were read before
        with Atomic(lambda: session, durable=True, **options) as block:
            assert isinstance(block, OptInSessionTransaction)
            self._block = block
            session.on_commit(self._is_committed)
            yield
            if block.is_active and block.roll_back_only is None:
                session.flush()
                # One COMMIT is sent after the other: the first may be done when the second fails.
                self._may_be_stored = len(block.begun_on) > 1 and not session.twophase

    def _is_committed(self) -> None:
        self._may_be_stored = True

    def may_be_repeated(self, error: BaseException) -> bool:
        """Tell whether an error of the last try asks for another one."""
        is_stored = self._may_be_stored or (self._block is not None and self._block.stored_on > 0)
        return not is_stored and is_serialization_failure(error)


def _refuse_iterators(*arguments: Iterable[tuple[object, Any]]) -> None:
    """Refuse arguments that the first try would use up: the second would store too little."""
    for name, argument in chain(*arguments):
        # __class__ of a proxy is the class of its object. The class of the proxy itself, such as
        # that of Flask-Login's current_user, has the methods of all kinds of objects.
        kind: type[Any] = argument.__class__
        if issubclass(kind, (Iterator, AsyncIterator)):
            which = f"{name}=" if isinstance(name, str) else f"number {name}"
            raise TypeError(
                f"{_NAME} may run the function several times, and the argument {which} is a "
                f"{cast(Any, kind).__name__}, which can be read once: give it a list, or make the "
                "iterator inside the function. Nothing was sent." + see("retry-iterators")
            )


def _refuse_what_is_open(session: OptInSession) -> None:
    around = session.get_nested_transaction() or session.get_transaction()
    if around is not None and around.origin is not SessionTransactionOrigin.AUTOBEGIN:
        raise exc.InvalidRequestError(
            f"{_NAME} has to be outermost, because all of a transaction is run again, and a "
            "transaction is open: call the function outside that transaction." + see("retry-inside")
        )
    if session.new or session.deleted or any(map(session.is_modified, session.dirty)):
        raise exc.InvalidRequestError(
            f"The session has pending changes from before {_NAME}, which the first try that fails "
            "would discard: make these changes inside the function, or call commit() before it."
            + see("retry-pending-changes")
        )


@contextmanager
def _session(given: Any) -> Generator[tuple[OptInSession, tuple[OptInSession, ...]]]:
    """Yield the session of a try, and the arguments that the function gets for it."""
    if issubclass(type(given), sessionmaker):
        with given() as session:
            yield _checked(session), (session,)
    elif issubclass(type(given), Session):
        yield _checked(given), ()
    elif isinstance(given, scoped_session):  # true for a proxy of one, too
        yield _checked(given()), ()
    else:
        raise _no_session(given)


def _checked(session: Any) -> OptInSession:
    if not isinstance(session, OptInSession):
        raise TypeError(
            f"{_NAME} is for sessions of OptInSession, and this is a {type(session).__name__}: "
            "make it with sessionmaker(…, class_=OptInSession)." + see("retry-arguments")
        )
    return session


def _no_session(given: object) -> TypeError:
    return TypeError(
        f"{_NAME} takes a session, a scoped_session such as db.session, or a sessionmaker, not "
        f"a {type(given).__name__}." + see("retry-arguments")
    )


def _give_up(state: RetryCallState) -> NoReturn:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, exc.StatementError)
    error.add_detail(
        f"The transaction was tried {state.attempt_number} times." + see("retry-given-up")
    )
    raise error
