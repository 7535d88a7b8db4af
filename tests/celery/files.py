"""A broker and results that are directories, for workers and for who sends them tasks.

Kombu and Celery have both. Theirs let a process find a file that is not written yet, and fail.
"""

# mypy: ignore-errors

from __future__ import annotations

import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import Any

from celery.backends import filesystem as backends
from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.encoding import ensure_bytes
from kombu.utils.json import dumps

TRANSPORT_ALIASES["files"] = f"{__name__}:Transport"


def write(file: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    written = file.with_name(f"{uuid.uuid4()}.new")
    written.write_bytes(content)
    os.replace(written, file)


class Channel(filesystem.Channel):
    """Kombu's own, with messages that are there as a whole."""

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}.{queue}.msg"
        write(Path(self.data_folder_out) / name, dumps(payload).encode())


class Transport(filesystem.Transport):
    """``files://``."""

    Channel = Channel


class Backend(backends.FilesystemBackend):
    """Celery's own, with results that are there as a whole, and a success that stays.

    A task that is to be tried again first sends itself again, and then stores the state RETRY. On a
    busy machine the second try has stored its success by then. Celery looks for a success before it
    stores another state, but not in one step.
    """

    def set(self: Any, key: Any, value: Any) -> None:
        file = Path(os.fsdecode(self._filename(key)))
        with (file.parent / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            is_stored = file.exists() and b'"status": "SUCCESS"' in file.read_bytes()
            if not is_stored:
                write(file, ensure_bytes(value))


def results(folder: Path) -> str:
    """Return the URL of a backend that keeps results in a directory."""
    return f"{Backend.__module__}:{Backend.__qualname__}+{folder.as_uri()}"
