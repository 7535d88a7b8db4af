"""What error messages and checks need to know of mapped objects and their attributes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import sqlalchemy
from sqlalchemy.orm import InstanceState


def state_of(instance: Any) -> InstanceState[Any]:
    """Return what SQLAlchemy knows of a mapped object.

    :param instance: The object.
    """
    state: InstanceState[Any] = sqlalchemy.inspect(instance)
    return state


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Return names for an error message: ``'one', 'two'``.

    :param names: The names.
    :param most: How many of them are shown.
    """
    return ", ".join(repr(name) for name in islice(names, most))
