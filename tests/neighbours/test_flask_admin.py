"""Flask-Admin: its views of models, by requests. They call commit() and rollback() themselves."""

# Classes that Flask-SQLAlchemy makes at run time are nothing that a type checker can know.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask_admin import Admin, expose
from flask_admin.actions import action
from flask_admin.contrib.sqla import ModelView
from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Mapped, mapped_column, relationship
from werkzeug.test import TestResponse

from tests.flask.conftest import MakeApp
from tests.flask.support import Database, sent
from tests.wire import WireProxy

pytestmark = pytest.mark.filterwarnings(
    # Flask-Admin 2.2 gives WTForms 3.3 the choices of its select fields in the old form.
    "ignore:Yielding raw tuples from iter_choices:DeprecationWarning"
)


class Site:
    """An application with an author, Ada, who has written one book, and an Admin for both."""

    def __init__(self, make_app: MakeApp, url: str) -> None:
        self.db = db = Database()
        self.app: Flask = make_app(db, url, SECRET_KEY="secret")

        class Author(db.Model):
            __tablename__ = "authors"

            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str] = mapped_column(unique=True)
            deleted: Mapped[int] = mapped_column(default=0)
            books: Mapped[list[Book]] = relationship(back_populates="author")

        class Book(db.Model):
            __tablename__ = "books"
            __table_args__ = (CheckConstraint("pages > 0", name="has_pages"),)

            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str] = mapped_column(unique=True)
            pages: Mapped[int]
            author_id: Mapped[int] = mapped_column(ForeignKey("authors.id"))
            author: Mapped[Author] = relationship(back_populates="books")

        self.Author: Any = Author
        self.Book: Any = Book
        self.admin = Admin(self.app)

    def start(
        self, author_view: type[ModelView] = ModelView, book_view: type[ModelView] = ModelView
    ) -> None:
        self.admin.add_view(author_view(self.Author, self.db))
        self.admin.add_view(book_view(self.Book, self.db))
        with self.app.app_context():
            self.db.create_all()
            ada = self.Author(name="Ada")
            self.db.session.add(self.Book(title="Notes", pages=20, author=ada))
            self.db.session.commit()
        self.client = self.app.test_client()

    def post(self, path: str, **form: Any) -> TestResponse:
        return self.client.post(f"/admin/{path}", data=form)

    @property
    def flashed(self) -> str:
        with self.client.session_transaction() as session:
            return "\n".join(text for _, text in session.pop("_flashes", []))

    @property
    def books(self) -> dict[str, int]:
        with self.app.app_context():
            books = self.db.session.scalars(self.db.select(self.Book).order_by(self.Book.id))
            return {book.title: book.pages for book in books}


@pytest.fixture
def new_site(make_app: MakeApp, wire_url: str) -> Callable[[], Site]:
    return lambda: Site(make_app, wire_url)


@pytest.fixture
def site(new_site: Callable[[], Site]) -> Site:
    site = new_site()
    site.start()
    return site


STORED = ["SELECT authors", "SELECT books", "INSERT books"]


