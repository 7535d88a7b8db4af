"""What is recorded of statements, transactions and connections: see :mod:`.recorder`."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from time import perf_counter
from typing import Any, Literal, TypeAlias

from .errors import CommitOutcomeUnknown
from .flow import Flow, here
from .places import Place, Spot, calling_place
from .round_trips import of_rollback

Outcome: TypeAlias = Literal["open", "committed", "rolled back", "unknown"]

#: Key in the ``info`` of a pool's entry: the use of the connection that is being recorded.
USE = "fictive_sqlalchemy.recorded_use"

#: How many statements of a transaction are kept at most.
MOST_STATEMENTS = 1_000

#: How many characters of the SQL of a statement are kept at most.
MOST_CHARACTERS = 10_000

_CONTROL = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "PREPARE TRANSACTION")


def _made(place: Place | Spot | None) -> Place | None:
    return place.place() if isinstance(place, Spot) else place


class Statement:
    """One statement that was sent, which may also be BEGIN, COMMIT, ROLLBACK or for a savepoint."""

    __slots__ = (
        "duration",
        "error",
        "parameters",
        "round_trips",
        "rows",
        "spot",
        "sql",
        "started",
        "transaction",
    )

    def __init__(
        self,
        sql: str,
        place: Place | Spot | None,
        started: float,
        duration: float,
        round_trips: int,
    ) -> None:
        self.sql: str = sql if len(sql) <= MOST_CHARACTERS else f"{sql[:MOST_CHARACTERS]}…"
        """What was sent, with placeholders for the parameters."""
        self.spot = place
        """What :attr:`place` is made from."""
        self.started: float = started
        """When the statement was sent: seconds by :func:`time.perf_counter`."""
        self.duration: float = duration
        """How many seconds the caller waited, reading a stream included. The duration of a BEGIN is
        0, because the driver sends BEGIN with the first statement, whose duration includes it."""
        self.round_trips: int = round_trips
        """How many messages waited for an answer. Each part of a stream that was read is one."""
        self.rows: int | None = None
        """How many rows the statement returned or changed; ``None`` if the driver does not say."""
        self.transaction: Transaction | None = None
        """The transaction that the statement belongs to; ``None`` outside a transaction."""
        self.error: str | None = None
        """The name of the class of the error that the statement raised, or ``None``."""
        self.parameters: Any = None
        """The parameters, if a recording keeps parameters."""

    @property
    def place(self) -> Place | None:
        """The application's line that has sent the statement, and the call on this line."""
        place = self.spot = _made(self.spot)
        return place

    @property
    def verb(self) -> str:
        """The first word of the SQL, in capitals."""
        words = self.sql.split(None, 1)
        return words[0].upper() if words else ""

    @property
    def is_control(self) -> bool:
        """Whether the statement does nothing but begin or end a transaction or savepoint."""
        return self.transaction is not None and self.sql[:30].lstrip().upper().startswith(_CONTROL)

    def __repr__(self) -> str:
        return f"<Statement {self.sql!r}>"


