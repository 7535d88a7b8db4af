"""Row 18 of the contract is about the log of ``echo=True``."""

# ruff: noqa: SIM117  # what raises is the block of a transaction, which has several lines

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import CompileError, DBAPIError, IntegrityError, InvalidRequestError

from fictive_sqlalchemy import OptInEngine, OptInSession
from tests.library import Author, Seat, Sessions, authors, opened, sent
from tests.wire import WireProxy

SCENES: dict[str, Callable[[OptInSession], None]] = {}


def scene(play: Callable[[OptInSession], None]) -> Callable[[OptInSession], None]:
    SCENES[play.__name__.replace("_", " ")] = play
    return play


@scene
def a_read(session: OptInSession) -> None:
    session.get(Author, 1)


@scene
def a_transaction(session: OptInSession) -> None:
    with session.begin():
        session.add(Author(name="new"))


@scene
def an_empty_transaction(session: OptInSession) -> None:
    with session.begin():
        pass


@scene
def an_empty_transaction_of_the_engine(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.begin():
        pass


@scene
def an_error_inside(session: OptInSession) -> None:
    with pytest.raises(IntegrityError), session.begin():
        session.execute(sa.insert(Author).values(name="Ada"))


@scene
def an_error_inside_before_anything_is_sent(session: OptInSession) -> None:
    with pytest.raises(CompileError), session.begin():
        session.execute(sa.insert(authors).values(nothing=1))


@scene
def an_error_outside(session: OptInSession) -> None:
    with pytest.raises(IntegrityError):
        session.execute(sa.insert(Author).values(name="Ada"))


@scene
def an_error_at_commit(session: OptInSession) -> None:
    session.add_all([Seat(place=1), Seat(place=1)])
    with pytest.raises(IntegrityError):
        session.commit()


@scene
def an_error_that_was_caught(session: OptInSession) -> None:
    with pytest.raises(InvalidRequestError), session.begin():
        with pytest.raises(IntegrityError):
            session.execute(sa.insert(Author).values(name="Ada"))


@scene
def a_savepoint(session: OptInSession) -> None:
    with session.begin(), session.begin_nested():
        session.add(Author(name="new"))


@scene
def a_rollback_outside(session: OptInSession) -> None:
    session.add(Author(name="new"))
    session.get(Author, 1)
    session.rollback()


@scene
def a_flush_outside(session: OptInSession) -> None:
    session.add(Author(name="new"))
    session.flush()


@scene
def a_bulk_insert(session: OptInSession) -> None:
    session.execute(sa.insert(Author), [{"name": "a"}, {"name": "b"}])


@scene
def a_core_write(session: OptInSession) -> None:
    session.execute(sa.update(Author).values(age=1))


@scene
def a_stream(session: OptInSession) -> None:
    session.scalars(sa.select(Author).execution_options(yield_per=1)).all()


@scene
def a_level(session: OptInSession) -> None:
    with session.begin(isolation_level="SERIALIZABLE"):
        session.get(Author, 1)


@scene
def a_connection(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.connect() as connection:
        connection.scalar(sa.text("SELECT 1"))
        connection.commit()
        with connection.begin():
            connection.scalar(sa.text("SELECT 1"))
        connection.rollback()


@scene
def a_transaction_whose_connection_is_lost(session: OptInSession) -> None:
    with pytest.raises(DBAPIError), session.begin():
        session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))


@scene
def a_connection_that_is_lost_outside(session: OptInSession) -> None:
    with pytest.raises(DBAPIError):
        session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))
    session.get(Author, 1)


@scene
def autocommit_by_name(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.execution_options(isolation_level="AUTOCOMMIT").begin() as connection:
        connection.scalar(sa.text("SELECT 1"))


@scene
def a_copy_of_the_engine(session: OptInSession) -> None:
    assert isinstance(session.bind, OptInEngine)
    with session.bind.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
        connection.scalar(sa.text("SELECT 1"))


@scene
def tables_that_are_made(session: OptInSession) -> None:
    sa.Table("made", sa.MetaData(), sa.Column("id", sa.Integer)).create(session.connection())


@scene
def a_transaction_that_is_not_ended(session: OptInSession) -> None:
    session.begin()
    session.add(Author(name="new"))
    session.flush()


class TestRow18TheLog:
    """It names each BEGIN, COMMIT and ROLLBACK that was sent, and no other."""

    @pytest.fixture
    def engine(self, library: None, wire_url: str) -> Iterator[OptInEngine]:
        with opened(wire_url) as engine:
            engine.echo = True
            yield engine
            engine.echo = False

    @staticmethod
    def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        assert not any("no effect" in line or "should not BEGIN" in line for line in lines)
        words = [line.split(maxsplit=1)[0] for line in lines if line.strip()]
        return [word for word in words if word in ("BEGIN", "COMMIT", "ROLLBACK")]

    @pytest.mark.parametrize("scene", SCENES)
    def test_the_log_says_what_really_happened(
        self,
        sessions: Sessions,
        wire: WireProxy,
        caplog: pytest.LogCaptureFixture,
        scene: str,
    ) -> None:
        with caplog.at_level(logging.INFO, "sqlalchemy.engine"), wire.record() as recording:
            with sessions() as session:
                SCENES[scene](session)
        assert self.logged(caplog) == [
            verb for verb in sent(recording) if verb in ("BEGIN", "COMMIT", "ROLLBACK")
        ]
