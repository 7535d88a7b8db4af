"""The settings of one session, and of no other, in greenlets and in children of ``os.fork()``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

GREENLETS = """
from gevent import monkey
monkey.patch_all()
import json, sys
import gevent
from sqlalchemy import text
from fictive_sqlalchemy import OptInSession, create_engine

if sys.argv[2] == "psycopg2":
    from psycogreen.gevent import patch_psycopg
    patch_psycopg()
engine = create_engine(sys.argv[1], pool_size=3, max_overflow=0)
READ = text("SELECT current_setting('app.tenant_id', true) FROM pg_sleep(0.001)")
wrong, read = [], 0

def check(tenant, found):
    global read
    read += 1
    if (found or None) != tenant:
        wrong.append([tenant, found])

def work(number):
    tenant = str(number)
    for turn in range(10):
        with OptInSession(engine) as session:
            session.set_local({"app.tenant_id": tenant})
            check(tenant, session.scalar(READ))
            with session.begin():
                check(tenant, session.scalar(READ))
                gevent.sleep(0)
                check(tenant, session.scalar(READ))
            if turn % 2:
                with gevent.Timeout(0.002, False):
                    session.scalar(text("SELECT pg_sleep(0.02)"))
                check(tenant, session.scalar(READ))
        with OptInSession(engine) as session:
            check(None, session.scalar(READ))

gevent.joinall([gevent.spawn(work, number) for number in range(1, 13)], raise_error=True)
print(json.dumps([read, wrong]))
"""

FORK = """
import json, os, sys
from sqlalchemy import text
from fictive_sqlalchemy import OptInSession, create_engine

engine = create_engine(sys.argv[1], pool_size=2)
READ = text("SELECT current_setting('app.tenant_id', true)")
session = OptInSession(engine)
session.set_local({"app.tenant_id": 1})
session.begin()
found = [session.scalar(READ)]
sys.stdout.flush()
child = os.fork()
if not child:
    with OptInSession(engine) as own:
        found = [own.scalar(READ) or None]
        own.set_local({"app.tenant_id": 2})
        found.append(own.scalar(READ))
        with own.begin():
            found.append(own.scalar(READ))
    print(json.dumps(found), flush=True)
    os._exit(0)
os.waitpid(child, 0)
found.append(session.scalar(READ))
session.commit()
found.append(session.scalar(READ))
print(json.dumps(found))
"""


def run(program: str, *arguments: str) -> list[list[object]]:
    """Run a program in a process of its own; return what each line of it says."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(
    find_spec("gevent") is None or find_spec("psycogreen") is None, reason="no gevent"
)
def test_greenlets_on_a_small_pool_each_have_their_own_settings(url: str, driver: str) -> None:
    """Statements are interrupted by timeouts of gevent meanwhile."""
    assert run(GREENLETS, url, driver) == [[12 * (10 * 4 + 5), []]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork()")
def test_a_child_and_its_parent_each_have_their_own_settings(url: str) -> None:
    child, parent = run(FORK, url)
    assert child == [None, "2", "2"]
    assert parent == ["1"] * 3
