"""Steps: flushes, and what begins and ends a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc

from tests.state_machine.machine.sessions import ANYTHING, SessionsAndModels
from tests.state_machine.model.parts import Fails


class TransactionSteps(SessionsAndModels):
    """Transactions and savepoints: their beginning, a flush, their end."""

    def begin(self, who: int, options: dict[str, Any], kind: str) -> None:
        """A transaction; inside, a savepoint, or what is refused."""
        if self.models[who % len(self.models)].inside and kind != "plain":
            self.begin_nested(who)
        else:
            self.begin_outermost(who, {} if kind == "nested" else options, kind)

    def begin_outermost(self, who: int, options: dict[str, Any], kind: str) -> None:
        who, session, model = self.pick(who)
        level = options.get("isolation_level")
        if level == "SERIALIZABLE" and any(each.serializable for each in self.models):
            return  # two of them may fail where the model does not see why

        def modelled(_: Any) -> object:
            refused = options.get("deferrable") and level != "SERIALIZABLE"
            if model.inside or model.spent:
                raise Fails(exc.InvalidRequestError, exc.ArgumentError)
            if refused:
                raise Fails(exc.ArgumentError)
            if kind == "nested" and model.begins_on_write:
                model.begin_nested()
                return ANYTHING
            if kind == "nested":
                model.flush()
            model.begin(level=level, read_only=options.get("read_only"), block=kind != "plain")
            return ANYTHING

        begin = session.begin_nested if kind == "nested" else session.begin
        transaction = self.both(who, lambda: begin(**options), modelled)
        if transaction is not None and kind != "plain":
            self.blocks[who].append(transaction)
            transaction.__enter__()

    def begin_nested(self, who: int) -> None:
        who, session, model = self.pick(who)
        if not model.usable or len(model.levels) > 3:
            return

        def modelled(_: Any) -> object:
            model.begin_nested()
            return ANYTHING

        savepoint = self.both(who, session.begin_nested, modelled)
        if savepoint is not None:
            self.blocks[who].append(savepoint)
            savepoint.__enter__()

    def leave(self, who: int, error: bool) -> None:
        """Leave the innermost `with` block, by its end or by an exception."""
        who, _, model = self.pick(who)
        if not self.blocks[who]:
            return
        block = self.blocks[who].pop()

        def real() -> None:
            if not error:
                block.__exit__(None, None, None)
                return
            raised = ValueError("out of the block")
            assert not block.__exit__(ValueError, raised, None)

        self.both(who, real, lambda _: model.leave(error=error))

    def flush(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.flush, lambda _: model.flush())

    def commit(self, who: int) -> None:
        who, session, model = self.pick(who)
        if len(model.levels) > 1 or (model.inside and not model.usable):
            return
        # As SQLAlchemy asks for, where the commit() is not refused.
        must_roll_back = model.begins_on_write or (model.inside and not model.blocks)
        failed: list[bool] = []

        def modelled(_: Any) -> None:
            try:
                model.commit()
            except Fails:
                failed.append(True)
                raise

        self.both(who, session.commit, modelled)
        if must_roll_back and failed:
            self.both(who, session.rollback, lambda _: model.rollback())

    def rollback(self, who: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, session.rollback, lambda _: model.rollback())
