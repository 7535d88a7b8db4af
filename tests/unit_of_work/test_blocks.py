"""A block is a unit of work: it commits or rolls back as a whole, and closes its session."""

# ruff: noqa: PT012, SIM117  # what raises is the block of a unit, which has several lines

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from fictive_sqlalchemy import OptInEngine, OptInScopedSession, OptInSession, unit_of_work
from tests.core.test_autocommit import Interrupter, Interruption, chain
from tests.library import Author, Base, Onlooker, Seat, assert_at_rest, backend_pid, opened, sent
from tests.unit_of_work.support import Factory, assert_closed
from tests.wire import WireProxy


class TestABlock:
    def test_a_block_commits_and_closes_its_session(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with wire.record() as recording, unit_of_work(factory) as session:
            assert session.scalar(sa.select(Author.name).where(Author.id == 1)) == "Ada"
            session.add(Author(name="new"))
            session.flush()
            assert onlooker.names() == []
        assert onlooker.names() == ["new"]
        assert_closed(session, factory)
        ours = [one for one in recording.verbs if one != "DEALLOCATE"]
        assert [one for one in ours if one != "SELECT"] == ["BEGIN", "INSERT", "COMMIT"]

    def test_a_block_sends_nothing_when_it_is_empty(
        self, factory: Factory, wire: WireProxy
    ) -> None:
        with wire.record() as recording, unit_of_work(factory):
            pass
        assert recording.messages == []

    @pytest.mark.parametrize("way", ["return", "break", "continue"])
    def test_a_block_commits_however_it_is_left(
        self, factory: Factory, onlooker: Onlooker, way: str
    ) -> None:
        def leave() -> Session | None:
            for _ in range(1):
                with unit_of_work(factory) as session:
                    session.add(Author(name="new"))
                    left.append(session)
                    if way == "return":
                        return session
                    if way == "break":
                        break
                    continue
            return None

        left: list[Session] = []
        leave()
        assert onlooker.names() == ["new"]
        assert_closed(left[0], factory)

    @pytest.mark.parametrize(
        "error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]
    )
    def test_a_block_rolls_back_on_an_exception(
        self,
        factory: Factory,
        onlooker: Onlooker,
        wire: WireProxy,
        error: type[BaseException],
    ) -> None:
        mine = error("mine")
        with wire.record() as recording:
            with pytest.raises(error) as raised, unit_of_work(factory) as session:
                session.add(Author(name="new"))
                session.flush()
                raise mine
            assert raised.value is mine
        assert sent(recording) == ["BEGIN", "INSERT", "ROLLBACK"]
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_a_block_raises_what_the_database_says_at_its_end(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError), unit_of_work(factory) as session:
            session.add_all([Author(name="new"), Author(name="Ada")])
        assert_closed(session, factory)
        assert onlooker.names() == []
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_a_block_raises_what_the_database_says_to_commit(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(IntegrityError), unit_of_work(factory) as session:
            session.add_all([Seat(place=1), Seat(place=1), Author(name="new")])
            session.flush()
        assert_closed(session, factory)
        assert onlooker.names() == []

    @pytest.mark.parametrize("when", ["inside", "at commit"])
    def test_a_block_whose_server_dies_is_closed_and_the_next_one_works(
        self, factory: Factory, onlooker: Onlooker, when: str
    ) -> None:
        with pytest.raises(DBAPIError), unit_of_work(factory) as session:
            session.add(Author(name="new"))
            session.flush()
            onlooker.kill(backend_pid(session.connection()))
            if when == "inside":
                session.scalar(sa.select(Author.name))
        assert_closed(session, factory)
        with unit_of_work(factory) as session:
            session.add(Author(name="next"))
        assert onlooker.names() == ["next"]

    def test_a_block_in_which_an_error_was_caught_says_that_nothing_is_stored(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(PendingRollbackError) as raised, unit_of_work(factory) as session:
            session.add(Author(name="Ada"))
            with suppress(IntegrityError):
                session.flush()
        assert "begin_nested" in str(raised.value)
        assert_closed(session, factory)

    def test_a_block_goes_on_after_an_error_in_a_savepoint(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
            with suppress(IntegrityError), session.begin_nested():
                session.add(Author(name="Ada"))
        assert onlooker.names() == ["new"]

    def test_a_block_works_through_the_scoped_session(
        self, scope: OptInScopedSession[OptInSession], onlooker: Onlooker
    ) -> None:
        with unit_of_work(scope):
            scope.add(Author(name="new"))
        assert onlooker.names() == ["new"]
        assert not scope.registry.has()

    def test_a_block_can_not_be_entered_again(self, maker: sessionmaker[OptInSession]) -> None:
        unit = unit_of_work(maker)
        with unit, pytest.raises(InvalidRequestError, match="each time"), unit:
            pass
        with pytest.raises(InvalidRequestError, match="each time"), unit:
            pass

    def test_a_block_can_be_in_a_context_manager_that_is_a_generator(
        self, maker: sessionmaker[OptInSession], onlooker: Onlooker
    ) -> None:
        @contextmanager
        def library() -> Iterator[Session]:
            with unit_of_work(maker) as session:
                yield session

        with library() as session, unit_of_work(maker) as inner:
            assert inner is session
            session.add(Author(name="new"))
        with pytest.raises(ValueError, match="mine"), library() as session:
            session.add(Author(name="lost"))
            session.flush()
            raise ValueError("mine")
        assert onlooker.names() == ["new"]


class TestTheSessionAfterTheEnd:
    def test_the_session_refuses_to_be_used_after_the_end(
        self, engine: OptInEngine, stock: sa.Engine
    ) -> None:
        for maker in (sessionmaker(engine, class_=OptInSession), sessionmaker(stock)):
            with unit_of_work(maker) as session:
                pass
            for use in (session.begin, session.begin_nested):
                with pytest.raises(InvalidRequestError, match="permanently closed"):
                    use()
            with pytest.raises(InvalidRequestError, match="permanently closed"):
                session.add(Author(name="late"))
                session.commit()

    def test_objects_can_be_read_after_the_end_without_expiry(self, engine: OptInEngine) -> None:
        maker = sessionmaker(engine, class_=OptInSession, expire_on_commit=False)
        with unit_of_work(maker) as session:
            author = session.get_one(Author, 1)
        assert author.name == "Ada"


class TestABlockInABlock:
    def test_a_block_in_a_block_joins_as_a_savepoint(
        self, factory: Factory, onlooker: Onlooker, wire: WireProxy
    ) -> None:
        with wire.record() as recording, unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            with unit_of_work(factory) as inner:
                assert inner is session
                inner.add(Author(name="inner"))
            assert inner.in_transaction()
            assert onlooker.names() == []
        assert onlooker.names() == ["inner", "outer"]
        verbs = ["BEGIN", "INSERT", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"]
        assert sent(recording) == verbs
        assert_closed(session, factory)

    def test_a_block_in_a_block_undoes_just_itself_when_its_error_is_caught(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            session.add(Author(name="before"))
            for error in (IntegrityError, ZeroDivisionError):
                with suppress(error), unit_of_work(factory):
                    session.add(Author(name="inner"))
                    session.flush()
                    session.add(Author(name="Ada"))
                    if error is ZeroDivisionError:
                        raise error
            session.add(Author(name="after"))
        assert onlooker.names() == ["after", "before"]

    def test_a_block_in_a_block_undoes_all_when_its_error_is_not_caught(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(ZeroDivisionError), unit_of_work(factory) as session:
            session.add(Author(name="outer"))
            with unit_of_work(factory):
                session.add(Author(name="inner"))
                session.flush()
                raise ZeroDivisionError
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_a_block_in_a_block_is_undone_with_the_outer_one(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with pytest.raises(ZeroDivisionError), unit_of_work(factory) as session:
            with unit_of_work(factory):
                session.add(Author(name="inner"))
            raise ZeroDivisionError
        assert_closed(session, factory)
        assert onlooker.names() == []

    def test_a_block_of_the_third_level_undoes_just_itself(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with unit_of_work(factory) as session:
            with unit_of_work(factory):
                session.add(Author(name="second"))
                with suppress(ZeroDivisionError), unit_of_work(factory):
                    session.add(Author(name="third"))
                    session.flush()
                    raise ZeroDivisionError
            with unit_of_work(factory):
                session.add(Author(name="another"))
        assert onlooker.names() == ["another", "second"]

    def test_a_block_of_another_factory_is_another_unit(
        self, engine: OptInEngine, onlooker: Onlooker
    ) -> None:
        one, other = sessionmaker(engine), sessionmaker(engine, class_=OptInSession)
        with suppress(ZeroDivisionError), unit_of_work(one) as session:
            session.add(Author(name="one"))
            with unit_of_work(other) as inner:
                assert inner is not session
                inner.add(Author(name="other"))
            assert onlooker.names() == ["other"]
            raise ZeroDivisionError
        assert onlooker.names() == ["other"]

    def test_a_block_of_the_same_bound_method_joins(self, engine: OptInEngine) -> None:
        class Adapter:
            def session(self) -> OptInSession:
                return OptInSession(engine)

        adapter = Adapter()
        with unit_of_work(adapter.session) as session:
            with unit_of_work(adapter.session) as inner:
                assert inner is session
            with unit_of_work(Adapter().session) as other:
                assert other is not session

    def test_a_block_after_one_that_failed_is_a_unit_of_its_own(
        self, factory: Factory, onlooker: Onlooker
    ) -> None:
        with suppress(ZeroDivisionError), unit_of_work(factory):
            raise ZeroDivisionError
        with unit_of_work(factory) as session:
            session.add(Author(name="new"))
        assert onlooker.names() == ["new"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["sessionmaker", "scoped_session"])
def test_an_interruption_at_any_line_leaves_no_unit_open(
    url: str, onlooker: Onlooker, kind: str
) -> None:
    """Each line of the package that two nested blocks run is interrupted, at its first turn."""
    with opened(url) as engine:
        maker = sessionmaker(engine, class_=OptInSession)
        factory: Factory = maker if kind == "sessionmaker" else OptInScopedSession(maker)

        def work() -> None:
            with unit_of_work(factory) as session:
                session.add(Author(name="outer"))
                with unit_of_work(factory):
                    session.add(Author(name="inner"))

        def play(at: int | None) -> list[tuple[str, int]]:
            interrupter = Interrupter(at)
            try:
                interrupter.run(work)
            except BaseException as raised:
                if at is None or Interruption not in map(type, chain(raised)):
                    raise
            gc.collect()  # the interruption still keeps frames that had a session
            if isinstance(factory, scoped_session):
                factory.remove()
            return interrupter.lines

        play(None)
        onlooker.run("DELETE FROM author WHERE id > 3")
        lines = play(None)
        onlooker.run("DELETE FROM author WHERE id > 3")
        first: dict[tuple[str, int], int] = {}
        for turn, line in enumerate(lines):
            first.setdefault(line, turn)
        assert len(first) > 100
        for line, turn in first.items():
            play(turn)
            names = onlooker.names()
            assert names in ([], ["inner", "outer"]), line
            with unit_of_work(factory) as session:
                session.add(Author(name="next"))
            assert onlooker.names() == sorted([*names, "next"]), line
            onlooker.run("DELETE FROM author WHERE id > 3")
            assert_at_rest(engine)


def test_an_error_that_was_caught_inside_is_no_silent_loss_with_sqlalchemys_own_sessions(
    url: str, onlooker: Onlooker
) -> None:
    """PostgreSQL answers COMMIT with ROLLBACK then, and no driver says so."""
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    with pytest.raises(PendingRollbackError, match="Nothing of this block was stored"):
        with unit_of_work(sessionmaker(engine)) as session:
            session.execute(sa.insert(Author).values(name="lost"))
            with suppress(DBAPIError):
                session.execute(sa.text("SELECT 1 / 0"))
    with unit_of_work(sessionmaker(engine)) as session:
        session.execute(sa.insert(Author).values(name="kept"))
    assert onlooker.names() == ["kept"]
    engine.dispose()
