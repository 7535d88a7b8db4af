"""Tests of the session, closer than the contract."""
