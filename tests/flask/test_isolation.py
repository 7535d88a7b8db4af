"""``db.test_isolation()``: what an application does is undone, and it does not notice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import exc
from sqlalchemy.orm import Mapped, mapped_column, sessionmaker
from werkzeug.serving import make_server

import fictive_sqlalchemy.testing
from fictive_sqlalchemy import ActiveRecordMixin, OptInSession, unit_of_work
from fictive_sqlalchemy.ext.flask import flask_scoped_session
from fictive_sqlalchemy.testing import isolate
from tests.flask.conftest import MakeApp
from tests.flask.support import Database
from tests.library import Onlooker
from tests.postgres import PostgresServer


class House:
    """An application that stores names, in a table and in the table of another bind.

    :param make_app: Makes the application.
    :param url: The database of the table.
    :param other_url: That of the other bind.
    :param atomic: Whether a writing request is one transaction.
    """

    def __init__(self, make_app: MakeApp, url: str, other_url: str, atomic: bool = False) -> None:
        self.db = db = Database()

        class Tag(ActiveRecordMixin, db.Model):  # type: ignore[misc, name-defined]
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(unique=True)

        class Other(db.Model):  # type: ignore[misc, name-defined]
            __bind_key__ = "other"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        self.Tag: Any = Tag
        self.Other: Any = Other
        self.app = make_app(db, url, SQLALCHEMY_BINDS={"other": other_url})
        if atomic:
            db.atomic_requests(self.app)

        @self.app.post("/tags")
        def store() -> tuple[str, int]:
            tag = Tag(name=request.data.decode())
            db.session.add(tag)
            db.session.flush() if atomic else db.session.commit()
            return str(tag.id), int(request.args.get("status", 201))

        @self.app.get("/tags")
        def show() -> list[str]:
            return self.names()

        @self.app.get("/async")
        async def show_async() -> list[str]:
            db.session.add(Tag(name="async"))
            db.session.commit()
            await asyncio.sleep(0)
            return self.names()

        with self.app.app_context():
            db.create_all()
            db.session.add(Tag(name="first"))
            db.session.commit()

    def names(self) -> list[str]:
        return list(self.db.session.scalars(sa.select(self.Tag.name).order_by(self.Tag.id)))

    def seen(self) -> list[str]:
        with self.app.app_context():
            return self.names()


@pytest.fixture
def urls(server: PostgresServer, driver: str, url: str, other_database: str) -> tuple[str, str]:
    return url, server.url(driver, other_database)


@pytest.fixture
def house(make_app: MakeApp, urls: tuple[str, str]) -> House:
    return House(make_app, *urls)


@pytest.fixture
def onlookers(urls: tuple[str, str], house: House) -> Iterator[list[Onlooker]]:
    onlookers = [Onlooker(url) for url in urls]
    yield onlookers
    for onlooker in onlookers:
        onlooker.close()


def test_all_that_is_done_is_undone(house: House, onlookers: list[Onlooker]) -> None:
    db, Tag, Other = house.db, house.Tag, house.Other
    with db.test_isolation(house.app):
        with house.app.app_context():
            with db.session.begin():
                db.session.add_all([Tag(name="block"), Other(name="other")])
            Tag.filter_by_or_create(name="or create")
            Tag.create(name="active record")
            with unit_of_work(db.session.session_factory) as session:
                session.add(Tag(name="unit of work"))
            with db.engine.begin() as connection:
                connection.execute(sa.insert(Tag.__table__).values(name="engine"))
            with house.app.app_context():
                db.session.add(Tag(name="inner context"))
                db.session.commit()
            with pytest.raises(exc.IntegrityError), db.session.begin():
                db.session.add_all([Tag(name="lost"), Tag(name="first")])
            db.metadata.tables["tag"].create(db.engine, checkfirst=True)
        assert house.app.test_client().post("/tags", data="request").status_code == 201
        names = ["first", "block", "or create", "active record", "unit of work", "engine"]
        assert house.seen() == [*names, "inner context", "request"]
        assert onlookers[0].column("SELECT name FROM tag") == ["first"]
        assert onlookers[1].column("SELECT name FROM other") == []
        with house.app.app_context():
            assert db.session.scalars(sa.select(Other.name)).all() == ["other"]
    assert house.seen() == ["first"]
    with house.app.app_context():
        assert db.session.scalars(sa.select(Other.name)).all() == []
    assert onlookers[0].column("SELECT name FROM tag") == ["first"]


def test_the_session_of_an_application_context_goes_on_in_isolation(house: House) -> None:
    db, Tag = house.db, house.Tag
    with house.app.app_context():
        first = Tag.query.one()
        for _ in range(2):
            with db.test_isolation():
                first = db.session.merge(first)
                first.name = "changed"
                db.session.commit()
                assert house.names() == ["changed"]
                db.session.add(Tag(name="pending"))
                db.session.begin()
                assert house.names() == ["changed", "pending"]
            assert house.names() == ["first"]


def test_what_a_failing_test_has_done_is_undone(house: House) -> None:
    def fail() -> None:
        with house.db.test_isolation():
            house.db.session.add(house.Tag(name="new"))
            house.db.session.commit()
            raise AssertionError("the test's own")

    with house.app.app_context():
        with pytest.raises(AssertionError, match="the test's own"):
            fail()
        assert house.names() == ["first"]


def test_some_binds_may_be_isolated_alone(house: House, onlookers: list[Onlooker]) -> None:
    db = house.db
    with house.app.app_context():
        with db.test_isolation(bind_keys=["other"]):
            db.session.add_all([house.Tag(name="stored"), house.Other(name="undone")])
            db.session.commit()
        assert onlookers[0].column("SELECT name FROM tag") == ["first", "stored"]
        assert onlookers[1].column("SELECT name FROM other") == []


def test_a_bind_of_another_database_is_refused_unless_left_out(make_app: MakeApp, url: str) -> None:
    db = Database()
    app = make_app(db, url, SQLALCHEMY_BINDS={"lite": "sqlite://"})
    with app.app_context():
        with pytest.raises(exc.ArgumentError, match="used with pysqlite: leave this engine out"):
            db.test_isolation().__enter__()
        with db.test_isolation(bind_keys=[None]):
            db.session.execute(sa.text("CREATE TABLE one (id int)"))
        assert not sa.inspect(db.engine).has_table("one")


def test_wrong_uses_of_test_isolation_are_refused(house: House, url: str) -> None:
    db = house.db
    with pytest.raises(RuntimeError, match=r"pass it: db.test_isolation\(app\)"):
        db.test_isolation().__enter__()
    with pytest.raises(exc.ArgumentError, match="no bind 'no': its bind keys are 'other', None"):
        db.test_isolation(house.app, bind_keys=["no"]).__enter__()
    with pytest.raises(exc.ArgumentError, match="takes engines"):
        db.test_isolation(house.app, bind_keys=[]).__enter__()
    with house.app.app_context():
        db.session.begin()
        house.names()
        with pytest.raises(exc.InvalidRequestError, match="are in use"):
            db.test_isolation().__enter__()
        db.session.rollback()


@pytest.mark.parametrize("atomic", [False, True])
def test_requests_come_to_the_same_in_isolation(
    make_app: MakeApp, urls: tuple[str, str], atomic: bool
) -> None:
    house = House(make_app, *urls, atomic=atomic)
    client = house.app.test_client()

    def play() -> list[Any]:
        return [
            client.post("/tags", data="Eve").status_code,
            client.post("/tags", data="Eve").status_code,
            client.post("/tags?status=400", data="Fay").status_code,
            client.get("/tags").json,
            client.post("/tags?status=500", data="Gus").status_code,
            client.get("/tags").json,
        ]

    with house.db.test_isolation(house.app):
        isolated = play()
    assert house.seen() == ["first"]
    assert play() == isolated
    assert isolated[3] == (["first", "Eve"] if atomic else ["first", "Eve", "Fay"])


def test_what_an_async_view_has_done_is_undone(house: House) -> None:
    with house.db.test_isolation(house.app):
        assert house.app.test_client().get("/async").json == ["first", "async"]
    assert house.seen() == ["first"]


def test_a_live_server_in_another_thread_is_isolated(house: House) -> None:
    server = make_server("127.0.0.1", 0, house.app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with house.db.test_isolation(house.app), house.app.app_context():
            house.Tag.create(name="test")
            connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
            for number in range(3):
                connection.request("POST", "/tags", f"request {number}")
                assert connection.getresponse().read()
            connection.close()
            assert house.names() == ["first", "test", "request 0", "request 1", "request 2"]
            house.Tag.query.filter_by(name="request 1").delete()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert house.seen() == ["first"]


def test_another_context_in_a_transaction_with_changes_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fictive_sqlalchemy.testing, "PATIENCE", 0.2)
    refused = pytest.raises(exc.InvalidRequestError, match="commit that transaction")
    told = pytest.raises(exc.InvalidRequestError, match="Don't wait for another thread")
    with house.db.test_isolation(house.app), ThreadPoolExecutor(1) as threads:
        with house.app.app_context(), house.db.session.begin():
            house.db.session.add(house.Tag(name="not committed"))
            house.db.session.flush()
            with refused:
                house.seen()
            with told:
                threads.submit(house.seen).result()
        assert house.seen() == ["first", "not committed"]
    assert house.seen() == ["first"]


def test_stock_flask_sqlalchemy_can_be_isolated(make_app: MakeApp, url: str) -> None:
    db = SQLAlchemy()
    app = make_app(db, url)
    with app.app_context():
        db.session.execute(sa.text("CREATE TABLE tag (name text UNIQUE)"))
        db.session.commit()
        db.session.remove()
        with isolate(db.engine):
            db.session.execute(sa.text("INSERT INTO tag VALUES ('one')"))
            db.session.commit()
            assert db.session.execute(sa.text("SELECT name FROM tag")).scalar() == "one"
            with app.app_context():  # while the outer session is in its transaction
                with suppress(exc.IntegrityError):
                    db.session.execute(sa.text("INSERT INTO tag VALUES ('one')"))
                db.session.rollback()
                db.session.execute(sa.text("INSERT INTO tag VALUES ('two')"))
                db.session.commit()
            db.session.rollback()
            assert db.session.scalar(sa.text("SELECT count(*) FROM tag")) == 2
            db.session.remove()
        assert db.session.scalar(sa.text("SELECT count(*) FROM tag")) == 0
        db.session.remove()


def test_flask_scoped_session_can_be_isolated(house: House) -> None:
    app = Flask(__name__)
    with house.app.app_context():
        engine = house.db.engine
    sessions = flask_scoped_session(sessionmaker(engine, class_=OptInSession), app)
    with isolate(engine), app.app_context():
        sessions.add(house.Tag(name="new"))
        sessions.commit()
        with app.app_context():
            assert sessions.scalars(sa.select(house.Tag.name)).all() == ["first", "new"]
    assert house.seen() == ["first"]


def test_what_waits_for_the_commit_runs_at_the_commit_in_isolation(house: House) -> None:
    called: list[str] = []
    with house.db.test_isolation(house.app), house.app.app_context():
        with house.db.session.begin():
            house.db.session.add(house.Tag(name="new"))
            house.db.on_commit(lambda: called.append("committed"))
            assert called == []
        assert called == ["committed"]
        with suppress(KeyError), house.db.session.begin():
            house.db.on_commit(lambda: called.append("not"))
            raise KeyError
    assert called == ["committed"]
