"""Where in the application a call came from, for messages."""

from __future__ import annotations

import warnings
from inspect import currentframe
from types import FrameType
from typing import NamedTuple

# The packages whose frames are between the application's and the database.
_LIBRARIES = frozenset({"fictive_sqlalchemy", "sqlalchemy", "flask_sqlalchemy", "contextlib"})


class Place(NamedTuple):
    """A line of the application, and what it has called there."""

    filename: str
    line: int
    function: str
    call: str

    def __str__(self) -> str:
        return f"{self.call}() in {self.filename}, line {self.line}, in {self.function}"


def calling_place() -> Place:
    """Return the line of the application that is being executed, with the call it has made."""
    frame, call = _calling_frame(currentframe())
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, call)


def warn_at_calling_place(message: str, category: type[Warning]) -> None:
    """Warn, with the line of the application that is being executed; as a rule once for each line.

    :param message: What is wrong.
    :param category: The class of the warning.
    """
    frame, _ = _calling_frame(currentframe())
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _calling_frame(frame: FrameType | None) -> tuple[FrameType, str]:
    assert frame is not None  # as on every Python that SQLAlchemy runs on
    call = frame.f_code.co_name
    while frame.f_back is not None and _is_of_a_library(frame):
        name = frame.f_code.co_name
        if not name.startswith("_"):  # list(query) calls __iter__(), and that calls execute()
            call = name
        frame = frame.f_back
    return frame, call


def _is_of_a_library(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in _LIBRARIES
