"""Which applications are run: their versions, what is installed with them, how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Edit:
    """What is written anew in the sources of an application before its tests run: in one file, the
    first place that says ``old``.

    ``{url}``, ``{server}``, ``{port}`` and ``{database}`` in :attr:`new` stand for the database's
    URL, the URL without its database, the server's port, and the database's name.
    """

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Application:
    """An application whose sdist has tests, and all that it takes to run them."""

    name: str
    version: str
    requires: tuple[str, ...] = ()
    """What its tests need beside it, and the versions that they were written for."""
    extras: tuple[str, ...] = ()
    python: str = "3.10"
    """The lowest Python that it can be installed on."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its process; placeholders as in :class:`Edit`."""
    edits: tuple[Edit, ...] = ()
    arguments: tuple[str, ...] = ()
    """Arguments for pytest; placeholders as in :class:`Edit`."""
    tests: tuple[str, ...] = ("tests",)
    """The part of its suite that is run."""
    deselected: Mapping[str, str] = field(default_factory=dict)
    """Words of the names of tests that are not run, and why. They can't pass here, with stock or
    with ours, or have nothing to do with Flask-SQLAlchemy."""
    part: str = ""
    """Which part of the suite is run, in words, if it is not the whole."""

    @property
    def title(self) -> str:
        """What it is called in the table: name and version."""
        return f"{self.name} {self.version}".strip()


#: Of Invenio the table has the last releases that have their tests in the sdist. This is what was
#: new then: with later ones their tests fail.
_THEN = (
    "click==8.1.8", "setuptools==80.9.0",
    "SQLAlchemy==2.0.58", "SQLAlchemy-Continuum==1.4.2", "SQLAlchemy-Utils==0.41.2",
    "Flask-Alembic==3.1.1", "invenio-base==2.0.0", "pytest-invenio==3.0.0",
)  # fmt: skip
_INVENIO = ("Flask==3.0.3", "Werkzeug==3.0.6", *_THEN)

#: Later ones of the first need libpass, which has not all that invenio-accounts takes from passlib.
_PASSLIB = ("Flask-Security-Invenio==3.8.4", "passlib==1.7.4")

#: Later ones of the second and the third have not all that the first and the second call.
_ADMIN = ("invenio-admin==1.5.0", "Flask-Admin==1.6.1", "WTForms==3.1.2")

#: The fixture `db` of pytest-invenio has a session on a Connection. There a session of ours is
#: SQLAlchemy's own, so that its tests would say nothing. This one empties the tables instead.
_DB = """\
@pytest.fixture()
def db(database):
    yield database
    database.session.remove()
    with database.engine.begin() as connection:
        tables = map('"{}"'.format, database.inspect(connection).get_table_names())
        connection.exec_driver_sql(f"TRUNCATE {', '.join(tables)}")


"""

#: The tests of Invenio read the URL of the database from the environment.
_INVENIO_URL = {"SQLALCHEMY_DATABASE_URI": "{url}"}

#: Before Python 3.14 these modules can't be imported: their annotations are only for type checkers.
_FLASKBB = tuple(
    Edit(f"flaskbb/{module}.py", '"""', 'from __future__ import annotations\n"""')
    for module in (
        "auth/services/authentication",
        "auth/services/registration",
        "auth/views",
        "forum/models",
        "plugins/manager",
        "utils/database",
        "utils/helpers",
    )
)

