"""The soak runs, and finds what it looks for: see :mod:`tests.soak`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fictive_sqlalchemy import OptInSession
from tests.postgres import PostgresServer
from tests.soak.bank import Settings, run_round

SEED = 3


def test_a_round_of_the_bank_is_clean(server: PostgresServer, driver: str) -> None:
    done = run_round(server, driver, SEED, settings=Settings(threads=4, visits=10))
    assert not done.report.violations, "\n".join(done.report.violations)
    assert sum(done.faults.values()) > 0
    assert done.report.count("stored") > 50
    assert done.report.count("not stored") > 20
    assert done.report.lost.total() > 0


def test_a_commit_that_stores_nothing_is_found(
    server: PostgresServer, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OptInSession, "commit", OptInSession.rollback)
    done = run_round(server, driver, SEED, settings=Settings(threads=1, processes=0))
    assert any("0 of 1 rows are there" in said for said in done.report.violations)


def test_a_flush_that_stores_a_half_is_found(
    server: PostgresServer, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = OptInSession.flush

    def half(session: OptInSession, objects: Any = None) -> None:
        new = list(session.new)
        if len(new) > 1 and not session.in_transaction():
            session.expunge(new[0])
        flush(session, objects)

    monkeypatch.setattr(OptInSession, "flush", half)
    done = run_round(server, driver, SEED, settings=Settings(threads=1, processes=0))
    assert any("1 of 2 rows are there" in said for said in done.report.violations)


@pytest.mark.slow
def test_the_command_ends_in_time_and_says_what_it_did(driver: str) -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "1", "--rounds", "1"]
    arguments = ["--only", "bank", "--driver", driver, "--seed", str(SEED), "--mode", "strict"]
    done = subprocess.run(
        [*command, *arguments, "--threads", "1", "--processes", "0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{driver}, seed {SEED}:\n  1 rounds, 0 failed\n" in done.stdout
