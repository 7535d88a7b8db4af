"""Every private name of SQLAlchemy that this package uses, behind names of our own.

SQLAlchemy has no public name that does the same. A comment beside each private name gives the
reason for its use. When SQLAlchemy changes a name, a test in ``tests/core/test_private_names.py``
fails and says which name changed. No other module of the package uses a private name of SQLAlchemy.
A test checks that, too.

The classes are base classes with hooks. A hook that each statement passes through is an alias of
the private method instead of a function that calls it. So the hook costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import exc
from sqlalchemy.engine import Connection, RootTransaction
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import PoolProxiedConnection


class ConnectionHooks(Connection):
    """A ``Connection`` that never autobegins, and that may have no DBAPI connection for a time."""

    if TYPE_CHECKING:
        held: PoolProxiedConnection | None
        """The DBAPI connection; ``None`` if it was given back, lost or closed."""
    else:
        # The public `connection` would take a DBAPI connection from the pool if none is held. Each
        # statement reads this property: attrgetter is faster than a Python function.
        held = property(attrgetter("_dbapi_connection"))

    def replace_held(self, another: PoolProxiedConnection | None) -> None:
        """Go on with another DBAPI connection, or with none until the next statement needs one.

        The public ``invalidate()`` would close the DBAPI connection that is held.
        """
        self._dbapi_connection = another

    # SQLAlchemy calls this for each statement outside a transaction, to begin a transaction. bool()
    # does nothing, and is faster than a Python function.
    _autobegin: Any = staticmethod(bool)

    if TYPE_CHECKING:
        root_transaction: RootTransaction | None
        """The outermost transaction, as the public ``get_transaction()`` returns it."""
    else:
        # Each statement reads this property: attrgetter is faster than a Python function.
        root_transaction = property(attrgetter("_transaction"))

    undeclared: Any = None
    """A server-side cursor whose DECLARE has failed, so that there is nothing to close."""

    def _safe_close_cursor(self, cursor: Any) -> None:
        # SQLAlchemy calls this when a result was read to its end or closed. No event tells that.
        if cursor is not self.undeclared:
            Connection._safe_close_cursor(self, cursor)  # super() is slower
            if self.has_streamed or not getattr(cursor, "closed", True):
                self.on_cursor_closed(cursor)

    has_streamed: bool
    """Whether the connection has had a server-side cursor that outlives its statement."""

    def on_cursor_closed(self, cursor: Any) -> None:
        """Do what has to follow the end of a stream. Also called if a cursor was left open."""

    def _handle_dbapi_exception(
        self, e: BaseException, statement: Any, parameters: Any, cursor: Any, *args: Any, **kw: Any
    ) -> NoReturn:
        # Each error of the driver passes through here. A listener to the public event
        # "handle_error" would make SQLAlchemy look for listeners several times in each statement.
        self.before_error(e, statement, cursor, args[0] if args else kw.get("context"))
        try:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, *args, **kw)
        except exc.DBAPIError as error:
            another = self.on_error(error, cursor)
            if another is None:
                raise
            raise another from error

    def before_error(self, error: BaseException, statement: Any, cursor: Any, context: Any) -> None:
        """Do what has to be done before SQLAlchemy handles an error of a statement or a fetch."""

    def on_error(self, error: exc.DBAPIError, cursor: Any) -> exc.DBAPIError | None:
        """Change an error of the driver that SQLAlchemy has wrapped and is about to raise.

        :returns: An error to raise in place of the first one, or ``None``.
        """

    def connect_anew(self) -> PoolProxiedConnection:
        """Return another DBAPI connection. An error of the driver is raised as SQLAlchemy's error.

        The public ``Connection.connection`` refuses to reconnect in a transaction.
        """
        try:
            return self.engine.raw_connection()
        except self.dialect.loaded_dbapi.Error as error:
            self.raise_wrapped(error)

    def raise_wrapped(self, error: BaseException) -> NoReturn:
        """Raise an error of the driver as SQLAlchemy's error, and any other error as it is."""
        if not isinstance(error, self.dialect.loaded_dbapi.Error):
            raise error
        self._handle_dbapi_exception_noconnection(error, self.dialect, self.engine)

    def _log_info(self, message: str, *arg: Any, **kw: Any) -> None:
        # SQLAlchemy logs BEGIN although it may be sent later, and COMMIT although nothing was sent.
        for line in self.lines_to_log(message):
            super()._log_info(line, *arg, **kw)

    def lines_to_log(self, message: str) -> Iterable[str]:
        """Return what to log in place of a message about a transaction."""
        return (message,)

    def _rollback_impl(self) -> None:
        # SQLAlchemy also calls this after an error outside a transaction. The original would then
        # log ROLLBACK and call listeners.
        if self.get_transaction() is not None:
            super()._rollback_impl()

    def _run_ddl_visitor(self, *args: Any, **kwargs: Any) -> None:
        # create_all(), drop_all(), Table.create() and Table.drop() all call this.
        with self.transaction_around_ddl():
            super()._run_ddl_visitor(*args, **kwargs)

    def transaction_around_ddl(self) -> AbstractContextManager[Any]:
        """Return a context manager for the statements of one ``create_all()``."""
        raise NotImplementedError

    def note_options(self) -> None:
        """Note the execution options, for :meth:`put_options_back`."""
        # Public methods can add options, but they can't remove options.
        self._noted_options = self._execution_options, self._message_formatter

    def put_options_back(self) -> None:
        """Restore the execution options that :meth:`note_options` has noted."""
        self._execution_options, self._message_formatter = self._noted_options


