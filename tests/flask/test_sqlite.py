"""sqlite opted in by a subclass: files and memory, with real transactions."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import ArgumentError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine
from tests.flask.conftest import MakeApp
from tests.flask.support import Database


class EverywhereDatabase(Database):
    AUTOCOMMIT_DRIVERS = ["postgresql", "sqlite"]  # noqa: RUF012


db: Any = EverywhereDatabase()


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


@pytest.fixture(params=["file", "memory"])
def app(request: pytest.FixtureRequest, make_app: MakeApp, tmp_path: Path) -> Iterator[Flask]:
    url = f"sqlite:///{tmp_path / 'items.db'}" if request.param == "file" else "sqlite://"
    app = make_app(db, url)
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add_all([Item(id=1, text="one"), Item(id=2, text="two")])
        yield app
    assert not TRANSACTION_CONNECTIONS


def texts() -> list[str]:
    with db.engine.connect() as connection:
        return sorted(connection.scalars(sa.select(Item.text)))


def driver_connection() -> Any:
    return db.session.connection().connection.driver_connection


def rests() -> bool:
    """Whether the session's connection is in autocommit, and in no transaction."""
    connection = driver_connection()
    return connection.isolation_level is None and not connection.in_transaction


def test_reads_outside_open_no_transaction(app: Flask) -> None:
    assert isinstance(db.engine, OptInEngine)
    assert db.session.get(Item, 1).text == "one"
    assert rests()
    assert not db.session().in_transaction()


def test_reads_outside_never_write(app: Flask) -> None:
    db.session.add(Item(id=3, text="three"))
    assert len(db.session.scalars(sa.select(Item)).all()) == 2
    assert rests()
    db.session.commit()
    assert texts() == ["one", "three", "two"]
    assert rests()


def test_a_transaction_is_stored_at_its_end(app: Flask) -> None:
    item: Any = db.session.get(Item, 1)
    with db.session.begin():
        item.text = "changed"
        db.session.add(Item(id=3, text="three"))
        db.session.flush()
        assert driver_connection().in_transaction
        assert len(TRANSACTION_CONNECTIONS) == 1
    assert rests()
    assert texts() == ["changed", "three", "two"]


def test_a_transaction_that_fails_is_undone(app: Flask) -> None:
    item: Any = db.session.get(Item, 1)

    def fail() -> None:
        with db.session.begin():
            item.text = "changed"
            db.session.flush()
            db.session.add(Item(id=3, text="two"))

    with pytest.raises(IntegrityError):
        fail()
    assert rests()
    assert item.text == "one"
    assert texts() == ["one", "two"]


