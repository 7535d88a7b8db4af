"""Units of work: a session for one block or call, which commits as a whole or not at all."""
