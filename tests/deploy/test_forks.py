"""No connection, transaction or session crosses a fork: see the programs in forking.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from weakref import ref

import pytest
import sqlalchemy as sa

from fictive_sqlalchemy import create_engine
from tests.deploy import forking
from tests.library import fill

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")

# Python 3.12 warns of any fork() while there are other threads.
QUIET = ["-W", "ignore:This process:DeprecationWarning"]

PROGRAMS = [
    forking.pool_is_the_parents,
    forking.pool_of_a_grandchild,
    forking.session_outside,
    forking.session_inside,
    forking.block_is_left_in_the_child,
    forking.stream,
    forking.connections_in_use,
    forking.another_thread_waits_for_the_server,
    forking.sqlite_in_memory,
    forking.sqlite_inside,
]


@pytest.fixture
def filled_url(url: str) -> str:
    fill(url)
    return url


def run(program: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *QUIET, "-m", forking.__name__, program, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("program", [program.__name__ for program in PROGRAMS])
def test_a_child_uses_no_connection_of_its_parent(program: str, filled_url: str) -> None:
    ended = run(program, filled_url)
    assert not ended.returncode, ended.stdout
    assert not ended.stdout


def test_a_child_does_not_keep_the_connections_of_a_dead_parent_open(filled_url: str) -> None:
    ended = run(forking.child_outlives_the_parent.__name__, filled_url)
    assert ended.stdout == "The lock was free.\n"


def test_the_watch_for_forks_keeps_no_engine_alive(url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
    engine.dispose()
    watched = ref(engine)
    del engine, connection
    gc.collect()
    assert watched() is None
