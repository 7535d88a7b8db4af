"""A transaction that stores one object by one statement: what is sent, and what must not be."""
