"""Flask-Migrate: real projects in directories of their own, migrated by the real command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, indent

import pytest
import sqlalchemy as sa

import fictive_sqlalchemy
from tests.postgres import PostgresServer
from tests.wire import Recording, WireProxy

APP = """
    import os

    from flask import Flask
    from flask_migrate import Migrate
    from flask_sqlalchemy import SQLAlchemy

    from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin

    class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
        pass

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE"]
    app.config["SQLALCHEMY_BINDS"] = {"accounts": os.environ["ACCOUNTS"]}
    db = Database(app)
    Migrate(app, db)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String, nullable=False)
"""

REVISION = '''
    """{revision}"""

    import sqlalchemy as sa
    from alembic import op

    revision = {revision!r}
    down_revision = {down_revision!r}
    branch_labels = depends_on = None

    def upgrade(engine_name=None):
    {upgrade}

    def downgrade(engine_name=None):
    {downgrade}
'''


def flask_db(
    directory: Path, url: str, accounts: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    package = Path(fictive_sqlalchemy.__file__).parents[1]
    environment = {"DATABASE": url, "ACCOUNTS": accounts, "PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app", "db", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        text=True,
    )


def initialize(directory: Path, *arguments: str) -> Path:
    (directory / "app.py").write_text(dedent(APP))
    done = flask_db(directory, "sqlite://", "sqlite://", "init", *arguments)
    assert done.returncode == 0, done.stderr
    return directory


def by_command(recording: Recording, driver: str) -> list[str]:
    """The verbs of what a command itself sent."""
    if driver == "psycopg":  # asks for a type on its first connection, in a transaction of its own
        return recording.verbs[recording.verbs.index("COMMIT") + 1 :]
    return recording.verbs


class Project:
    """An application in a directory, with its migrations.

    :param directory: The directory, which has been through ``flask db init``.
    :param url: The database.
    :param accounts: The database of another bind.
    """

    def __init__(self, directory: Path, url: str, accounts: str = "sqlite://") -> None:
        self.directory = directory
        self.url = url
        self.accounts = accounts
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)
        self._revisions: list[str] = []

    def flask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``flask db …`` and require that it works."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``flask db …``."""
        return flask_db(self.directory, self.url, self.accounts, *arguments)

    def revise(self, revision: str, upgrade: str, downgrade: str = "pass") -> None:
        """Add a revision to the end."""
        path = self.directory / "migrations" / "versions" / f"{revision}.py"
        path.write_text(
            dedent(REVISION).format(
                revision=revision,
                down_revision=self._revisions[-1] if self._revisions else None,
                upgrade=indent(dedent(upgrade).strip(), "    "),
                downgrade=indent(dedent(downgrade).strip(), "    "),
            )
        )
        self._revisions.append(revision)

    @property
    def tables(self) -> dict[str, set[str]]:
        """The columns of each table."""
        inspector = sa.inspect(self.engine)
        return {
            table: {column["name"] for column in inspector.get_columns(table)}
            for table in inspector.get_table_names()
            if table != "alembic_version"
        }

    @property
    def version(self) -> str | None:
        """What ``alembic_version`` says."""
        with self.engine.connect() as connection:
            return connection.scalar(
                sa.select(sa.column("version_num", sa.String)).select_from(
                    sa.table("alembic_version")
                )
            )


@pytest.fixture(scope="module")
def initialized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which ``flask db init`` has been run."""
    return initialize(tmp_path_factory.mktemp("initialized"))


@pytest.fixture
def project(initialized: Path, tmp_path: Path, wire_url: str) -> Iterator[Project]:
    project = Project(shutil.copytree(initialized, tmp_path / "project"), wire_url)
    yield project
    project.engine.dispose()


CREATE = """
    op.create_table("user", sa.Column("id", sa.Integer, primary_key=True))
    op.add_column("user", sa.Column("name", sa.String, nullable=False))
