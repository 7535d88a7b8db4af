"""Helpers of error messages and checks: the state of a mapped object, and lists of names."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import sqlalchemy
from sqlalchemy.orm import InstanceState


def state_of(instance: Any) -> InstanceState[Any]:
    """Return the ``InstanceState`` in which SQLAlchemy keeps the state of a mapped object.

    :param instance: The object.
    """
    state: InstanceState[Any] = sqlalchemy.inspect(instance)
    return state


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Return names for an error message: ``'one', 'two'``.

    :param names: The names.
    :param most: The greatest number of names that is shown; ``None`` for all.
    """
    return ", ".join(repr(name) for name in islice(names, most))
