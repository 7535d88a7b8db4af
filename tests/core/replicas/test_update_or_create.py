"""``update_or_create()`` searches on the primary, because a replica may have an older row."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from fictive_sqlalchemy import OptInSession
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create, update_or_create
from tests.core.replicas.support import is_on_replica, recorded
from tests.library import Author
from tests.wire import WireProxy


@pytest.mark.parametrize("has_read", [True, False])
def test_update_or_create_takes_the_row_of_the_primary(
    wire: WireProxy,
    replica_wires: list[WireProxy],
    session: OptInSession,
    has_read: bool,
) -> None:
    if has_read:
        assert is_on_replica(session)
        _, created = filter_by_or_create(session, Author, {"name": "Ada"}, {})
        assert not created
    with recorded(wire, replica_wires[0]) as (primary, on_replica):
        found, created = update_or_create(session, Author, {"name": "Ada"}, {"age": 99})
        assert session.scalar(sa.select(Author.age).filter_by(id=found.id)) == 99
    assert not created
    assert primary.verbs == ["SELECT", "UPDATE", "SELECT"]
    assert on_replica.verbs == []
