"""Transactions that conflict on the server are run again until each has come through."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy.exc import OperationalError

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.ext.tenacity import is_serialization_failure, retry_transaction
from tests.library import Onlooker, Sessions
from tests.retry.support import Account


class TestConflicts:
    """16 threads that transfer money at SERIALIZABLE between 4 accounts."""

    @staticmethod
    def transfer(session: OptInSession, together: threading.Barrier | None, seed: int) -> None:
        sender, receiver = random.Random(seed).sample(range(1, 5), 2)
        paid_by, paid_to = session.get_one(Account, sender), session.get_one(Account, receiver)
        if together is not None:
            together.wait(60)  # all have read before anyone writes
        paid_by.balance -= 10
        paid_to.balance += 10

    def test_without_retry_some_transfers_fail(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        together = threading.Barrier(16)

        def run(seed: int) -> bool:
            try:
                with sessions() as session, session.begin(isolation_level="SERIALIZABLE"):
                    self.transfer(session, together, seed)
            except OperationalError as error:
                assert is_serialization_failure(error)
                return False
            return True

        with ThreadPoolExecutor(16) as threads:
            succeeded = list(threads.map(run, range(16)))
        # Each wants two of the four rows, so that no more than two have none in common.
        assert 1 <= succeeded.count(True) <= 2
        assert onlooker.scalar("SELECT sum(balance) FROM account") == 400

    def test_with_retry_all_transfers_succeed_and_no_money_is_lost(
        self, sessions: Sessions, onlooker: Onlooker
    ) -> None:
        together = threading.Barrier(16)
        tries: list[int] = []

        def run(seed: int) -> None:
            first = True

            @retry_transaction(sessions, isolation_level="SERIALIZABLE", tries=200)
            def transfer(session: OptInSession) -> None:
                nonlocal first
                tries.append(seed)
                barrier, first = together if first else None, False
                self.transfer(session, barrier, seed)

            transfer()

        expected = dict.fromkeys(range(1, 5), 100)
        for seed in range(16):
            sender, receiver = random.Random(seed).sample(range(1, 5), 2)
            expected[sender] -= 10
            expected[receiver] += 10
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(run, range(16)))
        assert len(tries) >= 16 + 14
        balances = onlooker.column("SELECT balance FROM account ORDER BY id")
        assert balances == list(expected.values())
        assert sum(balances) == 400
