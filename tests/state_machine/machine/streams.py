"""Steps: results that are read bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from tests.state_machine.machine.sessions import ANYTHING, SessionsAndModels, Stream
from tests.state_machine.tables import COLUMNS, TABLE, Item


class StreamSteps(SessionsAndModels):
    """One result for each session, which stays open while it does something else."""

    def open_stream(self, who: int, orm: bool, buffered: bool) -> None:
        """A result of which not a row is read yet; a buffered one has no cursor on the server."""
        who, session, model = self.pick(who)
        if self.streams[who] is not None:
            return
        # A cursor on the server is gone with its savepoint, and closing it then is an error that
        # aborts the transaction: SQLAlchemy's, as ever.
        buffered = buffered or len(model.levels) > 1
        orm = orm and not buffered  # the first fetch would make objects of all rows
        columns: Any = (Item,) if orm else COLUMNS
        statement = sa.select(*columns).order_by(TABLE.c.id)
        if not buffered:
            statement = statement.execution_options(yield_per=2)

        def real() -> Stream:
            result = session.execute(statement)
            read: Callable[[], Any] = lambda: result.fetchmany(2)  # noqa: E731
            return Stream(read, result.close, [], 0, orm, buffered)

        def modelled(_: Any) -> object:
            model.autoflushes(orm=orm)
            model.send()
            return ANYTHING

        stream = self.both(who, real, modelled, keeps=not buffered)
        if stream is not None:
            # Only now: the flush before it may have begun the transaction.
            stream.rows, stream.depth = model.rows(), len(model.levels)
            self.streams[who] = stream

    def read_stream(self, who: int) -> None:
        who, _, model = self.pick(who)
        stream = self.streams[who]
        if stream is None:
            return
        try:
            got = stream.read()
        except exc.DBAPIError as error:
            # Not asked for in the model: what is buffered comes even so.
            if not stream.doomed and not model.aborted:
                raise
            if error.connection_invalidated and model.connected:
                model.dead = model.noticed = True
            self.drop_stream(who)
            return
        want, stream.rows = stream.rows[:2], stream.rows[2:]
        assert len(got) == len(want)
        for result, row in zip(got, want, strict=True):
            if stream.orm:
                model.see(row, result[0])
            else:
                assert tuple(result) == row
        if not want:
            self.streams[who] = None
            if not stream.buffered:
                self.check_loan(who)

    def close_stream(self, who: int) -> None:
        who, *_ = self.pick(who)
        self.drop_stream(who)
