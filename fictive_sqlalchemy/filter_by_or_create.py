"""The row that has certain values, or a new row: one row, even if many callers ask for it at once.

:func:`filter_by_or_create` leaves a row that it finds as it is, and :func:`update_or_create` gives
it new values.

Two callers may both search and find nothing. The unique constraint of the database decides which of
them creates the row. The other caller searches again, and gets the row that the first has created.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.orm import Session

from ._core.errors import see
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
    ``begin_on_write=True``, an object is always created inside: if no transaction is open, the call
    begins one, which stays open. A model with joined inheritance needs one INSERT for each table.

    The new object is stored by a flush of the session, with all that its constructor and listeners
    add or change.

    If many callers ask for the same new object at the same time, one creates it, and the others get
    it. This needs a unique constraint on what is searched for. If the conflicting row is deleted
    before it is found, the call tries to create the object again, and calls the functions among the
    defaults again. There are ten attempts at most.

    :param session: The session that searches, and that the object will belong to. Only an
        :class:`.OptInSession` whose bind is made by :func:`.create_engine` is ever outside.
    :param model: The mapped class.
    :param filters: The values to search for, as ``filter_by()`` takes them; a new object gets them.
        ``None`` is NULL, in the search and in the new row, whatever the default of the column.
    :param defaults: Further values for a new object, as its constructor takes them. A function
        without parameters is called only for a new object, and its result is used.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, if ``defaults`` is no
        mapping, if a related object is of another class, or if a default sets what is searched for,
        by the same name or another. Nothing is sent.
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of a given name, or if
        a related object can't be used here. Nothing is stored.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one object.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the new row. Inside, at REPEATABLE
        READ or SERIALIZABLE, the error is a serialization failure (SQLSTATE 40001) if a concurrent
        transaction has created a row that this transaction can't see. Then run the transaction
        again.
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

    If the object is found and has the values of the defaults, all that is sent is one SELECT. If
    the object is found outside a transaction with other values, it is stored when the call returns,
    in a transaction of its own: the UPDATE alone, or BEGIN, UPDATE and COMMIT if there is more to
    send or a listener to events. Other pending changes stay pending. Inside, the update is part of
    the transaction: the SELECT locks the row (FOR NO KEY UPDATE), and an error undoes the update
    alone (SAVEPOINT, UPDATE, RELEASE). If no object is found, it is created as by
    :func:`filter_by_or_create`. With ``begin_on_write=True``, the UPDATE begins the transaction.

    If many callers update at the same time, there is one row, and the last update wins as a whole,
    because the UPDATE sets each column that the defaults name. Outside, a function among the
    defaults may read an old value that another caller changes before the UPDATE. To avoid this, use
    an SQL expression, which the database evaluates (``{"visits": Page.visits + 1}``), or call
    ``update_or_create()`` inside a transaction.

    :param session: The session that searches, and that the object will belong to. If there are read
        replicas, the session reads from the primary from now on.
    :param model: The mapped class.
    :param filters: The values to search for, as :func:`filter_by_or_create` takes them.
    :param defaults: The values that the object gets, whether it is found or new. A function without
        parameters is called, and its result is used.
    :param create_defaults: The values that a new object gets in place of ``defaults``, unless it is
        ``None``.
    :returns: The object, and whether this call has created it.
    :raises sqlalchemy.exc.ArgumentError: if there is nothing to search for, if ``defaults`` or
        ``create_defaults`` is no mapping, if a related object is of another class, or if a default
        sets what is searched for, by the same name or another (nothing is sent), or by a related
        object with another key (nothing is stored).
    :raises sqlalchemy.exc.InvalidRequestError: if the model has no attribute of a given name, if an
        attribute of an object that is found can't be changed, such as a primary key, or if a
        related object can't be used here. Nothing is stored.
    :raises sqlalchemy.exc.MultipleResultsFound: if the search finds more than one object.
    :raises sqlalchemy.orm.exc.StaleDataError: if the UPDATE finds no row again and again.
    :raises sqlalchemy.exc.DBAPIError: if the database refuses the row, as with
        :func:`filter_by_or_create`.
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
            f"The defaults are a mapping from attribute names to values, not {defaults!r}."
            + see("what-is-searched")
        )
