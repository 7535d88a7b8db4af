"""Tests of the session, in more detail than ``tests/core/contract``."""
