"""A model of the contract of a session, and the tables of the state machine that uses it."""
