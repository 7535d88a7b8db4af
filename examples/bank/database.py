"""The extension."""

from flask_sqlalchemy import SQLAlchemy

from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    """Reads run untransacted; ``with db.session.begin():`` is a transaction."""


db = Database()
