"""Replicas of an application's binds: configuration, one session per application context."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy.record_queries import get_recorded_queries
from sqlalchemy import exc, func, select
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import OptInEngine
from fictive_sqlalchemy.ext.flask.builtins import SQLAlchemy
from tests.flask.conftest import MakeApp
from tests.postgres import PostgresServer, ReplicaServer

IN_RECOVERY = select(func.pg_is_in_recovery())


@pytest.fixture
def db() -> SQLAlchemy:
    return SQLAlchemy()


@pytest.fixture
def author(db: SQLAlchemy) -> Any:
    class Author(db.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    return Author


@pytest.fixture
def report(db: SQLAlchemy) -> Any:
    class Report(db.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "reports"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    return Report


@pytest.fixture
def app(
    db: SQLAlchemy,
    author: Any,
    report: Any,
    make_app: MakeApp,
    server: PostgresServer,
    replica: ReplicaServer,
    driver: str,
    database: str,
    other_database: str,
) -> Flask:
    app = make_app(
        db,
        server.url(driver, database),
        SQLALCHEMY_ENGINE_OPTIONS={"replicas": [replica.url(driver, database)], "pool_size": 2},
        SQLALCHEMY_BINDS={
            "reports": {
                "url": server.url(driver, other_database),
                "replicas": [replica.url(driver, other_database)],
            },
            "plain": server.url(driver, other_database),
        },
        SQLALCHEMY_RECORD_QUERIES=True,
    )
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add_all([author(name="Ada"), report(title="Of Ada")])
    replica.catch_up()
    return app


def places(db: SQLAlchemy) -> tuple[bool | None, bool | None]:
    """Tell for the default bind and for the other one whether reads go to the replica."""
    return tuple(
        db.session.scalar(IN_RECOVERY, bind_arguments={"bind": db.engines[key]})
        for key in (None, "reports")
    )  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


def test_each_bind_has_its_own_replicas(
    app: Flask, db: SQLAlchemy, author: Any, report: Any
) -> None:
    with app.app_context():
        assert places(db) == (True, True)
        assert author.query.one().name == "Ada"
        assert report.query.one().title == "Of Ada"
        plain = db.session.scalar(IN_RECOVERY, bind_arguments={"bind": db.engines["plain"]})
        assert plain is False
        assert isinstance(db.engine, OptInEngine)
        sizes = [engine.pool.size() for engine in db.engine.replicas]  # type: ignore[attr-defined]
        assert sizes == [2]


def test_an_application_context_reads_what_it_has_written_and_the_next_one_may_not(
    app: Flask, db: SQLAlchemy, author: Any, replica: ReplicaServer
) -> None:
    replica.pause_replay()

    @app.post("/<name>")
    def create(name: str) -> list[str]:
        with db.session.begin():
            db.session.add(author(name=name))
        assert places(db) == (False, True)  # the other bind is none of its business
        return [each.name for each in author.query.order_by("id")]

    @app.get("/")
    def index() -> list[str]:
        return [each.name for each in author.query.order_by("id")]

    @app.get("/fresh")
    def fresh() -> list[str]:
        db.session.read_from_primary()
        assert places(db) == (False, False)
        return [each.name for each in author.query.order_by("id")]

    client = app.test_client()
    assert client.post("/Bob").json == ["Ada", "Bob"]
    assert client.get("/").json == ["Ada"]
    assert client.get("/fresh").json == ["Ada", "Bob"]
    assert client.get("/").json == ["Ada"]
    replica.resume_replay()
    replica.catch_up()
    assert client.get("/").json == ["Ada", "Bob"]


def test_queries_to_replicas_are_recorded(app: Flask, author: Any) -> None:
    with app.app_context():
        author.query.all()
        assert [
            query.statement.split()[0] for query in get_recorded_queries() if query.statement
        ] == ["SELECT"]


def test_isolation_reads_from_the_primary(app: Flask, db: SQLAlchemy, author: Any) -> None:
    with app.app_context():
        with db.test_isolation(bind_keys=[None, "reports"]):
            assert places(db) == (False, False)
            db.session.add(author(name="Bob"))
            db.session.commit()
            db.session.remove()
            assert author.query.count() == 2
        assert places(db) == (True, True)
        assert author.query.count() == 1


def test_replicas_for_all_binds_at_once_are_refused(make_app: MakeApp) -> None:
    db = SQLAlchemy(engine_options={"replicas": ["postgresql://replica"]})
    with pytest.raises(exc.ArgumentError, match=r"'reports': \{'url': …, 'replicas'"):
        make_app(db, "postgresql://primary", SQLALCHEMY_BINDS={"reports": "postgresql://reports"})


def test_replicas_for_the_one_bind_may_be_options_of_the_extension(
    make_app: MakeApp, driver: str
) -> None:
    db = SQLAlchemy(engine_options={"replicas": [f"postgresql+{driver}://replica"]})
    app = make_app(db, f"postgresql+{driver}://primary")
    with app.app_context():
        assert isinstance(db.engine, OptInEngine)
        assert [engine.url.host for engine in db.engine.replicas] == ["replica"]


def test_an_engine_that_does_not_opt_in_takes_no_replicas(make_app: MakeApp) -> None:
    with pytest.raises(TypeError, match="replicas"):
        make_app(
            SQLAlchemy(), "sqlite://", SQLALCHEMY_ENGINE_OPTIONS={"replicas": ["sqlite:///replica"]}
        )
