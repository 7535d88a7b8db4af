"""The errors with which the database refuses a new row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

from sqlalchemy import Column, Index, PrimaryKeyConstraint, UniqueConstraint, exc

from .._core.errors import sqlstate

# https://www.postgresql.org/docs/current/errcodes-appendix.html
SERIALIZATION_FAILURE = "40001"
# Violations of a unique or an exclusion constraint: an existing row conflicts with the new row.
_TAKEN = ("23505", "23P01")


def is_taken(error: BaseException) -> TypeGuard[exc.IntegrityError]:
    """Tell whether the database refuses the new row because of an existing row."""
    # SQLite has no SQLSTATE. If another constraint is violated, the search finds no row.
    return isinstance(error, exc.IntegrityError) and sqlstate(error) in (None, *_TAKEN)


def is_serialization_failure(error: BaseException) -> TypeGuard[exc.DBAPIError]:
    """Tell whether an error is a serialization failure: the transaction should be run again."""
    return isinstance(error, exc.DBAPIError) and sqlstate(error) == SERIALIZATION_FAILURE


def columns_in_the_way(refusal: exc.DBAPIError, tables: Iterable[Any]) -> set[Column[Any]]:
    """Return the columns of the unique constraint that refuses the new row.

    :param refusal: The error of the database.
    :param tables: The tables that the new row is in.
    :returns: The columns; none if the metadata of these tables does not have the constraint.
    """
    name = getattr(getattr(refusal.orig, "diag", None), "constraint_name", None)
    for table in tables:
        for constraint in (*getattr(table, "constraints", ()), *getattr(table, "indexes", ())):
            if name is not None and name == _name_in_database(table, constraint):
                return {*constraint.columns}
    return set()


def _name_in_database(table: Any, constraint: Any) -> str | None:
    """Return the name of a unique constraint or index, or the name that PostgreSQL gives it."""
    if isinstance(constraint, Index):
        is_of_columns = all(isinstance(each, Column) for each in constraint.expressions)
        return constraint.name if constraint.unique and is_of_columns else None
    if not isinstance(constraint, (UniqueConstraint, PrimaryKeyConstraint)):
        return None
    if isinstance(constraint.name, str):
        return constraint.name
    if isinstance(constraint, PrimaryKeyConstraint):
        return f"{table.name}_pkey"
    return "_".join([table.name, *(column.name for column in constraint.columns), "key"])


def passing_over(insert: str) -> str:
    """Add ON CONFLICT DO NOTHING to an INSERT of SQLAlchemy's."""
    before, returning, after = insert.rpartition(" RETURNING ")
    if not returning:
        before, after = insert, ""
    return f"{before}\nON CONFLICT DO NOTHING{returning}{after}"
