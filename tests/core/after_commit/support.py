"""These tests note each call, and begin and end transactions in several ways."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fictive_sqlalchemy import OptInSession, unit_of_work
from tests.library import Undo


class Calls(list[str]):
    """What was called, and that it was called outside."""

    def __init__(self, session: OptInSession) -> None:
        super().__init__()
        self._session = session

    def note(self, name: str) -> None:
        assert not self._session.in_transaction()
        self.append(name)

    def watch(self, name: str) -> None:
        """Register one for each outcome."""
        self._session.on_commit(partial(self.note, f"{name} committed"))
        self._session.on_rollback(partial(self.note, f"{name} rolled back"))


def fail(error: BaseException) -> None:
    raise error


def by_block(session: OptInSession) -> Any:
    return session.begin()


@contextmanager
def by_hand(session: OptInSession) -> Generator[None]:
    session.begin()
    try:
        yield
    except BaseException:
        session.rollback()
        raise
    session.commit()


@contextmanager
def by_transaction(session: OptInSession) -> Generator[None]:
    transaction = session.begin()
    try:
        yield
    except BaseException:
        transaction.rollback()
        raise
    transaction.commit()


@contextmanager
def that_allows_commit_inside(session: OptInSession) -> Generator[None]:
    """As SQLAlchemy does, and a session with ``begin_on_write=True``."""
    session.begins_on_write = True
    try:
        yield
    finally:
        session.begins_on_write = False


@contextmanager
def by_end_inside(session: OptInSession) -> Generator[None]:
    with that_allows_commit_inside(session), session.begin():
        try:
            yield
        except Undo:
            session.rollback()
        else:
            session.commit()


def by_atomic(session: OptInSession) -> Any:
    return session.atomic()


def by_unit(session: OptInSession) -> Any:
    return unit_of_work(lambda: session)


def by_begin_nested(session: OptInSession) -> Any:
    return session.begin_nested()


WAYS = [by_block, by_hand, by_transaction, by_end_inside, by_atomic, by_unit, by_begin_nested]
