"""The stand-in for a connection of psycopg2."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from .cursors import make_cursor
from .stand_in import UNKNOWN, StandIn, State


class Psycopg2StandIn(StandIn):
    """A stand-in with the methods and attributes that only psycopg2 has."""

    READ_ONLY = "readonly"
    PASSED_ON = frozenset(
        {"async", "async_", "binary_types", "cancel", "cursor_factory", "dsn", "encoding"}
        | {"get_backend_pid", "get_dsn_parameters", "get_native_connection", "get_parameter_status"}
        | {"isexecuting", "notices", "notifies", "pgconn_ptr", "protocol_version", "server_version"}
        | {"string_types"}
    )

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        return physical.cursor(cursor_factory=dbapi.extensions.cursor)

    @property
    def readonly(self) -> Any:
        return self.read_only

    @readonly.setter
    def readonly(self, value: Any) -> None:
        self.read_only = value

    def is_read_only_outside(self) -> bool:
        # psycopg2 sets default_transaction_read_only, which holds for statements in autocommit too.
        return self.is_read_only()

    @property
    def status(self) -> int:
        extensions = self._dbapi.extensions
        begun = self.state is not State.IDLE
        return int(extensions.STATUS_BEGIN if begun else extensions.STATUS_READY)

    def set_isolation_level(self, level: Any) -> None:
        self.rollback()
        self.autocommit = level == 0
        self.isolation_level = level or None

    def set_session(
        self,
        isolation_level: Any = None,
        readonly: Any = None,
        deferrable: Any = None,
        autocommit: bool | None = None,
    ) -> None:
        if isolation_level is not None:
            self.isolation_level = isolation_level
        if readonly is not None:
            self.read_only = readonly
        if deferrable is not None:
            self.deferrable = deferrable
        if autocommit is not None:
            self.autocommit = autocommit

    def get_transaction_status(self) -> int:
        if self._isolation is None:
            return UNKNOWN
        return int(self.transaction_status(self._isolation.status))

    def cursor(self, name: Any = None, cursor_factory: Any = None, **kwargs: Any) -> Any:
        physical = self.isolation.physical
        factory = cursor_factory or self.__dict__.get("cursor_factory")
        if factory is None:
            # Not the driver's default, because the connection may be of a class of the user's.
            factory = cast(Any, type(physical.cursor()))
        if name is not None:
            if self._autocommit and not kwargs.get("withhold"):
                raise self._dbapi.ProgrammingError(
                    "can't use a named cursor outside of transactions"
                )
            kwargs["name"] = name
        return physical.cursor(cursor_factory=partial(make_cursor, self, factory), **kwargs)

    @property
    def for_cursors(self) -> Any:
        return self

    def forget_cursor(self, cursor: Any) -> None:
        pass
