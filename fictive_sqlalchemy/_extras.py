"""The error for a library that is not installed, because its extra was not asked for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ._core.errors import see


@contextmanager
def installed_by(what: str) -> Generator[None]:
    """Say what to install if the block imports a module that is not there.

    :param what: What installs the modules that the block imports: an extra of this package, or the
        name of a library.
    :raises ModuleNotFoundError: if a module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The module {error.name} is not installed: install {what}." + see("extra-missing"),
            name=error.name,
            path=error.path,
        ) from error
