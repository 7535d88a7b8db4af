"""Steps: a call that a signal handler interrupts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

import fictive_sqlalchemy
from fictive_sqlalchemy import TRANSACTION_CONNECTIONS, OptInSession
from tests.state_machine.machine.sessions import Interruption
from tests.state_machine.machine.writes import WriteSteps
from tests.state_machine.model.parts import Fails, Row
from tests.state_machine.tables import TABLE, Item


def interrupted(call: Callable[[], object], at: int) -> None:
    """Make a call, in which an exception comes at one of the lines of the package."""
    package = str(Path(fictive_sqlalchemy.__file__).parent)
    lines = 0

    def trace(frame: FrameType, what: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        if what == "line":
            lines += 1
            if lines - 1 == at:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


class InterruptedSteps(WriteSteps):
    """A call outside, in which an exception comes at any line."""

    def call_interrupted(self, who: int, number: int, name: str, at: int, kind: str) -> None:
        """A call in which a signal handler raises at some line: the end of a request."""
        who, session, model = self.pick(who)
        if model.inside or self.blocks[who] or self.streams[who] is not None:
            return
        if any(thing.is_extra for thing in model.waiting()):
            return  # between two COMMITs
        number = self.row(who, number)
        rows = [Row(self.next(), each, 1) for each in (name, f"{name}{name}")]
        dicts = [row._asdict() for row in rows]
        update = sa.update(TABLE).where(TABLE.c.id == number).values(amount=3)
        calls: dict[str, Callable[[], object]] = {
            "commit": session.commit,
            "flush": session.flush,
            "block": lambda: self.write_in_block(session, dicts),
            "insert": lambda: session.execute(sa.insert(Item), dicts),
            "update": lambda: session.execute(update),
            "read": lambda: session.scalars(sa.select(Item)).all(),
        }

        def write() -> None:
            for row in rows:
                model.write(row.id, row, new=True)

        def write_in_block() -> None:
            model.begin(block=True)
            try:
                model.autoflushes()
                model.execute(write)
            except Fails:
                model.leave(error=True)
                raise
            model.leave(error=False)

        def update_() -> None:
            self.update(model, partial(model.flush_and_execute, orm=False), number, 3)

        modelled: dict[str, Callable[[], object]] = {
            "commit": model.commit,
            "flush": model.flush,
            "block": write_in_block,
            "insert": lambda: model.flush_and_execute(write, orm=True),
            "update": update_,
            "read": model.autoflushes,
        }
        with suppress(Interruption, exc.SQLAlchemyError):
            interrupted(calls[kind], at)
        session.close()
        before = dict(model.store.rows)
        with suppress(Fails):
            modelled[kind]()
        self.begin_anew(who)
        self.wait_for_end(self.connections.closing)
        self.connections.closing.clear()
        if self.rows_in(self.schemas[who]) != sorted(model.store.rows.values()):
            model.store.rows = before  # and if it is not that either, the invariant says so
        if session.info:
            model.called = list(session.info["inserted"])
        self.sessions[who] = self.make_session(who)
        if len(TRANSACTION_CONNECTIONS):
            gc.collect()  # the exception may still keep a connection that is closed

    def write_in_block(self, session: OptInSession, dicts: list[dict[str, Any]]) -> None:
        with session.begin():
            session.execute(sa.insert(Item), dicts)
