"""Which server a session reads from, tested with a real replica whose replay can be paused."""
