"""The whole stage: the cluster, the proxies before it, the bank, its clients and the watch."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import TracebackType
from typing import Any, Literal

from typing_extensions import Self

from tests.cluster.keeping import PATIENCE, ClusterError, wait_for
from tests.cluster.load import Load
from tests.cluster.model import Census, compared, read_work
from tests.cluster.options import Options
from tests.cluster.records import ACCOUNTS, Answer, Rest, Row, Stored
from tests.cluster.servers import ROOT, Cluster
from tests.cluster.watch import PROBE, Watch
from tests.machine import free_port
from tests.wire import Message, WireProxy

WORKERS, THREADS = 2, 8

_APP = "tests.cluster.app:app"

_GUNICORN = f"""
bind = "127.0.0.1:{{port}}"
control_socket_disable = True
worker_class = "gthread"
workers = {WORKERS}
threads = {THREADS}
timeout = 60
"""

# What an application sets that does not want to wait until TCP gives up.
_CONNECTING = {
    "connect_timeout": "2",
    "keepalives_idle": "1",
    "keepalives_interval": "1",
    "keepalives_count": "3",
    "tcp_user_timeout": "3000",
}


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    driver: str = "psycopg2"
    through: str = "hosts"
    begin_on_write: bool = False
    settings: bool = False
    record: bool = False
    asynchronous: bool = False
    replicas_apart: bool = False
    seconds: float = 12.0
    seed: int = 1


class Scissors:
    """Cuts connections in the middle of COMMIT, as many as it is told.

    In turn it cuts one when the server has done it, before the client gets the answer, and one
    within the message, so that the server never does it. The client can't tell one from the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self.cuts: int = 0
        """How many connections were cut."""

    def cut(self, count: int) -> None:
        """Cut the connections of the next so many COMMITs."""
        with self._lock:
            self._left = count

    def __call__(self, message: Message) -> Literal["within", "after"] | None:
        """Say where to cut at a message: see :attr:`tests.wire.WireProxy.cut_where`."""
        if not message.is_statement or message.verb != "COMMIT":
            return None
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            self.cuts += 1
            return "within" if self.cuts % 2 else "after"


