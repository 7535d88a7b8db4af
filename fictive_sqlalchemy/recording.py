"""See what is sent: each statement, each transaction, each connection, and the round trips.

::

    with record(db) as seen, db.session.begin():
        db.session.get(User, 1).name = "Ada"

    print(seen)
    assert seen.round_trips == 4
    assert seen.transactions[0].outcome == "committed"

A recording sends nothing, and does not change what is sent. Without a recording, there is no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import scoped_session

from ._core.engine import OptInEngine
from ._core.errors import see
from ._core.places import Place
from ._core.recorder import recorder
from ._core.records import ConnectionUse, Outcome, Statement, Transaction
from ._core.session import OptInSession
from ._core.transacting import TransactingConnection

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ConnectionUse",
    "Outcome",
    "Place",
    "Recording",
    "Statement",
    "Transaction",
    "record",
]


class Recording:
    """What was sent while the recording was on. Make a recording with :func:`record`.

    A recording may be read at any time, even while it is on, and from any thread. All times are in
    seconds.

    :param dialects: The dialects of the engines that are recorded.
    :param sessions: The sessions that are recorded.
    :param keep: How many statements, how many transactions and how many uses of connections are
        kept. The first ones are kept, and all are counted.
    :param parameters: Whether the parameters of the statements are kept.
    """

    def __init__(
        self,
        dialects: Iterable[Dialect] = (),
        sessions: Iterable[OptInSession] = (),
        *,
        keep: int = 1_000,
        parameters: bool = False,
    ) -> None:
        self._dialects: frozenset[Dialect] = frozenset(dialects)
        self._sessions: tuple[OptInSession, ...] = tuple(sessions)
        self._keep = keep
        self.keeps_parameters = parameters
        self.sent: list[Statement] = []
        """All that was sent, in order: the statements, BEGIN, COMMIT, ROLLBACK and savepoints."""
        self.transactions: list[Transaction] = []
        """The transactions that have begun or have sent something during the recording."""
        self.connections: list[ConnectionUse] = []
        """The uses of connections of the pool on which something was sent."""
        # The numbers of what is not kept. They change without a lock, because an exception from a
        # signal handler could leave it locked. Python switches no thread while a number is added.
        self._left_out = self._statements_left_out = self._trips_left_out = 0
        self._busy_left_out = 0.0
        self._more_transactions = _Sums(lambda each: (each.duration, each.waiting))
        self._more_connections = _Sums(lambda each: (each.held, each.waited))

    @property
    def round_trips(self) -> int:
        """The number of messages for whose answer the sender has waited."""
        return sum(statement.round_trips for statement in self.sent) + self._trips_left_out

    @property
    def statements(self) -> list[Statement]:
        """The statements, without BEGIN, COMMIT, ROLLBACK and savepoints."""
        return [statement for statement in self.sent if not statement.is_control]

    @property
    def statement_count(self) -> int:
        """The number of statements, including those that are not kept."""
        return len(self.statements) + self._statements_left_out

    @property
    def duration(self) -> float:
        """How long callers have waited for the answers to what was sent."""
        return sum(statement.duration for statement in self.sent) + self._busy_left_out

    @property
    def transaction_count(self) -> int:
        """The number of transactions that have sent something, including those not kept."""
        begun = sum(transaction.started is not None for transaction in self.transactions)
        return begun + self._more_transactions.count

    @property
    def open(self) -> float:
        """How long transactions were open, including the time of those that are still open."""
        kept = sum(transaction.duration for transaction in self.transactions)
        return kept + self._more_transactions.totals()[0]

    @property
    def waiting(self) -> float:
        """How long transactions were open while the database was not busy for them."""
        kept = sum(transaction.waiting for transaction in self.transactions)
        return kept + self._more_transactions.totals()[1]

    @property
    def held(self) -> float:
        """How long connections were held, including the time of those that are still held."""
        kept = sum(use.held for use in self.connections)
        return kept + self._more_connections.totals()[0]

    @property
    def waited(self) -> float:
        """How long callers have waited for a connection of the pool."""
        kept = sum(use.waited for use in self.connections)
        return kept + self._more_connections.totals()[1]

    # What the recorder calls

    def covers(self, connection: TransactingConnection) -> bool:
        """Tell whether what is sent on a connection belongs to this recording."""
        if connection.dialect in self._dialects:
            return True
        owner = getattr(connection, "owner", None)
        return owner is not None and owner in self._sessions

    def add_statement(self, statement: Statement) -> None:
        """Note a statement."""
        if len(self.sent) < self._keep:
            self.sent.append(statement)
        else:
            self._left_out += 1
            self._statements_left_out += not statement.is_control
            self._trips_left_out += statement.round_trips
            self._busy_left_out += statement.duration

    def note_round_trip(self, statement: Statement) -> None:
        """Count the round trip for a part of a stream, unless its statement is kept."""
        if self._left_out and statement not in self.sent:
            self._trips_left_out += 1

    def add_transaction(self, transaction: Transaction) -> None:
        """Note a transaction."""
        if len(self.transactions) < self._keep:
            self.transactions.append(transaction)
        else:
            self._more_transactions.add(transaction)

    def end_transaction(self, transaction: Transaction) -> None:
        """Do nothing, because the transaction is noted already."""

    def add_use(self, use: ConnectionUse) -> None:
        """Note the use of a connection."""
        if len(self.connections) < self._keep:
            self.connections.append(use)
        else:
            self._more_connections.add(use)

    def end(self) -> None:
        """Forget the engines and sessions, so that a kept recording keeps no session alive."""
        self._dialects, self._sessions = frozenset(), ()

    # Methods for reading a recording

    def summary(self) -> str:
        """Return the numbers in one line.

        An example is ``4 statements, 5 round trips, 1 transaction 3.2 ms (0.4 ms waiting)``.
        """
        parts = [
            counted(self.statement_count, "statement"),
            counted(self.round_trips, "round trip"),
        ]
        if count := self.transaction_count:
            parts.append(
                f"{counted(count, 'transaction')} {milliseconds(self.open)} "
                f"({milliseconds(self.waiting)} waiting)"
            )
        if self.connections:
            parts.append(f"connection {milliseconds(self.held)}")
        return ", ".join(parts)

    def __str__(self) -> str:
        lines = [self.summary(), *map(line, self.sent)]
        if self._left_out:
            lines.append(f"… and {self._left_out} more, which are not kept")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Recording: {self.summary()}>"


class Follower:
    """A base class whose methods are called for what is sent, in all threads. It keeps nothing.

    :param sources: One or more extensions or engines. All that any of their sessions and
        connections sends is followed.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, or a source has no engine of
        :func:`fictive_sqlalchemy.create_engine`.
    """

    keeps_parameters = False

    def __init__(self, *sources: Any) -> None:
        self._dialects = dialects_of(engines_of(sources, f"{type(self).__name__}()"))

    def start(self) -> Self:
        """Start following what is sent."""
        if not recorder.has(self):
            recorder.use(self, self._dialects)
            recorder.add(self)
        return self

    def stop(self) -> None:
        """Stop following what is sent."""
        recorder.leave(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What the recorder calls

    def covers(self, connection: TransactingConnection) -> bool:
        """Tell whether what is sent on a connection is followed."""
        return connection.dialect in self._dialects

    def add_statement(self, statement: Statement) -> None:
        """Handle a statement that was sent."""

    def note_round_trip(self, statement: Statement) -> None:
        """Handle the round trip for a part of a stream."""

    def add_transaction(self, transaction: Transaction) -> None:
        """Handle a transaction that begins."""

    def end_transaction(self, transaction: Transaction) -> None:
        """Handle a transaction that has ended."""

    def add_use(self, use: ConnectionUse) -> None:
        """Handle the use of a connection."""


#: How many open transactions are followed that are not kept. No application has as many at a time.
_MOST_OPEN = 100


class _Sums:
    """The numbers of the transactions, or of the uses of connections, that are not kept.

    :param numbers: A function that returns the two numbers of a transaction or a use.
    """

    def __init__(self, numbers: Callable[[Any], tuple[float, float]]) -> None:
        self._numbers = numbers
        self._open: list[Any] = []
        self._count = 0
        self._first = self._second = 0.0

    def add(self, one: Any) -> None:
        """Add a transaction or a use, whose numbers may grow until it has ended."""
        for each in tuple(self._open):
            if each.has_ended or len(self._open) > _MOST_OPEN:
                first, second = self._numbers(each)
                try:
                    self._open.remove(each)
                except ValueError:  # another thread has removed it
                    continue
                self._count += each.has_begun
                self._first += first
                self._second += second
        self._open.append(one)

    @property
    def count(self) -> int:
        """The number of transactions or uses, without transactions that have sent nothing."""
        return self._count + len([each for each in tuple(self._open) if each.has_begun])

    def totals(self) -> tuple[float, float]:
        """Return the two sums."""
        now = [self._numbers(each) for each in tuple(self._open)]
        return self._first + sum(each[0] for each in now), self._second + sum(
            each[1] for each in now
        )


def line(statement: Statement) -> str:
    """Return a statement as one line: the SQL, its time, and its place in the code.

    :param statement: The statement.
    """
    sql = " ".join(statement.sql.split())
    inside = "  " if statement.transaction is not None and not statement.is_control else ""
    what = f"{inside}{sql if len(sql) <= 100 else sql[:99] + '…'}"
    took = f"{milliseconds(statement.duration)}"
    if statement.rows is not None:
        took += f", {counted(statement.rows, 'row')}"
    if statement.error is not None:
        took += f", {statement.error}"
    where = "" if statement.place is None else f"  {statement.place}"
    return f"{what}  ({took}){where}"


@contextmanager
def record(*sources: Any, keep: int = 1_000, parameters: bool = False) -> Generator[Recording]:
    """Record what is sent in all threads until the block ends. Sends nothing.

    :param sources: One or more sources: an extension with ``OptInTransactionMixin`` (in an
        application context), a session, a scoped session, or an engine of
        :func:`fictive_sqlalchemy.create_engine`. For a session, all that this session sends is
        recorded. For an engine or an extension, all that any of its sessions and connections sends
        is recorded. Replicas are included. These are not recorded: engines of an extension that
        SQLAlchemy has made, cursors of the driver, and statements that a listener to SQLAlchemy's
        ``do_execute`` sends itself.
    :param keep: How many statements, how many transactions and how many uses of connections are
        kept.
    :param parameters: Whether the parameters of the statements are kept. They may be secret.
    :returns: A context manager that gives the :class:`Recording`.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, if a source can't be recorded, or
        if ``keep`` is no number above 0.
    :raises RuntimeError: from Flask-SQLAlchemy, for an extension outside an application context.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:  # pyright: ignore
        raise ArgumentError(
            f"keep is how many statements are kept, 1 or more, and not {keep!r}."
            + see("recording-arguments")
        )
    given: list[Any] = [one() if isinstance(one, scoped_session) else one for one in sources]
    sessions = [one for one in given if isinstance(one, OptInSession)]
    others = [one for one in given if not isinstance(one, OptInSession)]
    dialects = dialects_of(engines_of(others, "record()") if others or not sessions else ())
    in_use = [engine for session in sessions for engine in session.engines_in_use()]
    recording = Recording(dialects, sessions, keep=keep, parameters=parameters)
    try:
        recorder.use(recording, dialects | dialects_of(in_use))
        recorder.add(recording)
        yield recording
    finally:
        recorder.leave(recording)
        recording.end()


