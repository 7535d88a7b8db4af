"""Which transaction a connection is in."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Which transaction a connection is in, if any. This tells whether the driver is in autocommit.

    The phase changes before the driver leaves autocommit, and after the driver has returned to it.
    So if an exception from a signal handler interrupts the return, the phase is still OPEN.
    """

    RESTING = "resting"
    """The connection is in no transaction: the driver is in autocommit."""

    STANDALONE = "standalone"
    """The session's transaction is expected to be one statement: the driver stays in autocommit."""

    BEGINNING = "beginning"
    """A transaction is beginning. What listeners to the begin send is part of the transaction."""

    OPEN = "open"
    """A transaction is open, or is being ended: the driver is not in autocommit."""


# Each statement reads the phase, and reading an attribute of an Enum is slow.
RESTING, STANDALONE, BEGINNING, OPEN = Phase
