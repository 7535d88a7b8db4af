"""Where settings come from: a function asked once, a unit of work; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from fictive_sqlalchemy._core.local_settings import begin_before_settings
from tests.library import Author, Undo
from tests.local_settings.support import has_none, tenant
from tests.wire import WireProxy

Sessions = sessionmaker[OptInSession]

TENANT_AS_NUMBER: Any = sa.text("current_setting('app.tenant_id')::int")


def answer(answers: list[Any]) -> Any:
    """Return the next answer, or raise it."""
    found = answers.pop(0)
    if isinstance(found, Exception):
        raise found
    return found


def test_a_function_is_asked_once_before_the_first_statement(engine: OptInEngine) -> None:
    asked: list[int] = []

    def settings() -> dict[str, int]:
        asked.append(1)
        return {"app.tenant_id": 7}

    with OptInSession(engine, local_settings=settings) as session:
        assert not asked
        assert [tenant(session) for _ in range(3)] == ["7"] * 3
        with session.begin():
            assert tenant(session) == "7"
        assert asked == [1]
        session.close()
        assert tenant(session) == "7"
        assert asked == [1, 1]


def test_the_function_is_asked_inside_a_transaction(engine: OptInEngine) -> None:
    with OptInSession(engine, local_settings=lambda: {"app.tenant_id": 7}) as session:
        with session.begin():
            assert tenant(session) == "7"
        session.reset()
        session.add(Author(name="x"))
        session.commit()
        assert tenant(session) == "7"


def test_what_is_set_by_hand_goes_before_what_the_function_returns(engine: OptInEngine) -> None:
    both = {"app.tenant_id": 7, "app.user_id": 1}
    with OptInSession(engine, local_settings=lambda: both) as session:
        session.set_local({"app.tenant_id": 8})
        assert tenant(session) == "8"
        assert session.scalar(sa.text("SELECT current_setting('app.user_id')")) == "1"
        session.close()
        session.set_local({"app.tenant_id": None})
        assert has_none(session)


def test_the_function_may_read_from_the_session(engine: OptInEngine) -> None:
    seen: list[Any] = []

    def settings() -> dict[str, Any]:
        seen.append(tenant(session))
        return {"app.tenant_id": session.get_one(Author, 2).name}

    with OptInSession(engine, local_settings=settings) as session:
        assert tenant(session) == "Bob"
        session.close()
        with session.begin():
            session.add(Author(name="x"))
            assert tenant(session) == "Bob"
        session.close()
        session.add(Author(name="y"))
        session.commit()
        assert tenant(session) == "Bob"
    assert len(seen) == 3
    assert set(seen) <= {None, ""}


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("first", ["read", "flush", "commit", "connection", "savepoint"])
def test_the_function_may_be_asked_in_a_transaction_that_was_begun_for_other_code(
    engine: OptInEngine, wire: WireProxy, reads: bool, first: str
) -> None:
    """As for an atomic request, whose code finds out the tenant after the transaction has begun."""
    current: dict[str, int] = {}

    def settings() -> dict[str, int]:
        if reads:
            assert session.get_one(Author, 2).name == "Bob"
        return current

    with OptInSession(engine, local_settings=settings) as session:
        with wire.record() as recording, begin_before_settings(session):
            current["app.tenant_id"] = 7
            if first == "read":
                assert tenant(session) == "7"
            elif first == "connection":
                assert tenant(session.connection()) == "7"
            elif first == "savepoint":
                with session.begin_nested():
                    assert tenant(session) == "7"
            else:
                session.add(Author(name="x", age=TENANT_AS_NUMBER))
                if first == "flush":
                    session.flush()
        if first in ("flush", "commit"):
            assert session.scalars(sa.select(Author.age).filter_by(name="x")).one() == 7
        assert ("BEGIN" in recording.verbs) is (reads or first != "commit")
        with session.begin():
            assert tenant(session) == "7"


def test_if_the_function_fails_in_a_transaction_it_is_asked_again(engine: OptInEngine) -> None:
    answers: list[Any] = [Undo(), Undo(), {"app.tenant_id": 7}]
    with OptInSession(engine, local_settings=lambda: answer(answers)) as session:
        with begin_before_settings(session):
            with pytest.raises(Undo):
                tenant(session)
            session.add(Author(name="x", age=TENANT_AS_NUMBER))
            with pytest.raises(Undo):
                session.flush()
            assert tenant(session) == "7"
        assert session.scalars(sa.select(Author.age).filter_by(name="x")).one() == 7


def test_none_of_the_function_is_asked_again_until_there_are_settings(
    engine: OptInEngine,
) -> None:
    answers: list[Any] = [None, None, {"app.tenant_id": 7}]
    with OptInSession(engine, local_settings=lambda: answers.pop(0)) as session:
        assert has_none(session)
        with session.begin():  # the first statement inside asks again
            assert tenant(session) == "7"
        assert tenant(session) == "7"
    answers += [None, {"app.tenant_id": 8}]
    session = OptInSession(engine, local_settings=lambda: answers.pop(0))
    with session, session.begin():
        assert tenant(session) == "8"
    assert answers == []


@pytest.mark.parametrize("inside", [False, True])
def test_the_function_is_not_called_in_the_middle_of_a_flush(
    engine: OptInEngine, wire: WireProxy, inside: bool
) -> None:
    def settings() -> None:
        assert session.get_one(Author, 1).id == 1
        asked.append(len(session.new))

    asked: list[int] = []
    with OptInSession(engine, local_settings=settings) as session:
        if inside:
            session.begin()
        asked.clear()
        session.add_all([Author(name="x"), Author(name="y")])
        with wire.record() as recording:
            session.flush()
        assert set(asked) == {2}
        assert recording.verbs.index("SELECT") < recording.verbs.index("INSERT")
        assert recording.verbs.count("SELECT") == len(asked)
        session.commit()
    with OptInSession(engine) as session:
        stored = session.scalars(sa.select(Author.name).where(Author.name.in_(["x", "y"]))).all()
    assert sorted(stored) == ["x", "y"]


def test_no_settings_are_an_answer(engine: OptInEngine) -> None:
    answers: list[Any] = [{}]
    with OptInSession(engine, local_settings=lambda: answers.pop()) as session:
        assert has_none(session)
        assert has_none(session)


def test_an_answer_in_a_unit_of_work_stays_after_its_end(engine: OptInEngine) -> None:
    answers: list[Any] = [None, {"app.tenant_id": 7, "app.user_id": 1}]
    user = sa.text("SELECT current_setting('app.user_id', true)")

    @unit_of_work(sessionmaker(engine, class_=OptInSession), settings={"app.tenant_id": 8})
    def work(session: OptInSession) -> None:
        assert tenant(session) == "8"
        assert session.scalar(user) == "1"

    with OptInSession(engine, local_settings=lambda: answers.pop(0)) as session:
        work(session=session)  # type: ignore[call-arg]
        assert tenant(session) == "7"
        assert session.scalar(user) == "1"


def test_if_the_function_fails_nothing_is_sent_and_it_is_asked_again(engine: OptInEngine) -> None:
    answers: list[Any] = [Undo(), {"bad name": 1}, {"app.tenant_id": 7}]
    with OptInSession(engine, local_settings=lambda: answer(answers)) as session:
        with pytest.raises(Undo):
            tenant(session)
        with pytest.raises(exc.ArgumentError, match="bad name"):
            tenant(session)
        assert tenant(session) == "7"


def test_a_scoped_session_has_settings(sessions: Sessions) -> None:
    scope = OptInScopedSession(sessions)

    @scope.local_settings
    def settings() -> dict[str, int]:
        return {"app.tenant_id": 7}

    assert settings() == {"app.tenant_id": 7}
    assert tenant(scope) == "7"
    scope.set_local({"app.tenant_id": 8})
    assert tenant(scope) == "8"
    scope.remove()
    assert tenant(scope) == "7"
    scope.remove()


@pytest.mark.parametrize("source", [7, "x", {"app.tenant_id": 7}])
def test_what_is_no_function_is_refused(
    engine: OptInEngine, sessions: Sessions, source: Any
) -> None:
    with pytest.raises(exc.ArgumentError, match="function without parameters"):
        OptInSession(engine, local_settings=source)
    with pytest.raises(exc.ArgumentError, match="function without parameters"):
        OptInScopedSession(sessions).local_settings(source)


def test_a_factory_of_other_sessions_is_refused(engine: OptInEngine) -> None:
    stock: Any = sessionmaker(engine)
    factories: list[Any] = [stock, lambda: OptInSession(engine)]
    for factory in factories:
        with pytest.raises(exc.ArgumentError, match="sessionmaker of OptInSession"):
            OptInScopedSession(factory).local_settings(dict)
    with stock() as session:
        assert has_none(session)


def test_an_async_function_is_refused(engine: OptInEngine) -> None:
    async def settings() -> dict[str, int]:
        return {}

    refused: Any = settings
    with pytest.raises(exc.ArgumentError, match="not async"):
        OptInSession(engine, local_settings=refused)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (7, "takes a mapping"),
        ("app.tenant_id", "takes a mapping"),
        ([("app.tenant_id", 7)], "takes a mapping"),
        ({7: 7}, "for the name of a setting"),
        ({"": 7}, "for the name of a setting"),
        ({"app.tenant-id": 7}, "for the name of a setting"),
        ({"app.": 7}, "for the name of a setting"),
        ({"a'; DROP TABLE author; --": 7}, "for the name of a setting"),
        ({"app.tenant_id\n": 7}, "for the name of a setting"),
        ({"app.x": 7, "APP.X": 8}, "twice"),
        ({"app.x": object()}, "a value is a string, a number"),
        ({"app.x": [1]}, "a value is a string, a number"),
        ({"app.x": b"7"}, "a value is a string, a number"),
        ({"app.x": "a\0b"}, "null character"),
        ({"transaction_isolation": "serializable"}, "part of BEGIN"),
        ({"client_encoding": "latin1"}, "engine option"),
    ],
)
def test_settings_that_are_refused_change_nothing(
    session: OptInSession, settings: Any, message: str
) -> None:
    session.set_local({"app.tenant_id": 7})
    with pytest.raises(exc.ArgumentError, match=message):
        session.set_local(settings)
    if isinstance(settings, dict):
        with pytest.raises(exc.ArgumentError, match=message):
            session.set_local({"app.tenant_id": 8, **settings})
    assert tenant(session) == "7"


def test_a_stock_engine_is_refused(engine: OptInEngine, url: str) -> None:
    """Its statements would have none: better an error than rows of nobody, or of everybody."""
    stock = sa.create_engine(url)
    with OptInSession(stock) as session:
        session.set_local({"app.tenant_id": 7})
        with pytest.raises(exc.InvalidRequestError, match="another engine, or a Connection"):
            tenant(session)
        session.rollback()
        with pytest.raises(exc.InvalidRequestError, match="another engine"), session.begin():
            tenant(session)
    with OptInSession(stock) as session:
        tenant(session)
        with pytest.raises(exc.InvalidRequestError, match="another engine"):
            session.set_local({"app.tenant_id": 7})
        assert has_none(session)
    with engine.connect() as connection, OptInSession(connection) as session:
        session.set_local({"app.tenant_id": 7})
        with pytest.raises(exc.InvalidRequestError, match="a Connection"):
            tenant(session)
    stock.dispose()


# unit_of_work()


def test_a_unit_of_work_has_settings(sessions: Sessions) -> None:
    with unit_of_work(sessions, settings={"app.tenant_id": 7}) as session:
        assert tenant(session) == "7"
        with unit_of_work(sessions) as same:
            assert tenant(same) == "7"
        with unit_of_work(sessions, settings={"app.tenant_id": "7"}) as same:
            assert tenant(same) == "7"
        with (
            pytest.raises(exc.InvalidRequestError, match="joins the one around it"),
            unit_of_work(sessions, settings={"app.tenant_id": 8}),
        ):
            pass
        assert tenant(session) == "7"
    with unit_of_work(sessions) as session:
        assert has_none(session)


def test_a_function_decorated_with_a_unit_of_work_has_settings(sessions: Sessions) -> None:
    current = {"app.tenant_id": 1}

    @unit_of_work(sessions, settings=lambda: current)
    def who(session: OptInSession) -> str | None:
        return tenant(session)

    assert who() == "1"
    current["app.tenant_id"] = 2
    assert who() == "2"


def test_the_session_of_the_caller_has_its_own_settings_after_a_unit_of_work(
    sessions: Sessions,
) -> None:
    @unit_of_work(sessions, settings={"app.tenant_id": 7})
    def who(session: OptInSession) -> str | None:
        return tenant(session)

    with sessions() as session:
        assert who(session=session) == "7"  # type: ignore[call-arg]
        assert has_none(session)
        session.set_local({"app.tenant_id": 3})
        assert who(session=session) == "7"  # type: ignore[call-arg]
        assert tenant(session) == "3"


def test_bad_settings_of_a_unit_of_work_are_refused(
    sessions: Sessions, engine: OptInEngine
) -> None:
    bad: Any = {"bad name": 1}
    with pytest.raises(exc.ArgumentError, match="bad name"):
        unit_of_work(sessions, settings=bad)
    with pytest.raises(exc.ArgumentError, match="takes a mapping"):
        unit_of_work(sessions, settings=7)  # type: ignore[arg-type]
    stock = scoped_session(sessionmaker(engine, class_=Session))
    with (
        pytest.raises(TypeError, match="need an OptInSession"),
        unit_of_work(stock, settings={"app.tenant_id": 7}),
    ):
        pass
    stock.remove()
