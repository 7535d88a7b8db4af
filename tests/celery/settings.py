"""How the worker of the tests and who sends it tasks are configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery import Celery

import tests.celery.files  # noqa: F401  # it is what files:// means


def configure(celery: Celery[Any], broker: str, backend: str, folder: Path) -> None:
    """Configure the Celery app of a worker, or the one that sends it tasks."""
    options: dict[str, Any] = {}
    if broker.startswith("files:"):
        queue, control = folder / "queue", folder / "control"
        queue.mkdir(exist_ok=True)
        control.mkdir(exist_ok=True)
        options = {
            "data_folder_in": str(queue),
            "data_folder_out": str(queue),
            "control_folder": str(control),
            "polling_interval": 0.02,
        }
    celery.conf.update(
        broker_url=broker,
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        result_backend=backend,
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
    )