class SessionHooks(Session):
    """A ``Session`` whose connections come from :meth:`provide_connection`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "provide_connection" in vars(cls):
            # Each statement gets its connection here. SQLAlchemy would begin a transaction.
            cls._connection_for_bind = vars(cls)["provide_connection"]  # type: ignore[method-assign]

    def provide_connection(
        self, engine: Any, execution_options: Any = None, **kw: Any
    ) -> Connection:
        """Return the connection that a statement is sent on, as SQLAlchemy does.

        :param engine: The bind that ``get_bind()`` has returned.
        :param execution_options: The execution options of ``Session.connection()``.
        :param kw: The other arguments of SQLAlchemy.
        """
        return super()._connection_for_bind(engine, execution_options, **kw)

    flushed_alone: Collection[object] | None = None
    """The objects that :meth:`flush_only` flushes."""

    # Each read calls this. The public `new`, `dirty` and `deleted` are slower, because they copy.
    is_clean = Session._is_clean

    if TYPE_CHECKING:
        pending_states: tuple[Collection[Any], Collection[Any], Collection[Any]]
        """The pending changes: the states of the new, the changed and the deleted objects."""
    else:
        # The public `new`, `dirty` and `deleted` copy, and contain objects instead of states.
        pending_states = property(attrgetter("_new", "identity_map._modified", "_deleted"))

    if TYPE_CHECKING:
        current_transaction: SessionTransaction | None
        """The innermost transaction, which may be a savepoint, or belong to a flush.

        ``None`` if there is not even a ``SessionTransaction`` that only notes changes.
        """
    else:
        # The public get_transaction() and get_nested_transaction() are slower.
        current_transaction = property(attrgetter("_transaction"))

    if TYPE_CHECKING:
        entered: Any
        """The transaction or savepoint of the innermost ``with`` block.

        If that has ended, SQLAlchemy refuses all statements until the block is left.
        """
    else:
        # No public name tells this. Each statement reads the property: attrgetter is faster.
        entered = property(
            attrgetter("_trans_context_manager"),
            lambda self, entered: setattr(self, "_trans_context_manager", entered),
        )

    def let_go(self, instances: Iterable[object]) -> None:
        """Expunge these objects and no other ones.

        The public ``expunge()`` also expunges related objects.
        """
        self._expunge_states([instance_state(instance) for instance in instances])

    def flush_only(self, objects: Collection[object]) -> None:
        """Flush these objects alone.

        The public ``flush(objects)`` is deprecated in SQLAlchemy 2.1, and would warn users, who
        have not called it.

        :param objects: The objects. SQLAlchemy reads the collection after it has called the
            ``before_flush`` listeners. If the collection is empty then, all objects are flushed.
        """
        read_late: Any = objects  # SQLAlchemy asks for a sequence, and only iterates once
        self.flushed_alone = objects
        # The unwrapped function lacks the decorator that warns.
        self._flush = partial(inspect.unwrap(Session._flush), self)  # type: ignore[method-assign]
        try:
            self.flush(read_late)
        finally:
            del self._flush
            self.flushed_alone = None


class TransactionHooks(SessionTransaction):
    """A ``SessionTransaction`` whose connections come from :meth:`provide_connection`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "provide_connection" in vars(cls):
            # A flush and a statement both get their connection here. No event comes before.
            cls._connection_for_bind = vars(cls)["provide_connection"]  # type: ignore[method-assign]

    def provide_connection(self, bind: Any, execution_options: Any) -> Connection:
        """Return the connection of the transaction to a bind, as SQLAlchemy does.

        :param bind: The bind that ``get_bind()`` has returned.
        :param execution_options: The execution options of ``Session.connection()``.
        """
        return super()._connection_for_bind(bind, execution_options)

    def _prepare_impl(self) -> None:
        # commit() flushes here, before the first COMMIT. SQLAlchemy calls no event between the two.
        super()._prepare_impl()
        self.before_first_commit()

    def before_first_commit(self) -> None:
        """Do what has to be done after the flush of ``commit()``, before COMMIT on any connection.

        With ``twophase=True``, each connection of the outermost transaction is prepared already.
        """

    def restore_objects(self) -> None:
        """Restore the state that the objects had when the transaction began, as a rollback does.

        After a flush that failed, ``rollback()`` would restore it, too, but would also warn.
        """
        self._restore_snapshot(dirty_only=self.nested)


