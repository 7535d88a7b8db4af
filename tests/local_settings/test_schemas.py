"""A schema for each tenant: ``set_local({"search_path": …})``."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from sqlalchemy import delete, exc, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine


class Base(DeclarativeBase):
    pass


class Invoice(Base):
    __tablename__ = "invoice"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str]


# psycopg 3 prepares a statement when it is sent for the sixth time on a connection.
ROUNDS = 8


@pytest.fixture
def tenants(url: str) -> Iterator[OptInEngine]:
    """An engine with one connection, and the schemas ``a`` and ``b`` with a table each."""
    engine = create_engine(url, pool_size=1, max_overflow=0)
    with engine.begin() as connection:
        for schema in ("a", "b"):
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
            connection.execute(text(f"SET LOCAL search_path TO {schema}"))
            Base.metadata.create_all(connection)
    yield engine
    engine.dispose()


def of(engine: OptInEngine, schema: str, *, begin_on_write: bool = False) -> OptInSession:
    session = OptInSession(engine, begin_on_write=begin_on_write)
    session.set_local({"search_path": f"{schema}, public"})
    return session


def labels(engine: OptInEngine, schema: str) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT label FROM {schema}.invoice ORDER BY id")))


@pytest.mark.parametrize("begin_on_write", [False, True])
def test_each_statement_finds_the_table_of_its_schema(
    tenants: OptInEngine, begin_on_write: bool
) -> None:
    for n in range(ROUNDS):
        for schema in ("a", "b"):
            with of(tenants, schema, begin_on_write=begin_on_write) as session:
                session.add(Invoice(label=f"{schema}{n}"))
                session.commit()
                expected = [f"{schema}{n}" for n in range(n + 1)]
                query = select(Invoice.label).order_by(Invoice.id)
                assert session.scalars(query).all() == expected
                streamed = session.scalars(query.execution_options(yield_per=2))
                assert list(streamed) == expected
                with session.begin():
                    assert session.scalars(query).all() == expected
                    with session.begin_nested():
                        session.execute(update(Invoice).values(label=Invoice.label + "!"))
                    session.execute(update(Invoice).values(label=text("rtrim(label, '!')")))
                    assert session.scalars(query).all() == expected
    assert labels(tenants, "a") == [f"a{n}" for n in range(ROUNDS)]
    assert labels(tenants, "b") == [f"b{n}" for n in range(ROUNDS)]


def test_a_session_without_a_schema_finds_no_table(tenants: OptInEngine) -> None:
    for _ in range(ROUNDS):
        with of(tenants, "a") as session:
            assert session.scalars(select(Invoice)).all() == []
            session.execute(delete(Invoice))
        with OptInSession(tenants) as session:
            assert session.scalar(text("SELECT to_regclass('invoice')")) is None


@pytest.fixture
def role(tenants: OptInEngine) -> Iterator[str]:
    """A role that may use the schema ``a`` only."""
    name = f"tenant_{uuid4().hex}"  # roles belong to the whole server
    with tenants.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name}; GRANT USAGE ON SCHEMA a TO {name}")
        connection.exec_driver_sql(f"GRANT ALL ON ALL TABLES IN SCHEMA a TO {name}")
    yield name
    with tenants.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_role_is_refused_the_schema_of_another(tenants: OptInEngine, role: str) -> None:
    who = text("SELECT current_user")
    other = text("SELECT label FROM b.invoice")
    for _ in range(ROUNDS):
        with of(tenants, "a") as session:
            session.set_local({"role": role})
            assert session.scalars(select(Invoice)).all() == []
            with pytest.raises(exc.ProgrammingError, match="permission denied for schema b"):
                session.execute(other)
            with session.begin():
                assert session.scalar(who) == role
                with (
                    pytest.raises(exc.ProgrammingError, match="permission denied for schema b"),
                    session.begin_nested(),
                ):
                    session.execute(other)
                assert session.scalar(who) == role
        with OptInSession(tenants) as session:
            assert session.scalar(who) != role
            assert session.execute(other).all() == []
