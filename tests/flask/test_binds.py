"""SQLALCHEMY_BINDS: several databases in one session, opted in or not."""

# mypy: disable-error-code="name-defined,misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, InvalidRequestError, UnboundExecutionError
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInEngine
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.postgres import PostgresServer
from tests.wire import WireProxy

db: Any = Database()


class Order(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


class Invoice(db.Model):
    __bind_key__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


class Note(db.Model):
    """In a database whose backend is not opted in."""

    __bind_key__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


payment = db.Table("payment", sa.Column("id", sa.Integer, primary_key=True), bind_key="accounts")


@pytest.fixture
def app(
    make_app: MakeApp,
    server: PostgresServer,
    driver: str,
    url: str,
    wire_url: str,
    other_database: str,
    wire: WireProxy,
    tmp_path: Path,
) -> Iterator[Flask]:
    notes = f"sqlite:///{tmp_path / 'notes.db'}"
    accounts = server.url(driver, other_database)
    with make_app(db, url, SQLALCHEMY_BINDS={"accounts": accounts, "notes": notes}).app_context():
        db.create_all()
    binds = {"accounts": {"url": wire.url(accounts)}, "notes": notes}
    app = make_app(db, wire_url, SQLALCHEMY_BINDS=binds)
    with app.app_context():
        for model in (Order, Invoice, Note):
            db.session.scalars(sa.select(model)).all()
        db.session.remove()
        yield app
    assert not TRANSACTION_CONNECTIONS


def stored(app: Flask) -> tuple[list[str], list[str], list[str]]:
    """What is in each database, as somebody else sees it."""
    with app.app_context():
        orders, invoices, notes = (
            sorted(db.session.scalars(sa.select(model.text))) for model in (Order, Invoice, Note)
        )
        return orders, invoices, notes


def add_to_all(text: str) -> None:
    db.session.add_all([Order(text=text), Invoice(text=text), Note(text=text)])


# -- two that are opted in ------------------------------------------------------------------------


def test_each_bind_has_an_engine_of_its_own(app: Flask) -> None:
    assert isinstance(db.engines[None], OptInEngine)
    assert isinstance(db.engines["accounts"], OptInEngine)
    assert not isinstance(db.engines["notes"], OptInEngine)
    assert db.session.get_bind(Invoice) is db.engines["accounts"]
    assert db.session.get_bind(clause=payment) is db.engines["accounts"]


def test_reads_on_several_binds_are_the_statements_alone(app: Flask, wire: WireProxy) -> None:
    with wire.record() as recording:
        for _ in range(2):
            db.session.scalars(sa.select(Order)).all()
            db.session.scalars(sa.select(Invoice)).all()

    assert sent(recording) == ["SELECT order", "SELECT invoice"] * 2
    assert recording.round_trips == 4


def test_a_transaction_covers_every_bind_that_is_used_in_it(app: Flask, wire: WireProxy) -> None:
    with wire.record() as recording, db.session.begin() as transaction:
        db.session.add_all([Order(text="one"), Invoice(text="one")])
        assert not TRANSACTION_CONNECTIONS
        db.session.flush()
        assert len(TRANSACTION_CONNECTIONS[transaction]) == 2

    by_connection: dict[int, list[str]] = {}
    for message in recording.messages:
        if message.is_statement:
            by_connection.setdefault(message.connection, []).append(message.verb)
    assert list(by_connection.values()) == [["BEGIN", "INSERT", "COMMIT"]] * 2
    assert stored(app) == (["one"], ["one"], [])


def test_a_transaction_leaves_out_what_it_does_not_use(app: Flask, wire: WireProxy) -> None:
    db.session.scalars(sa.select(Order)).all()
    with wire.record() as recording, db.session.begin():
        db.session.execute(sa.insert(payment).values(id=1))

    assert sent(recording) == ["BEGIN", "INSERT payment", "COMMIT"]


@pytest.mark.parametrize("fails", ["in Python", "in the first database", "in the second database"])
def test_a_failure_undoes_all_binds(app: Flask, wire: WireProxy, fails: str) -> None:
    with db.session.begin():
        add_to_all("taken")

    def add() -> None:
        with db.session.begin():
            db.session.add_all([Order(text="one"), Invoice(text="one")])
            db.session.flush()
            if fails == "in Python":
                raise ValueError("undo")
            model = Order if fails == "in the first database" else Invoice
            db.session.add(model(text="taken"))

    with wire.record() as recording, pytest.raises((ValueError, IntegrityError)):
        add()
    assert recording.verbs.count("BEGIN") == recording.verbs.count("ROLLBACK") == 2
    assert "COMMIT" not in recording.verbs
    # At once, without a rollback():
    assert stored(app) == (["taken"], ["taken"], ["taken"])
    assert db.session.scalars(sa.select(Invoice.text)).all() == ["taken"]


@pytest.mark.parametrize("call", ["flush", "commit"])
def test_writing_outside_is_done_on_all_binds_or_none(
    app: Flask, wire: WireProxy, call: str
) -> None:
    db.session.add_all([Order(text="one"), Invoice(text="one")])
    with wire.record() as recording:
        getattr(db.session, call)()
    assert sorted(recording.verbs) == [
        "BEGIN", "BEGIN", "COMMIT", "COMMIT", "INSERT", "INSERT",
    ]  # fmt: skip
    assert not db.session().in_transaction()

    for pair in (
        [Order(text="one"), Invoice(text="two")],
        [Order(text="two"), Invoice(text="one")],
    ):
        db.session.add_all(pair)
        with wire.record() as recording, pytest.raises(IntegrityError):
            getattr(db.session, call)()
        assert "COMMIT" not in recording.verbs
        assert recording.verbs.count("BEGIN") == recording.verbs.count("ROLLBACK")
        assert stored(app) == (["one"], ["one"], [])


def test_options_of_begin_are_sent_to_each_bind(app: Flask, wire: WireProxy) -> None:
    with wire.record() as recording:
        with db.session.begin(isolation_level="SERIALIZABLE", read_only=True):
            db.session.scalars(sa.select(Order)).all()
            db.session.scalars(sa.select(Invoice)).all()
        with db.session.begin():
            db.session.scalars(sa.select(Order)).all()
            db.session.scalars(sa.select(Invoice)).all()

    begins = [text for text in recording.statements if text.startswith("BEGIN")]
    options = {"BEGIN", "ISOLATION", "LEVEL", "SERIALIZABLE", "READ", "ONLY"}
    assert [set(text.split()) for text in begins[:2]] == [options, options]
    assert begins[2:] == ["BEGIN", "BEGIN"]
    assert recording.round_trips == 12


def test_a_bind_may_have_options_of_its_own(
    make_app: MakeApp, wire_url: str, wire: WireProxy
) -> None:
    binds = {"accounts": {"url": wire_url, "isolation_level": "REPEATABLE READ", "pool_size": 2}}
    app = make_app(db, wire_url, SQLALCHEMY_BINDS={**binds, "notes": "sqlite://"})
    with app.app_context():
        db.create_all()
        with wire.record() as recording, db.session.begin():
            db.session.scalars(sa.select(Order)).all()
            db.session.scalars(sa.select(Invoice)).all()
        assert [text for text in recording.statements if text.startswith("BEGIN")] == [
            "BEGIN",
            "BEGIN ISOLATION LEVEL REPEATABLE READ",
        ]
        assert db.engines["accounts"].pool.size() == 2


def test_tables_are_created_in_each_bind(app: Flask) -> None:
    assert sa.inspect(db.engine).get_table_names() == ["order"]
    assert set(sa.inspect(db.engines["accounts"]).get_table_names()) == {"invoice", "payment"}
    db.drop_all("accounts")
    assert sa.inspect(db.engines["accounts"]).get_table_names() == []
    assert sa.inspect(db.engine).get_table_names() == ["order"]


def test_an_unknown_bind_is_still_refused(app: Flask) -> None:
    db: Any = Database()

    class Lost(db.Model):
        __bind_key__ = "nowhere"
        id: Mapped[int] = mapped_column(primary_key=True)

    app.extensions.pop("sqlalchemy")
    db.init_app(app)
    with app.app_context():
        for use in (lambda: db.session.get(Lost, 1), db.session.flush, db.create_all):
            db.session.add(Lost(id=2))
            with pytest.raises(UnboundExecutionError, match="'nowhere' is not in"):
                use()
        for engine in db.engines.values():
            engine.dispose()


# -- one that is not opted in: stock behaviour for what runs on it --------------------------------


def test_a_read_on_a_stock_bind_begins_and_reads_beside_it_do_not(
    app: Flask, wire: WireProxy
) -> None:
    db.session.scalars(sa.select(Note)).all()
    assert db.session().in_transaction()
    with wire.record() as recording:
        db.session.scalars(sa.select(Order)).all()
        db.session.scalars(sa.select(Note)).all()
        db.session.scalars(sa.select(Invoice)).all()
    assert sent(recording) == ["SELECT order", "SELECT invoice"]
    assert db.engines["notes"].pool.checkedout() == 1

    with wire.record() as recording:
        db.session.commit()
    assert recording.verbs == []
    assert not db.session().in_transaction()
    assert db.engines["notes"].pool.checkedout() == 0


def test_a_read_on_a_stock_bind_flushes_what_waits_for_it(app: Flask, wire: WireProxy) -> None:
    db.session.add(Note(text="flushed"))
    assert db.session.scalars(sa.select(Note.text)).all() == ["flushed"]
    assert stored(app) == ([], [], [])  # in its transaction
    db.session.commit()
    assert stored(app) == ([], [], ["flushed"])


def test_an_explicit_flush_on_a_stock_bind_keeps_its_transaction(app: Flask) -> None:
    db.session.add(Note(text="flushed"))
    db.session.flush()
    assert db.session().in_transaction()
    db.session.rollback()
    assert stored(app) == ([], [], [])


def test_a_stock_bind_is_committed_and_rolled_back_with_the_others(
    app: Flask, wire: WireProxy
) -> None:
    with db.session.begin():
        add_to_all("one")
    assert stored(app) == (["one"], ["one"], ["one"])

    def add() -> None:
        with db.session.begin():
            add_to_all("two")
            db.session.flush()
            raise ValueError("undo")

    with pytest.raises(ValueError, match="undo"):
        add()
    assert stored(app) == (["one"], ["one"], ["one"])
    assert not db.session().in_transaction()

    add_to_all("three")
    with wire.record() as recording:
        db.session.commit()
    assert sorted(recording.verbs) == sorted(["BEGIN", "INSERT", "COMMIT"] * 2)
    assert stored(app) == (["one", "three"],) * 3


def test_a_commit_after_a_read_on_a_stock_bind_writes_what_waits_for_the_others(
    app: Flask, wire: WireProxy
) -> None:
    db.session.scalars(sa.select(Note)).all()
    db.session.add(Order(text="one"))
    with wire.record() as recording:
        assert db.session.scalars(sa.select(Order)).all() == []  # reads never write
        db.session.commit()
    assert sent(recording) == ["SELECT order", "BEGIN", "INSERT order", "COMMIT"]

    db.session.scalars(sa.select(Note)).all()
    db.session.add(Order(text="one"))
    with wire.record() as recording, pytest.raises(IntegrityError):
        db.session.commit()
    assert sent(recording) == ["BEGIN", "INSERT order", "ROLLBACK"]


def test_begin_after_a_read_on_a_stock_bind_says_what_to_do(app: Flask, wire: WireProxy) -> None:
    db.session.scalars(sa.select(Note)).all()
    with (
        wire.record() as recording,
        pytest.raises(InvalidRequestError, match=r"commit\(\).*rollback\(\)"),
    ):
        db.session.begin()
    assert recording.messages == []

    db.session.commit()
    with db.session.begin():
        add_to_all("one")
    assert stored(app) == (["one"],) * 3


def test_a_savepoint_after_a_read_on_a_stock_bind_is_set_in_all(
    app: Flask, wire: WireProxy
) -> None:
    def add() -> None:
        with db.session.begin_nested():
            add_to_all("undone")
            db.session.flush()
            raise ValueError("undo")

    db.session.scalars(sa.select(Note)).all()
    with wire.record() as recording, pytest.raises(ValueError, match="undo"):
        add()
    assert sorted(recording.verbs) == sorted(["BEGIN", "SAVEPOINT", "INSERT", "ROLLBACK TO"] * 2)
    add_to_all("kept")
    db.session.commit()
    assert stored(app) == (["kept"],) * 3


@pytest.mark.parametrize("read_first", [False, True])
def test_a_flush_to_all_binds_ends_with_commit_or_rollback(app: Flask, read_first: bool) -> None:
    if read_first:
        db.session.scalars(sa.select(Note)).all()
    add_to_all("one")
    db.session.flush()
    db.session.rollback()
    assert stored(app)[2] == []
    assert not db.session().in_transaction()
    add_to_all("two")
    db.session.flush()
    db.session.commit()
    assert "two" in stored(app)[0]
    assert stored(app)[1:] == (stored(app)[0], ["two"])


def test_a_flush_that_has_nothing_to_write_opens_no_transaction(
    app: Flask, wire: WireProxy
) -> None:
    with db.session.begin():
        add_to_all("one")
    found = [db.session.scalars(sa.select(model)).one() for model in (Order, Note)]
    db.session.commit()
    for instance in found:
        instance.text = instance.text  # SQLAlchemy calls it dirty, and finds nothing to write
    db.session.commit()
    for instance in found:
        instance.text = "one"
    db.session.rollback()
    order, _ = found
    db.session.expunge(found[1])
    order.text = "two"
    order.text = "one"
    db.session.add(Note(id=9, text="gone again"))
    db.session.expunge(next(iter(db.session.new)))
    db.session.flush()
    with wire.record() as recording:
        db.session.scalars(sa.select(Invoice)).all()
        with db.session.begin():
            db.session.add(Order(text="three"))
    assert sent(recording) == ["SELECT invoice", "INSERT order"]


def test_dirty_objects_of_both_kinds_without_a_change_send_nothing(
    app: Flask, wire: WireProxy
) -> None:
    with db.session.begin():
        add_to_all("one")
        db.session.flush()
        found: list[Any] = [db.session.scalars(sa.select(model)).one() for model in (Order, Note)]
        db.session.expunge_all()
    for instance in found:
        db.session.add(instance)
        instance.text = instance.text
    assert len(db.session.dirty) == 2
    with wire.record() as recording:
        db.session.flush()
        db.session.commit()
    assert recording.messages == []
    assert not db.session().in_transaction()
    with wire.record() as recording:
        db.session.scalars(sa.select(Invoice)).all()
        with db.session.begin():
            db.session.add(Order(text="three"))
    assert sent(recording) == ["SELECT invoice", "INSERT order"]


@pytest.mark.parametrize(
    "write",
    [
        lambda session: session.bulk_save_objects([Note(text="one")]),
        lambda session: session.bulk_insert_mappings(Note, [{"text": "one"}, {"text": "two"}]),
        lambda session: session.execute(sa.insert(Note), [{"text": "one"}, {"text": "two"}]),
        lambda session: session.execute(sa.insert(Note).values(text="one")),
    ],
    ids=["bulk_save_objects", "bulk_insert_mappings", "bulk insert", "insert"],
)
def test_writing_calls_on_a_stock_bind_wait_for_a_commit(
    app: Flask, write: Callable[[Any], object]
) -> None:
    write(db.session)
    assert stored(app)[2] == []
    db.session.rollback()
    assert stored(app)[2] == []
    write(db.session)
    db.session.commit()
    assert stored(app)[2] in (["one"], ["one", "two"])


@pytest.mark.parametrize("read_first", [False, True])
def test_a_bulk_call_over_all_binds_stores_all_or_nothing(app: Flask, read_first: bool) -> None:
    if read_first:
        db.session.scalars(sa.select(Note)).all()
    db.session.bulk_save_objects([Order(text="one"), Note(text="one")])
    db.session.commit()
    assert stored(app) == (["one"], [], ["one"])

    for objects in (
        [Order(text="two"), Note(text="one")],
        [Note(text="two"), Order(text="one")],
    ):
        with pytest.raises(IntegrityError):
            db.session.bulk_save_objects(objects)
        db.session.rollback()
        assert stored(app) == (["one"], [], ["one"])


def test_a_stock_bind_is_locked_as_ever_while_the_others_are_read(app: Flask) -> None:
    # with_for_update is refused outside on our binds alone.
    assert db.session.scalars(sa.select(Note).with_for_update()).all() == []
    with pytest.raises(InvalidRequestError, match="with_for_update"):
        db.session.scalars(sa.select(Order).with_for_update()).all()
    db.session.commit()


def test_a_stock_bind_is_sent_what_the_stock_extension_sends(
    make_app: MakeApp, tmp_path: Path
) -> None:
    """The same work on a sqlite database, statement by statement, commits and rollbacks too."""

    def work(extension: Any) -> list[str]:
        class Item(extension.Model):
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str] = mapped_column(unique=True)

        url = f"sqlite:///{tmp_path / type(extension).__name__}.db"
        heard: list[str] = []
        with make_app(extension, url).app_context():
            extension.create_all()
            engine, session = extension.engine, extension.session
            for name in ("begin", "commit", "rollback"):
                event.listen(engine, name, lambda _, name=name: heard.append(name))
            event.listen(
                engine, "before_cursor_execute", lambda *args: heard.append(args[2].split()[0])
            )
            session.scalars(sa.select(Item)).all()
            session.add(Item(text="one"))
            session.scalars(sa.select(Item)).all()
            session.flush()
            session.execute(sa.insert(Item), [{"text": "two"}, {"text": "three"}])
            session.commit()
            session.add(Item(text="one"))
            with pytest.raises(IntegrityError):
                session.flush()
            session.rollback()
            with session.begin():
                session.scalars(sa.select(Item)).first().text = "four"
                with session.begin_nested():
                    session.add(Item(text="five"))
            session.execute(sa.update(Item).values(text=Item.text + "!"))
            session.rollback()
            heard += sorted(session.scalars(sa.select(Item.text)))
            session.remove()
        return heard

    ours, stock = work(Database()), work(SQLAlchemy())
    assert ours == stock
    assert "begin" in ours
    assert "four" in ours
