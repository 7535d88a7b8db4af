"""Where a session's reads go, shown by a replica that is real and stands still when it has to."""
