"""The session: what happens outside a transaction, and what ``begin()`` does.

Outside, a session holds no transaction of the database. It holds changes to objects, which
SQLAlchemy notes down, and connections on loan from the pool, which rest in autocommit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from inspect import currentframe
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, TwoPhaseTransaction
from sqlalchemy.orm import (
    AppenderQuery,
    FromStatement,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    object_mapper,
)
from sqlalchemy.orm.attributes import instance_state

from .atomic import Atomic, F
from .autocommit import DEFAULT, TransactionOptions, split_options
from .blocks import (
    OF_ANOTHER_TASK,
    Block,
    Callback,
    OptInSavepoint,
    OptInSessionTransaction,
    check_callback,
)
from .connection import CommitOutcomeUnknown, OptInConnection
from .engine import OptInEngine
from .replicas import borrow_to_read, source_of

_log = logging.getLogger("fictive_sqlalchemy.session")


class State(Enum):
    """Where a session stands.

    ::

                   begin()                      the transaction ends
        OUTSIDE  ───────────▶  INSIDE  ─────────────────────────────▶  OUTSIDE
           │                      ▲
           │ a stock bind is      │ our binds have to join: begin_nested(), commit(),
           ▼ used                 │ or a flush() that writes to both
         STOCK  ──────────────────┘                 (or it ends: OUTSIDE)
    """

    OUTSIDE = "outside"
    """No transaction was asked for. What SQLAlchemy calls one here only notes changes."""

    INSIDE = "inside"
    """Between ``begin()`` and its end. Every bind that is used joins, with a real transaction."""

    STOCK = "stock"
    """SQLAlchemy has begun by itself, as ever, on a bind that is not an :class:`.OptInEngine`.
    For our binds this is still outside."""


# Each statement asks, and the attributes of an Enum are slow.
OUTSIDE, INSIDE, STOCK = State


class OptInSession(Session):
    """A session on which nothing is a transaction unless you ask; what you ask for is one.

    Use it wherever SQLAlchemy takes a session class::

        Session = sessionmaker(create_engine(url), class_=OptInSession)

    Outside, a read is the statement alone and never writes, ``flush()`` and ``commit()`` store
    all that is waiting or nothing, ``rollback()`` forgets it. ``with session.begin():`` is a real
    transaction. Binds that are not made by :func:`.create_engine` behave as SQLAlchemy's do.

    It takes the arguments of ``sqlalchemy.orm.Session``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._state = OUTSIDE
        self._loans: dict[OptInEngine, OptInConnection] = {}
        self._from_primary = False
        self._deleted_by_flush: list[object] | None = None
        self.to_call: tuple[Callback, ...] = ()
        self.ending = 0
        self._closes_for_good = kwargs.get("close_resets_only") is False
        self._is_closed = False
        super().__init__(*args, **kwargs)

    # The state, and the edges that SQLAlchemy's events drive (see the end of this module)

    def transaction_created(self, transaction: SessionTransaction) -> None:
        """Go inside, if it is the transaction of a ``begin()``."""
        if transaction.origin is SessionTransactionOrigin.BEGIN:
            self._state = INSIDE

    def transaction_begun(self, transaction: SessionTransaction, connection: Connection) -> None:
        """Note that a bind has joined: outside it is a stock one, on which SQLAlchemy began."""
        if isinstance(transaction, OptInSessionTransaction):
            transaction.begun_on |= {connection}
            if self._state is OUTSIDE:
                self._state = STOCK

    def transaction_committed(self) -> None:
        """Note that the innermost transaction or savepoint is committed."""
        committed = super().get_nested_transaction() or super().get_transaction()
        if isinstance(committed, Block):
            committed.has_committed()

    def transaction_ended(self, transaction: SessionTransaction) -> None:
        """Go outside, if it is the outermost one."""
        if isinstance(transaction, Block):
            transaction.has_ended()
        if isinstance(transaction, OptInSessionTransaction):
            self._state = OUTSIDE
            for connection in self._loans.values():
                if connection.taken_by is transaction:
                    connection.taken_by = None
                    connection.put_options_back()
                    if connection.is_inside():  # an interruption came on its way back
                        connection.close()
                connection.give_back_if_wanted()

    def object_deleted(self, instance: object) -> None:
        """Let go of an object whose row is gone for good: after the statement, or the flush."""
        if self._state is OUTSIDE:
            self._let_go([instance])
        elif self._deleted_by_flush is not None:
            self._deleted_by_flush.append(instance)

    def _let_go(self, instances: Iterable[object]) -> None:
        # private: expunge() takes along what is related, and that may live on
        self._expunge_states([instance_state(instance) for instance in instances])

    @contextmanager
    def _joining(self) -> Generator[None]:
        """Let our binds join what SQLAlchemy has begun, or begins, by itself."""
        self._state = INSIDE
        try:
            yield
        finally:
            # They stay if they did join: a flush may find nothing to write.
            transaction = super().get_transaction()
            if transaction is None:
                self._state = OUTSIDE
            elif isinstance(transaction, OptInSessionTransaction) and not transaction.taken:
                self._state = STOCK if transaction.begun_on else OUTSIDE

    # Transactions

    def begin(
        self,
        nested: bool = False,
        *,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
    ) -> SessionTransaction:
        """Begin a transaction: a context manager that commits, or rolls back on an exception.

        The driver sends BEGIN with the first statement on a bind, and COMMIT or ROLLBACK where
        there was a BEGIN. Objects loaded before stay attached, pending ones are stored inside.

        :param nested: As :meth:`begin_nested`.
        :param isolation_level: In SQLAlchemy's spelling, such as ``"REPEATABLE READ"``.
        :param read_only: Whether the server refuses writes.
        :param deferrable: Whether a serializable, read-only transaction waits for a snapshot
            with which it can't fail.
        :returns: SQLAlchemy's ``SessionTransaction``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value. Nothing is
            sent.
        :raises sqlalchemy.exc.InvalidRequestError: if a transaction is open already.
        """
        options = DEFAULT
        if isolation_level is not None or read_only is not None or deferrable is not None:
            options = TransactionOptions(isolation_level, read_only, deferrable)
        if self._state is not OUTSIDE:
            if not nested:
                raise exc.InvalidRequestError(self._already_begun())
            if options is not DEFAULT:
                raise exc.InvalidRequestError(
                    "A savepoint has the isolation level and the flags of its transaction: give "
                    "them to the begin() of that."
                )
            return self._begin_savepoint()
        if nested and not self._is_on_ours():
            return self._savepoint()
        if options is not DEFAULT:
            self._check(options)
        if nested:
            self.flush()  # as before a savepoint: what waits is no part of it
            if self.in_transaction():  # to which a stock bind belongs
                return self._begin_savepoint()
        self._forget_autobegin()
        transaction = super().begin()
        assert isinstance(transaction, OptInSessionTransaction)
        transaction.options = options
        return transaction

    def _begin_savepoint(self) -> SessionTransaction:
        innermost = self._innermost()
        if innermost is not None and innermost.is_of_another_task():
            raise exc.InvalidRequestError(OF_ANOTHER_TASK)
        self._state = INSIDE
        return self._savepoint()

    def _savepoint(self) -> SessionTransaction:
        savepoint = super().begin(nested=True)
        savepoint.__class__ = OptInSavepoint  # SQLAlchemy has no parameter for the class
        return savepoint

    def begin_nested(self) -> SessionTransaction:
        """Set a SAVEPOINT; outside there is nothing to nest in, so it is :meth:`begin`.

        As ever, what is waiting is stored before: it is no part of the block.
        """
        return self.begin(nested=True)

    def commit(self) -> None:
        """Commit the transaction. Outside, store all that is waiting in a transaction of its own.

        :raises Exception: what the database says. Outside, nothing is stored then, and the
            session is usable at once.
        """
        if self._state is not OUTSIDE:
            self._state = INSIDE
            super().commit()
            return
        with self.calling_back():
            transaction = self.begin()
            try:
                super().commit()
            except BaseException:
                if super().get_transaction() is transaction:
                    try:
                        super().rollback()
                    except exc.InvalidRequestError:  # it is stored: a listener failed after COMMIT
                        transaction.close()
                raise

    def rollback(self) -> None:
        """Roll the transaction back. Outside, forget what is waiting, and send nothing.

        Pending objects go, and changed attributes are reloaded at their next use.
        """
        if self._state is OUTSIDE and super().get_transaction() is None:
            # private: inside a block whose transaction has ended there is nothing left to do
            if self._trans_context_manager is not None:
                return
            super().begin()  # to roll back: SQLAlchemy notes the first of several changes only
        super().rollback()

    def flush(self, objects: Any = None) -> None:
        """Store what is waiting. Outside it is one transaction, committed when the call returns.

        :param objects: Store these alone. Deprecated since SQLAlchemy 2.1.
        :raises Exception: what the database says. Outside, nothing is stored then, and the
            session is usable at once.
        """
        flush: Any = super().flush
        arguments = () if objects is None else (objects,)
        if self._state is INSIDE:
            flush(*arguments)
            return
        if _is_a_dynamic_read(currentframe()):
            self._autoflush()  # private: our own, below
            return
        binds = self._changed_binds()
        if not any(map(_is_ours, binds)):
            flush(*arguments)
        elif self._state is OUTSIDE and all(map(_is_ours, binds)):
            with self.calling_back(), self._stored_flush(alone=objects is not None):
                flush(*arguments)
        else:
            with self._joining():
                flush(*arguments)

    def in_transaction(self) -> bool:
        """Tell whether a transaction is open: not outside, whatever is pending."""
        return self._state is not OUTSIDE

    def get_transaction(self) -> SessionTransaction | None:
        """Return the outermost transaction; outside there is none."""
        return super().get_transaction() if self._state is not OUTSIDE else None

    # What is atomic, and what comes after

    @overload
    def atomic(self, function: F, /) -> F: ...

    @overload
    def atomic(
        self,
        /,
        *,
        savepoint: bool = True,
        durable: bool = False,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
    ) -> Atomic: ...

    def atomic(self, function: Any = None, /, **options: Any) -> Any:
        """Make a block, or each call of a function, a transaction, or a savepoint inside one::

            @session.atomic
            def rename(user, name):
                user.name = name

            with session.atomic():
                rename(session.get(User, 1), "Ada")

        Functions that each need atomicity compose: outermost it is :meth:`begin`, inside it is
        :meth:`begin_nested`, and an error that is caught outside the inner block undoes just that.

        :param function: The function, where this is a decorator without arguments.
        :param savepoint: ``False`` joins an open transaction without a savepoint; an error then
            undoes the block around, too.
        :param durable: ``True`` is an error unless this is outermost: what is done is stored at
            its end.
        :param isolation_level: As :meth:`begin`. This and the next two are refused inside.
        :param read_only: As :meth:`begin`.
        :param deferrable: As :meth:`begin`.
        :returns: A context manager that gives SQLAlchemy's ``SessionTransaction``, and decorates
            functions; or the decorated function.
        :raises TypeError: if what is decorated is a generator.
        :raises sqlalchemy.exc.InvalidRequestError: at the begin, if ``durable`` or an option is
            given inside; at the end, if a savepoint that was begun inside is still open.
        """
        atomic = Atomic(lambda: self, **options)
        return atomic if function is None else atomic(function)

    def set_rollback(self) -> None:
        """Ask for a rollback, without an error, at the end of the innermost block.

        That is one of ``begin()``, ``begin_nested()`` or ``atomic()``, or a request that is a
        transaction. Sends nothing.

        :raises sqlalchemy.exc.InvalidRequestError: outside. And at the end of the block around an
            ``atomic(savepoint=False)`` that has asked for it, which can't be undone alone.
        """
        innermost = self._innermost()
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
        what became of the COMMIT.

        If one raises, the others are called all the same; then the first error is raised, from
        where the transaction was ended, and others are logged. What is committed stays so.

        :param function: A function without parameters.
        :raises TypeError: if it can't be called, or would run later than that.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction was ended.
        """
        check_callback(function, "on_commit()")
        innermost = self._innermost()
        if innermost is not None:
            innermost.on_commit += (function,)
        elif self.ending:  # a listener to the end of a transaction
            self.to_call += (function,)
        else:
            function()

    def on_rollback(self, function: Callback) -> None:
        """Call a function if the open transaction or savepoint is rolled back.

        It is called after the outermost transaction has ended, however that was; those of
        savepoints come before what :meth:`on_commit` has registered. Outside there is nothing to
        roll back, and it is never called. Errors are treated as those of :meth:`on_commit`; where
        an error or ``close()`` has ended the transaction, all of them are logged.

        :param function: A function without parameters.
        :raises TypeError: if it can't be called, or would run later than that.
        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction was ended.
        """
        check_callback(function, "on_rollback()")
        innermost = self._innermost()
        if innermost is not None:
            innermost.on_rollback += (function,)

    @property
    def entered(self) -> Any:
        """The transaction or savepoint whose ``with`` block was entered last, and is not left.

        Until that is left SQLAlchemy refuses to go on if it has ended.
        """
        return self._trans_context_manager  # private: SQLAlchemy keeps it there, and restores it

    @entered.setter
    def entered(self, entered: Any) -> None:
        self._trans_context_manager = entered  # private: as above

    def _innermost(self) -> Block | None:
        innermost = self.get_nested_transaction() or self.get_transaction()
        if innermost is None and self.entered is not None and not self.ending:
            raise exc.InvalidRequestError(
                "The transaction of this block was ended inside it, by commit(), rollback() or "
                "close(): leave the block before."
            )
        return innermost if isinstance(innermost, Block) else None

    def calling_back(self, *, only_log: bool = False) -> AbstractContextManager[None]:
        """Around what may end the transaction: call what is to be called after it, and not in it.

        :param only_log: Whether errors of what is called are only logged, because another one is
            under way, or this only tidies up.
        """
        return _CallingBack(self, only_log)

    def called_back(self, only_log: bool) -> None:
        """Call what is to be called, at the end of the outermost ``calling_back()``."""
        if self._state is not INSIDE and self.entered is None:
            self._call_back(only_log)

    def _call_back(self, only_log: bool) -> None:
        calls, self.to_call = self.to_call, ()
        first: Exception | None = None
        for index, call in enumerate(calls):
            if self._state is INSIDE:  # one has begun a transaction, and left it open
                self.to_call = calls[index:] + self.to_call
                break
            try:
                call()
            except Exception as error:
                if first is None and not only_log:
                    first = error
                else:
                    _log.exception("%r raised this after the end of a transaction", call)
            except BaseException:
                if rest := calls[index + 1 :]:
                    _log.error("Not called after the end of a transaction: %r", rest)
                raise
        if first is not None:
            raise first

    # Statements

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, params=None, **kwargs):
            """Execute a statement; outside it stands alone, see :meth:`.OptInConnection.execute`.

            A bulk INSERT or UPDATE of ORM objects outside is one transaction, all or nothing.
            """
            if self._state is not INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().execute, statement, params, kwargs)
            return super().execute(statement, params, **kwargs)

        def scalar(self, statement, params=None, **kwargs):
            """Execute a statement as :meth:`execute` does; return the first value."""
            if self._state is not INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().scalar, statement, params, kwargs)
            return super().scalar(statement, params, **kwargs)

        def scalars(self, statement, params=None, **kwargs):
            """Execute a statement as :meth:`execute` does; return the first value of each row."""
            if self._state is not INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().scalars, statement, params, kwargs)
            return super().scalars(statement, params, **kwargs)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        objects = list(objects)
        with self._bulk(map(object_mapper, objects)) as apart:
            target: Any = apart or super()
            target.bulk_save_objects(objects, *args, **kwargs)

    def bulk_insert_mappings(
        self, mapper: Any, mappings: Iterable[dict[str, Any]], *args: Any, **kwargs: Any
    ) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        with self._bulk([mapper]) as apart:
            target: Any = apart or super()
            target.bulk_insert_mappings(mapper, mappings, *args, **kwargs)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        with self._bulk([mapper]) as apart:
            target: Any = apart or super()
            target.bulk_update_mappings(mapper, mappings)

    def refresh(
        self,
        instance: object,
        attribute_names: Iterable[str] | None = None,
        with_for_update: Any = None,
    ) -> None:
        """As SQLAlchemy's.

        :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside. Nothing is
            sent, and changes to the object are kept.
        """
        outside = self._state is not INSIDE
        if outside and with_for_update and _is_ours(self.get_bind(object_mapper(instance))):
            raise exc.InvalidRequestError(
                "refresh(with_for_update=…) outside a transaction protects nothing, for the lock "
                "would be gone with the statement: put it and what depends on it into "
                "`with session.begin():`. Nothing was sent."
            )
        super().refresh(instance, attribute_names, with_for_update)

    # The loan

    def borrow(self, engine: OptInEngine) -> OptInConnection:
        """Return this session's connection to one of its binds.

        Its DBAPI connection is on loan from the pool: kept for the next statement while the pool
        has spare ones, and given back after a statement when it hasn't.

        :param engine: The bind.
        """
        connection = self._loans.get(engine)
        if connection is None or connection.closed:
            if self._is_closed:
                super()._autobegin_t()  # private: which raises SQLAlchemy's own error
            connection = engine.connect()
            connection.on_loan = True
            self._loans[engine] = connection
            # SQLAlchemy 2.1: a session may have execution options for its connections.
            if options := getattr(self, "execution_options", None):
                connection.execution_options(**options)
        return connection

    def give_back(self) -> None:
        """Give the connections on loan back to the pool; the next statement takes one again.

        For code that will not need the database for a while. In a transaction, a connection is
        kept. Sends nothing.
        """
        for connection in self._loans.values():
            connection.give_back()

    def read_from_primary(self) -> None:
        """Send no read to a replica any more, until the session is closed or reset.

        A session that has been to the primary does so by itself, see :mod:`.replicas`.
        """
        self._from_primary = True

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the engine of a mapper or a statement, as SQLAlchemy does.

        :returns: a replica for a SELECT outside, if the engine has some.
        """
        bind = super().get_bind(*args, **kwargs)
        if self._state is INSIDE or self._from_primary:
            return bind
        if not isinstance(bind, OptInEngine) or not bind.replicas:
            return bind
        return source_of(bind, kwargs.get("clause"), self._loans)

    def close(self) -> None:
        """Close the session as SQLAlchemy does, and end the loans."""
        if self._state is OUTSIDE and not self.to_call:  # no transaction ends with it
            self._close()
        else:
            with self.calling_back(only_log=True):
                self._close()

    def _close(self) -> None:
        try:
            super().close()
        finally:
            self._is_closed = self._closes_for_good
            self._end_loans()

    def reset(self) -> None:
        """Reset the session as SQLAlchemy does, and end the loans."""
        with self.calling_back(only_log=True):
            try:
                super().reset()
            finally:
                self._end_loans()

    def invalidate(self) -> None:
        """Close the session as SQLAlchemy does, with its connections, which the pool drops."""
        with self.calling_back(only_log=True):
            try:
                super().invalidate()
            finally:
                for connection in self._loans.values():
                    if not connection.closed:
                        connection.invalidate()
                self._end_loans()

    def _end_loans(self) -> None:
        self._from_primary = False
        try:
            while self._loans:
                self._loans.popitem()[1].close()
        finally:
            if self._loans:  # one failed: the others have to go back all the same
                self._end_loans()

    # Where SQLAlchemy would begin by itself

    # private: each statement comes here for its connection, and SQLAlchemy begins here
    def _connection_for_bind(
        self, engine: Any, execution_options: Any = None, **kw: Any
    ) -> Connection:
        if (
            self._state is INSIDE
            or not isinstance(engine, OptInEngine)
            # private: inside a block whose transaction has ended SQLAlchemy refuses to go on
            or self._trans_context_manager is not None
        ):
            return super()._connection_for_bind(
                engine, execution_options, **kw
            )  # private: as above
        if not execution_options:
            if engine.primary is not None:
                return borrow_to_read(engine, self.borrow, self._loans)
            on_loan = self._loans.get(engine)
            return self.borrow(engine) if on_loan is None or on_loan.closed else on_loan
        if len(split_options(execution_options)[1]) < len(execution_options):
            raise exc.InvalidRequestError(
                "The isolation level and the flags are those of a transaction, and none is open: "
                "give them to `with session.begin(…):`."
            )
        return self.borrow(engine).execution_options(**execution_options)

    # private: SQLAlchemy makes its SessionTransaction here
    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if super().get_transaction() is None and (begin or self.autobegin):
            origin = SessionTransactionOrigin
            return OptInSessionTransaction(self, origin.BEGIN if begin else origin.AUTOBEGIN)
        return super()._autobegin_t(begin)  # private: as above

    # private: reads never write, but on stock binds SQLAlchemy flushes before a read as ever
    def _autoflush(self) -> None:
        if self._state is not INSIDE:
            # private: `new`, `dirty` and `deleted` tell the same and are copies; each read asks
            if self._is_clean() or not self.autoflush:
                return
            try:
                binds = self._changed_binds()
            except exc.UnboundExecutionError:
                return  # for the flush to say, and not for a read
            if not binds or any(map(_is_ours, binds)):
                return
        super()._autoflush()  # private: as above

    def _forget_autobegin(self) -> None:
        """End SQLAlchemy's note of what was changed; objects stay as they are, changes and all."""
        if (noted := super().get_transaction()) is not None:
            noted.close()

    @contextmanager
    def _stored_flush(self, *, alone: bool) -> Generator[None]:
        """One transaction around one flush, committed with it."""
        expire_on_commit = self.expire_on_commit
        self.expire_on_commit = False  # nobody asked for a commit, and the objects are in use
        deleted: list[object] = []
        self._deleted_by_flush = deleted
        try:
            with self.begin():  # an error undoes what the flush did to the objects
                yield
                self._flushing = alone  # private: or commit() would flush what was left out
            self._let_go(deleted)  # which commit() does only with expire_on_commit
        finally:
            self._flushing = False  # private: as above
            self._deleted_by_flush = None
            self.expire_on_commit = expire_on_commit

    @contextmanager
    def _one_call(self) -> Generator[None]:
        """One transaction around one call that writes past the objects, which are left alone.

        So it is not the session's commit(): that flushes, expires, and calls who listens to it.
        """
        with self.calling_back():
            transaction = self.begin()
            assert isinstance(transaction, OptInSessionTransaction)
            try:
                with self.no_autoflush:
                    yield
                begun = [found for one in transaction.taken if (found := one.get_transaction())]
                for one in begun:
                    if isinstance(one, TwoPhaseTransaction):
                        one.prepare()
                try:
                    for one in begun:
                        one.commit()
                except BaseException as error:
                    if isinstance(error, CommitOutcomeUnknown):
                        transaction.on_rollback = ()
                    for one in begun:
                        one.close()  # which SQLAlchemy leaves to who commits by hand
                    raise
                transaction.has_committed()
            finally:
                transaction.close()  # and rolls back what is not committed

    def _write(
        self, call: Callable[..., Any], statement: Any, params: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Execute one INSERT, UPDATE or DELETE outside."""
        of_objects = not isinstance(statement, FromStatement)
        write: Any = statement if of_objects else statement.element
        entity = write.entity_description.get("entity")
        arguments: dict[str, Any] = {"mapper": entity, "clause": write}
        arguments.update(kwargs.get("bind_arguments") or {})
        if not _is_ours(self.get_bind(**arguments)):
            return call(statement, params, **kwargs)
        options: dict[str, Any] = dict(write.get_execution_options())
        options.update(kwargs.get("execution_options") or {})
        is_bulk = isinstance(params, (list, tuple)) or options.get("dml_strategy") == "bulk"
        if of_objects and entity is not None and is_bulk:  # it may be several statements
            with self._one_call() if self._state is OUTSIDE else self._joining():
                return call(statement, params, **kwargs)
        result = call(statement, params, **kwargs)
        if self._state is OUTSIDE:
            self._forget_autobegin()  # it is durable: a rollback() must not bring back a deleted
        return result

    @contextmanager
    def _bulk(self, mappers: Iterable[Any]) -> Generator[OptInSession | None]:
        """A transaction for a call that may send several statements, if none is open."""
        binds = {self.get_bind(mapper) for mapper in set(mappers)}
        # private: inside a block whose transaction has ended SQLAlchemy refuses
        ended = self._trans_context_manager is not None
        if self._state is INSIDE or ended or not any(map(_is_ours, binds)):
            yield None
        elif self._state is OUTSIDE and all(map(_is_ours, binds)):
            # SQLAlchemy's bulk_ methods roll their session back when they fail, with all that is
            # waiting in it. So they get another one, on the same connections.
            apart = OptInSession(twophase=self.twophase)
            apart._loans = self._loans
            apart.borrow = self.borrow  # type: ignore[method-assign]  # with this one's options

            def get_bind(*args: Any, **kwargs: Any) -> Any:
                self._flushing = apart._flushing  # private: sessions that route writes ask it
                try:
                    return self.get_bind(*args, **kwargs)
                finally:
                    self._flushing = False  # private: as above

            apart.get_bind = get_bind  # type: ignore[method-assign]
            with apart._one_call():
                yield apart
        else:
            with self._joining():
                yield None

    def _changed_binds(self) -> set[Any]:
        """Return the binds that a flush would write to."""
        changed = [*self.new, *self.dirty, *self.deleted]
        return {self.get_bind(mapper) for mapper in set(map(object_mapper, changed))}

    def _default_bind(self) -> Any:
        try:
            return self.get_bind()
        except exc.UnboundExecutionError:
            return None

    def _is_on_ours(self) -> bool:
        """Tell whether a transaction would be one of our binds, as far as is known before it."""
        known = {self._default_bind(), *self._changed_binds()} - {None}
        return not known or any(map(_is_ours, known))

    def _check(self, options: TransactionOptions) -> None:
        bind = self._default_bind()
        if isinstance(bind, OptInEngine):  # each other is asked as it joins
            options.over(bind.transaction_options).check(bind.dialect)

    def _already_begun(self) -> str:
        if self._state is INSIDE:
            return (
                "A transaction is already begun on this Session. Use begin_nested() for a "
                "savepoint inside it, or leave this begin() out."
            )
        return (
            "A transaction is already begun on this Session, by SQLAlchemy itself, on a bind "
            "whose connections don't rest in autocommit: one of another database, an engine that "
            "fictive_sqlalchemy.create_engine() has not made, or a Connection. Use commit() or "
            "rollback() before, or begin_nested() for a savepoint inside it."
        )


class _CallingBack(AbstractContextManager[None]):
    """See :meth:`OptInSession.calling_back`. A class, for each end of a transaction goes by it."""

    __slots__ = ("_only_log", "_session")

    def __init__(self, session: OptInSession, only_log: bool) -> None:
        self._session = session
        self._only_log = only_log

    def __enter__(self) -> None:
        self._session.ending += 1

    def __exit__(self, type_: object, *error: object) -> None:
        session = self._session
        session.ending -= 1
        if session.to_call and not session.ending:
            session.called_back(self._only_log or type_ is not None)


def _is_ours(bind: Any) -> bool:
    return isinstance(bind, OptInEngine)


# What reads a relationship with lazy="dynamic": it calls flush() where others call _autoflush().
_DYNAMIC_READ: CodeType = AppenderQuery.session.fget.__code__  # type: ignore[attr-defined]


def _is_a_dynamic_read(frame: FrameType | None) -> bool:
    """Tell whether flush() was called because a relationship with lazy="dynamic" is read."""
    while frame is not None and frame.f_code.co_name == "flush":  # a subclass may have its own
        frame = frame.f_back
    return frame is not None and frame.f_code is _DYNAMIC_READ


# First of all listeners: others may raise.
for _name, _method in (
    ("after_transaction_create", OptInSession.transaction_created),
    ("after_begin", OptInSession.transaction_begun),
    ("after_commit", OptInSession.transaction_committed),
    ("after_transaction_end", OptInSession.transaction_ended),
    ("persistent_to_deleted", OptInSession.object_deleted),
):
    event.listen(OptInSession, _name, _method, insert=True)
