"""Classes for resources of your own: an extension, and a session class.

For ready-made resources, see :mod:`fictive_sqlalchemy.ext.flask.shared`.
"""

from ..._extras import FLASK, installed_by

with installed_by(FLASK):
    from flask_sqlalchemy import SQLAlchemy as FlaskSQLAlchemy

    from .filter_by_or_create import FilterByOrCreateMixin
    from .opt_in_transaction import OptInTransactionMixin, Session

__all__ = ["SQLAlchemy", "Session"]


class SQLAlchemy(OptInTransactionMixin, FilterByOrCreateMixin, FlaskSQLAlchemy):
    """Flask-SQLAlchemy whose reads are sent alone, without a transaction.

    Its models have ``filter_by_or_create`` and ``update_or_create``. The class takes the arguments
    of ``flask_sqlalchemy.SQLAlchemy``.
    """
