"""The state of a session: outside a transaction, inside one, or on a stock bind.

Outside, a session has no transaction in the database. SQLAlchemy's ``SessionTransaction`` then has
no connection, and only notes which objects have changed. The session's connections, which are on
loan from the pool, are in autocommit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin, object_mapper

from . import observing
from .blocks import (
    Block,
    FlushThatLeavesObjects,
    OptInSavepoint,
    OptInSessionTransaction,
)
from .callbacks import Callbacks
from .connection import OptInConnection
from .engine import OptInEngine
from .errors import see
from .loans import Loans
from .local_settings import LocalSettings, Settings, check_source, checked
from .options import split_options
from .places import calling_place
from .replicas import borrow_to_read, may_write, source_of
from .sqlalchemy_private import SessionHooks
from .transacting import has_one_snapshot
from .writes import Kind, WritingCall


class State(Enum):
    """The state of a session.

    ::

                  begin(), a write               the transaction ends
        OUTSIDE  ──────────────────▶  INSIDE  ───────────────────────────▶  OUTSIDE
           │                             ▲
           │ a stock bind is             │ our binds have to join: begin_nested(), commit(),
           ▼ used                        │ or a flush() that writes to both
         STOCK  ─────────────────────────┘              (or the transaction ends: OUTSIDE)

    A transaction that a write has begun ends with the call that has written, or with ``commit()``,
    ``rollback()`` or ``close()``: see :mod:`.writes`.
    """

    OUTSIDE = "outside"
    """No transaction was asked for. SQLAlchemy's ``SessionTransaction`` only notes changes."""

    INSIDE = "inside"
    """A transaction is open. Each bind that is used joins it with a real transaction."""

    STOCK = "stock"
    """SQLAlchemy has begun a transaction by itself, on a bind that is not an :class:`.OptInEngine`.
    For each :class:`.OptInEngine`, the session is still outside."""


# Each statement reads the state, and reading an attribute of an Enum is slow.
OUTSIDE, INSIDE, STOCK = State


