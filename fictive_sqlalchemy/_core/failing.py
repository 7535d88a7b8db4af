"""How a connection handles an error: it adds advice, and notes what is lost or aborted."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc

from .autocommit import HELD_CURSORS, LEFT_BEHIND
from .carrying import Carried
from .errors import (
    LOST_INSIDE,
    NOTHING_STORED,
    advise,
    close_lost_cursor,
    see,
    sqlstate,
    was_refused,
)
from .phases import STANDALONE, Phase
from .resting import RestingEngine
from .sqlalchemy_private import ConnectionHooks
from .standby import IN_USE, is_loss, is_standby


class FailingConnection(ConnectionHooks):
    """A connection that explains the errors of its statements, and notes what they have aborted.

    :param engine: The engine.
    """

    engine: RestingEngine

    carried: Carried | None = None
    """The settings that its statements carry, if any."""

    _phase: Phase

    _failure: exc.DBAPIError | None = None
    """The error that has aborted the open transaction."""

    _advice: str | None = None
    """The advice to add to the text of an error that SQLAlchemy is about to wrap."""

    _may_be_stored: bool | None = None
    """After an error: whether the one statement of a transaction may have been executed."""

    def is_inside(self) -> bool:
        """Tell whether a transaction is open or begins, or one statement is a whole transaction."""
        raise NotImplementedError

    def refuse_if_aborted(self) -> None:
        """Refuse to commit after an error: PostgreSQL would roll back, and no driver reports that.

        :raises sqlalchemy.exc.PendingRollbackError: if a statement of the transaction failed. Its
            cause is the error of that statement.
        """
        held = self.held
        if held is None:
            if self._failure is not None:
                raise exc.PendingRollbackError(LOST_INSIDE) from self._failure
        elif self.engine.switch.is_aborted(held.dbapi_connection):
            raise exc.PendingRollbackError(NOTHING_STORED) from self._failure

    def before_error(self, error: BaseException, statement: Any, cursor: Any, context: Any) -> None:
        held = self.held
        self._advice = None if held is None else advise(error, self)
        if held is not None and was_refused(error):
            held.info[IN_USE] = _is_in_use(self)
            if is_standby(held.driver_connection) and getattr(self.engine, "primary", None) is None:
                held.info[LEFT_BEHIND] = True  # the pool closes it later
        if (take_back := getattr(context, "take_back", None)) is not None:
            take_back()
        if self._phase is STANDALONE:
            self._may_be_stored = held is None or (
                is_loss(error, self.dialect, held.dbapi_connection, cursor)
                and _may_have_sent(cursor)
            )
        if held is None:
            return
        if self.engine.switch.is_busy(held.dbapi_connection):
            # An exception of a signal handler, or a timeout of gevent, has interrupted psycopg
            # while it waited. Each later statement, even ROLLBACK, would fail with "another command
            # is already in progress", and that error would hide the exception.
            self.invalidate()
            close_lost_cursor(cursor)
            self._may_be_stored = True
            return
        declared = getattr(context, "declares", None)
        # SQLAlchemy passes no statement if the error is that of a later FETCH.
        if (
            declared is None
            or statement is None
            or is_loss(error, self.dialect, held.dbapi_connection, cursor)
        ):
            return
        # DECLARE has failed, so there is no cursor on the server. The drivers would try to close
        # the cursor, or ask the server about it.
        self.undeclared = declared
        if not context.had_cursors:
            held.info.pop(HELD_CURSORS, None)
        if self.dialect.driver == "psycopg":  # psycopg warns of an open cursor
            self.dialect.loaded_dbapi.Cursor.close(declared)

    def on_error(self, error: exc.DBAPIError, cursor: Any) -> exc.DBAPIError | None:
        if error.connection_invalidated:
            close_lost_cursor(cursor)
        if self._advice is not None:
            error.add_detail(self._advice)
        if self.carried is not None:
            self.carried.explain(error)
        if not self.is_inside() or self._phase is STANDALONE:
            return None
        timed_out = None if self.carried is None else self.carried.timed_out(error)
        self._note_failure(timed_out or error)
        return timed_out

    def _note_failure(self, error: exc.DBAPIError) -> None:
        """Note the error that has aborted the open transaction, and add it to later errors."""
        held = self.held
        if error.connection_invalidated:
            self._failure = error  # the rollback of a savepoint does not repair this
            return
        if held is None or not self.engine.switch.is_aborted(held.dbapi_connection):
            return
        if self._failure is None:
            self._failure = error
        elif sqlstate(error) == "25P02":  # in_failed_sql_transaction
            first, *_ = str(self._failure.orig).strip().splitlines() or [""]
            error.add_detail(
                f"An earlier statement of this transaction failed ({first}), and that error was "
                "caught. Let the error leave the block, or call "
                "rollback(), or put the statement that may fail into `with session.atomic():` or "
                "`with session.begin_nested():`." + see("caught-error")
            )

    def forget_failure(self) -> None:
        """Forget the error after ROLLBACK TO SAVEPOINT, unless the connection was lost."""
        if self.held is not None:
            self._failure = None
        if self.carried is not None:
            self.carried.forget()


def _may_have_sent(cursor: Any) -> bool:
    """Tell, after an exception, whether a statement may have been sent on a cursor.

    psycopg2 sets ``cursor.query`` immediately before it sends the statement. psycopg 3 shows
    nothing until the answer is there, so the statement may have been sent.

    :param cursor: The cursor; ``None`` if the error came before there was a cursor.
    """
    return cursor is not None and getattr(cursor, "query", cursor) is not None


def _is_in_use(connection: Any) -> bool:
    """Tell whether a savepoint, a stream or a lock would be lost with the DBAPI connection.

    :param connection: A connection of this package.
    """
    unread = connection._unread()
    has_streams = unread is not None and any(unread.streams())
    return has_streams or connection.is_held_by_user() or connection.in_nested_transaction()
