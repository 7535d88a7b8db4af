"""Tests of the connection of ``engine.connect()``, closer than the contract."""
