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

#: In the ``info`` of a pool's entry: the use of its connection that is being recorded.
USE = "fictive_sqlalchemy.recorded_use"

#: Of a transaction so many statements are kept.
MOST_STATEMENTS = 1_000

#: Of the SQL of a statement so many characters are kept.
MOST_CHARACTERS = 10_000

_CONTROL = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE", "PREPARE TRANSACTION")


def _made(place: Place | Spot | None) -> Place | None:
    return place.place() if isinstance(place, Spot) else place


class Statement:
    """One statement that was sent, or one BEGIN, COMMIT, ROLLBACK or savepoint."""

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
        """What :attr:`place` is made of."""
        self.started: float = started
        """When it was sent: seconds by :func:`time.perf_counter`."""
        self.duration: float = duration
        """How many seconds the caller waited for it, reading a stream included. That of a BEGIN is
        part of the first statement's, because the driver sends the two together."""
        self.round_trips: int = round_trips
        """How many messages waited for an answer. Of a stream, each part that was read is one."""
        self.rows: int | None = None
        """How many rows it returned or changed; ``None`` where the driver does not say."""
        self.transaction: Transaction | None = None
        """The transaction that it belongs to; ``None`` outside."""
        self.error: str | None = None
        """The class of the error that it raised; ``None`` if it raised none."""
        self.parameters: Any = None
        """Its parameters, if a recording keeps them."""

    @property
    def place(self) -> Place | None:
        """The application's line, with the call it made there."""
        place = self.spot = _made(self.spot)
        return place

    @property
    def verb(self) -> str:
        """Its first word, in capitals."""
        words = self.sql.split(None, 1)
        return words[0].upper() if words else ""

    @property
    def is_control(self) -> bool:
        """Whether it begins or ends a transaction or savepoint, and does nothing else."""
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
        """The application's line that has begun it, and the call: ``begin()``, or what wrote."""
        self.begin: str = begin
        """The BEGIN that is sent for it."""
        self.isolation_level: str | None = level
        """The level that it has begun with; ``None`` for the server's default."""
        self.is_one_statement: bool = is_one_statement
        """Whether it is its one statement, which is sent without BEGIN and COMMIT."""
        self.started: float | None = None
        """When BEGIN was sent: seconds by :func:`time.perf_counter`. ``None`` before that."""
        self.busy: float = 0.0
        """For how many seconds of it the database was busy for it."""
        self.sent: list[Statement] = []
        """All that was sent in it, in order, BEGIN and COMMIT included; the first 1,000."""
        self.round_trips: int = 0
        """How many messages waited for an answer, BEGIN and its end included."""
        self.outcome: Outcome = "open"
        """``"committed"``, ``"rolled back"``, ``"open"`` before, or ``"unknown"`` if the connection
        was lost during COMMIT."""
        self.thread: int = get_ident()
        """The ident of the thread that has begun it."""
        self._ended: float | None = None

    @property
    def statements(self) -> list[Statement]:
        """Its statements, without BEGIN, COMMIT, ROLLBACK and savepoints."""
        return [statement for statement in self.sent if not statement.is_control]

    @property
    def has_begun(self) -> bool:
        """Whether it has sent something."""
        return self.started is not None

    @property
    def has_ended(self) -> bool:
        """Whether it is over."""
        return self.outcome != "open"

    @property
    def duration(self) -> float:
        """How many seconds it was open on the server, from BEGIN to its end, or until now."""
        if self.started is None:
            return 0.0
        return (perf_counter() if self._ended is None else self._ended) - self.started

    @property
    def waiting(self) -> float:
        """For how many seconds of it the database was not busy for it."""
        return max(0.0, self.duration - self.busy)

    def add(self, statement: Statement) -> None:
        """Note what was sent in it."""
        statement.transaction = self
        self.busy += statement.duration
        self.round_trips += statement.round_trips
        if len(self.sent) < MOST_STATEMENTS:
            self.sent.append(statement)

    def end(self, outcome: Outcome) -> None:
        """Note that it has ended, unless that was noted already."""
        if self.outcome == "open":
            self.outcome = outcome
            self._ended = perf_counter()

    def __repr__(self) -> str:
        return f"<Transaction {self.outcome}, begun by {self.begun_at}>"


