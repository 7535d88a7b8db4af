"""The pytest plugin, in a real pytest of its own: alone and with what else tests are made with."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fictive_sqlalchemy
from tests.library import Onlooker

pytestmark = pytest.mark.slow

PLUGIN = "fictive_sqlalchemy.ext.pytest"

SHOP = """
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy.ext.flask import OptInTransactionMixin

class Database(OptInTransactionMixin, SQLAlchemy): ...

db = Database()

class User(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)

def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = URL
    db.init_app(app)

    @app.post("/users/<name>")
    def store(name):
        db.session.add(User(name=name))
        db.session.commit()
        return name

    @app.get("/users")
    def show():
        return list(db.session.scalars(db.select(User.name).order_by(User.id)))

    return app
"""

CONFTEST = """
import pytest
from shop import create_app, db
from sqlalchemy import text

@pytest.fixture(scope="session")
def app():
    app = create_app()
    with app.app_context(), db.engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(1)"))
        db.metadata.create_all(connection)
    yield app
    with app.app_context():
        db.engine.dispose()
"""


class Project:
    """A directory with tests of somebody else's.

    :param directory: Where.
    :param url: The database of its application.
    """

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.write("shop.py", SHOP.replace("URL", repr(url)))
        self.write("conftest.py", CONFTEST)
        self.write("pytest.ini", "[pytest]\nfilterwarnings = error\n")

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        (self.directory / name).write_text(textwrap.dedent(text), encoding="utf-8")

    def run(self, *arguments: str) -> str:
        """Run pytest and return the last line of what it prints, after all of it is shown."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        } | {
            "PYTEST_PLUGINS": PLUGIN,  # as if it were installed
            "PYTHONPATH": str(Path(fictive_sqlalchemy.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        print(done.stdout, done.stderr)
        return done.stdout.strip().splitlines()[-1].partition(" in ")[0]


@pytest.fixture
def project(tmp_path: Path, url: str) -> Project:
    return Project(tmp_path, url)


@pytest.fixture
def stored(url: str) -> Iterator[Callable[[], list[str]]]:
    """The names that are stored."""
    onlooker = Onlooker(url)
    yield lambda: onlooker.column('SELECT name FROM "user" ORDER BY id')
    onlooker.close()


def test_each_test_begins_with_the_same_database(
    project: Project, stored: Callable[[], list[str]]
) -> None:
    project.write(
        "test_shop.py",
        """
        import pytest
        from shop import User, db

        @pytest.mark.parametrize("turn", range(3))
        def test_requests(app, db_isolation, turn):
            client = app.test_client()
            assert client.get("/users").json == []
            assert client.post("/users/ada").status_code == 200
            assert client.post("/users/ada").status_code == 500
            assert client.get("/users").json == ["ada"]

        def test_that_fails(app, db_isolation):
            app.test_client().post("/users/ada")
            assert False

        @pytest.mark.usefixtures("db_isolation")
        def test_context(app):
            with app.app_context():
                assert db.session.query(User).count() == 0
                db.session.add(User(name="ada"))
                db.session.commit()

        def test_that_is_not_isolated(app):
            assert app.test_client().post("/users/stored").status_code == 200
        """,
    )
    assert project.run() == "1 failed, 5 passed"
    assert stored() == ["stored"]


def test_the_plugin_may_be_loaded_twice(project: Project) -> None:
    project.write("test_nothing.py", "def test_nothing(): pass")
    assert project.run("-p", PLUGIN, "-p", PLUGIN) == "1 passed"


def test_the_plugin_does_nothing_unless_it_is_asked(project: Project) -> None:
    """Neither does it import what a project without a database does not have."""
    project.write("conftest.py", "")
    project.write(
        "test_nothing.py",
        """
        import sys

        def test_nothing():
            assert "fictive_sqlalchemy.ext.pytest" in sys.modules
            assert "fictive_sqlalchemy.testing" not in sys.modules
            assert "flask" not in sys.modules
        """,
    )
    others = ("-p", "no:flask", "-p", "no:pytest_flask_dance")  # which import Flask
    assert project.run(*others) == "1 passed"


def test_the_plugin_works_with_plain_sqlalchemy(project: Project, url: str) -> None:
    project.write(
        "conftest.py",
        f"""
        import pytest
        from sqlalchemy import text
        from fictive_sqlalchemy import create_engine

        @pytest.fixture(scope="session")
        def engine():
            engine = create_engine({url!r})
            with engine.begin() as connection:
                connection.execute(text("CREATE TABLE note (text text)"))
            yield engine
            engine.dispose()

        @pytest.fixture(params=["engine", "engines"])
        def db_isolation_of(engine, request):
            return engine if request.param == "engine" else [engine]
        """,
    )
    project.write(
        "test_notes.py",
        """
        from sqlalchemy import text
        from sqlalchemy.orm import sessionmaker
        from fictive_sqlalchemy import OptInSession

        def test_notes(engine, db_isolation):
            with sessionmaker(engine, class_=OptInSession)() as session:
                with session.begin():
                    session.execute(text("INSERT INTO note VALUES ('one')"))
                assert session.scalar(text("SELECT count(*) FROM note")) == 1
        """,
    )
    assert project.run() == "2 passed"


def test_without_an_application_the_plugin_says_what_to_do(project: Project) -> None:
    project.write("conftest.py", "")
    project.write("test_one.py", "def test_one(db_isolation): pass")
    assert project.run() == "1 error"


@pytest.mark.parametrize(
    ("conftest", "said"),
    [
        ("", "define a fixture `app`, or a fixture `db_isolation_of`"),
        ("app = pytest.fixture(lambda: Flask('one'))", "no extension with OptInTransactionMixin"),
        ("app = pytest.fixture(lambda missing: missing)", "fixture 'missing' not found"),
        ("db_isolation_of = pytest.fixture(lambda: 7)", "an application or engines, not 7"),
    ],
)
def test_wrong_uses_of_the_plugin_are_an_error(
    project: Project, capsys: pytest.CaptureFixture[str], conftest: str, said: str
) -> None:
    project.write("conftest.py", f"import pytest\nfrom flask import Flask\n{conftest}\n")
    project.write("test_one.py", "def test_one(db_isolation): pass")
    assert project.run() == "1 error"
    assert said in capsys.readouterr().out


def test_data_of_a_module_is_there_for_all_of_its_tests(
    project: Project, stored: Callable[[], list[str]]
) -> None:
    """Isolation within isolation: what a wider fixture stores is there for all of its tests."""
    project.write(
        "test_shop.py",
        """
        import pytest
        from shop import User, db

        @pytest.fixture(scope="module", autouse=True)
        def users(app):
            with db.test_isolation(app):
                with app.app_context():
                    db.session.add(User(name="ada"))
                    db.session.commit()
                yield

        @pytest.mark.parametrize("turn", range(3))
        def test_users(app, db_isolation, turn):
            client = app.test_client()
            assert client.post("/users/bob").status_code == 200
            assert client.get("/users").json == ["ada", "bob"]
        """,
    )
    assert project.run() == "3 passed"
    assert stored() == []


def test_objects_of_factory_boy_are_undone(
    project: Project, stored: Callable[[], list[str]]
) -> None:
    project.write(
        "test_factories.py",
        """
        import factory
        import pytest
        from factory.alchemy import SQLAlchemyModelFactory
        from shop import User, db
        from sqlalchemy.exc import IntegrityError

        class UserFactory(SQLAlchemyModelFactory):
            class Meta:
                model = User
                sqlalchemy_session = db.session

            name = factory.Sequence("user {}".format)

        class Flushed(UserFactory):
            class Meta:
                sqlalchemy_session_persistence = "flush"

        class Committed(UserFactory):
            class Meta:
                sqlalchemy_session_persistence = "commit"

        class GotOrCreated(Flushed):
            class Meta:
                sqlalchemy_get_or_create = ["name"]

        @pytest.fixture
        def client(app, db_isolation):
            return app.test_client()

        @pytest.fixture
        def context(app, client):
            with app.app_context():
                yield

        @pytest.fixture
        def names(app):
            def names():  # in a context of its own
                with app.app_context():
                    return list(db.session.scalars(db.select(User.name).order_by(User.id)))
            return names

        @pytest.mark.parametrize("factory", [Flushed, Committed])
        @pytest.mark.parametrize("turn", range(2))
        def test_stores(context, names, factory, turn):
            factory(name="ada")
            factory.create_batch(2)
            assert len(names()) == 3
            with pytest.raises(IntegrityError):
                factory(name="ada")
            factory(name="bob")
            assert len(names()) == 4

        def test_waits(context, names):
            user = UserFactory(name="ada")
            assert names() == []
            with db.session.begin():
                UserFactory(name="bob")
            assert names() == ["ada", "bob"]
            assert user.id

        def test_get_or_create(context, names):
            assert GotOrCreated(name="ada") is GotOrCreated(name="ada")
            assert names() == ["ada"]

        def test_in_a_block(context, names):
            with pytest.raises(ZeroDivisionError), db.session.begin():
                Flushed(name="ada")
                1 / 0
            assert names() == []

        def test_requests_see_it(app, client):
            with app.app_context():
                Flushed(name="ada")
            assert client.get("/users").json == ["ada"]
        """,
    )
    assert project.run() == "8 passed"
    assert stored() == []


def test_the_plugin_works_with_pytest_flask(
    project: Project, stored: Callable[[], list[str]]
) -> None:
    """It pushes a request context around each test that has an ``app``."""
    project.write(
        "test_shop.py",
        """
        import pytest
        from flask import has_request_context, url_for
        from shop import User, db

        pytestmark = pytest.mark.usefixtures("db_isolation")

        @pytest.mark.parametrize("turn", range(2))
        def test_the_context_of_the_test(app, client, turn):
            assert has_request_context()
            db.session.add(User(name="ada"))
            db.session.commit()
            assert client.get("/users").json == ["ada"]
            assert client.post("/users/bob").status_code == 200
            assert db.session.query(User).count() == 2

        def test_what_is_left_in_the_session(app):
            assert db.session.query(User).count() == 0
            db.session.begin()
            db.session.add(User(name="ada"))
            db.session.flush()

        def test_nothing_is(client):
            assert client.get("/users").json == []
        """,
    )
    assert project.run() == "4 passed"
    assert stored() == []


def test_the_plugin_works_with_xdist(project: Project, stored: Callable[[], list[str]]) -> None:
    """Two workers on one database, which even store the same name."""
    project.write(
        "test_shop.py",
        """
        import pytest

        @pytest.mark.parametrize("turn", range(8))
        def test_users(app, db_isolation, turn, worker_id):
            assert worker_id in ("gw0", "gw1")
            client = app.test_client()
            assert client.get("/users").json == []
            assert client.post("/users/ada").status_code == 200
            assert client.post(f"/users/{worker_id}").status_code == 200
            assert client.get("/users").json == ["ada", worker_id]
        """,
    )
    assert project.run("-n", "2") == "8 passed"
    assert stored() == []


REPORTED = """
    import pytest
    from shop import User, db

    @pytest.fixture
    def client(app, db_isolation):
        return app.test_client()

    @pytest.mark.parametrize("turn", range(4))
    def test_flush(app, client, turn):
        with app.app_context():
            session = db.session(begin_on_write=True)
            session.add(User(name="ada"))
            session.flush()

    def test_waits(app, client):
        with app.app_context():
            db.session.add(User(name="ada"))
            assert db.session.query(User).count() == 0

    def test_same(client):
        assert client.post("/users/ada").status_code == 200
        assert client.get("/users").json == ["ada"]
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_strict_report_has_one_line_for_each_place(
    project: Project, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    """One line for each place, whichever worker of pytest-xdist comes there."""
    project.write("test_shop.py", REPORTED)
    assert project.run("-n", workers, "--strict-report") == "6 passed"
    shown = capsys.readouterr().out
    report = shown[shown.index("strict report") :].splitlines()[1:4]
    flushed = "test_shop.py:14 in test_flush: flush() would store the pending changes at once"
    assert report[0].startswith(flushed)
    passed_over = "test_shop.py:19 in test_waits: count() did not flush the pending changes (User)"
    assert report[1].startswith(passed_over)
    assert report[2].startswith("2 places mean something else in the strict mode than")


def test_the_strict_report_says_that_tests_on_a_connection_prove_nothing(
    project: Project, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    """It is said once that such tests prove nothing."""
    project.write(
        "test_shop.py",
        """
        import pytest
        from fictive_sqlalchemy import OptInSession
        from shop import User, db

        @pytest.fixture
        def session(app):
            with app.app_context(), db.engine.connect() as connection:
                transaction = connection.begin()
                with OptInSession(connection, begin_on_write=True) as session:
                    yield session
                transaction.rollback()

        @pytest.mark.parametrize("turn", range(3))
        def test_users(session, turn):
            session.add(User(name="ada"))
            session.flush()
            session.add(User(name="bob"))
            session.commit()
        """,
    )
    assert project.run("--strict-report") == "3 passed"
    shown = capsys.readouterr().out
    assert shown.count("a session runs on a Connection of your own") == 1
    assert "test_isolation()" in shown
    assert "No place that was met" in shown


def test_there_is_no_strict_report_unless_it_is_asked_for(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write("test_shop.py", REPORTED)
    assert project.run() == "6 passed"
    assert "strict" not in capsys.readouterr().out