def dialects_of(engines: Iterable[OptInEngine]) -> frozenset[Dialect]:
    """Return the dialects of some engines, and of their replicas."""
    return frozenset(each.dialect for engine in engines for each in (engine, *engine.replicas))


def engines_of(sources: Collection[Any], call: str) -> list[OptInEngine]:
    """Return the engines of some sources, which are extensions and engines.

    :param sources: The sources.
    :param call: The call that was given the sources, for the error.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, or a source has no engine of
        :func:`fictive_sqlalchemy.create_engine`.
    """
    if not sources:
        raise ArgumentError(
            f"{call} needs a source: pass an extension or an engine." + see("nothing-to-record")
        )
    found: list[OptInEngine] = []
    for source in sources:
        engines: Any = getattr(source, "engines", None)  # of an extension of Flask-SQLAlchemy
        items: list[Any] = [source]
        if isinstance(engines, Mapping):
            items = list(cast("Mapping[object, object]", engines).values())
        ours = [engine for engine in items if isinstance(engine, OptInEngine)]
        if not ours:
            raise ArgumentError(
                f"{call} has found no engine of fictive_sqlalchemy.create_engine() in {source!r}: "
                "pass such an engine, or an extension with OptInTransactionMixin that has a bind "
                "on PostgreSQL." + see("nothing-to-record")
            )
        found += ours
    return found


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 statement``, ``2 statements``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def milliseconds(seconds: float) -> str:
    """Return seconds as text, in milliseconds."""
    return f"{seconds * 1000:.1f} ms"
