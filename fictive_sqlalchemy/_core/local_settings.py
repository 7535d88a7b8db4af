"""The settings that are sent with a session's statements: ``session.set_local({…})``.

SET LOCAL of PostgreSQL ends with the transaction, so it has no effect on a read outside one. SET
holds for the server's session, so the next user of the connection would get the setting, too.
Therefore a session's settings are sent with its statements, see :mod:`.carrying`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from enum import Enum
from inspect import iscoroutinefunction
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import exc
from sqlalchemy.orm import Session, SessionTransaction

from .errors import see

Setting: TypeAlias = str | int | float | Decimal | bool | UUID | None
"""The value of a setting; ``None`` removes the setting."""

Settings: TypeAlias = Mapping[str, Setting]
"""Settings by name, such as ``{"app.tenant_id": 7, "statement_timeout": "5s"}``."""

SettingsFunction = TypeVar("SettingsFunction", bound=Callable[[], "Settings | None"])

# Names for set_config(): https://www.postgresql.org/docs/current/runtime-config-custom.html
_NAME = re.compile(r"[a-z_][a-z0-9_$]*(?:\.[a-z_][a-z0-9_$]*)*\Z")

_OF_BEGIN = "it is a part of BEGIN: use begin(isolation_level=…, read_only=…, deferrable=…)"
_OF_DRIVER = (
    "the driver has to know it: set it for the whole connection, with the engine option "
    'connect_args={"options": "-c name=value"}, or client_encoding=…'
)
_REFUSED = {
    "transaction_isolation": _OF_BEGIN,
    "transaction_read_only": _OF_BEGIN,
    "transaction_deferrable": _OF_BEGIN,
    "client_encoding": _OF_DRIVER,
    "standard_conforming_strings": _OF_DRIVER,
    "datestyle": _OF_DRIVER,
    "intervalstyle": _OF_DRIVER,
}


def checked(settings: Any, call: str = "set_local()") -> dict[str, str | None]:
    """Return settings as the server takes them: names in lower case, values as text.

    :param settings: The settings that the user has given.
    :param call: The function that the user has called, for the error.
    :raises sqlalchemy.exc.ArgumentError: if the settings are not a mapping, if a name is invalid,
        refused or given twice, or if a value is invalid.
    """
    if not isinstance(settings, Mapping):
        raise exc.ArgumentError(
            f'{call} takes a mapping, such as {{"app.tenant_id": 7}}, and not {settings!r}.'
            + see("settings-values")
        )
    found: dict[str, str | None] = {}
    given: Mapping[Any, Any] = settings  # pyright: ignore[reportUnknownVariableType]
    for name, value in given.items():
        if not isinstance(name, str) or not _NAME.match(name.lower()):
            raise exc.ArgumentError(
                f"{call} got {name!r} for the name of a setting: it is a word such as "
                "statement_timeout, or two with a dot between, such as app.tenant_id."
                + see("settings-values")
            )
        key = name.lower()  # PostgreSQL ignores the case
        if key in _REFUSED:
            raise exc.ArgumentError(
                f"{call} can't have {name} among the settings: {_REFUSED[key]}."
                + see("settings-values")
            )
        if key in found:
            raise exc.ArgumentError(
                f"{call} got {name} twice, because PostgreSQL ignores the case: leave one out."
                + see("settings-values")
            )
        found[key] = _as_text(name, value, call)
    return found


def _as_text(name: str, value: Any, call: str) -> str | None:
    if isinstance(value, Enum):
        value = value.value
    if value is None:
        return None
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, (str, int, float, Decimal, UUID)):
        raise exc.ArgumentError(
            f"{call} got {value!r} for {name}: a value is a string, a number, a bool or a UUID, or "
            "None to remove the setting." + see("settings-values")
        )
    text = str(value)
    if "\0" in text:
        raise exc.ArgumentError(
            f"{call} got a value with a null character for {name}, which PostgreSQL can't store: "
            "take the character out." + see("settings-values")
        )
    return text


def check_source(function: Any) -> None:
    """Refuse an object that can't be called for settings.

    :param function: The object that the user has given.
    :raises sqlalchemy.exc.ArgumentError: if it can't be called, or is an ``async`` function.
    """
    if not callable(function) or iscoroutinefunction(function):
        raise exc.ArgumentError(
            "local_settings is a function without parameters that returns settings, such as "
            f'{{"app.tenant_id": 7}}, or None; it is not async. {function!r} is not such a '
            "function." + see("local-settings-function")
        )


# A function may use another session that has the same function.
_being_called: ContextVar[tuple[object, ...]] = ContextVar("_being_called", default=())


class LocalSettings:
    """The settings of one session.

    :param source: A function that is called before a statement, until it returns settings. The
        settings of ``set_local()`` take precedence.
    """

    def __init__(self, source: Callable[[], Settings | None] | None = None) -> None:
        self.values: dict[str, str] = {}
        """The settings by name, as text. A change makes a new dictionary."""
        self.by_hand: Mapping[str, str | None] = {}
        """What ``set_local()`` was given; ``None`` for a setting that was removed."""
        self._found: Mapping[str, str | None] = {}
        self.refuses_flush = False
        """Whether a flush would store pending changes before the source has returned."""
        self._source = source
        self._is_postponed = False

    def update(self, settings: Mapping[str, str | None]) -> None:
        """Change some of the settings of ``set_local()``.

        :param settings: The settings that :func:`checked` has returned.
        """
        self.restore({**self.by_hand, **settings})

    def restore(self, by_hand: Mapping[str, str | None]) -> None:
        """Restore an earlier value of :attr:`by_hand`."""
        self.by_hand = by_hand
        merged = {**self._found, **by_hand}
        self.values = {name: value for name, value in merged.items() if value is not None}

    @property
    def is_to_ask(self) -> bool:
        """Whether there is a source that has returned no settings yet, and may be called now."""
        source = self._source
        return source is not None and not self._is_postponed and source not in _being_called.get()

    @contextmanager
    def postponed(self) -> Generator[None]:
        """Leave the source uncalled in this block."""
        before, self._is_postponed = self._is_postponed, True
        try:
            yield
        finally:
            self._is_postponed = before

    def ask(self) -> None:
        """Call the source, which has to be there. If it returns settings, this call was the last.

        Statements that the source sends have only the settings of ``set_local()``.
        """
        source: Any = self._source
        before = _being_called.get()
        _being_called.set((*before, source))
        try:
            given = source()
        finally:
            _being_called.set(before)
        if given is not None:
            self._found = checked(given, "The function of local_settings")
            self._source = None
            self.restore(self.by_hand)


def begin_before_settings(session: Session) -> SessionTransaction:
    """Begin a transaction around code that may still decide the settings.

    A transaction that is begun for a whole request, or a whole task, is begun before the code that
    finds out whose request it is. So the function of ``local_settings`` is called before the first
    statement in the transaction, and not before the transaction.

    :param session: The session, which may be SQLAlchemy's.
    :returns: The transaction that ``session.begin()`` returns.
    """
    settings: LocalSettings | None = getattr(session, "local_settings", None)
    if settings is None:
        return session.begin()
    with settings.postponed():
        return session.begin()
