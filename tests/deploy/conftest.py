"""The fixtures of the tests with a real gunicorn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.running import Serve, Served
from tests.library import Onlooker


@pytest.fixture
def onlooker(url: str) -> Iterator[Onlooker]:
    """Another connection to the database, in which there is a table of :mod:`.served`."""
    onlooker = Onlooker(url)
    onlooker.run("CREATE TABLE counted (id integer PRIMARY KEY, number integer NOT NULL)")
    onlooker.run("INSERT INTO counted VALUES (1, 7)")
    yield onlooker
    onlooker.close()


@pytest.fixture
def serve(url: str, onlooker: Onlooker, tmp_path: Path) -> Iterator[Serve]:
    """``serve(**settings)``, see :class:`Served`: a gunicorn that is ended after the test."""
    with ExitStack() as cleanup:

        def serve(**settings: Any) -> Served:
            served = Served(tmp_path, url, **settings)
            cleanup.callback(served.stop)
            return served

        yield serve
