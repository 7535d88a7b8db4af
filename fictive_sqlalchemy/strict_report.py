"""A report of the places in an application that behave differently in the strict mode.

The strict mode is the mode without ``begin_on_write``. The report is off until it is started. A
read without pending changes costs the same whether the report is on or off. While the report is on,
calls that flush, write, lock, or end a transaction take longer.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._core.differences import Difference, Kind, Watch
from ._core.errors import see

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Finding", "StrictReport", "formatted", "read_report"]

_log = logging.getLogger(__name__)

_BLOCK = "put it, and what belongs together with it, into `with session.begin():`"

# For each kind: what would be different, and what to do. {call} is what the line has called.
_TEXTS = {
    Kind.READ: (
        "{call} flushes the pending changes ({detail}) before it reads; in the strict mode it "
        "would not find them",
        "put the changes and the read into one `with session.begin():`, where reads flush",
    ),
    Kind.FLUSH: ("{call} would store the pending changes at once, and not with commit()", _BLOCK),
    Kind.WRITE: (
        "{call} would be stored at once, and not with commit(); its locks and settings would end "
        "with it",
        _BLOCK,
    ),
    Kind.SAVEPOINT: (
        "{call} would be a transaction of its own, stored at its end, and not with commit()",
        "put `with session.begin():` around it, and around what belongs together with it",
    ),
    Kind.LOCK: (
        "{call} with a lock would be refused, because the server would release the lock at once",
        "put it, and what the lock protects, into `with session.begin():`",
    ),
    Kind.ROLLBACK: (
        "{call} would only discard the pending changes, and not undo what was stored before it, "
        "first by {detail}",
        "put the calls that it has to undo into `with session.begin():`, which an exception rolls "
        "back",
    ),
    Kind.COMMIT: (
        "{call} inside a block would be refused, and the block rolled back",
        "leave it out: the block commits at its end",
    ),
    Kind.PASSED_OVER: (
        "{call} did not flush the pending changes ({detail}), so it could not find them",
        "put the changes and the read into one `with session.begin():`, where reads flush",
    ),
    Kind.CONNECTION: (
        "a session runs on a Connection of your own, where it is SQLAlchemy's own session: its "
        "calls prove nothing about either mode, and are not in this report",
        "isolate tests with db.test_isolation() or isolate() in place of that Connection",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One place of the application, and what is different there in the strict mode."""

    kind: str
    """``"read"``, ``"flush"``, ``"write"``, ``"savepoint"``, ``"lock"``, ``"rollback"`` or
    ``"commit"``. For a session in the strict mode, the kind is ``"passed over"``. For a session on
    a Connection of the user's own, it is ``"connection"``, once for all places."""

    filename: str
    line: int
    function: str

    call: str
    """What the line calls, such as ``"flush()"``, or the attribute that it reads."""

    called_from: str | None = None
    """If the place is in an installed package, the line outside of such packages that called it."""

    detail: str = ""

    @property
    def is_place(self) -> bool:
        """Whether the finding is about this place; ``"connection"`` is about all places."""
        return self.kind != Kind.CONNECTION.value

    @property
    def difference(self) -> str:
        """What would be different."""
        return _TEXTS[Kind(self.kind)][0].format(call=self.call, detail=self.detail)

    @property
    def remedy(self) -> str:
        """What to do so that the place behaves the same in both modes."""
        return _TEXTS[Kind(self.kind)][1]

    def __str__(self) -> str:
        place = f"{_shortened(self.filename)}:{self.line} in {self.function}"
        if self.called_from is not None:
            filename, _, line = self.called_from.rpartition(":")
            place += f" (called from {_shortened(filename)}:{line})"
        return " ".join((f"{place}: {self.difference}.", f"Remedy: {self.remedy}."))


@dataclass
class _Entry:
    finding: Finding
    times: count[int] = field(default_factory=count)
    seen: int = 0