def test_a_list_and_a_form_are_reads(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        page = site.client.get("/admin/book/")
    assert "Notes" in page.text
    assert sent(recording) == ["SELECT books", "SELECT books"]  # how many, and which
    with wire.record() as recording:
        form = site.client.get("/admin/book/edit/?id=1")
    assert 'value="Notes"' in form.text
    assert set(recording.verbs) == {"SELECT"}


def test_a_form_that_is_sent_is_one_transaction(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        assert site.post("book/new/", title="Letters", pages=9, author=1).status_code == 302
    assert sent(recording) == STORED
    with wire.record() as recording:
        assert site.post("book/edit/?id=2", title="Diary", pages=9, author=1).status_code == 302
    assert sent(recording)[-1] == "UPDATE books"
    assert set(recording.verbs[:-1]) == {"SELECT"}
    with wire.record() as recording:
        assert site.post("book/delete/", id=1).status_code == 302
    assert sent(recording) == ["SELECT books", "BEGIN", "DELETE books", "COMMIT"]
    assert site.books == {"Diary": 9}


def test_what_the_database_refuses_is_shown_and_not_stored(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        page = site.post("book/new/", title="Letters", pages=0, author=1)
    assert page.status_code == 200
    assert "has_pages" in page.text
    # What comes after the INSERT is for the form that is shown again.
    assert sent(recording)[:3] == STORED
    assert set(recording.verbs[3:]) <= {"SELECT"}
    assert "has_pages" in site.post("book/edit/?id=1", title="Diary", pages=0, author=1).text
    assert site.books == {"Notes": 20}
    assert site.post("book/new/", title="Letters", pages=9, author=1).status_code == 302


def test_a_delete_that_is_refused_changes_nothing(site: Site, wire: WireProxy) -> None:
    with wire.record() as recording:
        site.post("author/delete/", id=1)  # its book has to have an author
    assert sent(recording) == [
        "SELECT authors",
        "BEGIN",
        "SELECT books",
        "UPDATE books",
        "ROLLBACK",
    ]
    assert "author_id" in site.flashed
    assert site.books == {"Notes": 20}


def test_an_error_of_a_hook_stores_nothing(new_site: Callable[[], Site], wire: WireProxy) -> None:
    class BookView(ModelView):
        def on_model_change(self, form: Any, model: Any, is_created: bool) -> None:
            model.author.deleted += 1
            raise ValueError("not today")

    site = new_site()
    site.start(book_view=BookView)
    with wire.record() as recording:
        page = site.post("book/new/", title="Letters", pages=9, author=1)
    assert "not today" in page.text
    assert set(recording.verbs) == {"SELECT"}
    assert site.books == {"Notes": 20}


class NumbersView(ModelView):
    """Its keys are integers, which psycopg 3 does not take for strings."""

    @action("delete", "Delete", "Are you sure?")
    def action_delete(self, ids: list[str]) -> None:
        super().action_delete([int(id) for id in ids])


@pytest.mark.parametrize("is_fast", [False, True])
def test_several_rows_are_deleted_each_on_its_own_or_by_one_statement(
    new_site: Callable[[], Site], wire: WireProxy, is_fast: bool
) -> None:
    class BookView(NumbersView):
        fast_mass_delete = is_fast

    site = new_site()
    site.start(book_view=BookView)
    site.post("book/new/", title="Letters", pages=9, author=1)
    with wire.record() as recording:
        site.post("book/action/", action="delete", rowid=["1", "2"])
    assert site.books == {}
    if is_fast:
        assert sent(recording) == ["DELETE books"]
    else:  # each commit expires the next one, which is read again: as with SQLAlchemy's sessions
        deleted = ["BEGIN", "DELETE books", "COMMIT"]
        assert sent(recording) == [
            "SELECT books",
            *deleted,
            "BEGIN",
            "SELECT books",
            *deleted[1:],
        ]


def test_psycopg_does_not_take_strings_for_the_numbers_of_rows_to_delete(
    site: Site, driver: str
) -> None:
    if driver != "psycopg":
        pytest.skip("psycopg2 writes values into the text, where PostgreSQL sees no type")
    site.app.testing = True
    with pytest.raises(ProgrammingError, match="integer = character varying"):
        site.post("book/action/", action="delete", rowid=["1"])
    assert site.books == {"Notes": 20}


def deleted_count(site: Site) -> int:
    with site.app.app_context():
        return int(site.db.session.get_one(site.Author, 1).deleted)


class CountingView(ModelView):
    """Its hook changes another row, which Flask-Admin flushes before it deletes."""

    def on_model_delete(self, model: Any) -> None:
        model.deleted += 1


class WholeView(CountingView):
    """The same, as a whole or not at all."""

    def delete_model(self, model: Any) -> bool:
        db: Any = self.session  # so Flask-Admin calls the extension
        db.session.begin()  # which Flask-Admin ends
        return bool(super().delete_model(model))


def test_what_a_hook_changes_before_a_delete_is_stored_before_the_delete(
    new_site: Callable[[], Site], wire: WireProxy
) -> None:
    site = new_site()
    site.start(author_view=CountingView)
    with wire.record() as recording:
        site.post("author/delete/", id=1)
    assert sent(recording)[:2] == ["SELECT authors", "UPDATE authors"]
    assert recording.verbs[-1] == "ROLLBACK"
    assert deleted_count(site) == 1


def test_a_begin_before_a_delete_makes_it_one_transaction(
    new_site: Callable[[], Site], wire: WireProxy
) -> None:
    site = new_site()
    site.start(author_view=WholeView)
    with wire.record() as recording:
        site.post("author/delete/", id=1)
    assert sent(recording)[:3] == ["SELECT authors", "BEGIN", "UPDATE authors"]
    assert recording.verbs.count("BEGIN") == recording.verbs.count("ROLLBACK") == 1
    assert "author_id" in site.flashed
    assert deleted_count(site) == 0

    site.post("book/delete/", id=1)
    with wire.record() as recording:
        site.post("author/delete/", id=1)
    assert recording.verbs.count("BEGIN") == recording.verbs.count("COMMIT") == 1
    assert recording.verbs[-2:] == ["DELETE", "COMMIT"]


class FlushingView(ModelView):
    """Its hook wants to know the new key, and then refuses."""

    def on_model_change(self, form: Any, model: Any, is_created: bool) -> None:
        db: Any = self.session
        db.session.add(model)
        db.session.flush()
        raise ValueError(f"not {model.id}")


class WholeFlushingView(FlushingView):
    """The same, as a whole or not at all."""

    def create_model(self, form: Any) -> Any:
        db: Any = self.session
        db.session.begin()
        return super().create_model(form)


@pytest.mark.parametrize(
    ("view", "books"),
    [
        (FlushingView, {"Notes": 20, "Letters": 9}),
        (WholeFlushingView, {"Notes": 20}),
    ],
)
def test_what_a_hook_flushes_is_stored_unless_begin_was_called_before(
    new_site: Callable[[], Site], view: type[ModelView], books: dict[str, int]
) -> None:
    site = new_site()
    site.start(book_view=view)
    assert "not 2" in site.post("book/new/", title="Letters", pages=9, author=1).text
    assert site.books == books


def test_flask_admins_commit_in_an_atomic_request_is_refused_and_shown(
    new_site: Callable[[], Site], wire: WireProxy
) -> None:
    site = new_site()
    site.db.atomic_requests(site.app)
    site.start()
    page = site.post("book/new/", title="Letters", pages=9, author=1)
    assert "leave commit() out" in page.text
    assert site.books == {"Notes": 20}


def test_views_of_flask_admin_can_be_taken_out_of_atomic_requests(
    new_site: Callable[[], Site], wire: WireProxy
) -> None:
    site = new_site()
    site.db.atomic_requests(site.app)

    class BookView(ModelView):
        @expose("/new/", methods=("GET", "POST"))
        @site.db.non_atomic_request
        def create_view(self) -> Any:
            return super().create_view()

    site.start(book_view=BookView)
    with wire.record() as recording:
        site.post("book/new/", title="Letters", pages=9, author=1)
    assert sent(recording) == STORED
    assert site.books == {"Notes": 20, "Letters": 9}
