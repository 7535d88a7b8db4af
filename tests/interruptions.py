"""An exception at any line that the package executes, as one from a signal handler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import fictive_sqlalchemy

PACKAGE = str(Path(fictive_sqlalchemy.__file__).parent)


class SoftLimit(Exception):
    """An exception that is raised by a signal handler, such as Celery's."""


class HardStop(BaseException):
    """One that is no Exception, such as KeyboardInterrupt."""


class Interruption:
    """Raises an exception before the n-th line that the package executes in a call.

    :param number: Which line, from 1.
    :param exception: What is raised there.
    """

    def __init__(self, number: int, exception: type[BaseException]) -> None:
        self._left = number
        self._exception = exception
        self.place: str | None = None
        """Where it was raised, if the call has executed so many lines."""
        self.in_reset = False
        """Whether it was in the pool's reset, where SQLAlchemy logs an ``Exception``."""

    def run(self, function: Callable[[], object]) -> BaseException | None:
        """Call a function, and return what it has raised."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            function()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_name == "__del__":  # where Python itself raises no exception further
            return None
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "line" or self.place is not None:
            return self._line
        self._left -= 1
        if not self._left:
            self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            around: FrameType | None = frame
            while around is not None:
                self.in_reset |= around.f_code.co_name == "_finalize_fairy"
                around = around.f_back
            raise self._exception(self.place)
        return self._line
