"""The model of a session: its transactions and savepoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from tests.state_machine.model.flushes import FlushModel
from tests.state_machine.model.parts import Fails, Level, Thing

#: Since 2.1 a session flushes before a statement that names no class, too.
CORE_AUTOFLUSHES = not sa.__version__.startswith("2.0.")


class TransactionModel(FlushModel):
    """Savepoints, the end of a transaction, and what flushes with or without one."""

    def begin_nested(self) -> None:
        self.begin_implicitly()
        self.flush_inside()
        self.levels.append(Level())
        if self.handed_out:
            try:
                self.connect()
            except Fails:
                self.roll_back_nested()
                raise
        self.blocks.append(True)

    def commit_root(self, *, expire: bool) -> None:
        root = self.levels[0]
        if self.aborted:  # the driver knows that before it sends anything
            raise Fails(exc.PendingRollbackError)
        if self.sent or self.noticed:
            self.meet_disconnect()
        self.store.apply(root.rows)
        for number, row in root.extras.items():
            if row is None:
                self.store.extras.pop(number, None)
            else:
                self.store.extras[number] = row
        self.called += root.inserted
        if expire:
            for thing in self.identities.values():
                thing.expire()
            for thing in root.deleted:
                if thing.state == "deleted":
                    thing.state = "detached"
        self.end()

    def roll_back_root(self) -> None:
        """Roll back what is left."""
        root = self.levels[0]
        try:
            if not root.failed:
                self.restore(root, all_of_them=True)
                self.roll_back_on_server(root)
        finally:
            self.end()

    def roll_back_all(self) -> None:
        while len(self.levels) > 1:
            self.roll_back_nested()
        self.roll_back_root()

    def roll_back_nested(self) -> None:
        level = self.levels[-1]
        try:
            if not level.failed:
                if level.used and not self.dead:
                    self.aborted = False
                self.restore(level, all_of_them=False)
                self.roll_back_on_server(level)
        finally:
            self.pop_rolled_back()

    def pop_rolled_back(self) -> None:
        """Go on in what is around a savepoint that is rolled back."""
        level = self.levels.pop()
        if level.used and not self.dead:
            self.levels[-1].note_savepoint()

    def flush_at_end(self) -> None:
        """The flush of a commit, or of the release of a savepoint.

        Of two binds the session checks whether an error has aborted one before it does anything.
        """
        level = self.levels[-1]
        if level.used and level.used_second and self.aborted and not level.failed:
            raise Fails(exc.PendingRollbackError)
        self.flush_inside()

    # Operations outside and inside

    def flush(self) -> None:
        if self.inside:
            self.flush_inside()
        elif self.waiting():
            if self.begins_on_write:
                self.begin_implicitly()
                self.flush_inside()
                if not self.sent and not self.sent_second:
                    self.end()  # what has changed has the values that it had
            else:
                self.let_go(self.write_alone(expire=False))

    def write_alone(
        self, *, expire: bool, afterwards: Callable[[], Any] | None = None
    ) -> list[Thing]:
        """A call outside that flushes: one transaction, which ends with the call.

        :param afterwards: What else belongs to the call.
        :returns: what it has deleted.
        """
        if self.spent:
            raise Fails(exc.InvalidRequestError)
        self.levels = [Level()]
        try:
            self.flush_inside()
            if afterwards is not None:
                afterwards()
            deleted = self.levels[0].deleted
            self.commit_root(expire=expire)
        except Fails:
            if self.levels and not self.levels[0].failed:
                self.restore(self.levels[0], all_of_them=True)
            self.end()
            raise
        return deleted

    def let_go(self, deleted: list[Thing]) -> None:
        for thing in deleted:
            thing.state = "detached"

    def autoflushes(self, *, orm: bool = True) -> None:
        """What comes before a statement, but for a write outside: see :meth:`flush_and_execute`."""
        if self.autoflush and (orm or CORE_AUTOFLUSHES):
            if self.inside:
                self.flush_inside()
            elif self.begins_on_write:
                self.flush()

    def flush_and_execute(
        self, writes: Callable[[], Any], *, orm: bool, text: bool = False
    ) -> None:
        """The same, where SQLAlchemy flushes what waits before it: two writes keep their order.

        :param orm: Whether the statement names a class.
        :param text: As above.
        """
        flushes = self.autoflush and (orm or CORE_AUTOFLUSHES) and bool(self.waiting())
        if flushes and not self.inside and not self.begins_on_write:
            self.let_go(self.write_alone(expire=False, afterwards=lambda: self.execute(writes)))
            return
        self.autoflushes(orm=orm)
        self.execute(writes, text=text)

    def bulk(self, writes: Callable[[], Any]) -> None:
        """A ``bulk_…()`` call: it flushes nothing, and fails as a flush does.

        Outside, what waits goes on waiting, whatever happens.
        """
        if not self.usable:
            raise Fails(exc.InvalidRequestError)
        try:
            self.execute(writes)
        except Fails:
            if self.inside:
                self.roll_back_level()
            raise

    def commit(self) -> None:
        if self.blocks and not self.begins_on_write:
            raise Fails(exc.InvalidRequestError)
        self.begin_implicitly()
        if not self.inside:
            self.write_alone(expire=self.expire_on_commit)
            return
        # A commit() that fails leaves it to the caller to roll back, see the rule.
        self.flush_at_end()
        if self.levels[-1].failed:
            raise Fails(exc.InvalidRequestError)
        self.commit_root(expire=self.expire_on_commit)
        self.spend()

    def rollback(self) -> None:
        if self.inside:
            try:
                self.roll_back_all()
            finally:
                self.spend()
        elif not self.spent:
            self.restore(Level(), all_of_them=True)

    def spend(self) -> None:
        self.blocks = [False for _ in self.blocks]

    def leave(self, *, error: bool) -> None:
        """Leave the innermost block."""
        now = self.blocks.pop()
        if len(self.blocks) < self.closed_blocks:
            self.closed_blocks = len(self.blocks)
            if not error:
                raise Fails(exc.PendingRollbackError)
            return
        if not now:
            return
        if len(self.levels) > 1:
            self.leave_nested(error=error)
            return
        root = self.levels[0]
        if root.failed:
            self.end()
            if not error:
                raise Fails(exc.PendingRollbackError)
            return
        if error:
            self.roll_back_root()
            return
        try:
            self.flush_at_end()
            self.commit_root(expire=self.expire_on_commit)
        except Fails:
            with suppress(Fails):
                self.roll_back_root()
            raise

    def leave_nested(self, *, error: bool) -> None:
        level = self.levels[-1]
        if level.failed:
            self.pop_rolled_back()
            if not error:
                raise Fails(exc.PendingRollbackError)
            return
        if error:
            self.roll_back_nested()
            return
        try:
            self.flush_at_end()
            if level.used and self.aborted:
                raise Fails(exc.PendingRollbackError)
            if level.used:
                self.exchange()
        except Fails:
            self.pop_rolled_back()
            if not level.failed:
                self.aborted = False
                self.restore(level, all_of_them=False)
                self.roll_back_on_server(level)
            raise
        self.levels.pop()
        self.levels[-1].absorb(level)

    def close(self) -> None:
        if self.blocks and self.blocks[-1] and (self.sent or self.sent_second or self.waiting()):
            self.closed_blocks = len(self.blocks)
        for thing in self.things:
            if thing.state == "pending":
                thing.state = "transient"
            elif thing.state == "persistent":
                thing.state = "detached"
            thing.waits = False
        # What is deleted and not committed stays in limbo, as in any SQLAlchemy session.
        self.things = [thing for thing in self.things if thing.state != "deleted"]
        self.identities.clear()
        self.handed_out = False
        self.end()
        self.spend()
