"""The connections that a session has on loan from the pools, and when they go back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .connection import OptInConnection, Owner
from .engine import OptInEngine


class Loans(dict[OptInEngine, OptInConnection]):
    """The connections of one session, one for each bind that it has used.

    A DBAPI connection is kept for the next statement while its pool has spare ones, and given back
    after a statement when the pool has none.
    """

    # The results that are not read yet. OptInConnection.lend_to() says why they are here.
    _unread: dict[OptInEngine, object] | None = None

    def borrow(self, engine: OptInEngine, owner: Owner, options: Any) -> OptInConnection:
        """Take a connection to a bind on loan from its pool.

        :param engine: The bind. No connection to it is on loan yet.
        :param owner: The session.
        :param options: Execution options for the connection.
        """
        connection = self[engine] = engine.connect()
        if self._unread is None:
            self._unread = {}
        self._unread[engine] = connection.lend_to(owner)
        if options:
            connection.execution_options(**options)
        return connection

    def hand_back(self, engine: OptInEngine) -> None:
        """Invalidate and give back the connection to a bind that turned out to be unusable.

        :param engine: The bind. If no connection to it is on loan, nothing happens.
        """
        connection = self.pop(engine, None)
        if connection is not None:
            connection.invalidate()
            connection.close()

    def handed_out(self) -> Collection[OptInConnection]:
        """Return the connections that the session has given to its user."""
        return [one for one in self.values() if one.is_handed_out and not one.closed]

    def leave(self, transaction: object) -> None:
        """Make the connections leave a transaction of the session that has ended."""
        for connection in self.values():
            if connection.is_standing_alone:
                connection.end_standing_alone()
            elif connection.session_transaction is transaction:
                connection.session_transaction = None
                connection.put_options_back()
                if connection.root_transaction is not None:  # an exception interrupted its end
                    connection.close()
                elif connection.is_inside():
                    connection.roll_back_rest()
            connection.give_back_if_wanted()

    def give_back(self) -> None:
        """Give the DBAPI connections that are in no transaction back to their pools."""
        for connection in self.values():
            connection.give_back()

    def end(self) -> None:
        """Close the connections."""
        try:
            while self:
                self.popitem()[1].close()
        finally:
            if self:  # one close() has failed, and the other connections have to go back
                self.end()

    def invalidate(self) -> None:
        """Make the pools close the DBAPI connections."""
        for connection in self.values():
            if not connection.closed:
                connection.invalidate()
