"""The tasks of these tests run in this process: here are their tables and their Celery app."""

# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Mapped, mapped_column

from fictive_sqlalchemy.ext.celery import DatabaseTask
from tests.flask.support import Database
from tests.library import Onlooker

db: Any = Database()


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Seat(db.Model):
    """Its constraint is checked at COMMIT."""

    __table_args__ = (sa.UniqueConstraint("place", deferrable=True, initially="DEFERRED"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int]


def celery_of(task_cls: type[DatabaseTask], **settings: Any) -> Any:
    """A Celery app that no other test sees."""
    celery: Any = Celery("tests", task_cls=task_cls, set_as_current=False)
    celery.conf.update(broker_url="memory://", result_backend="cache+memory://", **settings)
    return celery


def items(onlooker: Onlooker) -> list[str]:
    return onlooker.column("SELECT name FROM item WHERE name <> 'one' ORDER BY name")
