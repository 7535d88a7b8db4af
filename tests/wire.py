"""A TCP proxy before PostgreSQL that records what a client really sends.

    with WireProxy(server.host, server.port) as proxy:
        engine = create_engine(proxy.url(server.url()))
        ...
        with proxy.record() as recording:
            session.get(User, 1)
        assert recording.verbs == ["SELECT"]
        assert recording.round_trips == 1

It speaks the PostgreSQL protocol, version 3, over plain TCP: it declines encryption. A message of
either side is recorded before it is forwarded, so whatever a client has an answer to is in the
recording, and so is the state that the answer left.

One call cannot go through a proxy of the same process: ``connection.cancel()`` of both drivers
keeps the interpreter to itself while it waits for the answer, so the proxy cannot give it.
psycopg 3's ``cancel_safe()`` does not.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from sqlalchemy import make_url
from typing_extensions import Self

#: Frontend messages by their type byte, each with whether the client waits for an answer to it.
_FRONTEND = {
    b"Q": ("Query", True),
    b"S": ("Sync", True),
    b"H": ("Flush", True),
    b"F": ("FunctionCall", True),
    b"P": ("Parse", False),
    b"B": ("Bind", False),
    b"D": ("Describe", False),
    b"E": ("Execute", False),
    b"C": ("Close", False),
    b"d": ("CopyData", False),
    b"c": ("CopyDone", False),
    b"f": ("CopyFail", False),
    b"X": ("Terminate", False),
}
#: The backend messages that are recorded. All others (rows, above all) only pass.
_BACKEND = {
    ord("C"): "CommandComplete",
    ord("E"): "ErrorResponse",
    ord("G"): "CopyInResponse",
    ord("K"): "BackendKeyData",
    ord("Z"): "ReadyForQuery",
}
_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104

_COMMENTS = re.compile(r"\A(?:\s|\(|--[^\n]*\n|/\*.*?\*/)+", re.DOTALL)
_TWO_WORDS = re.compile(r"\A(ROLLBACK|COMMIT)(?: WORK| TRANSACTION)? (TO|PREPARED)\b")


@dataclass(frozen=True)
class Message:
    """One message on the wire."""

    time: float
    """When it was recorded, by :func:`time.monotonic`."""
    connection: int
    """The number of the proxied connection, from 1 in the order in which they were made."""
    pid: int
    """The process id of the backend that serves the connection; 0 while it is not known."""
    sender: Literal["frontend", "backend"]
    name: str
    """The protocol's name of the message: ``"Query"``, ``"Bind"``, ``"ReadyForQuery"``…"""
    text: str
    """The SQL (Query, Parse, Bind, Execute), the command tag (CommandComplete), the transaction
    status ``I``, ``T`` or ``E`` (ReadyForQuery), or the SQLSTATE and text (ErrorResponse)."""
    waits: bool
    """Whether the client waits for an answer before it can go on: one round trip."""

    @property
    def is_statement(self) -> bool:
        """Whether this message runs a statement."""
        return self.name in ("Query", "Execute")

    @property
    def verb(self) -> str:
        """The statement's first word in capitals; ``ROLLBACK TO`` for a return to a savepoint."""
        text = _COMMENTS.sub("", self.text).upper()
        two_words = _TWO_WORDS.match(text)
        if two_words:
            return f"{two_words[1]} {two_words[2]}"
        word = re.match(r"[A-Z]*", text)
        return word[0] if word else ""


@dataclass(eq=False)
class Recording:
    """What went over the wire in a ``with proxy.record()`` block; complete when the block ends."""

    messages: list[Message] = field(default_factory=list[Message])
    """All messages that were recorded, in order."""
    idle_in_transaction: float = 0.0
    """The seconds that connections sat idle in an open transaction, summed over the connections:
    from each ReadyForQuery with status T or E to the next frontend message on that connection, both
    as the server sees them. Only the part inside the block counts; complete when the block ends."""
    started: float = field(default_factory=time.monotonic)

    @property
    def statements(self) -> list[str]:
        """The SQL of each statement that was run, every run of white space as one space.

        One for each Query and one for each Execute; what runs by the name of a prepared
        statement shows the text that it was prepared from.
        """
        return [message.text for message in self.messages if message.is_statement]

    @property
    def verbs(self) -> list[str]:
        """The first word of each statement: ``["BEGIN", "SELECT", "ROLLBACK TO", "COMMIT"]``."""
        return [message.verb for message in self.messages if message.is_statement]

    @property
    def round_trips(self) -> int:
        """How many frontend messages waited for an answer.

        Counted: each Query, Sync and FunctionCall; a Flush that something unanswered stands before
        (psycopg 3 sends it in pipeline mode only); and the CopyDone or CopyFail that ends a COPY
        which a Query began. So psycopg 3 pays two for the execution in which it prepares a
        statement: Parse and Sync, then Bind, Execute and Sync.
        Not counted: the start of a connection (up to its first ReadyForQuery) and Terminate.
        """
        return sum(message.waits for message in self.messages)

    def __str__(self) -> str:
        lines = (f"{m.connection}: {m.name} {m.text}".rstrip() for m in self.messages)
        return "\n".join(lines)


