"""Classes for making new resources: an extension of your own, a session class of your own.

For the resources that are made already see :mod:`fictive_sqlalchemy.ext.flask.shared`.
"""

from flask_sqlalchemy import SQLAlchemy as FlaskSQLAlchemy

from .filter_by_or_create import FilterByOrCreateMixin
from .opt_in_transaction import OptInTransactionMixin, Session

__all__ = ["SQLAlchemy", "Session"]


class SQLAlchemy(OptInTransactionMixin, FilterByOrCreateMixin, FlaskSQLAlchemy):
    """Flask-SQLAlchemy whose reads run untransacted.

    Its models have ``filter_by_or_create`` and ``update_or_create``. It takes the arguments of
    ``flask_sqlalchemy.SQLAlchemy``.
    """
