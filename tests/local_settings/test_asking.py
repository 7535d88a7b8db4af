"""When the function of ``local_settings`` is called, and what it may do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInSession, unit_of_work
from fictive_sqlalchemy._core.local_settings import begin_before_settings
from fictive_sqlalchemy.filter_by_or_create import filter_by_or_create, update_or_create
from tests.library import Author, Document, opened
from tests.local_settings.support import has_none, tenant
from tests.wire import WireProxy

SETTINGS = {"app.tenant_id": 7}
ONE = sa.select(Author).where(Author.id == 1)
ROWS = [{"name": "x"}, {"name": "y"}]


def _add(session: OptInSession) -> None:
    session.add(Author(name="x"))


def _flush(session: OptInSession) -> None:
    _add(session)
    session.flush()


def _lazy_load(session: OptInSession) -> None:
    assert session.info["author"].documents is not None


def _expired(session: OptInSession) -> None:
    session.expire(session.info["author"])
    assert session.info["author"].name == "Ada"


def _delete(session: OptInSession) -> None:
    session.delete(session.info["document"])
    session.flush()


def _nested(session: OptInSession) -> None:
    with session.begin_nested():
        session.scalar(ONE)


CALLS: dict[str, Callable[[OptInSession], object]] = {
    "execute": lambda session: session.execute(ONE).all(),
    "execute text": lambda session: session.execute(sa.text("SELECT 1")).all(),
    "scalar": lambda session: session.scalar(ONE),
    "scalars": lambda session: session.scalars(ONE).all(),
    "stream": lambda session: list(session.scalars(ONE.execution_options(yield_per=1))),
    "get": lambda session: session.get(Author, 2),
    "query": lambda session: session.query(Author).filter_by(id=1).first(),
    "count": lambda session: session.query(Author).count(),
    "query.update": lambda session: session.query(Author).update({"age": 5}),
    "query.delete": lambda session: session.query(Document).delete(),
    "refresh": lambda session: session.refresh(session.info["author"]),
    "lazy load": _lazy_load,
    "expired attribute": _expired,
    "merge": lambda session: session.merge(Author(id=2, name="b")),
    "insert": lambda session: session.execute(sa.insert(Author).values(name="x")),
    "insert rows": lambda session: session.execute(sa.insert(Author), ROWS),
    "update rows": lambda session: session.execute(sa.update(Author), [{"id": 1, "age": 5}]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Author(name="x")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Author, ROWS),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(
        Author, [{"id": 1, "age": 5}]
    ),
    "connection": lambda session: session.connection().execute(sa.text("SELECT 1")).all(),
    "flush": _flush,
    "delete": _delete,
    "begin_nested": _nested,
    "filter_by_or_create": lambda session: filter_by_or_create(session, Author, {"name": "x"}, {}),
    "update_or_create": lambda session: update_or_create(
        session, Author, {"name": "Ada"}, {"age": 5}
    ),
}


@pytest.mark.parametrize("how", ["outside", "atomic", "begin", "begin_on_write"])
@pytest.mark.parametrize("call", CALLS)
def test_the_settings_are_sent_with_the_first_statement_of_each_call(
    engine: OptInEngine, wire: WireProxy, call: str, how: str
) -> None:
    """Also if they become known only after the transaction has begun."""
    current: dict[str, int] | None = None
    session = OptInSession(
        engine, local_settings=lambda: current, begin_on_write=how == "begin_on_write"
    )
    with session:
        session.info["author"] = session.get_one(Author, 1)
        session.info["document"] = session.scalar(sa.select(Document).limit(1))
        if how == "atomic":
            begin_before_settings(session)
        elif how == "begin":
            session.begin()
        current = SETTINGS
        with wire.record() as recording:
            CALLS[call](session)
        texts = recording.statements
        # psycopg 3 sends the name as a parameter of set_config().
        [first, *_] = [at for at, text in enumerate(texts) if re.search("tenant_id|_config", text)]
        assert {text.split()[0] for text in texts[:first]} <= {"BEGIN", "SAVEPOINT"}
        assert tenant(session) == "7"


def test_the_settings_are_known_before_the_bind_is_chosen(engine: OptInEngine) -> None:
    """The function's own statements may decide whether a replica can be read."""
    seen: list[bool] = []

    class Choosing(OptInSession):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(bool(asked))
            return super().get_bind(*args, **kwargs)

    asked: list[int] = []

    def settings() -> dict[str, int]:
        asked.append(1)
        return SETTINGS

    with Choosing(engine, local_settings=settings) as session:
        session.scalar(ONE)
    assert seen == [True]


