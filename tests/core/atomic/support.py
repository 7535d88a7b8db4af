"""What the tests of atomic blocks share: a check that the session can be used afterwards."""

from __future__ import annotations

import sqlalchemy as sa

from fictive_sqlalchemy import OptInSession
from tests.library import Author, Onlooker, add


def assert_usable(session: OptInSession, onlooker: Onlooker) -> None:
    """Check that nothing is left over: the session reads outside, and the next block is stored."""
    assert not session.in_transaction()
    before = onlooker.names()
    with session.atomic():
        add(session, "usable")
    assert onlooker.names() == sorted([*before, "usable"])
    assert session.scalar(sa.select(Author.name).where(Author.name == "usable")) == "usable"
