"""The row that has these values, or a new one: one row, however many ask for it at the same time.

:func:`filter_by_or_create` leaves a row that it finds as it is, and :func:`update_or_create` gives
it new values.

Two callers may both search and find nothing. The unique constraint of the database decides which of
them creates the row, and the other one searches again and gets what the first has created.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.orm import Session

from ._find_or_create.find import FindOrCreate
from ._find_or_create.update import UpdateOrCreate

T = TypeVar("T")


def filter_by_or_create(
    session: Session,
    model: type[T],
    filters: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> tuple[T, bool]:
    """Return the one object that has the values of ``filters``, or create it.

    If the search finds the object, all that is sent is one SELECT. Outside a transaction, a new
    object is stored when the call returns, in a transaction of its own: the INSERT alone, or BEGIN,
    INSERT and COMMIT in some cases. Other pending changes stay pending. Inside, the new object is
    part of the transaction (SAVEPOINT, INSERT, RELEASE), so that an error undoes nothing else. With
    ``begin_on_write=True``, an object is always created inside: if no transaction is open, this
    begins one, which stays open. A model with joined inheritance needs one INSERT for each table.

    The new object is stored by a flush of the session, with all that its constructor and listeners
    add or change.

    However many ask for the same new object at the same time, one creates it and the others get it.
    This needs a unique constraint on what is searched for. If the row in the way is deleted before
    it is found, the object is created again, ten times at most, and functions are called again.

    :param session: Where to search, and what the object will belong to. Only an
        :class:`.OptInSession` whose bind is made by :func:`.create_engine` is ever outside.
    :param model: The mapped class.
    :param filters: The values to search for, as ``filter_by()`` takes them; a new object gets them.
        ``None`` is NULL, in the search and in the new row, whatever the default of the column.
    :param defaults: What else a new object gets, as its constructor takes it. A function without
        parameters is called for a new object alone, and what it returns is used.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or a default is for
        what is searched for, by the same name or another. Nothing is sent.
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of that name, or a
        related object can't be used here. Nothing is stored.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the new row. Inside, at REPEATABLE
        READ or SERIALIZABLE, this is a serialization failure (SQLSTATE 40001) if a concurrent
        transaction has created a row that this one can't see: run the transaction again.
    """
    _check_defaults(defaults)
    wanted = FindOrCreate(session, model, filters, defaults)
    wanted.check()
    found = wanted.find()
    return (found, False) if found is not None else wanted.create()


def update_or_create(
    session: Session,
    model: type[T],
    filters: Mapping[str, Any],
    defaults: Mapping[str, Any],
    create_defaults: Mapping[str, Any] | None = None,
) -> tuple[T, bool]:
    """Update the one object that has the values of ``filters``, or create it.

    What goes over the wire: a SELECT, and nothing else if the object is found and has the values of
    the defaults. Found outside a transaction with other values, the object is stored when the call
    returns, in a transaction of its own (the UPDATE alone; BEGIN, UPDATE, COMMIT where there is
    more, or somebody listens), and all that waits in the session goes on waiting. Found inside, it
    is part of the transaction: the SELECT locks the row (FOR NO KEY UPDATE), and an error undoes
    the update alone (SAVEPOINT, UPDATE, RELEASE). If there is none, it is created as by
    :func:`filter_by_or_create`. With ``begin_on_write=True`` the UPDATE begins the transaction.

    However many call at the same time, there is one row, and the last update wins as a whole: the
    UPDATE sets each column that the defaults name. Outside, a function that reads the old value may
    read one that is changed before the UPDATE. Use an SQL expression for that
    (``{"visits": Page.visits + 1}``), which the database evaluates, or call it inside.

    :param session: Where to search, and what the object belongs to. With read replicas, it reads
        from the primary from now on.
    :param model: The mapped class.
    :param filters: The values to search for, as :func:`filter_by_or_create` takes them.
    :param defaults: What the object gets, whether it is found or new. A function without parameters
        is called, and what it returns is used.
    :param create_defaults: What a new object gets in place of ``defaults``, unless it is ``None``.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, or a default is for
        what is searched for, by the same name or another (nothing is sent), or as a related object
        with another key (nothing is stored).
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of that name, an
        object that is found can't get another value of it, such as a primary key, or a related
        object can't be used here. Nothing is stored.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one.
    :raises sqlalchemy.orm.exc.StaleDataError: if the UPDATE finds no row again and again.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the row, as
        :func:`filter_by_or_create` raises it.
    """
    _check_defaults(defaults)
    if create_defaults is not None:
        _check_defaults(create_defaults)
    wanted = UpdateOrCreate(session, model, filters, defaults, create_defaults)
    wanted.check()
    return wanted.find_and_update()


def _check_defaults(defaults: object) -> None:
    if not isinstance(defaults, Mapping):
        raise exc.ArgumentError(
            f"The defaults are the values of the object by their names, not {defaults!r}."
        )
