"""Find the line of the application that a call came from, for messages."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from functools import lru_cache
from inspect import currentframe
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

# The packages whose frames lie between those of the application and the database.
_LIBRARIES = frozenset({"fictive_sqlalchemy", "sqlalchemy", "flask_sqlalchemy", "contextlib"})

_OF_ATTRIBUTES = (
    ("sqlalchemy.orm.attributes", "__get__"),
    ("sqlalchemy.orm.attributes", "__set__"),
)

# The directories of Python and of installed packages. Packages are also in any directory with one
# of the names in _OF_PACKAGES.
_INSTALLED = tuple(
    {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "scripts")}
)
_OF_PACKAGES = frozenset({"site-packages", "dist-packages"})


class Place(NamedTuple):
    """A line of the application, and what this line has called."""

    filename: str
    line: int
    function: str
    call: str

    def __str__(self) -> str:
        call = self.call if "." in self.call else f"{self.call}()"  # with a dot: a loaded attribute
        return f"{call} in {self.filename}, line {self.line}, in {self.function}"


class Caller(NamedTuple):
    """The application's line that is being executed, and all that is known about it."""

    place: Place

    called_from: Place | None
    """If the place is in an installed package: the line of other code that has called it."""

    code: CodeType
    offset: int
    """Which instruction of the code is being executed."""

    way: tuple[tuple[str, str], ...]
    """The module and name of each function from the place to here, the innermost first."""

    call: FrameType | None
    """The frame of the function that the line has called, to tell one call from the next. A frame
    keeps the objects in its local variables alive."""

    attribute: Any
    """The mapped attribute that the line reads or sets, if the line has called nothing else."""

    @property
    def called(self) -> str:
        """What the line has called, such as ``flush()`` or ``User.name``."""
        return f"{self.place.call}()" if self.attribute is None else str(self.attribute)


def calling_place() -> Place:
    """Return the line of the application that is being executed, and the call on this line."""
    frame, call = _calling_frame(currentframe())
    return _place(frame, call)


# Public and documented. The name has an underscore because not each Python has the function.
_frame_at = sys._getframe  # pyright: ignore[reportPrivateUsage]

_depths: dict[int, int] = {}
"""How many frames above a statement the application's line was the last time. The key is the hash
of the SQL, because the SQL itself may be long."""

_MOST_DEPTHS = 5_000


class Spot(NamedTuple):
    """The parts from which a :class:`Place` is made on demand, because making one takes longer."""

    code: CodeType
    offset: int
    call: str

    def place(self) -> Place:
        """Return the place that these parts describe."""
        line = next(
            (line for start, end, line in self.code.co_lines() if start <= self.offset < end), None
        )
        code = self.code
        return Place(code.co_filename, line or code.co_firstlineno, code.co_name, self.call)


def place_of(sql: str) -> Place | Spot | None:
    """Return the application's line that sends a statement: :func:`calling_place`, but faster.

    The function first tries the frame at which it found the line for the same statement the last
    time. To look at all frames takes longer, because Python makes an object for each of them.

    :param sql: The statement.
    """
    depth = _depths.get(hash(sql))
    if depth is not None:
        try:
            below = _frame_at(depth)
        except ValueError:  # the stack is less deep this time
            pass
        else:
            frame, call = below.f_back, below.f_code.co_name
            # No function is called here, because each statement passes through this code.
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


_spot: Any = tuple.__new__  # pyright: ignore  # Spot.__new__ is a Python function, and slower


def calling() -> Caller:
    """Return all that is known about the line of the application that is being executed."""
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
    """Tell whether a method of an object is being executed, in a frame further out than the caller.

    :param name: The name of the method, which a library defines.
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
    """Warn at the line of the application that is being executed; as a rule once for each line.

    :param message: The text of the warning.
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
    """Return the mapped attribute that a frame of SQLAlchemy reads or sets; otherwise ``None``."""
    if frame is None:
        return None
    function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    return frame.f_locals.get("self") if function in _OF_ATTRIBUTES else None


def _place(frame: FrameType, call: str) -> Place:
    line: int = frame.f_lineno
    if (template := frame.f_globals.get("__jinja_template__")) is not None:
        line = template.get_corresponding_lineno(line)  # the frame has the line of compiled code
    return Place(frame.f_code.co_filename, line, frame.f_code.co_name, call)


def _calling_frame(frame: FrameType | None) -> tuple[FrameType, str]:
    assert frame is not None  # every Python that SQLAlchemy runs on has frames
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
"""For the name of each module that was seen: whether the module belongs to a library."""


@lru_cache(maxsize=1024)
def _is_installed(filename: str) -> bool:
    """Tell whether a file belongs to Python or to an installed package."""
    if filename.startswith("<frozen"):
        return True
    path = Path(filename)
    return not _OF_PACKAGES.isdisjoint(path.parts) or any(
        directory in path.parents for directory in _INSTALLED
    )
