"""An application's module as type checkers see it, who read this file, and that it runs."""

# pyright: strict, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    SessionTransaction,
    mapped_column,
    sessionmaker,
)
from typing_extensions import assert_type

from fictive_sqlalchemy import (
    IsolationLevel,
    OptInEngine,
    OptInScopedSession,
    OptInSession,
    create_engine,
)
from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin, builtins
from fictive_sqlalchemy.ext.flask.builtins import Session
from fictive_sqlalchemy.ext.flask.shared import Model
from fictive_sqlalchemy.ext.flask.shared import db as shared
from fictive_sqlalchemy.ext.flask.shared import session as shared_session
from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.flask.conftest import MakeApp


class Base(DeclarativeBase):
    pass


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    AUTOCOMMIT_DRIVERS = ["postgresql", "sqlite"]  # noqa: RUF012


db = Database(model_class=Base)


# mypy takes no attribute of an object as a base class, with Flask-SQLAlchemy's own either.
class User(db.Model):  # type: ignore[name-defined,misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)


class Visitor(Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


def test_type_checkers_know_an_extension_of_the_users_own(make_app: MakeApp, url: str) -> None:
    with make_app(db, url).app_context():
        db.create_all()
        assert_type(db, Database)
        assert_type(db.session, OptInScopedSession[Session])
        assert_type(db.session(), Session)
        with db.session.begin():
            db.session.add(User(email="ada@example.com"))
        with db.session.begin(isolation_level="SERIALIZABLE", read_only=True, deferrable=True):
            user = assert_type(db.session.get(User, 1), User | None)
            assert user is not None
            assert_type(user.email, str)
        with db.session.begin_nested():
            user.email = "augusta@example.com"
        found = assert_type(db.session.scalars(sa.select(User)).all(), Sequence[User])
        assert [user.email for user in found] == ["augusta@example.com"]
        db.session.give_back()
        assert not any(connections for connections in db.TRANSACTION_CONNECTIONS.values())


def test_type_checkers_know_the_ready_made_extension(make_app: MakeApp, url: str) -> None:
    with make_app(shared, url).app_context():
        shared.create_all()
        assert_type(shared, builtins.SQLAlchemy)
        assert_type(shared_session, OptInScopedSession[Session])
        visitor = assert_type(Visitor.filter_by_or_create(name="Ada"), Visitor)
        assert_type(visitor.name, str)
        again, created = Visitor.filter_by_or_create.with_created(name="Ada", defaults={"id": 7})
        assert_type(again, Visitor)
        assert_type(created, bool)
        assert (again, created) == (visitor, False)
        assert_type(Visitor.update_or_create(name="Ada"), Visitor)
        again, created = Visitor.update_or_create.with_created(
            name="Ada", defaults={}, create_defaults={"id": 7}
        )
        assert_type(again, Visitor)
        assert_type(created, bool)
        assert (again, created) == (visitor, False)
        assert_type(shared_session.in_transaction(), bool)
        assert_type(shared_session.get_transaction(), SessionTransaction | None)
        with shared_session.begin(read_only=True):
            assert shared_session.get_one(Visitor, visitor.id) is visitor


def test_type_checkers_know_that_an_isolation_level_is_one_of_four(url: str) -> None:
    """The comments are errors of the type checkers if there is nothing to ignore."""
    engine = create_engine(url)
    sessions = OptInScopedSession(sessionmaker(engine, class_=OptInSession))
    level: IsolationLevel = "READ UNCOMMITTED"
    for given in (level, None):
        with sessions.begin(isolation_level=given), sessions().atomic():
            assert sessions.in_transaction()
    with sessions.atomic(isolation_level="READ COMMITTED"):
        assert sessions.in_transaction()
    with pytest.raises(ArgumentError):
        sessions().begin(isolation_level="SERIALISABLE")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError):
        sessions.begin(isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError):
        sessions.atomic(isolation_level="SNAPSHOT").__enter__()  # type: ignore[call-overload]  # pyright: ignore
    with pytest.raises(ArgumentError):
        retry_transaction(sessions, isolation_level="REPEATABLE")(lambda: None)()  # type: ignore[call-overload]  # pyright: ignore
    sessions.remove()
    engine.dispose()


def test_type_checkers_know_a_session_without_flask(url: str) -> None:
    engine = assert_type(create_engine(url), OptInEngine)
    sessions = sessionmaker(engine, class_=OptInSession)
    with sessions() as session:
        assert_type(session, OptInSession)
        with session.begin(isolation_level="REPEATABLE READ"):
            assert session.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()
