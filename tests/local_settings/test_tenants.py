"""No row of another tenant is ever read or written: see :mod:`tests.soak.tenants`."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fictive_sqlalchemy import OptInEngine
from fictive_sqlalchemy._core.carrying import Carried
from tests.postgres import PostgresServer
from tests.soak.tenants import STEPS, TENANTS, Visit, programs, run, tenants

# psycopg warns of each stream that is abandoned, and so closed by the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Engines = tuple[OptInEngine, sa.Engine]

visits = st.builds(
    Visit,
    tenant=st.one_of(st.sampled_from(TENANTS), st.none()),
    begin_on_write=st.booleans(),
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
)


@pytest.fixture(scope="module")
def engines(server: PostgresServer, driver: str) -> Iterator[Engines]:
    with tenants(server, driver) as engines:
        yield engines


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(all_programs=st.lists(st.lists(visits, min_size=1, max_size=5), min_size=1, max_size=5))
def test_no_program_sees_another_tenant(engines: Engines, all_programs: list[list[Visit]]) -> None:
    assert run(*engines, all_programs).violations == []


def test_many_random_steps_see_no_other_tenant(engines: Engines) -> None:
    seen = run(*engines, programs(Random(7), threads=5, visits=40))
    assert seen.violations == []
    assert set(seen.steps) == set(STEPS)
    assert seen.steps.total() > 500
    assert seen.lost > 0


def test_the_harness_finds_the_settings_of_somebody_else(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"app.tenant_id": "1"}
    monkeypatch.setattr(Carried, "take", lambda self, connection, sql: others)
    seen = run(*engines, [[Visit(2, False, ["read"])]])
    assert any("saw rows of" in said for said in seen.violations)
