"""Steps: statements that read, and statements that lock or fail."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from tests.state_machine.machine.sessions import SessionsAndModels
from tests.state_machine.model.parts import Fails, Row
from tests.state_machine.tables import COLUMNS, TABLE, Item


class QuerySteps(SessionsAndModels):
    """Statements whose result is read at once."""

    def select_objects(self, who: int, populate_existing: bool) -> None:
        who, session, model = self.pick(who)
        statement = sa.select(Item).order_by(Item.id)
        if populate_existing:
            statement = statement.execution_options(populate_existing=True)

        def modelled(reals: list[Item] | None) -> list[Any]:
            model.autoflushes()
            model.send()
            assert reals is not None
            rows = model.rows()
            for real, row in zip(reals, rows, strict=True):
                model.see(row, real, overwrite=populate_existing)
            return [model.identities[row.id].real for row in rows]

        self.both(who, lambda: session.scalars(statement).all(), modelled)

    def select_rows(self, who: int, kind: str) -> None:
        who, session, model = self.pick(who)
        text = f"SELECT id, name, amount FROM {self.schemas[who]}.item ORDER BY id"

        def real() -> list[tuple[Any, ...]]:
            if kind == "core":
                result = session.execute(sa.select(*COLUMNS).order_by(TABLE.c.id))
            elif kind == "orm":
                columns = (Item.id, Item.name, Item.amount)
                result = session.execute(sa.select(*columns).order_by(Item.id))
            elif kind == "text":
                result = session.execute(sa.text(text))
            elif kind == "driver":
                result = session.connection().exec_driver_sql(text)
            else:
                result = session.connection().execute(sa.text(text))
            return [tuple(row) for row in result]

        def modelled(_: Any) -> list[Row]:
            if kind in ("driver", "connection"):
                model.connection()
            else:
                model.autoflushes(orm=kind == "orm")
            model.send()
            return model.rows()

        self.both(who, real, modelled)

    def lock(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        statement = (
            sa.select(Item)
            .where(Item.id == number)
            .with_for_update()
            .execution_options(populate_existing=True)
        )

        def modelled(real: Item | None) -> Item | None:
            if not model.inside and not model.begins_on_write:
                raise Fails(exc.InvalidRequestError)
            model.autoflushes()
            model.begin_implicitly()
            model.send()
            try:
                if model.read_only:
                    raise Fails(exc.DBAPIError)
                row = model.view().get(number)
                if row is None:
                    return None
                if not model.store.is_free(number, model=model):
                    raise Fails(exc.OperationalError)
                model.check_snapshot(number)
            except Fails:
                model.abort()
                raise
            model.levels[-1].locks.add(number)
            assert real is not None
            model.see(row, real, overwrite=True)
            return real

        self.both(who, lambda: session.scalars(statement).one_or_none(), modelled)

    def fail(self, who: int) -> None:
        """A statement that the database refuses, for a reason of its own."""
        who, session, model = self.pick(who)

        def modelled(_: Any) -> None:
            model.autoflushes(orm=False)
            model.send()
            if model.inside:
                model.abort()
            raise Fails(exc.DataError)

        self.both(who, lambda: session.execute(sa.text("SELECT 1/0")), modelled)
