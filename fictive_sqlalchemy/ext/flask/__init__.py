"""Flask with transactions that you opt in to: for Flask-SQLAlchemy, and for plain SQLAlchemy."""

from typing import TYPE_CHECKING

from .scoped_session import current_session, flask_scoped_session

if TYPE_CHECKING:
    from .filter_by_or_create import FilterByOrCreateMixin
    from .opt_in_transaction import OptInTransactionMixin
else:

    def __getattr__(name: str) -> object:
        # Not before they are used: plain SQLAlchemy does without Flask-SQLAlchemy.
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
