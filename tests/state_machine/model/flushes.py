"""The model of a session: its unit of work."""

from __future__ import annotations

from sqlalchemy import exc
from sqlalchemy.orm.exc import ObjectDeletedError

from tests.state_machine.model.parts import ABSENT, WRITE_ERRORS, Fails, Level, Row, Thing
from tests.state_machine.model.writes import WriteModel


class FlushModel(WriteModel):
    """What a flush writes, and what a rollback does to the objects."""

    def flush_inside(self) -> None:
        if not self.waiting():
            return
        self.before_flush()
        if not self.usable:
            raise Fails(exc.InvalidRequestError)
        try:
            self.write_objects(self.waiting())
        except Fails:
            self.roll_back_level()
            raise

    def write_objects(self, waiting: list[Thing]) -> None:
        if not all(thing.is_extra for thing in waiting):
            self.connect()
        level = self.levels[-1]
        deleted = sorted((thing for thing in waiting if thing.waits), key=lambda thing: thing.id)
        changed = [t for t in waiting if not t.waits and t.state != "pending"]
        new = [thing for thing in waiting if thing.state == "pending"]
        for thing in sorted(changed, key=lambda thing: thing.id):
            values = {
                name: thing.values[name]
                for name, before in thing.old.items()
                if before is ABSENT or before != thing.values[name]
            }
            if values:
                row = self.load_key(thing)
                self.send_for(thing, writes=True)
                if row is None:
                    row = self.row_of(thing)
                if row is None or not self.write_for(thing, row._replace(**values)):
                    raise Fails(*WRITE_ERRORS)
        for thing in new:
            self.send_for(thing, writes=True)
            self.write_for(thing, thing.row(), new=True)
            if not thing.is_extra:
                level.inserted.append(thing.id)
        for thing in deleted:
            self.load_key(thing)
            self.send_for(thing, writes=True)
            if not self.write_for(thing, None):
                self.check_snapshot(thing.id)
        for thing in deleted:
            self.mark_deleted(thing)
        for thing in (*changed, *new):
            (level.new if thing.state == "pending" else level.dirty).append(thing)
            thing.state, thing.modified, thing.expired = "persistent", False, False
            thing.old.clear()
            self.identities[thing.id] = thing

    def load_key(self, thing: Thing) -> Row | None:
        """SQLAlchemy reads an expired object before it writes it, for the key."""
        if "id" in thing.values:
            return None
        self.send_for(thing)
        row = self.row_of(thing)
        if row is None:
            raise Fails(ObjectDeletedError)
        thing.fill(row)
        return row

    def mark_deleted(self, thing: Thing) -> None:
        thing.gone, thing.waits = True, False
        thing.state = "deleted"
        if self.identities.get(thing.id) is thing:
            del self.identities[thing.id]
        if self.inside:
            self.levels[-1].deleted.append(thing)
        else:
            thing.state = "detached"

    def restore(self, level: Level, *, all_of_them: bool) -> None:
        """What a rollback does to the objects."""
        new = set(level.new) | {thing for thing in self.things if thing.state == "pending"}
        for thing in new:
            if self.identities.get(thing.id) is thing:
                del self.identities[thing.id]
            thing.state, thing.waits = "transient", False
        for thing in level.deleted:
            if thing.state == "deleted":
                thing.state, thing.gone = "persistent", False
                self.identities[thing.id] = thing
        for thing in self.identities.values():
            thing.waits = False
            if all_of_them or thing.modified or thing in level.dirty:
                thing.expire()

    def roll_back_level(self) -> None:
        """What a failed flush does: the innermost level is rolled back and waits for its end."""
        level = self.levels[-1]
        if len(self.levels) > 1 and level.used and not self.noticed:
            self.aborted = False
        level.failed = True
        level.forget_rows()
        level.extras.clear()
        self.restore(level, all_of_them=len(self.levels) == 1)
        self.roll_back_on_server(level)
        if len(self.levels) == 1:
            self.aborted, self.snapshot = False, None

    def roll_back_on_server(self, level: Level) -> None:
        """The ROLLBACK, or ROLLBACK TO, of a level that sent something.

        On a dead connection it is no error: the server has rolled back.
        """
        if self.sent and level.used and self.dead:
            self.noticed = True
