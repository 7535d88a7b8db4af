"""``atomic()``: begins a transaction, or a savepoint if a transaction is open already."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from sqlalchemy import exc
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin

from .blocks import Block
from .errors import see
from .functions import check_function, finished
from .options import BeginOptions, given_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

F = TypeVar("F", bound=Callable[..., Any])

_JOINED_FAILED = (
    "Nothing of this block was stored: an atomic(savepoint=False) inside it had failed, and the "
    "error was caught. Let the error leave this block, too, or leave savepoint=False out."
    + see("atomic-without-savepoint")
)
_JOINED_ASKED = (
    "Nothing of this block was stored: an atomic(savepoint=False) inside it called "
    "set_rollback(), and can't be undone alone. Leave savepoint=False out, or call set_rollback() "
    "in this block." + see("atomic-without-savepoint")
)


class SessionOfAtomic(Protocol):
    """The part of a session that :class:`Atomic` uses."""

    def begin(self, nested: bool = ..., **options: Unpack[BeginOptions]) -> SessionTransaction: ...
    def begin_nested(self) -> SessionTransaction: ...
    def get_transaction(self) -> SessionTransaction | None: ...
    def get_nested_transaction(self) -> SessionTransaction | None: ...


class Atomic:
    """A block that is stored as a whole or not at all, and that may contain other such blocks.

    The outermost block is a transaction, and a block inside a transaction is a savepoint.
    :meth:`.OptInSession.atomic` returns an object of this class, for ``with`` or as a decorator.

    :param session: A function that returns the session. It is called when a block begins.
    :param savepoint: The option ``savepoint`` of :meth:`.OptInSession.atomic`.
    :param durable: The option ``durable`` of :meth:`.OptInSession.atomic`.
    :param options: The other options of :meth:`.OptInSession.atomic`.
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
        """Decorate a function, so that each call of the function is an atomic block.

        :param function: A function, or an ``async def`` function.
        :raises TypeError: if ``function`` is not a function, or is a generator function, whose body
            would run after the end of the block.
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
        if next(self._uses):  # one step, because threads may share the object
            raise exc.InvalidRequestError(
                "An atomic() object can be used for one block only: write "
                "`with session.atomic():` each time." + see("atomic-used-twice")
            )
        session = self._session()
        around = session.get_nested_transaction() or session.get_transaction()
        # AUTOBEGIN: a write has begun the transaction, or SQLAlchemy has begun it on a stock bind.
        # Nobody knows when such a transaction will end, so begin() refuses.
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
                "atomic(durable=True) has to be outermost, so that its changes are stored at its "
                "end, but a transaction is open: use atomic(durable=True) outside that "
                "transaction, or leave durable=True out." + see("atomic-durable")
            )
        if self._options:
            raise exc.InvalidRequestError(
                f"{', '.join(self._options)} can only be given to the outermost atomic(), and a "
                "transaction is open, which has its own options: pass them where that transaction "
                "begins." + see("atomic-options")
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
    """A mixin with ``atomic()``, for sessions, ``scoped_session`` and extensions of Flask."""

    def atomic_session(self) -> SessionOfAtomic:
        """Return the session. Each block calls this method when it begins."""
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
        """Make a block, or each call of a function, a transaction or a savepoint.

        The outermost block is a transaction, as with :meth:`.OptInSession.begin`. A block inside a
        transaction is a savepoint, as with :meth:`.OptInSession.begin_nested`::

            @session.atomic
            def rename(user, name):
                user.name = name

            with session.atomic():
                rename(session.get(User, 1), "Ada")

        So functions that each need a transaction may call each other. If an error leaves the inner
        block and is caught in the outer block, only the inner block is rolled back.

        :param function: The function, if this is a decorator without arguments.
        :param options: ``savepoint=False`` joins an open transaction without a savepoint. An error
            then rolls back the enclosing block, too. ``durable=True`` is refused inside a
            transaction, so that the block is committed when it ends. ``isolation_level``,
            ``read_only``, ``deferrable`` and ``timeout`` are those of :meth:`.OptInSession.begin`,
            and are refused inside a transaction.
        :returns: The decorated function. Without ``function``, a context manager that gives
            SQLAlchemy's ``SessionTransaction``, and that can decorate a function instead.
        :raises TypeError: if the decorated object is a generator function or not a function, or if
            an option is unknown.
        :raises sqlalchemy.exc.InvalidRequestError: when the block begins, if ``durable`` or an
            option is given inside a transaction; when the block ends, if its transaction was ended
            inside it, or a savepoint that was begun inside it is still open.
        """
        atomic = Atomic(self.atomic_session, **options)
        return atomic if function is None else atomic(function)


def _misplaced(block: Block) -> exc.InvalidRequestError | None:
    """Return an error if a block is not the innermost open block when it ends."""
    session = block.session
    if block is (session.get_nested_transaction() or session.get_transaction()):
        return None
    if block.is_open:
        # SQLAlchemy would commit the savepoint that is still open along with this block.
        return exc.InvalidRequestError(
            "A savepoint that was begun inside this atomic() is still open: end the savepoint "
            "first. A generator or asyncio task that waits inside a block keeps it open. Nothing "
            "of this block was stored." + see("open-savepoint")
        )
    return exc.InvalidRequestError(
        "The transaction of this atomic() was ended inside it, by rollback() or close(), and "
        "nothing of it was stored: leave these calls out. To roll back without an error, call "
        "set_rollback()." + see("atomic-ended")
    )
