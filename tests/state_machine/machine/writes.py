"""Steps: statements that write without objects of the session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from tests.state_machine.machine.sessions import SessionsAndModels
from tests.state_machine.model.parts import Row
from tests.state_machine.model.session import Model
from tests.state_machine.tables import TABLE, Item

#: A name, an amount, or none of both for the row to be removed.
Change = str | int | None


class WriteSteps(SessionsAndModels):
    """Statements that write, and the ``bulk_…()`` calls."""

    def write_row(self, who: int, number: int, change: Change, kind: str) -> None:
        """One UPDATE, or a DELETE."""
        who, session, model = self.pick(who)
        orm = kind in ("orm", "unsynchronized", "query")
        entity: Any = Item if orm else TABLE
        identity = entity.id if orm else entity.c.id
        criteria: Any = identity == number
        if kind == "criteria":  # a statement of the core whose criteria are of the ORM
            criteria = identity.in_(sa.select(Item.id).where(Item.id == number))
        attribute = "name" if isinstance(change, str) else "amount"
        table = f"{self.schemas[who]}.item"
        statement: Any
        if kind == "text" and change is not None:
            statement = sa.text(f"UPDATE {table} SET {attribute} = :change WHERE id = :id")
        elif kind == "text":
            statement = sa.text(f"DELETE FROM {table} WHERE id = :id")
        elif change is None:
            statement = sa.delete(entity).where(criteria)
        else:
            statement = sa.update(entity).where(criteria).values({attribute: change})
        if kind == "unsynchronized":
            statement = statement.execution_options(synchronize_session=False)
        parameters = {"id": number, "change": change} if kind == "text" else None

        def real() -> int:
            if kind == "query":
                query = session.query(Item).filter(criteria)
                return query.delete() if change is None else query.update({attribute: change})
            on: Any = session.connection() if kind == "connection" else session
            result = on.execute(statement, parameters)
            count: int = result.rowcount
            return count

        def modelled(_: Any) -> int:
            count = 0

            def writes() -> None:
                nonlocal count
                row = model.view().get(number)
                if row is None:
                    return
                count += model.write(number, row.changed(change))

            if kind == "connection":
                model.connection()
                model.execute(writes)
            else:
                orm = kind not in ("core", "text")
                model.flush_and_execute(writes, orm=orm, text=kind == "text")
            if kind in ("orm", "query"):
                thing = model.identities.get(number)
                if change is not None:
                    model.synchronize(number, attribute, change)
                elif thing is not None and not thing.expired:
                    model.mark_deleted(thing)
            return count

        self.both(who, real, modelled)

    def insert_many(self, who: int, given: list[tuple[str, int]], kind: str) -> None:
        """Several rows in one call: all of them or none."""
        who, session, model = self.pick(who)
        if kind == "plain":
            given = given[:1]
        rows = [Row(self.next(), *row) for row in given]
        dicts = [row._asdict() for row in rows]

        def real() -> Any:
            if kind == "mappings":
                return session.bulk_insert_mappings(sa.inspect(Item), dicts)
            if kind == "objects":
                return session.bulk_save_objects([Item(**values) for values in dicts])
            if kind == "returning":
                return sorted(session.scalars(sa.insert(Item).returning(Item.id), dicts).all())
            if kind == "driver":
                placeholders = "%(id)s, %(name)s, %(amount)s"
                session.connection().exec_driver_sql(
                    f"INSERT INTO {self.schemas[who]}.item VALUES ({placeholders})", dicts
                )
                return None
            if kind == "plain":  # a dictionary, and no list of them
                session.execute(sa.insert(Item), dicts[0])
                return None
            on: Any = session.connection() if kind == "connection" else session
            on.execute(sa.insert(Item if kind == "orm" else TABLE), dicts)
            return None

        def writes() -> None:
            for row in rows:
                model.write(row.id, row, new=True)

        def modelled(_: Any) -> Any:
            if kind in ("mappings", "objects"):
                model.bulk(writes)
            elif kind not in ("driver", "connection"):
                model.flush_and_execute(writes, orm=kind != "core")
            else:
                model.connection()
                model.execute(writes, text=kind == "driver")
            return [row.id for row in rows] if kind == "returning" else None

        self.both(who, real, modelled)

    def update_many(self, who: int, numbers: list[int], amount: int) -> None:
        """Several UPDATEs by key in one call, the last with an amount that may be refused."""
        who, session, model = self.pick(who)
        known = sorted(model.view())
        chosen = sorted({known[number % len(known)] for number in numbers}) if known else []
        if len(chosen) < 2:
            return
        dicts: list[dict[str, Any]] = [{"id": number, "amount": 8} for number in chosen]
        dicts[-1]["amount"] = amount

        def writes() -> None:
            for values in dicts:
                row = model.view()[values["id"]]
                model.write(values["id"], row._replace(amount=values["amount"]))

        def modelled(_: Any) -> None:
            model.bulk(writes)

        self.both(who, lambda: session.bulk_update_mappings(sa.inspect(Item), dicts), modelled)

    def update(
        self, model: Model, execute: Callable[[Callable[[], Any]], Any], number: int, amount: int
    ) -> int:
        count = 0

        def writes() -> None:
            nonlocal count
            row = model.view().get(number)
            if row is not None:
                count += model.write(number, row.changed(amount))

        execute(writes)
        return count