class Stage:
    """Everything, from its start until :meth:`stop`.

    :param wanted: What the command line asks for.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.scissors = Scissors()
        self._stack = ExitStack()
        self._proxies: list[WireProxy] = []
        self._served: tuple[int, bool] | None = None
        self._port = free_port()
        self.cluster = Cluster(synchronous=not wanted.asynchronous)
        self._stack.callback(self.cluster.stop)

    def start(self) -> None:
        """Start everything; the clients wait until they may go on."""
        self.cluster.start()
        self._ports = [node.port for node in self.cluster.nodes]
        if self.wanted.through == "pgbouncer":
            self._ports = [self.cluster.bouncer_port]
        for port in self._ports:
            proxy = self._stack.enter_context(WireProxy("127.0.0.1", port))
            proxy.cut_where = self.scissors
            self._proxies.append(proxy)
        self._fill()
        self.serve(proxied=False)
        self.cluster.primary().query(PROBE)
        self.watch = Watch(self.cluster.nodes)
        self._stack.callback(self.watch.stop)
        if self.wanted.record:
            self.census = Census(self.cluster.nodes)
            self._stack.callback(self.census.stop)
        self.load = Load(self._port, self.wanted.seed, ACCOUNTS)
        self._stack.callback(self.load.stop)

    def _options(self, ports: list[int]) -> Options:
        cluster, wanted = self.cluster, self.wanted
        primary = dict(_CONNECTING)
        if wanted.through == "hosts":
            primary["target_session_attrs"] = "read-write"
        standby = {**_CONNECTING, "target_session_attrs": "standby"}
        standbys = [[node.port for node in cluster.nodes]]
        if wanted.replicas_apart:
            standbys = [[node.port] for node in cluster.nodes]
        # What this PgBouncer can't follow from one server connection to the next.
        prepares = wanted.through == "pgbouncer" and wanted.driver == "psycopg"
        return Options(
            url=cluster.url(wanted.driver, ports, **primary),
            replicas=[cluster.url(wanted.driver, some, **standby) for some in standbys],
            begin_on_write=wanted.begin_on_write,
            settings=wanted.settings,
            record=str(cluster.keeper.directory / "requests.log") if wanted.record else "",
            connect_args={"prepare_threshold": None} if prepares else {},
        )

    def serve(self, *, proxied: bool) -> None:
        """Let the bank run; if it runs already, and not in this way, start it anew.

        :param proxied: Whether the proxies stand between it and the primary. A proxy takes the
            connection to a server that is down, and then has to close it. A server that is down
            refuses it, and that is what libpq needs to go on to the next host. So they stand there
            only where connections are cut.
        """
        if self._served is not None:
            pid, is_proxied = self._served
            if is_proxied == proxied:
                return
            self.cluster.keeper.end(pid, signal.SIGTERM)
        keeper = self.cluster.keeper
        ports = [proxy.port for proxy in self._proxies] if proxied else self._ports
        file = keeper.write("gunicorn.conf.py", _GUNICORN.format(port=self._port))
        pid = self._run("gunicorn", ["gunicorn", "-c", str(file), _APP], ports)
        self._served = (pid, proxied)
        wait_for(self._pools, "gunicorn", keeper.log("gunicorn").read_text)

    def _fill(self) -> None:
        keeper = self.cluster.keeper
        pid = self._run("fill", ["flask", "--app", _APP, "fill"], self._ports)
        wait_for(lambda: not keeper.runs(pid), "the end of `flask fill`")
        if not self.cluster.primary().query("SELECT id FROM account"):
            raise ClusterError(f"There are no accounts:\n{keeper.log('fill').read_text()}")

    def _run(self, name: str, command: list[str], ports: list[int]) -> int:
        return self.cluster.keeper.start(
            name,
            [sys.executable, "-m", *command],
            self._options(ports).environment(),
            as_ourselves=True,
            cwd=ROOT,
        )

    def model(self, since: float, until: float) -> str:
        """Return how many connections were at work, by the model and by the servers.

        :param since: The beginning.
        :param until: The end.
        """
        if not self.wanted.record:
            return ""
        work = read_work(self.cluster.keeper.directory / "requests.work", since, until)
        counted = self.census.counted(since, until)
        return compared(work, counted, until - since, len(self.cluster.nodes))

    def answers_since(self, began: float) -> list[Answer]:
        """Return the answers that came since a time."""
        return [answer for answer in self.load.answers() if answer.ended >= began]

    def stored(self) -> Stored:
        """Return what the primary has."""
        primary = self.cluster.primary()
        ledger = primary.query("SELECT id, source_id, target_id, amount, tenant FROM ledger")
        balances = primary.query("SELECT id, balance FROM account ORDER BY id")
        return Stored(dict(balances), [Row(*row) for row in ledger])

    def rest(self) -> Rest:
        """Return what is left now that no request is under way."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + 20
        # Which process answers is the kernel's choice.
        while len(found) < WORKERS and time.monotonic() < deadline:
            answer = self._pools()
            if answer:
                found[answer["process"]] = answer
        deadline = time.monotonic() + 5
        # A server process whose connection was cut notices it a moment later.
        while (busy := self._in_transaction()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Rest(list(found.values()), busy)

    def _in_transaction(self) -> list[str]:
        sql = (
            "SELECT pid, state, left(query, 80) FROM pg_stat_activity"
            " WHERE state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"
        )
        return [f"{node.name}: {row}" for node in self.cluster.nodes for row in node.query(sql)]

    def _pools(self) -> dict[str, Any] | None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("GET", "/pool")
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise ClusterError(f"/pool: {response.status} {content.decode()}")
            found: dict[str, Any] = json.loads(content)
            return found
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()

    def stop(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
