"""The model of a session: its objects, and in the base classes all the rest."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc
from sqlalchemy.orm.exc import DetachedInstanceError, ObjectDeletedError

from tests.state_machine.model.parts import ABSENT, ATTRIBUTES, Fails, Row, Thing
from tests.state_machine.model.transactions import TransactionModel
from tests.state_machine.tables import Item


class Model(TransactionModel):
    """One session by the contract: what is done with its objects."""

    def see(self, row: Row, real: Item, *, overwrite: bool = False) -> None:
        """A row came in as an object."""
        thing = self.identities.get(row.id)
        if thing is None:
            thing = Thing(real, row.id, "persistent")
            thing.fill(row)
            self.identities[row.id] = thing
            self.things.append(thing)
            return
        assert thing.real is real, "two objects for one row"
        if overwrite:
            thing.overwrite(row)
        elif any(name not in thing.values for name in ATTRIBUTES):
            thing.fill(row)

    def load(self, thing: Thing) -> None:
        """Load an object that is expired, at its next use."""
        self.autoflushes()
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(ObjectDeletedError)
        thing.fill(row)

    def get(self, number: int, real: Item | None) -> Item | None:
        thing = self.identities.get(number)
        if thing is not None:
            assert isinstance(thing.real, Item)
            if not thing.expired:
                return thing.real
            try:
                self.load(thing)
                return thing.real
            except Fails as fails:
                if fails.errors != (ObjectDeletedError,):
                    raise
                # not by the flush, which has it as an error of its own
                if self.levels and self.levels[-1].failed:
                    raise
                if thing.state == "persistent":
                    self.mark_deleted(thing)
        self.autoflushes()
        self.send()
        row = self.view().get(number)
        if row is None:
            return None
        assert real is not None, f"row {number} was not found"
        self.see(row, real)
        return real

    def read(self, thing: Thing, name: str) -> Any:
        if name not in thing.values:
            if thing.state == "detached":
                raise Fails(DetachedInstanceError)
            self.load(thing)
        return thing.values[name]

    def change(self, thing: Thing, name: str, value: Any) -> None:
        thing.old.setdefault(name, thing.values.get(name, ABSENT))
        thing.values[name] = value
        thing.modified = True

    def add(self, thing: Thing) -> None:
        if thing.state == "transient":
            thing.state = "pending"
            # SQLAlchemy inserts in the order of add().
            self.things.remove(thing)
            self.things.append(thing)
        elif thing.state in ("detached", "deleted"):
            other = self.identities.get(thing.id)
            if thing.gone or (other is not None and other is not thing):
                raise Fails(exc.InvalidRequestError)
            thing.state = "persistent"
            self.identities[thing.id] = thing
        thing.waits = False

    def delete(self, thing: Thing) -> None:
        if thing.state != "persistent":
            raise Fails(exc.InvalidRequestError)
        thing.waits = True

    def expunge(self, thing: Thing) -> None:
        if thing.state == "pending":
            thing.state = "transient"
        else:
            thing.state = "detached"
            del self.identities[thing.id]
        thing.waits = False

    def refresh(self, thing: Thing) -> None:
        if thing.state != "persistent":
            raise Fails(exc.InvalidRequestError)
        thing.expire()
        self.autoflushes()
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(exc.InvalidRequestError)
        thing.overwrite(row)

    def synchronize(self, number: int, name: str, value: Any) -> None:
        """What an ORM UPDATE does to the object that it evaluates to."""
        thing = self.identities.get(number)
        if thing is None or thing.expired:
            return
        if name in thing.old:
            del thing.values[name], thing.old[name]
        elif name in thing.values:
            thing.values[name] = value
        if self.levels:
            self.levels[-1].dirty.append(thing)
