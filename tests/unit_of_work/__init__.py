"""Units of work: each is a session for one block or call, and commits as a whole or not at all."""
