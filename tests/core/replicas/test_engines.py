"""An engine gives its options to its replicas, and refuses what can not be a replica."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, select, text

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine, engine_from_config
from fictive_sqlalchemy.testing import isolate
from tests.core.replicas.support import (
    IN_RECOVERY,
    is_on_replica,
    opened_with,
    recorded,
    wait_until,
)
from tests.library import Author, fill
from tests.postgres import ReplicaServer
from tests.wire import WireProxy


def test_replicas_have_the_options_and_the_execution_options_of_the_primary(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer
) -> None:
    own = {"url": replica_urls[1], "pool_size": 1, "connect_args": {"application_name": "own"}}
    with opened_with(
        wire_url,
        [replica_urls[0], own],
        replica,
        pool_size=3,
        connect_args={"application_name": "shop"},
        execution_options={"schema_translate_map": {"shop": "public"}},
    ) as engine:
        assert [one.pool.size() for one in engine.replicas] == [3, 1]  # type: ignore[attr-defined]
        named = select(func.current_setting("application_name"))
        for one, name in zip(engine.replicas, ["shop", "own"], strict=True):
            with one.connect() as connection:
                assert connection.scalar(named) == name
        table = sa.Table("author", sa.MetaData(schema="shop"), sa.Column("name", sa.Text))
        with OptInSession(engine) as session:
            assert len(session.scalars(select(table.c.name)).all()) == 3
            assert is_on_replica(session)


def test_a_session_keeps_to_one_replica_through_copies_of_the_engine(
    two: OptInEngine, replica_wires: list[WireProxy]
) -> None:
    copy = two.execution_options(schema_translate_map={"shop": "public"})
    for _ in range(8):
        with recorded(*replica_wires) as recordings, OptInSession(two) as session:
            assert is_on_replica(session)
            assert session.scalar(IN_RECOVERY, bind_arguments={"bind": copy})
            assert is_on_replica(session)
        assert sorted(len(recording.statements) for recording in recordings) == [0, 3]


def test_copies_of_an_engine_have_copies_of_its_replicas(engine: OptInEngine) -> None:
    table = sa.Table("author", sa.MetaData(schema="shop"), sa.Column("name", sa.Text))
    copy = engine.execution_options(schema_translate_map={"shop": "public"})
    with OptInSession(copy) as session:
        assert len(session.scalars(select(table.c.name)).all()) == 3
        assert is_on_replica(session)
        session.scalar(text("SELECT 1"), bind_arguments={"bind": engine})
        assert not is_on_replica(session)
    engine.replicas[0].health.note(up=False)
    assert not copy.replicas[0].health.is_up
    engine.replicas[0].health.note(up=True)
    with OptInSession(engine) as session, pytest.raises(exc.ProgrammingError):
        session.scalars(select(table.c.name)).all()
    engine.update_execution_options(schema_translate_map={"shop": "public"})
    with OptInSession(engine) as session:
        assert len(session.scalars(select(table.c.name)).all()) == 3
        assert is_on_replica(session)


def test_dispose_takes_the_replicas_along(
    engine: OptInEngine, replica_wires: list[WireProxy]
) -> None:
    with OptInSession(engine) as session:
        is_on_replica(session)
    assert replica_wires[0].connections == 1
    engine.dispose()
    wait_until(lambda: replica_wires[0].connections == 0)


def test_isolation_sets_replicas_aside(engine: OptInEngine) -> None:
    with OptInSession(engine) as outer:
        assert is_on_replica(outer)
        with isolate(engine):
            assert not is_on_replica(outer)
            outer.close()
            with OptInSession(engine) as session, session.begin():
                session.add(Author(name="Dan"))
            with OptInSession(engine) as session:
                assert len(session.scalars(select(Author)).all()) == 4
        assert is_on_replica(outer)
        assert len(outer.scalars(select(Author)).all()) == 3


def test_configuration_may_be_strings(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer
) -> None:
    fill(wire_url)
    replica.catch_up()
    engine = engine_from_config(
        {
            "sqlalchemy.url": wire_url,
            "sqlalchemy.pool_size": "2",
            "sqlalchemy.replicas": "\n".join(replica_urls),
        }
    )
    with OptInSession(engine) as session:
        assert is_on_replica(session)
    assert [one.url.render_as_string(False) for one in engine.replicas] == replica_urls
    assert [one.pool.size() for one in engine.replicas] == [2, 2]  # type: ignore[attr-defined]
    engine.dispose()


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ([{"pool_size": 3}], {}, "needs a URL"),
        (["sqlite://"], {}, "another database system"),
        (["nonsense"], {}, "Could not parse the URL of replica 1"),
        (["postgresql://one", {}], {}, "replica 2 is empty"),
        (["postgresql://replica"], {"creator": print}, "give each replica its own creator"),
    ],
)
def test_what_can_not_be_a_replica_is_refused(
    url: str, given: list[Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(exc.ArgumentError, match=says):
        create_engine(url, replicas=given, **options)


SECRET = "postgresql://alice:secret@replica:5432/app"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"uri": SECRET}], "replica 1 has 'uri'"),
        ([{"ulr": SECRET, "connect_args": {"password": "secret"}}], "has 'ulr', 'connect_args'"),
        ([(SECRET, {"pool_size": 3})], "the type tuple"),
        ([[SECRET]], "the type list"),
        ([SECRET.encode()], "the type bytes"),
        ([{"url": {"url": SECRET}}], "the type dict"),
        (SECRET.replace("secret", "my secret"), "split at spaces"),
        ([SECRET.replace("://", ":/")], "Could not parse"),
        ([SECRET.replace("5432", "secret")], "Could not parse"),
        (["sqlite://"], "of sqlite can't be a replica of one of postgresql"),
    ],
    ids=str,
)
def test_no_error_about_a_replica_shows_a_password(url: str, given: Any, says: str) -> None:
    with pytest.raises(exc.ArgumentError, match=says) as raised:
        create_engine(url, replicas=given)
    assert "secret" not in "".join(traceback.format_exception_only(raised.value))
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


def test_an_engine_without_replicas_has_none(url: str) -> None:
    engine = create_engine(url, replicas=[])
    assert engine.replicas == ()
    assert engine.primary is None
    with OptInSession(engine) as session:
        assert not is_on_replica(session)
    engine.dispose()


def test_a_replica_of_an_engine_that_is_read_only_outside_has_transactions(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer, replica_wires: list[WireProxy]
) -> None:
    with opened_with(wire_url, replica_urls[:1], replica, read_only_outside=True) as engine:
        (report,) = engine.replicas
        with recorded(replica_wires[0]) as (recording,), report.begin() as connection:
            assert connection.scalar(IN_RECOVERY)
        assert recording.statements[-3] == "BEGIN"
        with OptInSession(engine) as session:
            assert is_on_replica(session)
            with session.begin():
                session.add(Author(name="one"))
            with pytest.raises(exc.InternalError, match="put the statement into"):
                session.execute(text("DELETE FROM document"))
