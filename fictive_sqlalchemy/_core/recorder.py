"""Records what is sent, and which transaction is open: the mechanics of :mod:`.recording`.

While nothing records, :data:`.observing.recorder` is ``None``, and nothing of this is called. While
something does, the functions of the dialect that execute a statement are replaced on the dialects
of the engines in question. SQLAlchemy's events would serve as well, but a listener to the events of
statements would have BEGIN and COMMIT sent around a transaction that is one statement, because it
could tell the difference (see :mod:`.one_statement`). So a recording would change what it shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

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
    """What the recorder hands what it hears to: a recording."""

    keeps_parameters: bool

    def covers(self, connection: TransactingConnection) -> bool:
        """Tell whether what is sent on a connection belongs to it."""
        ...

    def add_statement(self, statement: Statement) -> None:
        """Note a statement, with its transaction."""
        ...

    def note_round_trip(self, statement: Statement) -> None:
        """Hear that a part of a stream was read, which the statement has noted."""
        ...

    def add_transaction(self, transaction: Transaction) -> None:
        """Note a transaction that begins."""
        ...

    def add_use(self, use: ConnectionUse) -> None:
        """Note the use of a connection."""
        ...


of_this_context: ContextVar[tuple[Sink, ...]] = ContextVar("recordings", default=())
"""The recordings of what is sent in this context alone, such as a request."""


class Recorder:
    """Hands to the recordings what the core tells and what the dialects send."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_all_contexts: tuple[Sink, ...] = ()
        self._users = 0
        self._replaced: dict[Dialect, dict[str, Any]] = {}

    # On and off

    def use(self, dialects: Iterable[Dialect]) -> None:
        """Begin to look at the statements of these dialects. Each call needs one of :meth:`leave`.

        :param dialects: The dialects of engines of ours.
        """
        with self._lock:
            self._users += 1
            observing.recorder = self
        for dialect in dialects:
            self.look_at(dialect)

    def leave(self) -> None:
        """Undo one :meth:`use`. After the last one, everything is as it was."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            observing.recorder = None
            for dialect, functions in self._replaced.items():
                for name, function in functions.items():
                    if function is None:
                        delattr(dialect, name)
                    else:
                        setattr(dialect, name, function)
            self._replaced.clear()

    def add(self, recording: Sink) -> None:
        """Hand to a recording what is sent in any context."""
        with self._lock:
            self._of_all_contexts += (recording,)

    def remove(self, recording: Sink) -> None:
        """Hand no more to a recording of :meth:`add`."""
        with self._lock:
            self._of_all_contexts = tuple(
                each for each in self._of_all_contexts if each is not recording
            )

    def look_at(self, dialect: Dialect) -> None:
        """Replace the functions of a dialect that execute a statement."""
        if dialect in self._replaced:
            return
        with self._lock:
            if dialect in self._replaced or not self._users:
                return
            self._replaced[dialect] = {name: vars(dialect).get(name) for name in _EXECUTE}
            of_one, of_many = counters_for(dialect)
            executes = partial(self._execute, dialect.do_execute, of_one)
            many = partial(self._execute, dialect.do_executemany, of_many)
            no_params = partial(self._execute_no_params, dialect.do_execute_no_params, of_one)
            for name, function in zip(_EXECUTE, (executes, no_params, many), strict=True):
                setattr(dialect, name, function)

    # What the core tells: see observing.Recorder

    def note_block(self, transaction: Any) -> None:
        transaction.opened_at = calling_place()

    def noting_cursor(self, connection: TransactingConnection) -> AbstractContextManager[None]:
        return noting_cursor(connection.taken.dbapi_connection, connection.dialect)

    def note_begin(self, connection: TransactingConnection) -> None:
        recordings = self._covering(connection)
        if recordings:
            self._record_transaction(connection, recordings, is_new=True)

    def note_connection(self, engine: RestingEngine, info: dict[str, Any], started: float) -> None:
        if engine.dialect not in self._replaced:
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
        recordings = self._covering(connection)
        if not recordings:
            original(cursor, sql, parameters, context)
            return
        recorded: RecordedTransaction | None = connection.recorded
        if recorded is None and connection.is_inside():
            recorded = self._record_transaction(connection, recordings)
        count = None if counter is None else counter(cursor, parameters)
        error: BaseException | None = None
        started = perf_counter()
        try:
            original(cursor, sql, parameters, context)
        except BaseException as raised:
            error = raised
            raise
        finally:
            # Here and not in another function, because each statement comes here.
            duration = perf_counter() - started
            trips = 1 if count is None else count()
            statement = Statement(sql, place_of(sql), started, duration, trips)
            if error is not None:
                statement.error = type(error).__name__
                if not _was_sent(error, connection):
                    statement.round_trips = 0
            elif (rows := getattr(cursor, "rowcount", -1)) >= 0:
                statement.rows = rows
            if recorded is not None:
                recorded.add_to(recordings)
                recorded.add(statement)
            held = connection.held
            if held is not None:
                use: ConnectionUse | None = held.info.get(USE)
                if use is None:  # it was held before the recording
                    use = held.info[USE] = ConnectionUse(started, 0.0)
                if use.place is None:
                    use.place = statement.place
                use.add_to(recordings)
            for recording in recordings:
                if recording.keeps_parameters:
                    statement.parameters = parameters
                recording.add_statement(statement)
            if type(cursor) in NOTING:
                cursor.noted = partial(_note_fetch, statement, recordings)

    # Which recordings

    def _covering(self, connection: Any) -> tuple[Sink, ...]:
        here = of_this_context.get()
        recordings = self._of_all_contexts
        if here:
            recordings = recordings + here if recordings else here
        if not isinstance(connection, TransactingConnection):
            return ()
        if len(recordings) == 1:
            return recordings if recordings[0].covers(connection) else ()
        return tuple(recording for recording in recordings if recording.covers(connection))

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
            # It was begun before the recording.
            recorded.has_begun = True
            transaction.started = perf_counter()
        recorded.add_to(recordings)
        return recorded


def _was_sent(error: BaseException, connection: TransactingConnection) -> bool:
    """Tell whether a statement that raised an error was sent at all."""
    held, switch = connection.held, connection.engine.switch
    if sqlstate(error) is not None or held is None:
        return True
    return switch.is_closed(held.dbapi_connection) or switch.is_busy(held.dbapi_connection)


def _note_fetch(statement: Statement, recordings: tuple[Sink, ...], duration: float) -> None:
    """Note that a part of a stream was read."""
    statement.duration += duration
    statement.round_trips += 1
    if (transaction := statement.transaction) is not None:
        transaction.busy += duration
        transaction.round_trips += 1
    for recording in recordings:
        recording.note_round_trip(statement)


def _begun_at(connection: TransactingConnection) -> Place | None:
    """Return the line that has begun the transaction of a connection."""
    transaction: Any = connection.session_transaction
    while transaction is not None and transaction.parent is not None:
        transaction = transaction.parent
    noted = getattr(transaction, "opened_at", None) or getattr(transaction, "begun_at", None)
    if noted is None and not (transaction is not None and connection.is_open_on_server()):
        noted = calling_place()
    return noted


recorder = Recorder()
"""The one recorder of the process."""
