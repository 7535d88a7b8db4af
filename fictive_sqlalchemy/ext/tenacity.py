"""Transactions that are run again when PostgreSQL asks for that, with tenacity.

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
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from .._core.atomic import Atomic
from .._core.blocks import OptInSessionTransaction
from .._core.errors import CommitOutcomeUnknown, sqlstate
from .._core.functions import check_function, finished
from .._core.options import BeginOptions, given_options
from .._core.session import OptInSession

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
    """Make each call of a function a transaction, which is run again if others were in its way.

    That is a serialization failure or a deadlock, SQLSTATE 40001 and 40P01, of which PostgreSQL
    says that the whole transaction has to be run again, what it decides included:
    https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
    No other error is, and neither is anything once the transaction is committed.

    Between two tries it waits for a random time, of up to 10 ms at first, and up to twice as long
    each time, until that is 1 s. In each try objects that were loaded before are read again at
    their next use. Functions of ``on_commit()`` are called for the try that was committed.

    The function gets ``retry``, the ``tenacity.Retrying`` that it goes by, for who wants other
    waits: ``transfer.retry.wait = wait_none()``, and so for ``sleep``, ``stop`` and
    ``before_sleep``.

    :param session: The session, a ``scoped_session`` such as ``db.session``, or a
        ``sessionmaker``: then each try has a new session, which the function gets as its first
        argument.
    :param tries: How often it is run at most.
    :param options: ``isolation_level``, ``read_only`` and ``deferrable``, as
        :meth:`.OptInSession.begin` takes them.
    :returns: A decorator. The function raises the last error, which tells the number of tries.
        If a transaction is open already, or the session has changes waiting, which a rollback
        would forget, it raises ``sqlalchemy.exc.InvalidRequestError``. For an argument that can be
        read only once, such as a generator or an open file, it raises ``TypeError``.
    :raises TypeError: if the session is something else; by the decorator, for what is no plain
        function.
    :raises ValueError: if ``tries`` is less than 1.
    """
    if not (issubclass(type(session), Session) or callable(session)):
        raise _no_session(session)
    if inspect.isroutine(session):
        raise TypeError(f"{_NAME} needs the session first: write @retry_transaction(db.session).")
    if tries < 1:
        raise ValueError(f"tries is how often the transaction is run at most, and not {tries!r}.")
    given_options(_NAME, options)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        check_function(function, _NAME)
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{_NAME} does not decorate async functions, which it would have to wait for: put "
                "the transaction into a plain function, and call that, as with "
                "asyncio.to_thread()."
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
    """Tell whether an error asks to run the transaction again: SQLSTATE 40001 or 40P01.

    :param error: The error.
    """
    if not isinstance(error, exc.DBAPIError) or isinstance(error, CommitOutcomeUnknown):
        return False
    return sqlstate(error) in ("40001", "40P01")


class _Tried:
    """How far the last try of one call has come."""

    def __init__(self) -> None:
        self._may_be_stored = False
        self._block: OptInSessionTransaction | None = None

    @contextmanager
    def transaction(self, session: OptInSession, options: BeginOptions) -> Generator[None]:
        """The transaction of one try."""
        self._may_be_stored, self._block = False, None
        _refuse_what_is_open(session)
        session.expire_all()  # or it would decide by what was read before it
        with Atomic(lambda: session, durable=True, **options) as block:
            assert isinstance(block, OptInSessionTransaction)
            self._block = block
            session.on_commit(self._is_committed)
            yield
            if block.is_active and block.roll_back_only is None:
                session.flush()
                # One COMMIT after the other: the first may be done when the second fails.
                self._may_be_stored = len(block.begun_on) > 1 and not session.twophase

    def _is_committed(self) -> None:
        self._may_be_stored = True

    def may_be_repeated(self, error: BaseException) -> bool:
        """Tell whether an error of the last try asks for another one."""
        is_stored = self._may_be_stored or (self._block is not None and self._block.stored_on > 0)
        return not is_stored and is_serialization_failure(error)


def _refuse_iterators(*arguments: Iterable[tuple[object, Any]]) -> None:
    """Refuse what the first try would use up: the second would store nothing of it, and succeed."""
    for name, argument in chain(*arguments):
        # The class that it says it has: a proxy, such as Flask-Login's current_user, has the
        # methods of everything.
        kind: type[Any] = argument.__class__
        if issubclass(kind, (Iterator, AsyncIterator)):
            which = f"{name}=" if isinstance(name, str) else f"number {name}"
            raise TypeError(
                f"{_NAME} may run the function several times, and the argument {which} is a "
                f"{cast(Any, kind).__name__}, which can be read once: give it a list, or make the "
                "iterator inside the function. Nothing was sent."
            )


def _refuse_what_is_open(session: OptInSession) -> None:
    around = session.get_nested_transaction() or session.get_transaction()
    if around is not None and around.origin is not SessionTransactionOrigin.AUTOBEGIN:
        raise exc.InvalidRequestError(
            f"{_NAME} has to be outermost, because all of a transaction is run again, and one is "
            "open: call the function outside."
        )
    if session.new or session.deleted or any(map(session.is_modified, session.dirty)):
        raise exc.InvalidRequestError(
            f"The session has changes waiting that were made before {_NAME}, and would be lost "
            "with the first try that fails: make them inside the function, or commit() before."
        )


@contextmanager
def _session(given: Any) -> Generator[tuple[OptInSession, tuple[OptInSession, ...]]]:
    """Yield the session of a try, and what the function gets of it."""
    if issubclass(type(given), sessionmaker):
        with given() as session:
            yield _checked(session), (session,)
    elif issubclass(type(given), Session):
        yield _checked(given), ()
    elif isinstance(given, scoped_session):  # which a proxy of one is, too
        yield _checked(given()), ()
    else:
        raise _no_session(given)


def _checked(session: Any) -> OptInSession:
    if not isinstance(session, OptInSession):
        raise TypeError(
            f"{_NAME} is for sessions of OptInSession, and this is a {type(session).__name__}: "
            "make it with sessionmaker(…, class_=OptInSession)."
        )
    return session


def _no_session(given: object) -> TypeError:
    return TypeError(
        f"{_NAME} takes a session, a scoped_session such as db.session, or a sessionmaker, not "
        f"a {type(given).__name__}."
    )


def _give_up(state: RetryCallState) -> NoReturn:
    error = state.outcome and state.outcome.exception()
    assert isinstance(error, exc.StatementError)
    error.add_detail(f"The transaction was tried {state.attempt_number} times.")
    raise error