class Transaction:
    """One transaction on one connection, from its BEGIN to its end."""

    __slots__ = (
        "_ended",
        "begin",
        "begun_at",
        "busy",
        "is_one_statement",
        "isolation_level",
        "outcome",
        "round_trips",
        "sent",
        "started",
        "thread",
    )

    def __init__(
        self, begun_at: Place | None, begin: str, level: str | None, is_one_statement: bool
    ) -> None:
        self.begun_at: Place | None = begun_at
        """The application's line that has begun it, and the call: ``begin()``, or a write."""
        self.begin: str = begin
        """The text of its BEGIN."""
        self.isolation_level: str | None = level
        """The isolation level that it has begun with; ``None`` for the server's default."""
        self.is_one_statement: bool = is_one_statement
        """Whether the transaction is one statement, which is sent without BEGIN and COMMIT."""
        self.started: float | None = None
        """When BEGIN was sent: seconds by :func:`time.perf_counter`. ``None`` before that."""
        self.busy: float = 0.0
        """For how many seconds the database was busy with its statements."""
        self.sent: list[Statement] = []
        """The first 1,000 statements that were sent in it, in order, BEGIN and COMMIT included."""
        self.round_trips: int = 0
        """How many messages waited for an answer, those of BEGIN, COMMIT and ROLLBACK included."""
        self.outcome: Outcome = "open"
        """``"open"`` until the end, then ``"committed"`` or ``"rolled back"``; ``"unknown"`` if the
        connection was lost during COMMIT, or during the one statement."""
        self.thread: int = get_ident()
        """The ident of the thread that has begun it."""
        self._ended: float | None = None

    @property
    def statements(self) -> list[Statement]:
        """Its statements, without BEGIN, COMMIT, ROLLBACK and savepoints."""
        return [statement for statement in self.sent if not statement.is_control]

    @property
    def has_begun(self) -> bool:
        """Whether BEGIN, or its one statement, was sent."""
        return self.started is not None

    @property
    def has_ended(self) -> bool:
        """Whether the transaction has ended."""
        return self.outcome != "open"

    @property
    def duration(self) -> float:
        """How many seconds it was open on the server: from BEGIN to its end, or until now."""
        if self.started is None:
            return 0.0
        return (perf_counter() if self._ended is None else self._ended) - self.started

    @property
    def waiting(self) -> float:
        """For how many seconds it was open while the database was not busy with its statements."""
        return max(0.0, self.duration - self.busy)

    def add(self, statement: Statement) -> None:
        """Note a statement that was sent in the transaction."""
        statement.transaction = self
        self.busy += statement.duration
        self.round_trips += statement.round_trips
        if len(self.sent) < MOST_STATEMENTS:
            self.sent.append(statement)

    def end(self, outcome: Outcome) -> None:
        """Note the outcome of the transaction, unless an outcome was noted already."""
        if self.outcome == "open":
            self.outcome = outcome
            self._ended = perf_counter()

    def __repr__(self) -> str:
        return f"<Transaction {self.outcome}, begun by {self.begun_at}>"


class ConnectionUse:
    """One use of a connection of the pool, from its checkout until the pool has it again."""

    __slots__ = ("_ended", "recordings", "sent_in", "spot", "started", "waited")

    def __init__(self, started: float, waited: float) -> None:
        self.started: float = started
        """When the pool gave the connection: seconds by :func:`time.perf_counter`."""
        self.waited: float = waited
        """How many seconds the caller waited for the pool, opening a new connection included."""
        self.spot: Place | Spot | None = None
        """What :attr:`place` is made from."""
        self.sent_in: Transaction | None = None
        """The transaction of the last statement on the connection; ``None`` outside one."""
        self.recordings: tuple[Any, ...] = ()
        """The recordings that have this use."""
        self._ended: float | None = None

    @property
    def place(self) -> Place | None:
        """The application's line that has sent the first statement on the connection."""
        place = self.spot = _made(self.spot)
        return place

    @property
    def held(self) -> float:
        """For how many seconds the connection was held; if it still is held, until now."""
        return (perf_counter() if self._ended is None else self._ended) - self.started

    has_begun = True

    @property
    def has_ended(self) -> bool:
        """Whether the connection is back in the pool."""
        return self._ended is not None

    @property
    def is_held(self) -> bool:
        """Whether the connection is not back in the pool yet."""
        return self._ended is None

    def note(self, statement: Statement, recordings: tuple[Any, ...]) -> None:
        """Note a statement that was sent on the connection.

        :param statement: The statement.
        :param recordings: The recordings that get the statement. They get this use, too.
        """
        self.sent_in = statement.transaction
        if self.spot is None:
            self.spot = statement.spot
        if self.recordings != recordings:
            new = _not_known(recordings, self.recordings)
            self.recordings = self.recordings + new if self.recordings else recordings
            for recording in new:
                recording.add_use(self)

    def end(self) -> None:
        """Note that the connection is not held any more."""
        if self._ended is None:
            self._ended = perf_counter()

    def give_back(self) -> None:
        """Note that the pool gets the connection back, and rolls back a transaction left open."""
        if self._ended is None:
            self._ended = perf_counter()
        if self.sent_in is not None:
            self.sent_in.end("rolled back")


