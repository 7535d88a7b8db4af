"""The tests of ``isolate()`` send these statements to an engine."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tests.library import authors


def names(engine: sa.Engine) -> list[str]:
    """The authors' names, as a new connection sees them, those of the start left out."""
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(authors.c.name).where(authors.c.id > 3)))


def add_author(engine: sa.Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(authors).values(name=name))


def run(engine: sa.Engine, sql: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(sql))


def scalar(engine: sa.Engine, sql: str) -> Any:
    with engine.connect() as connection:
        return connection.scalar(sa.text(sql))
