"""A throw-away PgBouncer in front of a PostgreSQL server, from the program that the system has.

    with PgBouncer(server, default_pool_size=5) as bouncer:
        engine = sqlalchemy.create_engine(bouncer.url(url))

As with the server of :mod:`tests.postgres`, a *keeper* ends it and removes its directory when this
process ends, however that happens.
"""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg2
from sqlalchemy import make_url
from typing_extensions import Self

from tests.machine import find_program
from tests.postgres import PostgresServer

PROGRAM = find_program("pgbouncer")

# KILL, for other signals wait for the clients in one version and not in another.
_KEEPER = """
"$1" "$2/ini" >"$2/log" 2>&1 &
read -r _
kill -KILL $!
rm -rf -- "$2"
"""

_PATIENCE = 20.0


def version() -> tuple[int, int]:
    """The version of the program: ``(1, 24)``."""
    assert PROGRAM is not None
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


class PgBouncer:
    """PgBouncer in transaction mode, on a free port of 127.0.0.1.

    :param server: The server behind it, all of whose databases it offers.
    :param connect_query: What it sends on each new connection to the server.
    :param settings: What else stands under ``[pgbouncer]`` in its configuration.
    :raises RuntimeError: If it cannot be started; the text says why.
    """

    def __init__(
        self, server: PostgresServer, connect_query: str | None = None, **settings: Any
    ) -> None:
        assert PROGRAM is not None
        account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # it refuses to run as root
        self._directory = Path(tempfile.mkdtemp(prefix="fictive-pgbouncer-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        configuration = self._configuration(server, connect_query, settings)
        (self._directory / "ini").write_text(configuration)
        if account:
            os.chown(self._directory, account.pw_uid, account.pw_gid)
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "keeper", PROGRAM, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=self._directory,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
        self._console = self._connect_to_console()

    def _configuration(
        self, server: PostgresServer, connect_query: str | None, settings: dict[str, Any]
    ) -> str:
        behind = make_url(server.url())
        database = {
            "host": server.host,
            "port": server.port,
            "user": behind.username,
            "password": behind.password,
            "connect_query": connect_query and f"'{connect_query}'",
        }
        everything: dict[str, Any] = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            # Whoever comes: the line of the databases says who they are to the server.
            "auth_type": "any",
            "pool_mode": "transaction",
            "max_client_conn": 500,
            "server_login_retry": 1,  # 15 seconds, when a restart has made one fail
            "query_wait_timeout": 30,  # so that a test that would hang fails instead
            **settings,
        }
        return "\n".join(
            [
                "[databases]",
                "* = " + " ".join(f"{name}={value}" for name, value in database.items() if value),
                "[pgbouncer]",
                *(f"{name} = {value}" for name, value in everything.items()),
            ]
        )

    def _connect_to_console(self) -> Any:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                console = psycopg2.connect(
                    host="127.0.0.1",
                    port=self.port,
                    user="console",
                    dbname="pgbouncer",
                )
            except psycopg2.OperationalError:
                if time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                log = (self._directory / "log").read_text()
                self._keeper.communicate(b"stop\n")
                raise RuntimeError(f"PgBouncer does not start:\n{log}") from None
            console.autocommit = True
            return console

    def url(self, url: str) -> str:
        """The URL of a database, through PgBouncer.

        :param url: The same, straight to the server.
        """
        through = make_url(url).set(host="127.0.0.1", port=self.port)
        return through.render_as_string(hide_password=False)

    def show(self, what: str, database: str) -> list[dict[str, Any]]:
        """Ask the console: https://www.pgbouncer.org/usage.html#show-commands

        :param what: ``"SERVERS"``, ``"CLIENTS"`` or ``"POOLS"``.
        :param database: The rows of this database.
        """
        with self._console.cursor() as cursor:
            cursor.execute(f"SHOW {what}")
            names = [column[0] for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor]
        return [row for row in rows if row["database"] == database]

    def pool(self, database: str) -> dict[str, Any]:
        """The one row of ``SHOW POOLS`` for a database."""
        (row,) = self.show("POOLS", database)
        return row

    def pids(self, database: str) -> set[int]:
        """The server processes that it is connected to."""
        return {row["remote_pid"] for row in self.show("SERVERS", database)}

    def stop(self) -> None:
        """End it."""
        self._console.close()
        self._keeper.communicate(b"stop\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
