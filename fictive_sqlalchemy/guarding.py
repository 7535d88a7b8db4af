"""A guard against waiting inside a transaction: an error in tests, and a warning in production.

::

    import time

    with Guard("raise", engine), db.session.begin():
        db.session.get(User, 1)
        with allow_waiting():
            time.sleep(0.01)  # without allow_waiting() an error: WaitingInTransaction

Python reports most calls that may wait by audit events, so that no client has to be patched: see
`PEP 578 <https://peps.python.org/pep-0578/>`_. There is no event for these functions, so the first
guard wraps them when it starts: ``time.sleep`` before Python 3.13, ``handle_request`` of
``httpx.HTTPTransport``, and ``celery.Celery.send_task``. Guards send nothing to the database.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from ipaddress import ip_address
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlalchemy import exc

from ._core.errors import see
from ._core.flow import here
from ._core.places import calling
from ._core.records import Transaction
from ._core.transactions import TRANSACTION_CONNECTIONS
from .recording import Follower

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Guard", "WaitingInTransaction", "allow_waiting"]

_log = logging.getLogger("fictive_sqlalchemy.transactions")
"""The logger that gets the warnings of the mode ``"log"``."""

_is_allowed: ContextVar[bool] = ContextVar("waiting is allowed", default=False)


class WaitingInTransaction(exc.InvalidRequestError):
    """Something that may wait was called while a transaction is open."""


@contextmanager
def allow_waiting() -> Generator[None]:
    """Allow in this block, in this thread or task alone, the calls that :class:`Guard` refuses."""
    before = _is_allowed.get()
    try:
        _is_allowed.set(True)
        yield
    finally:
        _is_allowed.set(before)  # without a token: a stream's block may end in another context


class Guard(Follower):
    """Refuses or logs calls that may wait, while a transaction of the same thread is open.

    Such calls are connections that Python's ``socket`` makes to anything but the database, HTTP
    requests on connections that are kept open (of ``http.client``, on which ``urllib3`` and
    ``requests`` are built, and of ``httpx.Client``), ``time.sleep()``, subprocesses, and messages
    of Celery. Connections that a library in C makes, such as a driver of another database, are not
    seen.

    A transaction is open from its first statement on, because BEGIN is sent with that statement.
    Under test isolation, the transactions of the code under test count. A transaction that is one
    statement never counts as open.

    :param mode: With ``"raise"``, the call raises :class:`WaitingInTransaction`, and is not made.
        With ``"log"``, the call is made, and a WARNING is logged, once for each line in a
        transaction.
    :param sources: One or more extensions or engines.
    :param allow: Hosts that may be called inside a transaction, by name or address. A Unix socket
        is named by its path.
    :raises sqlalchemy.exc.ArgumentError: if an argument is not as described here.
    """

    def __init__(
        self, mode: Literal["raise", "log"], *sources: Any, allow: Iterable[str] = ()
    ) -> None:
        if mode not in ("raise", "log"):
            raise exc.ArgumentError(
                f'The mode of a guard is "raise" or "log", and not {mode!r}.'
                + see("recording-arguments")
            )
        if isinstance(allow, str):
            raise exc.ArgumentError(
                f"allow is a list of hosts: write allow=[{allow!r}]." + see("recording-arguments")
            )
        hosts: Any = list(allow) if isinstance(allow, Iterable) else None  # pyright: ignore
        if hosts is None or not all(map(_is_host, hosts)):
            raise exc.ArgumentError(
                'allow is a list of hosts, by name or address, without a scheme and a port: ["pay.'
                f'example", "10.0.0.1"], and not {allow!r}.' + see("recording-arguments")
            )
        super().__init__(*sources)
        self.mode = mode
        self._allowed = {_canonical(host) for host in hosts}
        self._said: set[tuple[float | None, object]] = set()

    def start(self) -> Self:
        """Start the guard."""
        if self not in _guards:
            _install()
            _hear_of_libraries()
            super().start()
            _guards.append(self)
        return self

    def stop(self) -> None:
        """Stop the guard."""
        if self in _guards:
            _guards.remove(self)
            super().stop()

    def add_transaction(self, transaction: Transaction) -> None:
        """Called when a transaction begins: wrap the functions of libraries imported since."""
        _hear_of_libraries()

    # What is called for each call that may wait

    def check(self, what: str, host: str | None) -> None:
        """Refuse a call, or log it, if a transaction of this thread is open.

        :param what: The description of the call, for the message.
        :param host: The host that the call goes to, if there is one.
        :raises WaitingInTransaction: in the mode ``"raise"``.
        """
        transaction = self._open_here()
        if transaction is None or (host is not None and _canonical(host) in self._allowed):
            return
        caller = calling()
        place = caller.called_from or caller.place
        permitted = "" if host is None else ", or name its host in allow=[…]"
        message = (
            f"{what} inside an open transaction, in {place.filename}, line {place.line}, in "
            f"{place.function}. The transaction was begun by {transaction.begun_at}. While the "
            "call waits, the transaction keeps its locks and its connection. Put the call before "
            "the block, after it, or into on_commit(). If it has to be there, put it into "
            f"`with allow_waiting():`{permitted}." + see("guarded-call")
        )
        if self.mode == "raise":
            raise WaitingInTransaction(message)
        said = transaction.started, place[:2]
        if said not in self._said:
            if len(self._said) > 1_000:
                self._said.clear()
            self._said.add(said)
            with allow_waiting():  # a log handler may send the message to another host
                _log.warning("%s", message)

    def _open_here(self) -> Transaction | None:
        """Return an open transaction of this thread, greenlet and task; ``None`` without one."""
        for connections in TRANSACTION_CONNECTIONS.values():
            for connection in connections:
                recorded = getattr(connection, "recorded", None)
                if (
                    recorded is not None
                    and self in recorded.recordings
                    and _is_open(recorded.transaction)
                    and recorded.flow.includes(here())
                ):
                    return cast(Transaction, recorded.transaction)
        return None


_guards: list[Guard] = []


def _is_open(transaction: Transaction) -> bool:
    is_open = transaction.has_begun and not transaction.has_ended
    return is_open and not transaction.is_one_statement


def _is_host(host: object) -> bool:
    if not isinstance(host, str) or not host or "://" in host:
        return False
    return host.startswith("/") or ":" not in host or _is_address(host.strip("[]"))


def _canonical(host: str) -> str:
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return host.lower().rstrip(".")
    return str(getattr(address, "ipv4_mapped", None) or address)


def _check(what: str, host: str | None = None) -> None:
    if not _is_allowed.get():
        for guard in tuple(_guards):
            guard.check(what, host)


# Audit events: https://docs.python.org/3/library/audit_events.html


class _Resolved(threading.local):
    host: str = ""
    port: object = None


_resolved = _Resolved()
"""The host whose address this thread has looked up last: a connection names only the address."""


def _on_connect(socket: Any, address: Any) -> None:
    if getattr(socket, "type", None) != _STREAM:  # sending a datagram does not wait
        return
    what, name = repr(address), address if isinstance(address, str) else None  # a str is a path
    if isinstance(address, tuple):
        parts: tuple[Any, ...] = address  # pyright: ignore[reportUnknownVariableType]
        name, port = str(parts[0]), parts[1]
        if _resolved.port in (port, str(port)) and _is_address(name):
            name = _resolved.host
        what = f"{name}:{port}"
    try:
        _check(f"A connection to {what}", name)
    except BaseException:
        socket.close()  # the code that has made the socket closes it only on an OSError
        raise


#: ``socket.SOCK_STREAM``. The module is not imported, because it may be patched later.
_STREAM = 1


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _on_getaddrinfo(host: Any, port: Any, *_: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    _resolved.host, _resolved.port = name or "", port


def _on_http(connection: Any, *_: Any) -> None:
    host = str(getattr(connection, "host", ""))
    _check(f"An HTTP request to {host}", host)


def _on_sleep(seconds: Any = 0, *_: Any) -> None:
    if seconds:
        _check(f"time.sleep({seconds})")


def _on_process(executable: Any, *_: Any) -> None:
    _check(f"The process {executable!r}")


_EVENTS: dict[str, Callable[..., None]] = {
    "socket.connect": _on_connect,
    "socket.getaddrinfo": _on_getaddrinfo,
    "http.client.send": _on_http,
    "time.sleep": _on_sleep,
    "subprocess.Popen": _on_process,
    "os.system": _on_process,
    "os.posix_spawn": _on_process,
}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _guards and event in _EVENTS:
        _EVENTS[event](*arguments)


_is_installed = False
_lock = threading.RLock()


def _install() -> None:
    """Add the audit hook once, because Python can't remove an audit hook."""
    global _is_installed
    with _lock:
        if not _is_installed:
            _is_installed = True
            sys.addaudithook(_hook)


