"""The health of a replica: whether it can be used."""

from __future__ import annotations

import time

#: How long, in seconds, a replica that was lost is left alone before it is tried again.
RETRY_AFTER = 10.0


class Health:
    """Whether a replica can be used, as far as is known. An engine's copies share it."""

    def __init__(self) -> None:
        self._down_until = 0.0
        self._was_standby = False
        self.promotions = 0
        """How often the replica was found to be promoted. An older connection may not know this."""

    @property
    def is_up(self) -> bool:
        """Whether the replica is not known to be down."""
        return not self._down_until

    def is_promoted(self, *, is_standby: bool) -> bool:
        """Tell whether the server was a standby earlier and is the primary now.

        If so, the replica counts as down.

        :param is_standby: Whether the server is a standby now.
        """
        if is_standby:
            self._was_standby = True
        if not self._was_standby or is_standby:
            return False
        if self.is_up:
            self.promotions += 1
        self.note(up=False)
        return True

    def may_be_tried(self) -> bool:
        """Tell whether to try the replica. If it is down, one caller may try after each pause."""
        if self.is_up:
            return True
        now = time.monotonic()
        if now < self._down_until:
            return False
        # No lock is used, because a fork might copy a held lock. Two callers at once do no harm.
        self._down_until = now + RETRY_AFTER
        return True

    def note(self, *, up: bool) -> None:
        """Note whether the replica was reached."""
        self._down_until = 0.0 if up else time.monotonic() + RETRY_AFTER
