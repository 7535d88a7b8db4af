"""The tests of the connection write authors by a statement of Core."""

from __future__ import annotations

import sqlalchemy as sa

from tests.library import authors


def insert(name: str) -> sa.Insert:
    return sa.insert(authors).values(name=name)
