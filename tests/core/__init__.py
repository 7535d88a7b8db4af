"""Tests of what needs SQLAlchemy alone."""
