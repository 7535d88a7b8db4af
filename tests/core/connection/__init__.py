"""Tests of the connection of ``engine.connect()``, in more detail than ``tests/core/contract``."""
