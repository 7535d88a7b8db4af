"""Where in the application a call came from, for messages."""

from __future__ import annotations

from inspect import currentframe
from types import FrameType
from typing import NamedTuple

# Whose frames are between the application and the database.
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
    frame = currentframe()
    assert frame is not None  # as on every Python that SQLAlchemy runs on
    call = frame.f_code.co_name
    while frame.f_back is not None and _is_of_a_library(frame):
        name = frame.f_code.co_name
        if not name.startswith("_"):  # what list(query) calls says less than what that calls
            call = name
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, call)


def _is_of_a_library(frame: FrameType) -> bool:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in _LIBRARIES
