"""``atomic()``: a transaction where there is none, a savepoint inside one."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from sqlalchemy import exc
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin

from .blocks import Block
from .functions import check_function, finished
from .options import BeginOptions, given_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

F = TypeVar("F", bound=Callable[..., Any])

_JOINED_FAILED = (
    "Nothing of this block was stored: an atomic(savepoint=False) inside it had failed, and the "
    "error was caught. Let the error leave this block, too, or leave savepoint=False out."
)
_JOINED_ASKED = (
    "Nothing of this block was stored: an atomic(savepoint=False) inside it asked for that with "
    "set_rollback(), and can't be undone alone. Leave savepoint=False out, or call set_rollback() "
    "in this block."
)


class SessionOfAtomic(Protocol):
    """What :class:`Atomic` needs of a session."""

    def begin(self, nested: bool = ..., **options: Unpack[BeginOptions]) -> SessionTransaction: ...
    def begin_nested(self) -> SessionTransaction: ...
    def get_transaction(self) -> SessionTransaction | None: ...
    def get_nested_transaction(self) -> SessionTransaction | None: ...


class Atomic:
    """A block that is stored as a whole or not at all; functions that have one compose.

    Outermost it is :meth:`.OptInSession.begin`, inside a transaction it is a savepoint. Get one
    from :meth:`.OptInSession.atomic`, for ``with`` or as a decorator.

    :param session: Returns the session. It is called at the begin of each block.
    :param savepoint: As :meth:`.OptInSession.atomic` takes it, and so are all others.
    :param durable: As ``savepoint``.
    :param options: As ``savepoint``.
    """

    def __init__(
        self,
        session: Callable[[], SessionOfAtomic],
        *,
        savepoint: bool = True,
        durable: bool = False,
        **options: Unpack[BeginOptions],
    ) -> None:
        self._session = session
        self._savepoint = savepoint
        self._durable = durable
        self._options = given_options("atomic()", options)
        self._uses = itertools.count()
        self._block: Block
        self._joins = False
        self._was_asked = False

    def __call__(self, function: F) -> F:
        """Make each call of a function such a block.

        :param function: A function, or an ``async def`` function.
        :raises TypeError: for a generator, whose block would have ended before its body runs, and
            for what is no function.
        """
        check_function(function, "atomic()")
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def atomic_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._anew():
                    return await function(*args, **kwargs)

            return atomic_coroutine  # type: ignore[return-value]  # pyright: ignore

        @wraps(function)
        def atomic_function(*args: Any, **kwargs: Any) -> Any:
            with self._anew():
                return finished(function(*args, **kwargs), function, "atomic()")

        return atomic_function  # type: ignore[return-value]  # pyright: ignore

    def _anew(self) -> Atomic:
        return Atomic(
            self._session, savepoint=self._savepoint, durable=self._durable, **self._options
        )

    def __enter__(self) -> SessionTransaction:
        if next(self._uses):  # in one step: threads may share the object
            raise exc.InvalidRequestError(
                "An atomic() is good for one block: write `with session.atomic():` each time."
            )
        session = self._session()
        around = session.get_nested_transaction() or session.get_transaction()
        # AUTOBEGIN: a write has begun the transaction, or SQLAlchemy has on a stock bind. Nobody
        # knows when that will end, so begin() refuses.
        if around is None or around.origin is SessionTransactionOrigin.AUTOBEGIN:
            block = session.begin(**self._options)
        else:
            assert isinstance(around, Block)
            self._refuse_inside(around)
            self._joins = not self._savepoint
            block = around if self._joins else session.begin_nested()
        assert isinstance(block, Block)
        if self._joins:
            self._was_asked = block.roll_back_only is not None
        else:
            block.__enter__()
        block.atomic += 1
        self._block = block
        return block

    def _refuse_inside(self, around: Block) -> None:
        if self._durable:
            raise exc.InvalidRequestError(
                "atomic(durable=True) has to be outermost, so that what it does is stored when it "
                "ends, and a transaction is open: call it outside, or leave durable out."
            )
        if self._options:
            raise exc.InvalidRequestError(
                f"{', '.join(self._options)} can only be given to the outermost atomic(), and a "
                "transaction is open: it has begun with options of its own."
            )
        around.refuse_other_task()

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: object,
    ) -> None:
        block = self._block
        block.atomic -= 1
        misplaced = _misplaced(block) if type_ is None else None
        if self._joins:
            if not self._was_asked:
                if type_ is not None or misplaced is not None:
                    block.roll_back_only = block.roll_back_only or _JOINED_FAILED
                    block.failure = block.failure or error or misplaced
                elif block.roll_back_only == "":
                    block.roll_back_only = _JOINED_ASKED
        elif misplaced is not None:
            block.__exit__(type(misplaced), misplaced, None)
        else:
            block.__exit__(type_, error, traceback)
        if misplaced is not None:
            raise misplaced


class HasAtomic:
    """What has ``atomic()``: a session, a ``scoped_session``, an extension of Flask-SQLAlchemy."""

    def atomic_session(self) -> SessionOfAtomic:
        """Return the session, which is asked for at each begin."""
        raise NotImplementedError

    @overload
    def atomic(self, function: F, /) -> F: ...

    @overload
    def atomic(
        self,
        /,
        *,
        savepoint: bool = True,
        durable: bool = False,
        **options: Unpack[BeginOptions],
    ) -> Atomic: ...

    def atomic(self, function: Any = None, /, **options: Any) -> Any:
        """Make a block, or each call of a function, a transaction, or a savepoint inside one::

            @session.atomic
            def rename(user, name):
                user.name = name

            with session.atomic():
                rename(session.get(User, 1), "Ada")

        Functions that each need atomicity compose: outermost it is :meth:`.OptInSession.begin`,
        inside it is :meth:`.OptInSession.begin_nested`, and an error that is caught outside the
        inner block undoes just that.

        :param function: The function, where this is a decorator without arguments.
        :param options: ``savepoint=False`` joins an open transaction without a savepoint; an error
            then undoes the block around, too. ``durable=True`` is an error unless this is
            outermost: what is done is stored at its end. ``isolation_level``, ``read_only``,
            ``deferrable`` and ``timeout`` are those of :meth:`.OptInSession.begin`, and are
            refused inside.
        :returns: A context manager that gives SQLAlchemy's ``SessionTransaction``, and decorates
            functions; or the decorated function.
        :raises TypeError: if what is decorated is a generator, or an option is unknown.
        :raises sqlalchemy.exc.InvalidRequestError: at the begin, if ``durable`` or an option is
            given inside; at the end, if a savepoint that was begun inside is still open.
        """
        atomic = Atomic(self.atomic_session, **options)
        return atomic if function is None else atomic(function)


def _misplaced(block: Block) -> exc.InvalidRequestError | None:
    """Return the error of a block that is not the innermost one at its end."""
    session = block.session
    if block is (session.get_nested_transaction() or session.get_transaction()):
        return None
    if block.is_open:
        # SQLAlchemy would commit what is still open inside along with this one.
        return exc.InvalidRequestError(
            "A savepoint that was begun inside this atomic() is still open: end it before. A "
            "generator or asyncio task that waits inside a block keeps it open. Nothing of this "
            "block was stored."
        )
    return exc.InvalidRequestError(
        "The transaction of this atomic() was ended inside it, by rollback() or close(), and "
        "nothing of it was stored: leave these out. set_rollback() asks for that without an error."
    )
