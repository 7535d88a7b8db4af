"""One log line for each unit of work: a request, a command, a task, a ``unit_of_work()``.

With Flask-SQLAlchemy, call ``db.report_requests(app)``. Without Flask-SQLAlchemy::

    reporter = Reporter(engine).start()

    with reporter.unit("nightly"):
        ...

    # nightly: 4 statements, 5 round trips, 1 transaction 3.2 ms (0.4 ms waiting), connection 6.1 ms

A unit consists of what is sent in its own thread, greenlet or asyncio task. Threads that the unit
starts are not part of it, unless they run in a copy of its context (``contextvars``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy.engine import Dialect
from sqlalchemy.exc import ArgumentError

from ._core import observing
from ._core.errors import see
from ._core.recorder import leave_context, of_this_context, recorder
from ._core.records import Transaction
from ._core.transacting import TransactingConnection
from ._core.watchdog import Watchdog
from .recording import Recording, counted, dialects_of, engines_of, milliseconds

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Report", "Reporter"]

_log = logging.getLogger("fictive_sqlalchemy.requests")
"""The logger that gets a line at INFO for each unit, and a WARNING for each transaction that is
open for too long."""


@dataclass
class Report:
    """What one unit has sent."""

    name: str
    """The name of the unit: ``"POST /transfer"``, ``"flask nightly"``, ``"task shop.mail"``."""

    recording: Recording
    """The statements, transactions and connections."""

    status: int | str | None = None
    """The status of the response, or the name of the exception that has ended the unit."""

    duration: float = 0.0
    """How many seconds the unit took."""

    def __str__(self) -> str:
        status = "" if self.status is None else f" {self.status}"
        return f"{self.name}{status}: {self.recording.summary()}"

    def server_timing(self) -> str:
        """Return the value of a ``Server-Timing`` header: https://www.w3.org/TR/server-timing/."""
        recording = self.recording
        numbers = (
            f"{counted(recording.statement_count, 'statement')}, "
            f"{counted(recording.round_trips, 'round trip')}"
        )
        parts = [
            f'db;dur={_ms(recording.duration)};desc="{numbers}"',
            f"transaction;dur={_ms(recording.open)}",
            f"waiting;dur={_ms(recording.waiting)}",
            f"connection;dur={_ms(recording.held)}",
            f"pool;dur={_ms(recording.waited)}",
        ]
        return ", ".join(parts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


class _Unit(Recording):
    """The recording of a unit, which reports each transaction to the watchdog."""

    def __init__(
        self, of: Reporter, dialects: frozenset[Dialect], watchdog: Watchdog | None
    ) -> None:
        super().__init__(dialects, keep=_KEPT)
        self.of = of
        self.report: Callable[[], Report | None] = _nothing
        """A function that returns the unit's report: ``None`` when the unit has ended, or when the
        report was forgotten without an end."""
        self.slow: list[Transaction] = []
        """The transactions that were open for too long, including those that are not kept."""
        self._watchdog = watchdog

    def covers(self, connection: TransactingConnection) -> bool:
        # A copy of the context, such as that of a thread, may outlive the unit.
        return self.report() is not None and connection.dialect in self._dialects

    def add_transaction(self, transaction: Transaction) -> None:
        super().add_transaction(transaction)
        if self._watchdog is not None:
            self._watchdog.watch(transaction)

    def end_transaction(self, transaction: Transaction) -> None:
        limit = self.of.slow_transaction
        if limit is not None and transaction.duration > limit and len(self.slow) < _KEPT:
            self.slow.append(transaction)


def _nothing() -> None:
    return None


#: How many statements of a unit are kept. All statements are counted.
_KEPT = 500


class Reporter:
    """Reports each unit by a line in the log and by a callback.

    :param sources: One or more extensions or engines, or a function that returns a list of these.
        The function is called with the first unit.
    :param slow_transaction: How many seconds a transaction may be open. If it is open for longer, a
        WARNING is logged while it is open, and another at the end of the unit. With ``None``, there
        are no warnings.
    :param callback: A function that is called with the :class:`Report` of each unit, for metrics.
        Errors of the function are logged.
    :raises sqlalchemy.exc.ArgumentError: if there is no source, if a source has no engine of
        :func:`fictive_sqlalchemy.create_engine`, if ``slow_transaction`` is no number above 0, or
        if ``callback`` can't be called.
    """

    def __init__(
        self,
        *sources: Any,
        slow_transaction: float | None = 1.0,
        callback: Callable[[Report], object] | None = None,
    ) -> None:
        is_number = isinstance(slow_transaction, (int, float)) and not isinstance(
            slow_transaction, bool
        )
        if slow_transaction is not None and not (is_number and slow_transaction > 0):
            raise ArgumentError(
                "slow_transaction is a number of seconds above 0, or None for no warnings, and not "
                f"{slow_transaction!r}." + see("recording-arguments")
            )
        if callback is not None and not callable(callback):
            raise ArgumentError(
                f"callback is called with each report, and {callback!r} can't be called."
                + see("recording-arguments")
            )
        self._sources = sources
        self._dialects: frozenset[Dialect] | None = None
        if not any(map(_is_function, sources)):
            self._dialects = dialects_of(engines_of(sources, "Reporter()"))
        self.slow_transaction = slow_transaction
        self.callback = callback
        self._watchdog: Watchdog | None = None
        self._is_on = False
        self._lock = threading.Lock()

    @property
    def is_on(self) -> bool:
        """Whether the reporter was started and not stopped."""
        return self._is_on

    def start(self) -> Self:
        """Start to report units, including each ``unit_of_work()`` and ``DatabaseTask`` task."""
        with self._lock:
            if not self._is_on:
                self._is_on = True
                if self.slow_transaction is not None:
                    self._watchdog = Watchdog(self.slow_transaction, self._warn_of_open)
                recorder.use(self, self._dialects or ())
                observing.reporters += (self.unit,)
        return self

    def stop(self) -> None:
        """Stop reporting units."""
        with self._lock:
            if self._is_on:
                self._is_on = False
                observing.reporters = tuple(
                    each for each in observing.reporters if each != self.unit
                )
                recorder.leave(self)
                if self._watchdog is not None:
                    self._watchdog.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def unit(self, name: str) -> Generator[Report | None]:
        """Report what is sent in this block, as one unit.

        :param name: The name of the unit, for the log.
        :returns: A context manager that gives the :class:`Report`. It gives ``None`` while the
            reporter is not started, and inside another unit, of which the block is then a part.
        """
        report = self.begin(name)
        if report is None:
            yield None
            return
        try:
            yield report
        except BaseException as error:
            report.status = type(error).__name__
            raise
        finally:
            self.end(report)

    def begin(self, name: str) -> Report | None:
        """Begin a unit where a ``with`` block is not possible. Call :meth:`end` at its end.

        :param name: The name of the unit, for the log.
        :returns: The report. ``None`` inside another unit, and while the reporter is not started.
        """
        if not self._is_on:
            return None
        here = of_this_context.get()
        if here:
            here = tuple(each for each in here if not isinstance(each, _Unit) or each.report())
            if any(isinstance(each, _Unit) and each.of is self for each in here):
                return None
        if self._dialects is None:
            self._dialects = dialects_of(
                engine
                for source in self._sources
                for found in (source() if _is_function(source) else (source,))
                for engine in engines_of([found], "Reporter()")
            )
            for dialect in self._dialects:
                recorder.look_at(dialect)
        unit = _Unit(self, self._dialects, self._watchdog)
        report = Report(name, unit, duration=-perf_counter())
        unit.report = ref(report)
        of_this_context.set((*here, unit))
        return report

    @staticmethod
    def suspend(report: Report) -> None:
        """Leave a unit for now: what is sent next in this context is not part of the unit.

        :param report: What :meth:`begin` returned.
        """
        leave_context(report.recording)

    @contextmanager
    def resumed(self, report: Report) -> Generator[None]:
        """Continue a unit in this block: any thread may make the next part of a streamed response.

        :param report: What :meth:`begin` returned.
        """
        here = of_this_context.get()
        if report.recording in here:
            yield
            return
        of_this_context.set((*here, report.recording))
        try:
            yield
        finally:
            self.suspend(report)

    def end(self, report: Report) -> None:
        """End a unit: log its report, and call the callback.

        :param report: What :meth:`begin` returned.
        """
        report.duration += perf_counter()
        self.suspend(report)
        unit, limit = report.recording, self.slow_transaction
        slow: list[Transaction] = []
        if isinstance(unit, _Unit):
            unit.report = _nothing
            slow += unit.slow
        unit.end()
        _log.info("%s", report)
        if limit is not None:  # transactions that are still open are not in unit.slow
            slow += [one for one in unit.transactions if not one.has_ended and one.duration > limit]
        for transaction in slow:
            _log.warning(
                "%s: a transaction was open for %s, and for %s of that time the database did "
                "nothing for it. The transaction was begun by %s. Put calls that wait for "
                "something else before the block, after it, or into on_commit()."
                + see("slow-transaction"),
                report.name,
                milliseconds(transaction.duration),
                milliseconds(transaction.waiting),
                transaction.begun_at,
            )
        if self.callback is not None:
            try:
                self.callback(report)
            except Exception:
                _log.exception("The callback of a report has failed." + see("report-callback"))

    @staticmethod
    def _warn_of_open(transaction: Transaction, stack: str) -> None:
        _log.warning(
            "A transaction has been open for %s and still is, begun by %s. The stack of "
            "its thread follows." + see("slow-transaction") + "\n%s",
            milliseconds(transaction.duration),
            transaction.begun_at,
            stack,
        )


def _is_function(source: Any) -> bool:
    # A scoped session and an extension are no functions, although a scoped session can be called.
    return type(source).__name__ in ("function", "method", "partial")