def given_back(connection: Any, record: Any, state: Any) -> None:
    """Note that a pool gets a connection back. This is a listener to the event ``reset``."""
    use: ConnectionUse | None = record.info.pop(USE, None)
    if use is not None:
        use.give_back()


def _not_known(recordings: tuple[Any, ...], known: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the recordings that are not among the known ones."""
    return tuple(each for each in recordings if each not in known)


class RecordedTransaction:
    """Records the open transaction of a connection.

    :param transaction: The transaction, to which this object adds what is sent.
    """

    __slots__ = ("flow", "has_begun", "is_prepared", "recordings", "transaction")

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.flow: Flow = here()
        """The thread, greenlet and asyncio task that have begun the transaction."""
        self.recordings: tuple[Any, ...] = ()
        """The recordings that have the transaction."""
        self.has_begun = False
        """Whether BEGIN was sent and noted."""
        self.is_prepared = False
        """Whether PREPARE TRANSACTION was sent."""

    def add_to(self, recordings: tuple[Any, ...]) -> None:
        """Add the transaction to the recordings that do not have it yet."""
        if self.recordings != recordings:
            new = _not_known(recordings, self.recordings)
            self.recordings += new
            for recording in new:
                recording.add_transaction(self.transaction)

    def add(self, statement: Statement) -> None:
        """Note a statement that was sent, and the BEGIN that the driver sent with the first."""
        if statement.round_trips:
            if self.transaction.is_one_statement:
                self.transaction.started = statement.started
            elif not self.has_begun:
                self._note_begin(statement.started)
        self.transaction.add(statement)

    def _note_begin(self, started: float) -> None:
        self.has_begun = True
        self.transaction.started = started
        self._note(Statement(self.transaction.begin, self.transaction.begun_at, started, 0.0, 1))

    def timed(self, verb: str, way: Callable[[], object], connection: Any) -> Callable[[], object]:
        """Wrap a function that ends or prepares the transaction, so that the end is noted.

        :param verb: ``"PREPARE"``, ``"COMMIT"`` or ``"ROLLBACK"``.
        :param way: The function, which sends this command.
        :param connection: The connection.
        """

        def end() -> None:
            held = connection.held
            is_open = self.has_begun or connection.is_open_on_server()
            count = of_rollback(None if held is None else held.dbapi_connection)
            # Not the error itself: the error and this frame would keep each other alive.
            failed: type[BaseException] | None = None
            started = perf_counter()
            try:
                way()
            except BaseException as error:
                failed = type(error)
                raise
            finally:
                if is_open and held is not None and self.transaction.outcome == "open":
                    if not self.has_begun:  # such as when a cursor of the driver has sent BEGIN
                        self._note_begin(started)
                    sql = f"{verb} TRANSACTION" if verb == "PREPARE" else verb
                    sql += " PREPARED" if self.is_prepared else ""
                    statement = Statement(
                        sql,
                        calling_place(),
                        started,
                        perf_counter() - started,
                        count(failed is not None),
                    )
                    statement.error = None if failed is None else failed.__name__
                    self._note(statement)
                self._note_outcome(verb, failed)

        return end

    def _note_outcome(self, verb: str, failed: type[BaseException] | None) -> None:
        if failed is not None and issubclass(failed, CommitOutcomeUnknown):
            self.end("unknown")
        elif verb == "ROLLBACK":
            self.end("rolled back")
        elif failed is None and verb == "COMMIT":
            self.end("committed")
        self.is_prepared = failed is None and verb == "PREPARE"

    def end(self, outcome: Outcome) -> None:
        """Note the outcome and tell the recordings, unless an outcome was noted already."""
        if self.transaction.outcome == "open":
            self.transaction.end(outcome)
            for recording in self.recordings:
                recording.end_transaction(self.transaction)

    def end_alone(self, session_transaction: Any) -> None:
        """Note the end of a transaction that is one statement.

        :param session_transaction: The transaction of the session, which knows the outcome.
        """
        if session_transaction.is_stored_in_part_or_unknown():
            self.end("unknown")
        else:
            self.end("committed" if session_transaction.is_stored() else "rolled back")

    def _note(self, statement: Statement) -> None:
        self.transaction.add(statement)
        for recording in self.recordings:
            recording.add_statement(statement)
