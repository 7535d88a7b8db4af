"""What the app is told by the one who starts it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Options:
    """What the app is to do."""

    url: str
    replicas: list[str] = field(default_factory=list[str])
    begin_on_write: bool = False
    settings: bool = False
    """Whether each request sets a tenant with ``set_local()``."""
    record: str = ""
    """The file for the lines of ``report_requests()``; empty for no lines."""
    connect_args: dict[str, Any] = field(default_factory=dict[str, Any])

    def environment(self) -> dict[str, str]:
        """Return the environment variable that says this."""
        return {"CLUSTER": json.dumps(asdict(self))}
