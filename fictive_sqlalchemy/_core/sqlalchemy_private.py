"""Every private name of SQLAlchemy that this package uses, behind names of our own.

Nothing public does what is done here. Each name has its reason beside it, and a test in
``tests/core/test_private_names.py`` that fails by the private name when SQLAlchemy changes it. No
other module of the package uses a private name of SQLAlchemy; a test says so.

The classes are bases with hooks. A hook that each statement passes is an alias instead of a call,
so that it costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import exc
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.pool import PoolProxiedConnection


class ConnectionHooks(Connection):
    """A ``Connection`` that never autobegins, and may give its DBAPI connection back meanwhile."""

    if TYPE_CHECKING:
        held: PoolProxiedConnection | None
        """The DBAPI connection; ``None`` if it was given back, or is lost, or closed."""
    else:
        # The public `connection` takes one from the pool where there is none. attrgetter is no
        # Python function, which would be slower: each statement reads this.
        held = property(attrgetter("_dbapi_connection"))

    def replace_held(self, another: PoolProxiedConnection | None) -> None:
        """Go on with another DBAPI connection, or with none until the next statement needs one.

        The public ``invalidate()`` would close the one that is held.
        """
        self._dbapi_connection = another

    def _autobegin(self) -> None:
        # Each statement that finds no transaction comes here, and SQLAlchemy begins one.
        pass

    undeclared: Any = None
    """A cursor on the server whose DECLARE has failed, so that there is nothing to close."""

    def _safe_close_cursor(self, cursor: Any) -> None:
        # The one place that is told when a result has been read to its end, or is closed.
        if cursor is not self.undeclared:
            super()._safe_close_cursor(cursor)
            if self.has_streamed or not getattr(cursor, "closed", True):
                self.on_cursor_closed(cursor)

    has_streamed: bool
    """Whether it has had a cursor on the server that outlives its statement."""

    def on_cursor_closed(self, cursor: Any) -> None:
        """Do what follows the end of a stream; also called for a cursor that is left open."""

    def _handle_dbapi_exception(
        self, e: BaseException, statement: Any, parameters: Any, cursor: Any, *args: Any, **kw: Any
    ) -> NoReturn:
        # Each error of the driver passes here. With a listener to "handle_error", which is public,
        # SQLAlchemy would look for listeners several times for each statement that succeeds.
        self.before_error(e, statement, cursor, args[0] if args else kw.get("context"))
        try:
            super()._handle_dbapi_exception(e, statement, parameters, cursor, *args, **kw)
        except exc.DBAPIError as error:
            self.on_error(error, cursor)
            raise

    def before_error(self, error: BaseException, statement: Any, cursor: Any, context: Any) -> None:
        """Do what has to come before SQLAlchemy handles an error of a statement, or of a fetch."""

    def on_error(self, error: exc.DBAPIError, cursor: Any) -> None:
        """Change an error of the driver that SQLAlchemy is about to raise as its own."""

    def connect_anew(self) -> PoolProxiedConnection:
        """Return another DBAPI connection. What the driver says is raised as SQLAlchemy's error.

        The public ``Connection.connection`` refuses in a transaction.
        """
        try:
            return self.engine.raw_connection()
        except self.dialect.loaded_dbapi.Error as error:
            self.raise_wrapped(error)

    def raise_wrapped(self, error: BaseException) -> NoReturn:
        """Raise SQLAlchemy's error for one of the driver's; any other error as it is."""
        if not isinstance(error, self.dialect.loaded_dbapi.Error):
            raise error
        self._handle_dbapi_exception_noconnection(error, self.dialect, self.engine)

    def _log_info(self, message: str, *arg: Any, **kw: Any) -> None:
        # SQLAlchemy logs BEGIN when it may be sent later, and COMMIT where nothing was sent.
        for line in self.lines_to_log(message):
            super()._log_info(line, *arg, **kw)

    def lines_to_log(self, message: str) -> Iterable[str]:
        """Return what to log in place of a message about a transaction."""
        return (message,)

    def _rollback_impl(self) -> None:
        # SQLAlchemy calls this after an error outside a transaction, too, logs ROLLBACK, and calls
        # listeners.
        if self.get_transaction() is not None:
            super()._rollback_impl()

    def _run_ddl_visitor(self, *args: Any, **kwargs: Any) -> None:
        # What create_all(), drop_all(), Table.create() and Table.drop() have in common.
        with self.transaction_around_ddl():
            super()._run_ddl_visitor(*args, **kwargs)

    def transaction_around_ddl(self) -> AbstractContextManager[Any]:
        """Return what surrounds the statements of one ``create_all()``."""
        raise NotImplementedError

    def note_options(self) -> None:
        """Note the execution options, for :meth:`put_options_back`."""
        # Options can be added in public, and not be taken away.
        self._noted_options = self._execution_options, self._message_formatter

    def put_options_back(self) -> None:
        """Forget the execution options that were given since :meth:`note_options`."""
        self._execution_options, self._message_formatter = self._noted_options


class SessionHooks(Session):
    """A ``Session`` whose connections come from :meth:`provide_connection`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "provide_connection" in vars(cls):
            # Each statement comes here for its connection, and SQLAlchemy begins here.
            cls._connection_for_bind = vars(cls)["provide_connection"]  # type: ignore[method-assign]

    def provide_connection(
        self, engine: Any, execution_options: Any = None, **kw: Any
    ) -> Connection:
        """Return the connection that a statement is sent on, as SQLAlchemy does.

        :param engine: What ``get_bind()`` has returned.
        :param execution_options: Those of ``Session.connection()``.
        :param kw: What else SQLAlchemy passes on.
        """
        return super()._connection_for_bind(engine, execution_options, **kw)

    flushed_alone: Collection[object] | None = None
    """The objects that :meth:`flush_only` flushes."""

    # The public `new` and `deleted` would tell, but they copy, and each read asks.
    is_clean = Session._is_clean

    # The public `new` and `deleted` copy, and `dirty` as well.
    new_states = property(attrgetter("_new"))
    changed_states = property(attrgetter("identity_map._modified"))
    deleted_states = property(attrgetter("_deleted"))

    if TYPE_CHECKING:
        entered: Any
        """The transaction or savepoint of the innermost ``with`` block.

        If it has ended, SQLAlchemy refuses all statements until the block is left.
        """
    else:
        # SQLAlchemy notes it nowhere else. attrgetter, because each statement reads it.
        entered = property(
            attrgetter("_trans_context_manager"),
            lambda self, entered: setattr(self, "_trans_context_manager", entered),
        )

    def let_go(self, instances: Iterable[object]) -> None:
        """Expunge objects, and these alone.

        The public ``expunge()`` expunges related objects, too.
        """
        self._expunge_states([instance_state(instance) for instance in instances])

    def flush_only(self, objects: Collection[object]) -> None:
        """Flush these objects alone, as ``flush(objects)`` does, which SQLAlchemy 2.1 deprecates.

        SQLAlchemy has no other way, and would warn the user, who has not called it.

        :param objects: Read after the ``before_flush`` listeners have been called. If it is empty,
            SQLAlchemy flushes everything.
        """
        read_late: Any = objects  # SQLAlchemy iterates over them once, and asks for a sequence
        self.flushed_alone = objects
        try:
            self.flush(read_late)
        finally:
            self.flushed_alone = None

    def _flush(self, objects: Any = None) -> None:
        if self.flushed_alone is not None:
            inspect.unwrap(Session._flush)(self, objects)  # without the decorator that warns
        elif objects is None:
            super()._flush()
        else:
            super()._flush(objects)


