"""Steps: what others do to the same tables."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import exc

from tests.state_machine.machine.sessions import SHARED, SessionsAndModels
from tests.state_machine.machine.writes import Change
from tests.state_machine.model.parts import Fails, Level, Row
from tests.state_machine.model.session import Model
from tests.state_machine.tables import SCHEMAS, TABLE


class StepsOfOthers(SessionsAndModels):
    """Writes of another program, and of the engine without a session."""

    def write_elsewhere(self, number: int, change: Change, new: bool) -> None:
        """Another program writes, where it need not wait."""
        known = sorted(self.stores[0].rows)
        elsewhere = Model(self.stores[0], True, True)
        elsewhere.levels = [Level()]
        if new:
            row = Row(self.next(), change if isinstance(change, str) else "z", 1)
        elif known:
            row = self.stores[0].rows[known[number % len(known)]]
        else:
            return
        after = row if new else row.changed(change)
        try:
            elsewhere.write(row.id, after, new=new)
        except Fails:
            return
        if after is not None and new:
            self.query("INSERT INTO public.item VALUES (%s, %s, %s)", *after)
        elif after is None:
            self.query("DELETE FROM public.item WHERE id = %s", row.id)
        else:
            _, *values = after
            self.query(
                "UPDATE public.item SET name = %s, amount = %s WHERE id = %s", *values, row.id
            )
        self.stores[0].apply(elsewhere.levels[0].rows)

    def write_on_engine(self, given: list[tuple[str, int]], how: str) -> None:
        """The engine's own connections, without a session."""
        if self.pool in SHARED:
            return
        self.connections.holder = None
        rows = [Row(self.next(), *row) for row in given]
        dicts = [row._asdict() for row in rows]
        model = Model(self.stores[0], True, True)

        class Stop(Exception):
            pass

        def real() -> None:
            if how.startswith("begin"):
                with self.engine.begin() as connection:
                    for values in dicts:
                        connection.execute(sa.insert(TABLE), values)
                    if how == "begin_error":
                        raise Stop
                return
            with self.engine.connect() as connection:
                if how == "connect":
                    for values in dicts:
                        connection.execute(sa.insert(TABLE), values)
                else:
                    with connection.begin_nested() if how == "nested" else connection.begin():
                        for values in dicts:
                            connection.execute(sa.insert(TABLE), values)

        error: Exception | None = None
        try:
            real()
        except Stop as raised:
            error = raised
        except exc.DBAPIError as raised:
            error = raised
            if raised.connection_invalidated:
                assert self.connections.killed
                return
        try:
            model.levels = [Level()]
            for row in rows:
                model.write(row.id, row, new=True)
                if how == "connect":
                    self.stores[0].apply(model.levels[0].rows)
                    model.levels = [Level()]
            if how == "begin_error":
                assert isinstance(error, Stop)
                return
        except Fails as fails:
            assert isinstance(error, fails.errors)
            return
        assert error is None
        self.stores[0].apply(model.levels[0].rows)

    def migrate(self) -> None:
        """Another program changes the type of a column, where it need not wait."""
        streams = [stream for stream in self.streams if stream is not None]
        if any(model.sent for model in self.models) or streams:
            return
        self.type_of_amount = "bigint" if self.type_of_amount == "integer" else "integer"
        for schema in SCHEMAS:
            self.query(f"ALTER TABLE {schema}.item ALTER amount TYPE {self.type_of_amount}")
