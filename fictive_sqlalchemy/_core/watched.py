"""What a connection notes of its transaction: its phase, its failure, what it leaves behind."""

from __future__ import annotations

from enum import Enum
from typing import Any

from sqlalchemy import exc

from .autocommit import LEFT_BEHIND
from .errors import NOTHING_STORED, sqlstate
from .resting import RestingEngine
from .server_state import Left, warn
from .sqlalchemy_private import ConnectionHooks


class Phase(Enum):
    """Where a connection stands, as far as the driver's autocommit is concerned.

    It says so before the driver is taken out of autocommit, and until the driver is back. So a
    connection whose way back was interrupted, by an exception from a signal handler, is known.
    """

    RESTING = "resting"
    """The driver is in autocommit."""

    BEGINNING = "beginning"
    """A transaction begins. Listeners to its begin may send something, which is part of it."""

    OPEN = "open"
    """A transaction is open, or is being ended."""


# Each statement asks, and the attributes of an Enum are slow.
RESTING, BEGINNING, OPEN = Phase


class WatchedConnection(ConnectionHooks):
    """A connection that knows what has happened in its transaction, and what will stay of it."""

    engine: RestingEngine

    _owner: Any
    """The session that has it on loan."""

    _phase: Phase
    """Where it stands."""

    _failure: exc.DBAPIError | None
    """The error that has aborted the open transaction."""

    _leaves_something: bool
    """Whether the open transaction leaves something on the server's session if it is committed."""

    def refuse_if_aborted(self) -> None:
        """Refuse to commit after an error: PostgreSQL would roll back, and no driver says so.

        :raises sqlalchemy.exc.PendingRollbackError: if a statement of the transaction failed. Its
            cause is the error of that statement.
        """
        held = self.held
        if held is not None and self.engine.switch.aborted(held.dbapi_connection):
            raise exc.PendingRollbackError(NOTHING_STORED) from self._failure

    def note_failure(self, error: exc.DBAPIError) -> None:
        """Note the error that has aborted the open transaction; say it again with later ones."""
        held = self.held
        if held is None or not self.engine.switch.aborted(held.dbapi_connection):
            return
        if self._failure is None:
            self._failure = error
        elif sqlstate(error) == "25P02":  # in_failed_sql_transaction
            error.add_detail(
                "An earlier statement of this transaction failed, and that error was caught: "
                f"{str(self._failure.orig).strip()}. Let the error leave the block, or put what "
                "may fail into `with session.begin_nested():`."
            )

    def forget_failure(self) -> None:
        """Go on after a savepoint was rolled back, which undoes the abort."""
        self._failure = None

    def note_left_behind(self, left: Left) -> None:
        """Warn of what a statement will leave on the server's session, and have it closed later.

        :param left: What it leaves.
        """
        if self._owner is not None or not left.may_be_held:
            warn(left)
        if left.rolls_back and self._phase is not RESTING:
            self._leaves_something = True
        else:
            self.connection.info[LEFT_BEHIND] = True

    def keep_what_is_left(self) -> None:
        """Note that what the transaction has set stays, because it is about to be committed."""
        if self._leaves_something and (held := self.held) is not None:
            held.info[LEFT_BEHIND] = True