"""


def test_an_upgrade_and_a_downgrade_are_one_transaction_each(
    project: Project, wire: WireProxy, driver: str
) -> None:
    project.revise("first", CREATE, 'op.drop_table("user")')
    project.revise(
        "second",
        'op.add_column("user", sa.Column("age", sa.Integer))',
        'op.drop_column("user", "age")',
    )
    with wire.record() as recording:
        project.flask("upgrade")
    assert project.tables == {"user": {"id", "name", "age"}}
    assert project.version == "second"
    verbs = by_command(recording, driver)
    assert verbs.count("BEGIN") == verbs.count("COMMIT") == 1
    assert verbs.index("BEGIN") < verbs.index("CREATE") < verbs.index("COMMIT")

    with wire.record() as recording:
        project.flask("downgrade", "base")
    assert project.tables == {}
    assert project.version is None
    verbs = by_command(recording, driver)
    assert verbs.count("BEGIN") == verbs.count("COMMIT") == 1


def test_an_upgrade_that_fails_half_way_changes_nothing(
    project: Project, wire: WireProxy, driver: str
) -> None:
    project.revise("first", CREATE)
    project.flask("upgrade")
    project.revise("second", 'op.add_column("user", sa.Column("age", sa.Integer))')
    project.revise(
        "third",
        """
        op.add_column("user", sa.Column("height", sa.Integer))
        op.create_table("club", sa.Column("id", sa.Integer, primary_key=True))
        op.drop_table("no_such_table")
        """,
    )
    with wire.record() as recording:
        done = project.run("upgrade")

    assert done.returncode != 0
    assert "no_such_table" in done.stderr
    assert project.tables == {"user": {"id", "name"}}
    assert project.version == "first"
    verbs = by_command(recording, driver)
    assert "ALTER" in verbs
    assert "COMMIT" not in verbs
    assert verbs.count("BEGIN") == verbs.count("ROLLBACK") == 1


def test_the_very_first_upgrade_that_fails_half_way_leaves_nothing(project: Project) -> None:
    project.revise("first", f"{CREATE}\n    raise ValueError('half way')")
    assert project.run("upgrade").returncode != 0
    assert project.tables == {}
    assert "alembic_version" not in sa.inspect(project.engine).get_table_names()


def test_a_downgrade_that_fails_half_way_changes_nothing(project: Project) -> None:
    project.revise("first", CREATE, 'op.drop_table("user")\nop.drop_table("no_such_table")')
    project.flask("upgrade")
    assert project.run("downgrade").returncode != 0
    assert project.tables == {"user": {"id", "name"}}
    assert project.version == "first"


def test_a_migration_is_made_from_the_models(project: Project) -> None:
    project.flask("migrate", "--message", "create user")
    project.flask("upgrade")
    assert project.tables == {"user": {"id", "name"}}


def test_a_block_in_autocommit_works_between_transactions(
    project: Project, wire: WireProxy, driver: str
) -> None:
    project.revise("first", CREATE)
    project.revise(
        "second",
        """
        op.add_column("user", sa.Column("age", sa.Integer))
        with op.get_context().autocommit_block():
            op.create_index("by_age", "user", ["age"], postgresql_concurrently=True)
        op.add_column("user", sa.Column("height", sa.Integer))
        """,
        """
        op.drop_column("user", "height")
        with op.get_context().autocommit_block():
            op.drop_index("by_age", "user", postgresql_concurrently=True)
        op.drop_column("user", "age")
        """,
    )
    with wire.record() as recording:
        project.flask("upgrade")
    assert project.tables == {"user": {"id", "name", "age", "height"}}
    assert project.version == "second"
    assert [index["name"] for index in sa.inspect(project.engine).get_indexes("user")] == ["by_age"]
    verbs = [verb for verb in by_command(recording, driver) if verb != "SELECT"]
    first, second = verbs.index("COMMIT"), verbs.index("BEGIN", verbs.index("COMMIT"))
    index_statements = [text for text in recording.statements if "CONCURRENTLY" in text]
    assert len(index_statements) == 1
    assert "CREATE" in verbs[first:second]

    project.flask("downgrade", "first")
    assert project.tables == {"user": {"id", "name"}}
    assert project.version == "first"


def test_what_fails_after_a_block_in_autocommit_undoes_its_own_transaction(
    project: Project,
) -> None:
    project.revise("first", CREATE)
    project.revise(
        "second",
        """
        with op.get_context().autocommit_block():
            op.create_index("by_name", "user", ["name"], postgresql_concurrently=True)
        op.add_column("user", sa.Column("height", sa.Integer))
        op.drop_table("no_such_table")
        """,
    )
    assert project.run("upgrade").returncode != 0
    assert project.tables == {"user": {"id", "name"}}
    assert project.version == "first"


def test_an_upgrade_of_several_databases_that_fails_in_the_last_changes_none(
    tmp_path: Path, server: PostgresServer, driver: str, url: str, other_database: str
) -> None:
    accounts = server.url(driver, other_database)
    both = Project(initialize(tmp_path, "--multidb"), url, accounts)
    second = sa.create_engine(accounts, poolclass=sa.NullPool)
    both.revise("first", CREATE)
    both.flask("upgrade")
    both.revise(
        "second",
        """
        op.add_column("user", sa.Column("age", sa.Integer))
        if engine_name == "accounts":
            op.drop_table("no_such_table")
        """,
    )
    assert both.run("upgrade").returncode != 0
    assert both.tables == {"user": {"id", "name"}}
    assert both.version == "first"
    columns = {column["name"] for column in sa.inspect(second).get_columns("user")}
    assert columns == {"id", "name"}
