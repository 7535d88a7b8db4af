"""The stand-in for a connection of psycopg 3."""

from __future__ import annotations

from typing import Any

from .cursors import make_cursor
from .stand_in import Info, StandIn


class PsycopgStandIn(StandIn):
    """A stand-in with the methods and attributes that only psycopg has."""

    READ_ONLY = "read_only"
    PASSED_ON = frozenset(
        {"adapters", "add_notice_handler", "add_notify_handler", "broken", "cancel", "cancel_safe"}
        | {"cursor_factory", "prepare_threshold", "prepared_max", "row_factory"}
        | {"remove_notice_handler", "remove_notify_handler", "server_cursor_factory"}
    )

    @staticmethod
    def plain_cursor(dbapi: Any, physical: Any) -> Any:
        return dbapi.Cursor(physical, row_factory=dbapi.rows.tuple_row)

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_isolation_level(self, value: Any) -> None:
        self.isolation_level = value

    def set_read_only(self, value: bool | None) -> None:
        self.read_only = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    @property
    def connection(self) -> Any:
        """The connection: psycopg uses a stand-in as the context of an adaptation, and asks it."""
        return self.for_cursors

    @property
    def pgconn(self) -> Any:
        if self.closed:
            return _Finished(self._dbapi)
        return Info(self.isolation.physical.pgconn, self)

    def cursor(
        self, name: str = "", *, binary: bool = False, row_factory: Any = None, **kwargs: Any
    ) -> Any:
        if name:
            if self._autocommit and not kwargs.get("withhold"):
                self.refuse_outside("DECLARE CURSOR")
            kwargs["name"] = name
        factory = self.server_cursor_factory if name else self.cursor_factory
        kwargs["row_factory"] = row_factory or self.row_factory
        cursor = make_cursor(self, factory, self.isolation.physical, **kwargs)
        if binary:
            cursor.format = type(cursor.format)(1)
        return cursor

    @property
    def for_cursors(self) -> Any:
        return _Context(self)

    def forget_cursor(self, cursor: Any) -> None:
        self._dbapi.Cursor.close(cursor)

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> Any:
        binary = kwargs.pop("binary", False)
        return self.cursor(binary=binary).execute(query, params, **kwargs)

    def __exit__(self, type_: object, *error: object) -> None:
        super().__exit__(type_, *error)
        self.close()


class _Finished:
    """The ``pgconn`` of a closed connection, which still has a status.

    :param dbapi: The driver.
    """

    def __init__(self, dbapi: Any) -> None:
        self.status = dbapi.pq.ConnStatus.BAD
        self.transaction_status = dbapi.pq.TransactionStatus.UNKNOWN
        self._error = dbapi.OperationalError

    def __getattr__(self, name: str) -> Any:
        raise self._error("the connection is closed")


class _Context:
    """The ``connection`` of a cursor: a stand-in for the user, the real one for psycopg itself.

    :param stand_in: The stand-in.
    """

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Any:
        if name in ("pgconn", "wait") or name.startswith("_"):  # for psycopg's adaptation and COPY
            return getattr(self._stand_in.isolation.physical, name)
        return getattr(self._stand_in, name)
