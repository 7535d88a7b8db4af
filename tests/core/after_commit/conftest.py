"""A fixture that notes which functions are called after the transactions of the session."""

from __future__ import annotations

import pytest

from fictive_sqlalchemy import OptInSession
from tests.core.after_commit.support import Calls


@pytest.fixture
def calls(session: OptInSession) -> Calls:
    return Calls(session)
