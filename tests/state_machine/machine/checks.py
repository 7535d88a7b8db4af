"""What holds after each step, and at the end."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from hypothesis.errors import StopTest
from hypothesis.stateful import invariant
from sqlalchemy.orm import attributes

from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInSession
from tests.state_machine.machine.transactions import TransactionSteps
from tests.state_machine.model.parts import ATTRIBUTES, Thing

#: Whether Hypothesis makes the sequence that fails as short as it can.
SHRINKS = os.environ.get("MODEL_SHRINKS", "1") == "1"


class Checks(TransactionSteps):
    """The database, the objects and the connections, compared with the models."""

    @invariant()
    def all_is_as_modelled(self) -> None:
        if self.sessions:
            self.check_database()
            self.check_objects()
            self.check_connections()

    def check_database(self) -> None:
        for schema, store in zip(self.schemas, self.stores, strict=True):
            rows = self.rows_in(schema)
            known = sorted(store.rows.values())
            assert rows == known, f"{rows} in the database, {known} expected"
        rows = self.query("SELECT id, name, amount FROM extra ORDER BY id")
        known = sorted({row for store in self.stores for row in store.extras.values()})
        assert rows == known, f"{rows} in the second database, {known} expected"

    def check_objects(self) -> None:
        for session, model in zip(self.sessions, self.models, strict=True):
            for thing in model.things:
                self.compare(session, thing)
            assert len(session.new) == sum(t.state == "pending" for t in model.things)
            assert len(session.identity_map) == len(model.identities)
            assert session.info.get("inserted", model.called) == model.called
            assert session.in_transaction() == model.inside
            assert (session.get_transaction() is not None) == model.inside

    def compare(self, session: OptInSession, thing: Thing) -> None:
        state: Any = sa.inspect(thing.real)
        assert getattr(state, thing.state), f"{thing} is not {thing.state}"
        values = attributes.instance_dict(thing.real)
        assert {name: values[name] for name in ATTRIBUTES if name in values} == thing.values
        assert (thing.real in session.new) == (thing.state == "pending")
        assert (thing.real in session.deleted) == thing.waits, thing
        if thing.state == "persistent":
            assert (thing.real in session.dirty) == (thing.modified and not thing.waits)
            assert state.expired == thing.expired

    def check_connections(self) -> None:
        assert not self.connections.surprises
        known = [each for each in self.connections.alive.values() if not each.closed]
        statuses = [self.connections.status(each) for each in known]
        modes = [each.autocommit for each in known]
        # A driver may know that a connection is dead before SQLAlchemy does.
        sure = [model for model in self.models if not model.dead]
        assert (
            sum(model.in_database for model in sure)
            <= len([status for status in statuses if status])
            <= sum(model.in_database for model in self.models)
        )
        assert (
            sum(model.out_of_autocommit for model in sure)
            <= modes.count(False)
            <= sum(model.out_of_autocommit for model in self.models)
        )
        open_transactions = [model for model in self.models if model.connected]
        at_most = len(open_transactions) + sum(model.inside for model in self.models)
        assert len(TRANSACTION_CONNECTIONS) <= at_most
        if not any(model.inside for model in self.models):
            self.second[1].check_rest()
        assert len(TRANSACTION_CONNECTIONS) >= sum(model.in_database for model in self.models)

    # The end

    def teardown(self) -> None:
        if not self.sessions:
            return
        if not SHRINKS and sys.exc_info()[0] not in (None, StopTest):
            traceback.print_exc()  # Hypothesis says nothing of what does not fail again
        try:
            self.leave_everything()
            self.check_end()
        finally:
            for session in self.sessions:
                with suppress(Exception):
                    session.invalidate()
            self.engine.dispose()
            self.wait_for_end(self.connections.closing)
            self.connections.closing.clear()
            self.connections.alive.clear()
            self.connections.holders.clear()

    def leave_everything(self) -> None:
        for who, session in enumerate(self.sessions):
            while self.blocks[who]:
                self.leave(who=who, error=True)
            self.drop_stream(who)
            if self.models[who].inside:
                self.rollback(who=who)
            session.close()

    def check_end(self) -> None:
        assert len(TRANSACTION_CONNECTIONS) == 0
        assert not self.connections.holders
        self.connections.check_rest()
        self.second[1].check_rest()
        assert not self.query(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%%'"
        )
