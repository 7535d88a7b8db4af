"""``session_options={"begin_on_write": True}``: an application that exists, unchanged.

Each test of :class:`TestAnApplication` runs with the extension and with a scoped session over
plain SQLAlchemy.
"""

# mypy: disable-error-code="name-defined,misc,untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from flask import Flask, abort
from sqlalchemy import exc, func, insert, select, update
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy import ActiveRecordMixin, unit_of_work
from fictive_sqlalchemy.ext.celery import DatabaseTask
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.flask.conftest import MakeApp
from tests.flask.support import Database, WritingApp
from tests.library import Author, Document, Onlooker, assert_at_rest, fill, sent
from tests.postgres import PostgresServer
from tests.wire import WireProxy

OPTIONS = {"begin_on_write": True}
View = Callable[[], Any]


def do_nothing() -> None:
    pass


class House(WritingApp):
    """An application whose engine is disposed of at the end."""

    def __init__(self, kind: str, url: str) -> None:
        super().__init__(kind, url)
        self.engine.connect().close()  # SQLAlchemy asks the server for its version, and the like

    def post(self, view: View) -> int:
        self.web.post("/")(view)
        return self.web.test_client().post("/").status_code


@pytest.fixture
def filled(url: str) -> str:
    fill(url)
    return url


@pytest.fixture
def onlooker(filled: str) -> Iterator[Onlooker]:
    onlooker = Onlooker(filled)
    yield onlooker
    onlooker.close()


@pytest.fixture(params=["db", "scoped"])
def house(request: pytest.FixtureRequest, filled: str, wire_url: str) -> Iterator[House]:
    house = House(request.param, wire_url)
    yield house
    assert_at_rest(house.engine)
    house.engine.dispose()


