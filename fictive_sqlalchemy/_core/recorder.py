"""Records what is sent, and which transaction is open: the mechanics of :mod:`.recording`.

While nothing records, :data:`.observing.recorder` is ``None``, and this module is not called. While
something records, the functions of a dialect that execute a statement are replaced, on the dialects
of the recorded engines. SQLAlchemy's events would serve as well. But if a listener to the events of
statements is registered, BEGIN and COMMIT are sent around a transaction that is one statement,
because the listener could tell the difference (see :mod:`.one_statement`). So a recording by events
would change what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from sqlalchemy.engine import Dialect

from . import observing
from .errors import sqlstate
from .places import Place, calling_place, place_of
from .records import USE, ConnectionUse, RecordedTransaction, Statement, Transaction
from .round_trips import NOTING, Counter, counters_for, noting_cursor
from .transacting import TransactingConnection

if TYPE_CHECKING:
    from .resting import RestingEngine

_EXECUTE = ("do_execute", "do_execute_no_params", "do_executemany")


class Sink(Protocol):
    """What the recorder needs of a recording, to which it passes what was sent."""

    keeps_parameters: bool

    def covers(self, connection: TransactingConnection) -> bool:
        """Tell whether what is sent on a connection belongs to the recording."""
        ...

    def add_statement(self, statement: Statement) -> None:
        """Note a statement, whose transaction is already set."""
        ...

    def note_round_trip(self, statement: Statement) -> None:
        """Hear that a part of a stream was read, after the statement has counted the round trip."""
        ...

    def add_transaction(self, transaction: Transaction) -> None:
        """Note a transaction that begins."""
        ...

    def end_transaction(self, transaction: Transaction) -> None:
        """Hear that a transaction has ended; called in the thread that has ended it."""
        ...

    def add_use(self, use: ConnectionUse) -> None:
        """Note the use of a connection."""
        ...


of_this_context: ContextVar[tuple[Sink, ...]] = ContextVar("recordings", default=())
"""The recordings of what is sent in this context alone, such as in one request."""


def leave_context(recording: object) -> None:
    """Stop passing what is sent in this context to a recording.

    :param recording: One of :data:`of_this_context`. Nothing happens if it is not one of them.
    """
    here = of_this_context.get()
    of_this_context.set(tuple(each for each in here if each is not recording))


class Recorder:
    """Passes to the recordings what the core tells and what the dialects send."""

    def __init__(self) -> None:
        self._lock = observing.changing_dialects
        self._of_all_contexts: tuple[Sink, ...] = ()
        self._users: set[object] = set()
        # Weak references: something may record for days, while engines are made and forgotten.
        self._looked_at: WeakSet[Dialect] = WeakSet()

    # On and off

    def use(self, user: object, dialects: Iterable[Dialect]) -> None:
        """Begin to record the statements of these dialects, until :meth:`leave`.

        :param user: The object that needs the recorder, such as a recording.
        :param dialects: The dialects of engines of ours.
        """
        with self._lock:
            self._users.add(user)
            observing.recorder = self
        for dialect in dialects:
            self.look_at(dialect)

    def leave(self, user: object) -> None:
        """Undo :meth:`use` and :meth:`add`. After the last user, the dialects are as before.

        :param user: What was passed to :meth:`use`. Nothing happens if it was not passed.
        """
        with self._lock:
            self._of_all_contexts = tuple(
                each for each in self._of_all_contexts if each is not user
            )
            self._users.discard(user)
            if not self._users:
                observing.recorder = None
                for dialect in tuple(self._looked_at):
                    self._restore(dialect)

    def _restore(self, dialect: Dialect) -> None:
        ours = (self._execute, self._execute_no_params)
        for name in _EXECUTE:
            function = vars(dialect).get(name)
            if not isinstance(function, partial) or function.func not in ours:
                return  # other code has wrapped our function, which passes on nothing now
        for name in _EXECUTE:
            original = vars(dialect)[name].args[0]
            if getattr(original, "__self__", None) is dialect:
                delattr(dialect, name)
            else:
                setattr(dialect, name, original)
        self._looked_at.discard(dialect)

    def has(self, user: object) -> bool:
        """Tell whether :meth:`use` was called for a user, and :meth:`leave` was not called yet."""
        return user in self._users

    def add(self, recording: Sink) -> None:
        """Pass what is sent in any context to a recording, which is a user already."""
        with self._lock:
            self._of_all_contexts += (recording,)

    def look_at(self, dialect: Dialect) -> None:
        """Replace the functions of a dialect that execute a statement."""
        if dialect in self._looked_at:
            return
        with self._lock:
            if dialect in self._looked_at or not self._users:
                return
            of_one, of_many = counters_for(dialect)
            executes = partial(self._execute, dialect.do_execute, of_one)
            many = partial(self._execute, dialect.do_executemany, of_many)
            no_params = partial(self._execute_no_params, dialect.do_execute_no_params, of_one)
            for name, function in zip(_EXECUTE, (executes, no_params, many), strict=True):
                setattr(dialect, name, function)
            self._looked_at.add(dialect)

    def beneath(self, dialect: Dialect, change: Callable[[], object]) -> None:
        with self._lock:
            self._restore(dialect)
            was_restored = dialect not in self._looked_at
            change()
            if was_restored:
                self.look_at(dialect)

    # What the core calls: see observing.Recorder

    def note_block(self, transaction: Any) -> None:
        transaction.opened_at = calling_place()

    def noting_cursor(self, connection: TransactingConnection) -> AbstractContextManager[None]:
        return noting_cursor(connection.taken.dbapi_connection, connection.dialect)

    def note_begin(self, connection: TransactingConnection) -> None:
        recordings = self._covering(connection)
        if recordings:
            self._record_transaction(connection, recordings, is_new=True)

    def note_connection(self, engine: RestingEngine, info: dict[str, Any], started: float) -> None:
        if type(vars(engine.dialect).get("do_execute")) is not partial:
            self.look_at(engine.dialect)
        now = perf_counter()
        info[USE] = ConnectionUse(now, now - started)

    # What the dialects send

    def _execute_no_params(
        self,
        original: Callable[..., Any],
        counter: Counter | None,
        cursor: Any,
        sql: str,
        context: Any,
    ) -> None:
        def execute(cursor: Any, sql: str, parameters: Any, context: Any) -> None:
            original(cursor, sql, context)

        self._execute(execute, counter, cursor, sql, None, context)

    def _execute(
        self,
        original: Callable[..., Any],
        counter: Counter | None,
        cursor: Any,
        sql: str,
        parameters: Any,
        context: Any = None,
    ) -> None:
        connection: Any = None if context is None else context.root_connection
        # Each statement passes through here. So the usual case of _covering() is inlined.
        recordings = of_this_context.get()
        if (
            len(recordings) != 1
            or self._of_all_contexts
            or not isinstance(connection, TransactingConnection)
            or not recordings[0].covers(connection)
        ):
            recordings = self._covering(connection)
        if not recordings:
            original(cursor, sql, parameters, context)
            return
        recorded: RecordedTransaction | None = connection.recorded
        if recorded is None and connection.is_out_of_autocommit():
            recorded = self._record_transaction(connection, recordings)
        count = None if counter is None else counter(cursor, parameters)
        # Before the statement is sent: after the wait, the caches of the processor are cold.
        place = place_of(sql)
        # Not the error itself: the error and this frame would keep each other alive.
        failed: str | None = None
        was_sent = True
        started = perf_counter()
        try:
            original(cursor, sql, parameters, context)
        except BaseException as error:
            failed, was_sent = type(error).__name__, _was_sent(error, connection)
            raise
        finally:
            # This code is not in a function of its own, because each statement passes through here.
            duration = perf_counter() - started
            trips = 0 if not was_sent else 1 if count is None else count(failed is not None)
            carried = connection.carried
            if carried is not None and was_sent:
                trips = 1 if carried.is_pipeline else trips + carried.trips
            statement = Statement(sql, place, started, duration, trips)
            if failed is not None:
                statement.error = failed
            elif (rows := getattr(cursor, "rowcount", -1)) >= 0:
                statement.rows = rows
            if recorded is not None:
                recorded.add_to(recordings)
                recorded.add(statement)
            held = connection.held
            if held is not None:
                use: ConnectionUse | None = held.info.get(USE)
                if use is None:  # the connection was held before the recording
                    use = held.info[USE] = ConnectionUse(started, 0.0)
                if use.recordings is not recordings or use.sent_in is not statement.transaction:
                    use.note(statement, recordings)
            for recording in recordings:
                if recording.keeps_parameters:
                    statement.parameters = parameters
                recording.add_statement(statement)
            if type(cursor) in NOTING:
                cursor.noted = partial(_note_fetch, statement, recordings)

    # Which recordings get a statement

    def _covering(self, connection: Any) -> tuple[Sink, ...]:
        recordings = of_this_context.get()
        if everywhere := self._of_all_contexts:
            recordings = everywhere + recordings if recordings else everywhere
        if not isinstance(connection, TransactingConnection):
            return ()
        for recording in recordings:
            if not recording.covers(connection):
                return tuple(each for each in recordings if each.covers(connection))
        return recordings

    def _record_transaction(
        self,
        connection: TransactingConnection,
        recordings: tuple[Sink, ...],
        *,
        is_new: bool = False,
    ) -> RecordedTransaction:
        is_alone = bool(getattr(connection, "is_standing_alone", False))
        options = connection.options_in_effect()
        level = options.isolation_level
        transaction = Transaction(_begun_at(connection), options.as_begin(), level, is_alone)
        recorded = connection.recorded = RecordedTransaction(transaction)
        if not (is_new or is_alone) and connection.is_open_on_server():
            # The transaction has begun before the recording.
            recorded.has_begun = True
            transaction.started = perf_counter()
        recorded.add_to(recordings)
        return recorded


def _was_sent(error: BaseException, connection: TransactingConnection) -> bool:
    """Tell whether a statement that has raised an error was sent at all."""
    held, switch = connection.held, connection.engine.switch
    if sqlstate(error) is not None or held is None:
        return True
    return switch.is_closed(held.dbapi_connection) or switch.is_busy(held.dbapi_connection)


def _note_fetch(statement: Statement, recordings: tuple[Sink, ...], duration: float) -> None:
    """Note a message that was sent to read from a stream."""
    statement.duration += duration
    statement.round_trips += 1
    if (transaction := statement.transaction) is not None:
        transaction.busy += duration
        transaction.round_trips += 1
    for recording in recordings:
        recording.note_round_trip(statement)


def _begun_at(connection: TransactingConnection) -> Place | None:
    """Return the application's line that has begun the transaction of a connection."""
    transaction: Any = connection.session_transaction
    while transaction is not None and transaction.parent is not None:
        transaction = transaction.parent
    noted = getattr(transaction, "opened_at", None) or getattr(transaction, "begun_at", None)
    if noted is None and not (transaction is not None and connection.is_open_on_server()):
        noted = calling_place()
    return noted


recorder = Recorder()
"""The only recorder of the process."""