class TransactionHooks(SessionTransaction):
    """A ``SessionTransaction`` whose connections come from :meth:`provide_connection`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "provide_connection" in vars(cls):
            # A flush and a statement both come here for a connection, and no event comes before.
            cls._connection_for_bind = vars(cls)["provide_connection"]  # type: ignore[method-assign]

    def provide_connection(self, bind: Any, execution_options: Any) -> Connection:
        """Return the connection of the transaction to a bind, as SQLAlchemy does.

        :param bind: What ``get_bind()`` has returned.
        :param execution_options: Those of ``Session.connection()``.
        """
        return super()._connection_for_bind(bind, execution_options)

    def _prepare_impl(self) -> None:
        # What commit() does before the first COMMIT: it flushes. No event comes after the flush.
        super()._prepare_impl()
        self.before_first_commit()

    def before_first_commit(self) -> None:
        """Do what comes after the flush of ``commit()``, before any connection has a COMMIT.

        With ``twophase=True``, each connection of the outermost transaction is prepared by then.
        """

    def restore_objects(self) -> None:
        """Give objects the state that they had at the begin, as a rollback does.

        After a flush that failed, ``rollback()`` would do that, but with a warning.
        """
        self._restore_snapshot(dirty_only=self.nested)


# Whether a Connection, an Engine or a Dialect has listeners at all. The public `dispatch` has to be
# asked event by event.
has_listeners: Callable[[Any], bool] = attrgetter("_has_events")


def orphan_rules(mapper: Any) -> tuple[Collection[object], ...]:
    """Return the lists of what can make orphans of a class; they grow as classes are mapped.

    :param mapper: The mapper of the class.
    """
    return tuple(each._delete_orphans for each in mapper.iterate_to_root())


def is_orphan(state: Any) -> bool:
    """Tell whether a flush would delete an object, because no other object owns it any more.

    :param state: The state of the object.
    """
    # Each relationship with a delete-orphan cascade that leads to it, whatever declares that.
    return bool(state.mapper._is_orphan(state))


def forget_addition(instance: object, name: str, item: object) -> None:
    """Take an object out of what waits to be added to a collection that is not loaded.

    SQLAlchemy adds it when the collection is loaded, and removes it with events only.

    :param instance: The object with the collection.
    :param name: The name of the collection.
    :param item: The object to take out.
    """
    state: Any = instance_state(instance)
    pending = state._pending_mutations.get(name)
    if pending is not None and item in pending.added_items:
        pending.added_items.remove(item)
