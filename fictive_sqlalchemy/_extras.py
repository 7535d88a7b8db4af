"""The error for a library that is not installed, because its extra was not asked for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ._core.errors import see

_OURS = __name__.partition(".")[0]

#: What installs Flask.
FLASK = (
    "this package with the extra [flask] or [flask-psycopg], or Flask-SQLAlchemy and a driver of "
    "your own"
)


@contextmanager
def installed_by(what: str) -> Generator[None]:
    """Say what to install if the block imports a module that is not installed.

    Any other error of an import is raised as it is, for example if a library is broken, or if a
    file of the user hides it.

    :param what: What installs the modules that the block imports: an extra of this package, or the
        name of a library.
    :raises ModuleNotFoundError: if a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        is_other = type(error) is not ModuleNotFoundError or "is not a package" in str(error)
        if is_other or (error.name or _OURS).partition(".")[0] == _OURS:
            raise
        raise ModuleNotFoundError(
            f"The module {error.name} is not installed: install {what}." + see("extra-missing"),
            name=error.name,
            path=error.path,
        ) from error