# Whether a Connection, an Engine or a Dialect has any listeners. The public `dispatch` tells this
# for one event at a time, which is slower.
has_listeners: Callable[[Any], bool] = attrgetter("_has_events")


# How many connections a QueuePool has opened beyond those that it keeps; negative while it has
# opened fewer. Each statement outside a transaction calls this. The public `overflow()` is slower.
overflow_of: Callable[[Any], int] = attrgetter("_overflow")


def orphan_rules(mapper: Any) -> tuple[Collection[object], ...]:
    """Return the lists of relationships that can make orphans of the objects of a class.

    The lists grow while more classes are mapped. No public attribute contains them.

    :param mapper: The mapper of the class.
    """
    return tuple(each._delete_orphans for each in mapper.iterate_to_root())


def is_orphan(state: Any) -> bool:
    """Tell whether a flush would delete an object, because no other object owns it any more.

    :param state: The state of the object.
    """
    # The answer depends on each relationship with a delete-orphan cascade that leads to the class
    # of the object, whichever class declares the relationship.
    return bool(state.mapper._is_orphan(state))


def forget_addition(instance: object, name: str, item: object) -> None:
    """Cancel the addition of an object to a collection that is not loaded.

    SQLAlchemy keeps the added object apart, and adds it when the collection is loaded. The public
    methods that remove the object also call event listeners.

    :param instance: The object with the collection.
    :param name: The name of the collection.
    :param item: The object to take out.
    """
    state: Any = instance_state(instance)
    pending = state._pending_mutations.get(name)
    if pending is not None and item in pending.added_items:
        pending.added_items.remove(item)


def is_of_asyncio_extension(greenlet: Any) -> bool:
    """Tell whether SQLAlchemy's asyncio extension has made a greenlet, for one call."""
    # The class of these greenlets is private, too.
    return getattr(greenlet, "__sqlalchemy_greenlet_provider__", False) is True
