"""Functions that fail a given number of times, and are retried without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity import wait_none

from fictive_sqlalchemy.ext.tenacity import retry_transaction
from tests.library import Author

FAILS_TO_SERIALIZE = "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$"


class BankBase(DeclarativeBase):
    pass


class Account(BankBase):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


def retried(session: Any, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Retry without waiting."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        decorator: Any = retry_transaction(session, **options)
        call = decorator(function)
        call.retry.wait = wait_none()
        decorated: Callable[..., Any] = call
        return decorated

    return decorate


class Fails:
    """Run a statement that fails, so many times."""

    def __init__(self, session: Session, times: int, sql: str = FAILS_TO_SERIALIZE) -> None:
        self.session = session
        self.times = times
        self.sql = sql
        self.tries = 0

    def __call__(self) -> int:
        self.tries += 1
        self.session.add(Author(name=f"try {self.tries}"))
        self.session.flush()
        if self.tries <= self.times:
            self.session.execute(sa.text(self.sql))
        return self.tries
