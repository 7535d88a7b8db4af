"""The same app on stock Flask-SQLAlchemy, for the demo to compare with.

The models and the views are the same to the letter. Two things are not: the extension, and how an
account is opened, for which stock has nothing ready.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.exc import IntegrityError

from . import database

if TYPE_CHECKING:
    from .models import Account


def use_stock() -> None:
    """Make the bank's app one on stock Flask-SQLAlchemy. Only before its models are imported."""
    stock: Any = SQLAlchemy()
    database.db = stock

    from .models import Account

    Account.open = classmethod(open_account)  # type: ignore[assignment]


def open_account(cls: Any, owner: str, balance: Decimal) -> tuple[Account, bool]:
    """Do what ``Account.open`` does: look, insert, and look again if another was faster."""
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
