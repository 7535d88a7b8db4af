"""Whether a replica can be used."""

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
        """How often it was found to be promoted. A connection from before may not know of it."""

    @property
    def is_up(self) -> bool:
        """Whether it is not known to be down."""
        return not self._down_until

    def is_promoted(self, *, is_standby: bool) -> bool:
        """Tell whether it was a standby earlier, and is the primary now. Then it counts as down.

        :param is_standby: Whether it is a standby now.
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
        """Tell whether to try it. If it is down, one caller is told so after each pause."""
        if self.is_up:
            return True
        now = time.monotonic()
        if now < self._down_until:
            return False
        # Without a lock, which a fork might copy while it is held: two callers at once do no harm.
        self._down_until = now + RETRY_AFTER
        return True

    def note(self, *, up: bool) -> None:
        """Note that it was reached, or was not."""
        self._down_until = 0.0 if up else time.monotonic() + RETRY_AFTER