def test_the_function_may_change_an_object_before_a_block(engine: OptInEngine) -> None:
    def settings() -> dict[str, int]:
        session.get_one(Author, 1).age = 99  # when it was seen last
        return SETTINGS

    with OptInSession(engine, local_settings=settings) as session, session.begin():
        assert tenant(session) == "7"
    with OptInSession(engine) as session:
        assert session.get_one(Author, 1).age == 99


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_with_begin_on_write_the_function_may_read_before_a_block(url: str, level: str) -> None:
    def settings() -> dict[str, int]:
        session.get_one(Author, 1, with_for_update=True)
        return SETTINGS

    with opened(url, isolation_level=level) as engine:
        session = OptInSession(engine, local_settings=settings, begin_on_write=True)
        for _ in range(2):
            with session, session.begin():
                assert tenant(session) == "7"


def _in_a_block(session: OptInSession) -> None:
    with session.begin():
        session.get_one(Author, 1)


def _in_a_savepoint(session: OptInSession) -> None:
    with session.begin_nested():
        session.get_one(Author, 1)


def _in_an_atomic_block(session: OptInSession) -> None:
    with session.atomic():
        session.get_one(Author, 1)


@pytest.mark.parametrize(
    "store",
    [
        _in_a_block,
        _in_a_savepoint,
        _in_an_atomic_block,
        OptInSession.flush,
        OptInSession.commit,
    ],
)
def test_the_function_never_stores_the_pending_changes_without_the_settings(
    engine: OptInEngine, store: Callable[[OptInSession], None]
) -> None:
    def settings() -> dict[str, int]:
        store(session)
        return SETTINGS

    with OptInSession(engine, local_settings=settings) as session:
        tenant(session)  # without pending changes, a block is only unnecessary
        session.reset()
        _add(session)
        with pytest.raises(exc.InvalidRequestError, match="let the function only read"):
            tenant(session)
        assert [one.name for one in session.new] == ["x"]
        with pytest.raises(exc.InvalidRequestError, match="let the function only read"):
            session.commit()
        session.set_local({"app.user_id": 1})
    with OptInSession(engine) as session:
        assert session.scalar(sa.select(Author).filter_by(name="x")) is None


def test_the_function_may_find_or_create_an_object_beside_pending_changes(
    engine: OptInEngine,
) -> None:
    def settings() -> dict[str, int | None]:
        found, _ = filter_by_or_create(session, Author, {"name": "tenant"}, {"age": 7})
        return {"app.tenant_id": found.age}

    with OptInSession(engine, local_settings=settings) as session:
        _add(session)
        session.commit()
        assert tenant(session) == "7"


def test_the_function_is_called_before_an_object_is_stored_alone(engine: OptInEngine) -> None:
    answers: list[Any] = [None, "create"]

    def settings() -> dict[str, int | None] | None:
        if answers.pop(0) is None:
            return None
        found, _ = filter_by_or_create(session, Author, {"name": "tenant"}, {"age": 7})
        return {"app.tenant_id": found.age}

    with OptInSession(engine, local_settings=settings) as session:
        created, is_new = filter_by_or_create(session, Author, {"name": "x"}, {})
        assert (created.name, is_new) == ("x", True)
        assert tenant(session) == "7"


def test_another_session_in_the_function_has_no_settings_yet(engine: OptInEngine) -> None:
    seen: list[Any] = []

    def settings() -> dict[str, int]:
        with Session() as other:
            seen.append(tenant(other))
        return SETTINGS

    Session = sessionmaker(engine, class_=OptInSession, local_settings=settings)
    with Session() as session:
        assert tenant(session) == "7"
    assert seen in ([None], [""])


def test_a_function_that_closes_its_session_is_an_error(engine: OptInEngine) -> None:
    def settings() -> dict[str, int]:
        session.close()
        session.get_one(Author, 1)
        return SETTINGS

    session = OptInSession(engine, local_settings=settings)
    with session, pytest.raises(exc.InvalidRequestError, match="has closed or reset the session"):
        tenant(session)


def test_the_function_is_not_called_in_a_transaction_that_has_failed(engine: OptInEngine) -> None:
    current: dict[str, int] | None = None
    asked: list[object] = []

    def settings() -> dict[str, int] | None:
        asked.append(current)
        return current

    with OptInSession(engine, local_settings=settings) as session:
        session.begin()
        session.add(Author(name="Ada"))  # the name is taken
        with pytest.raises(exc.IntegrityError):
            session.flush()
        asked.clear()
        with pytest.raises(exc.PendingRollbackError):
            session.scalar(ONE)
        assert asked == []
        session.rollback()
        current = SETTINGS
        assert tenant(session) == "7"


def test_a_commit_of_no_changes_calls_no_function(engine: OptInEngine) -> None:
    asked: list[int] = []
    with OptInSession(engine, local_settings=lambda: asked.append(1)) as session:
        session.commit()
        session.flush()
        assert asked == []
        _add(session)
        session.commit()
        assert asked == [1]


def test_a_unit_of_work_calls_the_function_inside(engine: OptInEngine) -> None:
    Session = sessionmaker(engine, class_=OptInSession, local_settings=lambda: SETTINGS)
    with unit_of_work(Session) as session:
        assert tenant(session) == "7"
    with OptInSession(engine) as session:
        assert has_none(session)
