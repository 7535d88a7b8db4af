"""Random sequences of what two sessions can do, compared with a model of the contract.

Hypothesis chooses the steps. Each step is done to a real session on a real PostgreSQL, then to the
model, which says what must come of it: a result, an error, the rows in the database, the state of
each object. After each step the two are compared, as are the connections with where they have to
rest; after each run nothing may be left open. See :mod:`tests.state_machine`.

``MODEL_EXAMPLES=5000 MODEL_SEED=7 pytest tests/core/test_state_machine.py`` runs more of it.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from fictive_sqlalchemy import OptInEngine, create_engine
from tests.connections import Connections
from tests.postgres import PostgresServer
from tests.state_machine.machine.checks import SHRINKS
from tests.state_machine.machine.rules import Sessions, SessionsThatBeginOnWrite
from tests.state_machine.machine.sessions import POOLS, Fixture
from tests.state_machine.tables import SCHEMAS, Base, SecondBase

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "150"))
STEPS = int(os.environ.get("MODEL_STEPS", "40"))
SEED = os.environ.get("MODEL_SEED")

#: Who waits longer than this for a lock gets an error, so that one thread can play all parts.
LOCK_TIMEOUT = 10

#: Pools on whose connections psycopg prepares each statement at its first execution.
PREPARING = ("five", "one", "thread")


def _control(url: str) -> Any:
    """A plain connection of the driver."""
    plain = sa.make_url(url)
    driver = importlib.import_module(plain.get_driver_name())
    connection = driver.connect(
        plain.set(drivername="postgresql").render_as_string(hide_password=False),
        options=f"-c lock_timeout={LOCK_TIMEOUT}",
    )
    connection.autocommit = True
    if hasattr(connection, "prepare_threshold"):
        connection.prepare_threshold = None  # a migration would change what it has prepared
    return connection


@pytest.fixture
def machine(url: str, driver: str, server: PostgresServer) -> Iterator[Fixture]:
    engines: dict[str, tuple[OptInEngine, Connections]] = {}
    for pool, options in POOLS.items():
        arguments: dict[str, Any] = {"options": f"-c lock_timeout={LOCK_TIMEOUT}"}
        if driver == "psycopg" and pool in PREPARING:
            arguments["prepare_threshold"] = 0
        engine = create_engine(url, **options, connect_args=arguments)
        engines[pool] = (engine, Connections(engine, driver))
    control = _control(url)
    with control.cursor() as cursor:
        cursor.execute("CREATE SCHEMA acme")
    for schema in SCHEMAS:
        options_of_tenant = {"schema_translate_map": {None: schema}}
        Base.metadata.create_all(engines["null"][0].execution_options(**options_of_tenant))
    second = create_engine(url)
    connections = Connections(second, driver)
    SecondBase.metadata.create_all(second)
    yield Fixture(driver, control, engines, (second, connections))
    control.close()
    second.dispose()
    for engine, _ in engines.values():
        engine.dispose()
    gc.collect()  # while the filter below is in force


def run(
    machine: type[Sessions], fixture: Fixture, *, examples: int = EXAMPLES, seed_: int | None = None
) -> None:
    """Run a state machine; the seed that it was run with repeats what fails.

    :param machine: One of the two classes of ``tests/state_machine/machine/rules.py``.
    :param fixture: What :func:`machine` yields.
    :param examples: How many sequences of steps.
    :param seed_: The seed; the same sequences each time if it is left out.
    """
    profile = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=seed_ is None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink) if SHRINKS else (Phase.generate,),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )
    make: Any = lambda: machine(fixture)  # noqa: E731
    if seed_ is not None:
        make = seed(seed_)(make)
    run_state_machine_as_test(make, settings=profile)


# An exception between the making of the socket that is looked at and its `with`: Python closes it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("class_", [Sessions, SessionsThatBeginOnWrite])
def test_random_sequences_do_what_the_contract_says(
    machine: Fixture, class_: type[Sessions]
) -> None:
    run(class_, machine, seed_=None if SEED is None else int(SEED))