class SessionStates(SessionHooks):
    """The state machine of a session, and the connection that a statement gets in each state."""

    begins_on_write: bool
    """Whether the first write outside begins a transaction that lasts until ``commit()``."""

    local_settings: LocalSettings | None = None
    """The settings that its statements carry: see :meth:`set_local`."""

    def __init__(
        self,
        *args: Any,
        begin_on_write: bool = False,
        local_settings: Callable[[], Settings | None] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(begin_on_write, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise exc.ArgumentError(
                f"begin_on_write is True or False, not {begin_on_write!r}."
                + see("begin-on-write-option")
            )
        if begin_on_write and kwargs.get("autobegin") is False:
            raise exc.ArgumentError(
                "begin_on_write=True lets a write begin a transaction, which autobegin=False "
                "forbids: leave one of them out." + see("begin-on-write-option")
            )
        if local_settings is not None:
            check_source(local_settings)
            self.local_settings = LocalSettings(local_settings)
        self._settings_source = local_settings
        self._state = OUTSIDE
        self._loans = Loans()
        self._from_primary = False
        self._autoflushes = True
        self._has_handed_out = False
        self._closes_for_good = kwargs.get("close_resets_only") is False
        self._is_closed = False
        self.begins_on_write = begin_on_write
        self.writing_call: WritingCall | None = None
        self.callbacks = Callbacks()
        super().__init__(*args, **kwargs)

    # The transitions that SQLAlchemy's events cause (see the end of this module)

    def transaction_created(self, transaction: SessionTransaction) -> None:
        """Set the class of a transaction. If ``begin()`` has created it, enter the state INSIDE."""
        origin = transaction.origin
        # SQLAlchemy has no parameter for the class of a transaction.
        if origin is SessionTransactionOrigin.BEGIN_NESTED:
            transaction.__class__ = OptInSavepoint
        elif origin is not SessionTransactionOrigin.SUBTRANSACTION:
            transaction.__class__ = OptInSessionTransaction
            if origin is SessionTransactionOrigin.BEGIN:
                self._state = INSIDE
                if (recorder := observing.recorder) is not None:
                    recorder.note_block(transaction)
        elif (
            self.writing_call is not None
            and self.writing_call.kind is Kind.ALONE
            and not self.begins_on_write
        ):
            transaction.__class__ = FlushThatLeavesObjects

    def transaction_begun(self, transaction: SessionTransaction, connection: Connection) -> None:
        """Note that a bind has joined a transaction. Outside, only a stock bind joins one."""
        if isinstance(transaction, Block):
            transaction.begun_on |= {connection}
        if self._state is OUTSIDE and isinstance(transaction, OptInSessionTransaction):
            self._state = STOCK

    def transaction_committed(self) -> None:
        """Note that the innermost transaction or savepoint is committed."""
        committed = self.current_transaction
        if isinstance(committed, Block):
            committed.hand_over_callbacks()

    def transaction_ended(self, transaction: SessionTransaction) -> None:
        """Note the end of a transaction. If it is the outermost one, enter the state OUTSIDE."""
        if isinstance(transaction, Block):
            transaction.note_end()
        if isinstance(transaction, OptInSessionTransaction):
            self._state = OUTSIDE
            self._loans.leave(transaction)

    def object_deleted(self, instance: object) -> None:
        """Note an object whose row was deleted, for the end of the :class:`.WritingCall`."""
        if self.writing_call is not None:
            self.writing_call.deleted.append(instance)

    # The transitions that a write causes

    def begin_implicitly(self) -> OptInSessionTransaction:
        """Begin a transaction because of a write. :mod:`.writes` decides when it ends."""
        transaction = self.autobegun()
        self._state = INSIDE
        if self.writing_call is not None:
            self.writing_call.note_begin(transaction)
        if self.begins_on_write:
            transaction.begun_at = calling_place()
        if self._has_handed_out:
            self.join_handed_out()
        return transaction

    def leave_to_stock(self, transaction: OptInSessionTransaction) -> None:
        """Leave the state INSIDE, if no :class:`.OptInEngine` has joined the transaction."""
        self._state = STOCK if transaction.has_stock() else OUTSIDE

    @contextmanager
    def transaction_around_call(self, connection: OptInConnection) -> Generator[None]:
        """Surround a call that may send several writing statements with one transaction.

        :param connection: The connection that sends them.
        """
        if self._state is STOCK:  # the session's transaction would stay open until commit()
            with connection.begin():
                yield
            return
        with WritingCall(self, Kind.STATEMENT):
            self.join(connection)
            yield

    def join(self, connection: OptInConnection) -> None:
        """Make a connection on loan part of the transaction. Begin a transaction if none is open.

        :param connection: The connection.
        """
        if self._state is not INSIDE:
            self.begin_implicitly()
        innermost: Any = super().get_nested_transaction() or super().get_transaction()
        innermost.provide_connection(connection.engine, None)

    def join_handed_out(self) -> None:
        """Make the connections that the user has part of the transaction that begins.

        The user may send something on a cursor of the DBAPI connection, and nobody sees when. Sends
        nothing, or SAVEPOINT if the transaction is a savepoint.
        """
        for connection in self._loans.handed_out():
            self.join(connection)

    # Queries

    @property
    def is_inside(self) -> bool:
        """Whether a transaction is open that our binds join."""
        return self._state is INSIDE

    @property
    def is_outside(self) -> bool:
        """Whether no transaction is open, not even on a stock bind."""
        return self._state is OUTSIDE

    def noted_transaction(self) -> Any:
        """Return SQLAlchemy's outermost ``SessionTransaction``. Outside, it only notes changes."""
        return self.current_transaction and super().get_transaction()

    def autobegun(self) -> OptInSessionTransaction:
        """Return SQLAlchemy's outermost ``SessionTransaction``. Make one if there is none."""
        transaction = self.noted_transaction()
        if transaction is None:
            state = self._state
            transaction = super().begin()
            transaction.origin = SessionTransactionOrigin.AUTOBEGIN  # nobody has called begin()
            self._state = state
        assert isinstance(transaction, OptInSessionTransaction)
        return transaction

    def innermost(self) -> Block | None:
        """Return the innermost transaction or savepoint that is open.

        :raises sqlalchemy.exc.InvalidRequestError: in a block whose transaction has already ended.
        """
        if self._state is OUTSIDE:
            if self.entered is not None and not self.callbacks.ending:
                raise exc.InvalidRequestError(
                    "The transaction of this block was ended inside it, by commit(), rollback() or "
                    "close(): leave the block before you go on." + see("ended-in-block")
                )
            return None
        innermost = super().get_nested_transaction() or super().get_transaction()
        return innermost if isinstance(innermost, Block) else None

    def may_call_back(self) -> bool:
        """Tell whether callbacks may be called: no transaction is open, and no block is entered."""
        return self._state is not INSIDE and self.entered is None

    def _changed_binds(self) -> set[Any]:
        """Return the binds of the pending changes, as a flush finds them."""
        changed = [*self.new, *self.dirty, *self.deleted]
        return {self.get_bind(mapper) for mapper in set(map(object_mapper, changed))}

    def engines_in_use(self) -> list[OptInEngine]:
        """Return the engines whose connections the session has on loan."""
        return list(self._loans)

    def _default_bind(self) -> Any:
        try:
            return self.get_bind()
        except exc.UnboundExecutionError:
            return None

    def is_on_ours(self) -> bool:
        """Tell whether a transaction would include an :class:`.OptInEngine`, as far as is known.

        The default bind and the binds of the pending changes are known.
        """
        known = {self._default_bind(), *self._changed_binds()} - {None}
        return not known or any(map(is_opt_in, known))

    # Reads never write

    if TYPE_CHECKING:
        autoflush: bool
    else:

        @property
        def autoflush(self):
            """Whether SQLAlchemy flushes before a statement.

            Outside, the value is ``None``, which SQLAlchemy reads as off. But ``no_autoflush``
            reads the value and sets it again later. So the setter reads ``None`` as on.
            """
            if not self._autoflushes:
                return False
            if self._state is INSIDE or self.begins_on_write or self.writing_call is not None:
                return True
            if self.is_clean():
                return None
            if self._has_stock_changes_only():
                return True
            if (observer := observing.observer) is not None:
                observer.read_passes_over(self)
            return None

        @autoflush.setter
        def autoflush(self, value):
            self._autoflushes = value is None or bool(value)

    def _has_stock_changes_only(self) -> bool:
        """Tell whether all pending changes are for stock binds, where SQLAlchemy autoflushes."""
        if self.connection_callable is not None:
            return False  # with shards, each object may have another bind
        try:
            binds = self._changed_binds()
        except exc.UnboundExecutionError:
            return False  # the flush raises this error, and not a read
        return bool(binds) and not any(map(is_opt_in, binds))

    # Connections

    def provide_connection(
        self, engine: Any, execution_options: Any = None, **kw: Any
    ) -> Connection:
        if (
            self._state is INSIDE
            or not isinstance(engine, OptInEngine)
            # In a block whose transaction has ended, SQLAlchemy refuses statements.
            or self.entered is not None
        ):
            return super().provide_connection(engine, execution_options, **kw)
        if (
            self.begins_on_write
            and engine.primary is None
            # This borrows first, because an engine knows the server's default level after its use.
            and has_one_snapshot(self.borrow(engine))
        ):
            self.begin_implicitly()
            return super().provide_connection(engine, execution_options, **kw)
        if not execution_options:
            if engine.primary is not None:
                return borrow_to_read(engine, self.borrow, self._loans)
            on_loan = self._loans.get(engine)  # borrow(), inlined: each statement passes here
            if on_loan is not None and on_loan.held is not None:
                return on_loan
            return self.borrow(engine)
        options, others = split_options(execution_options)
        if len(others) < len(execution_options):
            instead = "pass them to `with session.begin(…):`"
            if options.isolation_level == "AUTOCOMMIT":
                instead = "for AUTOCOMMIT, use `with engine.connect() as connection:`"
            raise exc.InvalidRequestError(
                "The isolation level and the flags belong to a transaction, and no transaction is "
                f"open: {instead}." + see("options-without-transaction")
            )
        return self.borrow(engine).execution_options(**execution_options)

    def borrow(self, engine: OptInEngine) -> OptInConnection:
        """Return the session's connection to a bind. Take one on loan if the session has none.

        :param engine: The bind.
        """
        on_loan = self._loans.get(engine)
        # A connection with a DBAPI connection is not closed. Reading `closed` takes a call.
        if on_loan is not None and (on_loan.held is not None or not on_loan.closed):
            return on_loan
        if self._is_closed:
            super().begin()  # raises SQLAlchemy's own error
        # In SQLAlchemy 2.1 a session may have execution options for its connections.
        return self._loans.borrow(engine, self, getattr(self, "execution_options", None))

    def set_local(self, settings: Settings) -> None:
        """Send settings with each statement of this session, until the session is closed or reset.

        ``session.set_local({"app.tenant_id": 7, "statement_timeout": "5s"})``. Outside a
        transaction the settings are sent with each statement, in the same round trip, and end with
        the statement. In a transaction they are sent once, with the first statement. After a
        change, they are sent again with the next statement. The connection keeps no setting. This
        call sends nothing.

        The settings are set as by PostgreSQL's ``set_config(name, value, true)`` or SET LOCAL:
        https://www.postgresql.org/docs/current/functions-admin.html. Statements on cursors of the
        driver, and statements to another database, are sent without the settings.

        :param settings: The settings by name. A value is a string, a number, a bool or a UUID;
            ``None`` removes the setting.
        :raises sqlalchemy.exc.ArgumentError: if a name or a value is invalid. Nothing is changed.
        :raises sqlalchemy.exc.InvalidRequestError: by this call or a later statement, if the
            session uses a bind of PostgreSQL that is no engine of :func:`.create_engine`, or whose
            driver is neither psycopg2 nor psycopg 3.
        """
        given = checked(settings)
        if self.local_settings is None:
            own = LocalSettings()
            for connection in getattr(self.noted_transaction(), "begun_on", ()):
                if not (isinstance(connection, OptInConnection) and connection.owner is self):
                    self.refuse_stock(connection, given)
            for on_loan in self._loans.values():
                on_loan.carry(own)
            self.local_settings = own
        self.local_settings.update(given)

    def ask_for_settings(self) -> None:
        """Call the function of ``local_settings``, unless it has returned settings already.

        Each call that sends something does this first, because the function may use the session: it
        can't be called in the middle of a statement or a flush.

        :raises sqlalchemy.exc.InvalidRequestError: if the function has closed or reset the session.
        """
        settings = self.local_settings
        if settings is None or not settings.is_to_ask:
            return
        if (innermost := self.innermost()) is not None and not innermost.is_active:
            return  # SQLAlchemy refuses what is to be sent, and would refuse the function's reads
        settings.refuses_flush = not self.is_clean()
        try:
            with self.no_autoflush:
                settings.ask()
        finally:
            settings.refuses_flush = False
        if self.local_settings is not settings:
            raise exc.InvalidRequestError(
                "The function of local_settings has closed or reset the session that it was called "
                "for, so its settings are lost: remove that call from the function. Nothing was "
                "sent." + see("settings-not-sent")
            )

    def refuse_to_store_without_settings(self) -> None:
        """Refuse to store what was pending before the function of ``local_settings`` was called.

        :raises sqlalchemy.exc.InvalidRequestError: while the function runs.
        """
        if self.local_settings is not None and self.local_settings.refuses_flush:
            raise exc.InvalidRequestError(
                "The function of local_settings would store pending changes of the session before "
                "the settings are known: let the function only read, and not use a block. Nothing "
                "was stored." + see("settings-not-sent")
            )

    def refuse_stock(self, bind: Engine | Connection, settings: Mapping[str, object]) -> None:
        """Refuse settings on a bind of PostgreSQL that is no engine of ours.

        :param bind: The bind.
        :param settings: The settings of the session. If there are none, every bind is accepted.
        :raises sqlalchemy.exc.InvalidRequestError: if there are settings, and the bind is refused.
        """
        if settings and bind.dialect.name == "postgresql":
            raise exc.InvalidRequestError(
                "The settings of set_local() can only be sent with the statements of engines that "
                "fictive_sqlalchemy.create_engine() makes, and this session uses a bind that is "
                "another engine, or a Connection: bind the session to such an engine."
                + see("settings-on-other-engine")
            )

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """Return the connection to a bind, as SQLAlchemy does.

        Outside, each statement on the connection stands alone. The connection joins each
        transaction that the session begins later, and so do cursors of its DBAPI connection. With
        ``begin_on_write=True`` this call begins the transaction, because nobody sees what is sent
        on a cursor of the DBAPI connection.

        :param bind_arguments: As SQLAlchemy takes them.
        :param execution_options: As SQLAlchemy takes them.
        :raises sqlalchemy.exc.InvalidRequestError: if the options have an isolation level or flags,
            and no transaction is open.
        """
        self.ask_for_settings()
        if self.begins_on_write and self._state is not INSIDE:
            bind = super().connection(bind_arguments)
            if not isinstance(bind, OptInConnection):
                return bind
            self.begin_implicitly()
        connection = super().connection(bind_arguments, execution_options)
        if isinstance(connection, OptInConnection) and connection.owner is self:
            connection.is_handed_out = self._has_handed_out = True
        return connection

    def give_back(self) -> None:
        """Return the session's connections to the pool. The next statement takes one again.

        This is for code that will not need the database for a while. A connection in a transaction
        is kept. Sends nothing.
        """
        self._loans.give_back()

    def read_from_primary(self) -> None:
        """Send all reads to the primary from now on, until the session is closed or reset.

        A session that has used the primary does so without this call: see :mod:`.replicas`.
        """
        self._from_primary = True

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """Return the engine of a mapper or a statement, as SQLAlchemy does.

        :returns: For a SELECT outside a transaction, a replica of the engine, if it has any.
        """
        bind: Any = super().get_bind(*args, **kwargs)
        if self._state is INSIDE or self._from_primary or not getattr(bind, "replicas", ()):
            return bind
        clause = kwargs.get("clause")
        if self.begins_on_write and (
            has_one_snapshot(self._loans.get(bind) or bind) or may_write(clause, bind)
        ):
            return bind
        return source_of(bind, clause, self._loans)

    def _end_loans(self) -> None:
        """Give the connections back, and forget what lasts until the session is closed."""
        self._from_primary = self._has_handed_out = False
        source = self._settings_source
        self.local_settings = None if source is None else LocalSettings(source)
        self._loans.end()


def is_opt_in(bind: Any) -> bool:
    """Tell whether a bind is an engine of :func:`.create_engine`."""
    return isinstance(bind, OptInEngine)


# These come before all other listeners, because the others may raise errors.
for _name, _method in (
    ("after_transaction_create", SessionStates.transaction_created),
    ("after_begin", SessionStates.transaction_begun),
    ("after_commit", SessionStates.transaction_committed),
    ("after_transaction_end", SessionStates.transaction_ended),
    ("persistent_to_deleted", SessionStates.object_deleted),
):
    event.listen(SessionStates, _name, _method, insert=True)