class TestAnApplication:
    def test_a_request_that_only_reads_has_no_transaction(
        self, house: House, wire: WireProxy
    ) -> None:
        def view() -> str:
            author = house.session.get(Author, 1)
            return f"{author.name} {len(author.documents)}"

        with wire.record() as recording:
            assert house.post(view) == 200
        assert sent(recording) == ["SELECT", "SELECT"]

    def test_a_flush_for_an_id_is_undone_with_what_fails_later(
        self, house: House, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        def view() -> str:
            author = Author(name="new")
            house.session.add(author)
            house.session.flush()  # for the id
            house.session.add(Document(title="one", author_id=author.id))
            house.session.add(Author(name="Ada"))
            house.session.commit()
            return "stored"

        with wire.record() as recording:
            assert house.post(view) == 500
        assert sent(recording)[:2] == ["BEGIN", "INSERT"]
        assert sent(recording)[-1] == "ROLLBACK"
        assert onlooker.names() == []

    def test_a_query_finds_what_was_only_added(
        self, house: House, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        def view() -> str:
            house.session.add(Author(name="new"))
            found = house.session.query(Author).filter_by(name="new").count()
            house.session.commit()
            return str(found)

        with wire.record() as recording:
            assert house.post(view) == 200
        assert sent(recording) == ["BEGIN", "INSERT", "SELECT", "COMMIT"]
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("how", ["returns", "raises", "aborts"])
    def test_the_end_of_the_request_rolls_back_what_was_not_committed(
        self, house: House, wire: WireProxy, onlooker: Onlooker, how: str
    ) -> None:
        def view() -> str:
            house.session.execute(insert(Author).values(name="new"))
            if how == "raises":
                raise RuntimeError
            if how == "aborts":
                abort(409)
            return "not stored"

        with wire.record() as recording:
            house.post(view)
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert onlooker.names() == []

    def test_an_error_handler_that_rolls_back_goes_on(
        self, house: House, onlooker: Onlooker
    ) -> None:
        def view() -> str:
            house.session.add(Author(name="Ada"))
            try:
                house.session.commit()
            except exc.IntegrityError:
                house.session.rollback()
            house.session.add(Author(name="new"))
            house.session.commit()
            return "stored"

        assert house.post(view) == 200
        assert onlooker.names() == ["new"]

    def test_one_session_may_be_strict(self, house: House, wire: WireProxy) -> None:
        def view() -> str:
            session = house.session(begin_on_write=False)
            session.execute(update(Author).values(age=9))
            assert not session.in_transaction()
            return "stored"

        with wire.record() as recording:
            assert house.post(view) == 200
        assert sent(recording) == ["UPDATE"]

    def test_the_error_of_begin_names_the_view(self, house: House, onlooker: Onlooker) -> None:
        said: list[str] = []

        def view() -> str:
            house.session.execute(update(Author).values(age=9))
            retry: Any = retry_transaction(house.session)
            beginnings: list[View] = [
                lambda: house.session.begin(),
                lambda: house.session.atomic().__enter__(),
                lambda: unit_of_work(house.session).__enter__(),
                retry(do_nothing),
            ]
            for begin in beginnings:
                with pytest.raises(exc.InvalidRequestError) as caught:
                    begin()
                said.append(str(caught.value))
            return "not stored"

        assert house.post(view) == 200
        line = view.__code__.co_firstlineno + 1
        assert len(said) == 4
        for message in said:
            assert f"begun by execute() in {__file__}, line {line}, in view" in message
            assert "Call commit()" in message

    def test_an_atomic_request_is_one_transaction(
        self, house: House, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        house.owner.atomic_requests(house.web)

        def view() -> str:
            house.session.add(Author(name="new"))
            house.session.flush()
            house.session.execute(update(Author).values(age=9))
            return "stored"

        with wire.record() as recording:
            assert house.post(view) == 200
        assert sent(recording) == ["BEGIN", "INSERT", "UPDATE", "COMMIT"]
        assert onlooker.names() == ["new"]

    def test_an_atomic_request_refuses_commit(self, house: House, onlooker: Onlooker) -> None:
        house.owner.atomic_requests(house.web)

        def view() -> str:
            house.session.add(Author(name="new"))
            with pytest.raises(exc.InvalidRequestError, match="leave commit\\(\\) out"):
                house.session.commit()
            raise RuntimeError

        assert house.post(view) == 500
        assert onlooker.names() == []

    def test_an_atomic_request_says_which_call_began_before_it(
        self, house: House, onlooker: Onlooker
    ) -> None:
        house.owner.atomic_requests(house.web)
        house.web.testing = True

        @house.web.post("/other")
        def other() -> str:
            return "not reached"

        with house.web.app_context():
            house.session.execute(update(Author).values(age=9))
            request = house.web.test_request_context("/other", method="POST")
            request.push()
            try:
                if house.session().in_transaction():  # Flask before 3.2 shares the context
                    with pytest.raises(exc.InvalidRequestError, match=r"begun by execute\(\) in"):
                        house.web.preprocess_request()
            finally:
                request.pop()
            house.session.rollback()

    def test_a_unit_of_work_is_a_transaction_of_its_own(
        self, house: House, wire: WireProxy, onlooker: Onlooker
    ) -> None:
        def view() -> str:
            house.session.get(Author, 1)
            with unit_of_work(house.session) as session:
                session.add_all([Author(name="new"), Author(name="newer")])
            with unit_of_work(house.session.session_factory) as session:
                session.add_all([Author(name="next"), Author(name="newest")])
            return "stored"

        with wire.record() as recording:
            assert house.post(view) == 200
        assert sent(recording) == ["SELECT", *["BEGIN", "INSERT", "COMMIT"] * 2]
        assert onlooker.names() == ["new", "newer", "newest", "next"]

    @pytest.mark.parametrize("atomic", [True, False])
    @pytest.mark.parametrize("commits", [True, False])
    def test_a_task_stores_what_it_commits_or_all_if_it_is_atomic(
        self, house: House, wire: WireProxy, onlooker: Onlooker, atomic: bool, commits: bool
    ) -> None:
        celery = Celery("example", task_cls=DatabaseTask.of(house.web))

        @celery.task(shared=False, atomic=atomic)
        def store() -> None:
            house.session.add(Author(name="new"))
            house.session.flush()
            if commits and not atomic:
                house.session.commit()
            elif not commits and atomic:
                raise RuntimeError

        with wire.record() as recording:
            store.apply()
        end = "COMMIT" if commits else "ROLLBACK"
        assert sent(recording) == ["BEGIN", "INSERT", end]
        assert onlooker.names() == (["new"] if commits else [])

    def test_commands_begin_and_commit(self, house: House, onlooker: Onlooker) -> None:
        @house.web.cli.command()
        def store() -> None:
            house.session.add(Author(name="new"))
            house.session.flush()
            house.session.commit()
            house.session.execute(insert(Author).values(name="newer"))

        assert house.web.test_cli_runner().invoke(args=["store"]).exit_code == 0
        assert onlooker.names() == ["new"]


class TestTheExtension:
    @pytest.fixture
    def db(self) -> Any:
        return Database(session_options=OPTIONS)

    @pytest.fixture
    def models(self, db: Any) -> tuple[Any, Any]:
        class Tag(ActiveRecordMixin, db.Model):
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(unique=True)

        class Other(db.Model):
            __bind_key__ = "other"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        return Tag, Other

    @pytest.fixture
    def app(
        self,
        db: Any,
        models: Any,
        make_app: MakeApp,
        wire_url: str,
        server: PostgresServer,
        driver: str,
        other_database: str,
    ) -> Flask:
        other = server.url(driver, other_database)
        app = make_app(db, wire_url, SQLALCHEMY_BINDS={"other": other})
        with app.app_context():
            db.create_all()
        return app

    def names(self, app: Flask, db: Any, model: Any) -> list[str]:
        with app.app_context():
            return list(db.session.scalars(select(model.name).order_by(model.id)))

    def test_active_record_ends_with_commit(
        self, app: Flask, db: Any, models: Any, wire: WireProxy
    ) -> None:
        Tag, _ = models
        with app.app_context():
            with wire.record() as recording:
                tag = Tag(name="one").save()
                assert not db.session().in_transaction()
            assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
            with wire.record() as recording:
                tag.update(name="two")
            assert sent(recording) == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]
            with wire.record() as recording:
                Tag.create(name="three")
            assert sent(recording) == ["BEGIN", "INSERT", "COMMIT"]
            with wire.record() as recording:
                tag.delete()
            assert sent(recording) == ["BEGIN", "SELECT", "DELETE", "COMMIT"]
            with wire.record() as recording:
                Tag.query.filter_by(name="three").one().save()  # nothing has changed
            assert sent(recording) == ["SELECT"]
        assert self.names(app, db, Tag) == ["three"]

    def test_active_record_stores_what_was_written_before(
        self, app: Flask, db: Any, models: Any
    ) -> None:
        Tag, _ = models
        with app.app_context():
            db.session.execute(insert(Tag).values(name="before"))
            Tag(name="saved").save()
            assert not db.session().in_transaction()
        assert self.names(app, db, Tag) == ["before", "saved"]

    def test_active_record_that_fails_rolls_back(self, app: Flask, db: Any, models: Any) -> None:
        Tag, _ = models
        with app.app_context():
            Tag(name="one").save()
            db.session.execute(insert(Tag).values(name="before"))
            with pytest.raises(exc.IntegrityError):
                Tag(name="one").save()
            Tag(name="after").save()
        assert self.names(app, db, Tag) == ["one", "after"]

    def test_active_record_inside_a_block_is_part_of_it(
        self, app: Flask, db: Any, models: Any
    ) -> None:
        Tag, _ = models
        with app.app_context():
            with suppress(RuntimeError), db.session.begin():
                Tag(name="one").save()
                raise RuntimeError
            with db.session.begin_nested():
                Tag(name="two").save()
            db.session.rollback()
        assert self.names(app, db, Tag) == []

    @pytest.mark.parametrize("ends", ["commit", "rollback"])
    def test_filter_by_or_create_is_part_of_the_transaction(
        self, app: Flask, db: Any, models: Any, wire: WireProxy, ends: str
    ) -> None:
        Tag, _ = models
        with app.app_context():
            with wire.record() as recording:
                created = Tag.filter_by_or_create(name="one")
                assert Tag.filter_by_or_create(name="one") is created
            assert sent(recording) == [
                *("SELECT", "BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "SELECT"),
            ]
            with pytest.raises(
                exc.InvalidRequestError, match=r"begun by .* in test_filter_by_or_cr"
            ):
                db.session.begin()
            getattr(db.session, ends)()
        assert self.names(app, db, Tag) == (["one"] if ends == "commit" else [])

    def test_filter_by_or_create_that_finds_begins_nothing(
        self, app: Flask, db: Any, models: Any, wire: WireProxy
    ) -> None:
        Tag, _ = models
        with app.app_context():
            Tag(name="one").save()
            with wire.record() as recording:
                assert Tag.filter_by_or_create(name="one")
            assert sent(recording) == ["SELECT"]

    @pytest.mark.parametrize("ends", ["commit", "rollback", "remove"])
    def test_two_binds_are_written_as_one(
        self, app: Flask, db: Any, models: Any, ends: str
    ) -> None:
        Tag, Other = models
        with app.app_context():
            db.session.add(Tag(name="one"))
            db.session.flush()
            db.session.execute(insert(Other).values(name="one"))
            getattr(db.session, ends)()
        stored = ["one"] if ends == "commit" else []
        assert self.names(app, db, Tag) == self.names(app, db, Other) == stored

    def test_isolation_undoes_what_was_begun_on_write(
        self, app: Flask, db: Any, models: Any
    ) -> None:
        Tag, Other = models
        with db.test_isolation(app):
            with app.app_context():
                Tag(name="saved").save()
                db.session.add(Tag(name="flushed"))
                db.session.flush()
                db.session.rollback()
                db.session.execute(insert(Tag).values(name="stored"))
                db.session.execute(insert(Other).values(name="stored"))
                db.session.commit()
            with app.app_context():
                db.session.execute(insert(Tag).values(name="not committed"))
            assert self.names(app, db, Tag) == ["saved", "stored"]
            assert self.names(app, db, Other) == ["stored"]
        assert self.names(app, db, Tag) == self.names(app, db, Other) == []

    def test_paginate_flushes_as_on_stock(
        self, app: Flask, db: Any, models: Any, wire: WireProxy
    ) -> None:
        Tag, _ = models
        with app.app_context():
            db.session.add(Tag(name="one"))
            page = db.paginate(select(Tag))
            assert [tag.name for tag in page] == ["one"]
            with pytest.raises(exc.InvalidRequestError, match=r"begun by paginate\(\) in "):
                db.session.begin()
            db.session.rollback()
            assert db.session.scalar(select(func.count()).select_from(Tag)) == 0

    def test_an_extension_without_the_option_stays_strict(
        self, make_app: MakeApp, wire_url: str
    ) -> None:
        strict = Database()
        with make_app(strict, wire_url).app_context():
            strict.session.execute(sa.text("CREATE TABLE stored (id int)"))
            assert not strict.session().in_transaction()
            strict.session.rollback()
            assert strict.session.scalar(sa.text("SELECT count(*) FROM stored")) == 0


class TestConnectionsOfTheEngine:
    """A connection of ``db.engine`` does as the sessions do."""

    @pytest.mark.parametrize("is_set", [True, False])
    def test_a_write_begins_what_its_commit_ends(
        self, filled: str, wire_url: str, wire: WireProxy, is_set: bool
    ) -> None:
        db = Database(session_options={"begin_on_write": is_set})
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = wire_url
        app.config["SQLALCHEMY_BINDS"] = {"other": wire_url, "lite": "sqlite://"}
        db.init_app(app)
        with app.app_context():
            for engine in (db.engine, db.engines["other"]):
                with engine.connect() as connection:
                    connection.execute(select(1))
                    with wire.record() as recording:
                        connection.execute(select(1))
                        connection.execute(update(Author).values(age=9))
                        connection.commit()
                expected = ["SELECT", "BEGIN", "UPDATE", "COMMIT"]
                assert sent(recording) == (expected if is_set else ["SELECT", "UPDATE"])
            with db.engines["lite"].connect() as connection:
                assert connection.scalar(select(1)) == 1
            for engine in db.engines.values():
                engine.dispose()

    def test_the_engine_may_differ_from_the_sessions(
        self, filled: str, wire_url: str, wire: WireProxy
    ) -> None:
        db = Database(session_options=OPTIONS, engine_options={"begin_on_write": False})
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = wire_url
        db.init_app(app)
        with app.app_context(), db.engine.connect() as connection:
            connection.execute(select(1))
            with wire.record() as recording:
                connection.execute(update(Author).values(age=9))
        assert sent(recording) == ["UPDATE"]
        with app.app_context():
            db.engine.dispose()
