"""Many threads on few connections, whose server processes are killed meanwhile.

Sixteen threads move money between accounts and look at them. Nothing here depends on time: each
thread does a fixed number of rounds, a kill is asked for by a count of rounds, and no thread waits
for anything but the pool and the database.

How a mistake would show:

* Each transfer writes a row of its own in the transaction that changes the two balances. A half
  transaction would leave a balance that the rows don't explain; a transaction that two threads
  share would break the rule that no two transfers have the same transaction id.
* Each transaction marks itself with a setting that is local to it. A look outside that sees the
  mark, or a transaction id, or any other isolation level than the server's, is in a transaction
  that leaked.
* A thread that is never given a connection again gets the pool's timeout error.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import CheckConstraint, Connection, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from fictive_sqlalchemy import (
    TRANSACTION_CONNECTIONS,
    IsolationLevel,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
)
from tests.connections import Connections

THREADS = 16
ROUNDS = int(os.environ.get("THREAD_ROUNDS", "25"))
SEED = int(os.environ.get("THREAD_SEED", "1"))
ACCOUNTS = 6
START = 20
#: One kill for so many rounds of all threads together.
ROUNDS_PER_KILL = 8

POOLS: dict[str, dict[str, Any]] = {
    "four": {"pool_size": 4, "max_overflow": 0, "pool_timeout": 60},
    "one": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 60},
    "none": {"poolclass": NullPool},
}


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    __table_args__ = (CheckConstraint("balance >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Transfer(Base):
    __tablename__ = "transfer"

    token: Mapped[str] = mapped_column(primary_key=True)
    transaction: Mapped[str] = mapped_column(unique=True)
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]


LOOK = text(
    "SELECT sum(balance), current_setting('bank.owner', true),"
    " pg_current_xact_id_if_assigned()::text, current_setting('transaction_isolation'),"
    " current_setting('transaction_read_only') FROM account"
)


MINE = text(
    "SELECT current_setting('bank.owner', true), pg_current_xact_id()::text,"
    " current_setting('transaction_isolation')"
)


class Refused(Exception):
    """A reason of the application's own to roll back."""


def is_lost(error: DBAPIError) -> bool:
    """Whether an error comes from a server process that was killed."""
    # psycopg speaks of its pipeline if that happens in the middle of executemany(), or of what the
    # server said at last, and SQLAlchemy takes neither for a disconnection. Nor if a statement
    # beside a stream finds the connection lost, and goes on with another one: then the stream's
    # is closed.
    said = str(error.orig)
    told = ("pipeline", "terminating connection", "closed")
    return error.connection_invalidated or any(words in said for words in told)


class Bank:
    """What the threads share."""

    def __init__(self, url: str, driver: str, pool: str) -> None:
        self.engine: OptInEngine = create_engine(
            url, connect_args={"application_name": "bank"}, **POOLS[pool]
        )
        self.connections = Connections(self.engine, driver)
        self.sessions = OptInScopedSession(sessionmaker(self.engine, class_=OptInSession))
        # So that the threads don't do one after the other what they should do at once.
        self.start = threading.Barrier(THREADS)
        self.kills = threading.Semaphore(0)
        self.done = threading.Event()
        self.killed = 0
        Base.metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            accounts = [{"id": n, "balance": START} for n in range(1, ACCOUNTS + 1)]
            connection.execute(insert(Account), accounts)

    def kill_when_asked(self, url: str) -> None:
        """What the killing thread does, on a connection of its own."""
        random = Random(SEED)
        engine = create_engine(url, poolclass=NullPool)
        while True:
            self.kills.acquire()
            if self.done.is_set():
                return
            with engine.connect() as connection:
                pids = connection.scalars(
                    text(
                        "SELECT pid FROM pg_stat_activity WHERE application_name = 'bank'"
                        " AND datname = current_database()"
                    )
                ).all()
                if pids:
                    pid = random.choice(pids)
                    connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
                    self.killed += 1


