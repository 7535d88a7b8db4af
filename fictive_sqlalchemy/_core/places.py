"""Where in the application a call came from, for messages."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from functools import lru_cache
from inspect import currentframe
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

# The packages whose frames are between the application's and the database.
_LIBRARIES = frozenset({"fictive_sqlalchemy", "sqlalchemy", "flask_sqlalchemy", "contextlib"})

_OF_ATTRIBUTES = (
    ("sqlalchemy.orm.attributes", "__get__"),
    ("sqlalchemy.orm.attributes", "__set__"),
)

# Where Python and what it installs are; packages are also in directories with these names.
_INSTALLED = tuple(
    {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "scripts")}
)
_OF_PACKAGES = frozenset({"site-packages", "dist-packages"})


class Place(NamedTuple):
    """A line of the application, and what it has called there."""

    filename: str
    line: int
    function: str
    call: str

    def __str__(self) -> str:
        call = self.call if "." in self.call else f"{self.call}()"  # an attribute that is loaded
        return f"{call} in {self.filename}, line {self.line}, in {self.function}"


class Caller(NamedTuple):
    """The application's line that is being executed, and all that can be told of it."""

    place: Place

    called_from: Place | None
    """If the place is in an installed package: the line outside of those that has called it."""

    code: CodeType
    offset: int
    """Which instruction of the code is being executed."""

    way: tuple[tuple[str, str], ...]
    """The module and the name of each function between the place and here, the innermost first."""

    call: FrameType | None
    """The frame of what the line has called, to tell one call from the next. It holds objects."""

    attribute: Any
    """The mapped attribute that is being read or set there, if that is all the line has called."""

    @property
    def called(self) -> str:
        """What the line has called, as one would write it."""
        return f"{self.place.call}()" if self.attribute is None else str(self.attribute)


def calling_place() -> Place:
    """Return the line of the application that is being executed, with the call it has made."""
    frame, call = _calling_frame(currentframe())
    return _place(frame, call)


# Documented, and named as if it were private, because not each Python has it.
_frame_at = sys._getframe  # pyright: ignore[reportPrivateUsage]

_depths: dict[int, int] = {}
"""How many frames above a statement its line was the last time, by the hash of the SQL. The SQL
itself may be long."""

_MOST_DEPTHS = 5_000


class Spot(NamedTuple):
    """What a place is made of, when somebody asks for it: to make one takes longer."""

    code: CodeType
    offset: int
    call: str

    def place(self) -> Place:
        """Return the place."""
        line = next(
            (line for start, end, line in self.code.co_lines() if start <= self.offset < end), None
        )
        code = self.code
        return Place(code.co_filename, line or code.co_firstlineno, code.co_name, self.call)


def place_of(sql: str) -> Place | Spot | None:
    """Return the application's line that sends a statement, in a fraction of the time.

    It tries the frame that it was for the same statement the last time. To look at each frame would
    cost more, because Python makes an object for each that is looked at.

    :param sql: The statement.
    """
    depth = _depths.get(hash(sql))
    if depth is not None:
        try:
            below = _frame_at(depth)
        except ValueError:  # the stack is not that deep this time
            pass
        else:
            frame, call = below.f_back, below.f_code.co_name
            # No functions are called here: each statement comes here.
            if (
                frame is not None
                and _known.get(frame.f_globals.get("__name__", "")) is False
                and _known.get(below.f_globals.get("__name__", ""))
                and call[0] != "_"
            ):
                spot: Spot = _spot(Spot, (frame.f_code, frame.f_lasti, call))
                return spot
    each: FrameType | None = _frame_at(1)
    outermost, depth, call = each, 0, ""
    while each is not None:
        if not _is_of_a_library(each):
            if (attribute := _attribute_of(outermost)) is not None:
                call = str(attribute)
            if len(_depths) >= _MOST_DEPTHS:
                _depths.clear()
            _depths[hash(sql)] = depth
            return _place(each, call)
        function = each.f_code.co_name
        if function[0] != "_":
            call = function
        outermost, each = each, each.f_back
        depth += 1
    return None


_spot: Any = tuple.__new__  # pyright: ignore  # that of a NamedTuple is a function in Python


def calling() -> Caller:
    """Return all that can be told of the line of the application that is being executed."""
    own: Any = currentframe()
    frame, call = _calling_frame(own)
    way: list[tuple[str, str]] = []
    each, outermost = own.f_back, own
    while each is not None and each is not frame:
        way.append((each.f_globals.get("__name__", ""), each.f_code.co_name))
        each, outermost = each.f_back, each
    attribute = _attribute_of(outermost) if way else None
    return Caller(
        place=_place(frame, call),
        called_from=_called_from(frame),
        code=frame.f_code,
        offset=frame.f_lasti,
        way=tuple(way),
        call=outermost,
        attribute=attribute,
    )


def is_within(name: str, of: object) -> bool:
    """Tell whether a method of an object is being executed, further out than here.

    :param name: The name of the method, which is one of the libraries.
    :param of: The object.
    """
    frame = currentframe()
    while frame is not None:
        if (
            frame.f_code.co_name == name
            and _is_of_a_library(frame)
            and frame.f_locals.get("self") is of
        ):
            return True
        frame = frame.f_back
    return False


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


def _attribute_of(frame: FrameType | None) -> Any:
    """Return the mapped attribute that a frame of SQLAlchemy's reads or sets, if that is all."""
    if frame is None:
        return None
    function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    return frame.f_locals.get("self") if function in _OF_ATTRIBUTES else None


def _place(frame: FrameType, call: str) -> Place:
    line: int = frame.f_lineno
    if (template := frame.f_globals.get("__jinja_template__")) is not None:
        line = template.get_corresponding_lineno(line)  # of the template, which is compiled
    return Place(frame.f_code.co_filename, line, frame.f_code.co_name, call)


def _calling_frame(frame: FrameType | None) -> tuple[FrameType, str]:
    assert frame is not None  # as on every Python that SQLAlchemy runs on
    call = frame.f_code.co_name
    while frame.f_back is not None and _is_of_a_library(frame):
        name = frame.f_code.co_name
        if not name.startswith("_"):  # list(query) calls __iter__(), and that calls execute()
            call = name
        frame = frame.f_back
    return frame, call


def _called_from(frame: FrameType) -> Place | None:
    if not _is_installed(frame.f_code.co_filename):
        return None
    call, outer = frame.f_code.co_name, frame.f_back
    while outer is not None and (
        _is_of_a_library(outer) or _is_installed(outer.f_code.co_filename)
    ):
        call, outer = outer.f_code.co_name, outer.f_back
    return None if outer is None else _place(outer, call)


def _is_of_a_library(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    is_of_a_library = _known.get(name)
    if is_of_a_library is None:
        is_of_a_library = _known[name] = name.partition(".")[0] in _LIBRARIES
    return is_of_a_library


_known: dict[str, bool] = {}
"""For the name of each module that was seen: whether it is one of a library."""


@lru_cache(maxsize=1024)
def _is_installed(filename: str) -> bool:
    """Tell whether code is a part of Python or of an installed package."""
    if filename.startswith("<frozen"):
        return True
    path = Path(filename)
    return not _OF_PACKAGES.isdisjoint(path.parts) or any(
        directory in path.parents for directory in _INSTALLED
    )