class ConnectionUse:
    """One use of a connection of the pool, from the pool and back to it."""

    __slots__ = ("_ended", "recordings", "sent_in", "spot", "started", "waited")

    def __init__(self, started: float, waited: float) -> None:
        self.started: float = started
        """When the pool gave it: seconds by :func:`time.perf_counter`."""
        self.waited: float = waited
        """For how many seconds the pool was waited for, making a new connection included."""
        self.spot: Place | Spot | None = None
        """What :attr:`place` is made of."""
        self.sent_in: Transaction | None = None
        """The transaction of what was sent on it last; ``None`` outside."""
        self.recordings: tuple[Any, ...] = ()
        """The recordings that get it."""
        self._ended: float | None = None

    @property
    def place(self) -> Place | None:
        """The application's line that has sent its first statement."""
        place = self.spot = _made(self.spot)
        return place

    @property
    def held(self) -> float:
        """For how many seconds it was held; until now, if it still is."""
        return (perf_counter() if self._ended is None else self._ended) - self.started

    has_begun = True

    @property
    def has_ended(self) -> bool:
        """Whether it is back in the pool."""
        return self._ended is not None

    @property
    def is_held(self) -> bool:
        """Whether it is not back in the pool yet."""
        return self._ended is None

    def note(self, statement: Statement, recordings: tuple[Any, ...]) -> None:
        """Note a statement that was sent on the connection.

        :param statement: The statement.
        :param recordings: The recordings that get the statement, and so the use.
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
        """Note that the pool gets it back, and rolls back what was left open."""
        if self._ended is None:
            self._ended = perf_counter()
        if self.sent_in is not None:
            self.sent_in.end("rolled back")


def given_back(connection: Any, record: Any, state: Any) -> None:
    """Note that a pool gets a connection back; a listener to the event ``reset``."""
    use: ConnectionUse | None = record.info.pop(USE, None)
    if use is not None:
        use.give_back()


def _not_known(recordings: tuple[Any, ...], known: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the recordings that are not known yet."""
    return tuple(each for each in recordings if each not in known)


class RecordedTransaction:
    """What notes the open transaction of a connection.

    :param transaction: What is noted.
    """

    __slots__ = ("flow", "has_begun", "is_prepared", "recordings", "transaction")

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction
        self.flow: Flow = here()
        """The thread, greenlet and task that has begun it."""
        self.recordings: tuple[Any, ...] = ()
        """The recordings that get it."""
        self.has_begun = False
        """Whether BEGIN was sent, and noted."""
        self.is_prepared = False
        """Whether PREPARE TRANSACTION was sent."""

    def add_to(self, recordings: tuple[Any, ...]) -> None:
        """Have recordings that do not know the transaction get it."""
        if self.recordings != recordings:
            new = _not_known(recordings, self.recordings)
            self.recordings += new
            for recording in new:
                recording.add_transaction(self.transaction)

    def add(self, statement: Statement) -> None:
        """Note a statement that was sent, and the BEGIN that the driver sends before the first."""
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
        """Wrap what ends the transaction so that it is noted.

        :param verb: ``"PREPARE"``, ``"COMMIT"`` or ``"ROLLBACK"``.
        :param way: What sends it.
        :param connection: The connection.
        """

        def end() -> None:
            held = connection.held
            is_open = self.has_begun or connection.is_open_on_server()
            count = of_rollback(None if held is None else held.dbapi_connection)
            # Not the error itself, which would keep this frame alive, and this frame the error.
            failed: type[BaseException] | None = None
            started = perf_counter()
            try:
                way()
            except BaseException as error:
                failed = type(error)
                raise
            finally:
                if is_open and held is not None and self.transaction.outcome == "open":
                    if not self.has_begun:  # a cursor of the driver has sent it, for example
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
        """Note that the transaction has ended, and tell the recordings, unless that was done."""
        if self.transaction.outcome == "open":
            self.transaction.end(outcome)
            for recording in self.recordings:
                recording.end_transaction(self.transaction)

    def end_alone(self, session_transaction: Any) -> None:
        """Note the end of a transaction that is one statement.

        :param session_transaction: The transaction of the session.
        """
        if session_transaction.is_stored_in_part_or_unknown():
            self.end("unknown")
        else:
            self.end("committed" if session_transaction.is_stored() else "rolled back")

    def _note(self, statement: Statement) -> None:
        self.transaction.add(statement)
        for recording in self.recordings:
            recording.add_statement(statement)
