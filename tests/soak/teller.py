"""A thread of the bank: what it does, and what it takes each answer for."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import CommitOutcomeUnknown, IsolationLevel, OptInEngine, OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create
from tests.core.test_autocommit import chain
from tests.core.test_threads import is_lost
from tests.soak.records import Outcome, Record, Report
from tests.soak.tables import (
    ACCOUNTS,
    BALANCE,
    COUNTERS,
    LABELS,
    Account,
    Counter,
    Entry,
    Label,
    Transfer,
)

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_CONFLICTS = ("40001", "40P01")  # serialization_failure, deadlock_detected

_LOOK = sa.text(
    "SELECT sum(balance), pg_current_xact_id_if_assigned()::text,"
    " current_setting('transaction_isolation'), current_setting('transaction_read_only')"
    " FROM account"
)


#: libpq's PQTRANS_IDLE and PQTRANS_UNKNOWN.
IDLE, LOST = 0, 4


class Refused(Exception):
    """A reason of the application's own to roll back."""


class Teller(threading.Thread):
    """Do random operations, one session after the other, and note what each was answered.

    :param engine: The engine under test.
    :param seed: The seed of the round.
    :param name: A name that no other teller of the round has; its tokens begin with it.
    :param visits: How many sessions to open.
    :param begin_on_write: Whether its sessions have this option. Then whatever is written outside
        a transaction is followed by ``commit()``.
    """

    def __init__(
        self, engine: OptInEngine, seed: int, name: str, visits: int, begin_on_write: bool
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.report = Report()
        self.visits_left = visits
        self._engine = engine
        self._begin_on_write = begin_on_write
        self._random = Random(f"{seed} {name}")
        self._count = 0
        options: dict[str, Any] = {"begin_on_write": True} if begin_on_write else {}
        options["expire_on_commit"] = self._random.choice((True, True, False))
        self._sessions = sessionmaker(engine, class_=OptInSession, **options)
        self._operations: list[Callable[[OptInSession], None]] = [
            self.read_total,
            self.read_object,
            self.read_half_a_stream,
            self.look_at_driver,
            self.transfer_in_block,
            self.transfer_in_block,
            self.transfer_by_commit,
            self.transfer_by_commit,
            self.transfer_in_atomic,
            self.transfer_on_connection,
            self.insert_one,
            self.insert_many,
            self.insert_in_bulk,
            self.increase,
            self.flush,
            self.find_or_create,
        ]

    def run(self) -> None:
        """Do all visits. What the contract does not allow is noted, and the visits go on."""
        while self.visits_left > 0:
            self.visits_left -= 1
            try:
                self._visit()
            except Exception:
                self._violation("a session could not be opened or closed", error=True)

    def _visit(self) -> None:
        """Do what a request would do: some operations in one session, which is closed at last."""
        with self._sessions() as session:
            for operation in self._random.choices(self._operations, k=self._random.randint(1, 5)):
                kind = operation.__name__
                self.report.operations[kind] += 1
                try:
                    operation(session)
                except DBAPIError as error:
                    self._take_error(kind, error)
                except Exception:
                    self._violation(kind, error=True)
                if session.in_transaction():
                    if not self._begin_on_write:
                        self._violation(f"{kind} has left a transaction open")
                    session.rollback()

    # Outside: reads

    def read_total(self, session: OptInSession) -> None:
        total, transaction, level, read_only = session.execute(_LOOK).one()
        if total != ACCOUNTS * BALANCE:
            self._violation(f"the balances were {total} in all, in one statement")
        if (transaction, level, read_only) != (None, "read committed", "off"):
            self._violation(f"a read was in a transaction: {transaction}, {level}, {read_only}")

    def read_object(self, session: OptInSession) -> None:
        account = session.get(Account, self._random.randint(1, ACCOUNTS))
        if account is None or account.balance < 0:
            self._violation("an account was missing, or negative")

    def read_half_a_stream(self, session: OptInSession) -> None:
        statement = sa.select(Account.balance).execution_options(yield_per=2)
        result = session.scalars(statement)
        try:
            balances = [balance for _, balance in zip(range(3), result, strict=False)]
            if self._random.random() < 0.5:
                self.read_total(session)  # beside the stream
            if self._random.random() < 0.5:
                balances += result
                if sum(balances) != ACCOUNTS * BALANCE:
                    self._violation(f"a stream gave {balances}")
        finally:
            if self._random.random() < 0.5:
                result.close()

    def look_at_driver(self, session: OptInSession) -> None:
        connection = session.connection()  # which begins a transaction with begin_on_write
        dbapi: Any = connection.connection.dbapi_connection
        if self._begin_on_write:
            return
        if not dbapi.autocommit or dbapi.info.transaction_status not in (IDLE, LOST):
            status = dbapi.info.transaction_status
            self._violation(f"outside, autocommit is {dbapi.autocommit}, the status {status}")

    # Transfers

    def transfer_in_block(self, session: OptInSession) -> None:
        source, target, amount = self._choose()
        refuse = self._random.random() < 0.15
        levels: list[IsolationLevel | None] = [None, None, None, "REPEATABLE READ", "SERIALIZABLE"]
        level = self._random.choice(levels)
        token = self._token()
        committed: list[str] = []

        def action() -> None:
            with session.begin(isolation_level=level):
                session.on_commit(lambda: committed.append(token))
                accounts = self._locked(session, source, target)
                accounts[source].balance -= amount  # refused by the database if it is too much
                accounts[target].balance += amount
                session.flush()
                if refuse:
                    raise Refused
                session.add(Transfer(token=token, source=source, target=target, amount=amount))

        outcome = self._attempt("transfer_in_block", token, action)
        if len(committed) != (outcome == "stored") and outcome != "unknown":
            self._violation(
                f"{token} is {outcome}, and on_commit was called {len(committed)} times"
            )

    def transfer_by_commit(self, session: OptInSession) -> None:
        source, target, amount = self._choose()
        token = self._token()

        def action() -> None:
            first, second = session.get_one(Account, source), session.get_one(Account, target)
            first.balance = Account.balance - amount
            second.balance = Account.balance + amount
            session.add(Transfer(token=token, source=source, target=target, amount=amount))
            session.commit()

        self._attempt("transfer_by_commit", token, action, session)

    def transfer_in_atomic(self, session: OptInSession) -> None:
        source, target, amount = self._choose()
        way = self._random.choice(("stored", "stored", "refused", "duplicate"))
        token = self._token()
        inner: list[str] = []

        def action() -> None:
            with session.atomic():
                accounts = self._locked(session, source, target)
                accounts[source].balance -= amount
                accounts[target].balance += amount
                session.flush()  # an account that would become negative is refused here
                try:
                    with session.atomic():
                        session.add(Entry(token=f"{token}/inner", part=0))
                        session.flush()
                        if way == "refused":
                            raise Refused
                        if way == "duplicate":
                            session.execute(
                                sa.insert(Entry), {"token": f"{token}/inner", "part": 0}
                            )
                        inner.append(token)
                except (Refused, IntegrityError):
                    pass  # the savepoint is undone, and the transfer goes on
                session.add(Transfer(token=token, source=source, target=target, amount=amount))

        outcome = self._attempt("transfer_in_atomic", token, action)
        self._record("savepoint", f"{token}/inner", outcome if inner else "not stored", 1)

    def transfer_on_connection(self, session: OptInSession) -> None:
        source, target, amount = self._choose()
        token = self._token()

        def action() -> None:
            with self._engine.connect() as connection:
                connection.scalar(_LOOK)
                with connection.begin():
                    for number in sorted((source, target)):
                        change = -amount if number == source else amount
                        connection.execute(
                            sa.update(Account)
                            .where(Account.id == number)
                            .values(balance=Account.balance + change)
                        )
                    values = {"token": token, "source": source, "target": target, "amount": amount}
                    connection.execute(sa.insert(Transfer), values)

        session.close()  # a pool of one connection has none for both
        self._attempt("transfer_on_connection", token, action)

    # Outside: writes

    def insert_one(self, session: OptInSession) -> None:
        token = self._token()

        def action() -> None:
            session.execute(sa.insert(Entry).values(token=token, part=0))

        self._attempt("insert_one", token, action, session, parts=1, alone=True)

    def insert_many(self, session: OptInSession) -> None:
        token, parts = self._token(), self._random.randint(2, 5)
        rows = [{"token": token, "part": part} for part in range(parts)]
        if self._random.random() < 0.2:
            rows.append(rows[0])  # a duplicate: none of them is stored

        def action() -> None:
            session.execute(sa.insert(Entry), rows)

        self._attempt("insert_many", token, action, session, parts=parts)

    def insert_in_bulk(self, session: OptInSession) -> None:
        token, parts = self._token(), self._random.randint(2, 5)
        rows: list[dict[str, Any]] = [{"token": token, "part": part} for part in range(parts)]
        if self._random.random() < 0.2:
            rows.append(rows[0])

        def action() -> None:
            session.bulk_insert_mappings(sa.inspect(Entry), rows)

        self._attempt("insert_in_bulk", token, action, session, parts=parts)

    def flush(self, session: OptInSession) -> None:
        token, parts = self._token(), self._random.randint(1, 3)

        def action() -> None:
            session.add_all([Entry(token=token, part=part) for part in range(parts)])
            if self._random.random() < 0.5:
                self._count_waiting(session, token, parts)
            session.flush()

        self._attempt("flush", token, action, session, parts=parts)
        if not self._begin_on_write and self._random.random() < 0.5:
            session.rollback()  # what flush() has stored outside stays stored

    def _count_waiting(self, session: OptInSession, token: str, parts: int) -> None:
        """Check rows 7 and 28 of the contract: whether a read sees what waits for a flush."""
        try:
            seen = session.scalar(sa.select(sa.func.count()).where(Entry.token == token))
        except DBAPIError:
            session.rollback()  # what waits would be stored by the next flush of this session
            raise
        if seen != (parts if self._begin_on_write else 0):
            self._violation(f"a read saw {seen} of {parts} rows that wait")

    def increase(self, session: OptInSession) -> None:
        number = self._random.randint(1, COUNTERS)
        token = self._token()

        def action() -> None:
            session.execute(
                sa.update(Counter)
                .where(Counter.id == number)
                .values(count=Counter.count + 1)
                .execution_options(synchronize_session=False)
            )

        outcome = self._attempt("increase", token, action, session, alone=True, record=False)
        self.report.increased[number] += outcome == "stored"
        self.report.maybe_increased[number] += outcome == "unknown"

    def find_or_create(self, session: OptInSession) -> None:
        name = f"label {self._random.randint(1, LABELS)}"
        was_created: list[bool] = []

        def action() -> None:
            label, created = filter_by_or_create(session, Label, {"name": name}, {})
            if label.name != name:
                self._violation(f"{name} was looked for, and {label.name} found")
            was_created.append(created)

        kind = "find_or_create"
        outcome = self._attempt(kind, name, action, session, alone=True, record=False)
        if outcome == "stored":
            self.report.found.add(name)
            self.report.created[name] += was_created == [True]
        elif outcome == "unknown":
            self.report.maybe_created.add(name)

    # What is told of it

    def _attempt(
        self,
        kind: str,
        token: str,
        action: Callable[[], None],
        session: OptInSession | None = None,
        *,
        parts: int = 0,
        alone: bool = False,
        record: bool = True,
    ) -> Outcome:
        """Do what stores something, and record what became of it by the answer.

        :param kind: The operation.
        :param token: The token of what it stores.
        :param action: Stores it.
        :param session: The session, if the action stores it outside a transaction.
        :param parts: How many rows it stores in ``entry``.
        :param alone: Whether the action sends one statement in autocommit: if the connection is
            lost meanwhile, nobody knows whether the server has done it.
        :param record: Whether to record it by its token.
        :returns: What became of it.
        """
        outcome: Outcome = "not stored"
        answer = ""
        try:
            action()
            if session is not None and self._begin_on_write:
                session.commit()
            outcome = "stored"
        except (Refused, IntegrityError) as error:
            answer = repr(error)
        except CommitOutcomeUnknown as error:
            outcome, answer = "unknown", repr(error)
            self.report.lost[kind] += 1
        except DBAPIError as error:
            answer = repr(error)
            self._take_error(kind, error)
            if is_lost(error) and alone and not self._begin_on_write:
                outcome = "unknown"
        except PendingRollbackError as error:
            # Row 26 of the contract: the block went on after an error, and the new error says why.
            answer = repr(error)
            if any(isinstance(one, DBAPIError) and is_lost(one) for one in chain(error)):
                self.report.lost[kind] += 1
            else:
                self._violation(f"{kind} of {token} does not say what has failed", error=True)
        except Exception as error:
            outcome, answer = "unknown", repr(error)
            self._violation(f"{kind} of {token}", error=True)
        if outcome != "stored" and session is not None and self._begin_on_write:
            session.rollback()
        if record:
            self._record(kind, token, outcome, parts, answer)
        return outcome

    def _record(
        self, kind: str, token: str, outcome: Outcome, parts: int = 0, error: str = ""
    ) -> None:
        self.report.records.append(Record(token, kind, outcome, parts, error))

    def _take_error(self, kind: str, error: DBAPIError) -> None:
        """Look whether an error of the database is one that may come."""
        if is_lost(error):
            self.report.lost[kind] += 1
        elif _sqlstate(error) not in _CONFLICTS:
            self._violation(kind, error=True)

    def _violation(self, what: str, error: bool = False) -> None:
        said = f"{self.name}: {what}"
        self.report.violations.append(f"{said}\n{traceback.format_exc()}" if error else said)

    # The data

    def _token(self) -> str:
        self._count += 1
        return f"{self.name}-{self._count}"

    def _choose(self) -> tuple[int, int, int]:
        source, target = self._random.sample(range(1, ACCOUNTS + 1), 2)
        return source, target, self._random.randint(1, BALANCE // 2)

    def _locked(self, session: OptInSession, *numbers: int) -> dict[int, Account]:
        statement = (
            sa.select(Account)
            .where(Account.id.in_(numbers))
            .order_by(Account.id)
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        return {account.id: account for account in session.scalars(statement)}


def _sqlstate(error: DBAPIError) -> str:
    driver_error: Any = error.orig
    return getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None) or ""
