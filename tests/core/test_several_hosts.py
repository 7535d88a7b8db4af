"""URLs with several hosts: libpq takes the first one that answers, and is as asked for."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import exc

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy
from tests.core.replicas.support import IN_RECOVERY
from tests.library import Author, fill
from tests.postgres import PostgresServer, ReplicaServer

FORMS = ["host=a:1&host=b:2", "host=a,b&port=1,2"]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def query(form: str, *addresses: tuple[str, int]) -> dict[str, str | tuple[str, ...]]:
    """Return hosts and ports as one of the forms has them."""
    if form == FORMS[0]:
        return {"host": tuple(f"{host}:{port}" for host, port in addresses)}
    hosts, ports = zip(*addresses, strict=True)
    return {"host": ",".join(hosts), "port": ",".join(map(str, ports))}


@pytest.fixture(params=FORMS)
def several(
    request: pytest.FixtureRequest,
    url: str,
    server: PostgresServer,
    replica: ReplicaServer,
    closed_port: int,
) -> sa.URL:
    """A URL with a server that is gone, a standby and the primary, in this order."""
    fill(url)
    replica.catch_up()
    addresses = [
        ("127.0.0.1", closed_port),
        (replica.host, replica.port),
        (server.host, server.port),
    ]
    given = sa.make_url(url)
    return sa.URL.create(
        given.drivername,
        username=given.username,
        password=given.password,
        database=given.database,
        query=query(request.param, *addresses),
    )


@pytest.mark.parametrize("target", ["read-write", "primary"])
def test_the_primary_is_found_behind_a_standby(several: sa.URL, target: str) -> None:
    engine = create_engine(several.update_query_dict({"target_session_attrs": target}))
    with OptInSession(engine) as session, session.begin():
        session.add(Author(name="Barbara"))
        assert session.scalar(IN_RECOVERY) is False
    engine.dispose()


def test_each_host_of_a_replica_is_a_replica(several: sa.URL, url: str) -> None:
    """A session keeps to one of them, so that it does not go back in time."""
    standbys = several.update_query_dict({"target_session_attrs": "standby"})
    engine = create_engine(url, replicas=[standbys])
    assert len(engine.replicas) == 3
    for _ in range(12):
        with OptInSession(engine) as session:
            been_to = {session.scalar(sa.text("SELECT 1")) and session.scalar(IN_RECOVERY)}
            assert been_to == {False}  # text() went to the primary
        with OptInSession(engine) as session:
            assert session.scalar(IN_RECOVERY)
    assert sorted(one.health.is_up for one in engine.replicas) == [False, False, True]
    engine.dispose()


def test_options_of_a_replica_are_those_of_each_of_its_hosts(several: sa.URL, url: str) -> None:
    engine = create_engine(url, replicas=[{"url": several, "pool_size": 2}])
    sizes = [one.pool.size() for one in engine.replicas]  # type: ignore[attr-defined]
    assert sizes == [2, 2, 2]
    assert len({one.url for one in engine.replicas}) == 3
    assert all(one.url.database == engine.url.database for one in engine.replicas)
    assert all(one.url.password == engine.url.password for one in engine.replicas)
    engine.dispose()


def test_flask_sqlalchemy_takes_several_hosts(several: sa.URL) -> None:
    app = Flask(__name__)
    primary = several.update_query_dict({"target_session_attrs": "read-write"})
    standbys = several.update_query_dict({"target_session_attrs": "standby"})
    app.config["SQLALCHEMY_DATABASE_URI"] = primary.render_as_string(hide_password=False)
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "replicas": standbys.render_as_string(hide_password=False)
    }
    db = SQLAlchemy(app)
    with app.app_context():
        assert db.session.scalar(IN_RECOVERY) is True
        with db.session.begin():
            assert db.session.scalar(IN_RECOVERY) is False
        engine = db.engine
        assert isinstance(engine, OptInEngine)
        assert len(engine.replicas) == 3
    engine.dispose()


class TestAWrongOne:
    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ("@/db?host=a:1,b:2", "a host with a port in a list"),
            ("@/db?host=a,b&port=1,2,3", "do not belong together"),
            ("@/db?host=a,b&port=1", "do not belong together"),
            ("@/db?host=a:1&host=b&port=3", "do not belong together"),
            ("@/db?host=a,b&port=x,y", "do not belong together"),
            ("@/db?host=a,b&host=c", "mixes two ways"),
            ("@/db?host=a, b", "a host with a space or an @ in it"),
            ("@/db?host=a,,b", "an empty host among several"),
            ("@/db?host=[::1]:1&host=b:2", "Write it without brackets"),
            ("@/db?host=[::1]:1&host=[::2]:2", "Write it without brackets"),
            ("@/db?host=a,b&target_session_attrs=rw", "that libpq does not know"),
            ("@a/db?target_session_attrs=master", "'standby', 'prefer-standby'"),
            ("@a:1,b:2/db", "a port that is no number"),
        ],
    )
    def test_a_wrong_host_is_refused_when_the_engine_is_made(
        self, driver: str, wrong: str, says: str
    ) -> None:
        for secret in ("", ":secret"):
            with pytest.raises(exc.ArgumentError) as raised:
                create_engine(f"postgresql+{driver}://user{secret}{wrong}")
            assert says in str(raised.value)
            assert "secret" not in str(raised.value)

    @pytest.mark.parametrize("target", ["read-write", "primary"])
    def test_a_replica_can_not_be_the_primary(self, driver: str, target: str) -> None:
        url = f"postgresql+{driver}://user@/db?host=a,b&target_session_attrs={target}"
        with pytest.raises(exc.ArgumentError, match="The URL of replica 1") as raised:
            create_engine(f"postgresql+{driver}://user@a/db", replicas=[url])
        assert "write target_session_attrs=standby" in str(raised.value)

    @pytest.mark.parametrize("separator", [" ", ",", ";"])
    @pytest.mark.parametrize(
        "first", ["h/db", "/db?host=a,b", "/db?host=a,b&port=1,2", "/db?target_session_attrs=any"]
    )
    def test_the_error_about_two_urls_in_one_item_shows_no_password(
        self, driver: str, separator: str, first: str
    ) -> None:
        both = f"postgresql+{driver}://u@{first}{separator}postgresql+{driver}://u:secret@h3/db"
        with pytest.raises(exc.ArgumentError, match="The URL has another URL in it") as raised:
            create_engine(both)
        assert "secret" not in str(raised.value)
        with pytest.raises(exc.ArgumentError, match="replica 1 has another URL in it") as raised:
            create_engine(f"postgresql+{driver}://u@h/db", replicas=[both])
        assert "secret" not in str(raised.value)

    @pytest.mark.parametrize("query", ["hostaddr=1.1.1.1,1.1.1.2", "host=a,b&hostaddr=1.1.1.1"])
    def test_a_url_of_replicas_has_no_hostaddr_for_several_hosts(
        self, driver: str, query: str
    ) -> None:
        url = f"postgresql+{driver}://u@h/db"
        with pytest.raises(exc.ArgumentError, match="hostaddr for several hosts"):
            create_engine(url, replicas=[f"postgresql+{driver}://u@/db?{query}"])

    @pytest.mark.parametrize("name", ["host", "port", "service", "target_session_attrs"])
    def test_replicas_do_not_inherit_where_to_connect_to(self, driver: str, name: str) -> None:
        url, arguments = f"postgresql+{driver}://u@h/db", {name: "1"}
        with pytest.raises(exc.ArgumentError, match=f"With '{name}' in connect_args"):
            create_engine(url, connect_args=arguments, replicas=[url])
        replica = {"url": url, "connect_args": {}}
        create_engine(url, connect_args=arguments, replicas=[replica]).dispose()

    def test_an_error_about_the_url_of_a_replica_says_of_which(self, driver: str) -> None:
        replicas = [f"postgresql+{driver}://u@a/db", f"postgresql+{driver}://u@/db?host=a:1,b:2"]
        with pytest.raises(exc.ArgumentError, match="The URL of replica 2 has a host with a port"):
            create_engine(f"postgresql+{driver}://user@a/db", replicas=replicas)
