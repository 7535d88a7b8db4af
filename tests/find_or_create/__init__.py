"""Tests of filter_by_or_create on the session of its caller."""
