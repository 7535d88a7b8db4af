"""The public methods of the session. Its state is kept in :mod:`.states`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy import exc
from sqlalchemy.orm import SessionTransaction

from .atomic import HasAtomic
from .blocks import Block, OptInSessionTransaction
from .callbacks import Callback, after_end, check_callback
from .engine import OptInEngine
from .errors import see
from .options import DEFAULT, BeginOptions, TransactionOptions, given_options
from .states import OUTSIDE
from .writes import Kind, WritingCall
from .writing_session import WritingSession

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OptInSession(HasAtomic, WritingSession):
    """A session that begins a transaction only when you ask for one.

    Use it wherever SQLAlchemy takes a session class::

        Session = sessionmaker(create_engine(url), class_=OptInSession)

    Outside a transaction, a read sends the statement alone and never writes, ``flush()`` and
    ``commit()`` store all pending changes or none, and ``rollback()`` discards pending changes.
    ``with session.begin():`` is a real transaction. On binds that :func:`.create_engine` has not
    made, the session behaves as SQLAlchemy's.

    The session takes the arguments of ``sqlalchemy.orm.Session``, and two more.

    :param begin_on_write: ``True`` is for applications that were written for SQLAlchemy's session.
        Outside a transaction, the first call that writes or locks then begins a transaction, which
        ``commit()``, ``rollback()`` or ``close()`` ends. A read first flushes pending changes.
    :param local_settings: A function without parameters that returns settings, as
        :meth:`set_local` takes them, or ``None``. The session calls it before the first statement
        or transaction, and after ``None`` before the next one. After ``close()``, the session calls
        it anew. Settings of :meth:`set_local` take precedence. With statements that the function
        itself sends on the session, only these are sent.
    :raises sqlalchemy.exc.ArgumentError: if ``begin_on_write`` is not a bool, or is ``True`` with
        ``autobegin=False``, or if ``local_settings`` can't be called, or is an ``async`` function.
    """

    # Transactions

    def begin(
        self,
        nested: bool = False,
        **options: Unpack[BeginOptions],
    ) -> SessionTransaction:
        """Begin a transaction, as a context manager that commits, or rolls back on an exception.

        The driver sends BEGIN with the first statement on a bind, and sends COMMIT or ROLLBACK only
        after a BEGIN. If the transaction stores one new or changed object and sends nothing else,
        the INSERT or UPDATE is sent alone. Objects that were loaded before stay attached to the
        session, and pending changes become part of the transaction.

        :param nested: ``True`` for :meth:`begin_nested`.
        :param options: ``isolation_level``: in SQLAlchemy's spelling, such as ``"REPEATABLE
            READ"``; ``read_only``: whether the server refuses writes; ``deferrable``: whether a
            serializable, read-only transaction waits for a snapshot with which it can't fail;
            ``timeout``: seconds, a ``timedelta``, or text such as ``"500ms"``, after which the
            server cancels a statement, or ends the transaction between two statements, and
            :class:`.TransactionTimeout` is raised. The timeout sets ``statement_timeout`` and
            ``idle_in_transaction_session_timeout`` of PostgreSQL, and on PostgreSQL 17 and newer
            ``transaction_timeout`` for the whole transaction. These settings are sent with the
            first statement (psycopg2) or with BEGIN (psycopg 3).
        :returns: SQLAlchemy's ``SessionTransaction``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value, or ``nested``
            is not a bool. Nothing is sent. If the session has no default bind, the first statement
            raises this error.
        :raises sqlalchemy.exc.InvalidRequestError: if a transaction is open already.
        :raises TypeError: if an option is unknown.
        """
        if not isinstance(nested, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise exc.ArgumentError(
                f"begin() got {nested!r} for nested, which is True or False. An isolation level is "
                "given by its name: begin(isolation_level=…)." + see("begin-nested-argument")
            )
        given = given_options("begin()", options) if options else None
        begins_with = TransactionOptions(**given) if given else DEFAULT
        if self._state is not OUTSIDE:
            if not nested:
                raise exc.InvalidRequestError(self._already_begun())
            if begins_with is not DEFAULT:
                raise exc.InvalidRequestError(
                    "A savepoint has the isolation level and the flags of its transaction: pass "
                    "them to the outermost begin()." + see("options-of-savepoint")
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
            self.flush()  # as before a savepoint: earlier changes are no part of the block
            if self.in_transaction():  # the flush has written to a stock bind
                return self._begin_savepoint()
        if self.local_settings is not None:
            self.refuse_to_store_without_settings()
            if not self.begins_on_write:  # with this option, a read of the function may begin one
                self.ask_for_settings()
        if (noted := self.noted_transaction()) is not None:
            noted.close()  # without rollback(): objects keep their changes
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
        """Have the user's connections join the transaction; end it if a connection can't join."""
        try:
            self.join_handed_out()
        except BaseException:
            transaction.close()
            raise
        return transaction

    def begin_nested(self) -> SessionTransaction:
        """Begin a savepoint; outside, where there is nothing to nest in, begin a transaction.

        Pending changes are flushed before, as with SQLAlchemy, so they are no part of the block.
        Outside, they are stored before, in a transaction of their own. With
        ``begin_on_write=True``, this call outside begins a transaction, which stays open, and a
        savepoint in it.
        """
        return self.begin(nested=True)

    def commit(self) -> None:
        """Commit the transaction; outside, store all pending changes in a transaction of their own.

        If the transaction stores one new or changed object and sends nothing else, the INSERT or
        UPDATE is sent alone.

        :raises Exception: The error of the database. Outside a transaction, nothing is stored then,
            and the session is usable at once. With ``begin_on_write=True`` the session first needs
            a ``rollback()``, as SQLAlchemy's does.
        :raises sqlalchemy.exc.InvalidRequestError: inside a ``with …begin():`` block, which is
            stored at its end, as a whole, or not at all. With ``begin_on_write=True``, ``commit()``
            ends the transaction of the block, as with SQLAlchemy.
        """
        if self.local_settings is not None and self.is_outside and not self.is_clean():
            self.refuse_to_store_without_settings()
            self.ask_for_settings()
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
        """Roll back the transaction; outside, discard pending changes and send nothing.

        Pending objects leave the session, and all others are read again at their next use.
        """
        if self.is_outside and super().get_transaction() is None:
            # In a block whose transaction has already ended, there is nothing to roll back.
            if self.entered is not None:
                return
            # Without a SessionTransaction, rollback() would do nothing. SQLAlchemy begins one only
            # at the first of several changes, and it may have ended since.
            super().begin()
        super().rollback()

    def in_transaction(self) -> bool:
        """Tell whether a transaction is open. Pending changes alone do not begin one."""
        return not self.is_outside

    def get_transaction(self) -> SessionTransaction | None:
        """Return the outermost transaction, or ``None`` outside a transaction."""
        return None if self.is_outside else super().get_transaction()

    # Rollback on request, and callbacks after the transaction

    def atomic_session(self) -> OptInSession:
        return self

    def set_rollback(self) -> None:
        """Ask for a rollback, without an error, at the end of the innermost block.

        The block may be of ``begin()``, ``begin_nested()`` or ``atomic()``, or a request that is a
        transaction. ``atomic(savepoint=False)`` inside another block can't be undone alone: if it
        asks for a rollback, the other block raises ``PendingRollbackError`` at its end. This call
        sends nothing.

        :raises sqlalchemy.exc.InvalidRequestError: outside a transaction.
        """
        innermost = self.innermost()
        if innermost is None:
            raise exc.InvalidRequestError(
                "set_rollback() is for a transaction, and none is open. To discard pending "
                "changes, call rollback()." + see("set-rollback-outside")
            )
        if innermost.roll_back_only is None:
            innermost.roll_back_only = ""

    def on_commit(self, function: Callback) -> None:
        """Call a function once the open transaction is committed; outside, call it at once.

        The function is called after COMMIT, outside the transaction, so it may begin another one.
        Functions are called in the order of their registration. If a savepoint or transaction is
        rolled back, the functions that were registered in it are dropped. All functions are dropped
        if the connection is lost during COMMIT or the one statement, so that the outcome is
        unknown, or if only some of the transaction's binds were committed.

        If a function raises an error, the other functions are called all the same. Then the call
        that has ended the transaction raises the first error, and the other errors are logged. The
        transaction stays committed.

        :param function: A function without parameters.
        :raises TypeError: if the function can't be called, or is ``async`` or a generator function.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction has already ended.
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

        The function is called after the outermost transaction has ended, by COMMIT or ROLLBACK.
        Functions of savepoints that were rolled back are called before those of :meth:`on_commit`.
        Outside there is nothing to roll back, and the function is never called. Errors of the
        functions are raised and logged as with :meth:`on_commit`. But if an exception or
        ``close()`` has ended the transaction, all these errors are logged, and none is raised.

        :param function: A function without parameters.
        :raises TypeError: if the function can't be called, or is ``async`` or a generator function.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction has already ended.
        """
        check_callback(function, "on_rollback()")
        innermost = self.innermost()
        if innermost is not None:
            innermost.call_after_rollback(function)
        elif self.writing_call is not None:
            self.writing_call.on_rollback.append(function)

    # The end

    def close(self) -> None:
        """Close the session as SQLAlchemy does, and give its connections back to the pools."""
        if self._state is OUTSIDE and not self.callbacks:  # close() ends no transaction
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
        """Reset the session as SQLAlchemy does, and give its connections back to the pools."""
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
        """Have the entered blocks raise an error at their end, if they lose any of their work."""
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
        if isinstance(bind, OptInEngine):  # other binds check the options when they join
            options.over(bind.transaction_options).check(bind.dialect)

    def _already_begun(self) -> str:
        transaction = cast(OptInSessionTransaction, super().get_transaction())
        if transaction.begun_at is not None:
            return (
                "A transaction is already begun on this Session: with begin_on_write=True it was "
                f"begun by {transaction.begun_at}, the first call that writes or locks (or any "
                "call, at an isolation level above READ COMMITTED). Call commit() or rollback() "
                "before this begin(), or move that call into the block of this begin()."
                + see("begin-after-write")
            )
        if self.is_inside:
            return (
                "A transaction is already begun on this Session. For functions that call each "
                "other, use atomic() in each: outside a transaction, atomic() begins one; inside a "
                "transaction, it sets a savepoint, as begin_nested() does. Or leave this begin() "
                "out." + see("begin-inside")
            )
        return (
            "A transaction is already begun on this Session, by SQLAlchemy itself, on a bind "
            "whose connections are not in autocommit: one of another database, an engine that "
            "fictive_sqlalchemy.create_engine() has not made, or a Connection. With "
            "Flask-SQLAlchemy, these are the backends that AUTOCOMMIT_DRIVERS of the extension "
            "does not list; by default it lists postgresql. Add the backend to the list. Or call "
            "commit() or rollback() first, or begin_nested() for a savepoint."
            + see("begin-on-other-bind")
        )
