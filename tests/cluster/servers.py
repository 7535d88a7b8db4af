"""Three PostgreSQL servers under Patroni, and what stands before them, on the loopback interface.

    cluster = Cluster()
    cluster.start()
    cluster.kill_postgres(cluster.primary())
    cluster.stop()

As with the server of :mod:`tests.postgres`, a *keeper* ends all of it and removes its directory
when this process ends, however that happens.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psycopg2

from tests.cluster import configuration, programs
from tests.cluster.keeping import PATIENCE, ClusterError, Keeper, parent_of, wait_for
from tests.cluster.nodes import DATABASE, USER, Node
from tests.machine import free_port

NAMES = ("one", "two", "three")
ROOT = Path(__file__).parents[2]


class Cluster:
    """The running programs.

    :param synchronous: Whether a COMMIT waits until a standby has it.
    """

    def __init__(self, synchronous: bool = True) -> None:
        self.synchronous = synchronous
        self.keeper = Keeper(Path(tempfile.mkdtemp(prefix="fictive-cluster-")))
        self.password = uuid.uuid4().hex
        self._bin = programs.postgres()
        self._etcd_port, self._etcd_peer_port = free_port(), free_port()
        self.primary_port = free_port()
        self.replica_port = free_port()
        self.bouncer_port = free_port()
        self.nodes = tuple(
            Node(
                name,
                free_port(),
                free_port(),
                self.keeper.directory / name / "data",
                self.password,
            )
            for name in NAMES
        )
        self._pids: dict[str, int] = {}

    def start(self) -> None:
        """Start everything, and wait until it is healthy."""
        etcd = f"http://127.0.0.1:{self._etcd_port}"
        peer = f"http://127.0.0.1:{self._etcd_peer_port}"
        self.keeper.start(
            "etcd",
            [
                programs.program("etcd"),
                f"--data-dir={self.keeper.directory / 'etcd'}",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
            ],
        )
        wait_for(lambda: _listens(self._etcd_port), "etcd", self._said)
        for node in self.nodes:
            (self.keeper.directory / node.name).mkdir()
            if os.geteuid() == 0:
                account = pwd.getpwnam("nobody")
                os.chown(node.data.parent, account.pw_uid, account.pw_gid)
            self.keeper.write(
                f"{node.name}.yml",
                configuration.patroni(
                    node, self._etcd_port, self._bin, synchronous=self.synchronous
                ),
            )
            self.start_patroni(node)
        self.wait_until_healthy()
        primary = self.primary()
        primary.query(f"CREATE ROLE {USER} LOGIN PASSWORD '{self.password}'", "postgres")
        primary.query(f"CREATE DATABASE {DATABASE} OWNER {USER}", "postgres")
        self.keeper.write(
            "haproxy.cfg", configuration.haproxy(self.nodes, self.primary_port, self.replica_port)
        )
        self.keeper.start(
            "haproxy",
            [programs.program("haproxy"), "-f", str(self.keeper.directory / "haproxy.cfg"), "-db"],
        )
        bouncer = configuration.pgbouncer(self.bouncer_port, self.primary_port, self.password)
        self.keeper.write("pgbouncer.ini", bouncer)
        self.start_pgbouncer()
        for port in (self.primary_port, self.bouncer_port):
            wait_for(partial(_listens, port), f"port {port}", self._said)

    def start_patroni(self, node: Node) -> None:
        """Start the Patroni of a node, which starts its PostgreSQL."""
        command = [programs.program("patroni"), str(self.keeper.directory / f"{node.name}.yml")]
        self._pids[node.name] = self.keeper.start(node.name, command)

    def start_pgbouncer(self) -> None:
        """Start PgBouncer."""
        command = [
            programs.program("pgbouncer"),
            "--quiet",
            str(self.keeper.directory / "pgbouncer.ini"),
        ]
        self._pids["pgbouncer"] = self.keeper.start("pgbouncer", command)

    def kill_pgbouncer(self) -> None:
        """Kill PgBouncer."""
        self.keeper.end(self._pids["pgbouncer"])

    def kill_node(self, node: Node) -> None:
        """Kill a Patroni and its PostgreSQL, as the loss of a machine would."""
        self.keeper.end(self._pids[node.name])
        self.kill_postgres(node)

    def kill_postgres(self, node: Node) -> None:
        """Kill the first process of a PostgreSQL server; the others end when they notice."""
        self.keeper.end(node.postmaster)

    def kill_postgres_ahead(self, node: Node, seconds: float) -> None:
        """Kill a PostgreSQL server that has sent nothing to its standbys for some time.

        :param node: The node.
        :param seconds: How long its processes that send to the standbys are stopped before.
        """
        postmaster = node.postmaster
        senders = [pid for (pid,) in node.query("SELECT pid FROM pg_stat_replication")]
        if any(parent_of(pid) != postmaster for pid in senders):
            raise ClusterError(f"{senders} are not all processes of {node.name}.")
        for pid in senders:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        self.kill_postgres(node)
        for pid in senders:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # those that are stopped would not notice

    def switch(self, old: Node, new: Node) -> None:
        """Ask Patroni to make another node the primary, and wait until it has.

        :param old: The primary.
        :param new: A standby, in synchronous mode the synchronous one.
        """
        body = {"leader": old.name, "candidate": new.name}
        status, said = old.ask("POST", "/switchover", body, timeout=PATIENCE)
        if status != 200:
            raise ClusterError(f"Patroni does not switch: {status} {said}")

    def primary(self) -> Node:
        """Return the node that is primary, by what Patroni says."""
        (leader,) = (node for node in self.nodes if self.role(node) == "leader")
        return leader

    def synchronous_standby(self) -> Node:
        """Return the node whose copy a COMMIT waits for; any standby, if it waits for none."""
        wanted = "sync_standby" if self.synchronous else "replica"
        return next(node for node in self.nodes if self.role(node) == wanted)

    def role(self, node: Node) -> str:
        """Return what a node is, by what Patroni says."""
        return next(str(one["role"]) for one in self.members() if one["name"] == node.name)

    def members(self) -> list[dict[str, Any]]:
        """Return what Patroni says of the nodes; nothing if no Patroni answers."""
        for node in self.nodes:
            try:
                status, said = node.ask("GET", "/cluster")
            except (OSError, HTTPException):
                continue
            if status == 200:
                members: list[dict[str, Any]] = json.loads(said)["members"]
                return members
        return []

    def wait_until_healthy(self) -> None:
        """Wait until there are a primary and two standbys that have all that it has."""
        wait_for(lambda: not self.ailments(), "a healthy cluster", self._said)

    def ailments(self) -> list[str]:
        """Return why the cluster is not healthy, a sentence each."""
        members = self.members()
        roles = sorted(str(member["role"]) for member in members)
        wanted = ["leader", "replica", "sync_standby" if self.synchronous else "replica"]
        if roles != wanted:
            return [f"the roles are {roles}"]
        states = {str(member["state"]) for member in members}
        if not states <= {"running", "streaming"}:
            return [f"the states are {states}"]
        leader = next(member["name"] for member in members if member["role"] == "leader")
        primary = next(node for node in self.nodes if node.name == leader)
        sql = (
            "SELECT application_name, sync_state, pg_current_wal_lsn() - replay_lsn"
            " FROM pg_stat_replication WHERE state = 'streaming'"
        )
        try:
            standbys = primary.query(sql, "postgres")
        except psycopg2.Error as error:
            return [str(error)]
        synchronous = [name for name, state, _ in standbys if state == "sync"]
        if len(standbys) != 2 or len(synchronous) != int(self.synchronous):
            return [f"the standbys are {standbys}"]
        return [f"{name} is {lag} bytes behind" for name, _, lag in standbys if lag]

    def url(self, driver: str, ports: list[int], **query: str) -> str:
        """Return the URL of the bank's database.

        :param driver: ``"psycopg2"`` or ``"psycopg"``.
        :param ports: The ports that libpq tries, one after the other.
        :param query: Parameters of libpq.
        """
        hosts = [("host", f"127.0.0.1:{port}") for port in ports]
        parameters = "&".join(f"{name}={value}" for name, value in [*hosts, *query.items()])
        return f"postgresql+{driver}://{USER}:{self.password}@/{DATABASE}?{parameters}"

    def stop(self) -> None:
        """End everything."""
        self.keeper.stop()

    def save_logs(self, directory: Path) -> None:
        """Copy what the programs have said to a directory, for a closer look."""
        directory.mkdir(parents=True, exist_ok=True)
        for log in self.keeper.directory.rglob("*.log"):
            shutil.copy(log, directory / log.name)

    def _said(self) -> str:
        """What is wrong, and the last lines of each log."""
        said = [str(self.ailments()) if _listens(self._etcd_port) else "etcd does not listen"]
        for log in sorted(self.keeper.directory.glob("*.log")):
            said.append(f"--- {log.name}")
            said += log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join(said)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
