"""The session: what happens outside a transaction, and what ``begin()`` does.

Outside, a session holds no transaction of the database. It holds two other things: the changes you made to objects,
which SQLAlchemy notes down, and connections on loan from the pool, which rest in autocommit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import event, exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin, object_mapper, scoped_session

from .autocommit import DEFAULT, TransactionOptions, split_options
from .connection import OptInConnection
from .engine import OptInEngine
from .transactions import open_transactions

S = TypeVar("S", bound="OptInSession")


class State(Enum):
    """Where a session stands. SQLAlchemy's events move it, see the end of this module.

    ::

                      begin()                      after_transaction_end
        OUTSIDE  ─────────────────▶  INSIDE  ───────────────────────────▶  OUTSIDE
           │                           ▲
           │ a bind that isn't ours    │ flush(), commit() or
           ▼ begins by itself          │ begin_nested() has to join it
         STOCK  ───────────────────────┘           (or ends: OUTSIDE)
    """

    OUTSIDE = "outside"
    """No transaction was asked for. What SQLAlchemy calls a transaction here notes changes and has no connection."""

    INSIDE = "inside"
    """Between ``begin()`` and its end: every bind that is used joins, with a real transaction."""

    STOCK = "stock"
    """SQLAlchemy has begun by itself on a bind that is not an :class:`.OptInEngine`, as it always does on those.
    On our own binds the session is outside."""


class OptInSessionTransaction(SessionTransaction):
    """A session's transaction that goes on with the connection the session has on loan already."""

    options: TransactionOptions = DEFAULT

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        # private: flush and execute both come here for a connection, and there is no event before
        if isinstance(bind, OptInEngine):
            session = self.session
            assert isinstance(session, OptInSession)
            connection = session.borrow(bind)
            if connection.get_transaction() is None:
                connection.transaction_options = self.options.over(bind.transaction_options)
            bind = connection
        elif self.options is not DEFAULT:
            execution_options = {**self.options.as_execution_options(), **(execution_options or {})}
        return super()._connection_for_bind(bind, execution_options)  # private: as above