class Worker(threading.Thread):
    """One thread: its rounds, and what it has been told of each of its transfers."""

    def __init__(self, bank: Bank, number: int) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.bank = bank
        self.number = number
        self.random = Random(SEED * 1000 + number)
        self.count = 0
        self.stored: set[str] = set()
        self.refused: set[str] = set()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.bank.start.wait()
            for number in range(ROUNDS):
                self.round()
                if (number * THREADS + self.number) % ROUNDS_PER_KILL == 0:
                    self.bank.kills.release()
        except BaseException as failure:  # for the test to raise
            self.failure = failure

    def round(self) -> None:
        """What a request would do: some steps in one session, which is closed after them."""
        steps: list[Callable[[OptInSession], None]] = [
            self.look,
            self.look_at_one,
            self.look_at_all,
            self.stream,
            self.touch,
            self.transfer,
            self.transfer,
            self.transfer,
        ]
        try:
            session = self.bank.sessions()
            for step in self.random.choices(steps, k=4):
                try:
                    step(session)
                except DBAPIError as error:
                    # A killed server process; the session is usable for the next step at once.
                    if not is_lost(error):
                        raise
        finally:
            self.bank.sessions.remove()

    # Outside

    def look(self, session: OptInSession) -> None:
        total, owner, transaction, level, read_only = session.execute(LOOK).one()
        assert total == ACCOUNTS * START
        assert owner in (None, "")
        assert (transaction, level, read_only) == (None, "read committed", "off")
        assert not session.in_transaction()

    def look_at_one(self, session: OptInSession) -> None:
        account = session.get_one(Account, self.random.randint(1, ACCOUNTS))
        assert account.balance >= 0

    def look_at_all(self, session: OptInSession) -> None:
        result = session.execute(select(Account.id, Account.balance))
        self.look(session)  # the result has to outlive its connection
        assert sum(balance for _, balance in result) == ACCOUNTS * START

    def stream(self, session: OptInSession) -> None:
        statement = select(Account.balance).execution_options(yield_per=2)
        total = 0
        for number, balance in enumerate(session.scalars(statement)):
            total += balance
            if number == 3:
                self.look(session)
        assert total == ACCOUNTS * START

    def touch(self, session: OptInSession) -> None:
        """One statement that writes, and has to be durable by itself."""
        number = self.random.randint(1, ACCOUNTS)
        # Nothing changes, but the row is locked, so it takes its turn with the transfers.
        session.execute(
            update(Account).where(Account.id == number).values(balance=Account.balance),
            execution_options={"synchronize_session": False},
        )
        assert not session.in_transaction()

    # Inside

    def transfer(self, session: OptInSession) -> None:
        self.count += 1
        token = f"{self.number}-{self.count}"
        levels: list[IsolationLevel | None] = [None, None, None, "REPEATABLE READ", "SERIALIZABLE"]
        level = self.random.choice(levels)
        refuse = self.random.random() < 0.15
        complete = False
        try:
            with session.begin(isolation_level=level):
                self.do_transfer(session, token, level, refuse)
                complete = True
        except (Refused, IntegrityError):
            self.refused.add(token)
        except DBAPIError as error:
            if not complete or not is_lost(error):
                self.refused.add(token)
            if is_lost(error):
                raise  # if it was the COMMIT, only the database knows
            assert isinstance(error, OperationalError)
            assert level is not None, "there are no serialization failures at READ COMMITTED"
        else:
            self.stored.add(token)
        assert not session.in_transaction()

    def do_transfer(
        self, session: OptInSession, token: str, level: str | None, refuse: bool
    ) -> None:
        session.execute(select(func.set_config("bank.owner", token, True)))
        owner, transaction, level_now = session.execute(MINE).one()
        assert (owner, level_now) == (token, (level or "READ COMMITTED").lower())
        numbers = sorted(self.random.sample(range(1, ACCOUNTS + 1), 2))
        accounts = session.scalars(
            select(Account)
            .where(Account.id.in_(numbers))
            .order_by(Account.id)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).all()
        source, target = self.random.sample(accounts, 2)
        amount = self.random.randint(1, START)
        source.balance -= amount  # which the database refuses if it is too much
        target.balance += amount
        session.flush()
        if refuse:
            raise Refused
        session.add(
            Transfer(
                token=token,
                transaction=transaction,
                source=source.id,
                target=target.id,
                amount=amount,
            )
        )
        session.flush()
        assert session.execute(MINE).one() == (owner, transaction, level_now)


@pytest.fixture(params=sorted(POOLS))
def bank(request: pytest.FixtureRequest, url: str, driver: str) -> Iterator[Bank]:
    bank = Bank(url, driver, request.param)
    yield bank
    bank.engine.dispose()
    gc.collect()  # while the filter below is in force


def test_threads_that_share_connections_share_nothing_else(bank: Bank, url: str) -> None:
    workers = [Worker(bank, number) for number in range(THREADS)]
    killer = threading.Thread(target=bank.kill_when_asked, args=(url,), daemon=True)
    killer.start()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive(), f"{worker.name} waits for something that does not come"
    bank.done.set()
    bank.kills.release()
    killer.join(60)
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    assert bank.killed > 0
    # Not through the bank's pool: a connection that was killed there may wait in it to be met.
    engine = sqlalchemy.create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        check_money(connection, workers)
        check_connections(connection, bank)


def check_money(connection: Connection, workers: list[Worker]) -> None:
    """The transfers that are stored explain the balances, and are those that were told to be."""
    accounts = connection.execute(select(Account.id, Account.balance)).all()
    transfers = connection.execute(select(Transfer.__table__)).all()
    expected = dict.fromkeys(range(1, ACCOUNTS + 1), START)
    for transfer in transfers:
        expected[transfer.source] -= transfer.amount
        expected[transfer.target] += transfer.amount
    assert {account.id: account.balance for account in accounts} == expected
    tokens = {transfer.token for transfer in transfers}
    stored = set[str]().union(*(worker.stored for worker in workers))
    refused = set[str]().union(*(worker.refused for worker in workers))
    assert stored
    assert refused
    assert stored <= tokens
    assert not refused & tokens


def check_connections(connection: Connection, bank: Bank) -> None:
    """No transaction is open anywhere, and each connection that is left rests."""
    assert len(TRANSACTION_CONNECTIONS) == 0
    assert not bank.connections.holders
    open_there = text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%'"
    )
    assert connection.scalars(open_there).all() == []
    living = text("SELECT pid FROM pg_stat_activity WHERE application_name = 'bank'")
    left = {each.info.backend_pid for each in bank.connections.living()}
    bank.connections.killed.update(left.difference(connection.scalars(living)))
    bank.connections.check_rest()
