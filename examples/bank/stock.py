"""The same app on stock Flask-SQLAlchemy, for the demo to compare with.

The models and the views are the same to the letter. Two things differ: the extension, and how an
account is opened, because stock Flask-SQLAlchemy has no method for that.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError

from . import database

if TYPE_CHECKING:
    from .models import Account


def use_stock() -> None:
    """Put the bank's app on stock Flask-SQLAlchemy, before its models are imported."""
    stock = SQLAlchemy()
    _replace(database, db=stock, Model=stock.Model)

    from .models import Account

    _replace(Account, open=classmethod(open_account))


def _replace(owner: object, **attributes: object) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def open_account(cls: type[Account], owner: str, balance: Decimal) -> tuple[Account, bool]:
    """Do what ``Account.open`` does: search, insert, and search again if another was faster."""
    db = database.db
    account = cls.query.filter_by(owner=owner).one_or_none()
    if account is not None:
        return account, False
    account = cls(owner=owner, balance=balance)
    db.session.add(account)
    try:
        db.session.commit()
    except IntegrityError as error:
        db.session.rollback()
        account = cls.query.filter_by(owner=owner).one_or_none()
        if account is None:
            raise error
        return account, False
    return account, True