class StrictReport:
    """Records the places of an application that behave differently in the strict mode::

        from fictive_sqlalchemy.strict_report import StrictReport

        with StrictReport() as report:
            with OptInSession(engine, begin_on_write=True) as session:
                session.execute(text("SELECT pg_advisory_xact_lock(1)"))
                session.rollback()

        for finding in report.findings():
            print(finding)

    For sessions with ``begin_on_write=True``, the report records all that would be different
    without the option. For sessions in the strict mode, it records reads that do not flush pending
    changes. Each place is recorded once for all threads, and logged as a warning of
    ``fictive_sqlalchemy.strict_report``. Start and stop the report while no other thread uses a
    session.

    :param file: A file to which each new place is added. Several processes may share the file, and
        :func:`read_report` reads it. If there is no such file, it is made with the first place. If
        the file can't be written, the error is logged once, and the application goes on.
    :param limit: How many places are kept at most. Further places are only counted.
    :param log: Whether new places are logged.
    """

    def __init__(
        self, file: str | os.PathLike[str] | None = None, *, limit: int = 1000, log: bool = True
    ) -> None:
        self._file = None if file is None else Path(file).absolute()
        self._limit = limit
        self._has_failed = False
        self._logs = log
        # There is no lock, because a fork could leave it locked in the child. Each step below is
        # one operation of a dict or an iterator, and needs no lock.
        self._entries: dict[Any, _Entry] = {}
        self._left_out = count()
        self.left_out = 0
        """How often a place beyond the limit was met."""

    def start(self) -> Self:
        """Start recording, unless the report has been started already."""
        _recording.start(self)
        return self

    def stop(self) -> None:
        """Stop recording; the findings are kept."""
        _recording.stop(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def findings(self) -> list[Finding]:
        """Return the findings in the order of files and lines."""
        return _in_order(entry.finding for entry in list(self._entries.values()))

    def times(self, finding: Finding) -> int:
        """Return how often a place was met, counted at most once for each transaction.

        :param finding: One of :meth:`findings`.
        """
        entry = self._entries.get(_key(finding))
        return 0 if entry is None else entry.seen

    def clear(self) -> None:
        """Forget the findings; the file is kept."""
        self._entries.clear()
        self._left_out, self.left_out = count(), 0

    def add(self, finding: Finding) -> None:
        """Record a place, for example one that another process has recorded.

        :param finding: The place.
        """
        key = _key(finding)
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= self._limit:
                self.left_out = next(self._left_out) + 1
                return
            new = _Entry(finding)
            entry = self._entries.setdefault(key, new)
            if entry is new:
                self._publish(finding)
        entry.seen = next(entry.times) + 1

    def _publish(self, finding: Finding) -> None:
        if self._logs:
            _log.warning("%s%s", finding, see("strict-report"))
        if self._file is not None:
            try:
                _append(self._file, json.dumps(asdict(finding)) + "\n")
            except OSError as error:  # an error of the report must not reach the application
                if not self._has_failed:
                    self._has_failed = True
                    _log.warning(
                        "Places of the strict report are not in its file: %s"
                        + see("strict-report"),
                        error,
                    )

    def __str__(self) -> str:
        return formatted(self.findings(), self.left_out)


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write in append mode stays in one piece, even if other processes write, too.
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def read_report(file: str | os.PathLike[str]) -> list[Finding]:
    """Read what one or more processes have recorded, each place once.

    A line that can't be read is left out, such as the last line of a process that was killed, or a
    line that was written to a full disk.

    :param file: The file that was passed to :class:`StrictReport`.
    :raises FileNotFoundError: if no process has recorded a place in this file.
    :raises ValueError: if the file has lines, but no line that can be read.
    """
    found: dict[Any, Finding] = {}
    lines = Path(file).read_bytes().splitlines()
    for line in lines:
        try:
            finding = Finding(**json.loads(line))
            Kind(finding.kind)
        except (TypeError, ValueError):
            continue
        found.setdefault(_key(finding), finding)
    if lines and not found:
        raise ValueError(
            f"{os.fspath(file)} is no file of a StrictReport: name another file, or delete this "
            "one." + see("strict-report")
        )
    return _in_order(found.values())


def _in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings in the order of files and lines; those about all places come first."""
    return sorted(
        findings,
        key=lambda one: (
            one.is_place,
            _shortened(one.filename),
            one.line,
            one.kind,
            one.called_from or "",
        ),
    )


def formatted(findings: list[Finding], left_out: int = 0) -> str:
    """Return a line for each finding, and a line with their number.

    :param findings: The findings.
    :param left_out: How often a place beyond the limit was met.
    """
    lines = [str(finding) for finding in findings]
    places = sum(finding.is_place for finding in findings)
    subject = f"{places} places mean"
    if places < 2:
        subject = "1 place means" if places else "No place that was met means"
    if left_out:
        lines.append(f"The report is full: places that are not in it were met {left_out} times.")
    lines.append(f"{subject} something else in the strict mode than with begin_on_write=True.")
    return "\n".join(lines)


def _shortened(filename: str) -> str:
    """Return the name of a file, relative to the current directory if the file is in there."""
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except ValueError:
        return filename


def _key(finding: Finding) -> Any:
    if not finding.is_place:
        return finding.kind
    return (
        finding.kind,
        finding.filename,
        finding.line,
        finding.function,
        finding.called_from,
    )


class _Recording:
    """The reports that are on, which share one :class:`.Watch`."""

    def __init__(self) -> None:
        self._reports: tuple[StrictReport, ...] = ()
        self._watch = Watch(self.tell)
        self._lock = threading.Lock()

    def start(self, report: StrictReport) -> None:
        with self._lock:
            if report in self._reports:
                return
            if not self._reports:
                self._watch.begin()
            self._reports += (report,)

    def stop(self, report: StrictReport) -> None:
        with self._lock:
            if report not in self._reports:
                return
            self._reports = tuple(one for one in self._reports if one is not report)
            if not self._reports:
                self._watch.end()

    def tell(self, difference: Difference) -> None:
        caller = difference.caller
        place, outer = caller.place, caller.called_from
        finding = Finding(
            kind=difference.kind.value,
            filename=place.filename,
            line=place.line,
            function=place.function,
            call=caller.called,
            called_from=outer and f"{outer.filename}:{outer.line} in {outer.function}",
            detail=difference.detail,
        )
        for report in self._reports:
            report.add(finding)


_recording = _Recording()