# Libraries whose calls raise no audit events

_heard_of: set[str] = set()


def _hear_of_libraries() -> None:
    """Wrap the functions of libraries that were imported meanwhile."""
    for name, hear in _LIBRARIES.items():
        if name not in _heard_of and name in sys.modules:
            with _lock:
                # hear() returns False while another thread is still importing the module.
                if name not in _heard_of and hear(sys.modules[name]):
                    _heard_of.add(name)


def _hear_of_httpx(httpx: Any) -> bool:
    # httpx sends on sockets that it keeps open, and no audit event reports that.
    def guarded(handle: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handle)
        def handle_request(self: Any, request: Any) -> Any:
            if _guards:
                _check(f"An HTTP request to {request.url.host}", request.url.host)
            return handle(self, request)

        return handle_request

    transport = getattr(httpx, "HTTPTransport", None)
    if transport is not None:
        transport.handle_request = guarded(transport.handle_request)
    return transport is not None


def _hear_of_celery(base: Any) -> bool:
    # The connection to the broker is kept open, so no audit event reports a message. A receiver of
    # Celery's signals can't refuse a message, because Celery only logs what the receiver raises.
    celery = getattr(base, "Celery", None)
    if celery is None:
        return False
    send = celery.send_task

    @wraps(send)
    def send_task(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if _guards:
            _check(f"A message of Celery for the task {name}")
        return send(self, name, *args, **kwargs)

    celery.send_task = send_task
    return True


def _hear_of_time(module: Any) -> bool:
    # sleep() raises no audit event before Python 3.13, nor after gevent has replaced it.
    sleep, python = module.sleep, sys.version_info[:2]
    if python >= (3, 13) and isinstance(sleep, BuiltinFunctionType):
        return True

    @wraps(sleep)
    def guarded_sleep(*args: Any, **kwargs: Any) -> None:
        if _guards:
            _on_sleep(*args, *kwargs.values())
        sleep(*args, **kwargs)

    module.sleep = guarded_sleep
    return True


_LIBRARIES: dict[str, Callable[[Any], bool]] = {
    "time": _hear_of_time,
    "httpx": _hear_of_httpx,
    "celery.app.base": _hear_of_celery,
}