APPLICATIONS = (
    Application(
        "flask-security",
        "5.9.2",
        # Those of its dependency group "tests" that these tests need.
        requires=(
            "Babel==2.18.0",
            "Flask==3.1.3",
            "Flask-Babel==4.0.0",
            "Flask-Login==0.6.3",
            "Flask-Mail==0.10.0",
            "Flask-SQLAlchemy==3.1.1",
            "Flask-SQLAlchemy-Lite==0.2.1",
            "Flask-WTF==1.3.0",
            "SQLAlchemy==2.0.58",
            "SQLAlchemy-Utils==0.43.0",
            "Werkzeug==3.1.9",
            "argon2-cffi==25.1.0",
            "authlib==1.9.10",
            "bcrypt==5.0.0",
            "cryptography==50.0.2",
            "freezegun==1.5.5",
            "nh3==0.3.8",
            "peewee==4.5.3",
            "phonenumberslite==9.0.42",
            "pytest==9.2.0",
            "qrcode==8.2",
            "requests==2.34.2",
            "webauthn==3.0.1",
            "zxcvbn==4.5.0",
        ),
        edits=(
            # One database for all tests. They make one each, which takes longer than the test.
            Edit(
                "tests/conftest.py",
                'db_name = "flask_security_test_%s" % str(time.time()).replace(".", "_")',
                'db_name = "{database}"',
            ),
            Edit(
                "tests/conftest.py",
                'drop_database(db_info["engine"].url)',
                'db_info["engine"].dispose()',
            ),
        ),
        arguments=("--realdburl={server}/",),
        deselected={
            "mongo": "needs MongoDB",
            "peewee": "is about another ORM",
            "sqla-session": "is about SQLAlchemy without Flask-SQLAlchemy",
            "sqlalchemy-session": "is about SQLAlchemy without Flask-SQLAlchemy",
            "sqlalchemy_session": "is about SQLAlchemy without Flask-SQLAlchemy",
            "fsqlalite": "is about Flask-SQLAlchemy-Lite",
        },
    ),
    Application(
        "invenio-db",
        "2.0.0",
        requires=(
            *_INVENIO,
            "cryptography==46.0.3",
        ),
        environment=_INVENIO_URL,
    ),
    Application(
        "invenio-accounts",
        "6.1.1",
        requires=(
            "Flask==3.1.0",
            "Werkzeug==3.1.3",
            *_THEN,
            "invenio-db==2.0.0",
            "invenio-app==2.0.0",
            *_ADMIN,
            *_PASSLIB,
            "mock==5.2.0",
            "requests==2.34.2",
        ),
        environment=_INVENIO_URL,
        deselected={"test_kvsession_store_init_with_redis_url": "needs Redis"},
    ),
    Application(
        "invenio-records",
        "3.0.0",
        requires=(
            *_INVENIO,
            "invenio-db==2.0.0",
            "pytest-mock==3.14.0",
            *_ADMIN,
        ),
        environment=_INVENIO_URL,
        edits=(
            Edit(
                "tests/conftest.py",
                "@pytest.fixture()\ndef languages",
                f"{_DB}@pytest.fixture()\ndef languages",
            ),
        ),
    ),
    Application(
        "invenio-pidstore",
        "2.0.0",
        requires=(
            *_INVENIO,
            "invenio-db==2.0.0",
            *_ADMIN,
            "invenio-access==4.0.0",
            "invenio-accounts==6.1.1",
            *_PASSLIB,
            "datacite==1.1.3",
            "mock==5.2.0",
        ),
        environment=_INVENIO_URL,
        edits=(
            # Its tests set the URL too late for Flask-SQLAlchemy 3, and so would be on SQLite.
            Edit(
                "tests/conftest.py",
                "    InvenioDB(app)\n",
                '    app.config["SQLALCHEMY_DATABASE_URI"] = "{url}"\n    InvenioDB(app)\n',
            ),
            # On PostgreSQL alone it executes text without text(), which SQLAlchemy 2 refuses.
            Edit(
                "invenio_pidstore/models.py",
                '"SELECT setval(pg_get_serial_sequence("\n'
                """                "'{0}', 'recid'), :newval)".format(cls.__tablename__),""",
                'db.text("SELECT setval(pg_get_serial_sequence("\n'
                """                "'{0}', 'recid'), :newval)".format(cls.__tablename__)),""",
            ),
        ),
    ),
    Application(
        "invenio-files-rest",
        "3.0.0",
        requires=(
            *_INVENIO,
            "invenio-db==2.0.0",
            *_ADMIN,
            "invenio-access==4.0.0",
            "invenio-accounts==6.1.1",
            *_PASSLIB,
            "future==1.0.0",
        ),
        environment=_INVENIO_URL,
    ),
    Application(
        "ihatemoney",
        "7.2.1",
        requires=("SQLAlchemy==2.0.58", "pytest==9.0.2", "pytest-flask==1.3.0"),
        python="3.11",
        environment={"TESTING_SQLALCHEMY_DATABASE_URI": "{url}"},
        edits=(
            # Its forms look for the domains of e-mail addresses in the DNS.
            Edit(
                "ihatemoney/tests/conftest.py",
                "import pytest\n",
                "import email_validator\nimport pytest\n\n"
                "email_validator.CHECK_DELIVERABILITY = False\n",
            ),
        ),
        tests=("ihatemoney/tests",),
    ),
    Application(
        "flaskbb",
        "2.2.0",
        requires=(
            "SQLAlchemy==2.1.9",
            "SQLAlchemy-Utils==0.43.0",
            "freezegun==1.5.5",
            "pytest==9.0.2",
            "pytest-mock==3.15.1",
            "responses==0.26.3",
        ),
        python="3.12",
        edits=(
            Edit("flaskbb/configs/testing.py", '"sqlite://"', '"{url}"'),
            # DROP TABLE would wait for what the session has read, and it for DROP TABLE.
            Edit(
                "tests/fixtures/app.py",
                "    db.drop_all()\n    db.session.close()",
                "    db.session.close()\n    db.drop_all()",
            ),
            # The hash of a password has 162 characters, which SQLite stores in 120.
            Edit("flaskbb/user/models.py", '"password", String(120)', '"password", String(255)'),
            # It deletes the last post of a topic and a forum before they have another last post.
            *[
                Edit(
                    "flaskbb/forum/models.py",
                    "last_post_id: Mapped[int | None] = mapped_column(\n"
                    '        ForeignKey("posts.id")',
                    "last_post_id: Mapped[int | None] = mapped_column(\n"
                    '        ForeignKey("posts.id", ondelete="SET NULL")',
                )
            ]
            * 2,
            # These register users in a group that is not there.
            *(
                Edit("tests/unit/auth/test_registration.py", test, f"{test}default_groups, ")
                for test in (
                    "def test_registers_user_if_everything_is_good(self, ",
                    "def test_calls_post_processors_if_user_registration_works(\n        self, ",
                )
            ),
            # The release has no compiled translations.
            Edit(
                "tests/conftest.py",
                "from tests.fixtures.app",
                "import subprocess\n"
                'subprocess.run(["pybabel", "compile", "-d", "flaskbb/translations"], check=True)\n'
                "from tests.fixtures.app",
            ),
            *_FLASKBB,
        ),
    ),
)

#: What uses Flask-SQLAlchemy 3 and can't be run, and why.
NOT_RUN = (
    (
        Application("flask-audit-logger", "2.0.0"),
        "its tests need the extension `btree_gist`, which the embedded PostgreSQL does not have",
    ),
    (
        Application("faradaysec", "5.25.2"),
        "its release contains its tests, but not their `conftest.py`",
    ),
    (Application("zou", "1.0.97"), "its release has no tests"),
)
