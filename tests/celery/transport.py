"""A broker that is a directory, for workers and for who sends them tasks."""

# mypy: ignore-errors

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps

TRANSPORT_ALIASES["files"] = f"{__name__}:Transport"


class Channel(filesystem.Channel):
    """Kombu's own, which lets a worker find a message that is not written yet, and crash."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        folder = Path(self.data_folder_out)
        written = folder / f"{uuid.uuid4()}.new"
        written.write_text(dumps(payload))
        os.rename(written, folder / f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg")


class Transport(filesystem.Transport):
    """Messages are files, each of which is there as a whole or not at all."""

    Channel = Channel
