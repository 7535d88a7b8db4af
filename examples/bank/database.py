"""The extension, and the base class of the models."""

from typing import TYPE_CHECKING

from flask_sqlalchemy import SQLAlchemy

from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    """Reads are sent alone; ``with db.session.begin():`` is a transaction."""


db = Database()

if TYPE_CHECKING:  # mypy takes no attribute of an object as a base class
    from fictive_sqlalchemy.ext.flask.shared import Model as Model
else:
    Model = db.Model
