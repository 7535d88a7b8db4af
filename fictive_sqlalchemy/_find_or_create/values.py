"""The kinds of values with which ``filter_by_or_create()`` is called."""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState
from sqlalchemy.types import TypeDecorator


def mapped_state(value: Any) -> InstanceState[Any] | None:
    """Return the state of an object of a mapped class; ``None`` for anything else."""
    state: Any = inspect(value, raiseerr=False)
    return state if isinstance(state, InstanceState) else None  # pyright: ignore


def is_function(value: Any) -> bool:
    """Tell whether a default is a function that has to be called for the value."""
    return callable(value) and mapped_state(value) is None


def may_store_none_otherwise(attribute: Any) -> bool:
    """Tell whether None may be stored as something other than NULL."""
    column: Any = attribute.columns[0]
    if not hasattr(column, "server_default"):
        return False  # an SQL expression, which is not stored
    return (
        column.default is not None
        or column.server_default is not None
        or column.type.should_evaluate_none  # JSON
        or isinstance(column.type, TypeDecorator)
    )
