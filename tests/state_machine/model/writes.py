"""The model of a session: the rows that it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import exc

from tests.state_machine.model.connection import ConnectionModel
from tests.state_machine.model.parts import WRITE_ERRORS, Fails, Level, RawCursorFailed, Row, Thing


class WriteModel(ConnectionModel):
    """What comes of a write: a broken rule, a lock that someone else has, or a row."""

    def write(self, number: int, row: Row | None, *, new: bool = False) -> bool:
        """Put a row in place, or remove it.

        :returns: whether there was one to write over.
        """
        store, level, before = self.store, self.levels[-1], self.view().get(number)
        if new and before is None:
            before = store.rows.get(number)  # taken by a row that the snapshot doesn't show
            if before is not None:
                raise Fails(*WRITE_ERRORS)
        names = {each.name for each in (before, row) if each is not None}
        if row is not None and row.amount < 0:
            raise Fails(*WRITE_ERRORS)
        if before is None and not new:
            return False
        if new and before is not None:
            raise Fails(*WRITE_ERRORS)
        if any(number in each.rows or number in each.locks for each in store.others(self)):
            raise Fails(*WRITE_ERRORS)
        self.check_snapshot(number)
        if row is not None and (before is None or before.name != row.name):
            if any(row.name in each.names for each in store.others(self)):
                raise Fails(*WRITE_ERRORS)
            latest: dict[int, Row | None] = dict(store.rows)
            for each in self.levels:
                latest.update(each.rows)
            if any(n != number and r is not None and r.name == row.name for n, r in latest.items()):
                raise Fails(*WRITE_ERRORS)
        level.rows[number] = row
        level.names |= names
        return True

    def write_for(self, thing: Thing, row: Row | None, *, new: bool = False) -> bool:
        """Put the row of an object in place, or remove it, on its bind."""
        if thing.is_extra:
            self.levels[-1].extras[thing.id] = row
            return True
        return self.write(thing.id, row, new=new)

    def check_snapshot(self, number: int) -> None:
        """At REPEATABLE READ nobody writes over, or locks, what the snapshot doesn't show."""
        if self.snapshot is None or any(number in level.rows for level in self.levels):
            return
        if self.store.versions.get(number) != self.versions.get(number):
            raise Fails(*WRITE_ERRORS)

    def execute(self, writes: Callable[[], Any], *, text: bool = False) -> None:
        """One statement, or one call, that writes past the objects.

        :param text: Whether it is SQL, which the server alone refuses in a read-only transaction.
        """
        if self.inside or self.begins_on_write:
            self.begin_implicitly()
            self.send(writes=not text)
            try:
                if self.read_only:
                    raise Fails(exc.DBAPIError)
                writes()
            except Fails:
                self.abort()
                raise
            return
        self.send()
        self.levels = [Level()]
        try:
            writes()
            self.store.apply(self.levels[0].rows)
        finally:
            self.levels = []

    def execute_raw(self, writes: Callable[[], Any]) -> None:
        """Write on a cursor of the driver: part of the transaction; outside it stands alone."""
        self.send_raw()
        try:
            if self.read_only:
                raise Fails
            if self.inside:
                writes()
            else:
                self.levels = [Level()]
                try:
                    writes()
                    self.store.apply(self.levels[0].rows)
                finally:
                    self.levels = []
        except Fails:
            if self.inside:
                self.abort()
            raise Fails(RawCursorFailed) from None
