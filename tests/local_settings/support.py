"""What the tests of ``set_local()`` ask the server."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.wire import Recording

TENANT = sa.text("SELECT current_setting('app.tenant_id', true)")
TIMEOUT = sa.text("SHOW statement_timeout")


def tenant(source: Session | sa.Connection | Any) -> str | None:
    """The tenant that the server sees; the empty string, or ``None``, is none."""
    found: str | None = source.scalar(TENANT)
    return found


def has_none(source: Any) -> bool:
    """Whether the server sees no tenant."""
    return tenant(source) in (None, "")


def transaction_status(recording: Recording) -> str:
    """What the server last said of the transaction: ``I`` for none, ``T`` for one that is open."""
    ready = [message for message in recording.messages if message.name == "ReadyForQuery"]
    return ready[-1].text if ready else "I"
