"""The front of both servers of the demo: it shows under each page what the request has sent.

Each request goes to both servers, one after the other, while the proxy records the wire. The answer
is that of the app with fictive_sqlalchemy. If the answer is a page, it gets a section at its end,
with what both servers have sent beside each other.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from flask import Flask, Response, render_template, request
from werkzeug.serving import make_server
from werkzeug.urls import iri_to_uri

from tests.wire import Recording, WireProxy

from .report import figures, statements
from .server import QuietHandler

#: Headers of a server's answer that are not passed on, because the front sends headers of its own.
_NOT_PASSED_ON = ("connection", "content-length", "date", "server", "transfer-encoding")


class Front:
    """Sends a request to both servers, and keeps what each has sent to PostgreSQL for it.

    :param wire: The proxy in front of PostgreSQL.
    :param bases: The URLs of the server with fictive_sqlalchemy and of the server with stock.
    """

    def __init__(self, wire: WireProxy, bases: Sequence[str]) -> None:
        self._wire = wire
        self._bases = bases
        # Requests are sent one after the other, because the proxy can't tell whose a message is.
        self._lock = threading.Lock()
        self._redirected: list[Mapping[str, object]] = []

    def answer(self) -> Response:
        """Answer Flask's current request."""
        with self._lock:
            body = request.get_data()
            sent: list[Recording] = []
            answers: list[Response] = []
            for base in self._bases:
                with self._wire.record() as recording:
                    answers.append(_ask(base, body))
                sent.append(recording)
            response = answers[0]
            self._redirected.append(_section(sent))
            if 300 <= response.status_code < 400:  # the page after the redirect shows the section
                return response
            sections, self._redirected = self._redirected, []
        if response.mimetype == "text/html":
            page = response.get_data(as_text=True)
            shown = render_template("sent.html", sections=sections)
            response.set_data(page.replace("</body>", f"{shown}</body>", 1))
        return response


def _ask(base: str, body: bytes) -> Response:
    """Send Flask's current request to a server, and leave redirects to the browser."""
    url = urlsplit(base)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
    try:
        path = iri_to_uri(request.full_path.rstrip("?"))
        headers = {"Content-Type": request.content_type or "", "Accept": "*/*"}
        connection.request(request.method, path, body or None, headers)
        answer = connection.getresponse()
        headers_of_answer = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in _NOT_PASSED_ON
        ]
        return Response(answer.read(), answer.status, headers_of_answer)
    finally:
        connection.close()


def _section(sent: Sequence[Recording]) -> Mapping[str, object]:
    """Return what the template shows of one request."""
    titles = ("with fictive_sqlalchemy", "on stock Flask-SQLAlchemy")
    return {
        "request": f"{request.method} {request.full_path.rstrip('?')}",
        "columns": [
            {"title": title, "statements": list(statements(each)), "figures": figures(each)}
            for title, each in zip(titles, sent, strict=True)
        ],
    }


@contextmanager
def front_server(wire: WireProxy, bases: Sequence[str], port: int) -> Iterator[str]:
    """Serve the front in a thread of this process.

    :param wire: The proxy in front of PostgreSQL.
    :param bases: The URLs of the server with fictive_sqlalchemy and of the server with stock.
    :param port: The front's port of 127.0.0.1; 0 for a free port.
    :returns: A context manager that gives the URL of the front.
    """
    app = Flask(__name__)
    front = Front(wire, bases)
    methods = ["GET", "POST"]
    app.add_url_rule("/", "page", front.answer, methods=methods)
    app.add_url_rule("/<path:path>", "other", lambda path: front.answer(), methods=methods)
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