class OptInSession(Session):
    """A session on which nothing is a transaction unless you ask, and everything you ask for is one.

    Use it wherever SQLAlchemy takes a session class::

        Session = sessionmaker(create_engine(url), class_=OptInSession)

    Outside, reads are the statement alone and never write, ``flush()`` and ``commit()`` write all that is waiting or
    nothing, and ``rollback()`` forgets it. ``with session.begin():`` is a real transaction. On binds that are not
    made by :func:`.create_engine` it is SQLAlchemy's own session.

    It takes the arguments of ``sqlalchemy.orm.Session``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._state = State.OUTSIDE
        self._loans: dict[OptInEngine, OptInConnection] = {}
        super().__init__(*args, **kwargs)

    # -- transactions ------------------------------------------------------------------------------------------

    def begin(
        self,
        nested: bool = False,
        *,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
    ) -> SessionTransaction:
        """Begin a transaction: a context manager that commits, or rolls back on an exception.

        The driver sends BEGIN with the first statement on each bind, and COMMIT or ROLLBACK only after a BEGIN.
        Objects loaded before stay attached, pending ones stay pending and are written inside.

        :param nested: As :meth:`begin_nested`.
        :param isolation_level: The level, in SQLAlchemy's spelling, such as ``"REPEATABLE READ"``.
        :param read_only: ``True`` for a transaction that the server lets read only.
        :param deferrable: ``True`` for a serializable, read-only transaction that waits until it can't fail.
        :returns: SQLAlchemy's ``SessionTransaction``.
        :raises sqlalchemy.exc.ArgumentError: if the database does not know a value; nothing is sent.
        :raises sqlalchemy.exc.InvalidRequestError: if a transaction is open already.
        """
        options = TransactionOptions(isolation_level, read_only, deferrable)
        if self._state is not State.OUTSIDE:
            if nested:
                if options != DEFAULT:
                    raise exc.InvalidRequestError(
                        "A savepoint has the isolation level and the flags of its transaction: give them to the "
                        "begin() of the transaction."
                    )
                self._join()
                return super().begin(nested=True)
            raise exc.InvalidRequestError(self._already_begun())
        if options != DEFAULT:
            self._check(options)
        self._forget_autobegin()
        transaction = super().begin()
        if options != DEFAULT:
            assert isinstance(transaction, OptInSessionTransaction)
            transaction.options = options
        return transaction

    def begin_nested(self) -> SessionTransaction:
        """Set a SAVEPOINT inside a transaction; outside there is nothing to nest in, so it is :meth:`begin`."""
        return self.begin(nested=True)

    def commit(self) -> None:
        """Commit the transaction. Outside, write everything that is waiting in one transaction of its own.

        :raises Exception: what the database says. Outside, nothing is stored then and the session is usable at once.
        """
        if self._state is State.OUTSIDE:
            with self.begin():
                pass
        else:
            self._join()
            super().commit()

    def rollback(self) -> None:
        """Roll the transaction back. Outside, forget what is waiting: pending objects go, changed attributes are
        reloaded at next use; nothing is sent."""
        if self._state is State.OUTSIDE and super().get_transaction() is None:
            super().begin()  # objects can be changed without it: SQLAlchemy notes only the first change
        super().rollback()

    def flush(self, objects: Any = None) -> None:
        """Write what is waiting. Outside it is one transaction of its own, committed when the call returns.

        :param objects: SQLAlchemy's: write these alone. Deprecated since SQLAlchemy 2.1.
        :raises Exception: what the database says. Outside, nothing is stored then and the session is usable at once.
        """
        arguments = () if objects is None else (objects,)
        if self._state is State.INSIDE or self._flushing:  # private: then SQLAlchemy says that it is flushing already
            super().flush(*arguments)
            return
        binds = self._changed_binds()
        if self._state is State.STOCK or not all(isinstance(bind, OptInEngine) for bind in binds):
            if any(isinstance(bind, OptInEngine) for bind in binds):
                self._join()
            super().flush(*arguments)
        elif binds:
            with self._one_call(flushes=True):
                super().flush(*arguments)

    def in_transaction(self) -> bool:
        """Tell whether a transaction is open: ``False`` outside, whatever is pending."""
        return self._state is not State.OUTSIDE

    def get_transaction(self) -> SessionTransaction | None:
        """Return the outermost transaction, ``None`` outside."""
        return super().get_transaction() if self.in_transaction() else None

    # -- statements --------------------------------------------------------------------------------------------

    if not TYPE_CHECKING:  # the overloads of the base class say it better

        def execute(self, statement, params=None, **kwargs):
            """Execute a statement. Outside it stands alone, see :meth:`.OptInConnection.execute`.

            A bulk INSERT or UPDATE of ORM objects outside is one transaction, all or nothing.
            """
            if self._state is not State.INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().execute, statement, params, kwargs)
            return super().execute(statement, params, **kwargs)

        def scalar(self, statement, params=None, **kwargs):
            """Execute a statement and return the first column of the first row, see :meth:`execute`."""
            if self._state is not State.INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().scalar, statement, params, kwargs)
            return super().scalar(statement, params, **kwargs)

        def scalars(self, statement, params=None, **kwargs):
            """Execute a statement and return the first column of each row, see :meth:`execute`."""
            if self._state is not State.INSIDE and getattr(statement, "is_dml", False):
                return self._write(super().scalars, statement, params, kwargs)
            return super().scalars(statement, params, **kwargs)

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        objects = list(objects)
        with self._bulk({object_mapper(instance) for instance in objects}):
            super().bulk_save_objects(objects, *args, **kwargs)

    def bulk_insert_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        with self._bulk({mapper}):
            super().bulk_insert_mappings(mapper, mappings, *args, **kwargs)

    def bulk_update_mappings(self, mapper: Any, mappings: Iterable[dict[str, Any]]) -> None:
        """As SQLAlchemy's; outside it is one transaction, all or nothing."""
        with self._bulk({mapper}):
            super().bulk_update_mappings(mapper, mappings)

    def refresh(self, instance: object, attribute_names: Iterable[str] | None = None, with_for_update: Any = None) -> None:
        """As SQLAlchemy's.

        :raises sqlalchemy.exc.InvalidRequestError: for ``with_for_update`` outside; nothing is lost or sent.
        """
        if with_for_update and self._state is not State.INSIDE and isinstance(self.get_bind(object_mapper(instance)), OptInEngine):
            raise exc.InvalidRequestError(
                "refresh(with_for_update=…) outside a transaction protects nothing: the lock would be gone with the "
                "statement. Put it into `with session.begin():`. Nothing was sent."
            )
        super().refresh(instance, attribute_names, with_for_update)

    def connection(
        self,
        bind_arguments: Any = None,
        execution_options: Any = None,
    ) -> Connection:
        """Return the connection of the transaction; outside, the one on loan, which rests in autocommit.

        :param bind_arguments: SQLAlchemy's, to choose the bind.
        :param execution_options: Execution options for the connection.
        :raises sqlalchemy.exc.InvalidRequestError: for an isolation level or a flag outside.
        """
        return super().connection(bind_arguments, execution_options)

    # -- the loan ----------------------------------------------------------------------------------------------

    def borrow(self, engine: OptInEngine) -> OptInConnection:
        """Return this session's connection to an engine, which it keeps until it is closed.

        The DBAPI connection behind it is on loan from the pool: kept for the next statement while the pool has
        spare ones, given back after a statement when it hasn't.

        :param engine: One of the session's binds.
        """
        connection = self._loans.get(engine)
        if connection is None or connection.closed:
            connection = self._loans[engine] = engine.connect()
            connection.on_loan = True
            options = getattr(self, "execution_options", None)  # SQLAlchemy 2.1
            if options:
                connection.execution_options(**options)
        return connection

    def give_back(self) -> None:
        """Give the connections on loan back to the pool now; the next statement takes one again.

        For code that knows it will not need the database for a while. Connections in a transaction are kept.
        Sends nothing.
        """
        for connection in self._loans.values():
            connection.give_back()

    def close(self) -> None:
        """Close the session as SQLAlchemy does, and give back the connections on loan."""
        try:
            super().close()
        finally:
            self._end_loans()

    def reset(self) -> None:
        """Reset the session as SQLAlchemy does, and give back the connections on loan."""
        try:
            super().reset()
        finally:
            self._end_loans()

    def invalidate(self) -> None:
        """Close the session and its connections, which don't go back to the pool."""
        try:
            super().invalidate()
        finally:
            for connection in self._loans.values():
                if not connection.closed and not connection.invalidated:
                    connection.invalidate()
            self._end_loans()

    def _end_loans(self) -> None:
        loans, self._loans = self._loans, {}
        failures: list[BaseException] = []
        for connection in loans.values():
            try:
                connection.close()
            except BaseException as failure:  # the others have to go back all the same
                failures.append(failure)
        if failures:
            raise failures[0]

    # -- inside ------------------------------------------------------------------------------------------------

    def _connection_for_bind(self, engine: Any, execution_options: Any = None, **kw: Any) -> Connection:
        # private: where SQLAlchemy would autobegin. A block whose transaction has ended goes on refusing.
        if self._state is State.INSIDE or not isinstance(engine, OptInEngine) or self._trans_context_manager is not None:
            return super()._connection_for_bind(engine, execution_options, **kw)  # private: as above
        connection = self.borrow(engine)
        if execution_options:
            if split_options(execution_options)[1] != execution_options:
                raise exc.InvalidRequestError(
                    "The isolation level and the flags are those of a transaction, and none is open: use "
                    "`with session.begin(isolation_level=…):`."
                )
            connection.execution_options(**execution_options)
        return connection

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        # private: where SQLAlchemy makes its SessionTransaction
        if super().get_transaction() is None and (begin or self.autobegin):
            origin = SessionTransactionOrigin.BEGIN if begin else SessionTransactionOrigin.AUTOBEGIN
            return OptInSessionTransaction(self, origin)
        return super()._autobegin_t(begin)  # private: as above

    def _autoflush(self) -> None:
        # private: reads never write. On binds that are not ours SQLAlchemy flushes as ever.
        if self._state is State.INSIDE:
            super()._autoflush()  # private: as above
        elif self.autoflush:
            try:
                binds = self._changed_binds()
            except exc.UnboundExecutionError:
                return
            if binds and not any(isinstance(bind, OptInEngine) for bind in binds):
                super()._autoflush()  # private: as above

    def _join(self) -> None:
        """Let our binds join the transaction that SQLAlchemy has begun by itself on another."""
        self._state = State.INSIDE

    def _forget_autobegin(self) -> None:
        """End SQLAlchemy's note of what was changed outside: the objects stay as they are, pending and dirty."""
        noted = super().get_transaction()
        if noted is not None:
            noted.close()

    @contextmanager
    def _one_call(self, *, flushes: bool = False) -> Iterator[None]:
        """One transaction around one writing call: it stores what the call writes, and nothing else is flushed."""
        expire_on_commit = self.expire_on_commit
        self.expire_on_commit = False  # the caller did not ask for a commit, and goes on with the objects
        transaction = self.begin()
        try:
            if flushes:
                with transaction:  # an error undoes what the flush did to the objects, too
                    yield
                    self._flushing = True  # private: commit() flushes unless a flush is going on
            else:
                try:
                    with self.no_autoflush:
                        yield
                    self._flushing = True  # private: as above
                    transaction.commit()
                except BaseException:
                    transaction.close()  # not rollback(): pending objects have nothing to do with this call
                    raise
        finally:
            self._flushing = False  # private: as above
            self.expire_on_commit = expire_on_commit

    def _write(self, call: Callable[..., Any], statement: Any, params: Any, kwargs: dict[str, Any]) -> Any:
        """Execute one INSERT, UPDATE or DELETE outside."""
        entity = statement.entity_description.get("entity")
        bind = self.get_bind(**{"mapper": entity, "clause": statement, **(kwargs.get("bind_arguments") or {})})
        if not isinstance(bind, OptInEngine):
            return call(statement, params, **kwargs)
        if entity is not None and isinstance(params, (list, tuple)):  # a bulk statement: it may send several
            with self._one_call():
                return call(statement, params, **kwargs)
        result = call(statement, params, **kwargs)
        if self._state is State.OUTSIDE:
            self._forget_autobegin()  # what was written is durable: a later rollback() must not bring it back
        return result

    @contextmanager
    def _bulk(self, mappers: Iterable[Any]) -> Iterator[None]:
        binds = {self.get_bind(mapper) for mapper in mappers}
        if self._state is State.OUTSIDE and binds and all(isinstance(bind, OptInEngine) for bind in binds):
            with self._one_call():
                yield
        else:
            if any(isinstance(bind, OptInEngine) for bind in binds):
                self._join()
            yield

    def _changed_binds(self) -> set[Any]:
        """Return the binds that a flush would write to."""
        changed = [*self.new, *self.dirty, *self.deleted]
        return {self.get_bind(mapper) for mapper in {object_mapper(instance) for instance in changed}} if changed else set()

    def _check(self, options: TransactionOptions) -> None:
        try:
            bind = self.get_bind()
        except exc.UnboundExecutionError:
            return  # each bind is asked when it joins
        if isinstance(bind, OptInEngine):
            options.over(bind.transaction_options).check(bind.dialect)

    def _already_begun(self) -> str:
        if self._state is State.STOCK:
            return (
                "A transaction is already begun on this Session, by a bind whose connections do not rest in autocommit. "
                "commit() or rollback() first, or use begin_nested() for a savepoint."
            )
        return (
            "A transaction is already begun on this Session. Use begin_nested() for a savepoint inside it, or leave "
            "the begin() out."
        )


@event.listens_for(OptInSession, "after_transaction_create")
def _created(session: OptInSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None and transaction.origin is SessionTransactionOrigin.BEGIN:
        session._state = State.INSIDE


@event.listens_for(OptInSession, "after_begin")
def _begun(session: OptInSession, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.parent is not None:
        return
    if session._state is State.OUTSIDE:
        session._state = State.STOCK
    if isinstance(connection, OptInConnection) and connection.on_loan:
        open_transactions.discard(connection.get_transaction())  # it is the session's
        open_transactions.add(transaction, connection)


@event.listens_for(OptInSession, "after_transaction_end")
def _ended(session: OptInSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session._state = State.OUTSIDE
        open_transactions.discard(transaction)
        for connection in session._loans.values():
            connection.give_back_if_wanted()


class OptInScopedSession(scoped_session[S]):
    """A ``scoped_session`` that passes on what :class:`OptInSession` adds."""

    def begin(
        self,
        nested: bool = False,
        *,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
    ) -> SessionTransaction:
        """See :meth:`OptInSession.begin`."""
        return self().begin(nested, isolation_level=isolation_level, read_only=read_only, deferrable=deferrable)

    def give_back(self) -> None:
        """See :meth:`OptInSession.give_back`."""
        self().give_back()
