"""The session: its public methods. Its state is kept in :mod:`.states`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy import exc
from sqlalchemy.orm import SessionTransaction

from .atomic import HasAtomic
from .blocks import Block, OptInSessionTransaction
from .callbacks import Callback, after_end, check_callback
from .engine import OptInEngine
from .options import DEFAULT, BeginOptions, TransactionOptions, given_options
from .states import OUTSIDE
from .writes import Kind, WritingCall
from .writing_session import WritingSession

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OptInSession(HasAtomic, WritingSession):
    """A session on which nothing is a transaction unless you ask; what you ask for is one.

    Use it wherever SQLAlchemy takes a session class::

        Session = sessionmaker(create_engine(url), class_=OptInSession)

    Outside, a read is the statement alone and never writes, ``flush()`` and ``commit()`` store
    all that is waiting or nothing, and ``rollback()`` forgets what is waiting.
    ``with session.begin():`` is a real transaction. Binds that are not made by
    :func:`.create_engine` behave as SQLAlchemy's do.

    It takes the arguments of ``sqlalchemy.orm.Session``, and two more.

    :param begin_on_write: ``True`` is for applications that were written for SQLAlchemy's session:
        outside, the first thing that writes or locks begins the transaction that ``commit()``,
        ``rollback()`` or ``close()`` ends, and a read with changes waiting flushes them before.
    :param local_settings: A function without parameters, asked once, before the first statement or
        transaction, for the settings of :meth:`set_local`; it may return ``None``. Those that are
        set by hand take precedence. Statements that the function itself sends on the session carry
        only what was set by hand. After ``close()`` it is asked again.
    :raises sqlalchemy.exc.ArgumentError: if ``begin_on_write`` is not a bool, or is ``True`` with
        ``autobegin=False``; if ``local_settings`` can't be called.
    """

    # Transactions

    def begin(
        self,
        nested: bool = False,
        **options: Unpack[BeginOptions],
    ) -> SessionTransaction:
        """Begin a transaction: a context manager that commits, or rolls back on an exception.

        The driver sends BEGIN with the first statement on a bind, and COMMIT or ROLLBACK where
        there was a BEGIN. If the transaction stores one new or changed object and sends nothing
        else, the INSERT or UPDATE is sent alone. Objects loaded before stay attached, pending ones
        are stored inside.

        :param nested: As :meth:`begin_nested`.
        :param options: ``isolation_level``, in SQLAlchemy's spelling, such as ``"REPEATABLE
            READ"``; ``read_only``: whether the server refuses writes; ``deferrable``: whether a
            serializable, read-only transaction waits for a snapshot with which it can't fail;
            ``timeout``: seconds, or text such as ``"500ms"``, after which the server cancels a
            statement, or ends the transaction between two of them. It is PostgreSQL's
            ``statement_timeout`` and ``idle_in_transaction_session_timeout``, and for the whole
            transaction ``transaction_timeout``, which PostgreSQL 17 and newer have. The three are
            sent with the first statement (psycopg2) or with BEGIN (psycopg 3).
            :class:`.TransactionTimeout` is raised.
        :returns: SQLAlchemy's ``SessionTransaction``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value, or ``nested``
            is not a bool. Nothing is sent.
        :raises sqlalchemy.exc.InvalidRequestError: if a transaction is open already.
        """
        if not isinstance(nested, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise exc.ArgumentError(
                f"begin() got {nested!r} for nested, which is True or False. An isolation level is "
                "given by its name: begin(isolation_level=…)."
            )
        given = given_options("begin()", options) if options else None
        begins_with = TransactionOptions(**given) if given else DEFAULT
        if self._state is not OUTSIDE:
            if not nested:
                raise exc.InvalidRequestError(self._already_begun())
            if begins_with is not DEFAULT:
                raise exc.InvalidRequestError(
                    "A savepoint has the isolation level and the flags of its transaction: give "
                    "them to the begin() of that."
                )
            return self._begin_savepoint()
        if nested and not self.is_on_ours():
            return super().begin(nested=True)
        if begins_with is not DEFAULT:
            self._check(begins_with)
        if nested:
            if self.begins_on_write and begins_with is DEFAULT:
                self.begin_implicitly()
                return self._begin_savepoint()
            self.flush()  # as before a savepoint: what waits is no part of the block
            if self.in_transaction():  # of a stock bind, which the flush has written to
                return self._begin_savepoint()
        if (noted := self.noted_transaction()) is not None:
            noted.close()  # objects keep their changes
        self.ask_for_settings()
        transaction = super().begin()
        assert isinstance(transaction, OptInSessionTransaction)
        transaction.options = begins_with
        return self._with_handed_out(transaction) if self._has_handed_out else transaction

    def _begin_savepoint(self) -> SessionTransaction:
        if (innermost := self.innermost()) is not None:
            innermost.refuse_other_task()
        if not self.is_inside:
            self.begin_implicitly()
        return self._with_handed_out(super().begin(nested=True))

    def _with_handed_out(self, transaction: SessionTransaction) -> SessionTransaction:
        """Have the user's connections join the transaction; end it if one of them can't."""
        try:
            self.join_handed_out()
        except BaseException:
            transaction.close()
            raise
        return transaction

    def begin_nested(self) -> SessionTransaction:
        """Set a SAVEPOINT; outside there is nothing to nest in, so it is :meth:`begin`.

        As ever, what is waiting is stored before: it is no part of the block. With
        ``begin_on_write=True`` it begins the transaction outside, too, which stays open.
        """
        return self.begin(nested=True)

    def commit(self) -> None:
        """Commit the transaction. Outside, store all that is waiting in a transaction of its own.

        If the transaction stores one new or changed object and sends nothing else, the INSERT or
        UPDATE is sent alone.

        :raises Exception: what the database says. Outside, nothing is stored then, and the
            session is usable at once. With ``begin_on_write=True`` it needs a ``rollback()``
            before, as SQLAlchemy's does.
        :raises sqlalchemy.exc.InvalidRequestError: inside a ``with …begin():`` block, which is
            stored at its end, as a whole, or not at all. With ``begin_on_write=True`` it ends the
            transaction of the block, as SQLAlchemy's does.
        """
        if self.is_outside and not self.begins_on_write:
            with WritingCall(self, Kind.COMMIT):
                self.begin_implicitly()
                super().commit()
            return
        if isinstance(self.entered, Block):
            self.entered.refuse_to_commit()
        if not self.is_inside:
            self.begin_implicitly()
        super().commit()

    def rollback(self) -> None:
        """Roll the transaction back. Outside, forget what is waiting, and send nothing.

        Pending objects go, and changed attributes are reloaded at their next use.
        """
        if self.is_outside and super().get_transaction() is None:
            # Inside a block whose transaction has ended there is nothing left to do.
            if self.entered is not None:
                return
            # Without a SessionTransaction there is nothing to roll back. SQLAlchemy begins one at
            # the first of several changes only, and that one may have ended.
            super().begin()
        super().rollback()

    def in_transaction(self) -> bool:
        """Tell whether a transaction is open. Outside there is none, whatever is pending."""
        return not self.is_outside

    def get_transaction(self) -> SessionTransaction | None:
        """Return the outermost transaction; outside there is none."""
        return None if self.is_outside else super().get_transaction()

    # What is atomic, and what comes after

    def atomic_session(self) -> OptInSession:
        return self

    def set_rollback(self) -> None:
        """Ask for a rollback, without an error, at the end of the innermost block.

        That is one of ``begin()``, ``begin_nested()`` or ``atomic()``, or a request that is a
        transaction. Sends nothing.

        :raises sqlalchemy.exc.InvalidRequestError: outside. And at the end of the block around an
            ``atomic(savepoint=False)`` that has asked for it, which can't be undone alone.
        """
        innermost = self.innermost()
        if innermost is None:
            raise exc.InvalidRequestError(
                "set_rollback() is for a transaction, and none is open: rollback() forgets what is "
                "waiting."
            )
        if innermost.roll_back_only is None:
            innermost.roll_back_only = ""

    def on_commit(self, function: Callback) -> None:
        """Call a function once the open transaction is committed; outside, call it at once.

        It is called after COMMIT, outside the transaction: it may begin another. Functions are
        called in the order of their registration. One that was registered in a savepoint or a
        transaction that is rolled back is dropped, and all are if a lost connection leaves open
        what became of the COMMIT or of the one statement, or if only a part of the transaction's
        binds were committed.

        If one raises, the others are called all the same; then the first error is raised, from
        where the transaction was ended, and others are logged. What is committed stays so.

        :param function: A function without parameters.
        :raises TypeError: if it can't be called, or would run later than that.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction was ended.
        """
        check_callback(function, "on_commit()")
        innermost = self.innermost()
        if innermost is not None:
            innermost.call_after_commit(function)
        elif self.writing_call is not None:  # a listener to a statement
            self.writing_call.on_commit.append(function)
        elif self.callbacks.ending:  # a listener to the end of a transaction
            self.callbacks.append(function)
        else:
            function()

    def on_rollback(self, function: Callback) -> None:
        """Call a function if the open transaction or savepoint is rolled back.

        It is called after the outermost transaction has ended, by COMMIT or ROLLBACK. The functions
        of savepoints that were rolled back come before those of :meth:`on_commit`. Outside there is
        nothing to roll back, and the function is never called. Errors of the functions are treated
        as with :meth:`on_commit`; where an error or ``close()`` has ended the transaction, all of
        them are logged.

        :param function: A function without parameters.
        :raises TypeError: if it can't be called, or would run later than that.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction was ended.
        """
        check_callback(function, "on_rollback()")
        innermost = self.innermost()
        if innermost is not None:
            innermost.call_after_rollback(function)
        elif self.writing_call is not None:
            self.writing_call.on_rollback.append(function)

    # The end

    def close(self) -> None:
        """Close the session as SQLAlchemy does, and give its connections back."""
        if self._state is OUTSIDE and not self.callbacks:  # no transaction ends with it
            self._close()
        else:
            with after_end(self, only_log=True):
                self._close()

    def _close(self) -> None:
        self._note_closed_inside()
        try:
            super().close()
        finally:
            self._is_closed = self._closes_for_good
            self._end_loans()

    def reset(self) -> None:
        """Reset the session as SQLAlchemy does, and give its connections back."""
        with after_end(self, only_log=True):
            self._note_closed_inside()
            try:
                super().reset()
            finally:
                self._end_loans()

    def invalidate(self) -> None:
        """Close the session as SQLAlchemy does, and have the pools close its connections."""
        with after_end(self, only_log=True):
            self._note_closed_inside()
            try:
                super().invalidate()
            finally:
                self._loans.invalidate()
                self._end_loans()

    def _note_closed_inside(self) -> None:
        """Have the blocks that are entered raise an error at their end, if they lose anything."""
        entered = self.entered
        if not isinstance(entered, Block) or not entered.is_open:
            return
        transaction = super().get_transaction()
        if self.is_clean() and (
            not isinstance(transaction, OptInSessionTransaction) or transaction.has_done_nothing()
        ):
            return
        entered.note_closed_inside()

    def _check(self, options: TransactionOptions) -> None:
        bind = self._default_bind()
        if isinstance(bind, OptInEngine):  # other binds are checked when they join
            options.over(bind.transaction_options).check(bind.dialect)

    def _already_begun(self) -> str:
        transaction = cast(OptInSessionTransaction, super().get_transaction())
        if transaction.begun_at is not None:
            return (
                "A transaction is already begun on this Session: with begin_on_write=True it was "
                f"begun by {transaction.begun_at}, the first call that writes or locks (or any, at "
                "an isolation level above READ COMMITTED). Call commit() or rollback() before this "
                "begin(), or put that call into its block, too."
            )
        if self.is_inside:
            return (
                "A transaction is already begun on this Session. For functions that call each "
                "other, use atomic() in each: outermost it is begin(), inside it is a savepoint, "
                "as begin_nested() is. Or leave this begin() out."
            )
        return (
            "A transaction is already begun on this Session, by SQLAlchemy itself, on a bind "
            "whose connections don't rest in autocommit: one of another database, an engine that "
            "fictive_sqlalchemy.create_engine() has not made, or a Connection. With "
            "Flask-SQLAlchemy that is each backend that is not in AUTOCOMMIT_DRIVERS of the "
            "extension, which names postgresql: add the backend there. Use commit() or rollback() "
            "before, or begin_nested() for a savepoint inside it."
        )
