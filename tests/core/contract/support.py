"""Several rows of the contract are checked by how many authors there are."""

from __future__ import annotations

import sqlalchemy as sa

from fictive_sqlalchemy import OptInSession
from tests.library import Author


def count(session: OptInSession) -> int | None:
    return session.scalar(sa.select(sa.func.count()).select_from(Author))
