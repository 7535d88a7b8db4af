"""The extension under test, and how to say what went over the wire."""

from __future__ import annotations

import re

from flask_sqlalchemy import SQLAlchemy

from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin
from tests.wire import Recording

_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+\"?(\w+)\"?", re.IGNORECASE)


class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
    """Reads run untransacted; `with db.session.begin():` is a transaction."""


def sent(recording: Recording) -> list[str]:
    """What a recording holds, as ``["BEGIN", "SELECT users", "UPDATE users", "COMMIT"]``."""
    found = []
    for verb, statement in zip(recording.verbs, recording.statements, strict=True):
        table = _TABLE.search(statement)
        found.append(f"{verb} {table[1]}" if table else verb)
    return found