class WireProxy:
    """The proxy: listens on a free port of 127.0.0.1 from its making until :meth:`close`.

    :param host: The PostgreSQL server's host.
    :param port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._recordings: list[Recording] = []
        self._count = 0
        self._closed = False
        self.delay: float = 0.0
        """Seconds to add to each round trip, each way."""
        self.before_forward: Callable[[Message], object] | None = None
        """Called with each frontend message after it is recorded and before the server gets it, in
        the thread of its connection: to kill a backend or to :meth:`cut_all` at an exact point."""
        self.cut_where: Callable[[Message], Literal["before", "within", "after"] | None] | None = (
            None
        )
        """Asked of each frontend message where to cut its connection: before the server gets it,
        within it, or after the server has done what it says, before the client gets the answer."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.host: str = "127.0.0.1"
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="wire-accept", daemon=True)
        self._acceptor.start()

    def url(self, url: str) -> str:
        """The URL that reaches the same database through this proxy.

        :param url: The SQLAlchemy URL of a database on the server that this proxy stands before.
        :returns: The same URL with the proxy's host and port, and encryption off.
        """
        query = {"sslmode": "disable", "gssencmode": "disable"}
        through = make_url(url).set(host=self.host, port=self.port).update_query_dict(query)
        return through.render_as_string(hide_password=False)

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Record all messages of all connections, those that are open already included.

        Recordings may overlap. What a client sent before the block is not in it; what it sent in
        the block is, also where it did not wait for an answer.

        :returns: A context manager that gives the recording.
        """
        self._settle()
        recording = Recording()
        with self._lock:
            self._recordings.append(recording)
        try:
            yield recording
        finally:
            self._settle()
            with self._lock:
                now = time.monotonic()
                for connection in self._connections.values():
                    connection.add_idle(recording, now)
                self._recordings.remove(recording)

    @property
    def connections(self) -> int:
        """How many proxied connections are open."""
        with self._lock:
            return len(self._connections)

    @property
    def pids(self) -> set[int]:
        """The server processes of the proxied connections that are open."""
        with self._lock:
            return {connection.pid for connection in self._connections.values()}

    @property
    def transactions_open(self) -> int:
        """How many proxied connections are in a transaction: the server's last word was T or E."""
        with self._lock:
            return sum(connection.status in "TE" for connection in self._connections.values())

    def quiesce(self, timeout: float = 10.0) -> None:
        """Wait until all that was sent is answered and each connection that was closed is gone.

        :param timeout: How many seconds to wait.
        :raises TimeoutError: If a connection is still waiting for an answer by then.
        """
        if not self._wait(timeout, answers=True):
            raise TimeoutError(f"The wire is not quiet after {timeout} seconds.")

    def cut_all(self) -> None:
        """Close every proxied connection at once, on both sides, as a broken network would."""
        for connection in self._open():
            self._remove(connection)
            connection.cut()

    def close(self) -> None:
        """Stop listening and close every connection. May be called twice."""
        if self._closed:
            return
        self._closed = True
        # To wake the accepting thread: closing a socket that another thread accepts on does not.
        with suppress(OSError), socket.create_connection((self.host, self.port)):
            pass
        self._acceptor.join()
        self._listener.close()
        self.cut_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._closed:
                client.close()
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One client, from its first byte to its last."""
        with client, suppress(OSError, EOFError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.settimeout(60.0)  # What connects and says nothing must not hold a thread.
            packet = _startup_packet(client)
            client.settimeout(None)
            with socket.create_connection(self._upstream) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if struct.unpack_from("!I", packet, 4)[0] == _CANCEL:
                    server.sendall(packet)
                    server.recv(1)  # The server closes when it has read the request.
                    return
                with self._lock:
                    self._count += 1
                    connection = _Connection(self, self._count, client, server)
                    self._connections[connection.number] = connection
                try:
                    connection.run(packet)
                finally:
                    self._remove(connection)

    def _settle(self) -> None:
        """Wait until all that clients have sent so far is recorded; answers may be on their way.

        Not for ever: a ``before_forward`` that waits for the caller must not make it wait in turn.
        """
        self._wait(5.0, answers=False)

    def _wait(self, timeout: float, answers: bool) -> bool:
        deadline = time.monotonic() + timeout
        # One after the other: under load there may be no moment in which all are quiet.
        for connection in self._open():
            while not connection.is_quiet(answers):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.0005)
        return True

    def _open(self) -> list[_Connection]:
        with self._lock:
            return list(self._connections.values())

    def _add(self, connection: _Connection, message: Message) -> None:
        with self._lock:
            connection.learn(message, self._recordings)
            for recording in self._recordings:
                recording.messages.append(message)

    def _remove(self, connection: _Connection) -> None:
        with self._lock:
            if self._connections.pop(connection.number, None):
                for recording in self._recordings:
                    connection.add_idle(recording, time.monotonic())


class _Connection:
    """One client's connection: two threads that copy, one each way, and what they learn from it."""

    def __init__(
        self, proxy: WireProxy, number: int, client: socket.socket, server: socket.socket
    ) -> None:
        self._proxy = proxy
        self.number = number
        self._client = client
        self._server = server
        # A thread is busy from before it reads until what it read is recorded and forwarded.
        self._busy = {client: True, server: True}
        # Learnt from messages, under the proxy's lock.
        self.status = "I"
        self.pid = 0
        self._idle_since: float | None = None
        self._unanswered = 0
        # The thread that reads the client has these to itself.
        self._sent = bytearray()
        self._statements: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._simple = False  # The last statement came as a Query.
        self._asked = False  # Something was sent since the last message that waits.
        # The thread that reads the server has these to itself.
        self._received = b""
        self._skip = 0
        self._answers_are_lost = False

    def run(self, startup: bytes) -> None:
        """Copy both ways until either side closes."""
        self._proxy._add(self, self._message("frontend", "StartupMessage"))
        self._server.sendall(startup)
        backend = threading.Thread(
            target=self._copy, args=(self._server, self._client, self._from_server), daemon=True
        )
        backend.start()
        self._copy(self._client, self._server, self._from_client)
        backend.join()

    def cut(self) -> None:
        """End the connection on both sides; both threads notice and end."""
        for side in (self._client, self._server):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def is_quiet(self, answers: bool) -> bool:
        """Whether all that the client has sent so far, its closing included, is recorded.

        :param answers: Whether all of it is answered, too.
        """
        # In this order: what a thread has taken off its socket it is busy with.
        sides = (self._client, self._server) if answers else (self._client,)
        if any(_readable(side) or self._busy[side] for side in sides):
            return False
        return not answers or self._unanswered == 0

    def learn(self, message: Message, recordings: list[Recording]) -> None:
        """Take in what a message says of the connection's state."""
        if message.sender == "frontend":
            for recording in recordings:
                self.add_idle(recording, message.time)
            self._idle_since = None
            self._unanswered += message.name in ("Query", "Sync", "FunctionCall")
        elif message.name == "ReadyForQuery":
            self._unanswered = max(self._unanswered - 1, 0)
            self.status = message.text
            if message.text in "TE" and not self._unanswered:
                self._idle_since = message.time
        elif message.name == "CopyInResponse" and not self._simple:
            # The Sync that follows the Execute of a COPY is never answered, the one at its end is.
            self._unanswered -= 1

    def add_idle(self, recording: Recording, now: float) -> None:
        """Add the time for which the connection has been idle in a transaction to a recording."""
        if self._idle_since is not None:
            recording.idle_in_transaction += max(
                now - max(self._idle_since, recording.started), 0.0
            )

    def _copy(
        self, source: socket.socket, target: socket.socket, read: Callable[[bytes], bytes]
    ) -> None:
        poll = select.poll()
        poll.register(source, select.POLLIN)
        try:
            while True:
                self._busy[source] = False
                poll.poll()
                self._busy[source] = True
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(read(data))
        except OSError:
            pass  # One side is gone; so is the connection.
        finally:
            self.cut()  # before it counts as gone: who waits for that may ask the client then
            self._proxy._remove(self)
            self._busy[source] = False

    def _from_client(self, data: bytes) -> bytes:
        """Record the messages that are complete with this data; they are what is forwarded."""
        self._sent += data
        messages: list[tuple[Message, int, int]] = []
        position = 0
        while position + 5 <= len(self._sent):
            kind = bytes(self._sent[position : position + 1])
            end = position + 1 + struct.unpack_from("!I", self._sent, position + 1)[0]
            if end > len(self._sent):
                break
            if kind in _FRONTEND:
                message = self._frontend(kind, bytes(self._sent[position + 5 : end]))
                messages.append((message, position, end))
            position = end
        if self._proxy.delay and any(message.waits for message, _, _ in messages):
            time.sleep(self._proxy.delay)
        for message, start, end in messages:
            message = replace(message, time=time.monotonic())
            self._proxy._add(self, message)
            if self._proxy.before_forward is not None:
                self._proxy.before_forward(message)
            where = self._proxy.cut_where(message) if self._proxy.cut_where is not None else None
            if where == "after":
                self._answers_are_lost = True
            elif where is not None:
                forwarded = start if where == "before" else (start + end) // 2
                self._server.sendall(self._sent[:forwarded])
                raise OSError("cut")
        complete = bytes(self._sent[:position])
        del self._sent[:position]
        return complete

    def _frontend(self, kind: bytes, body: bytes) -> Message:
        name, waits = _FRONTEND[kind]
        text = ""
        if kind == b"Q":
            self._simple = True
            text = _sql(body.rstrip(b"\0"))
        elif kind == b"P":
            self._simple = False
            statement, sql, _ = body.split(b"\0", 2)
            text = self._statements[statement] = _sql(sql)
        elif kind == b"B":
            self._simple = False
            portal, statement, _ = body.split(b"\0", 2)
            text = self._portals[portal] = self._statements.get(statement, "")
        elif kind == b"E":
            text = self._portals.get(body.split(b"\0", 1)[0], "")
        elif kind in b"cf":
            waits = self._simple
        elif kind == b"H":
            waits = self._asked
        self._asked = not waits
        return self._message("frontend", name, text, waits)

    def _from_server(self, data: bytes) -> bytes:
        """Record the messages that end in this data. All of it is forwarded at once."""
        buffer = self._received + data
        position = self._skip
        ready = False
        while position + 5 <= len(buffer):
            end = position + 1 + struct.unpack_from("!I", buffer, position + 1)[0]
            name = _BACKEND.get(buffer[position])
            if name:
                if end > len(buffer):
                    break
                ready |= name == "ReadyForQuery"
                self._backend(name, buffer[position + 5 : end])
            position = end
        # The rest of a row that only passes is skipped, the start of what is recorded is kept.
        self._skip = max(position - len(buffer), 0)
        self._received = buffer[position:]
        if self._proxy.delay and ready:
            time.sleep(self._proxy.delay)
        if self._answers_are_lost:
            if ready:
                raise OSError("cut")
            return b""
        return data

    def _backend(self, name: str, body: bytes) -> None:
        text = ""
        if name == "BackendKeyData":
            self.pid = struct.unpack_from("!i", body)[0]
        elif name == "ErrorResponse":
            fields = {part[:1]: part[1:].decode(errors="replace") for part in body.split(b"\0")}
            text = f"{fields.get(b'C', '')} {fields.get(b'M', '')}"
        else:
            text = body.rstrip(b"\0").decode(errors="replace")
        self._proxy._add(self, self._message("backend", name, text))

    def _message(
        self,
        sender: Literal["frontend", "backend"],
        name: str,
        text: str = "",
        waits: bool = False,
    ) -> Message:
        return Message(time.monotonic(), self.number, self.pid, sender, name, text, waits)


def _startup_packet(client: socket.socket) -> bytes:
    """The client's StartupMessage or CancelRequest; requests for encryption are declined."""
    while True:
        header = _read(client, 8)
        length, code = struct.unpack("!II", header)
        if code not in (_SSL, _GSS):
            return header + _read(client, length - 8)
        client.sendall(b"N")


def _read(source: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = source.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _readable(source: socket.socket) -> bool:
    poll = select.poll()
    with suppress(ValueError):  # It is closed: there is nothing more to come.
        poll.register(source, select.POLLIN)
        return bool(poll.poll(0))
    return False


def _sql(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())