def test_nobody_else_sees_an_open_transaction(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(db, f"sqlite:///{tmp_path / 'items.db'}")
    with app.app_context():
        db.create_all()
        with db.session.begin():
            db.session.add(Item(id=1, text="one"))
            db.session.flush()
            assert texts() == []
            with app.app_context():  # a second writer has to wait, and is told so
                db.session.execute(sa.text("PRAGMA busy_timeout = 0"))
                with pytest.raises(OperationalError, match="locked"):
                    db.session.execute(sa.insert(Item).values(id=2, text="two"))
        assert texts() == ["one"]


def test_a_transaction_reads_one_snapshot(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(db, f"sqlite:///{tmp_path / 'items.db'}")
    with app.app_context():
        db.create_all()
        db.session.execute(sa.text("PRAGMA journal_mode = WAL")).all()
        with db.session.begin():
            assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 0
            with app.app_context():
                db.session.execute(sa.insert(Item).values(id=1, text="one"))
            assert texts() == ["one"]
            assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 0
        assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 1


def test_a_savepoint_is_undone_alone(app: Flask) -> None:
    def fail() -> None:
        with db.session.begin_nested():
            db.session.add(Item(id=4, text="undone"))
            db.session.flush()
            raise ValueError("undo")

    with db.session.begin():
        db.session.add(Item(id=3, text="three"))
        with pytest.raises(ValueError, match="undo"):
            fail()
        with db.session.begin_nested():
            db.session.add(Item(id=5, text="five"))
    assert texts() == ["five", "one", "three", "two"]


def test_a_savepoint_that_comes_first_is_undone_with_its_transaction(app: Flask) -> None:
    def fail() -> None:
        with db.session.begin():
            with db.session.begin_nested():
                db.session.add(Item(id=3, text="three"))
            raise ValueError("undo")

    with pytest.raises(ValueError, match="undo"):
        fail()
    assert texts() == ["one", "two"]
    assert rests()


def test_tables_that_cannot_all_be_created_are_none(make_app: MakeApp, tmp_path: Path) -> None:
    db: Any = EverywhereDatabase()
    db.Table("first", sa.Column("id", sa.Integer, primary_key=True))
    db.Table("second", sa.Column("id", sa.Integer, sa.CheckConstraint("no_such_function(")))
    with make_app(db, f"sqlite:///{tmp_path / 'tables.db'}").app_context():
        with pytest.raises(OperationalError):
            db.create_all()
        assert sa.inspect(db.engine).get_table_names() == []


@pytest.mark.parametrize("call", ["flush", "commit"])
def test_writing_outside_is_all_or_nothing(app: Flask, call: str) -> None:
    db.session.add_all([Item(id=3, text="three"), Item(id=4, text="one")])
    with pytest.raises(IntegrityError):
        getattr(db.session, call)()
    assert rests()
    assert texts() == ["one", "two"]
    rows = [{"id": 5, "text": "five"}, {"id": 6, "text": "one"}]
    with pytest.raises(IntegrityError):
        db.session.execute(sa.insert(Item), rows)
    with pytest.raises(IntegrityError):
        db.session.execute(sa.insert(Item.__table__), rows)
    assert rests()
    assert texts() == ["one", "two"]


def test_one_statement_outside_is_durable(app: Flask) -> None:
    db.session.execute(sa.update(Item).where(Item.id == 1).values(text="changed"))
    db.session.rollback()
    assert texts() == ["changed", "two"]
    with db.engine.connect() as connection:
        connection.execute(sa.delete(Item).where(Item.id == 2))
    assert texts() == ["changed"]


def test_an_engine_begins_a_real_transaction(app: Flask) -> None:
    def fail() -> None:
        with db.engine.begin() as connection:
            connection.execute(sa.delete(Item))
            raise ValueError("undo")

    with pytest.raises(ValueError, match="undo"):
        fail()
    assert texts() == ["one", "two"]


def test_the_end_of_an_inner_context_leaves_the_outer_transaction_alone(app: Flask) -> None:
    def fail() -> None:
        with db.session.begin():
            db.session.add(Item(id=3, text="three"))
            db.session.flush()
            with app.app_context():
                db.session.scalars(sa.select(Item)).all()
            assert db.session.scalar(sa.select(sa.func.count(Item.id))) == 3
            raise ValueError("undo")

    with pytest.raises(ValueError, match="undo"):
        fail()
    assert texts() == ["one", "two"]
    assert rests()


def test_what_sqlite_does_not_have_is_refused(app: Flask) -> None:
    for options in ({"read_only": True}, {"deferrable": True}, {"isolation_level": "SNAPSHOT"}):
        with pytest.raises(ArgumentError, match="sqlite"):
            db.session.begin(**options)
    with db.session.begin(isolation_level="READ UNCOMMITTED"):
        assert db.session.scalar(sa.text("PRAGMA read_uncommitted")) == 1
    with db.session.begin():
        assert db.session.scalar(sa.text("PRAGMA read_uncommitted")) == 0
    with pytest.raises(InvalidRequestError, match="with_for_update"):
        db.session.scalars(sa.select(Item).with_for_update())


def test_rows_are_found_or_created(app: Flask) -> None:
    assert Item.filter_by_or_create(text="one").id == 1
    db.session.add(Item(id=7, text="pending"))
    assert Item.filter_by_or_create(text="three", defaults={"id": 3}).id == 3
    assert texts() == ["one", "three", "two"]
    assert [item.text for item in db.session.new] == ["pending"]


def test_the_connection_rests_after_every_request(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(db, f"sqlite:///{tmp_path / 'items.db'}")

    @app.get("/<word>")
    def view(word: str) -> str:
        db.session().begin()  # and never ended
        db.session.add(Item(id=3, text=word))
        db.session.flush()
        if word == "fail":
            raise ValueError(word)
        return word

    with app.app_context():
        db.create_all()
    client = app.test_client()
    assert client.get("/three").status_code == 200
    assert client.get("/fail").status_code == 500
    with app.app_context():
        assert texts() == []
        assert rests()
