"""Recognize the statements that isolation has to treat in a special way, without a full parser."""

from __future__ import annotations

import re

# The effect of these statements ends with the transaction, although they write no row.
_BOUND_TO_TRANSACTION = re.compile(r"\b(?:SAVEPOINT|SET|set_config)\b", re.IGNORECASE)


def is_bound_to_transaction(query: str) -> bool:
    """Tell whether a rollback undoes something of a statement even if it writes no row.

    :param query: The SQL. A string that only looks like such a statement counts as one.
    """
    return _BOUND_TO_TRANSACTION.search(query) is not None
