"""A log line and a header with what each request of a Flask application has sent.

See :mod:`fictive_sqlalchemy.reporting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import click
from flask import Flask, appcontext_popped, appcontext_pushed, current_app, has_app_context

from ..._core.engine import OptInEngine
from ..._core.errors import see
from ...reporting import Report, Reporter

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_EXTENSION = "fictive_sqlalchemy.request_reports"


class RequestReportsMixin:
    """Adds ``report_requests()`` to the extension."""

    def report_requests(
        self,
        app: Flask,
        *,
        header: bool = False,
        slow_transaction: float | None = 1.0,
        callback: Callable[[Report], object] | None = None,
    ) -> Reporter:
        """Log what each request, command and task has sent: ``db.report_requests(app)``.

        The logger is ``fictive_sqlalchemy.requests``, and the level is INFO. Sends nothing.

        :param app: The application.
        :param header: Whether responses get the numbers as a ``Server-Timing`` header, which
            browsers show. What is sent while a response is streamed comes too late for the header.
        :param slow_transaction: How many seconds a transaction may be open. If it is open for
            longer, a WARNING is logged while it is open, and another at the end of the request,
            command or task. With ``None``, there are no warnings.
        :param callback: A function that is called with each :class:`.Report`, for metrics. Errors
            of the function are logged.
        :returns: The reporter. Its ``stop()`` stops it.
        :raises RuntimeError: if the requests of the application are reported already.
        :raises sqlalchemy.exc.ArgumentError: if an argument is not as described here.
        """
        there: Reporter | None = app.extensions.get(_EXTENSION)
        if there is not None and there.is_on:
            raise RuntimeError(
                "The requests of this application are reported already: call report_requests() "
                "once, or first call stop() of what it has returned." + see("recording-arguments")
            )
        extension: Any = self

        def engines() -> list[OptInEngine]:
            # Flask-SQLAlchemy needs an application context to find the engines. A second context
            # would be reported as another command.
            is_there = has_app_context() and current_app == app
            with nullcontext() if is_there else app.app_context():
                # On another database, as in tests on SQLite, there are no engines to report.
                found = extension.engines.values()
                return [engine for engine in found if isinstance(engine, OptInEngine)]

        reporter = Reporter(engines, slow_transaction=slow_transaction, callback=callback)
        app.extensions[_EXTENSION] = reporter
        app.wsgi_app = _Middleware(app.wsgi_app, reporter, header)  # type: ignore[method-assign]
        commands = _Commands(reporter)
        appcontext_pushed.connect(commands.pushed, app, weak=False)
        appcontext_popped.connect(commands.popped, app, weak=False)
        return reporter.start()


class _Middleware:
    """WSGI middleware, which surrounds teardown functions and the parts of a streamed response."""

    def __init__(self, wsgi_app: WSGIApplication, reporter: Reporter, header: bool) -> None:
        self._wsgi_app = wsgi_app
        self._reporter = reporter
        self._header = header

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        name = f"{environ.get('REQUEST_METHOD', '')} {environ.get('PATH_INFO', '')}"
        report = self._reporter.begin(name)
        if report is None:
            return self._wsgi_app(environ, start_response)

        is_whole = False

        def start(status: str, headers: list[tuple[str, str]], *args: Any) -> Any:
            nonlocal is_whole
            code = status.partition(" ")[0]
            report.status = int(code) if code.isdecimal() else status
            is_whole = report.status in (204, 304) or any(
                name.lower() == "content-length" for name, _ in headers
            )
            if self._header:
                headers = [*headers, ("Server-Timing", report.server_timing())]
            return start_response(status, headers, *args)

        try:
            response = self._wsgi_app(environ, start)
        except BaseException as error:
            report.status = type(error).__name__
            self._reporter.end(report)
            raise
        if is_whole:  # nothing more is sent, and a test client may never close the response
            self._reporter.end(report)
            return response
        self._reporter.suspend(report)  # until the parts of the body are asked for
        return _Response(response, self._reporter, report)


class _Response:
    """The body of a response, which may be a stream that sends more."""

    def __init__(self, body: Iterable[bytes], reporter: Reporter, report: Report) -> None:
        self._body = body
        self._reporter = reporter
        self._report: Report | None = report
        self._parts: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        report = self._report
        if report is None:
            raise StopIteration
        with self._reporter.resumed(report):
            if self._parts is None:
                self._parts = iter(self._body)
            return next(self._parts)

    def close(self) -> None:
        """Close the body, whose teardown functions may roll back, and end the report."""
        report, self._report = self._report, None
        if report is None:
            return
        close = getattr(self._body, "close", None)
        try:
            if close is not None:
                with self._reporter.resumed(report):
                    close()
        finally:
            self._reporter.end(report)


class _Commands:
    """Reports each command of ``flask``, from the begin of its application context to the end."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        # The reports are those of each command, because tests may run several at a time.
        self._open: WeakKeyDictionary[click.Context, list[Report]] = WeakKeyDictionary()

    def pushed(self, app: Flask, **_: Any) -> None:
        context = click.get_current_context(silent=True)
        if context is None:
            return
        reports = self._open.setdefault(context.find_root(), [])
        report = reports[0] if reports else self._reporter.begin(context.command_path)
        if report is not None:
            reports.append(report)  # once for each application context

    def popped(self, app: Flask, **_: Any) -> None:
        context = click.get_current_context(silent=True)
        reports = [] if context is None else self._open.get(context.find_root(), [])
        if reports:
            report = reports.pop()
            if not reports:
                self._reporter.end(report)
