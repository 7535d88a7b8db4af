"""These are the ways in which a change of one object is a whole transaction."""

from __future__ import annotations

from collections.abc import Callable

from fictive_sqlalchemy import OptInSession

Way = Callable[[OptInSession, Callable[[], object]], None]


def block(session: OptInSession, change: Callable[[], object]) -> None:
    with session.begin():
        change()


def nested(session: OptInSession, change: Callable[[], object]) -> None:
    with session.begin_nested():
        change()


def atomic(session: OptInSession, change: Callable[[], object]) -> None:
    with session.atomic():
        change()


def begin_commit(session: OptInSession, change: Callable[[], object]) -> None:
    session.begin()
    change()
    session.commit()


def flush(session: OptInSession, change: Callable[[], object]) -> None:
    change()
    session.flush()


def commit(session: OptInSession, change: Callable[[], object]) -> None:
    change()
    session.commit()
