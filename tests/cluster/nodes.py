"""One PostgreSQL server, and the Patroni beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psycopg2

#: The bank's database, and the role that its app connects as.
DATABASE = "bank"
USER = "bank"


@dataclass(frozen=True)
class Node:
    """One PostgreSQL server and its Patroni."""

    name: str
    port: int
    """Of PostgreSQL."""
    rest_port: int
    """Of Patroni's HTTP interface."""
    data: Path
    password: str

    def connect(self, **options: Any) -> Any:
        """Return a connection of psycopg2 as superuser, in autocommit."""
        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            password=self.password,
            dbname=options.pop("dbname", DATABASE),
            connect_timeout=2,
            application_name="cluster",
            **options,
        )
        connection.autocommit = True
        return connection

    def query(self, sql: str, dbname: str = DATABASE) -> list[tuple[Any, ...]]:
        """Run a statement as superuser, and return its rows, if it has some."""
        connection = self.connect(dbname=dbname)
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    @property
    def postmaster(self) -> int:
        """The id of its first process."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 2.0) -> Any:
        """Ask its Patroni: https://patroni.readthedocs.io/en/latest/rest_api.html

        :returns: The status, and the answer.
        """
        connection = HTTPConnection("127.0.0.1", self.rest_port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()
