"""The programs that the cluster is made of: where they are, and how to get them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.machine import find_program

PACKAGES = ("patroni", "etcd-server", "haproxy", "pgbouncer", "postgresql")
_LEAST_POSTGRES = 15


class Missing(Exception):
    """Something that the cluster needs is not there; the text says what."""


def program(name: str) -> str:
    """Return the path of a program.

    :param name: Its name.
    :raises Missing: If there is none.
    """
    found = find_program(name)
    if found is None:
        raise Missing(name)
    return found


def postgres() -> Path:
    """Return the directory of the newest PostgreSQL's programs.

    :raises Missing: If there is none, or only an old one.
    """
    candidates = list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = find_program("postgres")
    if on_path is not None:
        candidates.append(Path(on_path).resolve())
    versions = {_version(path): path.parent for path in candidates}
    newest = max(versions, default=0)
    if newest < _LEAST_POSTGRES:
        raise Missing(f"PostgreSQL {_LEAST_POSTGRES} or newer")
    return versions[newest]


def get_all() -> None:
    """Install what is missing, if this is Debian and we may.

    :raises Missing: If something is missing all the same; the text is a sentence.
    """
    lacking = missing()
    if lacking and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "--quiet", *arguments], check=False, env=environment)
        lacking = missing()
    if lacking:
        raise Missing(
            f"The cluster needs {', '.join(lacking)}: install it. On Debian, root does it with "
            f"`apt-get install {' '.join(PACKAGES)}`."
        )


def missing() -> list[str]:
    """Return the names of what is not there."""
    lacking: list[str] = []
    looks: list[Callable[[], object]] = [*(partial(program, name) for name in _NAMES), postgres]
    for look in looks:
        try:
            look()
        except Missing as error:
            lacking.append(str(error))
    return lacking


_NAMES = ("patroni", "etcd", "haproxy", "pgbouncer")


def _version(path: Path) -> int:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)", said)
    return int(found[1]) if found else 0
