"""The error of a write on a replica advises what works."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, func, select

from fictive_sqlalchemy import OptInEngine, OptInSession, create_engine
from tests.core.replicas.support import opened_with
from tests.library import Author, fill
from tests.postgres import ReplicaServer


@pytest.mark.parametrize("write", ["outside", "in a block", "engine.begin()"])
def test_a_write_on_a_standby_is_not_advised_to_begin(
    replica: ReplicaServer, driver: str, database: str, url: str, write: str
) -> None:
    fill(url)
    replica.catch_up()
    standby = create_engine(replica.url(driver, database), read_only_outside=write == "outside")

    def delete() -> None:
        with OptInSession(standby) as session, ExitStack() as stack:
            target: Any = session
            if write == "in a block":
                stack.enter_context(session.begin())
            elif write == "engine.begin()":
                target = stack.enter_context(standby.begin())
            target.execute(sa.delete(Author))

    with pytest.raises(exc.InternalError) as raised:
        delete()
    assert "is a standby, which refuses every write" in str(raised.value)
    assert "begin(" not in str(raised.value)
    standby.dispose()


def test_a_write_in_a_transaction_on_a_replica_is_not_advised_to_begin_one(
    engine: OptInEngine,
) -> None:
    (replica,) = engine.replicas
    with (
        pytest.raises(exc.InternalError, match="is a standby") as raised,
        replica.begin() as connection,
    ):
        connection.execute(sa.delete(Author))
    assert "begin(" not in str(raised.value)


@pytest.mark.parametrize("read_only_outside", [False, True])
def test_a_write_on_a_replica_is_advised_what_works(
    wire_url: str, replica_urls: list[str], replica: ReplicaServer, read_only_outside: bool
) -> None:
    """``default_transaction_read_only`` holds for the primary as well as for the replica."""
    options: dict[str, Any] = {"read_only_outside": True}
    if not read_only_outside:
        options = {"connect_args": {"options": "-c default_transaction_read_only=on"}}
    with opened_with(wire_url, replica_urls[:1], replica, **options) as engine:
        statement = select(func.nextval("author_id_seq"))
        says = "begin()" if read_only_outside else "begin(read_only=False)"
        with OptInSession(engine) as session:
            with pytest.raises(exc.InvalidRequestError) as raised:
                session.scalar(statement)
            assert f"Put the statement into `with session.{says}:`. See " in str(raised.value)
            with session.begin(read_only=None if read_only_outside else False):
                assert session.scalar(statement) == 4
