"""PostgreSQL transactions that you opt in to, for SQLAlchemy and Flask-SQLAlchemy.

Reads are sent alone; ``with session.begin():`` is a transaction.
"""

from ._core.connection import OptInConnection
from ._core.create import create_engine, engine_from_config
from ._core.engine import OptInEngine
from ._core.errors import CommitOutcomeUnknown, TransactionTimeout
from ._core.options import IsolationLevel
from ._core.server_state import SessionStateWarning
from ._core.session import OptInSession
from ._core.transactions import TRANSACTION_CONNECTIONS
from .active_record import ActiveRecordMixin
from .scoped_session import OptInScopedSession
from .unit_of_work import unit_of_work

__version__ = "0.1.0"

__all__ = [
    "TRANSACTION_CONNECTIONS",
    "ActiveRecordMixin",
    "CommitOutcomeUnknown",
    "IsolationLevel",
    "OptInConnection",
    "OptInEngine",
    "OptInScopedSession",
    "OptInSession",
    "SessionStateWarning",
    "TransactionTimeout",
    "create_engine",
    "engine_from_config",
    "unit_of_work",
]
