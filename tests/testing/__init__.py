"""Tests of the package fictive_sqlalchemy.testing."""
