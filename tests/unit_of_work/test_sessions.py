"""A unit of work can use a session that already exists, and works with scoped sessions."""

# ruff: noqa: SIM117  # what raises is the block of a unit, which has several lines

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from fictive_sqlalchemy.ext.flask.scoped_session import current_session, flask_scoped_session
from tests.library import Author, Onlooker, checked_out
from tests.wire import WireProxy


class TestASessionThatSomebodyElseHasMade:
    def test_a_session_of_a_scope_keeps_its_objects_and_gives_its_connection_back(
        self, engine: OptInEngine, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        author = scope.get_one(Author, 1)
        with unit_of_work(scope) as session:
            assert session is scope()
            author.name = "Augusta"
        assert checked_out(engine) == 0
        assert onlooker.names() == ["Augusta"]
        assert author in scope
        assert author.name == "Augusta"

    def test_a_transaction_that_somebody_else_has_begun_is_joined(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with scope.begin():
            with unit_of_work(scope) as session:
                session.add(Author(name="new"))
            assert session.in_transaction()
            with suppress(ZeroDivisionError), unit_of_work(scope) as session:
                session.add(Author(name="lost"))
                raise ZeroDivisionError
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]

    def test_a_transaction_that_somebody_else_has_begun_on_stock_is_joined(
        self, stock: sa.Engine, onlooker: Onlooker
    ) -> None:
        scope = scoped_session(sessionmaker(stock))
        with scope.begin():
            with unit_of_work(scope) as session:
                session.add(Author(name="new"))
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]
        scope.remove()

    def test_a_session_on_which_sqlalchemy_has_begun_by_itself_is_refused(
        self, stock: sa.Engine, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        scope = scoped_session(sessionmaker(stock))
        scope.add(Author(name="new"))
        scope.flush()
        with wire.record() as recording:
            with pytest.raises(InvalidRequestError, match="OptInSession"), unit_of_work(scope):
                pytest.fail("it began")
        assert recording.messages == []
        scope.commit()
        assert onlooker.names() == ["new"]
        scope.remove()

    def test_a_block_in_another_scope_is_another_unit(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        here = ["one"]
        scope = OptInScopedSession(maker, scopefunc=lambda: here[0])
        with suppress(ZeroDivisionError), unit_of_work(scope) as session:
            session.add(Author(name="one"))
            here[0] = "two"
            with unit_of_work(scope) as other:
                assert other is not session
                other.add(Author(name="two"))
            assert not scope.registry.has()
            here[0] = "one"
            assert scope() is session
            raise ZeroDivisionError
        assert not scope.registry.has()
        assert onlooker.names() == ["two"]

    def test_a_session_whose_scope_has_gone_is_closed(
        self, engine: OptInEngine, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        here = ["one"]

        def where() -> str:
            if not here:
                raise RuntimeError("outside of any scope")
            return here[0]

        scope = OptInScopedSession(maker, scopefunc=where)
        with unit_of_work(scope) as session:
            session.add(Author(name="new"))
            here.clear()
        assert checked_out(engine) == 0
        assert onlooker.names() == ["new"]
        with pytest.raises(RuntimeError, match="outside of any scope"), unit_of_work(scope):
            pytest.fail("it began")


class TestWhatElseASessionCanDo:
    def test_set_rollback_rolls_a_unit_back_without_an_error(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(maker) as session:
            session.add(Author(name="outer"))
            with unit_of_work(maker):
                session.add(Author(name="inner"))
                session.set_rollback()
        assert onlooker.names() == ["outer"]
        with unit_of_work(maker) as session:
            session.add(Author(name="lost"))
            session.set_rollback()
        assert onlooker.names() == ["outer"]

    def test_atomic_works_inside_and_around_a_unit(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(scope), suppress(ZeroDivisionError), scope.atomic():
            scope.add(Author(name="lost"))
            raise ZeroDivisionError
        with scope.atomic():
            with unit_of_work(scope):
                scope.add(Author(name="new"))
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]

    @pytest.mark.parametrize("fails", [False, True])
    def test_services_called_after_the_end_are_units_of_their_own(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker, fails: bool
    ) -> None:
        def add(session: OptInSession, name: str) -> None:
            session.add(Author(name=name))

        factories: list[Callable[[], OptInSession]] = [maker, OptInScopedSession(maker)]
        for factory in factories:
            service = unit_of_work(factory)(add)
            with suppress(ZeroDivisionError), unit_of_work(factory) as session:
                session.on_commit(partial(service, "committed"))
                session.on_rollback(partial(service, "rolled back"))
                session.add(Author(name="new"))
                session.flush()
                if fails:
                    raise ZeroDivisionError
            assert onlooker.names() == (["rolled back"] if fails else ["committed", "new"])
            onlooker.run("DELETE FROM author WHERE id > 3")

    def test_services_that_a_listener_calls_before_the_end_join(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        def audit(session: Session) -> None:
            with unit_of_work(maker) as joined:
                assert joined is session
                joined.add(Author(name="audited"))

        with unit_of_work(maker) as session:
            event.listen(session, "before_commit", audit, once=True)
            session.add(Author(name="new"))
        assert onlooker.names() == ["audited", "new"]


class TestInFlask:
    def test_the_proxy_of_a_flask_scoped_session_is_a_factory(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        app = Flask(__name__)
        flask_scoped_session(maker, app)

        @unit_of_work(current_session)
        def add(session: OptInSession, name: str, outer: Session | None = None) -> None:
            assert outer is None or session is outer
            session.add(Author(name=name))

        with pytest.raises(RuntimeError, match="app_context"):
            add("new")
        with app.app_context():
            add("one")
            assert not current_session.registry.has()
            author = current_session.get_one(Author, 1)
            with unit_of_work(current_session) as session:
                add("two", session)
                with app.app_context(), suppress(ZeroDivisionError):
                    with unit_of_work(current_session) as other:
                        assert other is not session
                        add("lost", other)
                        raise ZeroDivisionError
            assert author in current_session
        assert onlooker.names() == ["one", "two"]
