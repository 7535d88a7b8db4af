"""What tests ask of the machine they run on: its programs and its ports."""

from __future__ import annotations

import os
import shutil
import socket

# Debian keeps the programs of servers where only root looks.
_SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def find_program(name: str) -> str | None:
    """Return the path of a program, or ``None`` if the machine does not have the program."""
    return shutil.which(name, path=_SEARCHED)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
