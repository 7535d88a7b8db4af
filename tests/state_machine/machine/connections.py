"""Steps: a session's connection, handed out, given back or lost."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import sqlalchemy as sa

from fictive_sqlalchemy import OptInConnection
from tests.state_machine.machine.writes import WriteSteps
from tests.state_machine.model.parts import Fails, RawCursorFailed, Row
from tests.state_machine.tables import COLUMNS, TABLE


class ConnectionSteps(WriteSteps):
    """What is done with a connection that was handed out, and with those of the pool."""

    def hand_out(self, who: int) -> None:
        who, session, model = self.pick(who)

        def modelled(connection: Any) -> Any:
            model.connection()
            return connection

        connection = self.both(who, session.connection, modelled)
        if connection is not None:
            self.handed_out[who] = connection

    def connection(self, who: int) -> OptInConnection | None:
        """The connection that the session has handed out, if it can still be used."""
        model, connection = self.models[who], self.handed_out[who]
        if connection is None or connection.closed or model.spent:
            return None
        # After a flush has failed in a savepoint, it sends in what is around the savepoint.
        return connection if model.usable or len(model.levels) == 1 else None

    def use_handed_out(self, who: int, number: int, amount: int, writes: bool) -> None:
        who, _, model = self.pick(who)
        connection = self.connection(who)
        if connection is None:
            return
        if not writes:
            select = sa.select(*COLUMNS).order_by(TABLE.c.id)

            def modelled(_: Any) -> list[Row]:
                model.send()
                return model.rows()

            self.both(who, lambda: [tuple(row) for row in connection.execute(select)], modelled)
            return
        update = sa.update(TABLE).where(TABLE.c.id == number).values(amount=amount)
        self.both(
            who,
            lambda: connection.execute(update).rowcount,
            lambda _: self.update(model, model.execute, number, amount),
        )

    def use_raw_cursor(self, who: int, number: int, amount: int, kind: str) -> None:
        """A cursor of the driver, as pandas and psycopg's COPY use it."""
        who, _, model = self.pick(who)
        connection = self.connection(who)
        if connection is None:
            return
        if not model.inside and self.connections.killed:
            return  # SQLAlchemy does not see that the connection is lost
        table = f"{self.schemas[who]}.item"
        sql, parameters = {
            "raw_read": (f"SELECT id, name, amount FROM {table} ORDER BY id", ()),
            "raw_write": (f"UPDATE {table} SET amount = %s WHERE id = %s", (amount, number)),
            "raw_fail": ("SELECT 1/0", ()),
        }[kind]

        def real() -> Any:
            cursor: Any = None
            dbapi_connection = connection.connection
            try:
                cursor = dbapi_connection.cursor()
                cursor.execute(sql, parameters)
                return cursor.rowcount if kind == "raw_write" else cursor.fetchall()
            except Exception as error:
                raise RawCursorFailed from error
            finally:
                with suppress(Exception):
                    cursor.close()
                # The session keeps a connection of whose cursors it cannot know. Here none is left:
                # one thread plays all parts, so that the next part would wait for ever.
                connection.is_seen = False

        def modelled(_: Any) -> Any:
            if kind == "raw_write":
                return self.update(model, model.execute_raw, number, amount)
            model.send_raw()
            if kind == "raw_read":
                return model.rows()
            if model.inside:
                model.abort()
            raise Fails(RawCursorFailed)

        self.both(who, real, modelled)

    # The session and its connections

    def close(self, who: int, how: str) -> None:
        who, session, model = self.pick(who)
        self.drop_stream(who)
        self.handed_out[who] = None
        self.both(who, getattr(session, how), lambda _: model.close())

    def give_back(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.give_back)
        if not model.connected and self.streams[who] is None:
            assert who not in self.connections.holders.values()

    def kill(self) -> None:
        """The server ends every connection there is, as it does when it is shut down."""
        pids = [each.info.backend_pid for each in self.connections.living()]
        if not pids:
            return
        self.connections.killed.update(pids)
        self.query("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", pids)
        self.wait_for_end(pids)
        for model, stream in zip(self.models, self.streams, strict=True):
            if stream is not None:
                stream.doomed = True
            if model.connected:
                model.dead = True
                for level in model.levels:
                    level.forget_rows()
