"""Flask with transactions that you opt in to: for Flask-SQLAlchemy, and for plain SQLAlchemy."""

from typing import TYPE_CHECKING

from ..._extras import FLASK, installed_by

with installed_by(FLASK):
    from .scoped_session import current_session, flask_scoped_session

if TYPE_CHECKING:
    from .filter_by_or_create import FilterByOrCreateMixin
    from .opt_in_transaction import OptInTransactionMixin
else:

    def __getattr__(name: str) -> object:
        # The mixins are imported when they are used: plain SQLAlchemy needs no Flask-SQLAlchemy.
        with installed_by(FLASK):
            if name == "FilterByOrCreateMixin":
                from .filter_by_or_create import FilterByOrCreateMixin as found
            elif name == "OptInTransactionMixin":
                from .opt_in_transaction import OptInTransactionMixin as found
            else:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            return found


__all__ = [
    "FilterByOrCreateMixin",
    "OptInTransactionMixin",
    "current_session",
    "flask_scoped_session",
]
