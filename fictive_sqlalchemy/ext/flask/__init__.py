"""Flask-SQLAlchemy with transactions that you opt in to."""

from .filter_by_or_create import FilterByOrCreateMixin
from .opt_in_transaction import OptInTransactionMixin

__all__ = ["FilterByOrCreateMixin", "OptInTransactionMixin"]
