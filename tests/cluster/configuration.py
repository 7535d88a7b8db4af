"""What the programs of the cluster are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.nodes import DATABASE, USER, Node

# The shortest that Patroni takes. A killed server is seen at once; this is for a killed Patroni.
_TTL = 20


def patroni(node: Node, etcd_port: int, bin: Path, *, synchronous: bool) -> str:
    """Return the configuration of a node's Patroni, which is YAML, as JSON is.

    :param node: The node.
    :param etcd_port: Where etcd listens.
    :param bin: The directory of PostgreSQL's programs.
    :param synchronous: Whether a COMMIT waits until a standby has it.
    """
    accounts = {
        "superuser": {"username": "postgres", "password": node.password},
        "replication": {"username": "replicator", "password": node.password},
    }
    parameters = {
        "max_connections": 200,
        "wal_log_hints": "on",
        # Only processes are killed here, never the machine.
        "fsync": "off",
        "wal_retrieve_retry_interval": "100ms",
        "log_line_prefix": "%m [%p] %d %a ",
        "tcp_user_timeout": 3000,
    }
    wanted: dict[str, Any] = {
        "scope": "bank",
        "name": node.name,
        "etcd3": {"host": f"127.0.0.1:{etcd_port}"},
        "restapi": {
            "listen": f"127.0.0.1:{node.rest_port}",
            "connect_address": f"127.0.0.1:{node.rest_port}",
        },
        "bootstrap": {
            "dcs": {
                "ttl": _TTL,
                "loop_wait": 1,
                "retry_timeout": 3,
                "primary_start_timeout": 0,
                "synchronous_mode": synchronous,
                "postgresql": {
                    "use_pg_rewind": True,
                    "remove_data_directory_on_rewind_failure": True,
                    "remove_data_directory_on_diverged_timelines": True,
                    "parameters": parameters,
                },
            },
            "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
        },
        "postgresql": {
            "listen": f"127.0.0.1:{node.port}",
            "connect_address": f"127.0.0.1:{node.port}",
            "data_dir": str(node.data),
            "bin_dir": str(bin),
            "pgpass": str(node.data.parent / "pgpass"),
            "authentication": accounts,
            "parameters": {"unix_socket_directories": ""},
            "pg_hba": [
                "host replication replicator 127.0.0.1/32 scram-sha-256",
                "host all all 127.0.0.1/32 scram-sha-256",
            ],
        },
    }
    return json.dumps(wanted)


def haproxy(nodes: Sequence[Node], primary_port: int, replica_port: int) -> str:
    """Return the configuration of HAProxy, which asks each Patroni what its node is.

    :param nodes: The nodes.
    :param primary_port: Where it listens for those who want the primary.
    :param replica_port: Where it listens for those who want a standby.
    """
    lines = [
        "global",
        "  maxconn 2000",
        "defaults",
        "  mode tcp",
        "  retries 0",
        "  timeout connect 1s",
        "  timeout client 1h",
        "  timeout server 1h",
        "  timeout check 1s",
    ]
    for role, port in (("primary", primary_port), ("replica", replica_port)):
        lines += [
            f"listen {role}",
            f"  bind 127.0.0.1:{port}",
            f"  option httpchk OPTIONS /{role}",
            "  http-check expect status 200",
            "  default-server inter 200ms fastinter 100ms downinter 200ms fall 2 rise 1"
            " on-marked-down shutdown-sessions",
        ]
        for node in nodes:
            lines.append(f"  server {node.name} 127.0.0.1:{node.port} check port {node.rest_port}")
    return "\n".join([*lines, ""])


def pgbouncer(port: int, behind: int, password: str) -> str:
    """Return the configuration of PgBouncer, in transaction mode.

    :param port: Where it listens.
    :param behind: The port of the database.
    :param password: Of the bank's role.
    """
    database = f"host=127.0.0.1 port={behind} user={USER} password={password}"
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "max_client_conn": 500,
        "default_pool_size": 20,
        "server_connect_timeout": 2,
        # Otherwise it makes everybody wait for 15 seconds after one connection has failed.
        "server_login_retry": 0.2,
        "query_wait_timeout": 20,
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join(["[databases]", f"{DATABASE} = {database}", "[pgbouncer]", *lines, ""])
