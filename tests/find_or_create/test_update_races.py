"""However many call ``update_or_create()`` at the same time: one row, and the last update wins."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

from tests.find_or_create.stores import (
    Counted,
    Employee,
    Heard,
    Store,
    Tag,
    User,
    sqlstate,
)
from tests.wire import Message, WireProxy

LEVELS = pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
WHERE = pytest.mark.parametrize("where", ["outside", "inside"])

THREADS = 32


@pytest.fixture
def just_before(wire: WireProxy) -> Callable[[str, Callable[[], Any]], None]:
    """Lets somebody else be faster: each time just before a statement reaches the server."""

    def arrange(verb: str, act: Callable[[], Any]) -> None:
        def look(message: Message) -> None:
            if message.is_statement and message.verb == verb:
                wire.before_forward = None
                if act():  # once more
                    wire.before_forward = look

        wire.before_forward = look

    return arrange


def run(
    store: Store, where: str, call: Callable[[Session, int], Any], times: int = 3
) -> list[list[Any]]:
    """What each of 32 threads got from each of its calls, which all of them begin together."""
    together = threading.Barrier(THREADS)

    def inside(session: Session, number: int) -> Any:
        while True:
            try:
                with session.begin():
                    return call(session, number)
            except exc.DBAPIError as error:
                if sqlstate(error) != "40001":
                    raise

    def work(number: int) -> list[Any]:
        answers: list[Any] = []
        with store.maker() as session:
            try:
                for _ in range(times):
                    together.wait(60)
                    answers.append((inside if where == "inside" else call)(session, number))
            except BaseException:
                together.abort()
                raise
        return answers

    with ThreadPoolExecutor(THREADS) as executor:
        futures = [executor.submit(work, number) for number in range(THREADS)]
    errors = [error for future in futures if (error := future.exception())]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    for error in errors:
        raise error
    return [future.result() for future in futures]


@LEVELS
@WHERE
@pytest.mark.parametrize("model", [User, Heard, Employee])
def test_32_threads_on_5_connections_make_one_row_that_is_no_mixture(
    make_store: Callable[..., Store], url: str, model: type[Any], where: str, level: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    other = "badge" if model is Employee else "nick"

    def call(session: Session, number: int) -> tuple[int, bool]:
        values = {"name": f"{number % 4}", other: f"{number % 4}"}
        instance, created = store.put(model, values, session=session, email="ada@x")
        return instance.id, created

    answers = [answer for answers in run(store, where, call) for answer in answers]
    assert len({identity for identity, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    ((name, same),) = store.stored(model, "name", other)
    assert name == same


@LEVELS
@WHERE
@pytest.mark.parametrize("model", [User, Counted])
def test_each_of_32_threads_is_counted_by_an_expression(
    make_store: Callable[..., Store], url: str, model: type[Any], where: str, level: str
) -> None:
    """Counted has a version, so that each UPDATE finds the version that the search has read."""
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    column = "age" if model is User else "number"
    key = {"email": "ada@x"} if model is User else {"key": "k"}
    more = {"name": "Ada"} if model is User else {}

    def call(session: Session, number: int) -> None:
        count = {column: getattr(model, column) + 1}
        store.put(model, count, {column: 1, **more}, session, **key)

    run(store, where, call)
    assert store.stored(model, column) == [THREADS * 3]


@LEVELS
def test_inside_a_function_that_reads_the_old_value_is_not_too_late(
    make_store: Callable[..., Store], url: str, level: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    store.put(User, {"name": "Ada", "age": 1}, email="ada@x")

    def call(session: Session, number: int) -> None:
        (ada,) = session.scalars(sa.select(User))  # too early: somebody may be faster now
        store.put(User, {"age": lambda: (ada.age or 0) + 1}, session=session, email="ada@x")

    run(store, "inside", call)
    assert store.stored(User, "age") == [THREADS * 3 + 1]


@LEVELS
def test_outside_a_version_keeps_a_function_from_being_too_late(
    make_store: Callable[..., Store], url: str, level: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0, isolation_level=level)
    store.put(Counted, {"number": 1}, key="k")

    def call(session: Session, number: int) -> None:
        (one,) = session.scalars(sa.select(Counted))
        store.put(Counted, {"number": lambda: (one.number or 0) + 1}, session=session, key="k")

    run(store, "outside", call)
    assert store.stored(Counted, "number") == [THREADS * 3 + 1]


@WHERE
def test_rows_that_come_and_go_are_stored_in_the_end(
    make_store: Callable[..., Store], url: str, where: str
) -> None:
    store = make_store(url, pool_size=5, max_overflow=0)

    def call(session: Session, number: int) -> None:
        if number % 2:
            session.execute(sa.delete(User))
        else:
            store.put(User, {"name": f"{number}"}, session=session, email="ada@x")

    run(store, where, call, times=8)
    store.put(User, {"name": "last"}, email="ada@x")
    assert store.stored(User, "name") == ["last"]


@WHERE
@pytest.mark.parametrize("model", [User, Heard])
def test_the_loser_of_a_race_to_create_updates_what_the_winner_has_created(
    store: Store,
    another: Store,
    wire: WireProxy,
    just_before: Callable[..., None],
    model: type[User],
    where: str,
) -> None:
    just_before("INSERT", lambda: another.put(model, {"name": "W", "age": 1}, email="ada@x") and 0)
    with wire.record() as recording:
        if where == "inside":
            with store.session.begin():
                ada, created = store.put(model, {"name": "Loser"}, {"name": "New"}, email="ada@x")
        else:
            ada, created = store.put(model, {"name": "Loser"}, {"name": "New"}, email="ada@x")
    assert (ada.name, ada.age, created) == ("Loser", 1, False)
    assert store.stored(model, "name", "age") == [("Loser", 1)]
    assert [verb for verb in recording.verbs if verb in ("SELECT", "INSERT", "UPDATE")] == [
        *("SELECT", "INSERT", "SELECT", "UPDATE")
    ]
    assert list(store.session) == [ada]


@pytest.mark.parametrize("model", [User, Counted])
def test_a_row_that_was_deleted_after_the_search_is_created_again(
    store: Store, another: Store, wire: WireProxy, just_before: Callable[..., None], model: Any
) -> None:
    filters: dict[str, Any] = {"email": "ada@x"} if model is User else {"key": "k"}
    values = {"name": "Ada"} if model is User else {"note": "first"}
    new = {"name": "New"} if model is User else {"note": "second"}
    store.put(model, values, **filters)

    def delete() -> None:
        with another.engine.begin() as connection:
            connection.execute(sa.delete(model))

    just_before("UPDATE", delete)
    with wire.record() as recording:
        instance, created = store.put(model, new, **filters)
    assert created
    assert recording.verbs == ["SELECT", "UPDATE", "SELECT", "INSERT"]
    assert store.stored(model, "id") == [instance.id]
    assert store.stored(model, *new) == [*new.values()]


@WHERE
def test_a_version_that_another_has_stored_after_the_search_is_updated(
    store: Store, another: Store, wire: WireProxy, just_before: Callable[..., None], where: str
) -> None:
    """Outside, the object is searched for again; inside, its row is locked."""
    one, _ = store.put(Counted, {"note": "first", "number": 1}, key="k")
    if where == "inside":
        with store.session.begin():
            another.put(Counted, {"number": 2}, key="k")  # after the session has loaded it
            store.put(Counted, {"note": "ours"}, key="k")
    else:
        just_before("UPDATE", lambda: another.put(Counted, {"number": 2}, key="k") and 0)
        with wire.record() as recording:
            store.put(Counted, {"note": "ours"}, key="k")
        assert recording.verbs == ["SELECT", "UPDATE", "SELECT", "UPDATE"]
    assert one.note == "ours"
    assert store.stored(Counted, "version", "note", "number") == [(3, "ours", 2)]


@WHERE
def test_a_trigger_that_refuses_each_update_is_an_error_and_no_endless_loop(
    store: Store, another: Store, where: str
) -> None:
    store.put(User, {"name": "Ada"}, email="ada@x")
    with another.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger AS 'BEGIN RETURN NULL; END' LANGUAGE plpgsql;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    session = store.session
    if where == "inside":
        with session.begin():
            session.add(Tag(name="before"))
            with pytest.raises(StaleDataError):
                store.put(User, {"name": "Ada L."}, email="ada@x")
        assert store.stored(Tag, "name") == ["before"]
    else:
        with pytest.raises(StaleDataError):
            store.put(User, {"name": "Ada L."}, email="ada@x")
    assert store.put(User, {"name": "Ada"}, email="ada@x")[0].name == "Ada"


@pytest.mark.parametrize("model", [User, Heard])
def test_a_serialization_failure_of_each_update_is_an_error_and_no_endless_loop(
    store: Store, another: Store, monkeypatch: pytest.MonkeyPatch, model: type[User]
) -> None:
    monkeypatch.setattr("fictive_sqlalchemy._find_or_create.update._MOST_CONFLICTS", 5)
    ada, _ = store.put(model, {"name": "Ada"}, email="ada@x")
    with another.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger AS "
            "'BEGIN RAISE EXCEPTION USING ERRCODE = ''40001''; END' LANGUAGE plpgsql;"
            f"CREATE TRIGGER refuse BEFORE UPDATE ON {model.__tablename__} "
            "FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
    calls: list[int] = []

    def make_name() -> str:
        calls.append(1)
        return "Ada L."

    with pytest.raises(exc.OperationalError):
        store.put(model, {"name": make_name}, email="ada@x")
    assert len(calls) == 5
    assert ada.name == "Ada"
